/*
 * buffer.c: the buffer protocol of Tensor, by which NumPy shares its memory. A leaf's view may be written through, so
 * it is counted on the storage: while one is alive, no quantized copy of a weight is taken for fresh. The result of an
 * op is read-only: a replay would change it under the view. So is what lies in read-only memory.
 */
#include "python/module.h"

/* Shape and strides of one exported view. */
typedef struct buffer_block {
    bool writable;
    Py_ssize_t shape[BN_MAX_DIMS], strides[BN_MAX_DIMS];
} buffer_block;

int bn_tensor_getbuffer(PyObject *self, Py_buffer *view, int flags) {
    static char *const formats[] = {[BN_F32] = "f", [BN_I8] = "b", [BN_I32] = "i"};
    static const Py_ssize_t sizes[] = {[BN_F32] = 4, [BN_I8] = 1, [BN_I32] = 4};
    bn_tensor *t = ((bn_py_tensor *)self)->tensor;
    view->obj = NULL;
    if (t->dtype == BN_BF16 || t->dtype == BN_TERNARY2 || !bn_dtype_is_stored(t->dtype)) {
        PyErr_Format(PyExc_BufferError, "the buffer protocol has no %s; convert to f32", bn_dtype_name(t->dtype));
        return -1;
    }
    if (bn_backend_of(t) != bn_cpu_backend()) {
        PyErr_Format(PyExc_BufferError, "this tensor lies on %s; numpy() copies it", bn_backend_of(t)->name);
        return -1;
    }
    const bool writable = bn_is_leaf(t) && !t->storage->is_read_only;
    if (!writable && (flags & PyBUF_WRITABLE) == PyBUF_WRITABLE) {
        PyErr_SetString(PyExc_BufferError, bn_is_leaf(t) ? "this tensor lies in read-only memory; copy it"
                                                         : "the result of an op is read-only; copy it");
        return -1;
    }
    buffer_block *block = PyMem_Malloc(sizeof *block);
    if (block == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    Py_ssize_t stride = sizes[t->dtype];
    for (int i = t->ndim - 1; i >= 0; i--) {
        block->shape[i] = (Py_ssize_t)t->shape[i];
        block->strides[i] = stride;
        stride *= block->shape[i];
    }
    block->writable = writable;
    if (writable) {
        atomic_fetch_add(&t->storage->exports, 1);
    }
    /* The view keeps this tensor's storage: flattening refuses to move a storage with views. */
    view->buf = bn_data(t);
    view->obj = Py_NewRef(self);
    view->len = (Py_ssize_t)bn_tensor_bytes(t);
    view->itemsize = sizes[t->dtype];
    view->readonly = !writable;
    view->ndim = t->ndim;
    view->format = (flags & PyBUF_FORMAT) == PyBUF_FORMAT ? formats[t->dtype] : NULL;
    view->shape = (flags & PyBUF_ND) == PyBUF_ND ? block->shape : NULL;
    view->strides = (flags & PyBUF_STRIDES) == PyBUF_STRIDES ? block->strides : NULL;
    view->suboffsets = NULL;
    view->internal = block;
    return 0;
}

void bn_tensor_releasebuffer(PyObject *self, Py_buffer *view) {
    const buffer_block *block = view->internal;
    if (block->writable) {
        bn_storage *storage = ((bn_py_tensor *)self)->tensor->storage;
        bn_storage_touch(storage);
        atomic_fetch_sub(&storage->exports, 1);
    }
    PyMem_Free(view->internal);
}
