/* embedding.c: y[r] = weight[tokens[r]]. dweight[tokens[r]] += dy[r], in order of r. */
#include "ops/op.h"

static bn_status forward(bn_node *n) {
    const bn_tensor *tokens = n->inputs[0], *weight = n->inputs[1];
    BN_TRY(bn_require_index("embedding", "token", tokens, weight->shape[0], NULL));
    const embedding_forward_args args = {bn_i32(tokens), bn_data(weight),  weight->dtype,   bn_f32(n->output),
                                         tokens->count,  weight->shape[1], weight->shape[0]};
    return bn_run_embedding_forward(bn_backend_of(weight), &args, args.rows, 16);
}

static bn_status backward(bn_node *n) {
    const bn_tensor *tokens = n->inputs[0];
    bn_tensor *weight = n->inputs[1];
    float *dtable;
    bool accumulate;
    BN_TRY(bn_grad_target(weight, &dtable, &accumulate));
    if (dtable == NULL) {
        return BN_OK;
    }
    const embedding_backward_args args = {bn_i32(tokens),   bn_f32(n->output->grad), dtable,    tokens->count,
                                          weight->shape[1], weight->shape[0],        accumulate};
    return bn_run_embedding_backward(bn_backend_of(weight), &args, bn_ceil_div(args.C, BN_COLUMNS), 1);
}

const bn_op bn_op_embedding = {"embedding", forward, backward};

bn_status bn_embedding(bn_tensor *tokens, bn_tensor *weight, bn_tensor **out) {
    BN_TRY(bn_require_dtype("embedding", "tokens", tokens, BN_I32));
    if (weight->dtype != BN_BF16) {
        BN_TRY(bn_require_dtype("embedding", "weight", weight, BN_F32));
    }
    BN_TRY(bn_require_ndim("embedding", "weight", weight, 2));
    if (tokens->ndim == BN_MAX_DIMS) {
        return bn_fail(BN_ERR_SHAPE, "embedding: tokens have %d dimensions, at most %d", tokens->ndim, BN_MAX_DIMS - 1);
    }
    int64_t shape[BN_MAX_DIMS];
    for (int i = 0; i < tokens->ndim; i++) {
        shape[i] = tokens->shape[i];
    }
    shape[tokens->ndim] = weight->shape[1];
    bn_node n = {.op = &bn_op_embedding, .inputs = {tokens, weight}};
    BN_TRY(bn_tensor_new(bn_backend_of(weight), BN_F32, tokens->ndim + 1, shape, &n.output));
    return bn_tape_run(&n, out);
}
