/*
 * ternary.h: the numbers of BitNet b1.58, one value at a time. Everything fast in this project is tested against these
 * few functions; where a kernel and this page disagree, this page is right.
 *
 *   weights      weight_scale = max(mean |W|, 1e-5) over the whole matrix
 *                code = clamp(round(w * (1 / weight_scale)), -1, 1)            w is about code * weight_scale
 *                or, with channel scales, each by its row: weight_scale[j] = max(mean |W[j]|, 1e-5), codes from that
 *   activations  act_scale = max(max |row|, 1e-5) / 127, one for each row (token)
 *                q = clamp(round(x * (127 / max(max |row|, 1e-5))), -128, 127)  x is about q * act_scale
 *                in 4 bits the same with 7 for 127 and -8 for -128, each q still in a byte
 *   product      y = (sum of q * code) * (act_scale * weight_scale), the sum exact in integers, weight_scale that of
 *                the output's row of W
 *   packed       four codes a byte, each stored as value + 1 in two bits, the first code in the lowest bits:
 *                00 = -1, 01 = 0, 10 = 1; 11 is unused and refused. Unused places of the last byte are 0 bits.
 *
 * round is to nearest, ties to even. All arithmetic is f32, one rounding per operation as written, except the mean.
 * Source: Ma et al. 2024, arXiv 2402.17764, eq. 1-3, and its training notes for eps and the int8 range; 4 bits: Wang et
 * al. 2025, BitNet v2, arXiv 2504.18415, here with the largest |x| of the row where it takes a multiple of the mean.
 */
#ifndef BN_QUANT_TERNARY_H
#define BN_QUANT_TERNARY_H

#include "base/error.h"

BN_EXTERN_C_BEGIN

/* Least scale of a weight matrix, and least absmax of a row: zeros quantize to zeros, without a division by zero. */
#define BN_QUANT_EPS 1e-5f
/* Where a row's absmax lands. -128 is inside the clamp but a symmetric scale never reaches it. */
#define BN_INT8_MAX 127.0f
#define BN_INT8_MIN (-128.0f)
/* The same for activations of 8 or 4 bits: 127 or 7; the least value is -1 minus that. */
static inline float bn_activation_most(int bits) { return (float)((1 << (bits - 1)) - 1); }
/* Bits of one packed code, codes of one byte, and the pattern that stands for nothing. */
#define BN_CODE_BITS 2
#define BN_CODES_PER_BYTE 4
#define BN_CODE_UNUSED 3

/* Mean of |w| over n values, at least BN_QUANT_EPS; summed in double and rounded once. NaN if any value is. The kernels
 * sum blocks of 4096 in sixteen f32 lanes: at most 260 roundings of 2^-24, so the two agree to 1.6e-5, relative. */
float bn_absmean_scale(const float *w, int64_t n);

/* -1, 0 or 1; 0 for a NaN weight or scale. */
int8_t bn_ternary_code(float w, float weight_scale);

/* One row of n activations in 8 or 4 bits: writes q (n) and returns its act_scale. If any value is NaN or infinite, the
 * scale is NaN and q is 0, so that the row's products are NaN rather than plausible. */
float bn_int8_row(const float *x, int64_t n, int bits, int8_t *q);

/* Bytes of n packed codes. Wants n >= 0. */
size_t bn_ternary_packed_bytes(int64_t n);
/* Packs n codes; BN_ERR_VALUE names the first that is not -1, 0 or 1. */
BN_CHECKED bn_status bn_ternary_pack(const int8_t *codes, int64_t n, uint8_t *packed);
/* Unpacks n codes; BN_ERR_VALUE names the first place that holds the unused pattern. */
BN_CHECKED bn_status bn_ternary_unpack(const uint8_t *packed, int64_t n, int8_t *codes);

BN_EXTERN_C_END
#endif
