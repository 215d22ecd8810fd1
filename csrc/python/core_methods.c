/* core_methods.c: what the module offers beside tensors and ops: devices, threads, random numbers, ternary weights, the
 * optimizer's kernels. */
#include "python/module.h"

#include "base/math64.h"
#include "base/parallel.h"
#include "base/rng.h"
#include "cpu/cpu.h"
#include "cpu/bandwidth.h"
#include "cpu/peak.h"
#include "ops/ops.h"
#include "ops/optimizer.h"
#include "ops/time_product.h"
#include "quant/fifths.h"
#include "quant/ternary.h"
#include "tensor/compact.h"
#include "tensor/ternary_weight.h"

static PyObject *none_or_raise(PyObject *module, bn_status status) {
    if (status != BN_OK) {
        return bn_raise(bn_state(module), status);
    }
    Py_RETURN_NONE;
}

/* ---- making tensors ----------------------------------------------------------------------------------------- */

static PyObject *empty(PyObject *module, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"shape", "dtype", "device", NULL};
    PyObject *sequence, *dtype_name = NULL;
    const char *device = "cpu";
    int64_t shape[BN_MAX_DIMS];
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|Os:empty", names, &sequence, &dtype_name, &device)) {
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
    if (t->dtype != BN_F32 || !bn_is_leaf(t) || bn_backend_of(t) != bn_cpu_backend()) {
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
        BN_WITHOUT_GIL(status, fill(bn_f32(t), t->count, seed, stream, a, b));
    }
    return none_or_raise(module, status);
}

static PyObject *fill_normal(PyObject *module, PyObject *args, PyObject *kwargs) {
    return fill_random(module, args, kwargs, "OKKff:fill_normal", bn_rng_fill_normal);
}

static PyObject *fill_uniform(PyObject *module, PyObject *args, PyObject *kwargs) {
    return fill_random(module, args, kwargs, "OKKff:fill_uniform", bn_rng_fill_uniform);
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
    bn_tensor *cos_table, *sin_table;
    bn_status status = bn_tensor_new(bn_cpu_backend(), BN_F32, 2, shape, &cos_table);
    if (status != BN_OK) {
        return bn_raise(bn_state(module), status);
    }
    status = bn_tensor_new(bn_cpu_backend(), BN_F32, 2, shape, &sin_table);
    if (status != BN_OK) {
        bn_tensor_release(cos_table);
        return bn_raise(bn_state(module), status);
    }
    for (int64_t j = 0; j < half; j++) {
        const float frequency = (float)bn_pow64(theta, -2.0 * (double)j / (double)head_dim);
        for (int64_t t = 0; t < positions; t++) {
            const float angle = (float)t * frequency;
            bn_f32(cos_table)[t * half + j] = (float)bn_cos64((double)angle);
            bn_f32(sin_table)[t * half + j] = (float)bn_sin64((double)angle);
        }
    }
    return Py_BuildValue("(NN)", bn_wrap(bn_state(module), cos_table), bn_wrap(bn_state(module), sin_table));
}

/* ---- ternary weights ---------------------------------------------------------------------------------------- */

static bn_tensor *ternary_argument(PyObject *module, PyObject *object) {
    bn_tensor *t = bn_unwrap(bn_state(module), object, "weight");
    if (t != NULL && (!(t->dtype == BN_F32 || t->dtype == BN_PREPARED) || t->ndim != 2)) {
        bn_shape_text text;
        PyErr_Format(bn_state(module)->shape_error, "a ternary weight is made from an f32 matrix, not %s of shape %s",
                     bn_dtype_name(t->dtype), bn_shape_print(t, &text));
        return NULL;
    }
    return t;
}

static PyObject *ternary_stats(PyObject *module, PyObject *object) {
    bn_tensor *t = ternary_argument(module, object);
    if (t == NULL) {
        return NULL;
    }
    bn_ternary_stats s;
    bn_status status;
    BN_WITHOUT_GIL(status, bn_ternary_read_stats(t, &s));
    if (status != BN_OK) {
        return bn_raise(bn_state(module), status);
    }
    return Py_BuildValue("(LLLLf)", (long long)s.minus, (long long)s.zero, (long long)s.plus, (long long)s.flipped,
                         s.scale);
}

static PyObject *ternary_codes(PyObject *module, PyObject *object) {
    bn_tensor *t = ternary_argument(module, object), *copy;
    if (t == NULL) {
        return NULL;
    }
    bn_status status;
    BN_WITHOUT_GIL(status, bn_ternary_codes(t, &copy));
    return status == BN_OK ? bn_wrap(bn_state(module), copy) : bn_raise(bn_state(module), status);
}

static PyObject *ternary_scales(PyObject *module, PyObject *object) {
    bn_tensor *t = ternary_argument(module, object), *copy;
    if (t == NULL) {
        return NULL;
    }
    bn_status status;
    BN_WITHOUT_GIL(status, bn_ternary_scales(t, &copy));
    return status == BN_OK ? bn_wrap(bn_state(module), copy) : bn_raise(bn_state(module), status);
}

static PyObject *scale_channels(PyObject *module, PyObject *object) {
    bn_tensor *t = ternary_argument(module, object);
    if (t == NULL) {
        return NULL;
    }
    const bn_status status = bn_ternary_scale_channels(t);
    return status == BN_OK ? Py_NewRef(Py_None) : bn_raise(bn_state(module), status);
}

static PyObject *has_channel_scales(PyObject *module, PyObject *object) {
    const bn_tensor *t = ternary_argument(module, object);
    return t == NULL ? NULL : PyBool_FromLong(t->channel_scales);
}

/* A number, which goes to `one`, or an f32 tensor with one scale for each of the source's rows. */
static bool parse_scales(PyObject *module, PyObject *object, float *one, bn_ternary_source *source) {
    if (!PyObject_TypeCheck(object, bn_state(module)->tensor_type)) {
        *one = (float)PyFloat_AsDouble(object);
        source->scale = one;
        return PyErr_Occurred() == NULL;
    }
    const bn_tensor *scales = ((bn_py_tensor *)object)->tensor;
    bn_shape_text text;
    if (scales->dtype != BN_F32 || scales->ndim != 1 || scales->count != source->rows) {
        PyErr_Format(bn_state(module)->shape_error, "the scales of %lld rows are f32 of shape (%lld,), not %s of %s",
                     (long long)source->rows, (long long)source->rows, bn_dtype_name(scales->dtype),
                     bn_shape_print(scales, &text));
        return false;
    }
    source->scale = bn_f32(scales);
    source->channel_scales = true;
    return true;
}

static const struct {
    const char *name;
    bn_code_form form;
} layouts[] = {{"2", BN_CODES_2}, {"1.6", BN_CODES_5}};

static bool parse_layout(const char *name, bn_code_form *form) {
    for (size_t i = 0; i < sizeof layouts / sizeof *layouts; i++) {
        if (strcmp(name, layouts[i].name) == 0) {
            *form = layouts[i].form;
            return true;
        }
    }
    PyErr_Format(PyExc_ValueError, "a layout of ternary weights is 2 or 1.6 (bits a weight), not '%s'", name);
    return false;
}

static PyObject *prepared_or_raise(PyObject *module, const bn_ternary_source *source, bn_code_form form) {
    bn_tensor *out;
    bn_status status;
    BN_WITHOUT_GIL(status, bn_ternary_prepare(source, form, &out));
    return status == BN_OK ? bn_wrap(bn_state(module), out) : bn_raise(bn_state(module), status);
}

static PyObject *prepare_ternary(PyObject *module, PyObject *args) {
    PyObject *object, *scale;
    float one;
    const char *layout = "2";
    bn_ternary_source source = {0};
    bn_code_form form;
    if (!PyArg_ParseTuple(args, "OO|s:prepare_ternary", &object, &scale, &layout) || !parse_layout(layout, &form)) {
        return NULL;
    }
    const bn_tensor *codes = source.codes = bn_unwrap(bn_state(module), object, "codes");
    if (codes == NULL) {
        return NULL;
    }
    if (codes->dtype != BN_I8 || codes->ndim != 2) {
        PyErr_Format(PyExc_TypeError, "a weight is prepared from i8 codes (rows, cols), not from %s with %d dimensions",
                     bn_dtype_name(codes->dtype), codes->ndim);
        return NULL;
    }
    source.rows = codes->shape[0];
    source.cols = codes->shape[1];
    return parse_scales(module, scale, &one, &source) ? prepared_or_raise(module, &source, form) : NULL;
}

static PyObject *prepare_fifths(PyObject *module, PyObject *args) {
    Py_buffer bytes;
    PyObject *scale;
    float one;
    long long rows, cols;
    const char *layout = "2";
    bn_ternary_source source = {0};
    bn_code_form form;
    if (!PyArg_ParseTuple(args, "y*LLO|s:prepare_fifths", &bytes, &rows, &cols, &scale, &layout)) {
        return NULL;
    }
    PyObject *out = NULL;
    int64_t count;
    if (rows < 1 || cols < 1 || cols >= 1 << 23 || __builtin_mul_overflow(rows, cols, &count) ||
        bn_fifths_bytes(count) != bytes.len) {
        PyErr_Format(bn_state(module)->shape_error, "%zd bytes are not the fifths of %lld x %lld codes", bytes.len,
                     rows, cols);
    } else if (parse_layout(layout, &form)) {
        source.fifths = bytes.buf;
        source.rows = rows;
        source.cols = cols;
        out = parse_scales(module, scale, &one, &source) ? prepared_or_raise(module, &source, form) : NULL;
    }
    PyBuffer_Release(&bytes);
    return out;
}

static PyObject *compact(PyObject *module, PyObject *args) {
    PyObject *object;
    int bits, screen;
    if (!PyArg_ParseTuple(args, "Oip:compact", &object, &bits, &screen)) {
        return NULL;
    }
    bn_tensor *weight = bn_unwrap(bn_state(module), object, "weight"), *out;
    if (weight == NULL) {
        return NULL;
    }
    bn_status status;
    BN_WITHOUT_GIL(status, bn_compact_make(weight, bits, screen != 0, &out));
    return status == BN_OK ? bn_wrap(bn_state(module), out) : bn_raise(bn_state(module), status);
}

static PyObject *ternary_layout(PyObject *module, PyObject *object) {
    const bn_tensor *t = ternary_argument(module, object);
    if (t == NULL || t->dtype != BN_PREPARED) {
        return t == NULL ? NULL : Py_NewRef(Py_None);
    }
    for (size_t i = 0; i < sizeof layouts / sizeof *layouts; i++) {
        if (layouts[i].form == t->ternary->form) {
            return PyUnicode_FromString(layouts[i].name);
        }
    }
    Py_UNREACHABLE();
}

static PyObject *pack_ternary(PyObject *module, PyObject *object) {
    bn_tensor *codes = bn_unwrap(bn_state(module), object, "codes"), *packed;
    if (codes == NULL) {
        return NULL;
    }
    if (codes->dtype != BN_I8) {
        return PyErr_Format(PyExc_TypeError, "pack_ternary: codes are %s, expected i8", bn_dtype_name(codes->dtype));
    }
    bn_status status = bn_tensor_new(bn_cpu_backend(), BN_TERNARY2, codes->ndim, codes->shape, &packed);
    if (status != BN_OK) {
        return bn_raise(bn_state(module), status);
    }
    BN_WITHOUT_GIL(status, bn_ternary_pack(bn_i8(codes), codes->count, bn_data(packed)));
    if (status != BN_OK) {
        bn_tensor_release(packed);
        return bn_raise(bn_state(module), status);
    }
    return bn_wrap(bn_state(module), packed);
}

/* ---- optimizer ---------------------------------------------------------------------------------------------- */

/* Core tensors of a sequence, borrowed from *items, which the caller releases; NULL with an exception set. */
static bn_tensor **tensor_list(PyObject *module, PyObject *sequence, PyObject **items) {
    *items = PySequence_Fast(sequence, "expected a sequence of tensors");
    if (*items == NULL) {
        return NULL;
    }
    const Py_ssize_t count = PySequence_Fast_GET_SIZE(*items);
    bn_tensor **tensors = PyMem_Calloc((size_t)count + 1, sizeof *tensors);
    for (Py_ssize_t i = 0; tensors != NULL && i < count; i++) {
        tensors[i] = bn_unwrap(bn_state(module), PySequence_Fast_GET_ITEM(*items, i), "parameter");
        if (tensors[i] == NULL) {
            PyMem_Free(tensors);
            tensors = NULL;
        }
    }
    if (tensors == NULL) {
        if (!PyErr_Occurred()) {
            PyErr_NoMemory();
        }
        Py_CLEAR(*items);
    }
    return tensors;
}

static PyObject *flatten(PyObject *module, PyObject *sequence) {
    PyObject *items;
    bn_tensor **params = tensor_list(module, sequence, &items);
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

/* Applies to each tensor of a sequence. */
static PyObject *for_each(PyObject *module, PyObject *sequence, bn_status (*fn)(bn_tensor *)) {
    PyObject *items;
    bn_tensor **params = tensor_list(module, sequence, &items);
    if (params == NULL) {
        return NULL;
    }
    bn_status status = BN_OK;
    for (Py_ssize_t i = 0; status == BN_OK && i < PySequence_Fast_GET_SIZE(items); i++) {
        status = fn(params[i]);
    }
    PyMem_Free(params);
    Py_DECREF(items);
    return none_or_raise(module, status);
}

static PyObject *row_losses(PyObject *module, PyObject *object) {
    const bn_tensor *loss = bn_unwrap(bn_state(module), object, "loss");
    if (loss == NULL) {
        return NULL;
    }
    bn_tensor *out;
    const bn_status status = bn_cross_entropy_losses(loss, &out);
    return status == BN_OK ? bn_wrap(bn_state(module), out) : bn_raise(bn_state(module), status);
}

/* ---- held codes: of sequences of weights, so that no signal finds half of a model's exchanged ------------------- */

static PyObject *hold_ternary(PyObject *module, PyObject *weights) {
    return for_each(module, weights, bn_ternary_hold);
}

static bn_status use_held(bn_tensor *weight) { return bn_ternary_use_held(weight, true); }
static bn_status use_present(bn_tensor *weight) { return bn_ternary_use_held(weight, false); }

static PyObject *use_held_ternary(PyObject *module, PyObject *args) {
    PyObject *weights;
    int held;
    if (!PyArg_ParseTuple(args, "Op:use_held_ternary", &weights, &held)) {
        return NULL;
    }
    return for_each(module, weights, held ? use_held : use_present);
}

static bn_status release_held(bn_tensor *weight) {
    bn_ternary_release(weight);
    return BN_OK;
}

static PyObject *release_ternary(PyObject *module, PyObject *weights) {
    return for_each(module, weights, release_held);
}

static PyObject *hold_ternary_codes(PyObject *module, PyObject *args) {
    PyObject *object, *held, *factor;
    if (!PyArg_ParseTuple(args, "OOO:hold_ternary_codes", &object, &held, &factor)) {
        return NULL;
    }
    bn_tensor *weight = bn_unwrap(bn_state(module), object, "weight");
    const bn_tensor *codes = weight == NULL ? NULL : bn_unwrap(bn_state(module), held, "codes");
    const bn_tensor *scale = codes == NULL ? NULL : bn_unwrap(bn_state(module), factor, "scale");
    if (scale == NULL) {
        return NULL;
    }
    bn_status status;
    BN_WITHOUT_GIL(status, bn_ternary_hold_codes(weight, codes, scale));
    return none_or_raise(module, status);
}

static bn_status mark_zero(bn_tensor *t) {
    t->grad_is_stale = t->grad != NULL;
    return BN_OK;
}

static PyObject *zero_grad(PyObject *module, PyObject *sequence) { return for_each(module, sequence, mark_zero); }
static PyObject *settle_grad(PyObject *module, PyObject *sequence) {
    return for_each(module, sequence, bn_grad_settle);
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
    return none_or_raise(module, status);
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
    return none_or_raise(module, status);
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
    return none_or_raise(module, bn_tape_open_segment());
}

static PyObject *close_segment(PyObject *module, PyObject *unused) {
    (void)unused;
    return none_or_raise(module, bn_tape_close_segment());
}

/* ---- the machine -------------------------------------------------------------------------------------------- */

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
    return text == NULL ? NULL : none_or_raise(module, bn_cpu_use_isa(text));
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
    return none_or_raise(module, status);
}

static PyObject *has_cuda(PyObject *module, PyObject *unused) {
    (void)module;
    (void)unused;
    return PyBool_FromLong(bn_cuda_backend() != NULL);
}

static PyObject *memory_stats(PyObject *module, PyObject *unused) {
    (void)module;
    (void)unused;
    bn_arena_stats s;
    bn_cpu_memory_stats(&s);
    return Py_BuildValue("{s:K,s:K,s:K,s:K}", "in_use", (unsigned long long)s.in_use, "cached",
                         (unsigned long long)s.cached, "high_water", (unsigned long long)s.high_water, "system_calls",
                         (unsigned long long)s.system_calls);
}

static PyObject *memory_trim(PyObject *module, PyObject *unused) {
    (void)module;
    (void)unused;
    bn_cpu_memory_trim();
    Py_RETURN_NONE;
}

#define WITH_KEYWORDS(fn) (PyCFunction)(void (*)(void))(fn), METH_VARARGS | METH_KEYWORDS

PyMethodDef bn_core_methods[] = {
    {"empty", WITH_KEYWORDS(empty), "A tensor of zeros."},
    {"fill_normal", WITH_KEYWORDS(fill_normal),
     "Fills an f32 leaf: mean a, deviation b, a function of seed and stream."},
    {"fill_uniform", WITH_KEYWORDS(fill_uniform), "Fills an f32 leaf: uniform in [a, b), of seed and stream."},
    {"from_dlpack", bn_dlpack_import, METH_O, "A tensor over another library's memory (CPU, dense)."},
    {"rope_tables", WITH_KEYWORDS(rope_tables), "(cos, sin), each (positions, head_dim / 2), f32."},
    {"ternary_stats", ternary_stats, METH_O,
     "(minus, zero, plus, flipped, scale or mean of scales) of a latent weight's codes."},
    {"ternary_scales", ternary_scales, METH_O,
     "What the codes of a weight are multiplied by: one, or one for each row."},
    {"scale_channels", scale_channels, METH_O, "Gives a weight that was not multiplied yet a scale for each row."},
    {"has_channel_scales", has_channel_scales, METH_O, "Whether a weight has a scale for each row."},
    {"ternary_codes", ternary_codes, METH_O, "The codes -1, 0, 1 of a latent weight as an i8 tensor."},
    {"prepare_ternary", prepare_ternary, METH_VARARGS,
     "i8 codes, a scale (or an f32 tensor of one for each row) and a layout ('2' or '1.6') as a weight for products "
     "alone."},
    {"prepare_fifths", prepare_fifths, METH_VARARGS, "The same of (fifths, rows, cols, scale, layout)."},
    {"compact", compact, METH_VARARGS, "An output matrix in 8 or 6 bits a weight; with screen, beside its exact form."},
    {"ternary_layout", ternary_layout, METH_O, "The layout of a prepared weight, None of a latent one."},
    {"row_losses", row_losses, METH_O, "The losses of single targets, of a loss that a cross_entropy made on a tape."},
    {"hold_ternary", hold_ternary, METH_O, "Holds the present codes of latent weights, whatever is written to them."},
    {"hold_ternary_codes", hold_ternary_codes, METH_VARARGS,
     "Holds these i8 codes and this scale for a latent weight."},
    {"use_held_ternary", use_held_ternary, METH_VARARGS,
     "Whether latent weights multiply their held codes or the present ones."},
    {"release_ternary", release_ternary, METH_O, "Lets go of the codes that latent weights hold."},
    {"pack_ternary", pack_ternary, METH_O, "i8 codes as a ternary2 tensor, four a byte."},
    {"flatten", flatten, METH_O, "Moves parameters into one buffer; returns (flat values, flat gradients)."},
    {"zero_grad", zero_grad, METH_O, "Marks the gradients of tensors as zero."},
    {"settle_grad", settle_grad, METH_O, "Clears the memory of gradients that are marked zero."},
    {"clip_grad_norm", clip_grad_norm, METH_VARARGS, "(grad, max_norm, norm out, factor out)."},
    {"adamw", WITH_KEYWORDS(adamw), "One AdamW step over flat tensors."},
    {"disable_grad", disable_grad, METH_NOARGS, "Enters no_grad on this thread."},
    {"get_precision", get_precision, METH_NOARGS, "This thread's precision: 'fast' or 'fp32'."},
    {"set_precision", set_precision, METH_O, "Sets the precision of what this thread records from now on."},
    {"enable_grad", enable_grad, METH_NOARGS, "Leaves no_grad on this thread."},
    {"is_grad_enabled", is_grad_enabled, METH_NOARGS, "False inside no_grad."},
    {"open_segment", open_segment, METH_NOARGS, "Begins a segment on this thread's tape."},
    {"close_segment", close_segment, METH_NOARGS, "Ends it, and gives back the memory of its intermediate results."},
    {"set_threads", set_threads, METH_O, "Threads that kernels use, 0 for the default. Never changes a result."},
    {"get_threads", get_threads, METH_NOARGS, "Threads that kernels use."},
    {"isa_names", isa_names, METH_NOARGS, "Instruction sets this CPU can run, weakest first."},
    {"use_isa", use_isa, METH_O, "Chooses the instruction set by name. Changes no result but those of fast precision."},
    {"current_isa", current_isa, METH_NOARGS, "The instruction set in use."},
    {"read_bandwidth", read_bandwidth, METH_O, "Bytes a second at which all threads read so many bytes at most."},
    {"peak", peak, METH_O, "(multiply-adds a second of all threads, name) of a kind: f32, bf16 or int8."},
    {"time_product", time_product, METH_VARARGS,
     "(y, dx or dw; ternary; rows, in, out; repeats): seconds of each run of one product of a linear map."},
    {"cache_copy", cache_copy, METH_VARARGS, "(cache, source, destination, length): positions of one slot to another."},
    {"has_cuda", has_cuda, METH_NOARGS, "Whether this build has CUDA kernels."},
    {"memory_stats", memory_stats, METH_NOARGS, "Bytes in use, cached, at most in use, and calls to the system."},
    {"memory_trim", memory_trim, METH_NOARGS, "Gives cached memory back to the system."},
    {NULL, NULL, 0, NULL},
};
