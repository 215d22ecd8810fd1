/*
 * op.h: what the op files share: the checks behind their sentences, and launches over whole arrays.
 */
#ifndef BN_OPS_OP_H
#define BN_OPS_OP_H

#include "ops/ops.h"

#define OP(name) extern const bn_op bn_op_##name;
#include "ops/ops.def"
#undef OP

/* Each fails with a sentence that names the op, the argument and the value. */
BN_CHECKED bn_status bn_require_dtype(const char *op, const char *argument, const bn_tensor *t, bn_dtype dtype);
BN_CHECKED bn_status bn_require_ndim(const char *op, const char *argument, const bn_tensor *t, int ndim);
BN_CHECKED bn_status bn_require_same_shape(const char *op, const bn_tensor *a, const bn_tensor *b);
/* Every index is in [0, limit), or is *ignore where that is given. Read at run time, so a replayed op checks its new
 * inputs too. */
BN_CHECKED bn_status bn_require_index(const char *op, const char *what, const bn_tensor *index, int64_t limit,
                                      const int32_t *ignore);
/* Every sequence's positions start .. start + length - 1 are in [0, limit). */
BN_CHECKED bn_status bn_require_positions(const char *op, const bn_tensor *start, int64_t length, int64_t limit);

/* Makes an output of x's shape, f32. */
BN_CHECKED bn_status bn_output_like(bn_node *node, const bn_tensor *x);
/* The same, or one that exists in its int8 form only. */
BN_CHECKED bn_status bn_output_like_or_q8(bn_node *node, const bn_tensor *x, bool quantized);
/* Makes an output of x's leading dimensions and another last one. */
BN_CHECKED bn_status bn_output_last(bn_node *node, const bn_tensor *x, int64_t last);

static inline int64_t bn_blocks(int64_t count) { return bn_ceil_div(count, BN_BLOCK); }
/* out = alpha * a + beta * b, b NULL or of bias_n elements repeated. */
BN_CHECKED bn_status bn_launch_axpby(const bn_tensor *like, float alpha, const float *a, float beta, const float *b,
                                     int64_t bias_n, float *out);
/* c (+)= a b: cuts the product into tiles for this device and runs it, exact by gemm, fast by gemm_bf16. */
BN_CHECKED bn_status bn_launch_gemm(const bn_backend *backend, bn_precision precision, gemm_args args);

#endif
