/*
 * quantized.h: the int8 form of an activation (rows, cols), kept beside it so that the projections that share an input
 * (q, k and v; gate and up) quantize it once; or instead of it (dtype q8), where the op that makes it knows that
 * nothing but projections will read it.
 */
#ifndef BN_TENSOR_QUANTIZED_H
#define BN_TENSOR_QUANTIZED_H

#include "tensor/tensor.h"

struct bn_quantized {
    bn_tensor *q;         /* i8, rows and cols rounded up to whole tiles: bn_quantized_at in kernels.h */
    bn_tensor *act_scale; /* f32 (rows): x = q * act_scale */
    bn_tensor *row_sum;   /* i32 (rows) */
    uint64_t version;     /* of the activation's storage when it was quantized */
    int bits;             /* of a q, 8 or 4 */
};

/* A row of an activation is made in a thread's scratch before it is quantized. */
#define BN_QUANT_MOST_COLS (BN_SCRATCH_BYTES / (int64_t)sizeof(float))

/* Returns new: an activation of this shape that has an int8 form, in 8 bits, and no other (dtype q8), contents
 * undefined. `op` names the caller in the sentence. */
BN_CHECKED bn_status bn_quantized_new(const char *op, const bn_backend *backend, int ndim, const int64_t *shape,
                                      bn_tensor **out);
/* Where a kernel writes or reads it; after writing, bn_quantized_written. */
bn_int8_rows bn_quantized_rows(const bn_tensor *x);
void bn_quantized_written(bn_tensor *x);

/* Makes x->quantized (memory only) if it is missing. x: f32, last dimension = one token. */
BN_CHECKED bn_status bn_quantized_make(bn_tensor *x);
/* Quantizes x into x->quantized, in 8 or 4 bits. */
BN_CHECKED bn_status bn_quantized_fill(bn_tensor *x, int bits);
/* True when x->quantized holds the present values of x in so many bits. */
bool bn_quantized_is_fresh(const bn_tensor *x, int bits);
/* Accepts NULL. */
void bn_quantized_free(bn_quantized *quantized);

#endif
