/* format_methods.c: tensors over memory that someone else keeps, such as a mapped file. */
#include "python/module.h"

/* Borrows the bytes of any C-contiguous buffer; false with an exception set. */
static bool get_bytes(PyObject *source, Py_buffer *view) { return PyObject_GetBuffer(source, view, PyBUF_SIMPLE) == 0; }

/* ---- memory of someone else ------------------------------------------------------------------------------------- */

/* The last tensor over a buffer may go on any thread. */
static void end_borrow(void *owner) {
    Py_buffer *view = owner;
    PyGILState_STATE gil = PyGILState_Ensure();
    PyBuffer_Release(view);
    PyGILState_Release(gil);
    PyMem_RawFree(view);
}

/* Whether the view is exactly the elements of such a tensor. */
static bn_status check_view(const Py_buffer *view, bn_dtype dtype, int ndim, const int64_t *shape) {
    static const uintptr_t alignments[] = {[BN_F32] = 4, [BN_BF16] = 2, [BN_I8] = 1, [BN_I32] = 4, [BN_TERNARY2] = 1};
    int64_t count = 1;
    size_t bytes;
    for (int i = 0; i < ndim; i++) {
        if (shape[i] < 0 || __builtin_mul_overflow(count, shape[i], &count)) {
            return bn_fail(BN_ERR_SHAPE, "from_buffer: the shape overflows or is negative at dimension %d (%lld)", i,
                           (long long)shape[i]);
        }
    }
    if (!bn_dtype_bytes(dtype, count, &bytes) || bytes != (size_t)view->len) {
        return bn_fail(BN_ERR_SHAPE, "from_buffer: the buffer has %lld bytes, which are not %lld elements of %s",
                       (long long)view->len, (long long)count, bn_dtype_name(dtype));
    }
    if ((uintptr_t)view->buf % alignments[dtype] != 0) {
        return bn_fail(BN_ERR_VALUE, "from_buffer: elements of %s lie at multiples of %d bytes, but not this buffer's",
                       bn_dtype_name(dtype), (int)alignments[dtype]);
    }
    return BN_OK;
}

/* Takes the view, also on failure. */
static bn_status wrap_view(Py_buffer *view, bn_dtype dtype, int ndim, const int64_t *shape, bn_tensor **out) {
    bn_storage *storage = NULL;
    bn_status status = check_view(view, dtype, ndim, shape);
    if (status == BN_OK) {
        status = bn_storage_wrap(bn_cpu_backend(), view->buf, (size_t)view->len, end_borrow, view, &storage);
    }
    if (status != BN_OK) {
        end_borrow(view);
        return status;
    }
    storage->is_read_only = view->readonly;
    if (view->readonly) { /* nobody writes there, so what is derived from the values stays true */
        atomic_store(&storage->exports, 0);
    }
    status = bn_tensor_window(storage, 0, dtype, ndim, shape, out);
    bn_storage_release(storage);
    return status;
}

static PyObject *from_buffer(PyObject *module, PyObject *args) {
    PyObject *source, *dtype_name, *sequence;
    int64_t shape[BN_MAX_DIMS];
    if (!PyArg_ParseTuple(args, "OOO:from_buffer", &source, &dtype_name, &sequence)) {
        return NULL;
    }
    const int dtype = bn_parse_dtype(dtype_name);
    const int ndim = dtype < 0 ? -1 : bn_parse_shape(sequence, shape);
    if (ndim < 0) {
        return NULL;
    }
    Py_buffer *view = PyMem_RawMalloc(sizeof *view);
    if (view == NULL) {
        return PyErr_NoMemory();
    }
    if (!get_bytes(source, view)) {
        PyMem_RawFree(view);
        return NULL;
    }
    bn_tensor *tensor;
    const bn_status status = wrap_view(view, (bn_dtype)dtype, ndim, shape, &tensor);
    return status == BN_OK ? bn_wrap(bn_state(module), tensor) : bn_raise(bn_state(module), status);
}

PyMethodDef bn_format_methods[] = {
    {"from_buffer", from_buffer, METH_VARARGS,
     "(buffer, dtype, shape): a tensor over a buffer's memory, which it holds."},
    {NULL, NULL, 0, NULL},
};
