/* op_methods.c: one Python function per line of ops.def. They take Tensors; bitnet/ops.py converts arrays and
 * documents. */
#include "python/module.h"

#include "ops/ops.h"

#define MAX_TENSORS 7

/* The tensors of a call; the tape stays pinned until the result is wrapped. */
#define RUN(module, expr)                                                                                              \
    bn_tensor *result = NULL;                                                                                          \
    bn_status status;                                                                                                  \
    bn_tape *tape = bn_tape_pin();                                                                                     \
    BN_WITHOUT_GIL(status, expr);                                                                                      \
    PyObject *wrapped = status == BN_OK ? bn_wrap(bn_state(module), result) : bn_raise(bn_state(module), status);      \
    bn_tape_unpin(tape);                                                                                               \
    return wrapped

/* Unwraps `count` positional objects into t[]; those from `required` on may be None. */
static bool unwrap_all(PyObject *module, PyObject *const *objects, char *const *names, int required, int count,
                       bn_tensor **t) {
    for (int i = 0; i < count; i++) {
        if (i < required) {
            t[i] = bn_unwrap(bn_state(module), objects[i], names[i]);
            if (t[i] == NULL) {
                return false;
            }
        } else if (!bn_unwrap_optional(bn_state(module), objects[i], names[i], &t[i])) {
            return false;
        }
    }
    return true;
}

#define PARSE(format, required, count, ...)                                                                            \
    PyObject *o[MAX_TENSORS] = {NULL};                                                                                 \
    bn_tensor *t[MAX_TENSORS] = {NULL};                                                                                \
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, format, names, __VA_ARGS__) ||                                      \
        !unwrap_all(module, o, names, required, count, t)) {                                                           \
        return NULL;                                                                                                   \
    }                                                                                                                  \
    (void)0

/* Ops of one or two tensors and nothing else. */
#define UNARY(op)                                                                                                      \
    static PyObject *op_##op(PyObject *module, PyObject *args, PyObject *kwargs) {                                     \
        static char *names[] = {"x", NULL};                                                                            \
        PARSE("O:" #op, 1, 1, &o[0]);                                                                                  \
        RUN(module, bn_##op(t[0], &result));                                                                           \
    }
#define BINARY(op, first, second)                                                                                      \
    static PyObject *op_##op(PyObject *module, PyObject *args, PyObject *kwargs) {                                     \
        static char *names[] = {first, second, NULL};                                                                  \
        PARSE("OO:" #op, 2, 2, &o[0], &o[1]);                                                                          \
        RUN(module, bn_##op(t[0], t[1], &result));                                                                     \
    }

UNARY(sum)
UNARY(mean)
UNARY(transpose)
UNARY(softmax)
UNARY(hadamard)
BINARY(embedding, "tokens", "weight")
BINARY(mul, "a", "b")
BINARY(matmul, "a", "b")

static PyObject *op_linear(PyObject *module, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"x", "weight", "residual", NULL};
    PARSE("OO|O:linear", 2, 3, &o[0], &o[1], &o[2]);
    RUN(module, bn_linear(t[0], t[1], t[2], &result));
}

static PyObject *op_bitlinear(PyObject *module, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"x", "weight", "residual", "activation_bits", NULL};
    int activation_bits = 8;
    PARSE("OO|Oi:bitlinear", 2, 3, &o[0], &o[1], &o[2], &activation_bits);
    RUN(module, bn_bitlinear(t[0], t[1], t[2], activation_bits, &result));
}

static PyObject *op_compact_linear(PyObject *module, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"x", "weight", "top", NULL};
    long long top = 0;
    PARSE("OO|L:compact_linear", 2, 2, &o[0], &o[1], &top);
    RUN(module, bn_compact_linear(t[0], t[1], top, &result));
}

#define GATE(op)                                                                                                       \
    static PyObject *op_##op(PyObject *module, PyObject *args, PyObject *kwargs) {                                     \
        static char *names[] = {"gate", "up", "quantized", NULL};                                                      \
        int quantized = 0;                                                                                             \
        PARSE("OO|p:" #op, 2, 2, &o[0], &o[1], &quantized);                                                            \
        RUN(module, bn_##op(t[0], t[1], quantized != 0, &result));                                                     \
    }
GATE(swiglu)
GATE(relu2)

static PyObject *op_rmsnorm(PyObject *module, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"x", "weight", "eps", "quantized", NULL};
    float eps = 1e-5f;
    int quantized = 0;
    PARSE("O|Ofp:rmsnorm", 1, 2, &o[0], &o[1], &eps, &quantized);
    RUN(module, bn_rmsnorm(t[0], t[1], eps, quantized != 0, &result));
}

static PyObject *op_rope(PyObject *module, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"x", "cos", "sin", "start", NULL};
    PARSE("OOO|O:rope", 3, 4, &o[0], &o[1], &o[2], &o[3]);
    RUN(module, bn_rope(t[0], t[1], t[2], t[3], &result));
}

static PyObject *op_attention(PyObject *module, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"q", "k", "v", "start", "slot", "k_scale", "v_scale", NULL};
    PARSE("OOO|OOOO:attention", 3, 7, &o[0], &o[1], &o[2], &o[3], &o[4], &o[5], &o[6]);
    RUN(module, bn_attention(t[0], t[1], t[2], t[3], t[4], t[5], t[6], &result));
}

static PyObject *op_cache_append(PyObject *module, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"x", "cache", "start", "slot", "scale", NULL};
    PARSE("OOO|OO:cache_append", 3, 5, &o[0], &o[1], &o[2], &o[3], &o[4]);
    RUN(module, bn_cache_append(t[0], t[1], t[2], t[3], t[4], &result));
}

static PyObject *op_add(PyObject *module, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"a", "b", "alpha", "beta", NULL};
    float alpha = 1.0f, beta = 1.0f;
    PARSE("OO|ff:add", 2, 2, &o[0], &o[1], &alpha, &beta);
    RUN(module, bn_add(t[0], t[1], alpha, beta, &result));
}

static PyObject *op_scale(PyObject *module, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"x", "factor", NULL};
    float factor;
    PARSE("Of:scale", 1, 1, &o[0], &factor);
    RUN(module, bn_scale(t[0], factor, &result));
}

static PyObject *op_reshape(PyObject *module, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"x", "shape", NULL};
    PyObject *sequence;
    PARSE("OO:reshape", 1, 1, &o[0], &sequence);
    int64_t shape[BN_MAX_DIMS];
    const int ndim = bn_parse_shape(sequence, shape);
    if (ndim < 0) {
        return NULL;
    }
    RUN(module, bn_reshape(t[0], ndim, shape, &result));
}

static PyObject *op_convert(PyObject *module, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"x", "dtype", NULL};
    PyObject *name;
    PARSE("OO:convert", 1, 1, &o[0], &name);
    const int dtype = bn_parse_dtype(name);
    if (dtype < 0) {
        return NULL;
    }
    RUN(module, bn_convert(t[0], (bn_dtype)dtype, &result));
}

static PyObject *op_cross_entropy(PyObject *module, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"x", "weight", "targets", "ternary", NULL};
    int ternary = 0;
    PARSE("OOO|p:cross_entropy", 3, 3, &o[0], &o[1], &o[2], &ternary);
    RUN(module, bn_cross_entropy(t[0], t[1], t[2], ternary != 0, &result));
}

PyMethodDef bn_op_methods[] = {
#define OP(name)                                                                                                       \
    {#name, (PyCFunction)(void (*)(void))op_##name, METH_VARARGS | METH_KEYWORDS, "See bitnet.ops." #name "."},
#include "ops/ops.def"
#undef OP
    {NULL, NULL, 0, NULL},
};
