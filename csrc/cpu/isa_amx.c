/*
 * isa_amx.c: bf16 and int8 products on Intel's AMX tiles (Sapphire Rapids and later), which multiply sixteen rows by
 * sixteen columns by 64 bytes in sixteen cycles. The register tile is 2 x 2: four tiles of sums, two of each factor, so
 * that every tile loaded is used twice. bf16 sums: within a tile the even and the odd values of p are two chains of
 * fused multiply-adds from zero, whose sum is added to c; subnormals are zero (Intel SDM, TDPBF16PS).
 *
 * Few rows (decoding) leave tiles empty and go to the dot products of AVX-512, with the same integers.
 */
#include "cpu/target.h"

#include <stdint.h>

#if defined(__x86_64__)
#include <immintrin.h>

BN_TARGET_BEGIN(
    "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi,avx512bf16,amx-tile,amx-int8,amx-bf16,"
    "prfchw")

#define BN_WORDS_VBMI
#include "cpu/words_avx512.h"

#include "cpu/lanes.inc"
#include "cpu/math.inc"
#include "cpu/micro.h"

#include "cpu/dot.inc"
#include "cpu/pack_avx512bf16.inc"

/* All eight tile registers hold sixteen rows of 64 bytes. */
static void open_tiles(void) {
    static const struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } shape = {
        .palette = 1,
        .row_bytes = {64, 64, 64, 64, 64, 64, 64, 64},
        .rows = {16, 16, 16, 16, 16, 16, 16, 16},
    };
    _tile_loadconfig(&shape);
}

/* A tile of c goes straight between memory and a register where all of it exists, else by way of `spare`. */
typedef struct tile_of_c {
    char *memory;
    int64_t row_bytes, rows, bytes;
} tile_of_c;

static tile_of_c tile_at(const bn_block *k, int64_t row, int64_t col) {
    return (tile_of_c){(char *)k->c + 4 * (row * k->ldc + col), 4 * k->ldc, bn_min_i64(k->rows - row, 16),
                       4 * bn_min_i64(k->cols - col, 16)};
}
static bool is_whole(const tile_of_c *t) { return t->rows == 16 && t->bytes == 64; }

static void gather(char *spare, const tile_of_c *t) {
    for (int64_t i = 0; i < t->rows; i++) {
        memcpy(spare + 64 * i, t->memory + i * t->row_bytes, (size_t)t->bytes);
    }
}
static void scatter(const tile_of_c *t, const char *spare) {
    for (int64_t i = 0; i < t->rows; i++) {
        memcpy(t->memory + i * t->row_bytes, spare + 64 * i, (size_t)t->bytes);
    }
}

/* The numbers of tile registers are part of the instructions, so these are text. */
#define OPEN_SUM(number, t)                                                                                            \
    do {                                                                                                               \
        if (!k->resume) {                                                                                              \
            _tile_zero(number);                                                                                        \
        } else if (is_whole(&(t))) {                                                                                   \
            _tile_stream_loadd(number, (t).memory, (size_t)(t).row_bytes);                                             \
        } else {                                                                                                       \
            gather(spare, &(t));                                                                                       \
            _tile_loadd(number, spare, 64);                                                                            \
        }                                                                                                              \
    } while (0)
#define CLOSE_SUM(number, t)                                                                                           \
    do {                                                                                                               \
        if (is_whole(&(t))) {                                                                                          \
            _tile_stored(number, (t).memory, (size_t)(t).row_bytes);                                                   \
        } else {                                                                                                       \
            _tile_stored(number, spare, 64);                                                                           \
            scatter(&(t), spare);                                                                                      \
        }                                                                                                              \
    } while (0)

/* Calls the sums of the register tile at (row, col) into L1, four of their 64 lines a step, to be read and written.
 * Sums that come from L2 only when they are wanted stop everything for a thousand cycles: 55 % of the peak became 80 %.
 */
static inline void call_in(const bn_block *k, int64_t row, int64_t col, int64_t step) {
    const char *c = (const char *)k->c + 4 * ((row + 2 * step) * k->ldc + col);
    if (step < 16 && row + 2 * step + 1 < k->rows) {
        __builtin_prefetch(c, 1, 3);
        __builtin_prefetch(c + 64, 1, 3);
        __builtin_prefetch(c + 4 * k->ldc, 1, 3);
        __builtin_prefetch(c + 4 * k->ldc + 64, 1, 3);
    }
}

/* Left tiles and sums pass through once for each strip of right panels, which stay in L1 for the whole block: loads
 * that ask L1 not to keep them take a block of 512 rows, 640 deep, from 53 to 87 % of the peak (Sapphire Rapids, 48
 * KiB). One function for each product DOT and each shape: `low` and `wide` tell whether there is a second panel on the
 * left and on the right. */
#define AMX_TILE(name, DOT, low, wide)                                                                                 \
    static void name(const bn_block *k, int64_t row, int64_t col) {                                                    \
        _Alignas(64) char spare[BN_TILE_BYTES];                                                                        \
        const char *left = (const char *)k->left + row / BN_TILE_LANES * k->left_panel;                                \
        const char *right = (const char *)k->right + col / BN_TILE_LANES * k->right_panel;                             \
        const tile_of_c c0 = tile_at(k, row, col), c1 = tile_at(k, row, col + 16);                                     \
        const tile_of_c c2 = tile_at(k, row + 16, col), c3 = tile_at(k, row + 16, col + 16);                           \
        OPEN_SUM(0, c0);                                                                                               \
        if (wide)                                                                                                      \
            OPEN_SUM(1, c1);                                                                                           \
        if (low)                                                                                                       \
            OPEN_SUM(2, c2);                                                                                           \
        if (low && wide)                                                                                               \
            OPEN_SUM(3, c3);                                                                                           \
        for (int64_t step = 0; step < k->steps; step++, left += BN_TILE_BYTES, right += BN_TILE_BYTES) {               \
            _tile_stream_loadd(4, left, 64);                                                                           \
            _tile_loadd(6, right, 64);                                                                                 \
            if (low)                                                                                                   \
                _tile_stream_loadd(5, left + k->left_panel, 64);                                                       \
            if (wide)                                                                                                  \
                _tile_loadd(7, right + k->right_panel, 64);                                                            \
            DOT(0, 4, 6);                                                                                              \
            if (low)                                                                                                   \
                DOT(2, 5, 6);                                                                                          \
            if (wide)                                                                                                  \
                DOT(1, 4, 7);                                                                                          \
            if (low && wide)                                                                                           \
                DOT(3, 5, 7);                                                                                          \
            call_in(k, row + 32, col, step);                                                                           \
        }                                                                                                              \
        CLOSE_SUM(0, c0);                                                                                              \
        if (wide)                                                                                                      \
            CLOSE_SUM(1, c1);                                                                                          \
        if (low)                                                                                                       \
            CLOSE_SUM(2, c2);                                                                                          \
        if (low && wide)                                                                                               \
            CLOSE_SUM(3, c3);                                                                                          \
    }

/* Setting the tiles up takes as long as sixteen dot products: `opened` does without where a caller has many blocks. */
#define AMX_MULTIPLY(name, DOT)                                                                                        \
    AMX_TILE(name##_2x2, DOT, true, true)                                                                              \
    AMX_TILE(name##_2x1, DOT, true, false)                                                                             \
    AMX_TILE(name##_1x2, DOT, false, true)                                                                             \
    AMX_TILE(name##_1x1, DOT, false, false)                                                                            \
    static void name##_opened(const bn_block *k) {                                                                     \
        for (int64_t col = 0; col < k->cols; col += 32) {                                                              \
            const bool wide = k->cols - col > 16;                                                                      \
            for (int64_t row = 0; row < k->rows; row += 32) {                                                          \
                if (k->rows - row > 16) {                                                                              \
                    (wide ? name##_2x2 : name##_2x1)(k, row, col);                                                     \
                } else {                                                                                               \
                    (wide ? name##_1x2 : name##_1x1)(k, row, col);                                                     \
                }                                                                                                      \
            }                                                                                                          \
        }                                                                                                              \
    }                                                                                                                  \
    static void name(const bn_block *k) {                                                                              \
        open_tiles();                                                                                                  \
        name##_opened(k);                                                                                              \
        _tile_release();                                                                                               \
    }
AMX_MULTIPLY(multiply_bf16_tiles, _tile_dpbf16ps)
AMX_MULTIPLY(multiply_i8_tiles, _tile_dpbsud)

static const bn_micro micro_bf16 = {
    .per_word = 2, .rows = 32, .cols = 32, .multiply = multiply_bf16_tiles, .pack = pack_bf16, .move = v_move_rows};
static const bn_micro micro_i8_tiles = {
    .per_word = 4, .rows = 32, .cols = 32, .multiply = multiply_i8_tiles, .unpack = unpack_codes};

#define BF16_OPEN() open_tiles()
#define BF16_CLOSE() _tile_release()
#define BF16_PART 32
#define BF16_MULTIPLY multiply_bf16_tiles_opened
#include "cpu/bf16.inc"

#define BITLINEAR_MICRO(a) ((a)->m < BN_TILE_LANES ? &micro_i8 : &micro_i8_tiles)
#include "cpu/bitlinear.inc"

extern const bn_kernel_table bn_kernels_amx;
const bn_kernel_table bn_kernels_amx = {
    .isa = "amx",
    .bitlinear_forward = bitlinear_forward,
#define KERNEL(name)
#define FAST_KERNEL(name) .name = name,
#include "kernels/kernels.def"
#undef KERNEL
};

BN_TARGET_END
#else
typedef int bn_no_amx;
#endif
