/*
 * micro.h: a matrix product on one core, in three layers. product.c cuts it into blocks that fit the caches; pack.inc
 * lays the factors of a block out in tiles; a micro-kernel multiplies tiles. Only the last two know types and
 * instruction sets.
 *
 * A *tile* is 1 KiB: sixteen lanes (rows of the left factor, columns of the right one) by sixteen words along the
 * summed index p. A word is four bytes: one f32, two bf16 or four int8, so a tile covers 16, 32 or 64 values of p. A
 * left tile is [lane][word], a right one [word][lane]. A *panel* is sixteen lanes over all of p: its tiles lie one
 * after the other. Lanes beyond a factor's last may hold anything; beyond the last p there are zeros. It is the layout
 * of Intel's AMX, and dot products of any width read it just as well: a right tile's row is one or more whole
 * registers, a left tile's word is broadcast.
 */
#ifndef BN_CPU_MICRO_H
#define BN_CPU_MICRO_H

#include "kernels/kernels.h"

enum { BN_TILE_LANES = 16, BN_TILE_WORDS = 16, BN_TILE_BYTES = 1024 };

/* c[0..rows)[0..cols) (+)= left right^T, all of it in caches that the caller chose. */
typedef struct bn_block {
    const void *left, *right;        /* first panels */
    int64_t left_panel, right_panel; /* bytes from one panel to the next */
    int64_t steps;                   /* tiles along p */
    void *c;                         /* f32, or i32 for integers, row stride ldc */
    int64_t ldc, rows, cols;
    bool resume; /* add to what c holds */
} bn_block;

/* Where a factor comes from (kernels.h, bn_layout). */
typedef enum bn_source { BN_SOURCE_F32, BN_SOURCE_I8, BN_SOURCE_TILES, BN_SOURCE_CODES, BN_SOURCES } bn_source;

/* Brings part of a factor into panels: lanes [first_lane, + lanes) by p in [first_p, + depth). The element (lane, p) is
 * at data[lane * lane_stride + p * p_stride], one of the strides being 1; tiles and codes say with p_stride alone where
 * theirs are, p_stride being the row_stride of their layout. */
typedef struct bn_packing {
    const void *data;
    bn_source source;
    bool left;
    int64_t lane_stride, p_stride;
    const float *factor; /* multiplies p - first_p before the rounding; NULL: one */
    int64_t first_lane, lanes, first_p, depth;
    void *panels;
    int64_t panel_bytes;
} bn_packing;

typedef struct bn_micro {
    int per_word;   /* values of p in a word */
    int rows, cols; /* of the register tile; blocks in multiples of these leave no edge */
    void (*multiply)(const bn_block *block);
    /* floats: */
    void (*pack)(const bn_packing *packing);
    void (*move)(const float *from, int64_t from_ld, float *to, int64_t to_ld, int64_t rows, int64_t cols); /* of c */
    /* integers, whose factors are kept in tiles and whose sums are not c: */
    void (*unpack)(bn_code_form form, const char *packed, int64_t tiles, char *out); /* of codes */
} bn_micro;

/* Values of p in a tile, and tiles that `depth` of them need. */
static inline int64_t bn_micro_depth(const bn_micro *micro) { return BN_TILE_WORDS * micro->per_word; }
static inline int64_t bn_micro_steps(const bn_micro *micro, int64_t depth) {
    return bn_ceil_div(depth, bn_micro_depth(micro));
}

/* A block of any depth, cut along p so that a strip of right panels stays in L1. */
void bn_product_block(const bn_micro *micro, const bn_block *block);
/* The tiles [begin, end) of a gemm (kernels.h), in `scratch`. */
void bn_product_gemm(const bn_micro *micro, const gemm_args *args, int64_t begin, int64_t end, void *scratch);

/* The same with both factors in panels. */
void bn_product_panels(const bn_micro *micro, const gemm_panels_args *args, int64_t begin, int64_t end, void *scratch);

/* Turns integer sums [rows][ldc] of a block of y into y. */
typedef void bn_finish_block(const bitlinear_forward_args *args, const int32_t *sums, int64_t ldc, int64_t top,
                             int64_t rows, int64_t left, int64_t cols);
/* The tiles [begin, end) of a bitlinear_forward. */
void bn_product_bitlinear(const bn_micro *micro, bn_finish_block *finish, const bitlinear_forward_args *args,
                          int64_t begin, int64_t end, void *scratch);

#endif
