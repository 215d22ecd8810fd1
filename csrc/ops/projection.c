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
    } else if (x->quantized->bits != p->activation_bits) {
        return bn_fail(BN_ERR_VALUE, "%s: x is q8, rounded to %d bits already, and activation_bits is %d", op,
                       x->quantized->bits, p->activation_bits);
    }
    if (weight->dtype != (p->ternary ? BN_PREPARED : BN_BF16)) {
        BN_TRY(bn_require_dtype(op, "weight", weight, BN_F32));
    } else if (bn_wants_grad((bn_tensor *const[]){p->x}, 1)) {
        return bn_fail(BN_ERR_STATE, "%s: a %s weight passes no gradient back to x; use it under no_grad()", op,
                       bn_dtype_name(weight->dtype));
    }
    BN_TRY(bn_require_ndim(op, "weight", weight, 2));
    if (x->ndim < 1 || bn_last_dim(x) != weight->shape[1]) {
        return bn_fail(BN_ERR_SHAPE, "%s: x has %lld channels, weight expects %lld", op, (long long)bn_last_dim(x),
                       (long long)weight->shape[1]);
    }
    return BN_OK;
}

/* The quantization of an activation as a node: input x, output its q, params the bits. */
static bn_status quantize_forward(bn_node *n) { return bn_quantized_fill(n->inputs[0], *bn_node_params(n, int)); }

static const bn_op op_quantize = {"quantize", quantize_forward, NULL};

static bn_status quantize(bn_tensor *x, int bits) {
    if (bn_quantized_is_fresh(x, bits) && bn_tape_makes(x->quantized->q)) {
        return BN_OK;
    }
    BN_TRY(bn_quantized_make(x));
    bn_node n = {.op = &op_quantize, .inputs = {x}, .output = bn_tensor_retain(x->quantized->q)};
    *bn_node_params(&n, int) = bits;
    bn_tensor *q;
    BN_TRY(bn_tape_run(&n, &q));
    bn_tensor_release(q);
    return BN_OK;
}

bn_status bn_projection_prepare(const bn_projection *p) {
    return p->ternary && p->x->dtype != BN_Q8 ? quantize(p->x, p->activation_bits) : BN_OK;
}

/* The scale of W on dy's side of dx = dy W, as a gemm takes it: one for all, or one for each value of the summed
 * index. */
static const float *scale_for_all(const bn_projection *p) {
    return p->ternary && !p->weight->channel_scales ? bn_f32(p->weight->ternary->scale) : NULL;
}
static const float *scale_by_channel(const bn_projection *p) {
    return p->ternary && p->weight->channel_scales ? bn_f32(p->weight->ternary->scale) : NULL;
}

/* The integer product of both directions: int8 rows by ternary codes, in panels with `in` and `out` of the product. */
static bn_status integer_product(const bn_backend *backend, bitlinear_forward_args args) {
    const bn_tiles tiles = args.m <= BN_FEW_ROWS && args.form != BN_CODES_8
                               ? bn_few_rows_tiles(args.n)
                               : bn_product_tiles(args.m, args.n, args.k, backend->parallelism());
    args.tile_m = tiles.tile_m;
    args.tile_n = tiles.tile_n;
    return bn_run_bitlinear_forward(backend, &args, tiles.units, tiles.grain);
}

static bn_status ternary_forward(const bn_projection *p, int64_t first, int64_t rows, const float *residual, float *y) {
    BN_TRY(bn_ternary_refresh(p->weight));
    const bn_quantized *x = p->x->quantized;
    const bn_ternary *w = p->weight->ternary;
    const int64_t stride = x->q->shape[1];
    assert(first % BN_QUANT_ROWS == 0);
    return integer_product(bn_backend_of(p->x), (bitlinear_forward_args){.q = bn_i8(x->q) + first * stride,
                                                                         .act_scale = bn_f32(x->act_scale) + first,
                                                                         .row_sum = bn_i32(x->row_sum) + first,
                                                                         .panels = bn_data(w->panels),
                                                                         .form = w->form,
                                                                         .weight_scale = bn_f32(w->scale),
                                                                         .residual = residual,
                                                                         .y = y,
                                                                         .m = rows,
                                                                         .n = bn_projection_out(p),
                                                                         .k = bn_projection_in(p),
                                                                         .q_stride = stride,
                                                                         .channel_scales = p->weight->channel_scales});
}

/* Rows of a bf16 weight that are widened at a time: some ten MB. */
enum { WIDENED = 1024 };

/* A bf16 weight has the bits of the same values in f32. Few rows of x read it where it lies; for many it is widened. */
static bn_status bf16_forward(const bn_projection *p, int64_t first, int64_t rows, float *y) {
    const int64_t in = bn_projection_in(p), out = bn_projection_out(p);
    const bn_backend *backend = bn_backend_of(p->x);
    const float *x = bn_f32(p->x) + first * in;
    if (rows <= BN_FEW_ROWS) {
        const linear_bf16_args args = {
            .x = x, .w = bn_data(p->weight), .y = y, .m = rows, .n = out, .k = in, .ldy = out};
        return bn_run_linear_bf16(backend, &args, bn_ceil_div(out, 16), 1);
    }
    bn_storage *wide;
    BN_TRY(bn_storage_new(backend, (size_t)(WIDENED * in) * sizeof(float), &wide));
    bn_status status = BN_OK;
    for (int64_t row = 0; status == BN_OK && row < out; row += WIDENED) {
        const int64_t now = bn_min_i64(out - row, WIDENED);
        const convert_args widen = {.src = (const uint16_t *)bn_data(p->weight) + row * in,
                                    .dst = wide->data,
                                    .n = now * in,
                                    .src_dtype = BN_BF16,
                                    .dst_dtype = BN_F32};
        status = bn_run_convert(backend, &widen, bn_blocks(widen.n), 4);
        if (status == BN_OK) {
            const gemm_args args = {.a = {.data = x, .row_stride = in, .col_stride = 1, .dtype = BN_F32},
                                    .b = {.data = wide->data, .row_stride = 1, .col_stride = in, .dtype = BN_F32},
                                    .c = y + row,
                                    .m = rows,
                                    .n = now,
                                    .k = in,
                                    .ldc = out};
            status = bn_launch_gemm(backend, BN_EXACT, args);
        }
    }
    bn_storage_release(wide);
    return status;
}

bn_status bn_projection_forward(const bn_projection *p, bn_precision precision, int64_t first, int64_t rows,
                                const float *residual, float *y) {
    if (p->ternary) {
        return ternary_forward(p, first, rows, residual, y);
    }
    if (p->weight->dtype == BN_BF16 && residual == NULL) {
        return bf16_forward(p, first, rows, y);
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

/* Rows of a matrix as the second factor of a product, the summed index running down them: f32, or int8 in tiles. */
static gemm_operand rows_of(const bn_tensor *matrix, int64_t first_row) {
    const int64_t cols = bn_last_dim(matrix);
    return (gemm_operand){
        .data = bn_f32(matrix) + first_row * cols, .row_stride = cols, .col_stride = 1, .dtype = BN_F32};
}
static gemm_operand quantized_rows_of(const bn_tensor *q, int64_t first_row) {
    const int64_t stride = q->shape[1];
    return (gemm_operand){
        .data = bn_i8(q) + first_row * stride, .row_stride = stride, .layout = BN_TILED, .dtype = BN_I8};
}
static gemm_operand codes_of(const bn_tensor *weight) {
    return (gemm_operand){.data = bn_data(weight->ternary->turned),
                          .row_stride = bn_round_up(weight->shape[0], BN_QUANT_PAD),
                          .layout = BN_CODES,
                          .dtype = BN_I8};
}

/* The products of a backward pass: dx = dy W and dw = dy^T x. */
static gemm_args product_x(const bn_projection *p, int64_t rows, gemm_operand dy, bn_grad_memory dx) {
    const int64_t in = bn_projection_in(p);
    return (gemm_args){.a = dy,
                       .b = p->ternary ? codes_of(p->weight) : rows_of(p->weight, 0),
                       .c = dx.memory,
                       .m = rows,
                       .n = in,
                       .k = bn_projection_out(p),
                       .ldc = in,
                       .accumulate = dx.accumulate};
}

static gemm_args product_weight(const bn_projection *p, int64_t first, int64_t rows, gemm_operand dy,
                                bn_grad_memory dw) {
    const int64_t in = bn_projection_in(p);
    return (gemm_args){.a = dy,
                       .b = p->ternary ? quantized_rows_of(p->x->quantized->q, first) : rows_of(p->x, first),
                       .c = dw.memory,
                       .m = bn_projection_out(p),
                       .n = in,
                       .k = rows,
                       .ldc = in,
                       .accumulate = dw.accumulate};
}

static bn_status exact_backward(const bn_projection *p, int64_t first, int64_t rows, const float *dy, bn_grad_memory dx,
                                bn_grad_memory dw) {
    const int64_t out = bn_projection_out(p);
    const bn_backend *backend = bn_backend_of(p->x);
    if (dw.memory != NULL) {
        const gemm_operand columns = {.data = dy, .row_stride = 1, .col_stride = out, .dtype = BN_F32};
        gemm_args args = product_weight(p, first, rows, columns, dw);
        args.b.depth_scale = p->ternary ? bn_f32(p->x->quantized->act_scale) + first : NULL;
        BN_TRY(bn_launch_gemm(backend, BN_EXACT, args));
    }
    if (dx.memory == NULL) {
        return BN_OK;
    }
    const gemm_operand lines = {.data = dy,
                                .scale = scale_for_all(p),
                                .depth_scale = scale_by_channel(p),
                                .row_stride = out,
                                .col_stride = 1,
                                .dtype = BN_F32};
    return bn_launch_gemm(backend, BN_EXACT, product_x(p, rows, lines, dx));
}

/* Memory for one backward pass: dy in the forms that its products read. */
typedef struct dy_forms {
    bn_storage *storage;
    char *by_rows, *by_cols; /* panels of bf16 */
    bn_int8_rows int8;
} dy_forms;

static bn_status dy_take(const bn_projection *p, bool int8, int64_t rows, bn_grad_memory dx, bn_grad_memory dw,
                         dy_forms *forms) {
    const int64_t out = bn_projection_out(p), stride = bn_round_up(out, BN_QUANT_PAD), four = sizeof(float);
    const int64_t by_rows = dx.memory != NULL && !int8 ? bn_panels_bytes(rows, out) : 0;
    const int64_t by_cols = dw.memory != NULL ? bn_panels_bytes(out, rows) : 0;
    const int64_t q = dx.memory != NULL && int8 ? bn_round_up(rows, BN_QUANT_ROWS) * stride : 0;
    BN_TRY(bn_storage_new(bn_backend_of(p->x), (size_t)(by_rows + by_cols + (q > 0 ? q + 2 * four * rows : 0)),
                          &forms->storage));
    char *next = forms->storage->data;
    forms->by_rows = by_rows > 0 ? next : NULL;
    next += by_rows;
    forms->by_cols = by_cols > 0 ? next : NULL;
    next += by_cols;
    forms->int8 = (bn_int8_rows){.q = q > 0 ? (int8_t *)next : NULL,
                                 .act_scale = (float *)(void *)(next + q),
                                 .row_sum = (int32_t *)(void *)(next + q + four * rows),
                                 .q_stride = stride};
    return BN_OK;
}

/* dx in integers, as SwitchBack does it (Wortsman et al. 2023, arXiv 2304.13013): each row of dy, times the scales of
 * channels if W has them, is rounded to int8 with a scale of its own. The weight gradient, which sums over many rows,
 * would not bear that. */
static bn_status integer_backward_x(const bn_projection *p, int64_t rows, bn_int8_rows int8, bn_grad_memory dx) {
    return integer_product(bn_backend_of(p->x), (bitlinear_forward_args){.q = int8.q,
                                                                         .act_scale = int8.act_scale,
                                                                         .row_sum = int8.row_sum,
                                                                         .panels = bn_data(p->weight->ternary->turned),
                                                                         .weight_scale = scale_for_all(p),
                                                                         .residual = dx.accumulate ? dx.memory : NULL,
                                                                         .y = dx.memory,
                                                                         .m = rows,
                                                                         .n = bn_projection_in(p),
                                                                         .k = bn_projection_out(p),
                                                                         .q_stride = int8.q_stride});
}

/* dy is rounded to bf16 and brought into panels once for both products, each with the scale of its ternary partner:
 * int8 and codes alone survive the rounding unchanged. */
static bn_status run_fast_backward(const bn_projection *p, bool int8, int64_t first, int64_t rows, const float *dy,
                                   const dy_forms *forms, bn_grad_memory dx, bn_grad_memory dw) {
    const int64_t out = bn_projection_out(p);
    const bn_backend *backend = bn_backend_of(p->x);
    const pack_panels_args args = {.data = dy,
                                   .rows = rows,
                                   .cols = out,
                                   .by_rows = {forms->by_rows, true},
                                   .by_cols = {forms->by_cols, true},
                                   .scale = p->ternary ? bn_f32(p->weight->ternary->scale) : NULL,
                                   .row_scale = p->ternary ? bn_f32(p->x->quantized->act_scale) + first : NULL,
                                   .int8 = forms->int8,
                                   .channel_scales = p->ternary && p->weight->channel_scales};
    BN_TRY(bn_run_pack_panels(backend, &args, bn_ceil_div(rows, BN_PACK_ROWS), 1));
    if (dw.memory != NULL) {
        const gemm_operand by_cols = {.data = forms->by_cols, .layout = BN_PANELS};
        BN_TRY(bn_launch_gemm(backend, BN_FAST, product_weight(p, first, rows, by_cols, dw)));
    }
    if (dx.memory == NULL) {
        return BN_OK;
    }
    const gemm_operand by_rows = {.data = forms->by_rows, .layout = BN_PANELS};
    return int8 ? integer_backward_x(p, rows, forms->int8, dx)
                : bn_launch_gemm(backend, BN_FAST, product_x(p, rows, by_rows, dx));
}

static bn_status fast_backward(const bn_projection *p, bool int8, int64_t first, int64_t rows, const float *dy,
                               bn_grad_memory dx, bn_grad_memory dw) {
    dy_forms forms;
    BN_TRY(dy_take(p, int8, rows, dx, dw, &forms));
    const bn_status status = run_fast_backward(p, int8, first, rows, dy, &forms, dx, dw);
    bn_storage_release(forms.storage);
    return status;
}

bn_status bn_projection_backward(const bn_projection *p, bn_precision precision, int64_t first, int64_t rows,
                                 const float *dy, bn_grad_memory dx, bn_grad_memory dw) {
    if (dx.memory == NULL && dw.memory == NULL) {
        return BN_OK;
    }
    return precision == BN_EXACT ? exact_backward(p, first, rows, dy, dx, dw)
                                 : fast_backward(p, precision == BN_INT8 && p->ternary, first, rows, dy, dx, dw);
}

bn_projection_versions bn_projection_versions_now(const bn_projection *p) {
    if (!p->ternary) {
        return (bn_projection_versions){bn_storage_version(p->x->storage), bn_storage_version(p->weight->storage)};
    }
    /* Without a form: its codes were set aside (held_weight.c), and nothing has read those of the present values. */
    const bn_ternary *w = p->weight->ternary;
    return (bn_projection_versions){p->x->quantized->version, w == NULL ? UINT64_MAX : w->version};
}

bn_status bn_projection_unchanged(const char *op, const bn_projection *p, bn_projection_versions then) {
    const bn_projection_versions now = bn_projection_versions_now(p);
    if (now.x != then.x || now.weight != then.weight) {
        return bn_fail(BN_ERR_STATE, "backward: the %s of a %s was changed between its forward and its backward pass",
                       now.x != then.x ? "input" : "weight", op);
    }
    if (p->ternary && p->x->quantized->bits != p->activation_bits) {
        return bn_fail(BN_ERR_STATE, "backward: the input of a %s in %d bits was rounded to %d after its forward pass",
                       op, p->activation_bits, p->x->quantized->bits);
    }
    return BN_OK;
}
