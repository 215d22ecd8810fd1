/*
 * cpu_features.c: cpuid (Intel SDM vol. 2A, leaves 1 and 7) on x86, hwcap or sysctl on aarch64.
 *
 * A vector register is usable only if the operating system saves it on a context switch, which xgetbv tells: without
 * that, an AVX-512 chip under an old kernel faults. Linux wants AMX tiles asked for as well, once per process and for
 * all its threads: the AMX bits are reported only where it grants them.
 */
#define _GNU_SOURCE /* syscall, cache sizes */
#include "base/cpu_features.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#if defined(__x86_64__)
#include <cpuid.h>
#ifdef __linux__
#include <sys/syscall.h>
#endif
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif
#if defined(__APPLE__)
#include <sys/sysctl.h>
#endif

#define BN_CPU_NAME(id, name) name,
const char *const bn_cpu_feature_names[BN_CPU_FEATURE_COUNT] = {BN_CPU_FEATURES(BN_CPU_NAME)};
#undef BN_CPU_NAME

static uint32_t features;
static pthread_once_t once = PTHREAD_ONCE_INIT;

#if defined(__x86_64__)
/* XCR0: which register files the operating system saves. */
static uint32_t saved_state(void) {
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return low;
}

/* Whether the kernel lets this process use tiles. Without the request the first tile instruction is a SIGILL; a kernel
 * before 5.16 knows no request and grants none. Documentation/arch/x86/xstate.rst. */
static bool tiles_granted(void) {
#ifdef __linux__
    const long req_xcomp_perm = 0x1023, tile_data = 18; /* ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA */
    return syscall(SYS_arch_prctl, req_xcomp_perm, tile_data) == 0;
#else
    return false;
#endif
}

static uint32_t detect(void) {
    uint32_t a, b1, c1, d1, b7, c7, d7, a71 = 0, unused;
    if (!__get_cpuid(1, &a, &b1, &c1, &d1) || !(c1 >> 27 & 1) || !__get_cpuid_count(7, 0, &a, &b7, &c7, &d7)) {
        return 0; /* bit 27: xgetbv exists */
    }
    if (a >= 1) {
        __get_cpuid_count(7, 1, &a71, &unused, &unused, &unused);
    }
    const uint32_t saved = saved_state();
    const bool ymm = (saved & 0x6) == 0x6, zmm = (saved & 0xe6) == 0xe6, tile = (saved & 0x60000) == 0x60000;
    const struct {
        uint32_t feature, present;
    } found[] = {
        {BN_CPU_BIT(FMA), ymm && c1 >> 12 & 1},
        {BN_CPU_BIT(AVX2), ymm && b7 >> 5 & 1},
        {BN_CPU_BIT(AVXVNNI), ymm && a71 >> 4 & 1},
        {BN_CPU_BIT(AVX512F), zmm && b7 >> 16 & 1},
        {BN_CPU_BIT(AVX512BW), zmm && b7 >> 30 & 1},
        {BN_CPU_BIT(AVX512DQ), zmm && b7 >> 17 & 1},
        {BN_CPU_BIT(AVX512VL), zmm && b7 >> 31 & 1},
        {BN_CPU_BIT(AVX512VNNI), zmm && c7 >> 11 & 1},
        {BN_CPU_BIT(AVX512VBMI), zmm && c7 >> 1 & 1},
        {BN_CPU_BIT(AVX512BF16), zmm && a71 >> 5 & 1},
        {BN_CPU_BIT(AMX_INT8), tile && (d7 >> 24 & d7 >> 25 & 1)},
        {BN_CPU_BIT(AMX_BF16), tile && (d7 >> 24 & d7 >> 22 & 1)},
    };
    uint32_t all = 0;
    for (size_t i = 0; i < sizeof found / sizeof *found; i++) {
        all |= found[i].present ? found[i].feature : 0;
    }
    return all;
}
#elif defined(__aarch64__) && defined(__linux__)
static uint32_t detect(void) {
    const bool dotprod = getauxval(AT_HWCAP) >> 20 & 1; /* HWCAP_ASIMDDP */
    const bool i8mm = getauxval(AT_HWCAP2) >> 13 & 1;   /* HWCAP2_I8MM */
    const bool bf16 = getauxval(AT_HWCAP2) >> 14 & 1;   /* HWCAP2_BF16 */
    return BN_CPU_BIT(NEON) | (dotprod ? BN_CPU_BIT(DOTPROD) : 0) | (i8mm ? BN_CPU_BIT(I8MM) : 0) |
           (bf16 ? BN_CPU_BIT(BF16) : 0);
}
#elif defined(__aarch64__) && defined(__APPLE__)
static bool has(const char *name) {
    int value = 0;
    size_t size = sizeof value;
    return sysctlbyname(name, &value, &size, NULL, 0) == 0 && value != 0;
}

static uint32_t detect(void) {
    return BN_CPU_BIT(NEON) | (has("hw.optional.arm.FEAT_DotProd") ? BN_CPU_BIT(DOTPROD) : 0) |
           (has("hw.optional.arm.FEAT_I8MM") ? BN_CPU_BIT(I8MM) : 0) |
           (has("hw.optional.arm.FEAT_BF16") ? BN_CPU_BIT(BF16) : 0);
}
#elif defined(__aarch64__)
static uint32_t detect(void) { return BN_CPU_BIT(NEON); }
#else
static uint32_t detect(void) { return 0; }
#endif

/* The bits of a comma-separated list; names of other machines' features are not an error. */
static uint32_t named(const char *list) {
    uint32_t all = 0;
    while (*list) {
        size_t length = strcspn(list, ",");
        for (int f = 0; f < BN_CPU_FEATURE_COUNT; f++) {
            if (strlen(bn_cpu_feature_names[f]) == length && memcmp(list, bn_cpu_feature_names[f], length) == 0) {
                all |= UINT32_C(1) << f;
            }
        }
        list += length + (list[length] == ',');
    }
    return all;
}

static void initialize(void) {
    const char *disabled = getenv("BITNET_DISABLE_CPU_FEATURES");
    features = detect() & ~(disabled ? named(disabled) : 0);
#if defined(__x86_64__)
    const uint32_t tiles = BN_CPU_BIT(AMX_INT8) | BN_CPU_BIT(AMX_BF16);
    if (features & tiles && !tiles_granted()) {
        features &= ~tiles;
    }
#endif
}

uint32_t bn_cpu_features(void) {
    pthread_once(&once, initialize);
    return features;
}

#if defined(__linux__)
static int64_t cache_size(int level) { return sysconf(level == 1 ? _SC_LEVEL1_DCACHE_SIZE : _SC_LEVEL2_CACHE_SIZE); }
#elif defined(__APPLE__)
static int64_t cache_size(int level) {
    int64_t bytes = 0;
    size_t size = sizeof bytes;
    const char *name = level == 1 ? "hw.l1dcachesize" : "hw.l2cachesize";
    return sysctlbyname(name, &bytes, &size, NULL, 0) == 0 ? bytes : 0;
}
#else
static int64_t cache_size(int level) { return 0 * level; }
#endif

static int64_t cache_bytes[2];
static pthread_once_t cache_once = PTHREAD_ONCE_INIT;

static void measure_caches(void) {
    static const int64_t usual[] = {32 << 10, 512 << 10};
    for (int level = 1; level <= 2; level++) {
        const int64_t told = cache_size(level);
        cache_bytes[level - 1] = told > 0 ? told : usual[level - 1];
    }
}

int64_t bn_cpu_cache_bytes(int level) {
    pthread_once(&cache_once, measure_caches);
    return cache_bytes[level - 1];
}
