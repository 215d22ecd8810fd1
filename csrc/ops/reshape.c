/* reshape.c: another shape over the same memory, both ways. */
#include "ops/op.h"

static bn_status backward(bn_node *n) { return bn_grad_pass(n->inputs[0], n->output->grad); }

const bn_op bn_op_reshape = {"reshape", NULL, backward};

/* Replaces a single -1 by what the other dimensions leave. */
static bn_status infer(const bn_tensor *x, int ndim, int64_t *shape) {
    int64_t known = 1;
    int unknown = -1;
    for (int i = 0; i < ndim; i++) {
        if (shape[i] == -1 && unknown < 0) {
            unknown = i;
        } else if (shape[i] < 0 || __builtin_mul_overflow(known, shape[i], &known)) {
            return bn_fail(BN_ERR_SHAPE, "reshape: dimension %d cannot be %lld", i, (long long)shape[i]);
        }
    }
    if (unknown >= 0) {
        if (known == 0 || x->count % known != 0) {
            return bn_fail(BN_ERR_SHAPE, "reshape: %lld elements do not divide by the given %lld", (long long)x->count,
                           (long long)known);
        }
        shape[unknown] = x->count / known;
    } else if (known != x->count) {
        bn_shape_text text;
        return bn_fail(BN_ERR_SHAPE, "reshape: %s has %lld elements, the new shape has %lld", bn_shape_print(x, &text),
                       (long long)x->count, (long long)known);
    }
    return BN_OK;
}

bn_status bn_reshape(bn_tensor *x, int ndim, const int64_t *shape, bn_tensor **out) {
    int64_t whole[BN_MAX_DIMS];
    if (ndim < 0 || ndim > BN_MAX_DIMS) {
        return bn_fail(BN_ERR_SHAPE, "reshape: at most %d dimensions, not %d", BN_MAX_DIMS, ndim);
    }
    for (int i = 0; i < ndim; i++) {
        whole[i] = shape[i];
    }
    BN_TRY(infer(x, ndim, whole));
    bn_node n = {.op = &bn_op_reshape, .inputs = {x}};
    BN_TRY(bn_tensor_view(x, ndim, whole, &n.output));
    return bn_tape_run(&n, out);
}
