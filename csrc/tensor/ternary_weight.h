/*
 * ternary_weight.h: the ternary form of a latent weight (rows, cols), kept beside it: its codes in
 * panels, the scale (mean |W|) and a tally. Made when a bitlinear first reads the weight and
 * again whenever the weight's storage has a new version: once per optimizer step, not once per micro-batch.
 */
#ifndef BN_TENSOR_TERNARY_WEIGHT_H
#define BN_TENSOR_TERNARY_WEIGHT_H

#include "tensor/tensor.h"

struct bn_ternary {
    bn_tensor *panels;   /* codes for y = x W^T, and */
    bn_tensor *turned;   /* for dx = dy W, both as kernels.h says at ternarize */
    bn_tensor *scale;    /* f32 (1) */
    bn_tensor *tally;    /* i32 (rows, 4): minus, zero, plus, flipped at the last refresh */
    bn_storage *partial; /* doubles: block sums of |W| */
    uint64_t version;    /* of the weight's storage; 0 before the first refresh */
    uint64_t refreshes;
    bn_code_form
        form; /* of the panels; BN_CODES_8 but for a prepared weight, which has no turned, partial or version */
};

/* Sums of the tally: how many codes are -1, 0, +1, and how many changed at the last refresh (0 at the first). */
typedef struct bn_ternary_stats {
    int64_t minus, zero, plus, flipped;
    float scale;
} bn_ternary_stats;

/* weight: f32 (rows, cols), or prepared. On return weight->ternary matches the weight's present values. */
BN_CHECKED bn_status bn_ternary_refresh(bn_tensor *weight);
/* Codes of a weight that was quantized elsewhere, in host memory: as i8 (rows, cols), or as fifths (kernels.h,
 * prepare_codes), of which there are ceil(rows * cols / 5) bytes. */
typedef struct bn_ternary_source {
    const bn_tensor *codes; /* or NULL, and */
    const uint8_t *fifths;
    int64_t rows, cols;
    float scale;
} bn_ternary_source;
/* Returns new: a weight of dtype prepared, codes times scale in a dense form (two bits or five codes a byte), for
 * products that need no gradient. BN_ERR_VALUE names a byte that is no code. */
BN_CHECKED bn_status bn_ternary_prepare(const bn_ternary_source *source, bn_code_form form, bn_tensor **out);
/* Returns new: the codes row by row, i8 (rows, cols), in host memory. */
BN_CHECKED bn_status bn_ternary_codes(bn_tensor *weight, bn_tensor **out);
BN_CHECKED bn_status bn_ternary_read_stats(bn_tensor *weight, bn_ternary_stats *out);
/* Accepts NULL. */
void bn_ternary_free(bn_ternary *ternary);

#endif
