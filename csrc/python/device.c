/* device.c: devices by name, where this thread makes its tensors, and the memory of each. */
#include <string.h>

#include "python/module.h"

static const bn_backend *find(const char *name) {
    if (strcmp(name, "cpu") == 0) {
        return bn_cpu_backend();
    }
    if (strcmp(name, "meta") == 0) {
        return bn_meta_backend();
    }
    if (strcmp(name, "cuda") == 0) {
        if (bn_cuda_backend() == NULL) {
            PyErr_SetString(PyExc_RuntimeError, "this build has no CUDA: it was compiled without nvcc");
        }
        return bn_cuda_backend();
    }
    PyErr_Format(PyExc_ValueError, "unknown device '%s'; one of 'cpu', 'cuda', 'meta'", name);
    return NULL;
}

/* ---- where tensors are made ---------------------------------------------------------------------------------- */

static _Thread_local const bn_backend *chosen; /* NULL: the CPU */

const bn_backend *bn_device(void) { return chosen == NULL ? bn_cpu_backend() : chosen; }

const bn_backend *bn_parse_device(PyObject *name) {
    if (name == NULL || name == Py_None) {
        return bn_device();
    }
    const char *text = PyUnicode_AsUTF8(name);
    return text == NULL ? NULL : find(text);
}

bool bn_lies_on(const bn_tensor *tensor, const bn_backend *device, const char *who) {
    if (bn_backend_of(tensor) == device) {
        return true;
    }
    PyErr_Format(PyExc_ValueError, "%s: a tensor is on %s, not on %s", who, bn_backend_of(tensor)->name, device->name);
    return false;
}

static PyObject *get_device(PyObject *module, PyObject *unused) {
    (void)module;
    (void)unused;
    return PyUnicode_FromString(bn_device()->name);
}

static PyObject *set_device(PyObject *module, PyObject *name) {
    (void)module;
    const bn_backend *backend = bn_parse_device(name);
    if (backend == NULL) {
        return NULL;
    }
    chosen = backend;
    Py_RETURN_NONE;
}

static PyObject *has_cuda(PyObject *module, PyObject *unused) {
    (void)module;
    (void)unused;
    return PyBool_FromLong(bn_cuda_backend() != NULL);
}

/* ---- memory -------------------------------------------------------------------------------------------------- */

/* The device that a method's only argument names: of this thread's without one. */
static const bn_backend *only_device(PyObject *args) {
    PyObject *name = NULL;
    return PyArg_ParseTuple(args, "|O", &name) ? bn_parse_device(name) : NULL;
}

static PyObject *memory_stats(PyObject *module, PyObject *args) {
    (void)module;
    const bn_backend *backend = only_device(args);
    if (backend == NULL) {
        return NULL;
    }
    const bn_arena_stats s = backend->memory_stats();
    return Py_BuildValue("{s:K,s:K,s:K,s:K}", "in_use", (unsigned long long)s.in_use, "cached",
                         (unsigned long long)s.cached, "high_water", (unsigned long long)s.high_water, "system_calls",
                         (unsigned long long)s.system_calls);
}

static PyObject *memory_trim(PyObject *module, PyObject *args) {
    (void)module;
    const bn_backend *backend = only_device(args);
    if (backend == NULL) {
        return NULL;
    }
    backend->memory_trim();
    Py_RETURN_NONE;
}

static PyObject *memory_restart_peak(PyObject *module, PyObject *args) {
    (void)module;
    const bn_backend *backend = only_device(args);
    if (backend == NULL) {
        return NULL;
    }
    backend->restart_peak();
    Py_RETURN_NONE;
}

PyMethodDef bn_device_methods[] = {
    {"get_device", get_device, METH_NOARGS, "The device on which this thread makes tensors."},
    {"set_device", set_device, METH_O, "Chooses the device on which this thread makes tensors; None: the present one."},
    {"has_cuda", has_cuda, METH_NOARGS, "Whether this build has CUDA kernels."},
    {"memory_stats", memory_stats, METH_VARARGS, "Bytes in use, cached, at most in use, and calls to the system."},
    {"memory_trim", memory_trim, METH_VARARGS, "Gives cached memory back to the system."},
    {"memory_restart_peak", memory_restart_peak, METH_VARARGS, "From now on, high_water is that of now and later."},
    {NULL, NULL, 0, NULL},
};
