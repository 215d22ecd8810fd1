/*
 * isa_scalar.c: the words in plain C. The reference for every other instruction set, and what runs where none of them
 * is present. fmaf is a library call on a CPU without FMA; correct, and slow.
 */
#include "cpu/target.h"

#include <math.h>
#include <stdint.h>
#include <string.h>

/* A word is a loop of sixteen here: loops of words that are unrolled besides take minutes to compile. */
#undef BN_UNROLL
#if defined(__clang__)
#define BN_UNROLL _Pragma("nounroll")
#else
#define BN_UNROLL _Pragma("GCC unroll 1")
#endif

typedef struct vf {
    float lane[16];
} vf;
typedef struct vi {
    int32_t lane[16];
} vi;

/* One lane-wise word: `expr` in terms of i. */
#define EACH_LANE(result, expr)                                                                                        \
    result r;                                                                                                          \
    for (int i = 0; i < 16; i++) {                                                                                     \
        r.lane[i] = (expr);                                                                                            \
    }                                                                                                                  \
    return r

static inline vf v_set(float x) { EACH_LANE(vf, x); }
static inline vf v_zero(void) { return v_set(0.0f); }
static inline vf v_load(const float *p) { EACH_LANE(vf, p[i]); }
static inline vf v_load_n(const float *p, int64_t n) { EACH_LANE(vf, i < n ? p[i] : 0.0f); }
static inline vf v_keep(vf v) { return v; }
static inline void v_store(float *p, vf v) { memcpy(p, v.lane, sizeof v.lane); }
static inline void v_store_n(float *p, vf v, int64_t n) { memcpy(p, v.lane, (size_t)n * sizeof(float)); }
static inline vf v_add(vf a, vf b) { EACH_LANE(vf, a.lane[i] + b.lane[i]); }
static inline vf v_sub(vf a, vf b) { EACH_LANE(vf, a.lane[i] - b.lane[i]); }
static inline vf v_mul(vf a, vf b) { EACH_LANE(vf, a.lane[i] * b.lane[i]); }
static inline vf v_div(vf a, vf b) { EACH_LANE(vf, a.lane[i] / b.lane[i]); }
static inline vf v_sqrt(vf a) { EACH_LANE(vf, sqrtf(a.lane[i])); }
static inline vf v_fma(vf a, vf b, vf c) { EACH_LANE(vf, fmaf(a.lane[i], b.lane[i], c.lane[i])); }
static inline vf v_max(vf a, vf b) { EACH_LANE(vf, a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]); }
static inline vf v_min(vf a, vf b) { EACH_LANE(vf, a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i]); }
static inline vf v_rint(vf a) { EACH_LANE(vf, rintf(a.lane[i])); }
static inline vf v_abs(vf a) { EACH_LANE(vf, fabsf(a.lane[i])); }
static inline vf v_if_gt(vf a, vf b, vf x, vf y) { EACH_LANE(vf, a.lane[i] > b.lane[i] ? x.lane[i] : y.lane[i]); }
static inline vi v_to_int(vf a) { EACH_LANE(vi, (int32_t)a.lane[i]); }
static inline vf v_to_float(vi a) { EACH_LANE(vf, (float)a.lane[i]); }
static inline vf v_pow2(vi n) {
    vf r;
    for (int i = 0; i < 16; i++) {
        uint32_t bits = (uint32_t)(n.lane[i] + 127) << 23;
        memcpy(&r.lane[i], &bits, sizeof bits);
    }
    return r;
}
static inline float v_sum(vf v) {
    for (int half = 8; half > 0; half /= 2) {
        for (int i = 0; i < half; i++) {
            v.lane[i] += v.lane[i + half];
        }
    }
    return v.lane[0];
}
static inline float v_max_all(vf v) {
    float m = v.lane[0];
    for (int i = 1; i < 16; i++) {
        m = v.lane[i] > m ? v.lane[i] : m;
    }
    return m;
}

static inline vf v_load_i8(const int8_t *p) { EACH_LANE(vf, (float)p[i]); }
static inline void v_store_i8(int8_t *p, vf v) {
    for (int i = 0; i < 16; i++) {
        p[i] = (int8_t)v.lane[i];
    }
}
static inline void v_transpose(vf r[16]) {
    for (int i = 0; i < 16; i++) {
        for (int j = 0; j < i; j++) {
            float upper = r[j].lane[i];
            r[j].lane[i] = r[i].lane[j];
            r[i].lane[j] = upper;
        }
    }
}

/* Adding 0x7fff and the kept half's last bit carries exactly where rounding to nearest even goes up. */
static inline vf v_round_bf16(vf x) {
    for (int i = 0; i < 16; i++) {
        uint32_t bits;
        memcpy(&bits, &x.lane[i], sizeof bits);
        bits = (bits + 0x7fffu + (bits >> 16 & 1u)) & 0xffff0000u;
        if (x.lane[i] == x.lane[i]) {
            memcpy(&x.lane[i], &bits, sizeof bits);
        }
    }
    return x;
}
static inline vf v_load_bf16(const uint16_t *p) {
    vf r;
    for (int i = 0; i < 16; i++) {
        const uint32_t bits = (uint32_t)p[i] << 16;
        memcpy(&r.lane[i], &bits, sizeof bits);
    }
    return r;
}
static inline vf bits_kept(vf v, int shift, uint32_t kept) {
    for (int i = 0; i < 16; i++) {
        uint32_t bits;
        memcpy(&bits, &v.lane[i], sizeof bits);
        bits = bits << shift & kept;
        memcpy(&v.lane[i], &bits, sizeof bits);
    }
    return v;
}
static inline vf v_low_bf16(vf v) { return bits_kept(v, 16, 0xffffffffu); }
static inline vf v_high_bf16(vf v) { return bits_kept(v, 0, 0xffff0000u); }
static inline void v_store_bf16(uint16_t *p, vf v, vi r) {
    for (int i = 0; i < 16; i++) {
        uint32_t bits;
        memcpy(&bits, &v.lane[i], sizeof bits);
        const uint32_t kept = (bits & 0x7fffffffu) > 0x7f800000u ? bits | 0x400000u : bits + (uint32_t)r.lane[i];
        p[i] = (uint16_t)(kept >> 16);
    }
}
static inline vi w_set(int32_t x) { EACH_LANE(vi, x); }
static inline vi w_add(vi a, vi b) { EACH_LANE(vi, (int32_t)((uint32_t)a.lane[i] + (uint32_t)b.lane[i])); }
static inline vi w_mul(vi a, vi b) { EACH_LANE(vi, (int32_t)((uint32_t)a.lane[i] * (uint32_t)b.lane[i])); }
static inline vi w_low(vi a) { EACH_LANE(vi, a.lane[i] & 0xffff); }
static inline vi w_high(vi a) { EACH_LANE(vi, (int32_t)((uint32_t)a.lane[i] >> 16)); }
static inline vi w_xorshift(vi a, int n) { EACH_LANE(vi, (int32_t)((uint32_t)a.lane[i] ^ ((uint32_t)a.lane[i] >> n))); }

static inline vi w_load(const int32_t *p) { EACH_LANE(vi, p[i]); }
static inline void w_store(int32_t *p, vi v) { memcpy(p, v.lane, sizeof v.lane); }
static inline vi w_sub(vi a, int32_t x) { EACH_LANE(vi, a.lane[i] - x); }
static inline vi w_bits(vi a, int n, int mask) {
    const uint32_t kept = 0x01010101u * (uint32_t)mask;
    EACH_LANE(vi, (int32_t)((n < 0 ? (uint32_t)a.lane[i] << -n : (uint32_t)a.lane[i] >> n) & kept));
}
static inline vi w_fives(vi bytes, vi *part) {
    uint8_t x[64], last[64];
    vi four;
    memcpy(x, bytes.lane, sizeof x);
    for (int i = 0; i < 64; i++) {
        last[i] = (uint8_t)(x[i] / 81 * 81);
        x[i] = (uint8_t)(x[i] % 3 | x[i] / 3 % 3 << 2 | x[i] / 9 % 3 << 4 | x[i] / 27 % 3 << 6);
    }
    memcpy(four.lane, x, sizeof x);
    memcpy(part->lane, last, sizeof last);
    return four;
}
static inline vi w_shift(vi a, int n) { EACH_LANE(vi, a.lane[i] >> n); }
static inline vi w_dot(vi acc, vi codes, int32_t quad) {
    int8_t q[4];
    memcpy(q, &quad, sizeof q);
    for (int i = 0; i < 16; i++) {
        for (int j = 0; j < 4; j++) {
            acc.lane[i] += (int32_t)(((uint32_t)codes.lane[i] >> 8 * j) & 255) * q[j];
        }
    }
    return acc;
}
static inline vi w_dot_u8(vi acc, vi bytes, int32_t quad) { return w_dot(acc, bytes, quad); }

#define F32_ROWS 4
#define F32_VECTORS 1
#define DOT_ROWS 4
#define DOT_VECTORS 1
#define FEW_ROWS_STREAMS 1
#define BN_ISA scalar
#define BN_ISA_NAME "scalar"
#include "cpu/kernels.inc"
