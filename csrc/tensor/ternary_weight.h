/*
 * ternary_weight.h: the ternary form of a latent weight (rows, cols), kept beside it: its codes in
 * panels, the scale (mean |W|, or that of each row) and a tally. Made when a bitlinear first reads the weight and
 * again whenever the weight's storage has a new version: once per optimizer step, not once per micro-batch; or less
 * often, where the codes are held.
 */
#ifndef BN_TENSOR_TERNARY_WEIGHT_H
#define BN_TENSOR_TERNARY_WEIGHT_H

#include "tensor/tensor.h"

struct bn_ternary {
    bn_tensor *panels;   /* codes for y = x W^T, and */
    bn_tensor *turned;   /* for dx = dy W, both as kernels.h says at ternarize */
    bn_tensor *scale;    /* f32 (1), or (rows) where the weight has channel_scales */
    bn_tensor *tally;    /* i32 (rows, 4): minus, zero, plus, flipped at the last refresh */
    bn_storage *partial; /* doubles: block sums of |W| */
    uint64_t version;    /* of the weight's storage; 0: of none, as before the first refresh, or one of held codes */
    uint64_t refreshes;
    bool is_held; /* not made again, whatever is written to the weight */
    bn_code_form
        form; /* of the panels; BN_CODES_8 but for a prepared weight, which has no turned, partial or version */
};

/* Sums of the tally: how many codes are -1, 0, +1, and how many changed at the last refresh (0 at the first, and while
 * they are held); and the scale, of channel scales their mean. */
typedef struct bn_ternary_stats {
    int64_t minus, zero, plus, flipped;
    float scale;
} bn_ternary_stats;

/* Gives an f32 matrix channel scales from now on. BN_ERR_STATE if its codes were made with one scale, or it was
 * prepared so; a weight that has them keeps them. */
BN_CHECKED bn_status bn_ternary_scale_channels(bn_tensor *weight);
/* weight: f32 (rows, cols), or prepared. On return weight->ternary matches the weight's present values, or is held. */
BN_CHECKED bn_status bn_ternary_refresh(bn_tensor *weight);
/* Codes of a weight that was quantized elsewhere, in host memory: as i8 (rows, cols), or as fifths (kernels.h,
 * prepare_codes), of which there are ceil(rows * cols / 5) bytes. */
typedef struct bn_ternary_source {
    const bn_tensor *codes; /* or NULL, and */
    const uint8_t *fifths;
    int64_t rows, cols;
    const float *scale; /* one, or with channel_scales one for each row */
    bool channel_scales;
} bn_ternary_source;
/* Where the weight is made, and its scales lie: beside its codes; fifths are the host's. */
const bn_backend *bn_ternary_source_device(const bn_ternary_source *source);
/* Returns new: a weight of dtype prepared, codes times scale in a dense form (two bits or five codes a byte), for
 * products that need no gradient. BN_ERR_VALUE names a byte that is no code. */
BN_CHECKED bn_status bn_ternary_prepare(const bn_ternary_source *source, bn_code_form form, bn_tensor **out);
/* Returns new: the codes row by row, i8 (rows, cols), in host memory. */
BN_CHECKED bn_status bn_ternary_codes(bn_tensor *weight, bn_tensor **out);
/* Returns new: the scale, f32 (1) or (rows), in host memory. */
BN_CHECKED bn_status bn_ternary_scales(bn_tensor *weight, bn_tensor **out);
/* BN_ERR_VALUE names the first of codes i8 that is none of -1, 0 and 1. */
BN_CHECKED bn_status bn_ternary_require_codes(const bn_tensor *codes);
BN_CHECKED bn_status bn_ternary_read_stats(bn_tensor *weight, bn_ternary_stats *out);
/*
 * Codes that are held stay as they are, whatever is written to the weight, until they are released. weight: f32. Beside
 * them the weight has the codes of its present values, as ever: bn_ternary_use_held says which of the two all that
 * reads the weight's codes finds. Holding selects the held ones.
 */
/* Holds the codes of the present values, in place of those held before. */
BN_CHECKED bn_status bn_ternary_hold(bn_tensor *weight);
/* Holds these codes, i8 of the weight's shape, and scale, f32 (1) or (rows) as the weight has it, both in host memory.
 * BN_ERR_VALUE for what is no code. */
BN_CHECKED bn_status bn_ternary_hold_codes(bn_tensor *weight, const bn_tensor *codes, const bn_tensor *scale);
/* BN_ERR_STATE for held codes of a weight that has none. */
BN_CHECKED bn_status bn_ternary_use_held(bn_tensor *weight, bool held);
/* The next refresh makes the codes anew, and counts how many of the held ones it changes. */
void bn_ternary_release(bn_tensor *weight);
/* Accepts NULL. */
void bn_ternary_free(bn_ternary *ternary);

#endif
