/*
 * peak.h: how many multiply-adds a second this machine can do at most, measured: the roof under which every matrix
 * product is judged. Loops that touch registers only, so that neither caches nor memory have a say.
 */
#ifndef BN_CPU_PEAK_H
#define BN_CPU_PEAK_H

#include "base/error.h"

/* What is multiplied; sums are f32 for the first two and i32 (i16 where pairs of bytes are all there is) for int8. */
typedef enum bn_peak_kind { BN_PEAK_F32, BN_PEAK_BF16, BN_PEAK_INT8, BN_PEAK_KINDS } bn_peak_kind;

typedef struct bn_peak {
    double macs_per_second; /* of all bn_get_threads() threads at the same time */
    const char *name;       /* of the instructions used, such as "amx-int8"; lives for ever */
} bn_peak;

/* By the best instructions for this kind that bn_cpu_features() offers, whatever instruction set kernels use, or those
 * of f32, on which any product can run: a Xeon with AVX512-BF16 does 0.5 of its dots a cycle, but 2 of f32. Takes about
 * `seconds`, of which the best tenth counts. BN_ERR_MEMORY if the pool has no scratch. */
BN_CHECKED bn_status bn_cpu_peak(bn_peak_kind kind, double seconds, bn_peak *out);

#endif
