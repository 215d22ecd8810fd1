/*
 * isa_neon.c: every kernel on baseline Advanced SIMD, for every 64-bit ARM CPU.
 */
#include "cpu/target.h"

#include <stdint.h>
#include <string.h>

#if defined(__aarch64__)
#include "cpu/words_neon.h"

/* A pair of codes 0..2 times int8 lies within [-512, 508], so the 16-bit sums of pairs cannot wrap. */
static inline int32x4_t dot_4(int32x4_t acc, const uint8_t *codes, int8x16_t quad) {
    const int8x16_t c = vreinterpretq_s8_u8(vld1q_u8(codes));
    const int16x8_t low = vmull_s8(vget_low_s8(c), vget_low_s8(quad)), high = vmull_high_s8(c, quad);
    return vpadalq_s16(acc, vpaddq_s16(low, high));
}
static inline vi w_dot(vi acc, const uint8_t *codes, int32_t quad) {
    const int8x16_t q = vreinterpretq_s8_s32(vdupq_n_s32(quad));
    return (vi){{dot_4(acc.q[0], codes, q), dot_4(acc.q[1], codes + 16, q), dot_4(acc.q[2], codes + 32, q),
                 dot_4(acc.q[3], codes + 48, q)}};
}
#define DOT_ROWS 4
#define DOT_VECTORS 1

#define BN_ISA neon
#define BN_ISA_NAME "neon"
#include "cpu/kernels.inc"
#else
typedef int bn_no_neon;
#endif
