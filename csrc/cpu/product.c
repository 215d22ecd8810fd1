/*
 * product.c: the driver of every matrix product: f32, bf16 and int8, whatever the instruction set (Goto and van de
 * Geijn 2008). c is made in blocks whose sums stay in L2, in scratch, from the first value of p to the last; a strip
 * of right panels stays in L1 while the left panels of the block pass through from L2. Every output is one chain of
 * sums in the order of p, so no block size, tile or thread count can change it.
 *
 * Sums in scratch against sums in c itself, bf16 on AMX with both factors in panels (Sapphire Rapids, one core, L3 25
 * GB/s): 2048 x 2048 x 768 from 31 to 42 % of the peak, because rows of c that lie a power of two apart share few sets
 * of the caches; 2048 x 768 x 2048 stays at 50 %. A block alone, all of it in L2, is multiplied at 85 %: what is
 * missing is the time that factors and c take between L2 and L3, which no prefetch that was tried could hide.
 */
#include "base/cpu_features.h"
#include "cpu/micro.h"
#include "kernels/tiles.h"

/* A block's columns are whole register tiles of every set (16, 32 or 48). The rows of its sums are sixteen floats
 * further apart, lest they share sets of L1. */
#define SUMS_COLS (BN_BLOCK_COLUMNS + 16)

/* A part of c: a unit, or a block of one. */
typedef struct part {
    int64_t top, rows, left, cols;
} part;

static part unit_of(int64_t unit, int64_t m, int64_t n, int64_t tile_m, int64_t tile_n) {
    const int64_t across = bn_ceil_div(n, tile_n), top = unit / across * tile_m, left = unit % across * tile_n;
    return (part){top, bn_min_i64(m - top, tile_m), left, bn_min_i64(n - left, tile_n)};
}

/* Tiles along p so that a strip takes five sixths of L1, in equal slices. */
static int64_t slice_steps(const bn_micro *micro, int64_t steps) {
    const int64_t strip = micro->cols / BN_TILE_LANES * BN_TILE_BYTES;
    const int64_t most = bn_max_i64(bn_cpu_cache_bytes(1) * 5 / 6 / strip, 1);
    return bn_max_i64(bn_ceil_div(steps, bn_max_i64(bn_ceil_div(steps, most), 1)), 1);
}

void bn_product_block(const bn_micro *micro, const bn_block *block) {
    const int64_t most = slice_steps(micro, block->steps);
    bn_block b = *block;
    for (int64_t step = 0; step == 0 || step < block->steps; step += most) {
        b.left = (const char *)block->left + step * BN_TILE_BYTES;
        b.right = (const char *)block->right + step * BN_TILE_BYTES;
        b.steps = bn_min_i64(block->steps - step, most);
        b.resume = block->resume || step > 0;
        micro->multiply(&b);
    }
}

/* ---- factors ----------------------------------------------------------------------------------------------------- */

/* One side of a product: in panels, or packed slice by slice into scratch. */
typedef struct factor {
    const char *panels;    /* the first one */
    bn_code_form form;     /* of codes: BN_CODES_8 needs no unpacking */
    int64_t panel_bytes;   /* from one to the next */
    const gemm_operand *x; /* what to pack; NULL: it is in panels */
    bool left;
    char *room; /* for a packed slice */
    float *by;  /* factors of the values of p in it */
} factor;

/* What the values of p in [first, first + depth) are multiplied by; NULL where that is one. */
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

/* A slice along p: `steps` tiles from tile `step` on, `depth` values of p. */
typedef struct slice {
    int64_t step, steps, depth;
    const float *left_by, *right_by;
} slice;

static bn_source source_of(const gemm_operand *x) {
    return x->layout == BN_TILED   ? BN_SOURCE_TILES
           : x->layout == BN_CODES ? BN_SOURCE_CODES
           : x->dtype == BN_F32    ? BN_SOURCE_F32
                                   : BN_SOURCE_I8;
}

/* Lanes [lane, + lanes) of a slice in panels. */
static const char *panels_of(const bn_micro *micro, const factor *f, const slice *s, int64_t lane, int64_t lanes,
                             int64_t *panel_bytes) {
    if (f->x == NULL && f->form == BN_CODES_8) {
        *panel_bytes = f->panel_bytes;
        return f->panels + lane / BN_TILE_LANES * f->panel_bytes + s->step * BN_TILE_BYTES;
    }
    *panel_bytes = s->steps * BN_TILE_BYTES;
    if (f->form != BN_CODES_8) {
        for (int64_t i = 0; i < lanes; i += BN_TILE_LANES) {
            const char *panel = f->panels + (lane + i) / BN_TILE_LANES * f->panel_bytes;
            micro->unpack(f->form, panel + bn_code_panel_bytes(f->form, s->step), s->steps,
                          f->room + i / BN_TILE_LANES * *panel_bytes);
        }
        return f->room;
    }
    const bn_packing packing = {.data = f->x->data,
                                .source = source_of(f->x),
                                .left = f->left,
                                .lane_stride = f->left ? f->x->row_stride : f->x->col_stride,
                                .p_stride = f->left ? f->x->col_stride : f->x->row_stride,
                                .factor = f->left ? s->left_by : s->right_by,
                                .first_lane = lane,
                                .lanes = lanes,
                                .first_p = s->step * bn_micro_depth(micro),
                                .depth = s->depth,
                                .panels = f->room,
                                .panel_bytes = *panel_bytes};
    micro->pack(&packing);
    return f->room;
}

/* ---- blocks ------------------------------------------------------------------------------------------------------ */

typedef struct product {
    const bn_micro *micro;
    factor left, right;
    int64_t k, steps;   /* of all of p: values and tiles */
    int64_t most_steps; /* of a slice */
    int64_t most_rows;  /* of a block */
    void *sums;         /* (rows, SUMS_COLS), f32 or i32 */
} product;

/* `left` and `right` as the caller has them: this gives out the scratch. A block's sums take two fifths of L2, its
 * slice of the left factor about as much. */
static product plan(const bn_micro *micro, int64_t k, factor left, factor right, void *scratch) {
    product x = {.micro = micro, .left = left, .right = right, .k = k, .steps = bn_micro_steps(micro, k)};
    x.most_steps = slice_steps(micro, x.steps);
    if (right.form == BN_CODES_5) { /* a slice begins where five tiles do */
        x.most_steps = bn_max_i64(x.most_steps / BN_FIVE_TILES, 1) * BN_FIVE_TILES;
    }
    const int64_t depth = x.most_steps * bn_micro_depth(micro), panel = x.most_steps * BN_TILE_BYTES;
    char *next = scratch;
    x.left.left = true;
    x.right.left = false;
    x.left.by = (float *)(void *)next;
    x.right.by = x.left.by + depth;
    next = (char *)(x.right.by + depth);
    x.right.room = next;
    next += micro->cols / BN_TILE_LANES * panel;
    x.sums = next;
    const int64_t room = BN_SCRATCH_BYTES - (next - (char *)scratch), row = SUMS_COLS * (int64_t)sizeof(float);
    const int64_t fitting = room / (row + (left.x == NULL ? 0 : panel / BN_TILE_LANES));
    const int64_t most =
        bn_min_i64(bn_cpu_cache_bytes(2) * 2 / 5 / (BN_BLOCK_COLUMNS * (int64_t)sizeof(float)), fitting);
    x.most_rows = bn_max_i64(bn_min_i64(most, BN_BLOCK_ROWS) / BN_TILE_ROWS * BN_TILE_ROWS, BN_TILE_ROWS);
    x.left.room = next + x.most_rows * row;
    return x;
}

/* The sums of a part of c, added to those that are there if `resume`. The first slice runs even where k is 0: it is
 * what clears the sums. */
static void multiply_part(const product *x, part t, bool resume) {
    for (slice s = {0}; s.step == 0 || s.step < x->steps; s.step += x->most_steps) {
        const int64_t first = s.step * bn_micro_depth(x->micro);
        s.steps = bn_min_i64(x->steps - s.step, x->most_steps);
        s.depth = bn_min_i64(x->k - first, s.steps * bn_micro_depth(x->micro));
        s.left_by = x->left.x == NULL ? NULL : p_factors(x->left.x, first, s.depth, x->left.by);
        s.right_by = x->right.x == NULL ? NULL : p_factors(x->right.x, first, s.depth, x->right.by);
        bn_block block = {.steps = s.steps, .ldc = SUMS_COLS, .rows = t.rows, .resume = resume || s.step > 0};
        block.left = panels_of(x->micro, &x->left, &s, t.top, t.rows, &block.left_panel);
        for (int64_t j = 0; j < t.cols; j += x->micro->cols) {
            block.cols = bn_min_i64(t.cols - j, x->micro->cols);
            block.right = panels_of(x->micro, &x->right, &s, t.left + j, block.cols, &block.right_panel);
            block.c = (float *)x->sums + j;
            x->micro->multiply(&block);
        }
    }
}

/* The block of unit t at row i and column j of it. */
static part block_at(const product *x, part t, int64_t i, int64_t j) {
    return (part){t.top + i, bn_min_i64(t.rows - i, x->most_rows), t.left + j,
                  bn_min_i64(t.cols - j, BN_BLOCK_COLUMNS)};
}
#define EACH_BLOCK(block, x, t)                                                                                        \
    for (int64_t i_ = 0; i_ < (t).rows; i_ += (x)->most_rows)                                                          \
        for (int64_t j_ = 0; j_ < (t).cols; j_ += BN_BLOCK_COLUMNS)                                                    \
            for (part block = block_at(x, t, i_, j_), *once_ = &block; once_ != NULL; once_ = NULL)

/* ---- products in floats ------------------------------------------------------------------------------------------ */

static void multiply_into(const product *x, part unit, float *c, int64_t ldc, bool accumulate) {
    float *sums = x->sums;
    EACH_BLOCK(t, x, unit) {
        float *at = c + t.top * ldc + t.left;
        if (accumulate) {
            x->micro->move(at, ldc, sums, SUMS_COLS, t.rows, t.cols);
        }
        multiply_part(x, t, accumulate);
        x->micro->move(sums, SUMS_COLS, at, ldc, t.rows, t.cols);
    }
}

static factor in_panels(const bn_micro *micro, const void *panels, int64_t k) {
    return (factor){.panels = panels, .panel_bytes = bn_micro_steps(micro, k) * BN_TILE_BYTES};
}

void bn_product_gemm(const bn_micro *micro, const gemm_args *g, int64_t begin, int64_t end, void *scratch) {
    const factor left = g->a.layout == BN_PANELS ? in_panels(micro, g->a.data, g->k) : (factor){.x = &g->a};
    const product x = plan(micro, g->k, left, (factor){.x = &g->b}, scratch);
    for (int64_t unit = begin; unit < end; unit++) {
        multiply_into(&x, unit_of(unit, g->m, g->n, g->tile_m, g->tile_n), g->c, g->ldc, g->accumulate);
    }
}

void bn_product_panels(const bn_micro *micro, const gemm_panels_args *g, int64_t begin, int64_t end, void *scratch) {
    const product x = plan(micro, g->k, in_panels(micro, g->left, g->k), in_panels(micro, g->right, g->k), scratch);
    for (int64_t unit = begin; unit < end; unit++) {
        multiply_into(&x, unit_of(unit, g->m, g->n, g->tile_m, g->tile_n), g->c, g->ldc, g->accumulate);
    }
}

/* ---- int8 activations by ternary codes --------------------------------------------------------------------------- */

void bn_product_bitlinear(const bn_micro *micro, bn_finish_block *finish, const bitlinear_forward_args *a,
                          int64_t begin, int64_t end, void *scratch) {
    const factor q = {.panels = (const char *)a->q, .panel_bytes = a->q_stride / BN_QUANT_PAD * BN_TILE_BYTES};
    const factor codes = {.panels = (const char *)a->panels,
                          .form = a->form,
                          .panel_bytes = bn_code_panel_bytes(a->form, bn_micro_steps(micro, a->k))};
    const product x = plan(micro, a->k, q, codes, scratch);
    for (int64_t unit = begin; unit < end; unit++) {
        const part whole = unit_of(unit, a->m, a->n, a->tile_m, a->tile_n);
        EACH_BLOCK(t, &x, whole) {
            multiply_part(&x, t, false);
            finish(a, x.sums, SUMS_COLS, t.top, t.rows, t.left, t.cols);
        }
    }
}
