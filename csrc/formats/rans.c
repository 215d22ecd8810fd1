/* rans.c: the stream of rans.h. Encoding walks backwards through a block, so that decoding can walk forwards. */
#include "formats/rans.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "base/math64.h"
#include "base/parallel.h"
#include "quant/fifths.h"

enum {
    STATES = 4,     /* chains of dependent instructions side by side; eight were no faster, and 16 bytes a block more */
    PRECISION = 12, /* a table of 4096 slots, four bytes each, stays in a level 1 cache */
    SLOTS = 1 << PRECISION,
    SYMBOLS = 256,
    STATE_BYTES = 4 * STATES,
    CARRIED = 2 * STATES, /* bytes that lie in the lower halves of the states where coding begins */
    COUNT_MAX = 1023,     /* of a digit: products of five are below 2^50, and times SLOTS still fit 64 bits */
    TABLE_MAX = 1 + 2 * SYMBOLS,
};
/* The least a state is between two bytes. */
#define LOWEST (UINT32_C(1) << 16)

typedef struct table {
    uint32_t frequency[SYMBOLS], start[SYMBOLS];
} table;

static void put_u16(uint8_t *to, uint32_t value) {
    to[0] = (uint8_t)value;
    to[1] = (uint8_t)(value >> 8);
}

static void put_u32(uint8_t *to, uint32_t value) {
    put_u16(to, value);
    put_u16(to + 2, value >> 16);
}

static uint32_t get_u16(const uint8_t *from) { return from[0] | (uint32_t)from[1] << 8; }
static uint32_t get_u32(const uint8_t *from) { return get_u16(from) | get_u16(from + 2) << 16; }

static size_t block_count(size_t size) { return size / BN_RANS_BLOCK + (size % BN_RANS_BLOCK != 0 ? 1 : 0); }

/* Bytes that block `i` of `size` codes. */
static size_t block_size(size_t size, size_t i) {
    const size_t left = size - i * BN_RANS_BLOCK;
    return left < BN_RANS_BLOCK ? left : BN_RANS_BLOCK;
}

/* How many of a block's bytes are coded; those behind them are carried by the states. */
static size_t coded_count(size_t count) { return count < CARRIED ? count : count - CARRIED; }

/* ---- tables --------------------------------------------------------------------------------------------------- */

static void set_starts(table *t) {
    uint32_t start = 0;
    for (int s = 0; s < SYMBOLS; s++) {
        t->start[s] = start;
        start += t->frequency[s];
    }
}

/* The symbol for which one slot more (step 1) is worth most, or one slot less (step -1) costs least: to first order
 * weight / frequency, compared by cross multiplication. */
static int best_to_change(const table *t, const uint64_t weights[SYMBOLS], int step) {
    int best = -1;
    for (int s = 0; s < SYMBOLS; s++) {
        if (weights[s] == 0 || (step < 0 && t->frequency[s] == 1)) {
            continue;
        }
        if (best >= 0) {
            const uint64_t mine = weights[s] * t->frequency[best], other = weights[best] * t->frequency[s];
            if (step > 0 ? mine <= other : mine >= other) {
                continue;
            }
        }
        best = s;
    }
    return best;
}

/* Frequencies in proportion to weights (below 2^51, not all 0), at least 1 where the weight is not 0, with sum SLOTS.
 */
static void normalize(const uint64_t weights[SYMBOLS], table *t) {
    uint64_t total = 0;
    uint32_t sum = 0;
    for (int s = 0; s < SYMBOLS; s++) {
        total += weights[s];
    }
    for (int s = 0; s < SYMBOLS; s++) {
        const uint32_t share = (uint32_t)(weights[s] * SLOTS / total);
        t->frequency[s] = weights[s] != 0 && share == 0 ? 1 : share;
        sum += t->frequency[s];
    }
    while (sum != SLOTS) {
        const int step = sum < SLOTS ? 1 : -1, s = best_to_change(t, weights, step);
        t->frequency[s] += (uint32_t)step;
        sum += (uint32_t)step;
    }
    set_starts(t);
}

/* weights[s] = product of the counts of the five digits of s. */
static void digit_weights(const uint64_t counts[3], uint64_t weights[SYMBOLS]) {
    for (uint32_t s = 0; s < SYMBOLS; s++) {
        uint32_t digits = s;
        weights[s] = s < BN_FIFTHS_VALUES ? 1 : 0;
        for (int k = 0; k < BN_FIFTHS_PER_BYTE; k++) {
            weights[s] *= counts[digits % 3];
            digits /= 3;
        }
    }
}

/* Counts of the digits of all bytes, shrunk to at most `limit`; false if some byte is not five digits. */
static bool count_digits(const uint64_t histogram[SYMBOLS], uint64_t limit, uint64_t counts[3]) {
    uint64_t greatest = 1;
    counts[0] = counts[1] = counts[2] = 0;
    for (uint32_t s = 0; s < SYMBOLS; s++) {
        if (s >= BN_FIFTHS_VALUES && histogram[s] != 0) {
            return false;
        }
        uint32_t digits = s;
        for (int k = 0; k < BN_FIFTHS_PER_BYTE; k++) {
            counts[digits % 3] += histogram[s];
            digits /= 3;
        }
    }
    for (int d = 0; d < 3; d++) {
        greatest = counts[d] > greatest ? counts[d] : greatest;
    }
    for (int d = 0; d < 3; d++) {
        const uint64_t share = counts[d] * limit / greatest;
        counts[d] = counts[d] != 0 && share == 0 ? 1 : share;
    }
    return true;
}

static uint8_t *put_number(uint8_t *to, uint32_t value) {
    if (value >= 128) {
        *to++ = (uint8_t)(value | 128);
        value >>= 7;
    }
    *to++ = (uint8_t)value;
    return to;
}

/* False where the stream ends, or the number takes more than two bytes. */
static bool get_number(const uint8_t **from, const uint8_t *end, uint32_t *value) {
    *value = 0;
    for (int shift = 0; shift < 14; shift += 7) {
        if (*from == end) {
            return false;
        }
        const uint8_t byte = *(*from)++;
        *value |= (uint32_t)(byte & 127) << shift;
        if (byte < 128) {
            return true;
        }
    }
    return false;
}

/* Bytes that the blocks take under a table, without their states. */
static double cost(const uint64_t histogram[SYMBOLS], const table *t) {
    double nats = 0.0;
    for (int s = 0; s < SYMBOLS; s++) {
        nats += histogram[s] == 0 ? 0.0 : (double)histogram[s] * bn_log64((double)SLOTS / t->frequency[s]);
    }
    return nats / (8.0 * bn_log64(2.0));
}

/* Writes the table of the shorter stream and returns the byte after it. */
static uint8_t *put_table(const uint64_t histogram[SYMBOLS], table *t, uint8_t *out) {
    static const uint64_t limits[] = {127, COUNT_MAX}; /* counts of one byte, or more exact ones */
    uint8_t *end = out;
    normalize(histogram, t);
    *end++ = 1;
    for (int s = 0; s < SYMBOLS; s++) {
        end = put_number(end, t->frequency[s]);
    }
    double least = cost(histogram, t) + (double)(end - out);
    for (int i = 0; i < 2; i++) {
        uint64_t counts[3], weights[SYMBOLS];
        uint8_t numbers[6], *last = numbers;
        table by_digits;
        if (!count_digits(histogram, limits[i], counts)) {
            break;
        }
        digit_weights(counts, weights);
        normalize(weights, &by_digits);
        for (int d = 0; d < 3; d++) {
            last = put_number(last, (uint32_t)counts[d]);
        }
        const double taken = cost(histogram, &by_digits) + (double)(1 + last - numbers);
        if (taken < least) {
            least = taken;
            *t = by_digits;
            out[0] = 0;
            memcpy(out + 1, numbers, (size_t)(last - numbers));
            end = out + 1 + (last - numbers);
        }
    }
    return end;
}

static bn_status get_table(const uint8_t **from, const uint8_t *end, table *t) {
    const int kind = *from < end ? *(*from)++ : -1;
    if (kind != 0 && kind != 1) {
        return bn_fail(BN_ERR_VALUE, "a coded stream begins with its kind, 0 or 1, not with %d", kind);
    }
    if (kind == 1) {
        uint32_t sum = 0; /* of numbers below 2^14 */
        for (int s = 0; s < SYMBOLS; s++) {
            if (!get_number(from, end, &t->frequency[s])) {
                return bn_fail(BN_ERR_VALUE, "the table of a coded stream breaks off at frequency %d", s);
            }
            sum += t->frequency[s];
        }
        if (sum != SLOTS) {
            return bn_fail(BN_ERR_VALUE, "the frequencies of a coded stream sum to %u, not %d", sum, SLOTS);
        }
        set_starts(t);
        return BN_OK;
    }
    uint64_t counts[3], weights[SYMBOLS];
    for (int d = 0; d < 3; d++) {
        uint32_t count;
        if (!get_number(from, end, &count) || count > COUNT_MAX) {
            return bn_fail(BN_ERR_VALUE, "digit %d of a coded stream has no count from 0 to %d", d, COUNT_MAX);
        }
        counts[d] = count;
    }
    if (counts[0] + counts[1] + counts[2] == 0) {
        return bn_fail(BN_ERR_VALUE, "the three counts of a coded stream are 0");
    }
    digit_weights(counts, weights);
    normalize(weights, t);
    return BN_OK;
}

/* ---- encoding --------------------------------------------------------------------------------------------------- */

/* One byte gives at most one word, since a frequency is at least 1 in 2^12 and a word holds 16 bits. */
static size_t block_bound(size_t count) { return STATE_BYTES + 2 * count; }

bool bn_rans_bound(size_t size, size_t *out) {
    size_t words;
    *out = 0;
    return size >> 48 == 0 && bn_mul_size(size, 2, &words) &&
           bn_add_size(words, TABLE_MAX + block_count(size) * (4 + STATE_BYTES), out);
}

typedef struct encode_args {
    const uint8_t *bytes;
    size_t size;
    const table *t;
    uint8_t *lengths; /* u32 of each block but the last */
    size_t last;      /* length of the last */
    uint8_t *blocks;  /* each at a multiple of block_bound(BN_RANS_BLOCK) */
} encode_args;

/* Returns the length of the block, which fills out[0..length). */
static size_t encode_block(const table *t, const uint8_t *bytes, size_t count, uint8_t *out) {
    uint8_t *const end = out + block_bound(count), *word = end;
    uint32_t x[STATES];
    const size_t coded = coded_count(count);
    for (int k = 0; k < STATES; k++) {
        x[k] = LOWEST | (coded < count ? get_u16(bytes + coded + 2 * k) : 0);
    }
    for (size_t i = coded; i-- > 0;) {
        const uint32_t frequency = t->frequency[bytes[i]], start = t->start[bytes[i]];
        uint32_t *state = &x[i % STATES];
        if (*state >> (32 - PRECISION) >= frequency) { /* or the next line would leave 32 bits */
            word -= 2;
            put_u16(word, *state & 0xffff);
            *state >>= 16;
        }
        *state = (*state / frequency << PRECISION) + *state % frequency + start;
    }
    for (int k = 0; k < STATES; k++) {
        put_u32(out + 4 * k, x[k]);
    }
    memmove(out + STATE_BYTES, word, (size_t)(end - word));
    return STATE_BYTES + (size_t)(end - word);
}

static void encode_range(void *ctx, int64_t begin, int64_t end, void *scratch) {
    (void)scratch;
    encode_args *a = ctx;
    for (size_t i = (size_t)begin; i < (size_t)end; i++) {
        const size_t length = encode_block(a->t, a->bytes + i * BN_RANS_BLOCK, block_size(a->size, i),
                                           a->blocks + i * block_bound(BN_RANS_BLOCK));
        if (i + 1 < block_count(a->size)) {
            put_u32(a->lengths + 4 * i, (uint32_t)length);
        } else {
            a->last = length;
        }
    }
}

bn_status bn_rans_encode(const uint8_t *bytes, size_t size, uint8_t *out, size_t *written) {
    uint64_t histogram[SYMBOLS] = {0};
    table t;
    *written = 0;
    if (size == 0) {
        return BN_OK;
    }
    for (size_t i = 0; i < size; i++) {
        histogram[bytes[i]]++;
    }
    const size_t blocks = block_count(size);
    uint8_t *lengths = put_table(histogram, &t, out), *end = lengths + 4 * (blocks - 1);
    encode_args args = {bytes, size, &t, lengths, 0, end};
    BN_TRY(bn_parallel_for(0, (int64_t)blocks, 1, encode_range, &args));
    for (size_t i = 0; i < blocks; i++) {
        const size_t length = i + 1 < blocks ? get_u32(lengths + 4 * i) : args.last;
        memmove(end, args.blocks + i * block_bound(BN_RANS_BLOCK), length);
        end += length;
    }
    *written = (size_t)(end - out);
    return BN_OK;
}

/* ---- decoding --------------------------------------------------------------------------------------------------- */

bn_status bn_rans_check_size(size_t length, size_t size) {
    /* A division, so that no size overflows. */
    if (size == 0 ? length != 0 : length / STATE_BYTES < block_count(size)) {
        return bn_fail(BN_ERR_VALUE, "a coded stream of %zu bytes cannot hold %zu bytes", length, size);
    }
    return BN_OK;
}

typedef struct decode_args {
    const uint32_t *slots;
    const size_t *offsets; /* of each block in the stream, and its end */
    const uint8_t *stream;
    uint8_t *bytes;
    size_t size;
    atomic_size_t damaged; /* the first damaged block, or the number of blocks */
} decode_args;

/* A slot is the symbol in its lowest byte, then frequency - 1 and the distance from its first slot, 12 bits each. */
static void fill_slots(const table *t, uint32_t slots[SLOTS]) {
    for (uint32_t s = 0; s < SYMBOLS; s++) {
        for (uint32_t i = 0; i < t->frequency[s]; i++) {
            slots[t->start[s] + i] = s | (t->frequency[s] - 1) << 8 | i << 20;
        }
    }
}

/* Never overflows: x >> 12 is below 2^20, frequency at most 2^12, and the distance below frequency. */
static uint32_t pop(uint32_t slot, uint32_t x) {
    return ((slot >> 8 & (SLOTS - 1)) + 1) * (x >> PRECISION) + (slot >> 20);
}

static bool decode_block(const uint32_t slots[SLOTS], const uint8_t *in, size_t length, uint8_t *bytes, size_t count) {
    const uint8_t *word = in + STATE_BYTES, *const end = in + length;
    const size_t coded = coded_count(count);
    uint32_t x[STATES];
    size_t i = 0;
    for (int k = 0; k < STATES; k++) {
        x[k] = get_u32(in + 4 * k);
    }
    /* Every second byte or so takes a word, in no order that a processor could guess: no branch but the loop's. It
     * takes at most a word for each state, so 2 * STATES bytes that are there make every read of it safe. */
    for (; i + STATES <= coded && end - word >= 2 * STATES; i += STATES) {
        for (int k = 0; k < STATES; k++) {
            const uint32_t slot = slots[x[k] & (SLOTS - 1)], low = pop(slot, x[k]), next = low << 16 | get_u16(word);
            bytes[i + (size_t)k] = (uint8_t)slot;
            x[k] = low < LOWEST ? next : low;
            word += low < LOWEST ? 2 : 0;
        }
    }
    for (; i < coded; i++) {
        uint32_t *state = &x[i % STATES];
        const uint32_t slot = slots[*state & (SLOTS - 1)];
        bytes[i] = (uint8_t)slot;
        *state = pop(slot, *state);
        if (*state < LOWEST) {
            if (end - word < 2) {
                return false;
            }
            *state = *state << 16 | get_u16(word);
            word += 2;
        }
    }
    bool whole = word == end;
    for (int k = 0; k < STATES; k++) {
        whole = whole && x[k] >> 16 == 1 && (coded < count || x[k] == LOWEST);
        if (coded < count) {
            put_u16(bytes + coded + 2 * k, x[k]);
        }
    }
    return whole;
}

static void decode_range(void *ctx, int64_t begin, int64_t end, void *scratch) {
    (void)scratch;
    decode_args *a = ctx;
    for (size_t i = (size_t)begin; i < (size_t)end; i++) {
        if (!decode_block(a->slots, a->stream + a->offsets[i], a->offsets[i + 1] - a->offsets[i],
                          a->bytes + i * BN_RANS_BLOCK, block_size(a->size, i))) {
            size_t seen = atomic_load(&a->damaged);
            while (i < seen && !atomic_compare_exchange_weak(&a->damaged, &seen, i)) {
            }
            return;
        }
    }
}

/* offsets[0..blocks] from the lengths at `from`; the last block takes what is left. */
static bn_status get_offsets(const uint8_t *stream, size_t length, const uint8_t *from, size_t blocks,
                             size_t *offsets) {
    size_t at = (size_t)(from - stream);
    if ((length - at) / 4 < blocks - 1) {
        return bn_fail(BN_ERR_VALUE, "a coded stream of %zu bytes ends before the lengths of its %zu blocks", length,
                       blocks);
    }
    at += 4 * (blocks - 1);
    for (size_t i = 0; i < blocks; i++) {
        const size_t block = i + 1 < blocks ? get_u32(from + 4 * i) : length - at;
        if (block < STATE_BYTES || block > length - at) {
            return bn_fail(BN_ERR_VALUE, "block %zu of %zu of a coded stream has %zu bytes; %zu are left of %zu", i,
                           blocks, block, length - at, length);
        }
        offsets[i] = at;
        at += block;
    }
    offsets[blocks] = at;
    return BN_OK;
}

static bn_status decode(const uint8_t *stream, size_t length, uint8_t *bytes, size_t size, uint32_t *slots,
                        size_t *offsets) {
    const size_t blocks = block_count(size);
    const uint8_t *from = stream;
    table t;
    BN_TRY(get_table(&from, stream + length, &t));
    BN_TRY(get_offsets(stream, length, from, blocks, offsets));
    fill_slots(&t, slots);
    decode_args args = {slots, offsets, stream, bytes, size, blocks};
    BN_TRY(bn_parallel_for(0, (int64_t)blocks, 1, decode_range, &args));
    const size_t damaged = atomic_load(&args.damaged);
    if (damaged < blocks) {
        return bn_fail(BN_ERR_VALUE,
                       "block %zu of %zu of a coded stream is damaged: it does not end where coding began", damaged,
                       blocks);
    }
    return BN_OK;
}

bn_status bn_rans_decode(const uint8_t *stream, size_t length, uint8_t *bytes, size_t size) {
    BN_TRY(bn_rans_check_size(length, size));
    if (size == 0) {
        return BN_OK;
    }
    /* No overflow: check_size has bounded the number of blocks by length / 16. */
    uint32_t *slots = malloc(SLOTS * sizeof *slots);
    size_t *offsets = malloc((block_count(size) + 1) * sizeof *offsets);
    bn_status status = slots == NULL || offsets == NULL
                           ? bn_fail(BN_ERR_MEMORY, "out of memory for the table of a coded stream")
                           : decode(stream, length, bytes, size, slots, offsets);
    free(slots);
    free(offsets);
    return status;
}
