/* ternary_methods.c: weights in few bits: ternary codes and scales, prepared for products alone or held for a while,
 * and output matrices in 8 or 6 bits. */
#include "python/module.h"

#include "kernels/backend.h"
#include "quant/fifths.h"
#include "quant/ternary.h"
#include "tensor/compact.h"
#include "tensor/ternary_weight.h"

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

/* The tensor that `read` makes of a weight. */
static PyObject *read_of_weight(PyObject *module, PyObject *object, bn_status (*read)(bn_tensor *, bn_tensor **)) {
    bn_tensor *t = ternary_argument(module, object), *copy;
    if (t == NULL) {
        return NULL;
    }
    bn_status status;
    BN_WITHOUT_GIL(status, read(t, &copy));
    return status == BN_OK ? bn_wrap(bn_state(module), copy) : bn_raise(bn_state(module), status);
}

static PyObject *ternary_codes(PyObject *module, PyObject *object) {
    return read_of_weight(module, object, bn_ternary_codes);
}

static PyObject *ternary_scales(PyObject *module, PyObject *object) {
    return read_of_weight(module, object, bn_ternary_scales);
}

static PyObject *scale_channels(PyObject *module, PyObject *object) {
    bn_tensor *t = ternary_argument(module, object);
    return t == NULL ? NULL : bn_none_or_raise(module, bn_ternary_scale_channels(t));
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
    if (!bn_lies_on(scales, bn_ternary_source_device(source), "scales of a ternary weight")) {
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
    if (!bn_lies_on(codes, bn_cpu_backend(), "pack_ternary")) {
        return NULL;
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

/* ---- held codes: of sequences of weights, so that no signal finds half of a model's exchanged ------------------- */

static PyObject *hold_ternary(PyObject *module, PyObject *weights) {
    return bn_for_each_tensor(module, weights, bn_ternary_hold);
}

static bn_status use_held(bn_tensor *weight) { return bn_ternary_use_held(weight, true); }
static bn_status use_present(bn_tensor *weight) { return bn_ternary_use_held(weight, false); }

static PyObject *use_held_ternary(PyObject *module, PyObject *args) {
    PyObject *weights;
    int held;
    if (!PyArg_ParseTuple(args, "Op:use_held_ternary", &weights, &held)) {
        return NULL;
    }
    return bn_for_each_tensor(module, weights, held ? use_held : use_present);
}

static bn_status release_held(bn_tensor *weight) {
    bn_ternary_release(weight);
    return BN_OK;
}

static PyObject *release_ternary(PyObject *module, PyObject *weights) {
    return bn_for_each_tensor(module, weights, release_held);
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
    return bn_none_or_raise(module, status);
}

PyMethodDef bn_ternary_methods[] = {
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
    {"pack_ternary", pack_ternary, METH_O, "i8 codes as a ternary2 tensor, four a byte."},
    {"hold_ternary", hold_ternary, METH_O, "Holds the present codes of latent weights, whatever is written to them."},
    {"hold_ternary_codes", hold_ternary_codes, METH_VARARGS,
     "Holds these i8 codes and this scale for a latent weight."},
    {"use_held_ternary", use_held_ternary, METH_VARARGS,
     "Whether latent weights multiply their held codes or the present ones."},
    {"release_ternary", release_ternary, METH_O, "Lets go of the codes that latent weights hold."},
    {NULL, NULL, 0, NULL},
};
