/* tape_type.c: bitnet.Tape, an explicit tape: `with Tape() as tape: loss = f(x)`, then tape.replay(). */
#include <stddef.h>

#include "python/module.h"

typedef struct bn_py_tape {
    PyObject_HEAD bn_tape *tape;
} bn_py_tape;

static PyObject *tape_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    static char *names[] = {NULL};
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, ":Tape", names)) {
        return NULL;
    }
    bn_py_tape *self = (bn_py_tape *)type->tp_alloc(type, 0);
    if (self == NULL) {
        return NULL;
    }
    bn_status status = bn_tape_new(&self->tape);
    if (status != BN_OK) {
        bn_raise(bn_state_of(type), status);
        Py_DECREF(self);
        return NULL;
    }
    return (PyObject *)self;
}

static void tape_dealloc(PyObject *object) {
    PyTypeObject *type = Py_TYPE(object);
    bn_tape_free(((bn_py_tape *)object)->tape);
    type->tp_free(object);
    Py_DECREF(type);
}

static PyObject *tape_enter(PyObject *self, PyObject *unused) {
    (void)unused;
    bn_status status = bn_tape_enter(((bn_py_tape *)self)->tape);
    return status == BN_OK ? Py_NewRef(self) : bn_raise(bn_state_of(Py_TYPE(self)), status);
}

static PyObject *tape_exit(PyObject *self, PyObject *unused) {
    (void)unused;
    bn_tape_leave(((bn_py_tape *)self)->tape);
    Py_RETURN_NONE;
}

static PyObject *tape_replay(PyObject *self, PyObject *unused) {
    (void)unused;
    bn_status status;
    BN_WITHOUT_GIL(status, bn_tape_replay(((bn_py_tape *)self)->tape));
    if (status != BN_OK) {
        return bn_raise(bn_state_of(Py_TYPE(self)), status);
    }
    Py_RETURN_NONE;
}

static Py_ssize_t tape_length(PyObject *self) { return (Py_ssize_t)bn_tape_length(((bn_py_tape *)self)->tape); }

static PyObject *tape_ops(PyObject *self, void *unused) {
    (void)unused;
    const bn_tape *tape = ((bn_py_tape *)self)->tape;
    const int64_t length = bn_tape_length(tape);
    PyObject *list = PyList_New((Py_ssize_t)length);
    for (int64_t i = 0; list != NULL && i < length; i++) {
        PyObject *name = PyUnicode_FromString(bn_tape_op_name(tape, i));
        if (name == NULL) {
            Py_CLEAR(list);
            break;
        }
        PyList_SET_ITEM(list, (Py_ssize_t)i, name);
    }
    return list;
}

static PyMethodDef methods[] = {
    {"__enter__", tape_enter, METH_NOARGS, "Start recording every op of this thread."},
    {"__exit__", tape_exit, METH_VARARGS, "Stop recording."},
    {"replay", tape_replay, METH_NOARGS, "Run every recorded op again, in order, into the same tensors."},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef getset[] = {
    {"ops", tape_ops, NULL, "Names of the recorded ops, in order.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot slots[] = {
    {Py_tp_new, tape_new},
    {Py_tp_dealloc, tape_dealloc},
    {Py_tp_methods, methods},
    {Py_tp_getset, getset},
    {Py_sq_length, tape_length},
    {Py_tp_doc, "Records ops so that they can be replayed without Python: same tensors, new values.\n\n"
                "with Tape() as tape:\n    loss = model(tokens, targets)\nloss.backward()\n"
                "tokens.copy_(next_tokens); tape.replay(); loss.backward()"},
    {0, NULL},
};

PyType_Spec bn_tape_spec = {
    .name = "bitnet.Tape",
    .basicsize = sizeof(bn_py_tape),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = slots,
};
