/*
 * rng.c: Philox4x32-10 and what is made of its words. Block b of a stream holds words 4b..4b+3: four uniforms, two
 * 64-bit integers, or two Box-Muller pairs (u, v) -> sqrt(-2 ln u) (cos 2 pi v, sin 2 pi v).
 */
#include "base/rng.h"

#include <math.h>

#include "base/math64.h"
#include "base/parallel.h"

/* Blocks of four numbers worth a thread's time: about 100 us of normals. */
#define GRAIN 1024

void bn_philox4x32(const uint32_t counter[4], const uint32_t key[2], uint32_t out[4]) {
    uint32_t c0 = counter[0], c1 = counter[1], c2 = counter[2], c3 = counter[3], k0 = key[0], k1 = key[1];
    for (int round = 0; round < 10; round++) {
        uint64_t p0 = (uint64_t)0xD2511F53 * c0, p1 = (uint64_t)0xCD9E8D57 * c2;
        c0 = (uint32_t)(p1 >> 32) ^ c1 ^ k0;
        c1 = (uint32_t)p1;
        c2 = (uint32_t)(p0 >> 32) ^ c3 ^ k1;
        c3 = (uint32_t)p0;
        k0 += 0x9E3779B9; /* golden ratio */
        k1 += 0xBB67AE85; /* sqrt(3) - 1 */
    }
    out[0] = c0;
    out[1] = c1;
    out[2] = c2;
    out[3] = c3;
}

typedef struct sequence {
    uint64_t seed, stream;
} sequence;

static void block_words(sequence s, uint64_t block, uint32_t out[4]) {
    const uint32_t counter[4] = {(uint32_t)block, (uint32_t)(block >> 32), (uint32_t)s.stream,
                                 (uint32_t)(s.stream >> 32)};
    const uint32_t key[2] = {(uint32_t)s.seed, (uint32_t)(s.seed >> 32)};
    bn_philox4x32(counter, key, out);
}

static void block_uniforms(sequence s, uint64_t block, double out[4]) {
    uint32_t word[4];
    block_words(s, block, word);
    for (int i = 0; i < 4; i++) {
        out[i] = (double)(word[i] >> 8) * 0x1p-24;
    }
}

static void block_normals(sequence s, uint64_t block, double out[4]) {
    uint32_t word[4];
    block_words(s, block, word);
    for (int i = 0; i < 4; i += 2) {
        double u = ((double)word[i] + 1.0) * 0x1p-32; /* (0, 1]: its logarithm is finite */
        double angle = (double)word[i + 1] * (0x1.921fb54442d18p+2 * 0x1p-32);
        double radius = sqrt(-2.0 * bn_log64(u));
        out[i] = radius * bn_cos64(angle);
        out[i + 1] = radius * bn_sin64(angle);
    }
}

uint64_t bn_rng_u64(uint64_t seed, uint64_t stream, uint64_t index) {
    uint32_t word[4];
    block_words((sequence){seed, stream}, index / 2, word);
    const uint32_t *w = word + 2 * (index % 2);
    return (uint64_t)w[1] << 32 | w[0];
}

float bn_rng_uniform(uint64_t seed, uint64_t stream, uint64_t index) {
    double block[4];
    block_uniforms((sequence){seed, stream}, index / 4, block);
    return (float)block[index % 4];
}

float bn_rng_normal(uint64_t seed, uint64_t stream, uint64_t index) {
    double block[4];
    block_normals((sequence){seed, stream}, index / 4, block);
    return (float)block[index % 4];
}

typedef struct fill_job {
    void (*block)(sequence s, uint64_t block, double out[4]);
    sequence s;
    float *out;
    int64_t n;
    double offset, factor;
} fill_job;

static void fill_blocks(void *ctx, int64_t begin, int64_t end, void *scratch) {
    (void)scratch;
    const fill_job *job = ctx;
    for (int64_t b = begin; b < end; b++) {
        double value[4];
        job->block(job->s, (uint64_t)b, value);
        for (int64_t i = 4 * b; i < bn_min_i64(4 * b + 4, job->n); i++) {
            job->out[i] = (float)(job->offset + job->factor * value[i - 4 * b]);
        }
    }
}

bn_status bn_rng_fill_uniform(float *out, int64_t n, uint64_t seed, uint64_t stream, float low, float high) {
    fill_job job = {block_uniforms, {seed, stream}, out, n, low, (double)high - (double)low};
    return bn_parallel_for(0, bn_ceil_div(n, 4), GRAIN, fill_blocks, &job);
}

bn_status bn_rng_fill_normal(float *out, int64_t n, uint64_t seed, uint64_t stream, float mean, float std) {
    fill_job job = {block_normals, {seed, stream}, out, n, mean, std};
    return bn_parallel_for(0, bn_ceil_div(n, 4), GRAIN, fill_blocks, &job);
}
