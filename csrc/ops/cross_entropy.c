/*
 * cross_entropy.c: the output head and the loss in one: loss = mean over rows of -log softmax(x W^T)[target].
 *
 * The logits of a model with V = 32000 would be its largest tensor by far. They are made for a chunk of rows at a time
 * and turned into their own gradient (softmax - onehot) / count in place; dx and dW are taken from the chunk at once,
 * while it is there, and kept (dW is as large as W) until the backward pass scales them by the loss's gradient. Without
 * gradients only the loss is made. A chunk's size never changes a bit: dW sums rows in order whatever the chunks.
 *
 * In the fast precision a full-precision head makes no logits but those in a cache, and its gradients only when they
 * are asked for (fast_head.c).
 */
#include "ops/fast_head.h"

/* f32 elements of logits in a chunk: 8 Mi = 32 MiB, 256 rows at V = 32000. */
#define CHUNK_ELEMENTS (8 << 20)

enum { DX, DW, LOSSES, WEIGHT, LSE };

typedef struct loss_params {
    bn_projection_versions versions;
    uint64_t targets; /* their version */
    bool ternary, fast;
} loss_params;

/* inputs: x, weight, targets */
static bn_projection projection_of(bn_node *n) {
    return (bn_projection){n->inputs[0], n->inputs[1], bn_node_params(n, loss_params)->ternary, 8};
}

static int64_t chunk_rows(const bn_projection *p) {
    const int64_t rows = CHUNK_ELEMENTS / bn_max_i64(1, bn_projection_out(p));
    return bn_min_i64(bn_max_i64(rows / 64 * 64, 64), bn_max_i64(bn_projection_rows(p), 1));
}

static bn_status run_chunk(bn_node *n, const bn_projection *p, int64_t first, int64_t rows, float *logits) {
    const int64_t V = bn_projection_out(p), C = bn_projection_in(p);
    const bool gradient = n->saved[DX] != NULL || n->saved[DW] != NULL;
    const bn_precision precision = gradient ? n->precision : BN_EXACT; /* a loss that is only measured is exact */
    BN_TRY(bn_projection_forward(p, precision, first, rows, NULL, logits));
    const cross_entropy_args loss = {.logits = logits,
                                     .targets = bn_i32(n->inputs[2]) + first,
                                     .weight = bn_f32(n->saved[WEIGHT]),
                                     .loss = bn_f32(n->saved[LOSSES]) + first,
                                     .rows = rows,
                                     .V = V,
                                     .gradient = gradient};
    BN_TRY(bn_run_cross_entropy(bn_backend_of(p->x), &loss, rows, 1));
    const bn_grad_memory dx = {n->saved[DX] == NULL ? NULL : bn_f32(n->saved[DX]) + first * C, false};
    const bn_grad_memory dw = {n->saved[DW] == NULL ? NULL : bn_f32(n->saved[DW]), first > 0};
    return bn_projection_backward(p, precision, first, rows, logits, dx, dw);
}

/* loss = (sum of the rows' losses) * weight, the sum in blocks and doubles. */
static bn_status finish(bn_node *n, int64_t rows) {
    const bn_backend *backend = bn_backend_of(n->output);
    bn_storage *partial;
    BN_TRY(bn_storage_new(backend, (size_t)bn_blocks(rows) * sizeof(double), &partial));
    const reduce_blocks_args sums = {bn_f32(n->saved[LOSSES]), partial->data, rows, BN_REDUCE_SUM};
    bn_status status = bn_run_reduce_blocks(backend, &sums, bn_blocks(rows), 4);
    if (status == BN_OK) {
        const reduce_finish_args mean = {.partial = partial->data,
                                         .factor_ptr = bn_f32(n->saved[WEIGHT]),
                                         .out = bn_f32(n->output),
                                         .count = bn_blocks(rows),
                                         .factor = 1.0,
                                         .minimum = -__builtin_inff()};
        status = bn_run_reduce_finish(backend, &mean, 1, 1);
    }
    bn_storage_release(partial);
    return status;
}

static bn_status run_chunks(bn_node *n, const bn_projection *p, int64_t rows) {
    const int64_t step = chunk_rows(p);
    bn_storage *logits;
    BN_TRY(bn_storage_new(bn_backend_of(p->x), (size_t)(step * bn_projection_out(p)) * sizeof(float), &logits));
    bn_status status = BN_OK;
    for (int64_t first = 0; status == BN_OK && first < rows; first += step) {
        status = run_chunk(n, p, first, bn_min_i64(step, rows - first), logits->data);
    }
    bn_storage_release(logits);
    return status;
}

static bn_status forward(bn_node *n) {
    const bn_projection p = projection_of(n);
    const bn_tensor *targets = n->inputs[2];
    const int64_t rows = targets->count;
    const int32_t ignore = BN_IGNORE_INDEX;
    BN_TRY(bn_require_index("cross_entropy", "target", targets, bn_projection_out(&p), &ignore));
    const target_weight_args count = {bn_i32(targets), bn_f32(n->saved[WEIGHT]), rows};
    BN_TRY(bn_run_target_weight(bn_backend_of(n->output), &count, 1, 1));
    loss_params *params = bn_node_params(n, loss_params);
    if (params->fast) {
        BN_TRY(bn_fast_head_forward(&p, targets, bn_f32(n->saved[LOSSES]), bn_f32(n->saved[LSE])));
    } else {
        BN_TRY(run_chunks(n, &p, rows));
    }
    params->versions = bn_projection_versions_now(&p);
    params->targets = bn_storage_version(targets->storage);
    return finish(n, rows);
}

/* gradient of t (+)= dloss * made. */
static bn_status pass(bn_node *n, bn_tensor *t, const bn_tensor *made) {
    float *target;
    bool accumulate;
    if (made == NULL) {
        return BN_OK;
    }
    BN_TRY(bn_grad_target(t, &target, &accumulate));
    const scale_from_args args = {
        .value = bn_f32(n->output->grad), .x = bn_f32(made), .out = target, .n = t->count, .accumulate = accumulate};
    return target == NULL ? BN_OK : bn_run_scale_from(bn_backend_of(t), &args, bn_blocks(t->count), 2);
}

static bn_status fast_backward(bn_node *n) {
    const bn_projection p = projection_of(n);
    const loss_params *params = bn_node_params(n, loss_params);
    bn_grad_memory dx, dw;
    BN_TRY(bn_projection_unchanged("cross_entropy", &p, params->versions));
    if (bn_storage_version(n->inputs[2]->storage) != params->targets) {
        return bn_fail(
            BN_ERR_STATE,
            "backward: the targets of a cross_entropy were changed between its forward and its backward pass");
    }
    BN_TRY(bn_grad_target(p.x, &dx.memory, &dx.accumulate));
    BN_TRY(bn_grad_target(p.weight, &dw.memory, &dw.accumulate));
    if (p.x == p.weight && !dx.accumulate) { /* both walk over the same memory: neither may write first */
        BN_TRY(bn_tensor_zero(p.x->grad));
        dx.accumulate = true;
    }
    return bn_fast_head_backward(&p, n->inputs[2], bn_f32(n->saved[LSE]), bn_f32(n->saved[WEIGHT]),
                                 bn_f32(n->output->grad), dx, dw);
}

static bn_status backward(bn_node *n) {
    if (bn_node_params(n, loss_params)->fast) {
        return fast_backward(n);
    }
    BN_TRY(pass(n, n->inputs[0], n->saved[DX]));
    return pass(n, n->inputs[1], n->saved[DW]);
}

const bn_op bn_op_cross_entropy = {"cross_entropy", forward, backward};

bn_status bn_cross_entropy(bn_tensor *x, bn_tensor *weight, bn_tensor *targets, bool ternary, bn_tensor **out) {
    BN_TRY(bn_projection_check("cross_entropy", &(bn_projection){x, weight, ternary, 8}));
    BN_TRY(bn_require_dtype("cross_entropy", "targets", targets, BN_I32));
    if (targets->count != bn_row_count(x)) {
        bn_shape_text a, b;
        return bn_fail(BN_ERR_SHAPE, "cross_entropy: targets %s do not match the rows of x %s",
                       bn_shape_print(targets, &a), bn_shape_print(x, &b));
    }
    bn_node n = {.op = &bn_op_cross_entropy, .inputs = {x, weight, targets}};
    loss_params *params = bn_node_params(&n, loss_params);
    params->ternary = ternary;
    const bn_projection p = projection_of(&n);
    params->fast = bn_get_precision() != BN_EXACT && bn_wants_grad(n.inputs, 2) && bn_fast_head_serves(&p);
    BN_TRY(bn_projection_prepare(&p));
    const bn_backend *backend = bn_backend_of(x);
    const int64_t one[] = {1}, rows[] = {targets->count};
    BN_NODE_TRY(&n, bn_tensor_new(backend, BN_F32, 0, NULL, &n.output));
    BN_NODE_TRY(&n, bn_tensor_new(backend, BN_F32, 1, one, &n.saved[WEIGHT]));
    BN_NODE_TRY(&n, bn_tensor_new(backend, BN_F32, 1, rows, &n.saved[LOSSES]));
    if (params->fast) {
        BN_NODE_TRY(&n, bn_tensor_new(backend, BN_F32, 1, rows, &n.saved[LSE]));
    }
    if (!params->fast && bn_wants_grad(&x, 1)) {
        BN_NODE_TRY(&n, bn_tensor_new(backend, BN_F32, x->ndim, x->shape, &n.saved[DX]));
    }
    if (!params->fast && bn_wants_grad(&weight, 1)) {
        BN_NODE_TRY(&n, bn_tensor_new(backend, BN_F32, 2, weight->shape, &n.saved[DW]));
    }
    return bn_tape_run(&n, out);
}

bn_status bn_cross_entropy_losses(const bn_tensor *loss, bn_tensor **out) {
    const bn_node *maker = bn_tape_maker(loss);
    if (maker == NULL || maker->op != &bn_op_cross_entropy) {
        return bn_fail(BN_ERR_STATE, "row_losses: this tensor was made by %s, not by a cross_entropy on a tape",
                       maker == NULL ? "no recorded op" : maker->op->name);
    }
    if (maker->saved[LOSSES]->storage->is_temporary) {
        return bn_fail(BN_ERR_STATE,
                       "row_losses: this loss was made in a segment, which has let go of those of its rows");
    }
    *out = bn_tensor_retain(maker->saved[LOSSES]);
    return BN_OK;
}
