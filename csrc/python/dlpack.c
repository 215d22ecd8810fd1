/*
 * dlpack.c: tensors shared with other libraries without a copy, by the DLPack protocol (its C structs, version 0.8,
 * restated here: https://dmlc.github.io/dlpack/latest/c_api.html). Both sides write to the same memory.
 */
#include <stdlib.h>

#include "python/module.h"

typedef struct DLDevice {
    int32_t device_type, device_id;
} DLDevice;

typedef struct DLDataType {
    uint8_t code, bits;
    uint16_t lanes;
} DLDataType;

typedef struct DLTensor {
    void *data;
    DLDevice device;
    int32_t ndim;
    DLDataType dtype;
    int64_t *shape, *strides;
    uint64_t byte_offset;
} DLTensor;

typedef struct DLManagedTensor {
    DLTensor dl_tensor;
    void *manager_ctx;
    void (*deleter)(struct DLManagedTensor *self);
} DLManagedTensor;

enum { DL_CPU = 1, DL_INT = 0, DL_FLOAT = 2, DL_BFLOAT = 4 };

static const DLDataType dl_types[] = {
    [BN_F32] = {DL_FLOAT, 32, 1}, [BN_BF16] = {DL_BFLOAT, 16, 1}, [BN_I8] = {DL_INT, 8, 1}, [BN_I32] = {DL_INT, 32, 1}};

typedef struct export_block {
    DLManagedTensor managed;
    bn_tensor *tensor;
    int64_t shape[BN_MAX_DIMS], strides[BN_MAX_DIMS];
} export_block;

/* May be called from any thread, without the GIL. */
static void end_export(DLManagedTensor *managed) {
    export_block *block = managed->manager_ctx;
    bn_storage_touch(block->tensor->storage);
    atomic_fetch_sub(&block->tensor->storage->exports, 1);
    bn_tensor_release(block->tensor);
    free(block);
}

static void drop_capsule(PyObject *capsule) {
    if (PyCapsule_IsValid(capsule, "dltensor")) { /* nobody took it: a consumer renames it */
        end_export(PyCapsule_GetPointer(capsule, "dltensor"));
    }
}

PyObject *bn_dlpack_export(PyObject *self, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"stream", "max_version", "dl_device", "copy", NULL};
    PyObject *ignored[4] = {NULL};
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "|$OOOO:__dlpack__", names, &ignored[0], &ignored[1], &ignored[2],
                                     &ignored[3])) {
        return NULL;
    }
    bn_tensor *t = ((bn_py_tensor *)self)->tensor;
    if (t->dtype == BN_TERNARY2 || !bn_dtype_is_stored(t->dtype)) {
        PyErr_Format(PyExc_BufferError, "DLPack has no %s; convert it first", bn_dtype_name(t->dtype));
        return NULL;
    }
    if (bn_backend_of(t) != bn_cpu_backend()) {
        PyErr_Format(PyExc_BufferError, "this tensor lies on %s; export a copy on the cpu", bn_backend_of(t)->name);
        return NULL;
    }
    if (t->requires_grad) {
        PyErr_SetString(PyExc_BufferError, "this tensor requires a gradient, which another library would not see; "
                                           "export detach() instead");
        return NULL;
    }
    if (t->storage->is_read_only) {
        PyErr_SetString(PyExc_BufferError,
                        "this tensor lies in read-only memory, which DLPack cannot say; export a copy");
        return NULL;
    }
    if (ignored[3] == Py_True) {
        PyErr_SetString(PyExc_BufferError, "a DLPack export shares memory; copy the result instead");
        return NULL;
    }
    export_block *block = calloc(1, sizeof *block);
    if (block == NULL) {
        return PyErr_NoMemory();
    }
    int64_t stride = 1;
    for (int i = t->ndim - 1; i >= 0; i--) {
        block->shape[i] = t->shape[i];
        block->strides[i] = stride;
        stride *= t->shape[i];
    }
    block->tensor = bn_tensor_retain(t);
    atomic_fetch_add(&t->storage->exports, 1);
    block->managed = (DLManagedTensor){.dl_tensor = {.data = bn_data(t),
                                                     .device = {DL_CPU, 0},
                                                     .ndim = t->ndim,
                                                     .dtype = dl_types[t->dtype],
                                                     .shape = block->shape,
                                                     .strides = block->strides},
                                       .manager_ctx = block,
                                       .deleter = end_export};
    PyObject *capsule = PyCapsule_New(&block->managed, "dltensor", drop_capsule);
    if (capsule == NULL) {
        end_export(&block->managed);
    }
    return capsule;
}

PyObject *bn_dlpack_device(PyObject *self, PyObject *unused) {
    (void)unused;
    const bn_tensor *t = ((bn_py_tensor *)self)->tensor;
    return bn_lies_on(t, bn_cpu_backend(), "DLPack") ? Py_BuildValue("(ii)", DL_CPU, 0) : NULL;
}

static void end_import(void *owner) {
    DLManagedTensor *managed = owner;
    if (managed->deleter != NULL) {
        managed->deleter(managed);
    }
}

static int find_dtype(DLDataType type) {
    for (int d = BN_F32; d <= BN_I32; d++) {
        if (type.code == dl_types[d].code && type.bits == dl_types[d].bits && type.lanes == 1) {
            return d;
        }
    }
    PyErr_Format(PyExc_TypeError, "from_dlpack: element type (code %d, %d bits, %d lanes) is not f32, bf16, i8 or i32",
                 type.code, type.bits, type.lanes);
    return -1;
}

static bool is_dense(const DLTensor *t) {
    int64_t stride = 1;
    for (int i = t->ndim - 1; t->strides != NULL && i >= 0; i--) {
        if (t->shape[i] != 1 && t->strides[i] != stride) {
            return false;
        }
        stride *= t->shape[i];
    }
    return true;
}

PyObject *bn_dlpack_import(PyObject *module, PyObject *source) {
    PyObject *capsule = PyObject_CallMethod(source, "__dlpack__", NULL);
    if (capsule == NULL) {
        return NULL;
    }
    bn_tensor *tensor = NULL;
    bn_storage *storage = NULL;
    bn_status status = BN_OK;
    PyObject *result = NULL;
    DLManagedTensor *managed = PyCapsule_GetPointer(capsule, "dltensor");
    if (managed == NULL) {
        goto done;
    }
    const DLTensor *t = &managed->dl_tensor;
    if (t->device.device_type != DL_CPU) {
        PyErr_Format(PyExc_ValueError, "from_dlpack: the memory is on device type %d, not the CPU",
                     (int)t->device.device_type);
        goto done;
    }
    const int dtype = find_dtype(t->dtype);
    if (dtype < 0) {
        goto done;
    }
    if (t->ndim < 0 || t->ndim > BN_MAX_DIMS || !is_dense(t)) {
        PyErr_SetString(bn_state(module)->shape_error,
                        "from_dlpack: needs a dense row-major tensor of at most 8 dimensions; make a contiguous copy");
        goto done;
    }
    int64_t count = 1;
    size_t bytes;
    for (int i = 0; i < t->ndim; i++) {
        if (t->shape[i] < 0 || __builtin_mul_overflow(count, t->shape[i], &count)) {
            count = -1;
            break;
        }
    }
    if (count < 0 || !bn_dtype_bytes((bn_dtype)dtype, count, &bytes)) {
        PyErr_SetString(bn_state(module)->shape_error, "from_dlpack: the shape overflows");
        goto done;
    }
    status = bn_storage_wrap(bn_cpu_backend(), (char *)t->data + t->byte_offset, bytes, end_import, managed, &storage);
    if (status == BN_OK) {
        PyCapsule_SetName(capsule, "used_dltensor"); /* ours now: the storage calls its deleter */
        status = bn_tensor_window(storage, 0, (bn_dtype)dtype, t->ndim, t->shape, &tensor);
        bn_storage_release(storage);
    }
    result = status == BN_OK ? bn_wrap(bn_state(module), tensor) : bn_raise(bn_state(module), status);
done:
    Py_DECREF(capsule);
    return result;
}
