/*
 * words_avx512.h: the words of kernels.inc on one 512-bit register each; included inside a compiler target that has at
 * least AVX-512 F, BW, DQ, VL and VNNI.
 */
#ifndef BN_CPU_WORDS_AVX512_H
#define BN_CPU_WORDS_AVX512_H

typedef __m512 vf;
/* Not __m512i, which is eight 64-bit lanes: gcc 12 copies and spills sums that change type at every dot. */
typedef int32_t vi __attribute__((vector_size(64)));

static inline vf v_set(float x) { return _mm512_set1_ps(x); }
static inline vf v_zero(void) { return _mm512_setzero_ps(); }
static inline vf v_load(const float *p) { return _mm512_loadu_ps(p); }
static inline vf v_keep(vf v) { return v; }
static inline void v_store(float *p, vf v) { _mm512_storeu_ps(p, v); }
static inline __mmask16 first_lanes(int64_t n) { return (__mmask16)((1u << n) - 1u); }
static inline vf v_load_n(const float *p, int64_t n) { return _mm512_maskz_loadu_ps(first_lanes(n), p); }
static inline void v_store_n(float *p, vf v, int64_t n) { _mm512_mask_storeu_ps(p, first_lanes(n), v); }
static inline vf v_add(vf x, vf y) { return _mm512_add_ps(x, y); }
static inline vf v_sub(vf x, vf y) { return _mm512_sub_ps(x, y); }
static inline vf v_mul(vf x, vf y) { return _mm512_mul_ps(x, y); }
static inline vf v_div(vf x, vf y) { return _mm512_div_ps(x, y); }
static inline vf v_sqrt(vf x) { return _mm512_sqrt_ps(x); }
static inline vf v_fma(vf x, vf y, vf z) { return _mm512_fmadd_ps(x, y, z); }
static inline vf v_max(vf x, vf y) { return _mm512_max_ps(x, y); }
static inline vf v_min(vf x, vf y) { return _mm512_min_ps(x, y); }
static inline vf v_rint(vf x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
static inline vf v_abs(vf x) { return _mm512_abs_ps(x); }
static inline vf v_if_gt(vf a, vf b, vf x, vf y) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_GT_OQ), y, x);
}
static inline vi v_to_int(vf x) { return (vi)_mm512_cvttps_epi32(x); }
static inline vf v_to_float(vi x) { return _mm512_cvtepi32_ps((__m512i)x); }
static inline vf v_pow2(vi n) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32((__m512i)n, _mm512_set1_epi32(127)), 23));
}
static inline float v_sum(vf v) {
    __m256 s8 = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
    __m128 s4 = _mm_add_ps(_mm256_castps256_ps128(s8), _mm256_extractf128_ps(s8, 1));
    __m128 s2 = _mm_add_ps(s4, _mm_movehl_ps(s4, s4));
    return _mm_cvtss_f32(_mm_add_ss(s2, _mm_movehdup_ps(s2)));
}
static inline float v_max_all(vf v) { return _mm512_reduce_max_ps(v); }

static inline vf v_load_i8(const int8_t *p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(const void *)p)));
}
static inline void v_store_i8(int8_t *p, vf v) {
    _mm_storeu_si128((__m128i *)(void *)p, _mm512_cvtepi32_epi8((__m512i)v_to_int(v)));
}
/* Pairs of rows, then pairs of pairs: four 4-word columns in each register; then 128-bit quarters, twice. */
BN_INLINE void v_transpose(vf r[16]) {
    vf pair[16], quad[16];
    BN_UNROLL
    for (int i = 0; i < 16; i += 2) {
        pair[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
        pair[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
    }
    BN_UNROLL
    for (int i = 0; i < 16; i += 4) {
        quad[i] = _mm512_shuffle_ps(pair[i], pair[i + 2], 0x44);
        quad[i + 1] = _mm512_shuffle_ps(pair[i], pair[i + 2], 0xEE);
        quad[i + 2] = _mm512_shuffle_ps(pair[i + 1], pair[i + 3], 0x44);
        quad[i + 3] = _mm512_shuffle_ps(pair[i + 1], pair[i + 3], 0xEE);
    }
    BN_UNROLL
    for (int i = 0; i < 4; i++) {
        vf low02 = _mm512_shuffle_f32x4(quad[i], quad[i + 4], 0x88);
        vf low13 = _mm512_shuffle_f32x4(quad[i], quad[i + 4], 0xDD);
        vf high02 = _mm512_shuffle_f32x4(quad[i + 8], quad[i + 12], 0x88);
        vf high13 = _mm512_shuffle_f32x4(quad[i + 8], quad[i + 12], 0xDD);
        r[i] = _mm512_shuffle_f32x4(low02, high02, 0x88);
        r[i + 8] = _mm512_shuffle_f32x4(low02, high02, 0xDD);
        r[i + 4] = _mm512_shuffle_f32x4(low13, high13, 0x88);
        r[i + 12] = _mm512_shuffle_f32x4(low13, high13, 0xDD);
    }
}

/* Adding 0x7fff and the kept half's last bit carries exactly where rounding to nearest even goes up. */
static inline vf v_round_bf16(vf x) {
    const __m512i bits = _mm512_castps_si512(x),
                  last = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i sum = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), last);
    const __m512i rounded = _mm512_and_si512(sum, _mm512_set1_epi32((int)0xffff0000));
    return _mm512_castsi512_ps(_mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), bits));
}

static inline vf v_load_bf16(const uint16_t *p) {
    const __m256i halves = _mm256_loadu_si256((const __m256i *)(const void *)p);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}
static inline vf v_low_bf16(vf x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(x), 16)); }
static inline vf v_high_bf16(vf x) {
    return _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32((int)0xffff0000)));
}
static inline void v_store_bf16(uint16_t *p, vf v, vi r) {
    const __m512i bits = _mm512_castps_si512(v), quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
    const __m512i sum = _mm512_add_epi32(bits, (__m512i)r);
    const __m512i kept = _mm512_mask_mov_epi32(sum, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), quiet);
    _mm256_storeu_si256((__m256i *)(void *)p, _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16)));
}
static inline vi w_set(int32_t x) { return (vi)_mm512_set1_epi32(x); }
static inline vi w_add(vi a, vi b) { return (vi)_mm512_add_epi32((__m512i)a, (__m512i)b); }
static inline vi w_mul(vi a, vi b) { return (vi)_mm512_mullo_epi32((__m512i)a, (__m512i)b); }
static inline vi w_low(vi a) { return (vi)_mm512_and_si512((__m512i)a, _mm512_set1_epi32(0xffff)); }
static inline vi w_high(vi a) { return (vi)_mm512_srli_epi32((__m512i)a, 16); }
static inline vi w_xorshift(vi a, int n) {
    return (vi)_mm512_xor_si512((__m512i)a, _mm512_srli_epi32((__m512i)a, (unsigned)n));
}

static inline vi w_load(const int32_t *p) { return (vi)_mm512_loadu_si512(p); }
static inline void w_store(int32_t *p, vi v) { _mm512_storeu_si512(p, (__m512i)v); }
static inline vi w_sub(vi x, int32_t y) { return (vi)_mm512_sub_epi32((__m512i)x, _mm512_set1_epi32(y)); }
static inline vi w_bits(vi a, int n, int mask) {
    const __m512i moved =
        n < 0 ? _mm512_slli_epi32((__m512i)a, (unsigned)-n) : _mm512_srli_epi32((__m512i)a, (unsigned)n);
    return (vi)_mm512_and_si512(moved, _mm512_set1_epi8((char)mask));
}
static inline vi w_dot(vi acc, vi codes, int32_t quad) {
    return (vi)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)codes, _mm512_set1_epi32(quad));
}
static inline vi w_dot_u8(vi acc, vi bytes, int32_t quad) { return w_dot(acc, bytes, quad); }

/* Codes 0..80 in base 3 to two bits a digit. */
#ifdef BN_WORDS_VBMI
static const uint8_t digits_in_bits[128] = {
    0,   1,   2,   4,   5,   6,   8,   9,   10,  16,  17,  18,  20,  21,  22,  24,  25,  26,  32,  33,  34,
    36,  37,  38,  40,  41,  42,  64,  65,  66,  68,  69,  70,  72,  73,  74,  80,  81,  82,  84,  85,  86,
    88,  89,  90,  96,  97,  98,  100, 101, 102, 104, 105, 106, 128, 129, 130, 132, 133, 134, 136, 137, 138,
    144, 145, 146, 148, 149, 150, 152, 153, 154, 160, 161, 162, 164, 165, 166, 168, 169, 170,
};
static inline __m512i bits_of_digits(__m512i digits) {
    return _mm512_permutex2var_epi8(_mm512_loadu_si512(digits_in_bits), digits,
                                    _mm512_loadu_si512(digits_in_bits + 64));
}
#else
/* As 9 high + low, each half by a table of nine: floor(x / 9) is floor(x * 7282 / 2^16) for x < 256. */
static inline __m512i bits_of_digits(__m512i digits) {
    const __m512i ninth = _mm512_set1_epi16(7282), upper = _mm512_set1_epi16((short)0xff00);
    const __m512i even = _mm512_mulhi_epu16(_mm512_andnot_si512(upper, digits), ninth);
    const __m512i odd = _mm512_mulhi_epu16(_mm512_and_si512(digits, upper), ninth);
    const __m512i high = _mm512_or_si512(even, _mm512_and_si512(odd, upper));
    const __m512i low = _mm512_sub_epi8(digits, _mm512_add_epi8(high, _mm512_slli_epi16(high, 3)));
    const __m512i pairs = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 2, 4, 5, 6, 8, 9, 10, 0, 0, 0, 0, 0, 0, 0));
    return _mm512_or_si512(_mm512_shuffle_epi8(pairs, low), _mm512_slli_epi16(_mm512_shuffle_epi8(pairs, high), 4));
}
#endif
/* Less 81 once and twice, without wrapping below zero: of unsigned bytes the least. */
static inline vi w_fives(vi bytes, vi *part) {
    const __m512i x = (__m512i)bytes, place = _mm512_set1_epi8(81);
    const __m512i once = _mm512_sub_epi8(x, place), twice = _mm512_sub_epi8(once, place);
    const __m512i digits = _mm512_min_epu8(x, _mm512_min_epu8(once, twice));
    *part = (vi)_mm512_sub_epi8(x, digits);
    return (vi)bits_of_digits(digits);
}
static inline vi w_shift(vi a, int n) { return (vi)_mm512_srai_epi32((__m512i)a, (unsigned)n); }

/* Thirty-two 512-bit registers: 24 sums, 3 of the right factor, the rest for addresses in flight. */
#define F32_ROWS 8
#define F32_VECTORS 3
#define DOT_ROWS 8
#define DOT_VECTORS 3
/* Panels of codes that one row is multiplied by at once: their fifteen sums and what is in flight fit the registers. */
#define FEW_ROWS_STREAMS 3

#endif
