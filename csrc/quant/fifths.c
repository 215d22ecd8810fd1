/* fifths.c: packing in slices of bytes that fit a level 1 cache, one digit of all of them after the other. */
#include "quant/fifths.h"

#include <string.h>

#include "base/parallel.h"

/* Bytes a piece packs at a time: they and one digit's codes lie in 32 KiB of cache. */
#define SLICE 8192

static const uint8_t powers[BN_FIFTHS_PER_BYTE] = {1, 3, 9, 27, 81};

typedef struct pack_args {
    const int8_t *codes;
    int64_t n, m;
    uint8_t *bytes;
} pack_args;

/* The codes were checked: a byte is 242 at most. */
static void pack_slice(const pack_args *a, int64_t begin, int64_t end) {
    memset(a->bytes + begin, 0, (size_t)(end - begin));
    for (int64_t k = 0; k < BN_FIFTHS_PER_BYTE; k++) {
        const uint8_t power = powers[k];
        const int64_t stop = bn_min_i64(end, a->n - k * a->m); /* below begin where this digit has no code here */
        for (int64_t j = begin; j < stop; j++) {
            a->bytes[j] = (uint8_t)(a->bytes[j] + (uint8_t)(a->codes[k * a->m + j] + 1) * power);
        }
    }
}

static void pack_range(void *ctx, int64_t begin, int64_t end, void *scratch) {
    (void)scratch;
    for (int64_t slice = begin; slice < end; slice += SLICE) {
        pack_slice(ctx, slice, bn_min_i64(end, slice + SLICE));
    }
}

bn_status bn_fifths_pack(const int8_t *codes, int64_t n, uint8_t *bytes) {
    pack_args args = {codes, n, bn_fifths_bytes(n), bytes};
    int worst = 0; /* looked for without leaving the loop, so that it runs in vectors */
    for (int64_t i = 0; i < n; i++) {
        const int code = (uint8_t)(codes[i] + 1);
        worst = code > worst ? code : worst;
    }
    for (int64_t i = 0; worst > 2 && i < n; i++) {
        if ((uint8_t)(codes[i] + 1) > 2) {
            return bn_fail(BN_ERR_VALUE, "ternary code %lld is %d; only -1, 0 and 1 can be packed", (long long)i,
                           codes[i]);
        }
    }
    return bn_parallel_for(0, args.m, 8 * SLICE, pack_range, &args);
}

bn_status bn_fifths_check(const uint8_t *bytes, int64_t n) {
    const int64_t m = bn_fifths_bytes(n);
    int greatest = 0;
    for (int64_t j = 0; j < m; j++) {
        greatest = bytes[j] > greatest ? bytes[j] : greatest;
    }
    for (int64_t j = 0; greatest >= BN_FIFTHS_VALUES && j < m; j++) {
        if (bytes[j] >= BN_FIFTHS_VALUES) {
            return bn_fail(BN_ERR_VALUE, "byte %lld of packed codes is %d; five codes are 0 to 242", (long long)j,
                           bytes[j]);
        }
    }
    for (int64_t i = n; i < m * BN_FIFTHS_PER_BYTE; i++) {
        if (bytes[i % m] / powers[i / m] % 3 != 0) {
            return bn_fail(BN_ERR_VALUE, "byte %lld of packed codes holds a code beyond the last of %lld",
                           (long long)(i % m), (long long)n);
        }
    }
    return BN_OK;
}

/* Digit k of a byte b is floor(b / 3^k) mod 3. Both floors come from a multiplication by ceil(2^16 / 3^k), which is too
 * large by less than 1: times b it is too large by less than 243 / 2^16, less than the 1 / 81 that is the least
 * distance of b / 3^k from the next integer above. */
static void unpack_digit(const uint8_t *bytes, int64_t count, uint32_t factor, int8_t *codes) {
    const uint32_t third = 21846;
    for (int64_t j = 0; j < count; j++) {
        const uint32_t quotient = bytes[j] * factor >> 16;
        codes[j] = (int8_t)((int32_t)(quotient - 3 * (quotient * third >> 16)) - 1);
    }
}

void bn_fifths_unpack_range(const uint8_t *bytes, int64_t n, int64_t begin, int64_t end, int8_t *codes) {
    static const uint32_t factors[BN_FIFTHS_PER_BYTE] = {65536, 21846, 7282, 2428, 810};
    const int64_t m = bn_fifths_bytes(n);
    while (begin < end) {
        const int64_t k = begin / m, stop = bn_min_i64(end, (k + 1) * m);
        unpack_digit(bytes + begin - k * m, stop - begin, factors[k], codes);
        codes += stop - begin;
        begin = stop;
    }
}

typedef struct unpack_args {
    const uint8_t *bytes;
    int64_t n;
    int8_t *codes;
} unpack_args;

static void unpack_piece(void *ctx, int64_t begin, int64_t end, void *scratch) {
    (void)scratch;
    const unpack_args *a = ctx;
    bn_fifths_unpack_range(a->bytes, a->n, begin, end, a->codes + begin);
}

bn_status bn_fifths_unpack(const uint8_t *bytes, int64_t n, int8_t *codes) {
    BN_TRY(bn_fifths_check(bytes, n));
    unpack_args args = {bytes, n, codes};
    return bn_parallel_for(0, n, 8 * SLICE, unpack_piece, &args);
}
