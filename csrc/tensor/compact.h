/*
 * compact.h: an output matrix (rows, cols) rounded to 8 or 6 bits a weight with a scale for each row, for inference
 * (kernels.h, compact_rows). With `exact`, the bf16 matrix it was made of, it is a *screen*: its products tell which
 * few rows of the exact one can matter.
 */
#ifndef BN_TENSOR_COMPACT_H
#define BN_TENSOR_COMPACT_H

#include "tensor/tensor.h"

struct bn_compact {
    int bits;
    bn_tensor *panels; /* i8 (bytes) */
    bn_tensor *scale;  /* f32 (rows) */
    bn_tensor *norms;  /* f32 (rows, 2) */
    bn_tensor *exact;  /* bf16 (rows, cols), or NULL */
};

/* Returns new, of dtype compact. weight: f32 or bf16 (rows, cols), cols at most BN_COMPACT_MOST_COLS; bits: 8 or 6.
 * `screen` keeps the weight, which must be bf16. */
BN_CHECKED bn_status bn_compact_make(bn_tensor *weight, int bits, bool screen, bn_tensor **out);
/* Accepts NULL. */
void bn_compact_free(bn_compact *compact);

#endif
