/* format_methods.c: what files hold, as bytes: five ternary codes in each (quant/fifths.h), those entropy-coded
 * (formats/rans.h), and tensors over memory that someone else keeps, such as a mapped file. */
#include "python/module.h"

#include "formats/rans.h"
#include "quant/fifths.h"

/* Borrows the bytes of any C-contiguous buffer; false with an exception set. */
static bool get_bytes(PyObject *source, Py_buffer *view) { return PyObject_GetBuffer(source, view, PyBUF_SIMPLE) == 0; }

/* ---- five codes a byte ------------------------------------------------------------------------------------------ */

static PyObject *pack_fifths(PyObject *module, PyObject *object) {
    bn_tensor *codes = bn_unwrap(bn_state(module), object, "codes");
    if (codes == NULL) {
        return NULL;
    }
    if (codes->dtype != BN_I8) {
        return PyErr_Format(PyExc_TypeError, "pack_fifths: codes are %s, expected i8", bn_dtype_name(codes->dtype));
    }
    if (!bn_lies_on(codes, bn_cpu_backend(), "pack_fifths")) {
        return NULL;
    }
    uint8_t *bytes;
    PyObject *array = bn_new_byte_array((size_t)bn_fifths_bytes(codes->count), &bytes);
    if (array == NULL) {
        return NULL;
    }
    bn_status status;
    BN_WITHOUT_GIL(status, bn_fifths_pack(bn_i8(codes), codes->count, bytes));
    if (status != BN_OK) {
        Py_DECREF(array);
        return bn_raise(bn_state(module), status);
    }
    return array;
}

static bn_status unpack(const Py_buffer *view, int64_t rows, int64_t cols, bn_tensor **out) {
    const int64_t shape[] = {rows, cols};
    int64_t count;
    if (rows < 0 || cols < 0 || __builtin_mul_overflow(rows, cols, &count) || view->len != bn_fifths_bytes(count)) {
        return bn_fail(BN_ERR_SHAPE, "unpack_fifths: %lld bytes are not the codes of a matrix %lld x %lld",
                       (long long)view->len, (long long)rows, (long long)cols);
    }
    BN_TRY(bn_tensor_new(bn_cpu_backend(), BN_I8, 2, shape, out));
    bn_status status = bn_fifths_unpack(view->buf, count, bn_i8(*out));
    if (status != BN_OK) {
        bn_tensor_release(*out);
    }
    return status;
}

static PyObject *unpack_fifths(PyObject *module, PyObject *args) {
    PyObject *source;
    long long rows, cols;
    Py_buffer view;
    if (!PyArg_ParseTuple(args, "OLL:unpack_fifths", &source, &rows, &cols) || !get_bytes(source, &view)) {
        return NULL;
    }
    bn_tensor *codes;
    bn_status status;
    BN_WITHOUT_GIL(status, unpack(&view, rows, cols, &codes));
    PyBuffer_Release(&view);
    return status == BN_OK ? bn_wrap(bn_state(module), codes) : bn_raise(bn_state(module), status);
}

/* ---- entropy coding --------------------------------------------------------------------------------------------- */

static PyObject *rans_encode(PyObject *module, PyObject *source) {
    Py_buffer view;
    if (!get_bytes(source, &view)) {
        return NULL;
    }
    size_t bound = 0, length = 0;
    const bool fits = bn_rans_bound((size_t)view.len, &bound);
    uint8_t *stream = fits ? PyMem_RawMalloc(bound) : NULL;
    PyObject *result = NULL;
    if (stream == NULL) {
        PyErr_NoMemory();
    } else {
        bn_status status;
        BN_WITHOUT_GIL(status, bn_rans_encode(view.buf, (size_t)view.len, stream, &length));
        result = status == BN_OK ? PyBytes_FromStringAndSize((const char *)stream, (Py_ssize_t)length)
                                 : bn_raise(bn_state(module), status);
    }
    PyMem_RawFree(stream);
    PyBuffer_Release(&view);
    return result;
}

static PyObject *rans_decode(PyObject *module, PyObject *args) {
    PyObject *source, *array = NULL;
    Py_ssize_t size;
    Py_buffer view;
    uint8_t *bytes = NULL;
    if (!PyArg_ParseTuple(args, "On:rans_decode", &source, &size)) {
        return NULL;
    }
    if (size < 0) {
        return PyErr_Format(PyExc_ValueError, "rans_decode: a size is not negative: %zd", size);
    }
    if (!get_bytes(source, &view)) {
        return NULL;
    }
    bn_status status = bn_rans_check_size((size_t)view.len, (size_t)size);
    if (status == BN_OK) {
        array = bn_new_byte_array((size_t)size, &bytes);
        if (array == NULL) {
            PyBuffer_Release(&view);
            return NULL;
        }
        BN_WITHOUT_GIL(status, bn_rans_decode(view.buf, (size_t)view.len, bytes, (size_t)size));
    }
    PyBuffer_Release(&view);
    if (status != BN_OK) {
        Py_XDECREF(array);
        return bn_raise(bn_state(module), status);
    }
    return array;
}

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
    {"pack_fifths", pack_fifths, METH_O, "i8 codes as bytes that hold five each: an array uint8."},
    {"unpack_fifths", unpack_fifths, METH_VARARGS, "(bytes, rows, cols): the i8 codes that pack_fifths packed."},
    {"rans_encode", rans_encode, METH_O, "Bytes as a stream that takes little more than their entropy."},
    {"rans_decode", rans_decode, METH_VARARGS, "(stream, size): the bytes that rans_encode coded, as an array uint8."},
    {"from_buffer", from_buffer, METH_VARARGS,
     "(buffer, dtype, shape): a tensor over a buffer's memory, which it holds."},
    {NULL, NULL, 0, NULL},
};
