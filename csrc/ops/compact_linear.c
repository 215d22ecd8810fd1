/*
 * compact_linear.c: y = x W^T of an output head W (compact.h), forward only. Without `top` W is the rounded matrix, x
 * rounded to sixteen bits. With it W is the exact bf16 matrix, and only the outputs that may be among the `top` largest
 * of their row are made, the others being -infinity: the rounded product and a bound of its error tell which those are,
 * and where the bound tells little, more are made. What is made has the bits of linear by the bf16 matrix.
 */
#include "ops/op.h"
#include "tensor/compact.h"

/* Q: i8 (rows, 2, stride); FLOATS: f32 (rows, 3), scales first; SUMS: i32 (rows, 2); of a screen CANDIDATES: i32 (rows,
 * out) and COUNTS: i32 (rows). */
enum { Q, FLOATS, SUMS, CANDIDATES, COUNTS };

typedef struct compact_params {
    int64_t top; /* 0: all outputs, of the rounded matrix */
} compact_params;

static bn_split_rows split_of(const bn_node *n) {
    const int64_t rows = bn_row_count(n->inputs[0]);
    return (bn_split_rows){.q = bn_i8(n->saved[Q]),
                           .act_scale = bn_f32(n->saved[FLOATS]),
                           .bound = bn_f32(n->saved[FLOATS]) + rows,
                           .sums = bn_i32(n->saved[SUMS]),
                           .stride = n->saved[Q]->shape[2]};
}

/* The candidates of each row by the exact matrix. */
static bn_status exact_rows(bn_node *n) {
    const bn_tensor *x = n->inputs[0], *weight = n->inputs[1];
    const int64_t out = weight->shape[0], in = weight->shape[1];
    for (int64_t r = 0; r < bn_row_count(x); r++) {
        const linear_bf16_args args = {.x = bn_f32(x) + r * in,
                                       .w = bn_data(weight->compact->exact),
                                       .y = bn_f32(n->output) + r * out,
                                       .rows = bn_i32(n->saved[CANDIDATES]) + r * out,
                                       .m = 1,
                                       .n = bn_i32(n->saved[COUNTS])[r],
                                       .k = in,
                                       .ldy = out};
        BN_TRY(bn_run_linear_bf16(bn_backend_of(x), &args, bn_ceil_div(args.n, 16), 1));
    }
    return BN_OK;
}

static bn_status forward(bn_node *n) {
    const bn_tensor *x = n->inputs[0], *weight = n->inputs[1];
    const bn_compact *c = weight->compact;
    const bn_backend *backend = bn_backend_of(x);
    const int64_t rows = bn_row_count(x), out = weight->shape[0], in = weight->shape[1];
    const int64_t top = bn_node_params(n, compact_params)->top;
    const split_rows_args split = {.x = bn_f32(x), .out = split_of(n), .rows = rows, .cols = in};
    BN_TRY(bn_run_split_rows(backend, &split, rows, 1));
    const compact_forward_args product = {.x = split.out,
                                          .panels = bn_data(c->panels),
                                          .scale = bn_f32(c->scale),
                                          .bits = c->bits,
                                          .y = bn_f32(n->output),
                                          .m = rows,
                                          .n = out,
                                          .k = in};
    BN_TRY(bn_run_compact_forward(backend, &product, bn_ceil_div(out, BN_PANEL_ROWS), 4));
    if (top == 0) {
        return BN_OK;
    }
    const screen_args screen = {.y = bn_f32(n->output),
                                .norms = bn_f32(c->norms),
                                .bound = split.out.bound,
                                .candidates = bn_i32(n->saved[CANDIDATES]),
                                .counts = bn_i32(n->saved[COUNTS]),
                                .m = rows,
                                .n = out,
                                .top = top};
    BN_TRY(bn_run_screen(backend, &screen, rows, 1));
    return exact_rows(n);
}

const bn_op bn_op_compact_linear = {"compact_linear", forward, NULL};

static bn_status check(bn_tensor *x, const bn_tensor *weight, int64_t top) {
    BN_TRY(bn_require_dtype("compact_linear", "x", x, BN_F32));
    BN_TRY(bn_require_dtype("compact_linear", "weight", weight, BN_COMPACT));
    if (x->ndim < 1 || bn_last_dim(x) != weight->shape[1]) {
        return bn_fail(BN_ERR_SHAPE, "compact_linear: x has %lld channels, weight expects %lld",
                       (long long)bn_last_dim(x), (long long)weight->shape[1]);
    }
    if (bn_wants_grad(&x, 1)) {
        return bn_fail(BN_ERR_STATE, "compact_linear: no gradient flows through a compact matrix; use no_grad()");
    }
    if (top < 0 || top > BN_SCREEN_MOST) {
        return bn_fail(BN_ERR_VALUE, "compact_linear: top is 0 to %lld, not %lld", (long long)BN_SCREEN_MOST,
                       (long long)top);
    }
    if (top > 0 && weight->compact->exact == NULL) {
        return bn_fail(BN_ERR_STATE, "compact_linear: this matrix was made without its exact form, which `top` needs");
    }
    return BN_OK;
}

bn_status bn_compact_linear(bn_tensor *x, bn_tensor *weight, int64_t top, bn_tensor **out) {
    BN_TRY(check(x, weight, top));
    const bn_backend *backend = bn_backend_of(x);
    const int64_t rows = bn_row_count(x), columns = weight->shape[0];
    const int64_t q[] = {rows, 2, bn_round_up(weight->shape[1], BN_QUANT_PAD)}, floats[] = {rows, 3},
                  sums[] = {rows, 2};
    const int64_t candidates[] = {rows, columns};
    bn_node n = {.op = &bn_op_compact_linear, .inputs = {x, weight}};
    bn_node_params(&n, compact_params)->top = top;
    BN_TRY(bn_output_last(&n, x, columns));
    BN_NODE_TRY(&n, bn_tensor_new(backend, BN_I8, 3, q, &n.saved[Q]));
    BN_NODE_TRY(&n, bn_tensor_new(backend, BN_F32, 2, floats, &n.saved[FLOATS]));
    BN_NODE_TRY(&n, bn_tensor_new(backend, BN_I32, 2, sums, &n.saved[SUMS]));
    if (top > 0) {
        BN_NODE_TRY(&n, bn_tensor_new(backend, BN_I32, 2, candidates, &n.saved[CANDIDATES]));
        BN_NODE_TRY(&n, bn_tensor_new(backend, BN_I32, 1, &rows, &n.saved[COUNTS]));
    }
    return bn_tape_run(&n, out);
}
