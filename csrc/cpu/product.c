/*
 * product.c: the driver of every matrix product: f32, bf16 and int8, whatever the instruction set (Goto and van de
 * Geijn 2008). A strip of right panels stays in L1 while the left panels of a block pass through from L2; c rests in
 * memory between blocks of p. Every output is one chain of sums in the order of p, so no block size, tile or thread
 * count can change it.
 */
#include "base/cpu_features.h"
#include "cpu/micro.h"

/* Tiles along p so that a strip takes five sixths of L1, in equal blocks. */
static int64_t block_steps(const bn_micro *micro, int64_t steps) {
    const int64_t strip = micro->cols / BN_TILE_LANES * BN_TILE_BYTES;
    const int64_t most = bn_max_i64(bn_cpu_cache_bytes(1) * 5 / 6 / strip, 1);
    return bn_max_i64(bn_ceil_div(steps, bn_max_i64(bn_ceil_div(steps, most), 1)), 1);
}

/* The part of c that is a unit: tiles lie row by row over (m, n), the last ones cut off. */
typedef struct tile {
    int64_t top, rows, left, cols;
} tile;

static tile tile_of(int64_t unit, int64_t m, int64_t n, int64_t tile_m, int64_t tile_n) {
    const int64_t across = bn_ceil_div(n, tile_n), top = unit / across * tile_m, left = unit % across * tile_n;
    return (tile){top, bn_min_i64(m - top, tile_m), left, bn_min_i64(n - left, tile_n)};
}

/* ---- factors that have to be packed ------------------------------------------------------------------------------ */

typedef struct gemm_block {
    const bn_micro *micro;
    const gemm_args *g;
    int64_t steps;             /* tiles along p in a block */
    float *left_by, *right_by; /* factors of each p */
    char *strip, *panels;
    int64_t most_rows;
} gemm_block;

static gemm_block gemm_layout(const bn_micro *micro, const gemm_args *g, void *scratch) {
    const int64_t steps = block_steps(micro, bn_micro_steps(micro, g->k)), depth = steps * bn_micro_depth(micro);
    gemm_block b = {.micro = micro, .g = g, .steps = steps, .strip = scratch};
    b.left_by = (float *)(void *)(b.strip + steps * BN_TILE_BYTES * (micro->cols / BN_TILE_LANES));
    b.right_by = b.left_by + depth;
    b.panels = (char *)(b.right_by + depth);
    const int64_t room = bn_min_i64(BN_SCRATCH_BYTES - (b.panels - (char *)scratch), bn_cpu_cache_bytes(2) / 2);
    b.most_rows = bn_max_i64(room / (steps * BN_TILE_BYTES), 1) * BN_TILE_LANES;
    return b;
}

/* The factors of p in [first, first + depth) for one side; NULL where all are one. */
static const float *p_factors(const gemm_operand *x, int64_t first, int64_t depth, float *out) {
    if (x->scale == NULL && x->depth_scale == NULL) {
        return NULL;
    }
    const float scale = x->scale != NULL ? x->scale[0] : 1.0f;
    for (int64_t p = 0; p < depth; p++) {
        out[p] = x->depth_scale != NULL ? scale * x->depth_scale[first + p] : scale;
    }
    return out;
}

static bn_packing packing_of(const gemm_block *b, bool left) {
    const gemm_operand *x = left ? &b->g->a : &b->g->b;
    return (bn_packing){.data = x->data,
                        .dtype = x->dtype,
                        .tiled = x->tiled,
                        .left = left,
                        .lane_stride = left ? x->row_stride : x->col_stride,
                        .p_stride = left ? x->col_stride : x->row_stride,
                        .panels = left ? b->panels : b->strip,
                        .panel_bytes = b->steps * BN_TILE_BYTES};
}

/* The part of c at (top, left), with rows that fit the scratch. The first block of p runs even where k is 0: it is what
 * clears c. */
static void gemm_rows(const gemm_block *b, int64_t top, int64_t rows, int64_t left, int64_t cols) {
    const gemm_args *g = b->g;
    const int64_t most = b->steps * bn_micro_depth(b->micro);
    bn_packing a = packing_of(b, true), strip = packing_of(b, false);
    a.first_lane = top;
    a.lanes = rows;
    for (int64_t first = 0; first == 0 || first < g->k; first += most) {
        const int64_t depth = bn_min_i64(g->k - first, most);
        a.first_p = strip.first_p = first;
        a.depth = strip.depth = depth;
        a.factor = p_factors(&g->a, first, depth, b->left_by);
        strip.factor = p_factors(&g->b, first, depth, b->right_by);
        b->micro->pack(&a);
        for (int64_t j = 0; j < cols; j += b->micro->cols) {
            strip.first_lane = left + j;
            strip.lanes = bn_min_i64(cols - j, b->micro->cols);
            b->micro->pack(&strip);
            const bn_block block = {.left = b->panels,
                                    .right = b->strip,
                                    .left_panel = a.panel_bytes,
                                    .right_panel = strip.panel_bytes,
                                    .steps = bn_micro_steps(b->micro, depth),
                                    .c = g->c + top * g->ldc + left + j,
                                    .ldc = g->ldc,
                                    .rows = rows,
                                    .cols = strip.lanes,
                                    .resume = first > 0 || g->accumulate};
            b->micro->multiply(&block);
        }
    }
}

void bn_product_gemm(const bn_micro *micro, const gemm_args *g, int64_t begin, int64_t end, void *scratch) {
    const gemm_block b = gemm_layout(micro, g, scratch);
    for (int64_t unit = begin; unit < end; unit++) {
        const tile t = tile_of(unit, g->m, g->n, g->tile_m, g->tile_n);
        for (int64_t i = 0; i < t.rows; i += b.most_rows) {
            gemm_rows(&b, t.top + i, bn_min_i64(t.rows - i, b.most_rows), t.left, t.cols);
        }
    }
}

/* ---- factors that were packed before ----------------------------------------------------------------------------- */

void bn_product_block(const bn_micro *micro, const bn_block *block) {
    const int64_t most = block_steps(micro, block->steps);
    bn_block b = *block;
    for (int64_t step = 0; step == 0 || step < block->steps; step += most) {
        b.left = (const char *)block->left + step * BN_TILE_BYTES;
        b.right = (const char *)block->right + step * BN_TILE_BYTES;
        b.steps = bn_min_i64(block->steps - step, most);
        b.resume = block->resume || step > 0;
        micro->multiply(&b);
    }
}

void bn_product_panels(const bn_micro *micro, const gemm_panels_args *g, int64_t begin, int64_t end) {
    const int64_t steps = bn_micro_steps(micro, g->k), panel = steps * BN_TILE_BYTES;
    for (int64_t unit = begin; unit < end; unit++) {
        const tile t = tile_of(unit, g->m, g->n, g->tile_m, g->tile_n);
        const bn_block block = {.left = (const char *)g->left + t.top / BN_TILE_LANES * panel,
                                .right = (const char *)g->right + t.left / BN_TILE_LANES * panel,
                                .left_panel = panel,
                                .right_panel = panel,
                                .steps = steps,
                                .c = g->c + t.top * g->ldc + t.left,
                                .ldc = g->ldc,
                                .rows = t.rows,
                                .cols = t.cols,
                                .resume = g->accumulate};
        bn_product_block(micro, &block);
    }
}

/* ---- factors that lie in tiles: int8 activations, ternary codes -------------------------------------------------- */

/* Rows of y whose integer sums are kept while a strip runs through p: 96 KiB of them for 48 columns. */
enum { BITLINEAR_ROWS = 512 };

static void bitlinear_strip(const bn_micro *micro, const bitlinear_forward_args *a, int64_t top, int64_t rows,
                            int64_t left, int64_t cols, int32_t *sums) {
    const int64_t steps = bn_ceil_div(a->k, BN_QUANT_PAD), panel = steps * BN_TILE_BYTES;
    const int64_t rows_of_q = a->q_stride / BN_QUANT_PAD * BN_TILE_BYTES;
    const bn_block block = {.left = a->q + top / BN_TILE_LANES * rows_of_q,
                            .right = a->panels + left / BN_TILE_LANES * panel,
                            .left_panel = rows_of_q,
                            .right_panel = panel,
                            .steps = steps,
                            .c = sums,
                            .ldc = micro->cols,
                            .rows = rows,
                            .cols = bn_round_up(cols, BN_TILE_LANES)};
    bn_product_block(micro, &block);
}

void bn_product_bitlinear(const bn_micro *micro, bn_finish_strip *finish, const bitlinear_forward_args *a,
                          int64_t begin, int64_t end, void *scratch) {
    for (int64_t unit = begin; unit < end; unit++) {
        const tile t = tile_of(unit, a->m, a->n, a->tile_m, a->tile_n);
        for (int64_t j = 0; j < t.cols; j += micro->cols) {
            const int64_t cols = bn_min_i64(t.cols - j, micro->cols);
            for (int64_t i = 0; i < t.rows; i += BITLINEAR_ROWS) {
                const int64_t rows = bn_min_i64(t.rows - i, BITLINEAR_ROWS);
                bitlinear_strip(micro, a, t.top + i, rows, t.left + j, cols, scratch);
                finish(a, scratch, micro->cols, t.top + i, rows, t.left + j, cols);
            }
        }
    }
}
