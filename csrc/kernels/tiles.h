/*
 * tiles.h: how a matrix product is cut into units of work. A unit should be large, because each packs its own copy of
 * the rows of a it needs, and there should be a few for every worker, so that the last is not waited for long. The cut
 * never changes a result: every output is computed in one order whatever tile it falls into.
 */
#ifndef BN_KERNELS_TILES_H
#define BN_KERNELS_TILES_H

#include "kernels/kernels.h"

BN_EXTERN_C_BEGIN

typedef struct bn_tiles {
    int64_t tile_m, tile_n; /* for gemm_args or bitlinear_forward_args */
    int64_t units, grain;   /* for bn_run_gemm or bn_run_bitlinear_forward */
} bn_tiles;

/* Tiles are multiples of these: every CPU's register tile (2 to 32 rows; 16, 32 or 48 columns) divides them. */
#define BN_TILE_ROWS 32
#define BN_TILE_COLUMNS 96
/* Multiply-adds that outweigh waking a thread and packing for it: 10 microseconds at 100 G/s. */
#define BN_TILE_WORK (1 << 20)

static inline int64_t bn_tile_of(int64_t size, int64_t parts, int64_t multiple) {
    return bn_max_i64(bn_round_up(bn_ceil_div(size, parts), multiple), multiple);
}

/* Rows and columns of a block whose sums stay in a 2 MiB L2 (cpu/product.c). */
#define BN_BLOCK_ROWS 512
#define BN_BLOCK_COLUMNS 384

/* Cuts (m, n) into tiles of one block at most, and halves the longer side until there are three units a worker. */
static inline bn_tiles bn_product_tiles(int64_t m, int64_t n, int64_t k, int workers) {
    const int64_t wanted = workers > 1 ? 3 * (int64_t)workers : 1;
    int64_t down = bn_max_i64(bn_ceil_div(m, BN_BLOCK_ROWS), 1);
    int64_t across = bn_max_i64(bn_ceil_div(n, BN_BLOCK_COLUMNS), 1);
    bn_tiles t = {bn_tile_of(m, down, BN_TILE_ROWS), bn_tile_of(n, across, BN_TILE_COLUMNS), 1, 1};
    while (down * across < wanted && t.tile_m * t.tile_n * k > BN_TILE_WORK) {
        if (t.tile_m > BN_TILE_ROWS && (t.tile_m >= t.tile_n || t.tile_n == BN_TILE_COLUMNS)) {
            down *= 2;
        } else if (t.tile_n > BN_TILE_COLUMNS) {
            across *= 2;
        } else {
            break;
        }
        t.tile_m = bn_tile_of(m, down, BN_TILE_ROWS);
        t.tile_n = bn_tile_of(n, across, BN_TILE_COLUMNS);
    }
    t.units = bn_ceil_div(m, t.tile_m) * bn_ceil_div(n, t.tile_n);
    t.grain = bn_ceil_div(BN_TILE_WORK / 4, t.tile_m * t.tile_n * k + 1);
    return t;
}

/* Few rows read every code once and are done with it: units of some 64 KiB of codes, so that no thread waits long. */
static inline bn_tiles bn_few_rows_tiles(int64_t n) {
    return (bn_tiles){BN_TILE_ROWS, BN_TILE_COLUMNS, bn_ceil_div(n, BN_TILE_COLUMNS), 1};
}

BN_EXTERN_C_END
#endif
