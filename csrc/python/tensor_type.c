/*
 * tensor_type.c: bitnet.Tensor: a heap type around a core tensor: attributes, values in and out, operators;
 * everything that computes goes through the ops.
 */
#include "python/module.h"

#include "ops/ops.h"

static bn_tensor *core(PyObject *self) { return ((bn_py_tensor *)self)->tensor; }
static const bn_module_state *state_of(PyObject *self) { return bn_state_of(Py_TYPE(self)); }

/* ---- life --------------------------------------------------------------------------------------------------- */

static PyObject *wrap_as(PyTypeObject *type, bn_tensor *tensor) {
    bn_py_tensor *self = (bn_py_tensor *)type->tp_alloc(type, 0);
    if (self == NULL) {
        bn_tensor_release(tensor);
        return NULL;
    }
    self->tensor = tensor;
    bn_tensor_hold(tensor);
    return (PyObject *)self;
}

PyObject *bn_wrap(const bn_module_state *state, bn_tensor *tensor) { return wrap_as(state->tensor_type, tensor); }

static PyObject *tensor_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"data", "dtype", "requires_grad", NULL};
    PyObject *data, *dtype_name = Py_None;
    int requires_grad = 0;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|Op:Tensor", names, &data, &dtype_name, &requires_grad)) {
        return NULL;
    }
    const bn_module_state *state = bn_state_of(type);
    const int dtype = dtype_name == Py_None ? -1 : bn_parse_dtype(dtype_name);
    if (state == NULL || (dtype < 0 && dtype_name != Py_None)) {
        return NULL;
    }
    bn_tensor *tensor = NULL;
    if (PyObject_TypeCheck(data, state->tensor_type)) {
        /* Another object for the same tensor: how nn.Parameter adopts one. */
        tensor = bn_tensor_retain(core(data));
        if (dtype >= 0 && (bn_dtype)dtype != tensor->dtype) {
            bn_tensor_release(tensor);
            PyErr_Format(PyExc_TypeError, "the tensor is %s; convert it with .to('%s')",
                         bn_dtype_name(core(data)->dtype), bn_dtype_name((bn_dtype)dtype));
            return NULL;
        }
    } else {
        tensor = bn_tensor_from_array(state, data, dtype, bn_device());
    }
    if (tensor == NULL) {
        return NULL;
    }
    if (requires_grad && (tensor->dtype != BN_F32 || !bn_is_leaf(tensor))) {
        PyErr_Format(PyExc_TypeError, "only an f32 leaf can require a gradient, not %s %s",
                     bn_is_leaf(tensor) ? "a leaf of" : "the result of an op in", bn_dtype_name(tensor->dtype));
        bn_tensor_release(tensor);
        return NULL;
    }
    tensor->requires_grad = tensor->requires_grad || requires_grad;
    return wrap_as(type, tensor);
}

static void tensor_dealloc(PyObject *self) {
    PyTypeObject *type = Py_TYPE(self);
    bn_tensor *tensor = core(self);
    if (tensor != NULL) {
        bn_tensor_drop(tensor);
        bn_tensor_release(tensor);
    }
    type->tp_free(self);
    Py_DECREF(type);
}

/* ---- attributes --------------------------------------------------------------------------------------------- */

static PyObject *get_shape(PyObject *self, void *unused) {
    (void)unused;
    const bn_tensor *t = core(self);
    PyObject *shape = PyTuple_New(t->ndim);
    for (int i = 0; shape != NULL && i < t->ndim; i++) {
        PyObject *size = PyLong_FromLongLong(t->shape[i]);
        if (size == NULL) {
            Py_CLEAR(shape);
            break;
        }
        PyTuple_SET_ITEM(shape, i, size);
    }
    return shape;
}

static PyObject *get_ndim(PyObject *self, void *unused) {
    (void)unused;
    return PyLong_FromLong(core(self)->ndim);
}

static PyObject *get_size(PyObject *self, void *unused) {
    (void)unused;
    return PyLong_FromLongLong(core(self)->count);
}

static PyObject *get_nbytes(PyObject *self, void *unused) {
    (void)unused;
    return PyLong_FromSize_t(bn_tensor_bytes(core(self)));
}

static PyObject *get_dtype(PyObject *self, void *unused) {
    (void)unused;
    return PyUnicode_FromString(bn_dtype_name(core(self)->dtype));
}

static PyObject *get_device(PyObject *self, void *unused) {
    (void)unused;
    return PyUnicode_FromString(bn_backend_of(core(self))->name);
}

static PyObject *get_is_leaf(PyObject *self, void *unused) {
    (void)unused;
    return PyBool_FromLong(bn_is_leaf(core(self)));
}

static PyObject *get_requires_grad(PyObject *self, void *unused) {
    (void)unused;
    return PyBool_FromLong(core(self)->requires_grad);
}

static int set_requires_grad(PyObject *self, PyObject *value, void *unused) {
    (void)unused;
    bn_tensor *t = core(self);
    const int wanted = value == NULL ? -1 : PyObject_IsTrue(value);
    if (wanted < 0) {
        if (value == NULL) {
            PyErr_SetString(PyExc_AttributeError, "requires_grad cannot be deleted");
        }
        return -1;
    }
    if (!bn_is_leaf(t) || t->dtype != BN_F32) {
        PyErr_SetString(PyExc_RuntimeError, "requires_grad can be set on f32 leaves only; detach() makes one");
        return -1;
    }
    t->requires_grad = wanted;
    return 0;
}

static PyObject *get_grad(PyObject *self, void *unused) {
    (void)unused;
    bn_tensor *t = core(self);
    if (t->grad == NULL) {
        Py_RETURN_NONE;
    }
    bn_status status = bn_grad_settle(t);
    if (status != BN_OK) {
        return bn_raise(state_of(self), status);
    }
    return bn_wrap(state_of(self), bn_tensor_retain(t->grad));
}

static int set_grad(PyObject *self, PyObject *value, void *unused) {
    (void)unused;
    bn_tensor *t = core(self);
    if (value != NULL && value != Py_None) {
        PyErr_SetString(PyExc_TypeError, "grad can only be set to None; change its values with grad.copy_(...)");
        return -1;
    }
    bn_tensor_release(t->grad);
    t->grad = NULL;
    t->grad_is_stale = false;
    return 0;
}

static PyGetSetDef getset[] = {
    {"shape", get_shape, NULL, "Sizes of the dimensions.", NULL},
    {"ndim", get_ndim, NULL, "Number of dimensions.", NULL},
    {"size", get_size, NULL, "Number of elements.", NULL},
    {"nbytes", get_nbytes, NULL, "Bytes of the elements.", NULL},
    {"dtype", get_dtype, NULL, "'f32', 'bf16', 'i8', 'i32' or 'ternary2'.", NULL},
    {"device", get_device, NULL, "'cpu', 'cuda' or 'meta'.", NULL},
    {"is_leaf", get_is_leaf, NULL, "True unless the tensor was made by a recorded op.", NULL},
    {"requires_grad", get_requires_grad, set_requires_grad, "Whether backward() computes a gradient for it.", NULL},
    {"grad", get_grad, set_grad, "The accumulated gradient (f32, same shape), or None.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

/* ---- values in and out -------------------------------------------------------------------------------------- */

static PyObject *tensor_numpy(PyObject *self, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"copy", NULL};
    int copy = 0;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "|p:numpy", names, &copy)) {
        return NULL;
    }
    return bn_tensor_to_array(self, copy != 0);
}

static PyObject *tensor_item(PyObject *self, PyObject *unused) {
    (void)unused;
    const bn_tensor *t = core(self);
    bn_shape_text text;
    if (t->count != 1) {
        return PyErr_Format(PyExc_ValueError, "item: needs one element, the shape is %s", bn_shape_print(t, &text));
    }
    union {
        float f32;
        int32_t i32;
        int8_t i8;
    } value;
    if (t->dtype != BN_F32 && t->dtype != BN_I32 && t->dtype != BN_I8) {
        return PyErr_Format(PyExc_TypeError, "item: convert %s to f32 first", bn_dtype_name(t->dtype));
    }
    bn_status status = bn_backend_of(t)->download(&value, bn_data(t), bn_tensor_bytes(t));
    if (status != BN_OK) {
        return bn_raise(state_of(self), status);
    }
    if (t->dtype == BN_F32) {
        return PyFloat_FromDouble((double)value.f32);
    }
    return PyLong_FromLong(t->dtype == BN_I32 ? value.i32 : value.i8);
}

static PyObject *tensor_copy_(PyObject *self, PyObject *source) {
    const bn_module_state *state = state_of(self);
    bn_tensor *t = core(self), *from;
    if (PyObject_TypeCheck(source, state->tensor_type)) {
        from = bn_tensor_retain(core(source));
    } else {
        from = bn_tensor_from_array(state, source, (int)t->dtype, bn_cpu_backend());
    }
    if (from == NULL) {
        return NULL;
    }
    bn_status status = bn_same_shape(t, from) ? BN_OK : BN_ERR_SHAPE;
    if (status == BN_OK) {
        status = bn_tensor_copy(t, from);
    } else {
        bn_shape_text a, b;
        bn_fail(status, "copy_: shape %s into %s", bn_shape_print(from, &a), bn_shape_print(t, &b));
    }
    bn_tensor_release(from);
    return status == BN_OK ? Py_NewRef(self) : bn_raise(state, status);
}

static PyObject *tensor_detach(PyObject *self, PyObject *unused) {
    (void)unused;
    bn_tensor *t = core(self), *view;
    bn_status status = bn_tensor_view(t, t->ndim, t->shape, &view);
    if (status != BN_OK) {
        return bn_raise(state_of(self), status);
    }
    view->channel_scales = t->channel_scales;
    return bn_wrap(state_of(self), view);
}

static PyObject *tensor_backward(PyObject *self, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"factor", NULL};
    float factor = 1.0f;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "|f:backward", names, &factor)) {
        return NULL;
    }
    bn_status status;
    bn_tape *pinned = bn_tape_pin();
    BN_WITHOUT_GIL(status, bn_tape_backward(core(self), factor));
    bn_tape_unpin(pinned);
    if (status != BN_OK) {
        return bn_raise(state_of(self), status);
    }
    Py_RETURN_NONE;
}

/* ---- operators ---------------------------------------------------------------------------------------------- */

typedef bn_status (*binary_fn)(bn_tensor *a, bn_tensor *b, bn_tensor **out);

static PyObject *finish(const bn_module_state *state, bn_tape *tape, bn_status status, bn_tensor *result) {
    PyObject *wrapped = status == BN_OK ? bn_wrap(state, result) : bn_raise(state, status);
    bn_tape_unpin(tape);
    return wrapped;
}

static PyObject *tensor_op(PyObject *a, PyObject *b, binary_fn fn) {
    const bn_module_state *state = state_of(a);
    bn_tape *tape = bn_tape_pin();
    bn_tensor *result = NULL;
    bn_status status;
    BN_WITHOUT_GIL(status, fn(core(a), core(b), &result));
    return finish(state, tape, status, result);
}

static PyObject *times(PyObject *self, double factor) {
    bn_tape *tape = bn_tape_pin();
    bn_tensor *result = NULL;
    bn_status status;
    BN_WITHOUT_GIL(status, bn_scale(core(self), (float)factor, &result));
    return finish(state_of(self), tape, status, result);
}

/* A row is added to every row, whichever side it stands on. */
static bn_status add(bn_tensor *a, bn_tensor *b, bn_tensor **out) {
    return a->ndim < b->ndim ? bn_add(b, a, 1.0f, 1.0f, out) : bn_add(a, b, 1.0f, 1.0f, out);
}
static bn_status subtract(bn_tensor *a, bn_tensor *b, bn_tensor **out) { return bn_add(a, b, 1.0f, -1.0f, out); }

/* The module state if the object is a Tensor; used where either operand may be the foreign one. */
static bool is_tensor(PyObject *object) {
    bn_module_state *state = bn_state_of(Py_TYPE(object));
    PyErr_Clear();
    return state != NULL && PyObject_TypeCheck(object, state->tensor_type);
}

static PyObject *binary(PyObject *a, PyObject *b, binary_fn fn) {
    if (!is_tensor(a) || !is_tensor(b)) {
        Py_RETURN_NOTIMPLEMENTED;
    }
    return tensor_op(a, b, fn);
}

static PyObject *nb_add(PyObject *a, PyObject *b) { return binary(a, b, add); }
static PyObject *nb_subtract(PyObject *a, PyObject *b) { return binary(a, b, subtract); }
static PyObject *nb_matmul(PyObject *a, PyObject *b) { return binary(a, b, bn_matmul); }

static PyObject *nb_multiply(PyObject *a, PyObject *b) {
    const bool left = is_tensor(a), right = is_tensor(b);
    if (left && right) {
        return tensor_op(a, b, bn_mul);
    }
    PyObject *number = left ? b : a;
    if (!bn_is_number(number)) {
        Py_RETURN_NOTIMPLEMENTED;
    }
    const double factor = PyFloat_AsDouble(number);
    return factor == -1.0 && PyErr_Occurred() ? NULL : times(left ? a : b, factor);
}

static PyObject *nb_divide(PyObject *a, PyObject *b) {
    if (!is_tensor(a) || !bn_is_number(b)) {
        Py_RETURN_NOTIMPLEMENTED;
    }
    const double divisor = PyFloat_AsDouble(b);
    if (divisor == 0.0) {
        PyErr_SetString(PyExc_ZeroDivisionError, "tensor divided by zero");
        return NULL;
    }
    return divisor == -1.0 && PyErr_Occurred() ? NULL : times(a, 1.0 / divisor);
}

static PyObject *nb_negative(PyObject *a) { return times(a, -1.0); }

static PyObject *nb_float(PyObject *self) {
    PyObject *value = tensor_item(self, NULL);
    PyObject *number = value == NULL ? NULL : PyNumber_Float(value);
    Py_XDECREF(value);
    return number;
}

static PyObject *subscript(PyObject *self, PyObject *key) {
    (void)self;
    (void)key;
    PyErr_SetString(PyExc_TypeError, "tensors are always dense and have no indexed views; use .numpy()[...]");
    return NULL;
}

static PyObject *no_truth(PyObject *self) {
    bn_shape_text text;
    PyErr_Format(PyExc_TypeError, "a tensor of shape %s has no truth value; use item()",
                 bn_shape_print(core(self), &text));
    return NULL;
}

static int nb_bool(PyObject *self) {
    (void)no_truth(self);
    return -1;
}

static Py_ssize_t sq_length(PyObject *self) {
    if (core(self)->ndim == 0) {
        PyErr_SetString(PyExc_TypeError, "a scalar tensor has no length");
        return -1;
    }
    return (Py_ssize_t)core(self)->shape[0];
}

/* ---- methods that are ops ------------------------------------------------------------------------------------ */

static PyObject *run_unary(PyObject *self, bn_status (*fn)(bn_tensor *, bn_tensor **)) {
    bn_tape *tape = bn_tape_pin();
    bn_tensor *result = NULL;
    bn_status status;
    BN_WITHOUT_GIL(status, fn(core(self), &result));
    return finish(state_of(self), tape, status, result);
}

static PyObject *tensor_sum(PyObject *self, PyObject *unused) {
    (void)unused;
    return run_unary(self, bn_sum);
}

static PyObject *tensor_mean(PyObject *self, PyObject *unused) {
    (void)unused;
    return run_unary(self, bn_mean);
}

static PyObject *tensor_softmax(PyObject *self, PyObject *unused) {
    (void)unused;
    return run_unary(self, bn_softmax);
}

static PyObject *tensor_transpose(PyObject *self, PyObject *unused) {
    (void)unused;
    return run_unary(self, bn_transpose);
}

/* reshape(2, 3) and reshape((2, 3)) */
static PyObject *tensor_reshape(PyObject *self, PyObject *args) {
    PyObject *sequence = args;
    if (PyTuple_GET_SIZE(args) == 1 && !PyLong_Check(PyTuple_GET_ITEM(args, 0))) {
        sequence = PyTuple_GET_ITEM(args, 0);
    }
    int64_t shape[BN_MAX_DIMS];
    const int ndim = bn_parse_shape(sequence, shape);
    if (ndim < 0) {
        return NULL;
    }
    bn_tape *tape = bn_tape_pin();
    bn_tensor *result = NULL;
    bn_status status;
    BN_WITHOUT_GIL(status, bn_reshape(core(self), ndim, shape, &result));
    return finish(state_of(self), tape, status, result);
}

static PyObject *tensor_to(PyObject *self, PyObject *name) {
    const int dtype = bn_parse_dtype(name);
    if (dtype < 0) {
        return NULL;
    }
    if ((bn_dtype)dtype == core(self)->dtype) {
        return Py_NewRef(self);
    }
    bn_tape *tape = bn_tape_pin();
    bn_tensor *result = NULL;
    bn_status status;
    BN_WITHOUT_GIL(status, bn_convert(core(self), (bn_dtype)dtype, &result));
    return finish(state_of(self), tape, status, result);
}

/* The values in whatever dtype NumPy has for them, recorded nowhere. */
static PyObject *printable_array(PyObject *self) {
    const bn_tensor *t = core(self);
    if (t->dtype != BN_BF16 && t->dtype != BN_TERNARY2 && bn_dtype_is_stored(t->dtype)) {
        return bn_tensor_to_array(self, true);
    }
    bn_tensor *converted = NULL;
    bn_tape *tape = bn_tape_suspend();
    bn_grad_disable();
    bn_status status = bn_convert(core(self), BN_F32, &converted);
    bn_grad_enable();
    bn_tape_resume(tape);
    if (status != BN_OK) {
        return bn_raise(state_of(self), status);
    }
    PyObject *wrapped = bn_wrap(state_of(self), converted);
    PyObject *array = wrapped == NULL ? NULL : bn_tensor_to_array(wrapped, true);
    Py_XDECREF(wrapped);
    return array;
}

static PyObject *tensor_repr(PyObject *self) {
    PyObject *numpy = PyImport_ImportModule("numpy"), *array = NULL, *values = NULL, *text = NULL;
    array = numpy == NULL ? NULL : printable_array(self);
    values = array == NULL
                 ? NULL
                 : PyObject_CallMethod(numpy, "array2string", "OOOOs", array, Py_None, Py_None, Py_None, ", ");
    if (values != NULL) {
        bn_shape_text shape;
        const bool elsewhere = bn_backend_of(core(self)) != bn_cpu_backend();
        text = PyUnicode_FromFormat("Tensor(%U, shape=%s, dtype='%s'%s%s%s%s)", values,
                                    bn_shape_print(core(self), &shape), bn_dtype_name(core(self)->dtype),
                                    elsewhere ? ", device='" : "", elsewhere ? bn_backend_of(core(self))->name : "",
                                    elsewhere ? "'" : "", core(self)->requires_grad ? ", requires_grad=True" : "");
    }
    Py_XDECREF(values);
    Py_XDECREF(array);
    Py_XDECREF(numpy);
    return text;
}

/* In a notebook cell: what bitnet/display.py makes of it. */
static PyObject *tensor_html(PyObject *self, PyObject *unused) {
    (void)unused;
    PyObject *display = PyImport_ImportModule("bitnet.display");
    PyObject *html = display == NULL ? NULL : PyObject_CallMethod(display, "tensor_html", "O", self);
    Py_XDECREF(display);
    return html;
}

/* ---- the type ----------------------------------------------------------------------------------------------- */

#define WITH_KEYWORDS(fn) (PyCFunction)(void (*)(void))(fn)

static PyMethodDef methods[] = {
    {"numpy", WITH_KEYWORDS(tensor_numpy), METH_VARARGS | METH_KEYWORDS,
     "The values as an array: shared with a leaf (writes go through), copied from the result of an op."},
    {"item", tensor_item, METH_NOARGS, "The value of a one-element tensor as a Python number."},
    {"copy_", tensor_copy_, METH_O, "Copies the values of a tensor or array of the same shape into this one."},
    {"detach", tensor_detach, METH_NOARGS, "The same memory without history: no gradient flows through it."},
    {"backward", WITH_KEYWORDS(tensor_backward), METH_VARARGS | METH_KEYWORDS,
     "Adds factor * d(self)/d(leaf) to the gradient of every leaf that requires one."},
    {"sum", tensor_sum, METH_NOARGS, "Sum of all elements, a scalar."},
    {"mean", tensor_mean, METH_NOARGS, "Mean of all elements, a scalar."},
    {"softmax", tensor_softmax, METH_NOARGS, "Softmax over the last dimension."},
    {"transpose", tensor_transpose, METH_NOARGS, "Swaps the last two dimensions (a copy)."},
    {"reshape", tensor_reshape, METH_VARARGS, "Another shape over the same memory; one size may be -1."},
    {"to", tensor_to, METH_O, "The same values in another dtype (the tensor itself if it has it)."},
    {"_repr_html_", tensor_html, METH_NOARGS, "Shape, values and their distribution, for a notebook cell."},
    {"__dlpack__", WITH_KEYWORDS(bn_dlpack_export), METH_VARARGS | METH_KEYWORDS, "The DLPack capsule of this memory."},
    {"__dlpack_device__", bn_dlpack_device, METH_NOARGS, "(device type, device number) of DLPack."},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot slots[] = {
    {Py_tp_new, tensor_new},
    {Py_tp_dealloc, tensor_dealloc},
    {Py_tp_repr, tensor_repr},
    {Py_tp_methods, methods},
    {Py_tp_getset, getset},
    {Py_bf_getbuffer, bn_tensor_getbuffer},
    {Py_bf_releasebuffer, bn_tensor_releasebuffer},
    {Py_nb_add, nb_add},
    {Py_nb_subtract, nb_subtract},
    {Py_nb_multiply, nb_multiply},
    {Py_nb_true_divide, nb_divide},
    {Py_nb_matrix_multiply, nb_matmul},
    {Py_nb_negative, nb_negative},
    {Py_nb_float, nb_float},
    {Py_nb_bool, nb_bool},
    {Py_mp_subscript, subscript},
    {Py_sq_length, sq_length},
    {Py_tp_doc, "Tensor(data, dtype=None, requires_grad=False): dense row-major numbers on a device.\n\n"
                "data: an array or nested lists (floats become f32, integers i32), or another Tensor to share."},
    {0, NULL},
};

PyType_Spec bn_tensor_spec = {
    .name = "bitnet._core.Tensor",
    .basicsize = sizeof(bn_py_tensor),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE,
    .slots = slots,
};
