/*
 * projection.c: y = x W^T, dx = dy W, dW = dy^T x.
 * Ternary: y is an integer product of int8 activations and codes; the gradients go straight through both quantizers, so
 * dx uses W = code * weight_scale and dW uses x = q * act_scale, the values the forward pass multiplied
 * (Bengio et al. 2013; Ma et al. 2024, arXiv 2402.17764). Both q and code are exact in bf16, so a fast product rounds
 * nothing but dy, once, with the scale that goes with it.
 */
#include "ops/projection.h"

#include <assert.h>

#include "kernels/tiles.h"
#include "tensor/quantized.h"
#include "tensor/ternary_weight.h"

bn_status bn_projection_check(const char *op, const bn_projection *p) {
    const bn_tensor *x = p->x, *weight = p->weight;
    if (!p->ternary || x->dtype != BN_Q8) {
        BN_TRY(bn_require_dtype(op, "x", x, BN_F32));
    }
    BN_TRY(bn_require_dtype(op, "weight", weight, BN_F32));
    BN_TRY(bn_require_ndim(op, "weight", weight, 2));
    BN_TRY(bn_require_same_device(op, x, weight));
    if (x->ndim < 1 || bn_last_dim(x) != weight->shape[1]) {
        return bn_fail(BN_ERR_SHAPE, "%s: x has %lld channels, weight expects %lld", op, (long long)bn_last_dim(x),
                       (long long)weight->shape[1]);
    }
    return BN_OK;
}

/* The quantization of an activation as a node: input x, output its q. */
static bn_status quantize_forward(bn_node *n) { return bn_quantized_fill(n->inputs[0]); }

static const bn_op op_quantize = {"quantize", quantize_forward, NULL};

static bn_status quantize(bn_tensor *x) {
    if (bn_quantized_is_fresh(x) && bn_tape_makes(x->quantized->q)) {
        return BN_OK;
    }
    BN_TRY(bn_quantized_make(x));
    bn_node n = {.op = &op_quantize, .inputs = {x}, .output = bn_tensor_retain(x->quantized->q)};
    bn_tensor *q;
    BN_TRY(bn_tape_run(&n, &q));
    bn_tensor_release(q);
    return BN_OK;
}

bn_status bn_projection_prepare(const bn_projection *p) {
    return p->ternary && p->x->dtype != BN_Q8 ? quantize(p->x) : BN_OK;
}

static bn_status ternary_forward(const bn_projection *p, int64_t first, int64_t rows, const float *residual, float *y) {
    const bn_backend *backend = bn_backend_of(p->x);
    BN_TRY(bn_ternary_refresh(p->weight));
    const bn_quantized *x = p->x->quantized;
    const bn_ternary *w = p->weight->ternary;
    const int64_t stride = x->q->shape[1];
    const int64_t out = bn_projection_out(p), in = bn_projection_in(p);
    assert(first % BN_QUANT_ROWS == 0);
    const bn_tiles tiles = bn_bitlinear_tiles(rows, out, in, backend->parallelism());
    const bitlinear_forward_args args = {.q = bn_i8(x->q) + first * stride,
                                         .act_scale = bn_f32(x->act_scale) + first,
                                         .row_sum = bn_i32(x->row_sum) + first,
                                         .panels = bn_data(w->panels),
                                         .weight_scale = bn_f32(w->scale),
                                         .residual = residual,
                                         .y = y,
                                         .m = rows,
                                         .n = out,
                                         .k = in,
                                         .q_stride = stride,
                                         .tile_m = tiles.tile_m,
                                         .tile_n = tiles.tile_n};
    return bn_run_bitlinear_forward(backend, &args, tiles.units, tiles.grain);
}

bn_status bn_projection_forward(const bn_projection *p, bn_precision precision, int64_t first, int64_t rows,
                                const float *residual, float *y) {
    if (p->ternary) {
        return ternary_forward(p, first, rows, residual, y);
    }
    const int64_t in = bn_projection_in(p), out = bn_projection_out(p);
    if (residual != NULL) {
        BN_TRY(bn_backend_of(p->x)->copy(y, residual, (size_t)(rows * out) * sizeof(float)));
    }
    gemm_args args = {.a = {.data = bn_f32(p->x) + first * in, .row_stride = in, .col_stride = 1, .dtype = BN_F32},
                      .b = {.data = bn_f32(p->weight), .row_stride = 1, .col_stride = in, .dtype = BN_F32},
                      .c = y,
                      .m = rows,
                      .n = out,
                      .k = in,
                      .ldc = out,
                      .accumulate = residual != NULL};
    return bn_launch_gemm(bn_backend_of(p->x), precision, args);
}

bn_status bn_projection_backward_x(const bn_projection *p, bn_precision precision, int64_t rows, const float *dy,
                                   float *dx, bool accumulate) {
    const int64_t in = bn_projection_in(p), out = bn_projection_out(p);
    gemm_args args = {.a = {.data = dy, .row_stride = out, .col_stride = 1, .dtype = BN_F32},
                      .b = {.data = bn_f32(p->weight), .row_stride = in, .col_stride = 1, .dtype = BN_F32},
                      .c = dx,
                      .m = rows,
                      .n = in,
                      .k = out,
                      .ldc = in,
                      .accumulate = accumulate};
    if (p->ternary) {
        args.a.scale = bn_f32(p->weight->ternary->scale);
        args.b.data = bn_data(p->weight->ternary->codes);
        args.b.dtype = BN_I8;
    }
    return bn_launch_gemm(bn_backend_of(p->x), precision, args);
}

bn_status bn_projection_backward_weight(const bn_projection *p, bn_precision precision, int64_t first, int64_t rows,
                                        const float *dy, float *dw, bool accumulate) {
    const int64_t in = bn_projection_in(p), out = bn_projection_out(p);
    gemm_args args = {.a = {.data = dy, .row_stride = 1, .col_stride = out, .dtype = BN_F32},
                      .b = {.data = bn_f32(p->x) + first * in, .row_stride = in, .col_stride = 1, .dtype = BN_F32},
                      .c = dw,
                      .m = out,
                      .n = in,
                      .k = rows,
                      .ldc = in,
                      .accumulate = accumulate};
    if (p->ternary) {
        const bn_quantized *x = p->x->quantized;
        args.b = (gemm_operand){.data = bn_i8(x->q) + first * x->q->shape[1],
                                .row_stride = x->q->shape[1],
                                .col_stride = 1,
                                .dtype = BN_I8,
                                .tiled = true};
        /* Before a rounding to bf16 the scale goes to dy, which is rounded anyway: int8 alone survives it unchanged. */
        (precision == BN_FAST ? &args.a : &args.b)->depth_scale = bn_f32(x->act_scale) + first;
    }
    return bn_launch_gemm(bn_backend_of(p->x), precision, args);
}

bn_projection_versions bn_projection_versions_now(const bn_projection *p) {
    if (!p->ternary) {
        return (bn_projection_versions){bn_storage_version(p->x->storage), bn_storage_version(p->weight->storage)};
    }
    return (bn_projection_versions){p->x->quantized->version, p->weight->ternary->version};
}

bn_status bn_projection_unchanged(const char *op, const bn_projection *p, bn_projection_versions then) {
    const bn_projection_versions now = bn_projection_versions_now(p);
    if (now.x != then.x || now.weight != then.weight) {
        return bn_fail(BN_ERR_STATE, "backward: the %s of a %s was changed between its forward and its backward pass",
                       now.x != then.x ? "input" : "weight", op);
    }
    return BN_OK;
}
