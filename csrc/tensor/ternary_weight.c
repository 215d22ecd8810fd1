/* ternary_weight.c: mean |W| over the whole matrix, or over each row, then codes = clamp(round(W / mean)); see
 * quant/ternary.h. */
#include "tensor/ternary_weight.h"

#include <stdlib.h>
#include <string.h>

#include "base/parallel.h"
#include "quant/ternary.h"

void bn_ternary_free(bn_ternary *ternary) {
    if (ternary == NULL) {
        return;
    }
    bn_tensor_release(ternary->panels);
    bn_tensor_release(ternary->turned);
    bn_tensor_release(ternary->scale);
    bn_tensor_release(ternary->tally);
    bn_storage_release(ternary->partial);
    free(ternary);
}

/* What has a scale of its own, one after the other: the matrix, or each of its rows. */
typedef struct scaled_lines {
    int64_t lines, length, blocks; /* blocks of a line */
} scaled_lines;

static scaled_lines lines_of(const bn_tensor *weight) {
    const int64_t lines = weight->channel_scales ? weight->shape[0] : 1;
    const int64_t length = weight->channel_scales ? weight->shape[1] : weight->count;
    return (scaled_lines){lines, length, bn_ceil_div(length, BN_BLOCK)};
}

bn_status bn_ternary_scale_channels(bn_tensor *weight) {
    if (weight->channel_scales) {
        return BN_OK;
    }
    if (weight->ternary != NULL || weight->aside != NULL) {
        return bn_fail(BN_ERR_STATE, "a ternary weight that was %s with one scale cannot have channel scales any more",
                       weight->dtype == BN_PREPARED ? "prepared" : "multiplied");
    }
    weight->channel_scales = true;
    return BN_OK;
}

static bn_status make(const bn_tensor *weight, bn_ternary *t) {
    const bn_backend *backend = bn_backend_of(weight);
    const int64_t rows = weight->shape[0], cols = weight->shape[1];
    const int64_t panels[] = {bn_code_panels_bytes(rows, cols)}, turned[] = {bn_code_panels_bytes(cols, rows)};
    const int64_t tally[] = {rows, 4};
    const scaled_lines scaled = lines_of(weight);
    BN_TRY(bn_tensor_new(backend, BN_I8, 1, panels, &t->panels));
    BN_TRY(bn_tensor_new(backend, BN_I8, 1, turned, &t->turned));
    BN_TRY(bn_tensor_new(backend, BN_F32, 1, &scaled.lines, &t->scale));
    BN_TRY(bn_tensor_new(backend, BN_I32, 2, tally, &t->tally));
    BN_TRY(bn_storage_new(backend, (size_t)(scaled.lines * scaled.blocks) * sizeof(double), &t->partial));
    BN_TRY(bn_tensor_zero(t->panels));
    return bn_tensor_zero(t->turned);
}

static bn_status requantize(const bn_tensor *weight, bn_ternary *t) {
    const bn_backend *backend = bn_backend_of(weight);
    const scaled_lines scaled = lines_of(weight);
    const reduce_blocks_args sums = {
        .x = bn_f32(weight), .partial = t->partial->data, .n = scaled.length, .kind = BN_REDUCE_ABS};
    BN_TRY(bn_run_reduce_blocks(backend, &sums, scaled.lines * scaled.blocks, 4));
    const reduce_finish_args mean = {.partial = t->partial->data,
                                     .out = bn_f32(t->scale),
                                     .count = scaled.blocks,
                                     .factor = 1.0 / (double)bn_max_i64(scaled.length, 1),
                                     .minimum = BN_QUANT_EPS};
    BN_TRY(bn_run_reduce_finish(backend, &mean, scaled.lines, 64));
    const ternarize_args codes = {.w = bn_f32(weight),
                                  .scale = bn_f32(t->scale),
                                  .panels = bn_data(t->panels),
                                  .turned = bn_data(t->turned),
                                  .tally = bn_i32(t->tally),
                                  .rows = weight->shape[0],
                                  .cols = weight->shape[1],
                                  .channel_scales = weight->channel_scales};
    return bn_run_ternarize(backend, &codes, bn_ceil_div(weight->shape[0], BN_PANEL_ROWS), 1);
}

bn_status bn_ternary_refresh(bn_tensor *weight) {
    if (weight->dtype == BN_PREPARED) {
        return BN_OK;
    }
    const uint64_t version = bn_storage_version(weight->storage);
    if (weight->ternary != NULL && weight->ternary->is_held) {
        return BN_OK;
    }
    if (weight->ternary != NULL && weight->ternary->version == version && !bn_storage_is_exported(weight->storage)) {
        return BN_OK;
    }
    if (weight->ternary == NULL) {
        bn_ternary *t = calloc(1, sizeof *t);
        if (t == NULL) {
            return bn_fail(BN_ERR_MEMORY, "out of memory for a ternary weight");
        }
        bn_status status = make(weight, t);
        if (status != BN_OK) {
            bn_ternary_free(t);
            return status;
        }
        weight->ternary = t;
    }
    BN_TRY(requantize(weight, weight->ternary));
    weight->ternary->version = version;
    weight->ternary->refreshes++;
    return BN_OK;
}

/* Codes out of panels on the host, sixteen rows a unit. */
typedef struct code_reading {
    const uint8_t *panels;
    bn_code_form form;
    int64_t rows, cols, tiles;
    int8_t *codes;
} code_reading;

/* A group of 64 bytes to the words whose codes it holds. */
static void spread_bits(const uint8_t *group, uint8_t *words) {
    for (int n = 0; n < 4; n++) {
        for (int i = 0; i < 64; i++) {
            words[64 * n + i] = group[i] >> 2 * n & 3;
        }
    }
}
static void spread_fives(const uint8_t *group, uint8_t *words, uint8_t *fifth) {
    for (int i = 0; i < 64; i++) {
        int digits = group[i];
        for (int n = 0; n < 4; n++, digits /= 3) {
            words[64 * n + i] = (uint8_t)(digits % 3);
        }
        fifth[i] = (uint8_t)digits;
    }
}

/* Bytes of `count` tiles from tile `first` on: one, or five that are packed together. */
static void spread_tiles(const code_reading *r, const uint8_t *panel, int64_t first, int64_t count, uint8_t *out) {
    const uint8_t *from = panel + bn_code_panel_bytes(r->form, first);
    if (r->form == BN_CODES_8) {
        memcpy(out, from, BN_QUANT_TILE);
    } else if (count == 1) {
        for (int group = 0; group < 4; group++) {
            spread_bits(from + 64 * group, out + 256 * group);
        }
    } else {
        for (int group = 0; group < 16; group++) {
            spread_fives(from + 64 * group, out + 256 * group, out + 4 * BN_QUANT_TILE + 64 * group);
        }
    }
}

/* Row `lane` of a tile of bytes, its first `count` columns. */
static void tile_row(const uint8_t *tile, int64_t lane, int64_t count, int8_t *codes) {
    for (int64_t c = 0; c < count; c++) {
        codes[c] = (int8_t)(tile[c / BN_PANEL_DEPTH * 64 + lane * BN_PANEL_DEPTH + c % BN_PANEL_DEPTH] - 1);
    }
}

static void read_panels(void *ctx, int64_t begin, int64_t end, void *scratch) {
    const code_reading *r = ctx;
    uint8_t *bytes = scratch; /* five tiles */
    for (int64_t group = begin; group < end; group++) {
        const uint8_t *panel = r->panels + group * bn_code_panel_bytes(r->form, r->tiles);
        const int64_t first = group * BN_PANEL_ROWS, rows = bn_min_i64(r->rows - first, BN_PANEL_ROWS);
        for (int64_t tile = 0, count; tile < r->tiles; tile += count) {
            count = r->form == BN_CODES_5 && r->tiles - tile >= BN_FIVE_TILES ? BN_FIVE_TILES : 1;
            spread_tiles(r, panel, tile, count, bytes);
            for (int64_t t = 0; t < count; t++) {
                const int64_t c = (tile + t) * BN_QUANT_PAD, cols = bn_min_i64(r->cols - c, BN_QUANT_PAD);
                for (int64_t lane = 0; lane < rows; lane++) {
                    tile_row(bytes + t * BN_QUANT_TILE, lane, cols, r->codes + (first + lane) * r->cols + c);
                }
            }
        }
    }
}

bn_status bn_ternary_codes(bn_tensor *weight, bn_tensor **out) {
    BN_TRY(bn_ternary_refresh(weight));
    const bn_ternary *t = weight->ternary;
    uint8_t *host = malloc(bn_tensor_bytes(t->panels) + 1);
    if (host == NULL) {
        return bn_fail(BN_ERR_MEMORY, "out of memory for %lld codes", (long long)weight->count);
    }
    bn_status status = bn_backend_of(weight)->download(host, bn_data(t->panels), bn_tensor_bytes(t->panels));
    if (status == BN_OK) {
        status = bn_tensor_new(bn_cpu_backend(), BN_I8, 2, weight->shape, out);
    }
    if (status == BN_OK) {
        code_reading r = {
            host,       t->form, weight->shape[0], weight->shape[1], bn_ceil_div(weight->shape[1], BN_QUANT_PAD),
            bn_i8(*out)};
        status = bn_parallel_for(0, bn_ceil_div(r.rows, BN_PANEL_ROWS), 1, read_panels, &r);
        if (status != BN_OK) {
            bn_tensor_release(*out);
        }
    }
    free(host);
    return status;
}

bn_status bn_ternary_scales(bn_tensor *weight, bn_tensor **out) {
    BN_TRY(bn_ternary_refresh(weight));
    const bn_tensor *scale = weight->ternary->scale;
    BN_TRY(bn_tensor_new(bn_cpu_backend(), BN_F32, 1, scale->shape, out));
    const bn_status status = bn_backend_of(weight)->download(bn_data(*out), bn_data(scale), bn_tensor_bytes(scale));
    if (status != BN_OK) {
        bn_tensor_release(*out);
    }
    return status;
}

static bn_status mean_scale(bn_tensor *weight, float *out) {
    bn_tensor *scales;
    BN_TRY(bn_ternary_scales(weight, &scales));
    double sum = 0.0;
    for (int64_t r = 0; r < scales->count; r++) {
        sum += (double)bn_f32(scales)[r];
    }
    *out = (float)(sum / (double)bn_max_i64(scales->count, 1));
    bn_tensor_release(scales);
    return BN_OK;
}

bn_status bn_ternary_read_stats(bn_tensor *weight, bn_ternary_stats *out) {
    BN_TRY(bn_ternary_refresh(weight));
    const bn_ternary *t = weight->ternary;
    const bn_backend *backend = bn_backend_of(weight);
    const int64_t rows = weight->shape[0];
    *out = (bn_ternary_stats){0};
    BN_TRY(mean_scale(weight, &out->scale));
    int32_t *tally = malloc(bn_tensor_bytes(t->tally) + 1);
    if (tally == NULL) {
        return bn_fail(BN_ERR_MEMORY, "out of memory for the tally of %lld rows", (long long)rows);
    }
    bn_status status = backend->download(tally, bn_data(t->tally), bn_tensor_bytes(t->tally));
    for (int64_t r = 0; status == BN_OK && r < rows; r++) {
        out->minus += tally[4 * r];
        out->zero += tally[4 * r + 1];
        out->plus += tally[4 * r + 2];
        out->flipped += t->refreshes > 1 && !t->is_held ? tally[4 * r + 3] : 0;
    }
    free(tally);
    return status;
}
