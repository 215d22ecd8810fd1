/*
 * words_neon.h: the words of kernels.inc on four 128-bit registers each, but for w_dot, which the sets have each their
 * own way of; for every 64-bit ARM CPU.
 */
#ifndef BN_CPU_WORDS_NEON_H
#define BN_CPU_WORDS_NEON_H

#include <arm_neon.h>

typedef struct vf {
    float32x4_t q[4];
} vf;
typedef struct vi {
    int32x4_t q[4];
} vi;

#define EACH(type, op, x) ((type){{op((x).q[0]), op((x).q[1]), op((x).q[2]), op((x).q[3])}})
#define EACH2(op, x, y)                                                                                                \
    ((vf){{op((x).q[0], (y).q[0]), op((x).q[1], (y).q[1]), op((x).q[2], (y).q[2]), op((x).q[3], (y).q[3])}})

static inline vf v_set(float x) {
    const float32x4_t q = vdupq_n_f32(x);
    return (vf){{q, q, q, q}};
}
static inline vf v_zero(void) { return v_set(0.0f); }
static inline vf v_load(const float *p) {
    return (vf){{vld1q_f32(p), vld1q_f32(p + 4), vld1q_f32(p + 8), vld1q_f32(p + 12)}};
}
static inline vf v_keep(vf v) { return v; }
static inline void v_store(float *p, vf v) {
    vst1q_f32(p, v.q[0]);
    vst1q_f32(p + 4, v.q[1]);
    vst1q_f32(p + 8, v.q[2]);
    vst1q_f32(p + 12, v.q[3]);
}
static inline vf v_load_n(const float *p, int64_t n) {
    float lanes[16] = {0};
    memcpy(lanes, p, (size_t)n * sizeof(float));
    return v_load(lanes);
}
static inline void v_store_n(float *p, vf v, int64_t n) {
    float lanes[16];
    v_store(lanes, v);
    memcpy(p, lanes, (size_t)n * sizeof(float));
}
static inline vf v_add(vf x, vf y) { return EACH2(vaddq_f32, x, y); }
static inline vf v_sub(vf x, vf y) { return EACH2(vsubq_f32, x, y); }
static inline vf v_mul(vf x, vf y) { return EACH2(vmulq_f32, x, y); }
static inline vf v_div(vf x, vf y) { return EACH2(vdivq_f32, x, y); }
static inline vf v_sqrt(vf x) { return EACH(vf, vsqrtq_f32, x); }
static inline vf v_fma(vf x, vf y, vf z) {
    return (vf){{vfmaq_f32(z.q[0], x.q[0], y.q[0]), vfmaq_f32(z.q[1], x.q[1], y.q[1]),
                 vfmaq_f32(z.q[2], x.q[2], y.q[2]), vfmaq_f32(z.q[3], x.q[3], y.q[3])}};
}
/* vmaxq and vminq return a NaN from either side; the words return their second argument. */
static inline float32x4_t greater_4(float32x4_t x, float32x4_t y) { return vbslq_f32(vcgtq_f32(x, y), x, y); }
static inline float32x4_t lesser_4(float32x4_t x, float32x4_t y) { return vbslq_f32(vcltq_f32(x, y), x, y); }
static inline vf v_max(vf x, vf y) { return EACH2(greater_4, x, y); }
static inline vf v_min(vf x, vf y) { return EACH2(lesser_4, x, y); }
static inline vf v_rint(vf x) { return EACH(vf, vrndnq_f32, x); }
static inline vf v_abs(vf x) { return EACH(vf, vabsq_f32, x); }
static inline vf v_if_gt(vf a, vf b, vf x, vf y) {
    return (vf){
        {vbslq_f32(vcgtq_f32(a.q[0], b.q[0]), x.q[0], y.q[0]), vbslq_f32(vcgtq_f32(a.q[1], b.q[1]), x.q[1], y.q[1]),
         vbslq_f32(vcgtq_f32(a.q[2], b.q[2]), x.q[2], y.q[2]), vbslq_f32(vcgtq_f32(a.q[3], b.q[3]), x.q[3], y.q[3])}};
}
static inline vi v_to_int(vf x) { return EACH(vi, vcvtq_s32_f32, x); }
static inline vf v_to_float(vi x) { return EACH(vf, vcvtq_f32_s32, x); }
static inline float32x4_t pow2_4(int32x4_t n) {
    return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(n, vdupq_n_s32(127)), 23));
}
static inline vf v_pow2(vi n) { return EACH(vf, pow2_4, n); }
static inline float v_sum(vf v) {
    const float32x4_t s4 = vaddq_f32(vaddq_f32(v.q[0], v.q[2]), vaddq_f32(v.q[1], v.q[3]));
    const float32x2_t s2 = vadd_f32(vget_low_f32(s4), vget_high_f32(s4));
    return vget_lane_f32(s2, 0) + vget_lane_f32(s2, 1);
}
static inline float v_max_all(vf v) {
    return vmaxvq_f32(vmaxq_f32(vmaxq_f32(v.q[0], v.q[1]), vmaxq_f32(v.q[2], v.q[3])));
}

static inline vf v_load_i8(const int8_t *p) {
    const int8x16_t bytes = vld1q_s8(p);
    const int16x8_t low = vmovl_s8(vget_low_s8(bytes)), high = vmovl_high_s8(bytes);
    const vi words = {
        {vmovl_s16(vget_low_s16(low)), vmovl_high_s16(low), vmovl_s16(vget_low_s16(high)), vmovl_high_s16(high)}};
    return v_to_float(words);
}
static inline void v_store_i8(int8_t *p, vf v) {
    const vi words = v_to_int(v);
    const int16x8_t low = vmovn_high_s32(vmovn_s32(words.q[0]), words.q[1]);
    const int16x8_t high = vmovn_high_s32(vmovn_s32(words.q[2]), words.q[3]);
    vst1q_s8(p, vmovn_high_s16(vmovn_s16(low), high));
}
/* Rows x.q[at] .. w.q[at] of a 4 x 4 square become its columns. */
static inline void transpose_4(vf *x, vf *y, vf *z, vf *w, int at) {
    const float64x2_t even_low = vreinterpretq_f64_f32(vtrn1q_f32(x->q[at], y->q[at]));
    const float64x2_t odd_low = vreinterpretq_f64_f32(vtrn2q_f32(x->q[at], y->q[at]));
    const float64x2_t even_high = vreinterpretq_f64_f32(vtrn1q_f32(z->q[at], w->q[at]));
    const float64x2_t odd_high = vreinterpretq_f64_f32(vtrn2q_f32(z->q[at], w->q[at]));
    x->q[at] = vreinterpretq_f32_f64(vtrn1q_f64(even_low, even_high));
    y->q[at] = vreinterpretq_f32_f64(vtrn1q_f64(odd_low, odd_high));
    z->q[at] = vreinterpretq_f32_f64(vtrn2q_f64(even_low, even_high));
    w->q[at] = vreinterpretq_f32_f64(vtrn2q_f64(odd_low, odd_high));
}
static inline void v_transpose(vf r[16]) {
    BN_UNROLL
    for (int i = 0; i < 16; i += 4) {
        BN_UNROLL
        for (int j = 0; j < 4; j++) {
            transpose_4(&r[i], &r[i + 1], &r[i + 2], &r[i + 3], j);
        }
    }
    BN_UNROLL
    for (int i = 0; i < 16; i++) { /* the squares trade places across the diagonal */
        BN_UNROLL
        for (int j = 0; j < i / 4; j++) {
            const float32x4_t upper = r[4 * j + i % 4].q[i / 4];
            r[4 * j + i % 4].q[i / 4] = r[i].q[j];
            r[i].q[j] = upper;
        }
    }
}

/* Adding 0x7fff and the kept half's last bit carries exactly where rounding to nearest even goes up. */
static inline float32x4_t round_bf16(float32x4_t x) {
    const uint32x4_t bits = vreinterpretq_u32_f32(x), last = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint32x4_t sum = vaddq_u32(vaddq_u32(bits, vdupq_n_u32(0x7fff)), last);
    return vbslq_f32(vceqq_f32(x, x), vreinterpretq_f32_u32(vandq_u32(sum, vdupq_n_u32(0xffff0000u))), x);
}
static inline vf v_round_bf16(vf x) { return EACH(vf, round_bf16, x); }

static inline float32x4_t load_bf16_4(const uint16_t *p) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16)); }
static inline vf v_load_bf16(const uint16_t *p) {
    return (vf){{load_bf16_4(p), load_bf16_4(p + 4), load_bf16_4(p + 8), load_bf16_4(p + 12)}};
}
static inline float32x4_t low_bf16(float32x4_t x) {
    return vreinterpretq_f32_u32(vshlq_n_u32(vreinterpretq_u32_f32(x), 16));
}
static inline float32x4_t high_bf16(float32x4_t x) {
    return vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(x), vdupq_n_u32(0xffff0000u)));
}
static inline vf v_low_bf16(vf x) { return EACH(vf, low_bf16, x); }
static inline vf v_high_bf16(vf x) { return EACH(vf, high_bf16, x); }
static inline void v_store_bf16(uint16_t *p, vf v, vi r) {
    for (int i = 0; i < 4; i++) {
        const uint32x4_t bits = vreinterpretq_u32_f32(v.q[i]), quiet = vorrq_u32(bits, vdupq_n_u32(0x400000));
        const uint32x4_t sum = vaddq_u32(bits, vreinterpretq_u32_s32(r.q[i]));
        vst1_u16(p + 4 * i, vshrn_n_u32(vbslq_u32(vceqq_f32(v.q[i], v.q[i]), sum, quiet), 16));
    }
}
static inline int32x4_t w_bits_4(int32x4_t a, int n, int mask) {
    const uint8x16_t bytes = vshlq_u8(vreinterpretq_u8_s32(a), vdupq_n_s8((int8_t)-n));
    return vreinterpretq_s32_u8(vandq_u8(bytes, vdupq_n_u8((uint8_t)mask)));
}
static inline vi w_bits(vi a, int n, int mask) {
    return (vi){
        {w_bits_4(a.q[0], n, mask), w_bits_4(a.q[1], n, mask), w_bits_4(a.q[2], n, mask), w_bits_4(a.q[3], n, mask)}};
}

/* Digits 0..80 in base 3 to two bits each: 64 of them by one table, the others by a second. */
static const uint8_t digits_in_bits[96] = {
    0,   1,   2,   4,   5,   6,   8,   9,   10,  16,  17,  18,  20,  21,  22,  24,  25,  26,  32,  33,  34,
    36,  37,  38,  40,  41,  42,  64,  65,  66,  68,  69,  70,  72,  73,  74,  80,  81,  82,  84,  85,  86,
    88,  89,  90,  96,  97,  98,  100, 101, 102, 104, 105, 106, 128, 129, 130, 132, 133, 134, 136, 137, 138,
    144, 145, 146, 148, 149, 150, 152, 153, 154, 160, 161, 162, 164, 165, 166, 168, 169, 170,
};
static inline int32x4_t w_fives_4(int32x4_t bytes, int32x4_t *part) {
    const uint8x16_t x = vreinterpretq_u8_s32(bytes), place = vdupq_n_u8(81);
    const uint8x16_t once = vsubq_u8(x, place), twice = vsubq_u8(once, place);
    const uint8x16_t digits = vminq_u8(x, vminq_u8(once, twice));
    *part = vreinterpretq_s32_u8(vsubq_u8(x, digits));
    const uint8x16x4_t low = vld1q_u8_x4(digits_in_bits);
    const uint8x16x2_t high = vld1q_u8_x2(digits_in_bits + 64);
    const uint8x16_t first = vqtbl4q_u8(low, digits);
    return vreinterpretq_s32_u8(vqtbx2q_u8(first, high, vsubq_u8(digits, vdupq_n_u8(64))));
}
static inline vi w_fives(vi bytes, vi *part) {
    vi four;
    for (int i = 0; i < 4; i++) {
        four.q[i] = w_fives_4(bytes.q[i], &part->q[i]);
    }
    return four;
}
static inline vi w_shift(vi a, int n) {
    const int32x4_t down = vdupq_n_s32(-n);
    return (vi){{vshlq_s32(a.q[0], down), vshlq_s32(a.q[1], down), vshlq_s32(a.q[2], down), vshlq_s32(a.q[3], down)}};
}
static inline vi w_set(int32_t x) {
    const int32x4_t q = vdupq_n_s32(x);
    return (vi){{q, q, q, q}};
}
static inline vi w_add(vi x, vi y) {
    return (vi){
        {vaddq_s32(x.q[0], y.q[0]), vaddq_s32(x.q[1], y.q[1]), vaddq_s32(x.q[2], y.q[2]), vaddq_s32(x.q[3], y.q[3])}};
}
static inline vi w_mul(vi x, vi y) {
    return (vi){
        {vmulq_s32(x.q[0], y.q[0]), vmulq_s32(x.q[1], y.q[1]), vmulq_s32(x.q[2], y.q[2]), vmulq_s32(x.q[3], y.q[3])}};
}
static inline vi w_low(vi x) {
    const int32x4_t mask = vdupq_n_s32(0xffff);
    return (vi){{vandq_s32(x.q[0], mask), vandq_s32(x.q[1], mask), vandq_s32(x.q[2], mask), vandq_s32(x.q[3], mask)}};
}
static inline int32x4_t shift_right_4(int32x4_t x, int n) {
    return vreinterpretq_s32_u32(vshlq_u32(vreinterpretq_u32_s32(x), vdupq_n_s32(-n)));
}
static inline vi w_high(vi x) {
    return (vi){
        {shift_right_4(x.q[0], 16), shift_right_4(x.q[1], 16), shift_right_4(x.q[2], 16), shift_right_4(x.q[3], 16)}};
}
static inline vi w_xorshift(vi x, int n) {
    return (vi){{veorq_s32(x.q[0], shift_right_4(x.q[0], n)), veorq_s32(x.q[1], shift_right_4(x.q[1], n)),
                 veorq_s32(x.q[2], shift_right_4(x.q[2], n)), veorq_s32(x.q[3], shift_right_4(x.q[3], n))}};
}

static inline vi w_load(const int32_t *p) {
    return (vi){{vld1q_s32(p), vld1q_s32(p + 4), vld1q_s32(p + 8), vld1q_s32(p + 12)}};
}
static inline void w_store(int32_t *p, vi v) {
    vst1q_s32(p, v.q[0]);
    vst1q_s32(p + 4, v.q[1]);
    vst1q_s32(p + 8, v.q[2]);
    vst1q_s32(p + 12, v.q[3]);
}
static inline vi w_sub(vi x, int32_t y) {
    const int32x4_t q = vdupq_n_s32(y);
    return (vi){{vsubq_s32(x.q[0], q), vsubq_s32(x.q[1], q), vsubq_s32(x.q[2], q), vsubq_s32(x.q[3], q)}};
}

/* Thirty-two 128-bit registers: 16 sums, 4 of the right factor, the rest for the left one and addresses in flight. */
#define F32_ROWS 4
#define F32_VECTORS 1

#endif
