/*
 * add.c: y = alpha * a + beta * b (one fused multiply-add), b of a's shape or one row added to every row (a bias);
 * scale: y = factor * x.
 * dy passes to a and b times alpha and beta; where the factor is 1 its memory is shared, not copied.
 */
#include "ops/op.h"

typedef struct add_params {
    float alpha, beta;
} add_params;

static bool is_bias(const bn_node *n) { return n->inputs[1]->count != n->output->count; }

static bn_status add_forward(bn_node *n) {
    const add_params *p = bn_node_params(n, add_params);
    return bn_launch_axpby(n->output, p->alpha, bn_f32(n->inputs[0]), p->beta, bn_f32(n->inputs[1]),
                           is_bias(n) ? n->inputs[1]->count : 0, bn_f32(n->output));
}

/* gradient of t (+)= factor * dy. */
static bn_status pass_scaled(bn_tensor *t, float factor, bn_tensor *dy) {
    if (factor == 1.0f) {
        return bn_grad_pass(t, dy);
    }
    float *dt;
    bool accumulate;
    BN_TRY(bn_grad_target(t, &dt, &accumulate));
    return dt == NULL ? BN_OK : bn_launch_axpby(dy, factor, bn_f32(dy), 1.0f, accumulate ? dt : NULL, 0, dt);
}

static bn_status pass_bias(bn_node *n) {
    bn_tensor *bias = n->inputs[1];
    float *dbias;
    bool accumulate;
    BN_TRY(bn_grad_target(bias, &dbias, &accumulate));
    if (dbias == NULL) {
        return BN_OK;
    }
    const column_sum_args args = {.x = bn_f32(n->output->grad),
                                  .out = dbias,
                                  .rows = n->output->count / bias->count,
                                  .cols = bias->count,
                                  .accumulate = accumulate};
    return bn_run_column_sum(bn_backend_of(bias), &args, bn_ceil_div(bias->count, BN_COLUMNS), 1);
}

static bn_status add_backward(bn_node *n) {
    const add_params *p = bn_node_params(n, add_params);
    BN_TRY(pass_scaled(n->inputs[0], p->alpha, n->output->grad));
    return is_bias(n) ? pass_bias(n) : pass_scaled(n->inputs[1], p->beta, n->output->grad);
}

const bn_op bn_op_add = {"add", add_forward, add_backward};

bn_status bn_add(bn_tensor *a, bn_tensor *b, float alpha, float beta, bn_tensor **out) {
    BN_TRY(bn_require_dtype("add", "a", a, BN_F32));
    BN_TRY(bn_require_dtype("add", "b", b, BN_F32));
    const bool bias = !bn_same_shape(a, b) && b->ndim == 1 && b->count == bn_last_dim(a) && a->ndim > 1 && beta == 1.0f;
    if (!bias) {
        BN_TRY(bn_require_same_shape("add", a, b));
    }
    bn_node n = {.op = &bn_op_add, .inputs = {a, b}};
    *bn_node_params(&n, add_params) = (add_params){alpha, beta};
    BN_TRY(bn_output_like(&n, a));
    return bn_tape_run(&n, out);
}

static bn_status scale_forward(bn_node *n) {
    return bn_launch_axpby(n->output, *bn_node_params(n, float), bn_f32(n->inputs[0]), 0.0f, NULL, 0,
                           bn_f32(n->output));
}

static bn_status scale_backward(bn_node *n) {
    return pass_scaled(n->inputs[0], *bn_node_params(n, float), n->output->grad);
}

const bn_op bn_op_scale = {"scale", scale_forward, scale_backward};

bn_status bn_scale(bn_tensor *x, float factor, bn_tensor **out) {
    BN_TRY(bn_require_dtype("scale", "x", x, BN_F32));
    bn_node n = {.op = &bn_op_scale, .inputs = {x}};
    *bn_node_params(&n, float) = factor;
    BN_TRY(bn_output_like(&n, x));
    return bn_tape_run(&n, out);
}
