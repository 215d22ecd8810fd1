/*
 * isa_avxvnni.c: integer dot products on 256-bit registers (Alder Lake and later, which have no AVX-512; Zen 5): four
 * bytes by four a lane in one instruction where AVX2 needs three (Intel SDM, VPDPBUSD).
 */
#include "cpu/target.h"

#include <stdint.h>

#if defined(__x86_64__)
#include <immintrin.h>

BN_TARGET_BEGIN("avx2,fma,avxvnni")

#include "cpu/words_avx2.h"

static inline w8 dot_8(w8 acc, w8 codes, __m256i quad) {
    return (w8)_mm256_dpbusd_avx_epi32((__m256i)acc, (__m256i)codes, quad);
}
static inline vi w_dot(vi acc, vi codes, int32_t quad) {
    const __m256i q = _mm256_set1_epi32(quad);
    return (vi){dot_8(acc.a, codes.a, q), dot_8(acc.b, codes.b, q)};
}

/* 12 sums, 2 of the left factor, 1 of the right one. */
#define DOT_ROWS 2
#define DOT_VECTORS 3
#define FEW_ROWS_STREAMS 1

#include "cpu/lanes.inc"
#include "cpu/micro.h"

#include "cpu/dot.inc"
#define BITLINEAR_MICRO(a) (&micro_i8)
#include "cpu/bitlinear.inc"

extern const bn_kernel_table bn_kernels_avxvnni;
const bn_kernel_table bn_kernels_avxvnni = {.isa = "avxvnni", .bitlinear_forward = bitlinear_forward};

BN_TARGET_END
#else
typedef int bn_no_avxvnni;
#endif
