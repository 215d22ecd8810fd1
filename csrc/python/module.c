/* module.c: the extension bitnet._core: slots, state, exceptions (PEP 489 multi-phase initialization). */
#include "python/module.h"

#include <time.h>

#include "base/interrupt.h"

static int add_types(PyObject *module, bn_module_state *state) {
    state->tensor_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &bn_tensor_spec, NULL);
    state->tape_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &bn_tape_spec, NULL);
    if (state->tensor_type == NULL || state->tape_type == NULL) {
        return -1;
    }
    /* Or NumPy would take `array * tensor` for its own, by way of the buffer, and lose the gradient without a word. */
    if (PyObject_SetAttrString((PyObject *)state->tensor_type, "__array_ufunc__", Py_None) < 0) {
        return -1;
    }
    return PyModule_AddType(module, state->tensor_type) < 0 || PyModule_AddType(module, state->tape_type) < 0 ? -1 : 0;
}

static int add_exceptions(PyObject *module, bn_module_state *state) {
    state->shape_error = PyErr_NewExceptionWithDoc("bitnet.ShapeError", "Tensors whose shapes do not fit an operation.",
                                                   PyExc_ValueError, NULL);
    return state->shape_error == NULL ? -1 : PyModule_AddObjectRef(module, "ShapeError", state->shape_error);
}

static int add_methods(PyObject *module) {
    PyMethodDef *const files[] = {bn_op_methods,     bn_core_methods,    bn_ternary_methods,
                                  bn_format_methods, bn_machine_methods, bn_device_methods};
    for (size_t i = 0; i < sizeof files / sizeof *files; i++) {
        if (PyModule_AddFunctions(module, files[i]) < 0) {
            return -1;
        }
    }
    return 0;
}

/* Asked before every kernel launch: looks for a pending signal at most every 50 ms. */
static bn_status check_signals(void) {
    static _Thread_local struct timespec last;
    struct timespec now;
    if (clock_gettime(CLOCK_MONOTONIC, &now) != 0) {
        return BN_OK;
    }
    const double elapsed = (double)(now.tv_sec - last.tv_sec) + 1e-9 * (double)(now.tv_nsec - last.tv_nsec);
    if (elapsed < 0.05) {
        return BN_OK;
    }
    last = now;
    PyGILState_STATE gil = PyGILState_Ensure();
    const int raised = PyErr_CheckSignals();
    PyGILState_Release(gil);
    return raised == 0 ? BN_OK : bn_fail(BN_ERR_INTERRUPTED, "interrupted");
}

static int exec(PyObject *module) {
    bn_module_state *state = bn_state(module);
    if (!bn_numpy_init() || add_exceptions(module, state) < 0 || add_types(module, state) < 0 ||
        add_methods(module) < 0) {
        return -1;
    }
    bn_set_interrupt_check(check_signals);
    return 0;
}

static int traverse(PyObject *module, visitproc visit, void *arg) {
    bn_module_state *state = bn_state(module);
    Py_VISIT(state->tensor_type);
    Py_VISIT(state->tape_type);
    Py_VISIT(state->shape_error);
    return 0;
}

static int clear(PyObject *module) {
    bn_module_state *state = bn_state(module);
    Py_CLEAR(state->tensor_type);
    Py_CLEAR(state->tape_type);
    Py_CLEAR(state->shape_error);
    return 0;
}

static void release(void *module) { (void)clear(module); }

static PyModuleDef_Slot slots[] = {
    {Py_mod_exec, exec},
#if PY_VERSION_HEX >= 0x030C0000
    /* NumPy's C API lives in the main interpreter only. */
    {Py_mod_multiple_interpreters, Py_MOD_MULTIPLE_INTERPRETERS_NOT_SUPPORTED},
#endif
    {0, NULL},
};

PyModuleDef bn_module_def = {
    PyModuleDef_HEAD_INIT,
    .m_name = "bitnet._core",
    .m_doc = "The C core: tensors, tapes, ops and kernels. Use the names of the package `bitnet` instead.",
    .m_size = sizeof(bn_module_state),
    .m_slots = slots,
    .m_traverse = traverse,
    .m_clear = clear,
    .m_free = release,
};

bn_module_state *bn_state_of(PyTypeObject *type) {
    PyObject *module = PyType_GetModuleByDef(type, &bn_module_def);
    return module == NULL ? NULL : bn_state(module);
}

PyObject *bn_raise(const bn_module_state *state, bn_status status) {
    PyObject *type = PyExc_RuntimeError;
    switch (status) {
    case BN_ERR_INTERRUPTED:
        if (PyErr_Occurred()) {
            return NULL; /* the signal handler's own exception */
        }
        type = PyExc_KeyboardInterrupt;
        break;
    case BN_ERR_MEMORY:
        type = PyExc_MemoryError;
        break;
    case BN_ERR_SHAPE:
        type = state->shape_error;
        break;
    case BN_ERR_DTYPE:
        type = PyExc_TypeError;
        break;
    case BN_ERR_INDEX:
        type = PyExc_IndexError;
        break;
    case BN_ERR_VALUE:
        type = PyExc_ValueError;
        break;
    case BN_OK:
    case BN_ERR_STATE:
        break;
    }
    PyErr_SetString(type, bn_error_message());
    return NULL;
}

PyObject *bn_none_or_raise(PyObject *module, bn_status status) {
    return status == BN_OK ? Py_NewRef(Py_None) : bn_raise(bn_state(module), status);
}

PyMODINIT_FUNC PyInit__core(void) { return PyModuleDef_Init(&bn_module_def); }
