/*
 * rng.h: counter-based random numbers: each is a pure function of (seed, stream, index), so any part of a sequence
 * can be made alone, by any thread, in any order, and is the same bits on every machine.
 *
 * The generator is Philox4x32-10 (Salmon, Moraes, Dror and Shaw, SC 2011): key = seed, counter = (index block, stream).
 * Streams are independent; within one stream the three kinds of number below come from the same bits, so give each use
 * its own stream.
 */
#ifndef BN_BASE_RNG_H
#define BN_BASE_RNG_H

#include "base/error.h"

BN_EXTERN_C_BEGIN

/* The generator itself: four words from a counter and a key. */
void bn_philox4x32(const uint32_t counter[4], const uint32_t key[2], uint32_t out[4]);

uint64_t bn_rng_u64(uint64_t seed, uint64_t stream, uint64_t index);
/* In [0, 1), a multiple of 2^-24. */
float bn_rng_uniform(uint64_t seed, uint64_t stream, uint64_t index);
/* Mean 0, deviation 1, within +-6.67 (a uniform of 32 bits goes no further into the tail). */
float bn_rng_normal(uint64_t seed, uint64_t stream, uint64_t index);

/* out[i] = low + (high - low) * uniform(seed, stream, i), and mean + std * normal(seed, stream, i), for i < n: computed
 * in double, rounded once, by all threads of the pool. Rounding may give `high` itself. */
BN_CHECKED bn_status bn_rng_fill_uniform(float *out, int64_t n, uint64_t seed, uint64_t stream, float low, float high);
BN_CHECKED bn_status bn_rng_fill_normal(float *out, int64_t n, uint64_t seed, uint64_t stream, float mean, float std);

BN_EXTERN_C_END
#endif
