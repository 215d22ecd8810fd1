/*
 * attention.c: causal grouped-query attention, softmax(q k^T / sqrt(D)) v, streamed over blocks of keys so that no T x
 * T matrix exists (Milakov and Gimelshein 2018; Dao et al. 2022). Query head h reads key/value head h / (H / KV). The
 * forward pass keeps each query's maximum and reciprocal sum; the backward pass makes the probabilities again.
 * cache_append writes new keys or values at each sequence's position and hands the cache on.
 */
#include <math.h>

#include "ops/op.h"

enum { STATS };

static float scale_of(const bn_tensor *q) { return (float)(1.0 / sqrt((double)q->shape[3])); }

/* inputs: q, k, v, start or NULL */
static bn_status attention_run(bn_node *n) {
    const bn_tensor *q = n->inputs[0], *k = n->inputs[1], *start = n->inputs[3];
    if (start != NULL) {
        BN_TRY(bn_require_positions("attention", start, q->shape[1], k->shape[1]));
    }
    const attention_forward_args args = {.q = bn_f32(q),
                                         .k = bn_f32(k),
                                         .v = bn_f32(n->inputs[2]),
                                         .start = start == NULL ? NULL : bn_i32(start),
                                         .out = bn_f32(n->output),
                                         .stats = n->saved[STATS] == NULL ? NULL : bn_f32(n->saved[STATS]),
                                         .B = q->shape[0],
                                         .T = q->shape[1],
                                         .S = k->shape[1],
                                         .H = q->shape[2],
                                         .KV = k->shape[2],
                                         .D = q->shape[3],
                                         .scale = scale_of(q)};
    return bn_run_attention_forward(bn_backend_of(q), &args,
                                    args.B * args.H * bn_ceil_div(args.T, BN_ATTENTION_QUERIES), 1);
}

static bn_status attention_back(bn_node *n) {
    bn_tensor *q = n->inputs[0], *k = n->inputs[1], *v = n->inputs[2];
    attention_backward_args args = {.q = bn_f32(q),
                                    .k = bn_f32(k),
                                    .v = bn_f32(v),
                                    .out = bn_f32(n->output),
                                    .dout = bn_f32(n->output->grad),
                                    .stats = bn_f32(n->saved[STATS]),
                                    .B = q->shape[0],
                                    .T = q->shape[1],
                                    .H = q->shape[2],
                                    .KV = k->shape[2],
                                    .D = q->shape[3],
                                    .scale = scale_of(q)};
    /* The kernel makes all three gradients together; a side that wants none is written to memory that is dropped. */
    bn_tensor *sides[] = {q, k, v}, *spare[3] = {NULL, NULL, NULL};
    float **targets[] = {&args.dq, &args.dk, &args.dv};
    bool *flags[] = {&args.accumulate_q, &args.accumulate_k, &args.accumulate_v};
    bn_status status = BN_OK;
    for (int i = 0; status == BN_OK && i < 3; i++) {
        status = bn_grad_target(sides[i], targets[i], flags[i]);
        if (status == BN_OK && *targets[i] == NULL) {
            status = bn_tensor_new(bn_backend_of(q), BN_F32, 4, sides[i]->shape, &spare[i]);
            *targets[i] = status == BN_OK ? bn_f32(spare[i]) : NULL;
        }
    }
    if (status == BN_OK) {
        status = n->precision != BN_EXACT ? bn_run_attention_backward_bf16(bn_backend_of(q), &args, args.B * args.KV, 1)
                                          : bn_run_attention_backward(bn_backend_of(q), &args, args.B * args.KV, 1);
    }
    for (int i = 0; i < 3; i++) {
        bn_tensor_release(spare[i]);
    }
    return status;
}

const bn_op bn_op_attention = {"attention", attention_run, attention_back};

static bn_status check(const bn_tensor *q, const bn_tensor *k, const bn_tensor *v, const bn_tensor *start) {
    BN_TRY(bn_require_dtype("attention", "q", q, BN_F32));
    BN_TRY(bn_require_dtype("attention", "k", k, BN_F32));
    BN_TRY(bn_require_dtype("attention", "v", v, BN_F32));
    BN_TRY(bn_require_ndim("attention", "q", q, 4));
    BN_TRY(bn_require_ndim("attention", "k", k, 4));
    BN_TRY(bn_require_same_shape("attention", k, v));
    bn_shape_text a, b;
    if (q->shape[0] != k->shape[0] || q->shape[3] != k->shape[3] || k->shape[2] == 0 ||
        q->shape[2] % k->shape[2] != 0) {
        return bn_fail(BN_ERR_SHAPE, "attention: q %s and k %s need equal batch and head size, and heads that divide",
                       bn_shape_print(q, &a), bn_shape_print(k, &b));
    }
    if (q->shape[3] % 2 != 0 || q->shape[3] > 256) {
        return bn_fail(BN_ERR_SHAPE, "attention: the head size is even and at most 256, not %lld",
                       (long long)q->shape[3]);
    }
    if (start == NULL) {
        if (q->shape[1] != k->shape[1]) {
            return bn_fail(BN_ERR_SHAPE, "attention: %lld queries over %lld keys need `start`", (long long)q->shape[1],
                           (long long)k->shape[1]);
        }
        return BN_OK;
    }
    BN_TRY(bn_require_dtype("attention", "start", start, BN_I32));
    if (start->count != q->shape[0]) {
        return bn_fail(BN_ERR_SHAPE, "attention: %lld starts for %lld sequences", (long long)start->count,
                       (long long)q->shape[0]);
    }
    return BN_OK;
}

bn_status bn_attention(bn_tensor *q, bn_tensor *k, bn_tensor *v, bn_tensor *start, bn_tensor **out) {
    BN_TRY(check(q, k, v, start));
    bn_node n = {.op = &bn_op_attention, .inputs = {q, k, v, start}};
    BN_NODE_TRY(&n, bn_output_like(&n, q));
    if (bn_wants_grad(n.inputs, BN_NODE_INPUTS)) {
        if (start != NULL) {
            bn_node_abandon(&n);
            return bn_fail(BN_ERR_STATE, "attention: no gradient through a cache (`start` is given); use no_grad()");
        }
        const int64_t stats[] = {q->shape[0], q->shape[2], q->shape[1], 2};
        BN_NODE_TRY(&n, bn_tensor_new(bn_backend_of(q), BN_F32, 4, stats, &n.saved[STATS]));
    }
    return bn_tape_run(&n, out);
}

/* inputs: x, cache, start; the output is a window on the cache */
static bn_status append_run(bn_node *n) {
    const bn_tensor *x = n->inputs[0], *cache = n->inputs[1], *start = n->inputs[2];
    BN_TRY(bn_require_positions("cache_append", start, x->shape[1], cache->shape[1]));
    const cache_write_args args = {.x = bn_f32(x),
                                   .start = bn_i32(start),
                                   .cache = bn_f32(cache),
                                   .B = x->shape[0],
                                   .T = x->shape[1],
                                   .C = x->shape[2] * x->shape[3],
                                   .capacity = cache->shape[1]};
    return bn_run_cache_write(bn_backend_of(x), &args, args.B * args.T, 16);
}

const bn_op bn_op_cache_append = {"cache_append", append_run, NULL};

bn_status bn_cache_append(bn_tensor *x, bn_tensor *cache, bn_tensor *start, bn_tensor **out) {
    BN_TRY(bn_require_dtype("cache_append", "x", x, BN_F32));
    BN_TRY(bn_require_dtype("cache_append", "cache", cache, BN_F32));
    BN_TRY(bn_require_dtype("cache_append", "start", start, BN_I32));
    BN_TRY(bn_require_ndim("cache_append", "x", x, 4));
    BN_TRY(bn_require_ndim("cache_append", "cache", cache, 4));
    if (x->shape[0] != cache->shape[0] || x->shape[2] != cache->shape[2] || x->shape[3] != cache->shape[3] ||
        start->count != x->shape[0]) {
        bn_shape_text a, b;
        return bn_fail(BN_ERR_SHAPE, "cache_append: x %s does not fit a cache %s with %lld starts",
                       bn_shape_print(x, &a), bn_shape_print(cache, &b), (long long)start->count);
    }
    if (bn_wants_grad(&x, 1)) {
        return bn_fail(BN_ERR_STATE, "cache_append: no gradient flows through a cache; use no_grad()");
    }
    bn_node n = {.op = &bn_op_cache_append, .inputs = {x, cache, start}};
    BN_TRY(bn_tensor_view(cache, cache->ndim, cache->shape, &n.output));
    return bn_tape_run(&n, out);
}
