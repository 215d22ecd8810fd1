/*
 * words_avx2.h: the words of kernels.inc on pairs of 256-bit registers, but for w_dot, which the sets have each their
 * own way of; included inside a compiler target that has at least AVX2 and FMA.
 */
#ifndef BN_CPU_WORDS_AVX2_H
#define BN_CPU_WORDS_AVX2_H

typedef struct vf {
    __m256 a, b;
} vf;
/* Not __m256i, which is four 64-bit lanes: gcc 12 copies and spills sums that change type at every dot. */
typedef int32_t w8 __attribute__((vector_size(32)));
typedef struct vi {
    w8 a, b;
} vi;

#define BOTH(op, x) ((vf){op((x).a), op((x).b)})
#define BOTH2(op, x, y) ((vf){op((x).a, (y).a), op((x).b, (y).b)})

static inline vf v_set(float x) { return (vf){_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
static inline vf v_zero(void) { return (vf){_mm256_setzero_ps(), _mm256_setzero_ps()}; }
static inline vf v_load(const float *p) { return (vf){_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
/* gcc 12 folds a load into each multiply-add that uses it: 14 loads instead of 8 for the 12 of a register tile. */
static inline vf v_keep(vf v) {
    __asm__("" : "+x"(v.a), "+x"(v.b));
    return v;
}
static inline void v_store(float *p, vf v) {
    _mm256_storeu_ps(p, v.a);
    _mm256_storeu_ps(p + 8, v.b);
}
/* Lane i of the mask has its top bit set when i < n - first. */
static inline __m256i first_lanes(int64_t n, int first) {
    __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_cmpgt_epi32(_mm256_set1_epi32((int)n - first), lane);
}
static inline vf v_load_n(const float *p, int64_t n) {
    return (vf){_mm256_maskload_ps(p, first_lanes(n, 0)), _mm256_maskload_ps(p + 8, first_lanes(n, 8))};
}
static inline void v_store_n(float *p, vf v, int64_t n) {
    _mm256_maskstore_ps(p, first_lanes(n, 0), v.a);
    _mm256_maskstore_ps(p + 8, first_lanes(n, 8), v.b);
}
static inline vf v_add(vf x, vf y) { return BOTH2(_mm256_add_ps, x, y); }
static inline vf v_sub(vf x, vf y) { return BOTH2(_mm256_sub_ps, x, y); }
static inline vf v_mul(vf x, vf y) { return BOTH2(_mm256_mul_ps, x, y); }
static inline vf v_div(vf x, vf y) { return BOTH2(_mm256_div_ps, x, y); }
static inline vf v_sqrt(vf x) { return BOTH(_mm256_sqrt_ps, x); }
static inline vf v_fma(vf x, vf y, vf z) {
    return (vf){_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
static inline vf v_max(vf x, vf y) { return BOTH2(_mm256_max_ps, x, y); }
static inline vf v_min(vf x, vf y) { return BOTH2(_mm256_min_ps, x, y); }
#define RINT(x) _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)
static inline vf v_rint(vf x) { return BOTH(RINT, x); }
#undef RINT
static inline vf v_abs(vf x) {
    __m256 sign = _mm256_set1_ps(-0.0f);
    return (vf){_mm256_andnot_ps(sign, x.a), _mm256_andnot_ps(sign, x.b)};
}
static inline vf v_if_gt(vf a, vf b, vf x, vf y) {
    return (vf){_mm256_blendv_ps(y.a, x.a, _mm256_cmp_ps(a.a, b.a, _CMP_GT_OQ)),
                _mm256_blendv_ps(y.b, x.b, _mm256_cmp_ps(a.b, b.b, _CMP_GT_OQ))};
}
static inline vi v_to_int(vf x) { return (vi){(w8)_mm256_cvttps_epi32(x.a), (w8)_mm256_cvttps_epi32(x.b)}; }
static inline vf v_to_float(vi x) { return (vf){_mm256_cvtepi32_ps((__m256i)x.a), _mm256_cvtepi32_ps((__m256i)x.b)}; }
static inline __m256 pow2_8(w8 n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32((__m256i)n, _mm256_set1_epi32(127)), 23));
}
static inline vf v_pow2(vi n) { return (vf){pow2_8(n.a), pow2_8(n.b)}; }
static inline float v_sum(vf v) {
    __m256 s8 = _mm256_add_ps(v.a, v.b);
    __m128 s4 = _mm_add_ps(_mm256_castps256_ps128(s8), _mm256_extractf128_ps(s8, 1));
    __m128 s2 = _mm_add_ps(s4, _mm_movehl_ps(s4, s4));
    return _mm_cvtss_f32(_mm_add_ss(s2, _mm_movehdup_ps(s2)));
}
static inline float v_max_all(vf v) {
    __m256 m8 = _mm256_max_ps(v.a, v.b);
    __m128 m4 = _mm_max_ps(_mm256_castps256_ps128(m8), _mm256_extractf128_ps(m8, 1));
    __m128 m2 = _mm_max_ps(m4, _mm_movehl_ps(m4, m4));
    return _mm_cvtss_f32(_mm_max_ss(m2, _mm_movehdup_ps(m2)));
}

static inline vf v_load_i8(const int8_t *p) {
    __m128i bytes = _mm_loadu_si128((const __m128i *)(const void *)p);
    return (vf){_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)),
                _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8)))};
}
static inline void v_store_i8(int8_t *p, vf v) {
    vi w = v_to_int(v);
    /* packs works within 128-bit halves: the permute brings a's quads before b's. */
    __m256i half = _mm256_permute4x64_epi64(_mm256_packs_epi32((__m256i)w.a, (__m256i)w.b), 0xD8);
    _mm_storeu_si128((__m128i *)(void *)p,
                     _mm_packs_epi16(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1)));
}
/* Pairs of rows, then pairs of pairs, then 128-bit halves. */
static inline void transpose_8x8(__m256 r[8]) {
    __m256 pair[8], quad[8];
    BN_UNROLL
    for (int i = 0; i < 8; i += 2) {
        pair[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
        pair[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
    BN_UNROLL
    for (int i = 0; i < 8; i += 4) {
        quad[i] = _mm256_shuffle_ps(pair[i], pair[i + 2], 0x44);
        quad[i + 1] = _mm256_shuffle_ps(pair[i], pair[i + 2], 0xEE);
        quad[i + 2] = _mm256_shuffle_ps(pair[i + 1], pair[i + 3], 0x44);
        quad[i + 3] = _mm256_shuffle_ps(pair[i + 1], pair[i + 3], 0xEE);
    }
    BN_UNROLL
    for (int i = 0; i < 4; i++) {
        r[i] = _mm256_permute2f128_ps(quad[i], quad[i + 4], 0x20);
        r[i + 4] = _mm256_permute2f128_ps(quad[i], quad[i + 4], 0x31);
    }
}
/* Four 8 x 8 blocks, the off-diagonal ones exchanged; one at a time, for they are all the registers there are. */
static inline void v_transpose(vf r[16]) {
    __m256 upper[8], lower[8];
    BN_UNROLL
    for (int i = 0; i < 8; i++) {
        upper[i] = r[i].b;
    }
    transpose_8x8(upper);
    BN_UNROLL
    for (int i = 0; i < 8; i++) {
        lower[i] = r[i + 8].a;
        r[i + 8].a = upper[i];
    }
    transpose_8x8(lower);
    BN_UNROLL
    for (int i = 0; i < 8; i++) {
        r[i].b = lower[i];
        upper[i] = r[i].a;
    }
    transpose_8x8(upper);
    BN_UNROLL
    for (int i = 0; i < 8; i++) {
        r[i].a = upper[i];
        lower[i] = r[i + 8].b;
    }
    transpose_8x8(lower);
    BN_UNROLL
    for (int i = 0; i < 8; i++) {
        r[i + 8].b = lower[i];
    }
}

/* Adding 0x7fff and the kept half's last bit carries exactly where rounding to nearest even goes up. */
static inline __m256 round_bf16(__m256 x) {
    const __m256i bits = _mm256_castps_si256(x),
                  last = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i sum = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), last);
    const __m256i rounded = _mm256_and_si256(sum, _mm256_set1_epi32((int)0xffff0000));
    return _mm256_blendv_ps(_mm256_castsi256_ps(rounded), x, _mm256_cmp_ps(x, x, _CMP_UNORD_Q));
}
static inline vf v_round_bf16(vf x) { return BOTH(round_bf16, x); }

static inline __m256 load_bf16_8(const uint16_t *p) {
    const __m128i halves = _mm_loadu_si128((const __m128i *)(const void *)p);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}
static inline vf v_load_bf16(const uint16_t *p) { return (vf){load_bf16_8(p), load_bf16_8(p + 8)}; }
static inline __m256 low_bf16(__m256 x) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(x), 16)); }
static inline __m256 high_bf16(__m256 x) {
    return _mm256_castsi256_ps(_mm256_and_si256(_mm256_castps_si256(x), _mm256_set1_epi32((int)0xffff0000)));
}
static inline vf v_low_bf16(vf x) { return BOTH(low_bf16, x); }
static inline vf v_high_bf16(vf x) { return BOTH(high_bf16, x); }
static inline __m256i add_to_bf16_8(__m256 v, w8 r) {
    const __m256i bits = _mm256_castps_si256(v), quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    return _mm256_srli_epi32(_mm256_blendv_epi8(_mm256_add_epi32(bits, (__m256i)r), quiet, nan), 16);
}
static inline void v_store_bf16(uint16_t *p, vf v, vi r) {
    /* packus works within 128-bit halves: the permute brings a's quads before b's. */
    const __m256i packed = _mm256_packus_epi32(add_to_bf16_8(v.a, r.a), add_to_bf16_8(v.b, r.b));
    _mm256_storeu_si256((__m256i *)(void *)p, _mm256_permute4x64_epi64(packed, 0xD8));
}
#define WORDS2(op, x, y) ((vi){(w8)op((__m256i)(x).a, (__m256i)(y).a), (w8)op((__m256i)(x).b, (__m256i)(y).b)})
#define SHIFT(x, n) ((vi){(w8)_mm256_srli_epi32((__m256i)(x).a, n), (w8)_mm256_srli_epi32((__m256i)(x).b, n)})
static inline w8 w_bits_8(w8 a, int n, int mask) {
    const __m256i moved = n < 0 ? _mm256_slli_epi32((__m256i)a, -n) : _mm256_srli_epi32((__m256i)a, n);
    return (w8)_mm256_and_si256(moved, _mm256_set1_epi8((char)mask));
}
static inline vi w_bits(vi a, int n, int mask) { return (vi){w_bits_8(a.a, n, mask), w_bits_8(a.b, n, mask)}; }

/* The first four digits as 9 high + low, each half by a table of nine: floor(x / 9) is floor(x * 7282 / 2^16) for
 * x < 256. */
static inline w8 w_fives_8(w8 bytes, w8 *part) {
    const __m256i x = (__m256i)bytes, place = _mm256_set1_epi8(81);
    const __m256i once = _mm256_sub_epi8(x, place), twice = _mm256_sub_epi8(once, place);
    const __m256i digits = _mm256_min_epu8(x, _mm256_min_epu8(once, twice));
    *part = (w8)_mm256_sub_epi8(x, digits);
    const __m256i ninth = _mm256_set1_epi16(7282), upper = _mm256_set1_epi16((short)0xff00);
    const __m256i even = _mm256_mulhi_epu16(_mm256_andnot_si256(upper, digits), ninth);
    const __m256i odd = _mm256_mulhi_epu16(_mm256_and_si256(digits, upper), ninth);
    const __m256i high = _mm256_or_si256(even, _mm256_and_si256(odd, upper));
    const __m256i low = _mm256_sub_epi8(digits, _mm256_add_epi8(high, _mm256_slli_epi16(high, 3)));
    const __m256i pairs = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 2, 4, 5, 6, 8, 9, 10, 0, 0, 0, 0, 0, 0, 0));
    return (w8)_mm256_or_si256(_mm256_shuffle_epi8(pairs, low), _mm256_slli_epi16(_mm256_shuffle_epi8(pairs, high), 4));
}
static inline vi w_fives(vi bytes, vi *part) {
    vi four;
    four.a = w_fives_8(bytes.a, &part->a);
    four.b = w_fives_8(bytes.b, &part->b);
    return four;
}
static inline vi w_shift(vi a, int n) {
    return (vi){(w8)_mm256_srai_epi32((__m256i)a.a, n), (w8)_mm256_srai_epi32((__m256i)a.b, n)};
}
static inline vi w_set(int32_t x) { return (vi){(w8)_mm256_set1_epi32(x), (w8)_mm256_set1_epi32(x)}; }
static inline vi w_add(vi x, vi y) { return WORDS2(_mm256_add_epi32, x, y); }
static inline vi w_mul(vi x, vi y) { return WORDS2(_mm256_mullo_epi32, x, y); }
static inline vi w_low(vi x) { return (vi){x.a & 0xffff, x.b & 0xffff}; }
static inline vi w_high(vi x) { return SHIFT(x, 16); }
static inline vi w_xorshift(vi x, int n) {
    const vi high = SHIFT(x, n);
    return (vi){x.a ^ high.a, x.b ^ high.b};
}
#undef SHIFT

static inline vi w_load(const int32_t *p) {
    return (vi){(w8)_mm256_loadu_si256((const __m256i *)(const void *)p),
                (w8)_mm256_loadu_si256((const __m256i *)(const void *)(p + 8))};
}
static inline void w_store(int32_t *p, vi v) {
    _mm256_storeu_si256((__m256i *)(void *)p, (__m256i)v.a);
    _mm256_storeu_si256((__m256i *)(void *)(p + 8), (__m256i)v.b);
}
static inline vi w_sub(vi x, int32_t y) { return (vi){x.a - y, x.b - y}; }

/* Sixteen 256-bit registers: 12 sums, 2 of the left factor, 1 of the right one. */
#define F32_ROWS 2
#define F32_VECTORS 3

#endif
