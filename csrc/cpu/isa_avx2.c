/*
 * isa_avx2.c: every kernel on pairs of 256-bit registers, for CPUs with AVX2 and FMA (Haswell, Zen and later).
 */
#include "cpu/target.h"

#include <stdint.h>

#if defined(__x86_64__)
#include <immintrin.h>

BN_TARGET_BEGIN("avx2,fma")

#include "cpu/words_avx2.h"

/* A pair of bytes 0..127 times int8 lies within [-32512, 32258], so the 16-bit sums of maddubs cannot saturate. */
static inline w8 dot_8(w8 acc, w8 codes, __m256i quad) {
    return acc + (w8)_mm256_madd_epi16(_mm256_maddubs_epi16((__m256i)codes, quad), _mm256_set1_epi16(1));
}
static inline vi w_dot(vi acc, vi codes, int32_t quad) {
    const __m256i q = _mm256_set1_epi32(quad);
    return (vi){dot_8(acc.a, codes.a, q), dot_8(acc.b, codes.b, q)};
}
#include "cpu/dot_u8.inc"

/* Sixteen registers: 8 sums, 2 of the right factor, 1 of the left one, the ones, and what passes between. */
#define DOT_ROWS 4
#define DOT_VECTORS 1
#define FEW_ROWS_STREAMS 1

#define BN_ISA avx2
#define BN_ISA_NAME "avx2"
#include "cpu/kernels.inc"

BN_TARGET_END
#else
typedef int bn_no_avx2;
#endif
