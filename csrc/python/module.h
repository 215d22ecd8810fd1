/*
 * module.h: what the files of the Python edge share. Each function here parses, lets the GIL go, calls the core, takes
 * the GIL back and builds the result; nothing else lives in this folder.
 */
#ifndef BN_PYTHON_MODULE_H
#define BN_PYTHON_MODULE_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "tensor/tape.h"

typedef struct bn_module_state {
    PyTypeObject *tensor_type;
    PyTypeObject *tape_type;
    PyObject *shape_error; /* bitnet.ShapeError, a ValueError */
} bn_module_state;

extern PyModuleDef bn_module_def;

static inline bn_module_state *bn_state(PyObject *module) { return PyModule_GetState(module); }
/* The state of the module that an object's type (or a base of it) belongs to. Borrowed. */
bn_module_state *bn_state_of(PyTypeObject *type);

/* Sets the exception that a failed status stands for; returns NULL. */
PyObject *bn_raise(const bn_module_state *state, bn_status status);
/* The same for a failure, a new None for BN_OK. */
PyObject *bn_none_or_raise(PyObject *module, bn_status status);

/* Runs `expr`, a bn_status, without the GIL. */
#define BN_WITHOUT_GIL(status, expr)                                                                                   \
    do {                                                                                                               \
        PyThreadState *bn_saved_thread = PyEval_SaveThread();                                                          \
        (status) = (expr);                                                                                             \
        PyEval_RestoreThread(bn_saved_thread);                                                                         \
    } while (0)

/* A Python object holding a core tensor. */
typedef struct bn_py_tensor {
    PyObject_HEAD bn_tensor *tensor;
} bn_py_tensor;

extern PyType_Spec bn_tensor_spec, bn_tape_spec;

/* Returns new object around `tensor`, whose reference it takes (also on failure). */
PyObject *bn_wrap(const bn_module_state *state, bn_tensor *tensor);
/* Borrows the core tensor of a Tensor; NULL and a TypeError naming the argument for anything else. */
bn_tensor *bn_unwrap(const bn_module_state *state, PyObject *object, const char *argument);
/* As bn_unwrap, but None gives *out = NULL. Returns false with an exception set. */
bool bn_unwrap_optional(const bn_module_state *state, PyObject *object, const char *argument, bn_tensor **out);
/* A shape from a sequence of integers; -1 with an exception set. */
int bn_parse_shape(PyObject *sequence, int64_t shape[BN_MAX_DIMS]);
/* "f32" and so on; -1 with an exception set. */
int bn_parse_dtype(PyObject *name);

/* Methods of the module, by file. */
extern PyMethodDef bn_op_methods[], bn_core_methods[], bn_ternary_methods[], bn_format_methods[], bn_machine_methods[],
    bn_device_methods[];

/* device.c */
/* Where this thread makes its tensors: the CPU at first. */
const bn_backend *bn_device(void);
/* "cpu", "cuda", "meta"; NULL or None: bn_device(). NULL with an exception set. */
const bn_backend *bn_parse_device(PyObject *name);
/* Whether a tensor lies there; false with an exception set. */
bool bn_lies_on(const bn_tensor *tensor, const bn_backend *device, const char *who);

/* sequence.c */
/* Core tensors of a sequence, to be freed, borrowed from *items, to be released; NULL with an exception set. */
bn_tensor **bn_tensor_list(PyObject *module, PyObject *sequence, PyObject **items);
/* Applies fn to each tensor of a sequence, to the first failure. Returns a new None. */
PyObject *bn_for_each_tensor(PyObject *module, PyObject *sequence, bn_status (*fn)(bn_tensor *));

/* numpy_bridge.c */
bool bn_numpy_init(void);
/* dtype -1: f32 for floats, i32 for integers. Returns new. */
bn_tensor *bn_tensor_from_array(const bn_module_state *state, PyObject *source, int dtype, const bn_backend *device);
/* Returns a new array uint8 (size), contents undefined. */
PyObject *bn_new_byte_array(size_t size, uint8_t **data);
/* A Python or NumPy real number, not an array. */
bool bn_is_number(PyObject *object);
/* Returns a new array: a view that writes through for a leaf on the CPU, a copy otherwise or when asked. */
PyObject *bn_tensor_to_array(PyObject *object, bool copy);

/* buffer.c */
int bn_tensor_getbuffer(PyObject *self, Py_buffer *view, int flags);
void bn_tensor_releasebuffer(PyObject *self, Py_buffer *view);

/* dlpack.c */
PyObject *bn_dlpack_export(PyObject *self, PyObject *args, PyObject *kwargs);
PyObject *bn_dlpack_device(PyObject *self, PyObject *unused);
PyObject *bn_dlpack_import(PyObject *module, PyObject *source);

#endif
