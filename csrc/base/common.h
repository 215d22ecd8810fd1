/*
 * common.h: alignment, checked size arithmetic and the few attributes used everywhere.
 * Readable by a C++ compiler, because kernels/ includes it and CUDA compiles kernels/.
 */
#ifndef BN_BASE_COMMON_H
#define BN_BASE_COMMON_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
#define BN_EXTERN_C_BEGIN extern "C" {
#define BN_EXTERN_C_END }
#else
#define BN_EXTERN_C_BEGIN
#define BN_EXTERN_C_END
#endif

#define BN_RESTRICT __restrict__
#define BN_LIKELY(x) __builtin_expect(!!(x), 1)
#define BN_UNLIKELY(x) __builtin_expect(!!(x), 0)

/* One cache line, and one 512-bit vector. Every storage and every parameter in a flat buffer starts on it. */
#define BN_ALIGN 64

/* a * b and a + b that report overflow instead of wrapping; true when *out holds the exact result. */
static inline bool bn_mul_size(size_t a, size_t b, size_t *out) { return !__builtin_mul_overflow(a, b, out); }
static inline bool bn_add_size(size_t a, size_t b, size_t *out) { return !__builtin_add_overflow(a, b, out); }

static inline int64_t bn_min_i64(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t bn_max_i64(int64_t a, int64_t b) { return a > b ? a : b; }
/* Both want a >= 0 and b > 0. */
static inline int64_t bn_ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline int64_t bn_round_up(int64_t a, int64_t b) { return bn_ceil_div(a, b) * b; }

#endif
