/*
 * test_base.c: the rooms under the kernels: math64, rng, arena, parallel, cpu_features, interrupt.
 *
 *     cc -std=c11 -O2 -ffp-contract=off -I csrc tests/c/test_base.c csrc/base/[a-z]*.c -pthread -lm && ./a.out
 *
 * Exits non-zero after printing every check that failed. Takes half a second. Meant to run under
 * -fsanitize=address,undefined or thread as well.
 */
#define _GNU_SOURCE
#include <math.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/arena.h"
#include "base/cpu_features.h"
#include "base/interrupt.h"
#include "base/math64.h"
#include "base/parallel.h"
#include "base/rng.h"

/* TSan and qemu-user do not survive threads in the child of a threaded process; the latter is told by NO_FORK. */
#if defined(__SANITIZE_THREAD__)
enum { fork_is_unsafe = 1 };
#elif defined(__has_feature)
enum { fork_is_unsafe = __has_feature(thread_sanitizer) };
#else
enum { fork_is_unsafe = 0 };
#endif

static _Atomic int failures;

__attribute__((format(printf, 3, 4))) static void check(bool ok, int line, const char *format, ...) {
    if (!ok) {
        va_list list;
        va_start(list, format);
        fprintf(stderr, "test_base.c:%d: ", line);
        vfprintf(stderr, format, list);
        fputc('\n', stderr);
        va_end(list);
        atomic_fetch_add(&failures, 1);
    }
}
#define CHECK(ok, ...) check(ok, __LINE__, __VA_ARGS__)
#define CHECK_OK(call) CHECK((call) == BN_OK, "%s: %s", #call, bn_error_message())

/* ---- math64 ---- */

typedef struct function {
    const char *name;
    double (*ours)(double);
    long double (*theirs)(long double);
    double low, high, ulps; /* sampled range; the bound stated in math64.h */
    bool geometric;         /* sample the exponent, not the value */
} function;

static const function functions[] = {
    {"exp", bn_exp64, expl, -708.0, 709.7, 0.9, false},     {"exp near 0", bn_exp64, expl, -1.0, 1.0, 0.9, false},
    {"log", bn_log64, logl, 1e-300, 1e300, 0.9, true},      {"log near 1", bn_log64, logl, 0.5, 2.0, 0.9, false},
    {"sin", bn_sin64, sinl, -1048576, 1048576, 0.8, false}, {"sin near 0", bn_sin64, sinl, -7.0, 7.0, 0.8, false},
    {"cos", bn_cos64, cosl, -1048576, 1048576, 0.8, false}, {"cos near 0", bn_cos64, cosl, -7.0, 7.0, 0.8, false},
};

/* The i-th argument, the same on every machine. */
static double sample(const function *f, uint64_t i) {
    double u = (double)(bn_rng_u64(1, 0, i) >> 11) * 0x1p-53;
    if (f->geometric) {
        return bn_exp64(bn_log64(f->low) + u * (bn_log64(f->high) - bn_log64(f->low)));
    }
    return f->low + u * (f->high - f->low);
}

static double ulps(double got, long double exact) {
    double near = fabs((double)exact);
    return (double)(fabsl((long double)got - exact) / (long double)(nextafter(near, INFINITY) - near));
}

static void test_math64(void) {
    const uint64_t n = 20000;
    for (size_t k = 0; k < sizeof functions / sizeof *functions; k++) {
        const function *f = &functions[k];
        double worst = 0.0, at = 0.0;
        for (uint64_t i = 0; i < n; i++) {
            double x = sample(f, i), error = ulps(f->ours(x), f->theirs((long double)x));
            if (!(error <= worst)) {
                worst = error;
                at = x;
            }
        }
        if (getenv("VERBOSE")) {
            printf("%-10s %.3f ulp\n", f->name, worst);
        }
        CHECK(worst <= f->ulps, "%s(%a) is off by %.3f ulp", f->name, at, worst);
    }
    /* Doubles next to multiples of pi/2 lose the most in the reduction. */
    for (int i = 1; i < 660000; i += 331) {
        double x = (double)i * 1.57079632679489661923;
        CHECK(ulps(bn_sin64(x), sinl((long double)x)) <= 0.8, "sin(%a)", x);
        CHECK(ulps(bn_cos64(x), cosl((long double)x)) <= 0.8, "cos(%a)", x);
    }
    for (double y = -30.0; y <= 30.0; y += 0.37) {
        for (double x = 1e-4; x < 1e6; x *= 3.7) {
            double exact = (double)powl((long double)x, (long double)y);
            CHECK(fabs(bn_pow64(x, y) / exact - 1.0) <= 1e-13, "pow(%g, %g)", x, y);
        }
    }
    CHECK(bn_exp64(0.0) == 1.0 && bn_exp64(-INFINITY) == 0.0 && bn_exp64(INFINITY) == INFINITY,
          "exp at 0 and infinities");
    CHECK(bn_exp64(709.79) == INFINITY && bn_exp64(-746.0) == 0.0, "exp out of range");
    CHECK(bn_exp64(-745.0) == 0x1p-1074 && bn_exp64(-720.0) == exp(-720.0), "exp at subnormal results");
    CHECK(bn_log64(1.0) == 0.0 && bn_log64(0.0) == -INFINITY && bn_log64(INFINITY) == INFINITY,
          "log at 0, 1, infinity");
    CHECK(isnan(bn_log64(-1.0)) && isnan(bn_log64(NAN)) && isnan(bn_exp64(NAN)), "log(-1), log(NaN), exp(NaN)");
    CHECK(ulps(bn_log64(0x1.8p-1070), logl(0x1.8p-1070L)) <= 0.9, "log of a subnormal");
    CHECK(bn_sin64(0.0) == 0.0 && bn_cos64(0.0) == 1.0, "sin(0), cos(0)");
    CHECK(isnan(bn_sin64(INFINITY)) && isnan(bn_cos64(NAN)) && isnan(bn_sin64(2e6)), "sin, cos outside their range");
    CHECK(bn_pow64(7.0, 0.0) == 1.0 && bn_pow64(0.0, 2.0) == 0.0 && isnan(bn_pow64(-2.0, 2.0)), "pow at its edges");
}

/* ---- rng ---- */

static void test_philox(void) {
    static const struct {
        uint32_t counter[4], key[2], out[4];
    } known[] = {
        /* Random123's tests/kat_vectors, philox4x32 with 10 rounds */
        {{0, 0, 0, 0}, {0, 0}, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
        {{0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff},
         {0xffffffff, 0xffffffff},
         {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}},
        {{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344},
         {0xa4093822, 0x299f31d0},
         {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}},
    };
    for (size_t i = 0; i < sizeof known / sizeof *known; i++) {
        uint32_t out[4];
        bn_philox4x32(known[i].counter, known[i].key, out);
        CHECK(memcmp(out, known[i].out, sizeof out) == 0, "philox known answer %zu: %08x %08x %08x %08x", i, out[0],
              out[1], out[2], out[3]);
    }
}

enum { NORMALS = 200003 };

static void test_fill(void) {
    float *x = malloc((NORMALS + 1) * sizeof *x), *y = malloc((NORMALS + 1) * sizeof *y);
    bn_set_threads(1);
    CHECK_OK(bn_rng_fill_normal(x, NORMALS, 42, 7, 0.0f, 1.0f));
    bn_set_threads(5);
    CHECK_OK(bn_rng_fill_normal(y, NORMALS, 42, 7, 0.0f, 1.0f));
    CHECK(memcmp(x, y, NORMALS * sizeof *x) == 0, "normals depend on the thread count");
    double moment[5] = {0};
    for (int i = 0; i < NORMALS; i++) {
        for (int k = 1; k <= 4; k++) {
            moment[k] += pow((double)x[i], k) / NORMALS;
        }
        if (i % 997 < 5) {
            CHECK(x[i] == bn_rng_normal(42, 7, (uint64_t)i), "normal %d differs from the filled one", i);
        }
    }
    /* Five standard errors: 1, sqrt 2, sqrt 15, sqrt 96 over sqrt n. */
    CHECK(fabs(moment[1]) < 0.012 && fabs(moment[2] - 1) < 0.016 && fabs(moment[3]) < 0.044 &&
              fabs(moment[4] - 3) < 0.11,
          "moments of normals: %g %g %g %g", moment[1], moment[2], moment[3], moment[4]);

    for (int n = 0; n < 10; n++) {
        for (int i = 0; i < 11; i++) {
            y[i] = 99.0f;
        }
        CHECK_OK(bn_rng_fill_uniform(y, n, 42, 8, -2.0f, 3.0f));
        for (int i = 0; i < n; i++) {
            CHECK(y[i] == (float)(-2.0 + 5.0 * (double)bn_rng_uniform(42, 8, (uint64_t)i)), "uniform %d of %d", i, n);
        }
        CHECK(y[n] == 99.0f, "fill of %d wrote past its end", n);
    }
    double mean = 0.0;
    for (uint64_t i = 0; i < 100000; i++) {
        float u = bn_rng_uniform(3, 0, i);
        CHECK(u >= 0.0f && u < 1.0f, "uniform %g outside [0, 1)", (double)u);
        mean += (double)u / 100000;
    }
    CHECK(fabs(mean - 0.5) < 0.005, "mean of uniforms: %g", mean);
    CHECK(bn_rng_u64(1, 2, 3) != bn_rng_u64(1, 3, 3) && bn_rng_u64(1, 2, 3) != bn_rng_u64(2, 2, 3) &&
              bn_rng_u64(1, 2, 3) != bn_rng_u64(1, 2, 2) &&
              bn_rng_u64(1, 2, 3) != bn_rng_u64(1, 2, 3 + (UINT64_C(1) << 40)),
          "seed, stream and index must all count");
    free(x);
    free(y);
}

/* The promise of math64.h and rng.h: one hash for gcc, clang, x86 and aarch64. */
static void test_equal_bits(void) {
    uint64_t hash = UINT64_C(0xcbf29ce484222325); /* FNV-1a */
    for (uint64_t i = 0; i < 20000; i++) {
        double u = (double)(bn_rng_u64(2, 0, i) >> 11) * 0x1p-53;
        double value[] = {
            bn_exp64(1400.0 * u - 700.0),  bn_log64(u), bn_sin64(1e6 * u), bn_cos64(1e6 * u), bn_pow64(500000.0, -u),
            (double)bn_rng_normal(5, 6, i)};
        for (size_t k = 0; k < sizeof value; k++) {
            hash = (hash ^ ((const unsigned char *)value)[k]) * UINT64_C(0x100000001b3);
        }
    }
    CHECK(hash == UINT64_C(0x1a741aa7ebb87c0f), "math64 and rng give other bits on this machine: hash %016llx",
          (unsigned long long)hash);
}

/* ---- arena ---- */

/* A step of training in small: forward allocates, backward releases in reverse and allocates gradients between. */
static size_t step(bn_arena *arena, int layers) {
    void *saved[64][2];
    for (int i = 0; i < layers; i++) {
        CHECK_OK(bn_arena_allocate(arena, 40000 + (size_t)i, &saved[i][0]));
        CHECK_OK(bn_arena_allocate(arena, (size_t)3 << 20, &saved[i][1]));
    }
    for (int i = layers - 1; i >= 0; i--) {
        void *gradient;
        CHECK_OK(bn_arena_allocate(arena, (size_t)5 << 19, &gradient));
        bn_arena_release(arena, saved[i][1], (size_t)3 << 20);
        bn_arena_release(arena, saved[i][0], 40000 + (size_t)i);
        bn_arena_release(arena, gradient, (size_t)5 << 19);
    }
    return bn_arena_get_stats(arena).system_calls;
}

static void test_arena(void) {
    bn_arena arena = BN_ARENA_INIT;
    size_t before = 0;
    for (size_t bytes = 0; bytes < (size_t)9 << 20; bytes += bytes / 13 + 1) {
        unsigned char *p = NULL;
        CHECK_OK(bn_arena_allocate(&arena, bytes, (void **)&p));
        CHECK((uintptr_t)p % BN_ALIGN == 0, "%zu bytes at %p", bytes, (void *)p);
        memset(p, 0xab, bytes);
        size_t held = bn_arena_get_stats(&arena).in_use;
        CHECK(held >= bytes && held <= bytes + bytes / 8 + 64, "%zu bytes take %zu", bytes, held);
        bn_arena_release(&arena, p, bytes);
        CHECK(bn_arena_get_stats(&arena).in_use == 0, "%zu bytes not given back", bytes);
        before = bytes;
    }
    CHECK(bn_arena_get_stats(&arena).high_water >= before, "high water");
    bn_arena_trim(&arena);
    CHECK(bn_arena_get_stats(&arena).cached == 0, "trim leaves blocks");

    void *a = NULL, *b = NULL;
    CHECK_OK(bn_arena_allocate(&arena, 0, &a));
    CHECK_OK(bn_arena_allocate(&arena, 0, &b));
    CHECK(a && b && a != b, "two empty blocks are one");
    bn_arena_release(&arena, a, 0);
    bn_arena_release(&arena, b, 0);
    bn_arena_release(&arena, NULL, 5);

    size_t first = step(&arena, 12);
    for (int i = 0; i < 3; i++) {
        CHECK(step(&arena, 12) == first, "a repeated step takes memory from the system");
    }
    CHECK(bn_arena_allocate(&arena, SIZE_MAX, &a) == BN_ERR_MEMORY &&
              strstr(bn_error_message(), "18446744073709551615"),
          "an impossible request: %s", bn_error_message());
    bn_arena_trim(&arena);
    bn_arena_stats stats = bn_arena_get_stats(&arena);
    CHECK(stats.in_use == 0 && stats.cached == 0, "in use %zu, cached %zu at the end", stats.in_use, stats.cached);
}

/* The promise behind replay: whatever the sequence of calls, running it again asks the system for nothing. */
static void test_arena_repeats(void) {
    for (uint64_t sequence = 0; sequence < 100; sequence++) {
        bn_arena arena = BN_ARENA_INIT;
        size_t calls[3];
        for (int run = 0; run < 3; run++) {
            void *held[32] = {0};
            size_t size[32] = {0};
            for (uint64_t i = 0; i < 300; i++) {
                uint64_t r = bn_rng_u64(sequence, 1, i), k = r % 32;
                if (held[k]) {
                    bn_arena_release(&arena, held[k], size[k]);
                    held[k] = NULL;
                } else {
                    size[k] = (size_t)1 << (r >> 8) % 23;
                    size[k] += (size_t)(r >> 16) % size[k];
                    CHECK_OK(bn_arena_allocate(&arena, size[k], &held[k]));
                }
            }
            for (int k = 0; k < 32; k++) {
                bn_arena_release(&arena, held[k], size[k]);
            }
            calls[run] = bn_arena_get_stats(&arena).system_calls;
        }
        CHECK(calls[0] > 0 && calls[1] == calls[0] && calls[2] == calls[0], "system calls of three runs: %zu %zu %zu",
              calls[0], calls[1], calls[2]);
        bn_arena_trim(&arena);
    }
}

/* What a plan rests on: a virtual arena counts, call for call, what a real one does. */
static void test_arena_virtual(void) {
    bn_arena arenas[2] = {BN_ARENA_INIT, BN_VIRTUAL_ARENA_INIT};
    void *held[2][32] = {{0}};
    size_t size[32] = {0};
    for (uint64_t i = 0; i < 1000; i++) {
        const uint64_t r = bn_rng_u64(7, 1, i), k = r % 32;
        if (!held[0][k]) {
            size[k] = (size_t)1 << (r >> 8) % 21;
            size[k] += (size_t)(r >> 16) % size[k];
        }
        for (int a = 0; a < 2; a++) {
            if (held[a][k]) {
                bn_arena_release(&arenas[a], held[a][k], size[k]);
                held[a][k] = NULL;
            } else {
                CHECK_OK(bn_arena_allocate(&arenas[a], size[k], &held[a][k]));
            }
        }
        if (i == 500) {
            bn_arena_trim(&arenas[0]);
            bn_arena_trim(&arenas[1]);
        }
        if (i == 700) {
            bn_arena_restart_peak(&arenas[0]);
            bn_arena_restart_peak(&arenas[1]);
        }
        const bn_arena_stats real = bn_arena_get_stats(&arenas[0]), counted = bn_arena_get_stats(&arenas[1]);
        CHECK(memcmp(&real, &counted, sizeof real) == 0, "call %d: in use %zu and %zu, cached %zu and %zu", (int)i,
              real.in_use, counted.in_use, real.cached, counted.cached);
    }
    for (int k = 0; k < 32; k++) {
        CHECK(!held[1][k] || (uintptr_t)held[1][k] >> 52 != 0, "an address that may have a page: %p", held[1][k]);
        CHECK(!held[1][k] || (uintptr_t)held[1][k] % BN_ALIGN == 0, "a block at %p", held[1][k]);
        bn_arena_release(&arenas[0], held[0][k], size[k]);
    }
    bn_arena_trim(&arenas[0]);
    void *block;
    CHECK(bn_arena_allocate(&arenas[1], (size_t)1 << 53, &block) == BN_ERR_MEMORY, "more than there are addresses");
}

static bn_arena shared_arena = BN_ARENA_INIT;

static void *hammer(void *seed) {
    unsigned char *held[16] = {0};
    size_t size[16] = {0};
    for (uint64_t i = 0; i < 4000; i++) {
        uint64_t r = bn_rng_u64((uint64_t)(uintptr_t)seed, 0, i);
        int k = (int)(r & 15);
        if (held[k]) {
            CHECK(held[k][0] == (unsigned char)k && held[k][size[k] - 1] == (unsigned char)k,
                  "two threads share a block");
            bn_arena_release(&shared_arena, held[k], size[k]);
            held[k] = NULL;
        } else {
            size[k] = 1 + (r >> 8) % 5000;
            CHECK_OK(bn_arena_allocate(&shared_arena, size[k], (void **)&held[k]));
            memset(held[k], k, size[k]);
        }
    }
    for (int k = 0; k < 16; k++) {
        bn_arena_release(&shared_arena, held[k], size[k]);
    }
    return NULL;
}

/* Runs f on `count` threads at once, each given its number from 1. */
static void on_threads(int count, void *(*f)(void *)) {
    pthread_t thread[8];
    for (int i = 0; i < count; i++) {
        CHECK(pthread_create(&thread[i], NULL, f, (void *)(uintptr_t)(i + 1)) == 0, "pthread_create");
    }
    for (int i = 0; i < count; i++) {
        pthread_join(thread[i], NULL);
    }
}

static void test_arena_threads(void) {
    on_threads(4, hammer);
    CHECK(bn_arena_get_stats(&shared_arena).in_use == 0, "blocks lost between threads");
    bn_arena_trim(&shared_arena);
}

/* ---- parallel ---- */

enum { UNITS = 5000 };

typedef struct visits {
    int count[UNITS];
    int64_t smallest_piece;
} visits;

/* Counts each unit with plain increments: two threads given one unit is a data race, which TSan reports. */
static void visit(void *ctx, int64_t begin, int64_t end, void *scratch) {
    visits *v = ctx;
    memset(scratch, (int)begin, 4096);
    CHECK((uintptr_t)scratch % BN_ALIGN == 0, "scratch is not aligned");
    for (int64_t i = begin; i < end; i++) {
        v->count[i]++;
    }
    const unsigned char *bytes = scratch;
    CHECK(bytes[0] == (unsigned char)begin && bytes[4095] == (unsigned char)begin, "two pieces share a scratch");
    bytes += BN_SCRATCH_BYTES - 1;
    *(volatile unsigned char *)(uintptr_t)bytes = 1; /* the last byte is there */
}

static void check_visits(int64_t begin, int64_t end, int64_t grain) {
    visits *v = calloc(1, sizeof *v);
    CHECK_OK(bn_parallel_for(begin, end, grain, visit, v));
    for (int64_t i = 0; i < UNITS; i++) {
        CHECK(v->count[i] == (i >= begin && i < end), "unit %lld of [%lld, %lld) ran %d times", (long long)i,
              (long long)begin, (long long)end, v->count[i]);
    }
    free(v);
}

/* Each unit runs an inner loop while it holds a mark in its own scratch. */
static void nest(void *ctx, int64_t begin, int64_t end, void *scratch) {
    _Atomic int64_t *total = ctx;
    memset(scratch, 0x5a, 4096);
    for (int64_t i = begin; i < end; i++) {
        visits *v = calloc(1, sizeof *v);
        CHECK_OK(bn_parallel_for(0, 100, 1, visit, v));
        for (int k = 0; k < 100; k++) {
            atomic_fetch_add(total, v->count[k]);
        }
        free(v);
    }
    CHECK(((unsigned char *)scratch)[4095] == 0x5a, "a nested call was given its caller's scratch");
}

static void *many_calls(void *unused) {
    (void)unused;
    for (int i = 0; i < 200; i++) {
        check_visits(i, UNITS - i, 1 + i % 7 * 100);
    }
    return NULL;
}

static void *change_threads(void *number) {
    for (int i = 0; i < 20; i++) {
        check_visits(0, UNITS, 10);
        bn_set_threads(1 + (int)((uintptr_t)number + (uintptr_t)i) % 4);
    }
    return NULL;
}

static void test_parallel(void) {
    const int counts[] = {1, 2, 5, BN_MAX_THREADS};
    for (size_t t = 0; t < sizeof counts / sizeof *counts; t++) {
        bn_set_threads(counts[t]);
        CHECK(bn_get_threads() == counts[t], "%d threads instead of %d", bn_get_threads(), counts[t]);
        check_visits(0, 0, 1);
        check_visits(7, 3, 1);
        check_visits(0, 1, 0);
        check_visits(100, 101, 1);
        check_visits(0, 64, 64);
        check_visits(0, 65, 64);
        check_visits(17, UNITS, 1);
        check_visits(0, UNITS, 999);
        for (int i = 0; i < 50; i++) {
            check_visits(0, 40 + i, 1);
        }
    }
    bn_set_threads(5);
    _Atomic int64_t total = 0;
    CHECK_OK(bn_parallel_for(0, 50, 1, nest, &total));
    CHECK(total == 5000, "nested calls ran %lld of 5000 units", (long long)total);
    on_threads(3, many_calls);
    usleep(2000); /* let the workers fall asleep, then wake them */
    check_visits(0, UNITS, 1);
    on_threads(3, change_threads);
    bn_set_threads(1000);
    CHECK(bn_get_threads() == BN_MAX_THREADS, "1000 threads allowed");
    bn_set_threads(0);
    CHECK(bn_get_threads() >= 1 && bn_get_threads() <= BN_MAX_THREADS, "default of %d threads", bn_get_threads());
}

/* ---- in a child: what is read once, or must survive fork ---- */

static bool child_succeeds(void (*body)(void)) {
    pid_t pid = fork();
    if (pid == 0) {
        alarm(20); /* a deadlock is a failure */
        failures = 0;
        body();
        _exit(failures != 0);
    }
    int status = 0;
    return pid > 0 && waitpid(pid, &status, 0) == pid && WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

static void pool_in_child(void) {
    many_calls(NULL);
    bn_set_threads(3);
    many_calls(NULL);
}

static void disabled_features(void) {
    setenv("BITNET_DISABLE_CPU_FEATURES", "avx2,,i8mm,no_such_feature,fma", 1);
    CHECK(!(bn_cpu_features() & (BN_CPU_BIT(AVX2) | BN_CPU_BIT(FMA) | BN_CPU_BIT(I8MM))), "disabled features stay on");
}

static void test_cpu_features(void) {
    CHECK(child_succeeds(disabled_features), "BITNET_DISABLE_CPU_FEATURES");
    const uint32_t features = bn_cpu_features();
    for (int i = 0; i < BN_CPU_FEATURE_COUNT; i++) {
        if (features >> i & 1 && getenv("VERBOSE")) {
            printf("%s\n", bn_cpu_feature_names[i]);
        }
    }
#if defined(__x86_64__)
    CHECK(!(features & BN_CPU_BIT(NEON)), "neon on x86");
    CHECK(!!(features & BN_CPU_BIT(AVX2)) == !!__builtin_cpu_supports("avx2"), "avx2 against the compiler's opinion");
    CHECK(!!(features & BN_CPU_BIT(FMA)) == !!__builtin_cpu_supports("fma"), "fma against the compiler's opinion");
    CHECK(!!(features & BN_CPU_BIT(AVX512VNNI)) == !!__builtin_cpu_supports("avx512vnni"),
          "avx512vnni against the compiler's opinion");
#elif defined(__aarch64__)
    CHECK(features & BN_CPU_BIT(NEON), "no neon on aarch64");
#endif
}

/* ---- interrupt ---- */

static bn_status stop_now(void) { return bn_fail(BN_ERR_INTERRUPTED, "stopped"); }

static void test_interrupt(void) {
    CHECK_OK(bn_check_interrupt());
    bn_set_interrupt_check(stop_now);
    CHECK(bn_check_interrupt() == BN_ERR_INTERRUPTED, "the check is not asked");
    bn_set_interrupt_check(NULL);
    CHECK_OK(bn_check_interrupt());
}

int main(void) {
    unsetenv("BITNET_DISABLE_CPU_FEATURES");
    test_cpu_features();
    test_interrupt();
    test_math64();
    test_philox();
    test_fill();
    test_equal_bits();
    test_arena();
    test_arena_repeats();
    test_arena_virtual();
    test_arena_threads();
    test_parallel();
    if (!fork_is_unsafe && !getenv("NO_FORK")) {
        bn_set_threads(4);
        check_visits(0, UNITS, 1);
        CHECK(child_succeeds(pool_in_child), "the pool in a forked child");
        check_visits(0, UNITS, 1);
    }
    bn_set_threads(1);
    printf("test_base: %s\n", failures ? "FAILED" : "ok");
    return failures != 0;
}
