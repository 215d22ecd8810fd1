/*
 * bandwidth.c: every thread adds up its share of a buffer, over and over, in one to four streams that run side by side,
 * each called in ahead of its use.
 */
#include "cpu/bandwidth.h"

#include <stdint.h>

#include "base/arena.h"
#include "base/clock.h"
#include "base/parallel.h"

#define ROUNDS 4
enum { LINE = 8, AHEAD = 32 * LINE }; /* words of a cache line; how far ahead lines are called in: 2 KiB */

typedef struct reading {
    uint64_t *data;
    int streams;
    int64_t words; /* of a unit */
    uint64_t sums[BN_MAX_THREADS];
} reading;

static void read_units(void *ctx, int64_t begin, int64_t end, void *scratch) {
    (void)scratch;
    reading *r = ctx;
    const int64_t stream = r->words / r->streams;
    for (int64_t unit = begin; unit < end; unit++) {
        const uint64_t *data = r->data + unit * r->words;
        uint64_t sum[LINE] = {0};
        for (int64_t i = 0; i + LINE <= stream; i += LINE) {
            for (int s = 0; s < r->streams; s++) {
                const uint64_t *line = data + s * stream + i;
                __builtin_prefetch(line + AHEAD);
                for (int w = 0; w < LINE; w++) {
                    sum[w] += line[w];
                }
            }
        }
        for (int w = 0; w < LINE; w++) {
            r->sums[unit] += sum[w];
        }
    }
}

static void fill_units(void *ctx, int64_t begin, int64_t end, void *scratch) {
    (void)scratch;
    reading *r = ctx;
    for (int64_t i = begin * r->words; i < end * r->words; i++) {
        r->data[i] = (uint64_t)i * 0x9e3779b97f4a7c15u; /* no two pages alike, which a host could merge */
    }
}

static bn_status measure(reading *r, int threads, double *best) {
    BN_TRY(bn_parallel_for(0, threads, 1, fill_units, r));
    for (int round = 0; round < ROUNDS; round++) {
        for (r->streams = 1; r->streams <= 4; r->streams *= 2) {
            const double start = bn_seconds();
            BN_TRY(bn_parallel_for(0, threads, 1, read_units, r));
            const double rate = (double)(threads * r->words) * sizeof(uint64_t) / (bn_seconds() - start);
            *best = rate > *best ? rate : *best;
        }
    }
    return BN_OK;
}

bn_status bn_cpu_read_bandwidth(int64_t bytes, double *bytes_per_second) {
    const int threads = bn_get_threads();
    bn_arena arena = BN_ARENA_INIT;
    void *memory;
    *bytes_per_second = 0.0;
    BN_TRY(bn_arena_allocate(&arena, (size_t)bytes + AHEAD * sizeof(uint64_t), &memory));
    reading r = {.data = memory, .words = bytes / (int64_t)sizeof(uint64_t) / threads / (4 * LINE) * (4 * LINE)};
    const bn_status status = measure(&r, threads, bytes_per_second);
    bn_arena_release(&arena, memory, (size_t)bytes + AHEAD * sizeof(uint64_t));
    bn_arena_trim(&arena);
    return status;
}
