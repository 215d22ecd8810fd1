/*
 * hadamard.c: y = H x over the last dimension, H the orthonormal Walsh-Hadamard matrix (Sylvester's order) on blocks of
 * n channels side by side, n the largest power of two that divides C: 384 channels are three blocks of 128, 6912 are 27
 * of 256, an odd C stays as it is. H is its own transpose and its own inverse: dx = H dy.
 *
 * It spreads one large channel over its block before the rounding of BitLinear, as H-BitLinear does (Wang et al. 2025,
 * BitNet v2, arXiv 2504.18415).
 */
#include "ops/op.h"

static bn_status transform(const bn_tensor *like, const float *x, float *y, bool accumulate) {
    const int64_t C = bn_last_dim(like);
    const hadamard_args args = {
        .x = x, .y = y, .rows = bn_row_count(like), .C = C, .n = bn_hadamard_block(C), .accumulate = accumulate};
    return bn_run_hadamard(bn_backend_of(like), &args, args.rows, 8);
}

static bn_status forward(bn_node *n) { return transform(n->inputs[0], bn_f32(n->inputs[0]), bn_f32(n->output), false); }

static bn_status backward(bn_node *n) {
    float *dx;
    bool accumulate;
    BN_TRY(bn_grad_target(n->inputs[0], &dx, &accumulate));
    return dx == NULL ? BN_OK : transform(n->output, bn_f32(n->output->grad), dx, accumulate);
}

const bn_op bn_op_hadamard = {"hadamard", forward, backward};

bn_status bn_hadamard(bn_tensor *x, bn_tensor **out) {
    BN_TRY(bn_require_dtype("hadamard", "x", x, BN_F32));
    if (x->ndim < 1) {
        return bn_fail(BN_ERR_SHAPE, "hadamard: x is a scalar");
    }
    if (bn_last_dim(x) > BN_HADAMARD_MOST) {
        return bn_fail(BN_ERR_SHAPE, "hadamard: x has %lld channels, the transform takes at most %lld",
                       (long long)bn_last_dim(x), (long long)BN_HADAMARD_MOST);
    }
    bn_node n = {.op = &bn_op_hadamard, .inputs = {x}};
    BN_TRY(bn_output_like(&n, x));
    return bn_tape_run(&n, out);
}
