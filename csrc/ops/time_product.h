/*
 * time_product.h: how long one product of a linear map takes (ops/projection.h), without Python, autograd, the
 * quantization of its operands or the allocation of its result. For benchmarks.
 */
#ifndef BN_OPS_TIME_PRODUCT_H
#define BN_OPS_TIME_PRODUCT_H

#include "base/error.h"

/* y (rows, out) = x W^T; dx (rows, in) = dy W; dw (out, in) = dy^T x. */
typedef enum bn_product { BN_PRODUCT_Y, BN_PRODUCT_DX, BN_PRODUCT_DW, BN_PRODUCTS } bn_product;

/* Fills seconds[repeats], one run each, operands as the run before left them in the caches, after one run that is not
 * counted. Operands are N(0, 1). Sizes are at least 1; ternary: int8 activations, ternary codes. In this thread's
 * precision (tensor/tape.h). */
BN_CHECKED bn_status bn_time_product(bn_product product, bool ternary, int64_t rows, int64_t in, int64_t out,
                                     int repeats, double *seconds);

#endif
