/*
 * peak.c: one loop per kind of multiply-add and per instruction that does it: sum[i] = sum[i] + a * b for so many
 * independent sums that the latency of one (4 to 6 cycles on vectors, 52 on AMX tiles) hides behind the others.
 * An empty asm that claims to change a and b before every step keeps the compiler from doing a product once for all;
 * every byte of a and b is 0x3f, which is 0.75 as f32 or bf16 and 63 as int8: no zeros, no subnormals, no overflow to
 * infinity.
 *
 * Every thread of the pool runs the loop at the same time: they meet at a barrier, run until the same moment, and their
 * work is divided by the time from the first start to the last end.
 */
#include "cpu/peak.h"

#include <stdatomic.h>
#include <string.h>
#include "base/clock.h"
#include "base/cpu_features.h"
#include "base/parallel.h"
#include "cpu/target.h"

#define BYTE 0x3f

/* LOOP(name, target, vector type, asm constraint, number of sums, expression of sum, a and b) */
#define LOOP(fn, features, vector, constraint, sums, step)                                                             \
    features static void fn(int64_t repeats) {                                                                         \
        vector a, b, sum[sums];                                                                                        \
        memset(&a, BYTE, sizeof a);                                                                                    \
        memset(&b, BYTE, sizeof b);                                                                                    \
        memset(sum, 0, sizeof sum);                                                                                    \
        for (; repeats > 0; repeats--) {                                                                               \
            BN_UNROLL                                                                                                  \
            for (int i = 0; i < (sums); i++) {                                                                         \
                __asm__ volatile("" : "+" constraint(a), "+" constraint(b));                                           \
                sum[i] = step(sum[i], a, b);                                                                           \
            }                                                                                                          \
        }                                                                                                              \
        BN_UNROLL                                                                                                      \
        for (int i = 0; i < (sums); i++) {                                                                             \
            __asm__ volatile("" ::constraint(sum[i]));                                                                 \
        }                                                                                                              \
    }

#if defined(__x86_64__)
#include <immintrin.h>
#define TARGET(features) __attribute__((target(features)))

#define FMA8(s, a, b) _mm256_fmadd_ps(a, b, s)
#define FMA16(s, a, b) _mm512_fmadd_ps(a, b, s)
#define BF16(s, a, b) _mm512_dpbf16_ps(s, (__m512bh)(a), (__m512bh)(b))
#define PAIRS(s, a, b) (words8) _mm256_add_epi16((__m256i)(s), _mm256_maddubs_epi16((__m256i)(a), (__m256i)(b)))
#define QUADS8(s, a, b) (words8) _mm256_dpbusd_avx_epi32((__m256i)(s), (__m256i)(a), (__m256i)(b))
#define QUADS16(s, a, b) (words16) _mm512_dpbusd_epi32((__m512i)(s), (__m512i)(a), (__m512i)(b))
/* Not __m256i and __m512i, which are 64-bit lanes: gcc 12 spills sums that change type at every dot. */
typedef int32_t words8 __attribute__((vector_size(32)));
typedef int32_t words16 __attribute__((vector_size(64)));

LOOP(avx2_f32, TARGET("avx2,fma"), __m256, "x", 12, FMA8)
LOOP(avx512_f32, TARGET("avx512f"), __m512, "v", 16, FMA16)
LOOP(avx512_bf16, TARGET("avx512f,avx512bw,avx512vl,avx512bf16"), __m512, "v", 16, BF16)
LOOP(avx2_int8, TARGET("avx2"), words8, "x", 12, PAIRS)
LOOP(avx_vnni, TARGET("avx2,avxvnni"), words8, "x", 12, QUADS8)
LOOP(avx512_vnni, TARGET("avx512f,avx512vnni"), words16, "v", 16, QUADS16)

/* Palette 1, eight tiles of 16 rows of 64 bytes: u16 bytes a row from byte 16 on, u8 rows from byte 48 on. Constant,
 * because gcc 12 takes _tile_loadconfig for a reader of 8 bytes and drops stores to the rest. */
static const struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} tile_shapes = {1, 0, {0}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

/* Four sums of 16 x 16 from two tiles of a and two of b, as a product would use the eight tiles. */
#define TILE_LOOP(fn, features, step)                                                                                  \
    TARGET(features) static void fn(int64_t repeats) {                                                                 \
        uint8_t bytes[16 * 64];                                                                                        \
        memset(bytes, BYTE, sizeof bytes);                                                                             \
        __asm__ volatile("" ::"r"(bytes) : "memory"); /* the loads below do not say what they read */                  \
        _tile_loadconfig(&tile_shapes);                                                                                \
        _tile_zero(0);                                                                                                 \
        _tile_zero(1);                                                                                                 \
        _tile_zero(2);                                                                                                 \
        _tile_zero(3);                                                                                                 \
        _tile_loadd(4, bytes, 64);                                                                                     \
        _tile_loadd(5, bytes, 64);                                                                                     \
        _tile_loadd(6, bytes, 64);                                                                                     \
        _tile_loadd(7, bytes, 64);                                                                                     \
        for (; repeats > 0; repeats--) {                                                                               \
            step(0, 4, 6);                                                                                             \
            step(1, 4, 7);                                                                                             \
            step(2, 5, 6);                                                                                             \
            step(3, 5, 7);                                                                                             \
        }                                                                                                              \
        _tile_release();                                                                                               \
    }
TILE_LOOP(amx_bf16, "amx-tile,amx-bf16", _tile_dpbf16ps)
TILE_LOOP(amx_int8, "amx-tile,amx-int8", _tile_dpbsud)

#elif defined(__aarch64__)
#include <arm_neon.h>
#define TARGET(features) __attribute__((target(features)))

#define FMA4(s, a, b) vfmaq_f32(s, a, b)
LOOP(neon_f32, , float32x4_t, "w", 16, FMA4)
/* One type for sums and factors keeps LOOP simple: the low half of a and b is what smlal reads. */
#define LOW_PAIRS(s, a, b) vmlal_s8(s, vget_low_s8(vreinterpretq_s8_s16(a)), vget_low_s8(vreinterpretq_s8_s16(b)))
LOOP(neon_int8, , int16x8_t, "w", 16, LOW_PAIRS)

/* clang before 16 declares these intrinsics only under a command-line flag. */
#if !defined(__clang__) || __clang_major__ >= 16
#define BN_PEAK_ARM_EXTENSIONS
#define DOT(s, a, b) vdotq_s32(s, vreinterpretq_s8_s32(a), vreinterpretq_s8_s32(b))
#define MATRIX_S8(s, a, b) vmmlaq_s32(s, vreinterpretq_s8_s32(a), vreinterpretq_s8_s32(b))
#define MATRIX_BF16(s, a, b) vbfmmlaq_f32(s, vreinterpretq_bf16_f32(a), vreinterpretq_bf16_f32(b))
LOOP(neon_dot, TARGET("arch=armv8.2-a+dotprod"), int32x4_t, "w", 16, DOT)
LOOP(neon_i8mm, TARGET("arch=armv8.2-a+i8mm"), int32x4_t, "w", 16, MATRIX_S8)
LOOP(neon_bf16, TARGET("arch=armv8.2-a+bf16"), float32x4_t, "w", 16, MATRIX_BF16)
#endif

#endif

#if !defined(__aarch64__)
/* What any compiler makes of four lanes; s * a + b cannot be computed ahead, and goes to 3. */
static void plain_f32(int64_t repeats) {
    typedef float four __attribute__((vector_size(16)));
    volatile float unknown = 0.75f;
    const float x = unknown;
    const four a = {x, x, x, x}, b = a;
    four sum[8] = {{0}};
    for (; repeats > 0; repeats--) {
        BN_UNROLL
        for (int i = 0; i < 8; i++) {
            sum[i] = sum[i] * a + b;
        }
    }
    __asm__ volatile("" ::"m"(sum));
}
#endif

/* Fastest first within a kind; the first whose needs are met is taken. */
static const struct loop {
    bn_peak_kind kind;
    const char *name;
    void (*run)(int64_t repeats);
    int macs; /* of one repeat */
    uint32_t needs;
} loops[] = {
#define NEEDS(id) BN_CPU_BIT(id)
#if defined(__x86_64__)
    {BN_PEAK_INT8, "amx-int8", amx_int8, 4 * 16 * 16 * 64, NEEDS(AMX_INT8)},
    {BN_PEAK_INT8, "avx512-vnni", avx512_vnni, 16 * 64, NEEDS(AVX512F) | NEEDS(AVX512VNNI)},
    {BN_PEAK_INT8, "avx-vnni", avx_vnni, 12 * 32, NEEDS(AVX2) | NEEDS(AVXVNNI)},
    {BN_PEAK_INT8, "avx2", avx2_int8, 12 * 32, NEEDS(AVX2)},
    {BN_PEAK_BF16, "amx-bf16", amx_bf16, 4 * 16 * 16 * 32, NEEDS(AMX_BF16)},
    {BN_PEAK_BF16, "avx512-bf16", avx512_bf16, 16 * 32,
     NEEDS(AVX512F) | NEEDS(AVX512BW) | NEEDS(AVX512VL) | NEEDS(AVX512BF16)},
    {BN_PEAK_F32, "avx512", avx512_f32, 16 * 16, NEEDS(AVX512F)},
    {BN_PEAK_F32, "avx2", avx2_f32, 12 * 8, NEEDS(AVX2) | NEEDS(FMA)},
#elif defined(__aarch64__)
#ifdef BN_PEAK_ARM_EXTENSIONS
    {BN_PEAK_INT8, "neon-i8mm", neon_i8mm, 16 * 32, NEEDS(I8MM)},
    {BN_PEAK_INT8, "neon-dot", neon_dot, 16 * 16, NEEDS(DOTPROD)},
    {BN_PEAK_BF16, "neon-bf16", neon_bf16, 16 * 16, NEEDS(BF16)},
#endif
    {BN_PEAK_INT8, "neon", neon_int8, 16 * 8, 0},
    {BN_PEAK_F32, "neon", neon_f32, 16 * 4, 0},
#endif
#if !defined(__aarch64__)
    {BN_PEAK_F32, "plain", plain_f32, 8 * 4, 0},
#endif
};

/* NULL if the CPU has nothing of its own for this kind. */
static const struct loop *fastest(bn_peak_kind kind) {
    for (size_t i = 0; i < sizeof loops / sizeof *loops; i++) {
        if (loops[i].kind == kind && (loops[i].needs & ~bn_cpu_features()) == 0) {
            return &loops[i];
        }
    }
    return NULL;
}

/* The first round also raises the clock and wakes the threads; a round of a millisecond is short enough for some to
 * pass between two interruptions by other programs. */
#define ROUNDS 10
#define MEETING_SECONDS 2e-3 /* forty times what a sleeping thread needs to wake; a pool in use never meets */
#define REPEATS 2048         /* 5 to 40 microseconds between two looks at the clock */

typedef struct round {
    const struct loop *loop;
    double seconds;
    int threads;
    atomic_int arrived;
    double start[BN_MAX_THREADS], end[BN_MAX_THREADS];
    int64_t macs[BN_MAX_THREADS];
} round;

static void run_unit(round *r, int unit) {
    const double waiting = bn_seconds();
    atomic_fetch_add(&r->arrived, 1);
    while (atomic_load(&r->arrived) < r->threads && bn_seconds() - waiting < MEETING_SECONDS) {
    }
    const double start = bn_seconds();
    double end = start;
    int64_t done = 0;
    while (end - start < r->seconds) {
        r->loop->run(REPEATS);
        done += REPEATS;
        end = bn_seconds();
    }
    r->start[unit] = start;
    r->end[unit] = end;
    r->macs[unit] = done * r->loop->macs;
}

static void run_units(void *ctx, int64_t begin, int64_t end, void *scratch) {
    (void)scratch;
    for (int64_t unit = begin; unit < end; unit++) {
        run_unit(ctx, (int)unit);
    }
}

/* Makes *best the peak of this loop if that is higher. */
static bn_status measure(const struct loop *loop, double seconds, bn_peak *best) {
    for (int i = 0; i < ROUNDS; i++) {
        round r = {.loop = loop, .seconds = seconds / ROUNDS, .threads = bn_get_threads()};
        BN_TRY(bn_parallel_for(0, r.threads, 1, run_units, &r));
        double start = r.start[0], end = r.end[0], macs = 0.0;
        for (int unit = 0; unit < r.threads; unit++) {
            start = r.start[unit] < start ? r.start[unit] : start;
            end = r.end[unit] > end ? r.end[unit] : end;
            macs += (double)r.macs[unit];
        }
        const double rate = macs / (end - start);
        if (rate > best->macs_per_second) {
            *best = (bn_peak){rate, loop->name};
        }
    }
    return BN_OK;
}

bn_status bn_cpu_peak(bn_peak_kind kind, double seconds, bn_peak *out) {
    const struct loop *own = fastest(kind), *f32 = fastest(BN_PEAK_F32);
    *out = (bn_peak){0.0, NULL};
    if (own && own != f32) {
        BN_TRY(measure(own, seconds, out));
    }
    return measure(f32, own == f32 || !own ? seconds : seconds / 4, out);
}
