/* machine_methods.c: threads, instruction sets, and how fast this machine is. */
#include "python/module.h"

#include "base/parallel.h"
#include "cpu/bandwidth.h"
#include "cpu/cpu.h"
#include "cpu/peak.h"
#include "ops/time_product.h"

static PyObject *set_threads(PyObject *module, PyObject *count) {
    (void)module;
    const long threads = PyLong_AsLong(count);
    if (threads == -1 && PyErr_Occurred()) {
        return NULL;
    }
    if (threads < 0 || threads > BN_MAX_THREADS) {
        return PyErr_Format(PyExc_ValueError, "threads: %ld is outside 1 to %d (0 restores the default)", threads,
                            BN_MAX_THREADS);
    }
    Py_BEGIN_ALLOW_THREADS;
    bn_set_threads((int)threads);
    Py_END_ALLOW_THREADS;
    Py_RETURN_NONE;
}

static PyObject *get_threads(PyObject *module, PyObject *unused) {
    (void)module;
    (void)unused;
    return PyLong_FromLong(bn_get_threads());
}

static PyObject *isa_names(PyObject *module, PyObject *unused) {
    (void)module;
    (void)unused;
    const int count = bn_cpu_isa_count();
    PyObject *list = PyList_New(count);
    for (int i = 0; list != NULL && i < count; i++) {
        PyObject *name = PyUnicode_FromString(bn_cpu_isa_name(i));
        if (name == NULL) {
            Py_CLEAR(list);
            break;
        }
        PyList_SET_ITEM(list, i, name);
    }
    return list;
}

static PyObject *use_isa(PyObject *module, PyObject *name) {
    const char *text = PyUnicode_AsUTF8(name);
    return text == NULL ? NULL : bn_none_or_raise(module, bn_cpu_use_isa(text));
}

static PyObject *current_isa(PyObject *module, PyObject *unused) {
    (void)module;
    (void)unused;
    return PyUnicode_FromString(bn_cpu_current_isa());
}

static PyObject *read_bandwidth(PyObject *module, PyObject *size) {
    const long long bytes = PyLong_AsLongLong(size);
    if (bytes == -1 && PyErr_Occurred()) {
        return NULL;
    }
    if (bytes < 1 << 20 || bytes > (long long)1 << 36) {
        return PyErr_Format(PyExc_ValueError, "read_bandwidth: of 2^20 to 2^36 bytes, not %lld", bytes);
    }
    double rate;
    bn_status status;
    BN_WITHOUT_GIL(status, bn_cpu_read_bandwidth(bytes, &rate));
    return status == BN_OK ? PyFloat_FromDouble(rate) : bn_raise(bn_state(module), status);
}

static PyObject *peak(PyObject *module, PyObject *name) {
    static const char *const kinds[BN_PEAK_KINDS] = {"f32", "bf16", "int8"};
    const char *text = PyUnicode_AsUTF8(name);
    if (text == NULL) {
        return NULL;
    }
    for (int kind = 0; kind < BN_PEAK_KINDS; kind++) {
        if (strcmp(text, kinds[kind]) == 0) {
            bn_peak p;
            bn_status status;
            BN_WITHOUT_GIL(status, bn_cpu_peak((bn_peak_kind)kind, 0.01, &p));
            return status == BN_OK ? Py_BuildValue("(ds)", p.macs_per_second, p.name)
                                   : bn_raise(bn_state(module), status);
        }
    }
    return PyErr_Format(PyExc_ValueError, "peak: the kinds are f32, bf16 and int8, not %R", name);
}

static PyObject *time_product(PyObject *module, PyObject *args) {
    static const char *const names[BN_PRODUCTS] = {"y", "dx", "dw"};
    const char *name;
    int ternary, repeats;
    long long rows, in, out;
    if (!PyArg_ParseTuple(args, "spLLLi:time_product", &name, &ternary, &rows, &in, &out, &repeats)) {
        return NULL;
    }
    int product = 0;
    while (product < BN_PRODUCTS && strcmp(name, names[product]) != 0) {
        product++;
    }
    if (product == BN_PRODUCTS || rows < 1 || in < 1 || out < 1 || repeats < 1) {
        return PyErr_Format(PyExc_ValueError,
                            "time_product: a product y, dx or dw of at least 1 row, input and output, timed at least "
                            "once; not %s of %lld, %lld and %lld, %d times",
                            name, rows, in, out, repeats);
    }
    double *seconds = PyMem_Calloc((size_t)repeats, sizeof *seconds);
    if (seconds == NULL) {
        return PyErr_NoMemory();
    }
    bn_status status;
    BN_WITHOUT_GIL(status, bn_time_product((bn_product)product, ternary, rows, in, out, repeats, seconds));
    PyObject *list = status == BN_OK ? PyList_New(repeats) : bn_raise(bn_state(module), status);
    for (int i = 0; list != NULL && i < repeats; i++) {
        PyObject *one = PyFloat_FromDouble(seconds[i]);
        if (one == NULL) {
            Py_CLEAR(list);
            break;
        }
        PyList_SET_ITEM(list, i, one);
    }
    PyMem_Free(seconds);
    return list;
}

PyMethodDef bn_machine_methods[] = {
    {"set_threads", set_threads, METH_O, "Threads that kernels use, 0 for the default. Never changes a result."},
    {"get_threads", get_threads, METH_NOARGS, "Threads that kernels use."},
    {"isa_names", isa_names, METH_NOARGS, "Instruction sets this CPU can run, weakest first."},
    {"use_isa", use_isa, METH_O, "Chooses the instruction set by name. Changes no result but those of fast precision."},
    {"current_isa", current_isa, METH_NOARGS, "The instruction set in use."},
    {"read_bandwidth", read_bandwidth, METH_O, "Bytes a second at which all threads read so many bytes at most."},
    {"peak", peak, METH_O, "(multiply-adds a second of all threads, name) of a kind: f32, bf16 or int8."},
    {"time_product", time_product, METH_VARARGS,
     "(y, dx or dw; ternary; rows, in, out; repeats): seconds of each run of one product of a linear map."},
    {NULL, NULL, 0, NULL},
};
