/* core_methods.c: what the module offers to make, train and record tensors with, beside ops: random numbers, rotary
 * tables, the optimizer's kernels, precision, tapes, caches. */
#include "python/module.h"

#include "base/math64.h"
#include "base/rng.h"
#include "ops/ops.h"
#include "ops/optimizer.h"

/* ---- making tensors ----------------------------------------------------------------------------------------- */

static PyObject *empty(PyObject *module, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"shape", "dtype", "device", NULL};
    PyObject *sequence, *dtype_name = NULL, *device = NULL;
    int64_t shape[BN_MAX_DIMS];
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|OO:empty", names, &sequence, &dtype_name, &device)) {
        return NULL;
    }
    const int ndim = bn_parse_shape(sequence, shape);
    const int dtype = dtype_name == NULL ? BN_F32 : bn_parse_dtype(dtype_name);
    const bn_backend *backend = bn_parse_device(device);
    if (ndim < 0 || dtype < 0 || backend == NULL) {
        return NULL;
    }
    bn_tensor *tensor;
    bn_status status = bn_tensor_new(backend, (bn_dtype)dtype, ndim, shape, &tensor);
    if (status == BN_OK) {
        status = bn_tensor_zero(tensor);
        if (status != BN_OK) {
            bn_tensor_release(tensor);
        }
    }
    return status == BN_OK ? bn_wrap(bn_state(module), tensor) : bn_raise(bn_state(module), status);
}

static bn_status refuse_unfit(const bn_tensor *t) {
    const bn_backend *backend = bn_backend_of(t);
    if (t->dtype != BN_F32 || !bn_is_leaf(t) || (backend->has_values && backend != bn_cpu_backend())) {
        return bn_fail(BN_ERR_DTYPE, "random values go into f32 leaves on the CPU");
    }
    return bn_require_writable("random values", t);
}

static PyObject *fill_random(PyObject *module, PyObject *args, PyObject *kwargs, const char *format,
                             bn_status (*fill)(float *, int64_t, uint64_t, uint64_t, float, float)) {
    static char *names[] = {"tensor", "seed", "stream", "a", "b", NULL};
    PyObject *object;
    unsigned long long seed, stream;
    float a, b;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, format, names, &object, &seed, &stream, &a, &b)) {
        return NULL;
    }
    bn_tensor *t = bn_unwrap(bn_state(module), object, "tensor");
    if (t == NULL) {
        return NULL;
    }
    bn_status status = refuse_unfit(t);
    if (status == BN_OK) {
        bn_storage_touch(t->storage);
    }
    if (status == BN_OK && bn_backend_of(t)->has_values) {
        BN_WITHOUT_GIL(status, fill(bn_f32(t), t->count, seed, stream, a, b));
    }
    return bn_none_or_raise(module, status);
}

static PyObject *fill_normal(PyObject *module, PyObject *args, PyObject *kwargs) {
    return fill_random(module, args, kwargs, "OKKff:fill_normal", bn_rng_fill_normal);
}

static PyObject *fill_uniform(PyObject *module, PyObject *args, PyObject *kwargs) {
    return fill_random(module, args, kwargs, "OKKff:fill_uniform", bn_rng_fill_uniform);
}

/* A copy on the device takes the place of a tensor that lies elsewhere. */
static bn_status move_to(const bn_backend *device, bn_tensor **tensor) {
    if (bn_backend_of(*tensor) == device) {
        return BN_OK;
    }
    bn_tensor *there;
    BN_TRY(bn_tensor_new(device, (*tensor)->dtype, (*tensor)->ndim, (*tensor)->shape, &there));
    bn_status status = bn_tensor_copy(there, *tensor);
    bn_tensor_release(status == BN_OK ? *tensor : there);
    *tensor = status == BN_OK ? there : *tensor;
    return status;
}

/* Frequencies and angles are rounded to f32 where published implementations round them: theta^(-2j/D), then times t. */
static PyObject *rope_tables(PyObject *module, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"positions", "head_dim", "theta", NULL};
    long long positions, head_dim;
    double theta;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "LLd:rope_tables", names, &positions, &head_dim, &theta)) {
        return NULL;
    }
    if (positions < 1 || positions > (1 << 20) || head_dim < 2 || head_dim % 2 != 0 || !(theta > 0.0)) {
        return PyErr_Format(PyExc_ValueError, "rope_tables: %lld positions (1 to 2^20), heads of %lld (even), theta %R",
                            positions, head_dim, PyTuple_Size(args) > 2 ? PyTuple_GetItem(args, 2) : Py_None);
    }
    const int64_t half = head_dim / 2, shape[] = {positions, half};
    bn_tensor *tables[2] = {NULL, NULL};
    bn_status status = bn_tensor_new(bn_cpu_backend(), BN_F32, 2, shape, &tables[0]);
    status = status == BN_OK ? bn_tensor_new(bn_cpu_backend(), BN_F32, 2, shape, &tables[1]) : status;
    for (int64_t j = 0; status == BN_OK && bn_device()->has_values && j < half; j++) {
        const float frequency = (float)bn_pow64(theta, -2.0 * (double)j / (double)head_dim);
        for (int64_t t = 0; t < positions; t++) {
            const float angle = (float)t * frequency;
            bn_f32(tables[0])[t * half + j] = (float)bn_cos64((double)angle);
            bn_f32(tables[1])[t * half + j] = (float)bn_sin64((double)angle);
        }
    }
    for (int i = 0; status == BN_OK && i < 2; i++) {
        status = move_to(bn_device(), &tables[i]);
    }
    if (status != BN_OK) {
        bn_tensor_release(tables[0]);
        bn_tensor_release(tables[1]);
        return bn_raise(bn_state(module), status);
    }
    return Py_BuildValue("(NN)", bn_wrap(bn_state(module), tables[0]), bn_wrap(bn_state(module), tables[1]));
}

/* ---- parameters and gradients ------------------------------------------------------------------------------- */

static PyObject *flatten(PyObject *module, PyObject *sequence) {
    PyObject *items;
    bn_tensor **params = bn_tensor_list(module, sequence, &items);
    if (params == NULL) {
        return NULL;
    }
    bn_tensor *flat, *flat_grad;
    bn_status status = bn_flatten(params, PySequence_Fast_GET_SIZE(items), &flat, &flat_grad);
    PyMem_Free(params);
    Py_DECREF(items);
    if (status != BN_OK) {
        return bn_raise(bn_state(module), status);
    }
    return Py_BuildValue("(NN)", bn_wrap(bn_state(module), flat), bn_wrap(bn_state(module), flat_grad));
}

static bn_status mark_zero(bn_tensor *t) {
    t->grad_is_stale = t->grad != NULL;
    return BN_OK;
}

static PyObject *zero_grad(PyObject *module, PyObject *sequence) {
    return bn_for_each_tensor(module, sequence, mark_zero);
}
static PyObject *settle_grad(PyObject *module, PyObject *sequence) {
    return bn_for_each_tensor(module, sequence, bn_grad_settle);
}

static PyObject *clip_grad_norm(PyObject *module, PyObject *args) {
    PyObject *o[3];
    float max_norm;
    if (!PyArg_ParseTuple(args, "OfOO:clip_grad_norm", &o[0], &max_norm, &o[1], &o[2])) {
        return NULL;
    }
    bn_tensor *grad = bn_unwrap(bn_state(module), o[0], "grad");
    bn_tensor *norm = grad == NULL ? NULL : bn_unwrap(bn_state(module), o[1], "norm");
    bn_tensor *factor = norm == NULL ? NULL : bn_unwrap(bn_state(module), o[2], "factor");
    if (factor == NULL) {
        return NULL;
    }
    bn_status status;
    BN_WITHOUT_GIL(status, bn_clip_grad_norm(grad, max_norm, norm, factor));
    return bn_none_or_raise(module, status);
}

static PyObject *adamw(PyObject *module, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"param", "grad",  "m",     "v",   "factor",       "step", "decay_end",
                            "lr",    "beta1", "beta2", "eps", "weight_decay", NULL};
    PyObject *o[5];
    long long step, decay_end;
    bn_adamw_options options;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOOOO$LLfffff:adamw", names, &o[0], &o[1], &o[2], &o[3], &o[4],
                                     &step, &decay_end, &options.lr, &options.beta1, &options.beta2, &options.eps,
                                     &options.weight_decay)) {
        return NULL;
    }
    options.step = step;
    options.decay_end = decay_end;
    bn_tensor *t[5];
    for (int i = 0; i < 5; i++) {
        t[i] = bn_unwrap(bn_state(module), o[i], names[i]);
        if (t[i] == NULL) {
            return NULL;
        }
    }
    bn_status status;
    BN_WITHOUT_GIL(status, bn_adamw(t[0], t[1], t[2], t[3], t[4], &options));
    return bn_none_or_raise(module, status);
}

/* ---- recording ---------------------------------------------------------------------------------------------- */

static PyObject *disable_grad(PyObject *module, PyObject *unused) {
    (void)module;
    (void)unused;
    bn_grad_disable();
    Py_RETURN_NONE;
}

static PyObject *enable_grad(PyObject *module, PyObject *unused) {
    (void)module;
    (void)unused;
    bn_grad_enable();
    Py_RETURN_NONE;
}

static PyObject *is_grad_enabled(PyObject *module, PyObject *unused) {
    (void)module;
    (void)unused;
    return PyBool_FromLong(bn_grad_is_enabled());
}

static const char *const precisions[] = {[BN_EXACT] = "fp32", [BN_FAST] = "fast", [BN_INT8] = "int8"};

static PyObject *get_precision(PyObject *module, PyObject *unused) {
    (void)module;
    (void)unused;
    return PyUnicode_FromString(precisions[bn_get_precision()]);
}

static PyObject *set_precision(PyObject *module, PyObject *name) {
    (void)module;
    const char *text = PyUnicode_AsUTF8(name);
    if (text == NULL) {
        return NULL;
    }
    for (int i = BN_EXACT; i <= BN_INT8; i++) {
        if (strcmp(text, precisions[i]) == 0) {
            bn_set_precision((bn_precision)i);
            Py_RETURN_NONE;
        }
    }
    return PyErr_Format(PyExc_ValueError, "precision must be fp32, fast or int8, not '%s'", text);
}

static PyObject *open_segment(PyObject *module, PyObject *unused) {
    (void)unused;
    return bn_none_or_raise(module, bn_tape_open_segment());
}

static PyObject *close_segment(PyObject *module, PyObject *unused) {
    (void)unused;
    return bn_none_or_raise(module, bn_tape_close_segment());
}

/* ---- results and caches -------------------------------------------------------------------------------------- */

static PyObject *row_losses(PyObject *module, PyObject *object) {
    const bn_tensor *loss = bn_unwrap(bn_state(module), object, "loss");
    if (loss == NULL) {
        return NULL;
    }
    bn_tensor *out;
    const bn_status status = bn_cross_entropy_losses(loss, &out);
    return status == BN_OK ? bn_wrap(bn_state(module), out) : bn_raise(bn_state(module), status);
}

static PyObject *cache_copy(PyObject *module, PyObject *args) {
    PyObject *object;
    long long source, destination, length;
    if (!PyArg_ParseTuple(args, "OLLL:cache_copy", &object, &source, &destination, &length)) {
        return NULL;
    }
    bn_tensor *cache = bn_unwrap(bn_state(module), object, "cache");
    if (cache == NULL) {
        return NULL;
    }
    bn_status status;
    BN_WITHOUT_GIL(status, bn_cache_copy(cache, source, destination, length));
    return bn_none_or_raise(module, status);
}

#define WITH_KEYWORDS(fn) (PyCFunction)(void (*)(void))(fn), METH_VARARGS | METH_KEYWORDS

PyMethodDef bn_core_methods[] = {
    {"empty", WITH_KEYWORDS(empty), "A tensor of zeros."},
    {"fill_normal", WITH_KEYWORDS(fill_normal),
     "Fills an f32 leaf: mean a, deviation b, a function of seed and stream."},
    {"fill_uniform", WITH_KEYWORDS(fill_uniform), "Fills an f32 leaf: uniform in [a, b), of seed and stream."},
    {"from_dlpack", bn_dlpack_import, METH_O, "A tensor over another library's memory (CPU, dense)."},
    {"rope_tables", WITH_KEYWORDS(rope_tables), "(cos, sin), each (positions, head_dim / 2), f32."},
    {"row_losses", row_losses, METH_O, "The losses of single targets, of a loss that a cross_entropy made on a tape."},
    {"flatten", flatten, METH_O, "Moves parameters into one buffer; returns (flat values, flat gradients)."},
    {"zero_grad", zero_grad, METH_O, "Marks the gradients of tensors as zero."},
    {"settle_grad", settle_grad, METH_O, "Clears the memory of gradients that are marked zero."},
    {"clip_grad_norm", clip_grad_norm, METH_VARARGS, "(grad, max_norm, norm out, factor out)."},
    {"adamw", WITH_KEYWORDS(adamw), "One AdamW step over flat tensors."},
    {"disable_grad", disable_grad, METH_NOARGS, "Enters no_grad on this thread."},
    {"get_precision", get_precision, METH_NOARGS, "This thread's precision: 'fast', 'int8' or 'fp32'."},
    {"set_precision", set_precision, METH_O, "Sets the precision of what this thread records from now on."},
    {"enable_grad", enable_grad, METH_NOARGS, "Leaves no_grad on this thread."},
    {"is_grad_enabled", is_grad_enabled, METH_NOARGS, "False inside no_grad."},
    {"open_segment", open_segment, METH_NOARGS, "Begins a segment on this thread's tape."},
    {"close_segment", close_segment, METH_NOARGS, "Ends it, and gives back the memory of its intermediate results."},
    {"cache_copy", cache_copy, METH_VARARGS, "(cache, source, destination, length): positions of one slot to another."},
    {NULL, NULL, 0, NULL},
};
