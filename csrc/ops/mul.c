/* mul.c: y = a * b elementwise. da = dy * b, db = dy * a. */
#include "ops/op.h"

static bn_status forward(bn_node *n) {
    const mul_forward_args args = {bn_f32(n->inputs[0]), bn_f32(n->inputs[1]), bn_f32(n->output), n->output->count};
    return bn_run_mul_forward(bn_backend_of(n->output), &args, bn_blocks(args.n), 2);
}

static bn_status backward(bn_node *n) {
    /* One launch a side: for a square both sides are the same memory. */
    for (int side = 0; side < 2; side++) {
        float *target;
        bool accumulate;
        BN_TRY(bn_grad_target(n->inputs[side], &target, &accumulate));
        if (target == NULL) {
            continue;
        }
        const mul_backward_args args = {.dy = bn_f32(n->output->grad),
                                        .a = bn_f32(n->inputs[0]),
                                        .b = bn_f32(n->inputs[1]),
                                        .da = side == 0 ? target : NULL,
                                        .db = side == 1 ? target : NULL,
                                        .n = n->output->count,
                                        .accumulate_a = accumulate,
                                        .accumulate_b = accumulate};
        BN_TRY(bn_run_mul_backward(bn_backend_of(n->output), &args, bn_blocks(args.n), 2));
    }
    return BN_OK;
}

const bn_op bn_op_mul = {"mul", forward, backward};

bn_status bn_mul(bn_tensor *a, bn_tensor *b, bn_tensor **out) {
    BN_TRY(bn_require_dtype("mul", "a", a, BN_F32));
    BN_TRY(bn_require_dtype("mul", "b", b, BN_F32));
    BN_TRY(bn_require_same_shape("mul", a, b));
    bn_node n = {.op = &bn_op_mul, .inputs = {a, b}};
    BN_TRY(bn_output_like(&n, a));
    return bn_tape_run(&n, out);
}
