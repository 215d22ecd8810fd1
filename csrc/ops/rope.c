/*
 * rope.c: rotary positions (Su et al. 2021, eq. 34; pairs (j, j + D/2), as published BitNet and LLaMA checkpoints).
 * Row (b, t) is rotated by the angles of position start[b] + t. The derivative is the rotation back.
 */
#include "ops/op.h"

/* inputs: x, cos, sin, start or NULL */
static bn_status rotate(const bn_node *n, const float *x, float *y, bool inverse, bool accumulate) {
    const bn_tensor *t = n->output, *start = n->inputs[3];
    const rope_args args = {.x = x,
                            .cos = bn_f32(n->inputs[1]),
                            .sin = bn_f32(n->inputs[2]),
                            .start = start == NULL ? NULL : bn_i32(start),
                            .y = y,
                            .B = t->shape[0],
                            .T = t->shape[1],
                            .heads = t->shape[2],
                            .D = t->shape[3],
                            .inverse = inverse,
                            .accumulate = accumulate};
    return bn_run_rope(bn_backend_of(t), &args, args.B * args.T, 16);
}

static bn_status forward(bn_node *n) {
    if (n->inputs[3] != NULL) {
        BN_TRY(bn_require_positions("rope", n->inputs[3], n->output->shape[1], n->inputs[1]->shape[0]));
    }
    return rotate(n, bn_f32(n->inputs[0]), bn_f32(n->output), false, false);
}

static bn_status backward(bn_node *n) {
    float *dx;
    bool accumulate;
    BN_TRY(bn_grad_target(n->inputs[0], &dx, &accumulate));
    return dx == NULL ? BN_OK : rotate(n, bn_f32(n->output->grad), dx, true, accumulate);
}

const bn_op bn_op_rope = {"rope", forward, backward};

bn_status bn_rope(bn_tensor *x, bn_tensor *cos, bn_tensor *sin, bn_tensor *start, bn_tensor **out) {
    BN_TRY(bn_require_dtype("rope", "x", x, BN_F32));
    BN_TRY(bn_require_dtype("rope", "cos", cos, BN_F32));
    BN_TRY(bn_require_dtype("rope", "sin", sin, BN_F32));
    BN_TRY(bn_require_ndim("rope", "x", x, 4));
    BN_TRY(bn_require_ndim("rope", "cos", cos, 2));
    BN_TRY(bn_require_same_shape("rope", cos, sin));
    if (x->shape[3] % 2 != 0 || cos->shape[1] * 2 != x->shape[3]) {
        return bn_fail(BN_ERR_SHAPE, "rope: heads of %lld need tables of half that width, not %lld",
                       (long long)x->shape[3], (long long)cos->shape[1]);
    }
    if (x->shape[1] > cos->shape[0]) {
        return bn_fail(BN_ERR_SHAPE, "rope: %lld positions, the tables hold %lld", (long long)x->shape[1],
                       (long long)cos->shape[0]);
    }
    if (start != NULL) {
        BN_TRY(bn_require_dtype("rope", "start", start, BN_I32));
        if (start->count != x->shape[0]) {
            return bn_fail(BN_ERR_SHAPE, "rope: %lld starts for %lld sequences", (long long)start->count,
                           (long long)x->shape[0]);
        }
    }
    bn_node n = {.op = &bn_op_rope, .inputs = {x, cos, sin, start}};
    BN_TRY(bn_output_like(&n, x));
    return bn_tape_run(&n, out);
}
