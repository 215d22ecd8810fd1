/*
 * cpu_features.h: what this CPU can do and the operating system lets it do, asked once.
 * BITNET_DISABLE_CPU_FEATURES, a comma-separated list of the names below, switches features off for tests.
 */
#ifndef BN_BASE_CPU_FEATURES_H
#define BN_BASE_CPU_FEATURES_H

#include "base/common.h"

#define BN_CPU_FEATURES(X)                                                                                             \
    X(FMA, "fma")                                                                                                      \
    X(AVX2, "avx2")                                                                                                    \
    X(AVXVNNI, "avxvnni")                                                                                              \
    X(AVX512F, "avx512f")                                                                                              \
    X(AVX512BW, "avx512bw")                                                                                            \
    X(AVX512DQ, "avx512dq")                                                                                            \
    X(AVX512VL, "avx512vl")                                                                                            \
    X(AVX512VNNI, "avx512vnni")                                                                                        \
    X(AVX512VBMI, "avx512vbmi")                                                                                        \
    X(AVX512BF16, "avx512bf16")                                                                                        \
    X(AMX_INT8, "amx_int8")                                                                                            \
    X(AMX_BF16, "amx_bf16")                                                                                            \
    X(NEON, "neon")                                                                                                    \
    X(DOTPROD, "dotprod")                                                                                              \
    X(I8MM, "i8mm")                                                                                                    \
    X(BF16, "bf16")

#define BN_CPU_ID(id, name) BN_CPU_##id,
typedef enum bn_cpu_feature { BN_CPU_FEATURES(BN_CPU_ID) BN_CPU_FEATURE_COUNT } bn_cpu_feature;
#undef BN_CPU_ID

#define BN_CPU_BIT(id) (UINT32_C(1) << BN_CPU_##id)

extern const char *const bn_cpu_feature_names[BN_CPU_FEATURE_COUNT];
/* A BN_CPU_BIT of each feature present and not disabled. */
uint32_t bn_cpu_features(void);

/* Bytes of one core's data cache of level 1 or 2; 32 KiB and 512 KiB where the system does not tell. */
int64_t bn_cpu_cache_bytes(int level);

#endif
