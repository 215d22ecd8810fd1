/*
 * quantized.h: the int8 form of an activation (rows, cols), kept beside it so that the projections that share an input
 * (q, k and v; gate and up) quantize it once.
 */
#ifndef BN_TENSOR_QUANTIZED_H
#define BN_TENSOR_QUANTIZED_H

#include "tensor/tensor.h"

struct bn_quantized {
    bn_tensor *q;         /* i8, rows and cols rounded up to whole tiles: bn_quantized_at in kernels.h */
    bn_tensor *act_scale; /* f32 (rows): x = q * act_scale */
    bn_tensor *row_sum;   /* i32 (rows) */
    uint64_t version;     /* of the activation's storage when it was quantized */
};

/* Makes x->quantized (memory only) if it is missing. x: f32, last dimension = one token. */
BN_CHECKED bn_status bn_quantized_make(bn_tensor *x);
/* Quantizes x into x->quantized. */
BN_CHECKED bn_status bn_quantized_fill(bn_tensor *x);
/* True when x->quantized holds the present values of x. */
bool bn_quantized_is_fresh(const bn_tensor *x);
/* Accepts NULL. */
void bn_quantized_free(bn_quantized *quantized);

#endif
