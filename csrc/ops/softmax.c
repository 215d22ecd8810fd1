/* softmax.c: y = exp(x - max) / sum over the last dimension. dx = y * (dy - sum(dy * y)). */
#include "ops/op.h"

static bn_status forward(bn_node *n) {
    const bn_tensor *x = n->inputs[0];
    const softmax_forward_args args = {bn_f32(x), bn_f32(n->output), bn_row_count(x), bn_last_dim(x)};
    return bn_run_softmax_forward(bn_backend_of(x), &args, args.rows, 4);
}

static bn_status backward(bn_node *n) {
    float *dx;
    bool accumulate;
    BN_TRY(bn_grad_target(n->inputs[0], &dx, &accumulate));
    if (dx == NULL) {
        return BN_OK;
    }
    const softmax_backward_args args = {bn_f32(n->output->grad), bn_f32(n->output),      dx,
                                        bn_row_count(n->output), bn_last_dim(n->output), accumulate};
    return bn_run_softmax_backward(bn_backend_of(n->output), &args, args.rows, 4);
}

const bn_op bn_op_softmax = {"softmax", forward, backward};

bn_status bn_softmax(bn_tensor *x, bn_tensor **out) {
    BN_TRY(bn_require_dtype("softmax", "x", x, BN_F32));
    bn_node n = {.op = &bn_op_softmax, .inputs = {x}};
    BN_TRY(bn_output_like(&n, x));
    return bn_tape_run(&n, out);
}
