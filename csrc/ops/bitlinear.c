/*
 * bitlinear.c: the ternary linear map of BitNet b1.58 (Ma et al. 2024, arXiv 2402.17764, eq. 1-3), x (..., in), latent
 * W (out, in):
 *     code = clamp(round(W / mean|W|), -1, 1)        weight_scale = mean|W|           one for the matrix, or
 *                                                  weight_scale[j] = mean|W[j]|     one a row (output channel)
 *     q    = clamp(round(x * 127 / max|x|))          act_scale    = max|x| / 127      one a row (token)
 *            in 4 bits: 7 for 127, in [-8, 7]
 *     y    = (q . code) * (act_scale * weight_scale)                                  the dot product in integers
 * Backward, straight through both roundings: dx = dy . (code * weight_scale), dW = dy^T . (q * act_scale). Scales of
 * channels stand inside the sum of dx, which runs over channels: there dy is multiplied by them on its way in.
 * The rounding rules are in quant/ternary.h, the products in projection.c. The codes of W are made again when W's
 * storage has a new version, which is once per optimizer step.
 */
#define MAP bitlinear
#define MAP_TERNARY true
#include "ops/linear_map.inc"

bn_status bn_bitlinear(bn_tensor *x, bn_tensor *weight, bn_tensor *residual, int activation_bits, bn_tensor **out) {
    if (activation_bits != 8 && activation_bits != 4) {
        return bn_fail(BN_ERR_VALUE, "bitlinear: activation_bits is %d; it is 8 or 4", activation_bits);
    }
    return linear_map(x, weight, residual, activation_bits, out);
}
