/*
 * isa_neonbf16.c: bf16 products by 2 x 4 by 4 x 2 (FEAT_BF16: Neoverse V1 and N2, Apple M2 and later), 16 multiply-adds
 * in one instruction (Arm ARM, BFMMLA). Two products, exact in f32, are added to each other and then to the sum, each
 * time rounding to odd, which errs by less than an ulp; subnormals are zero.
 */
#include "cpu/target.h"

#include <stdint.h>
#include <string.h>

#if defined(__aarch64__)
#include <arm_neon.h>

BN_TARGET_BEGIN_ARM("bf16", "+bf16")

#include "cpu/words_neon.h"

#include "cpu/dot_neon.inc"

#include "cpu/lanes.inc"
#include "cpu/math.inc"
#include "cpu/micro.h"

/* Eight lanes to bf16, ties to even: those of a in order and then those of b. */
static inline uint16x8_t to_bf16_8(float32x4_t a, float32x4_t b) {
    uint16x8_t halves;
    __asm__("bfcvtn %0.4h, %1.4s" : "=w"(halves) : "w"(a));
    __asm__("bfcvtn2 %0.8h, %1.4s" : "+w"(halves) : "w"(b));
    return halves;
}
static inline vf bf16_halves(vf first, vf second) {
    return (vf){{vreinterpretq_f32_u16(to_bf16_8(first.q[0], first.q[1])),
                 vreinterpretq_f32_u16(to_bf16_8(first.q[2], first.q[3])),
                 vreinterpretq_f32_u16(to_bf16_8(second.q[0], second.q[1])),
                 vreinterpretq_f32_u16(to_bf16_8(second.q[2], second.q[3]))}};
}
/* Lanes of a and b in turn. */
static inline float32x4_t bf16_pairs_4(float32x4_t a, float32x4_t b) {
    const uint16x8_t halves = to_bf16_8(a, b);
    return vreinterpretq_f32_u16(vzip1q_u16(halves, vextq_u16(halves, halves, 4)));
}
static inline vf bf16_pairs(vf a, vf b) { return EACH2(bf16_pairs_4, a, b); }

/* The same where the lower halves of all floats are zero. */
static inline float32x4_t bf16_exact_pairs_4(float32x4_t a, float32x4_t b) {
    const uint16x8_t x = vreinterpretq_u16_f32(a), y = vreinterpretq_u16_f32(b);
    return vreinterpretq_f32_u16(vtrn2q_u16(x, y));
}
static inline vf bf16_exact_pairs(vf a, vf b) { return EACH2(bf16_exact_pairs_4, a, b); }

#define BF16_PER_WORD 2
#define BF16_ACROSS(v) bf16_pairs((v)[0], (v)[1])
#define BF16_ALONG(v) bf16_halves((v)[0], (v)[1])
#define PACK pack_bf16
#define PACK_PER_WORD BF16_PER_WORD
#define PACK_ACROSS BF16_ACROSS
#define PACK_ACROSS_EXACT(v) bf16_exact_pairs((v)[0], (v)[1])
#define PACK_ALONG BF16_ALONG
#include "cpu/pack.inc"

#define MMLA_MULTIPLY multiply_bf16
#define MMLA(sum, left, right) __asm__("bfmmla %0.4s, %1.8h, %2.8h" : "+w"(sum) : "w"(left), "w"(right))
#include "cpu/mmla.inc"

static const bn_micro micro_bf16 = {.per_word = 2,
                                    .rows = MMLA_ROWS,
                                    .cols = 16 * MMLA_VECTORS,
                                    .multiply = multiply_bf16,
                                    .pack = pack_bf16,
                                    .move = v_move_rows};

#define BF16_MULTIPLY multiply_bf16
#include "cpu/bf16.inc"

extern const bn_kernel_table bn_kernels_neonbf16;
const bn_kernel_table bn_kernels_neonbf16 = {
    .isa = "neonbf16",
#define KERNEL(name)
#define FAST_KERNEL(name) .name = name,
#include "kernels/kernels.def"
#undef KERNEL
};

BN_TARGET_END
#else
typedef int bn_no_neonbf16;
#endif
