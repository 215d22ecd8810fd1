/* numpy_bridge.c: NumPy arrays in and out; the only file that includes NumPy's headers. */
#include "python/module.h"

#define NPY_NO_DEPRECATED_API NPY_1_22_API_VERSION
#include <numpy/arrayobject.h>

bool bn_numpy_init(void) { return PyArray_ImportNumPyAPI() == 0; }

bool bn_is_number(PyObject *object) {
    return PyFloat_Check(object) || PyLong_Check(object) || PyArray_IsScalar(object, Floating) ||
           PyArray_IsScalar(object, Integer);
}

PyObject *bn_new_byte_array(size_t size, uint8_t **data) {
    npy_intp length = (npy_intp)size;
    if (length < 0) {
        return PyErr_NoMemory();
    }
    PyObject *array = PyArray_SimpleNew(1, &length, NPY_UINT8);
    *data = array == NULL ? NULL : PyArray_DATA((PyArrayObject *)array);
    return array;
}

/* The element type of our tensor for an array of this type, or -1. */
static int natural_dtype(const PyArrayObject *array) {
    const int type = PyArray_TYPE(array);
    if (PyTypeNum_ISFLOAT(type)) {
        return BN_F32;
    }
    return PyTypeNum_ISINTEGER(type) ? (type == NPY_INT8 ? BN_I8 : BN_I32) : -1;
}

/* The least or greatest element as a Python integer. Returns new. */
static PyObject *extreme(PyArrayObject *array, PyObject *(*find)(PyArrayObject *, int, PyArrayObject *)) {
    PyObject *scalar = find(array, NPY_RAVEL_AXIS, NULL);
    PyObject *number = scalar == NULL ? NULL : PyNumber_Long(scalar);
    Py_XDECREF(scalar);
    return number;
}

/* Refuses integers that do not fit the 8 or 32 bits they are to be kept in. */
static bool integers_fit(PyArrayObject *array, int dtype) {
    const int bits = dtype == BN_I8 ? 8 : 32;
    if (PyArray_SIZE(array) == 0) {
        return true;
    }
    PyObject *low = extreme(array, PyArray_Min), *high = low == NULL ? NULL : extreme(array, PyArray_Max);
    bool fits = false;
    if (high != NULL) {
        const long long limit = 1LL << (bits - 1);
        int low_overflow, high_overflow;
        const long long a = PyLong_AsLongLongAndOverflow(low, &low_overflow);
        const long long b = PyLong_AsLongLongAndOverflow(high, &high_overflow);
        fits = low_overflow == 0 && high_overflow == 0 && a >= -limit && b < limit;
        if (!fits) {
            PyErr_Format(PyExc_ValueError, "integers from %R to %R do not fit a tensor of i%d", low, high, bits);
        }
    }
    Py_XDECREF(low);
    Py_XDECREF(high);
    return fits;
}

static PyArrayObject *as_array(PyObject *source, int dtype) {
    PyArrayObject *array = (PyArrayObject *)PyArray_FROM_O(source);
    if (array == NULL) {
        return NULL;
    }
    const int natural = natural_dtype(array);
    if (natural < 0 || (dtype >= 0 && dtype != BN_F32 && natural == BN_F32)) {
        PyErr_Format(PyExc_TypeError, "an array of %R cannot become a tensor of %s", (PyObject *)PyArray_DESCR(array),
                     dtype < 0 ? "floats or integers" : bn_dtype_name((bn_dtype)dtype));
        goto fail;
    }
    dtype = dtype < 0 ? natural : dtype;
    if (dtype != BN_F32 && dtype != BN_I8 && dtype != BN_I32) {
        PyErr_Format(PyExc_TypeError, "NumPy has no %s; make an f32 tensor and convert it",
                     bn_dtype_name((bn_dtype)dtype));
        goto fail;
    }
    if (dtype != BN_F32 && !integers_fit(array, dtype)) {
        goto fail;
    }
    const int type = dtype == BN_F32 ? NPY_FLOAT32 : dtype == BN_I8 ? NPY_INT8 : NPY_INT32;
    PyArrayObject *dense =
        (PyArrayObject *)PyArray_FROMANY((PyObject *)array, type, 0, 0, NPY_ARRAY_CARRAY_RO | NPY_ARRAY_FORCECAST);
    Py_DECREF(array);
    return dense;
fail:
    Py_DECREF(array);
    return NULL;
}

bn_tensor *bn_tensor_from_array(const bn_module_state *state, PyObject *source, int dtype, const bn_backend *device) {
    PyArrayObject *array = as_array(source, dtype);
    if (array == NULL) {
        return NULL;
    }
    bn_tensor *tensor = NULL;
    int64_t shape[BN_MAX_DIMS];
    if (PyArray_NDIM(array) > BN_MAX_DIMS) {
        PyErr_Format(state->shape_error, "a tensor has at most %d dimensions, not %d", BN_MAX_DIMS,
                     PyArray_NDIM(array));
        goto done;
    }
    for (int i = 0; i < PyArray_NDIM(array); i++) {
        shape[i] = PyArray_DIM(array, i);
    }
    const bn_dtype made = PyArray_TYPE(array) == NPY_FLOAT32 ? BN_F32
                          : PyArray_TYPE(array) == NPY_INT8  ? BN_I8
                                                             : BN_I32;
    bn_status status = bn_tensor_new(device, made, PyArray_NDIM(array), shape, &tensor);
    if (status == BN_OK) {
        status = device->upload(bn_data(tensor), PyArray_DATA(array), bn_tensor_bytes(tensor));
    }
    if (status != BN_OK) {
        bn_tensor_release(tensor);
        tensor = NULL;
        bn_raise(state, status);
    }
done:
    Py_DECREF(array);
    return tensor;
}

/* A new array with the values of a tensor on another device. */
static PyObject *downloaded(const bn_module_state *state, const bn_tensor *t) {
    static const int types[] = {[BN_F32] = NPY_FLOAT32, [BN_I8] = NPY_INT8, [BN_I32] = NPY_INT32};
    npy_intp shape[BN_MAX_DIMS];
    for (int i = 0; i < t->ndim; i++) {
        shape[i] = (npy_intp)t->shape[i];
    }
    PyObject *array = PyArray_SimpleNew(t->ndim, shape, types[t->dtype]);
    if (array == NULL) {
        return NULL;
    }
    bn_status status;
    void *data = PyArray_DATA((PyArrayObject *)array);
    BN_WITHOUT_GIL(status, bn_backend_of(t)->download(data, bn_data(t), bn_tensor_bytes(t)));
    if (status != BN_OK) {
        Py_DECREF(array);
        return bn_raise(state, status);
    }
    return array;
}

PyObject *bn_tensor_to_array(PyObject *object, bool copy) {
    const bn_tensor *t = ((bn_py_tensor *)object)->tensor;
    if (t->dtype == BN_BF16 || t->dtype == BN_TERNARY2 || !bn_dtype_is_stored(t->dtype)) {
        PyErr_Format(PyExc_TypeError, "NumPy has no %s; use .to('f32').numpy()", bn_dtype_name(t->dtype));
        return NULL;
    }
    if (bn_backend_of(t) != bn_cpu_backend()) {
        return downloaded(bn_state_of(Py_TYPE(object)), t);
    }
    /* The tensor's own buffer protocol counts the views that may write, so a weight under a live view is never taken
     * for unchanged. */
    PyObject *buffer = PyMemoryView_FromObject(object);
    if (buffer == NULL) {
        return NULL;
    }
    PyObject *array = PyArray_FROM_OF(buffer, copy || !bn_is_leaf(t) ? NPY_ARRAY_ENSURECOPY : 0);
    Py_DECREF(buffer);
    return array;
}
