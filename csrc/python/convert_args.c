/* convert_args.c: Python arguments to core values, with sentences that name the argument. */
#include <string.h>

#include "python/module.h"

bn_tensor *bn_unwrap(const bn_module_state *state, PyObject *object, const char *argument) {
    if (!PyObject_TypeCheck(object, state->tensor_type)) {
        PyErr_Format(PyExc_TypeError, "%s must be a bitnet.Tensor, not %.80s", argument, Py_TYPE(object)->tp_name);
        return NULL;
    }
    return ((bn_py_tensor *)object)->tensor;
}

bool bn_unwrap_optional(const bn_module_state *state, PyObject *object, const char *argument, bn_tensor **out) {
    *out = NULL;
    if (object == NULL || object == Py_None) {
        return true;
    }
    *out = bn_unwrap(state, object, argument);
    return *out != NULL;
}

int bn_parse_shape(PyObject *sequence, int64_t shape[BN_MAX_DIMS]) {
    PyObject *items = PySequence_Fast(sequence, "a shape is a sequence of integers");
    if (items == NULL) {
        return -1;
    }
    const Py_ssize_t ndim = PySequence_Fast_GET_SIZE(items);
    int result = -1;
    if (ndim > BN_MAX_DIMS) {
        PyErr_Format(PyExc_ValueError, "a tensor has at most %d dimensions, not %zd", BN_MAX_DIMS, ndim);
        goto done;
    }
    for (Py_ssize_t i = 0; i < ndim; i++) {
        shape[i] = PyLong_AsLongLong(PySequence_Fast_GET_ITEM(items, i));
        if (shape[i] == -1 && PyErr_Occurred()) {
            goto done;
        }
    }
    result = (int)ndim;
done:
    Py_DECREF(items);
    return result;
}

int bn_parse_dtype(PyObject *name) {
    const char *text = PyUnicode_Check(name) ? PyUnicode_AsUTF8(name) : NULL;
    for (int d = 0; text != NULL && bn_dtype_is_stored((bn_dtype)d); d++) {
        if (strcmp(text, bn_dtype_name((bn_dtype)d)) == 0) {
            return d;
        }
    }
    if (!PyErr_Occurred()) {
        PyErr_Format(PyExc_TypeError, "unknown dtype %R; one of 'f32', 'bf16', 'i8', 'i32', 'ternary2'", name);
    }
    return -1;
}
