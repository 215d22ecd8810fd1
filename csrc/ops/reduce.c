/*
 * reduce.c: sum and mean of all elements, in fixed blocks joined in double, so the thread count cannot change a bit.
 * dx = dy for every element (divided by the count for a mean).
 */
#include "ops/op.h"

static double factor_of(const bn_node *n) { return n->op == &bn_op_mean ? 1.0 / (double)n->inputs[0]->count : 1.0; }

static bn_status forward(bn_node *n) {
    const bn_tensor *x = n->inputs[0];
    const bn_backend *backend = bn_backend_of(x);
    bn_storage *partial;
    BN_TRY(bn_storage_new(backend, (size_t)bn_blocks(x->count) * sizeof(double), &partial));
    const reduce_blocks_args sums = {bn_f32(x), partial->data, x->count, BN_REDUCE_SUM};
    bn_status status = bn_run_reduce_blocks(backend, &sums, bn_blocks(x->count), 4);
    if (status == BN_OK) {
        const reduce_finish_args finish = {.partial = partial->data,
                                           .out = bn_f32(n->output),
                                           .count = bn_blocks(x->count),
                                           .factor = factor_of(n),
                                           .minimum = -__builtin_inff()};
        status = bn_run_reduce_finish(backend, &finish, 1, 1);
    }
    bn_storage_release(partial);
    return status;
}

static bn_status backward(bn_node *n) {
    bn_tensor *x = n->inputs[0];
    float *dx;
    bool accumulate;
    BN_TRY(bn_grad_target(x, &dx, &accumulate));
    if (dx == NULL) {
        return BN_OK;
    }
    const fill_from_args args = {.value = bn_f32(n->output->grad),
                                 .out = dx,
                                 .n = x->count,
                                 .factor = (float)factor_of(n),
                                 .accumulate = accumulate};
    return bn_run_fill_from(bn_backend_of(x), &args, bn_blocks(x->count), 2);
}

const bn_op bn_op_sum = {"sum", forward, backward};
const bn_op bn_op_mean = {"mean", forward, backward};

static bn_status reduce(const bn_op *op, bn_tensor *x, bn_tensor **out) {
    BN_TRY(bn_require_dtype(op->name, "x", x, BN_F32));
    if (op == &bn_op_mean && x->count == 0) {
        return bn_fail(BN_ERR_SHAPE, "mean: the tensor is empty");
    }
    bn_node n = {.op = op, .inputs = {x}};
    BN_TRY(bn_tensor_new(bn_backend_of(x), BN_F32, 0, NULL, &n.output));
    return bn_tape_run(&n, out);
}

bn_status bn_sum(bn_tensor *x, bn_tensor **out) { return reduce(&bn_op_sum, x, out); }
bn_status bn_mean(bn_tensor *x, bn_tensor **out) { return reduce(&bn_op_mean, x, out); }
