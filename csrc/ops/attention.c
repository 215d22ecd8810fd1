/*
 * attention.c: causal grouped-query attention, softmax(q k^T / sqrt(D)) v, streamed over blocks of keys so that no T x
 * T matrix exists (Milakov and Gimelshein 2018; Dao et al. 2022). Query head h reads key/value head h / (H / KV). The
 * forward pass keeps each query's maximum and reciprocal sum; the backward pass makes the probabilities again.
 */
#include <math.h>

#include "ops/cache.h"

enum { STATS };

static float scale_of(const bn_tensor *q) { return (float)(1.0 / sqrt((double)q->shape[3])); }

/* Few queries over a cache: the spans of their pasts apart, then joined. */
static bn_status run_spans(const bn_backend *backend, const attention_forward_args *args) {
    const int64_t spans = bn_ceil_div(args->S, BN_ATTENTION_SPAN), rows = args->B * args->T * args->H;
    bn_tensor *sums = NULL, *o = NULL;
    bn_status status = bn_tensor_new(backend, BN_F32, 3, (int64_t[]){rows, spans, 2}, &sums);
    if (status == BN_OK) {
        status = bn_tensor_new(backend, BN_F32, 3, (int64_t[]){rows, spans, args->D}, &o);
    }
    if (status == BN_OK) {
        const attention_span_args span = {.whole = *args, .sums = bn_f32(sums), .o = bn_f32(o)};
        status = bn_run_attention_span(backend, &span, args->B * args->KV * spans, 1);
        if (status == BN_OK) {
            status = bn_run_attention_join(backend, &span, rows, 64);
        }
    }
    bn_tensor_release(sums);
    bn_tensor_release(o);
    return status;
}

/* inputs: q, k, v; start, slot, k_scale and v_scale, each or NULL */
static bn_status attention_run(bn_node *n) {
    const bn_tensor *q = n->inputs[0], *k = n->inputs[1], *v = n->inputs[2], *start = n->inputs[3];
    const bn_tensor *slot = n->inputs[4];
    if (start != NULL) {
        BN_TRY(bn_require_free_places("attention", q->shape[1], k, start, slot, false));
    }
    const attention_forward_args args = {.q = bn_f32(q),
                                         .k = bn_cache_of(k, n->inputs[5]),
                                         .v = bn_cache_of(v, n->inputs[6]),
                                         .start = start == NULL ? NULL : bn_i32(start),
                                         .slot = slot == NULL ? NULL : bn_i32(slot),
                                         .out = bn_f32(n->output),
                                         .stats = n->saved[STATS] == NULL ? NULL : bn_f32(n->saved[STATS]),
                                         .B = q->shape[0],
                                         .T = q->shape[1],
                                         .S = k->shape[1],
                                         .H = q->shape[2],
                                         .KV = k->shape[2],
                                         .D = q->shape[3],
                                         .scale = scale_of(q)};
    if (start != NULL && args.T * (args.H / args.KV) <= BN_ATTENTION_QUERIES) {
        return run_spans(bn_backend_of(q), &args);
    }
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

static bn_status check_shapes(const bn_tensor *q, const bn_tensor *k, const bn_tensor *v) {
    BN_TRY(bn_require_dtype("attention", "q", q, BN_F32));
    BN_TRY(bn_require_ndim("attention", "q", q, 4));
    BN_TRY(bn_require_ndim("attention", "k", k, 4));
    BN_TRY(bn_require_same_shape("attention", k, v));
    bn_shape_text a, b;
    if (q->shape[3] != k->shape[3] || k->shape[2] == 0 || q->shape[2] % k->shape[2] != 0) {
        return bn_fail(BN_ERR_SHAPE, "attention: q %s and k %s need equal head sizes, and heads that divide",
                       bn_shape_print(q, &a), bn_shape_print(k, &b));
    }
    if (q->shape[3] % 2 != 0 || q->shape[3] > 256) {
        return bn_fail(BN_ERR_SHAPE, "attention: the head size is even and at most 256, not %lld",
                       (long long)q->shape[3]);
    }
    return BN_OK;
}

/* k and v that are the whole past: no cache. */
static bn_status check_whole(const bn_tensor *q, const bn_tensor *k, const bn_tensor *v, const bn_tensor *slot,
                             const bn_tensor *k_scale, const bn_tensor *v_scale) {
    BN_TRY(bn_require_dtype("attention", "k", k, BN_F32));
    BN_TRY(bn_require_dtype("attention", "v", v, BN_F32));
    if (q->shape[0] != k->shape[0]) {
        bn_shape_text a, b;
        return bn_fail(BN_ERR_SHAPE, "attention: q %s and k %s differ in their batch", bn_shape_print(q, &a),
                       bn_shape_print(k, &b));
    }
    if (q->shape[1] != k->shape[1]) {
        return bn_fail(BN_ERR_SHAPE, "attention: %lld queries over %lld keys need `start`", (long long)q->shape[1],
                       (long long)k->shape[1]);
    }
    if (slot != NULL || k_scale != NULL || v_scale != NULL) {
        return bn_fail(BN_ERR_VALUE, "attention: %s without `start`, which makes k and v a cache",
                       slot != NULL ? "`slot`" : "scales");
    }
    return BN_OK;
}

bn_status bn_attention(bn_tensor *q, bn_tensor *k, bn_tensor *v, bn_tensor *start, bn_tensor *slot, bn_tensor *k_scale,
                       bn_tensor *v_scale, bn_tensor **out) {
    BN_TRY(check_shapes(q, k, v));
    if (start == NULL) {
        BN_TRY(check_whole(q, k, v, slot, k_scale, v_scale));
    } else {
        BN_TRY(bn_require_cache("attention", "k", k, k_scale));
        BN_TRY(bn_require_cache("attention", "v", v, v_scale));
        BN_TRY(bn_require_places("attention", q->shape[0], k, start, slot));
    }
    bn_node n = {.op = &bn_op_attention, .inputs = {q, k, v, start, slot, k_scale, v_scale}};
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
