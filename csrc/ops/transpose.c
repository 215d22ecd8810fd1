/* transpose.c: swaps the last two dimensions, copying: tensors are always dense row-major. */
#include "ops/op.h"

static bn_status run(const bn_tensor *from, const float *x, float *y, bool accumulate) {
    const int64_t rows = from->shape[from->ndim - 2], cols = from->shape[from->ndim - 1];
    const int64_t batch = rows * cols > 0 ? from->count / (rows * cols) : 0;
    const transpose_args args = {x, y, batch, rows, cols, accumulate};
    return bn_run_transpose(bn_backend_of(from), &args, batch * bn_ceil_div(rows, 16), 4);
}

static bn_status forward(bn_node *n) { return run(n->inputs[0], bn_f32(n->inputs[0]), bn_f32(n->output), false); }

static bn_status backward(bn_node *n) {
    float *dx;
    bool accumulate;
    BN_TRY(bn_grad_target(n->inputs[0], &dx, &accumulate));
    return dx == NULL ? BN_OK : run(n->output, bn_f32(n->output->grad), dx, accumulate);
}

const bn_op bn_op_transpose = {"transpose", forward, backward};

bn_status bn_transpose(bn_tensor *x, bn_tensor **out) {
    BN_TRY(bn_require_dtype("transpose", "x", x, BN_F32));
    if (x->ndim < 2) {
        return bn_fail(BN_ERR_SHAPE, "transpose: needs at least two dimensions, not %d", x->ndim);
    }
    int64_t shape[BN_MAX_DIMS];
    for (int i = 0; i < x->ndim; i++) {
        shape[i] = x->shape[i];
    }
    shape[x->ndim - 2] = x->shape[x->ndim - 1];
    shape[x->ndim - 1] = x->shape[x->ndim - 2];
    bn_node n = {.op = &bn_op_transpose, .inputs = {x}};
    BN_TRY(bn_tensor_new(bn_backend_of(x), BN_F32, x->ndim, shape, &n.output));
    return bn_tape_run(&n, out);
}
