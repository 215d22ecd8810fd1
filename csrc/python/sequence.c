/* sequence.c: sequences of tensors, such as the parameters of a model. */
#include "python/module.h"

bn_tensor **bn_tensor_list(PyObject *module, PyObject *sequence, PyObject **items) {
    *items = PySequence_Fast(sequence, "expected a sequence of tensors");
    if (*items == NULL) {
        return NULL;
    }
    const Py_ssize_t count = PySequence_Fast_GET_SIZE(*items);
    bn_tensor **tensors = PyMem_Calloc((size_t)count + 1, sizeof *tensors);
    for (Py_ssize_t i = 0; tensors != NULL && i < count; i++) {
        tensors[i] = bn_unwrap(bn_state(module), PySequence_Fast_GET_ITEM(*items, i), "parameter");
        if (tensors[i] == NULL) {
            PyMem_Free(tensors);
            tensors = NULL;
        }
    }
    if (tensors == NULL) {
        if (!PyErr_Occurred()) {
            PyErr_NoMemory();
        }
        Py_CLEAR(*items);
    }
    return tensors;
}

PyObject *bn_for_each_tensor(PyObject *module, PyObject *sequence, bn_status (*fn)(bn_tensor *)) {
    PyObject *items;
    bn_tensor **params = bn_tensor_list(module, sequence, &items);
    if (params == NULL) {
        return NULL;
    }
    bn_status status = BN_OK;
    for (Py_ssize_t i = 0; status == BN_OK && i < PySequence_Fast_GET_SIZE(items); i++) {
        status = fn(params[i]);
    }
    PyMem_Free(params);
    Py_DECREF(items);
    return bn_none_or_raise(module, status);
}
