/*
 * projection.h: the three matrix products of a linear map y = x W^T, full precision or ternary, over a range of rows:
 * what linear, bitlinear and the fused loss have in common.
 */
#ifndef BN_OPS_PROJECTION_H
#define BN_OPS_PROJECTION_H

#include "ops/op.h"

typedef struct bn_projection {
    bn_tensor *x;      /* (..., in), f32; ternary: x->quantized is filled, and may be all there is (q8) */
    bn_tensor *weight; /* (out, in), latent f32; ternary: weight->ternary is fresh */
    bool ternary;
    int activation_bits; /* ternary: of what x is rounded to, 8 or 4 */
} bn_projection;

/* Where a gradient goes; memory NULL: nowhere. */
typedef struct bn_grad_memory {
    float *memory;
    bool accumulate;
} bn_grad_memory;

static inline int64_t bn_projection_rows(const bn_projection *p) { return bn_row_count(p->x); }
static inline int64_t bn_projection_in(const bn_projection *p) { return p->weight->shape[1]; }
static inline int64_t bn_projection_out(const bn_projection *p) { return p->weight->shape[0]; }

/* Shapes and dtypes of x and weight; `op` names the caller in the sentence. */
BN_CHECKED bn_status bn_projection_check(const char *op, const bn_projection *p);
/* Brings the ternary forms of weight and x up to date (nothing to do in full precision). While recording on an explicit
 * tape the quantization of x becomes a node of its own, once for all projections that read x. */
BN_CHECKED bn_status bn_projection_prepare(const bn_projection *p);
/* y (rows, out) = x[first : first + rows] W^T, plus residual (rows, out) if not NULL. `first` is a multiple of
 * BN_QUANT_ROWS. A ternary product is exact in either precision. */
BN_CHECKED bn_status bn_projection_forward(const bn_projection *p, bn_precision precision, int64_t first, int64_t rows,
                                           const float *residual, float *y);
/* dx (rows, in) (+)= dy W and dW (out, in) (+)= dy^T x[first : first + rows], with W and x as the forward pass used
 * them. dx belongs to rows first.. of x. dW is written first, should both be the same memory. */
BN_CHECKED bn_status bn_projection_backward(const bn_projection *p, bn_precision precision, int64_t first, int64_t rows,
                                            const float *dy, bn_grad_memory dx, bn_grad_memory dw);

/* What the forward pass quantized, to refuse a backward pass over something else. */
typedef struct bn_projection_versions {
    uint64_t x, weight;
} bn_projection_versions;

bn_projection_versions bn_projection_versions_now(const bn_projection *p);
BN_CHECKED bn_status bn_projection_unchanged(const char *op, const bn_projection *p, bn_projection_versions then);

#endif
