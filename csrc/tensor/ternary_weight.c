/* ternary_weight.c: mean |W| over the whole matrix, then codes = clamp(round(W / mean)); see quant/ternary.h. */
#include "tensor/ternary_weight.h"

#include <stdlib.h>

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

static bn_status make(const bn_tensor *weight, bn_ternary *t) {
    const bn_backend *backend = bn_backend_of(weight);
    const int64_t rows = weight->shape[0], cols = weight->shape[1];
    const int64_t panels[] = {bn_code_panels_bytes(rows, cols)}, turned[] = {bn_code_panels_bytes(cols, rows)};
    const int64_t one[] = {1}, tally[] = {rows, 4};
    BN_TRY(bn_tensor_new(backend, BN_I8, 1, panels, &t->panels));
    BN_TRY(bn_tensor_new(backend, BN_I8, 1, turned, &t->turned));
    BN_TRY(bn_tensor_new(backend, BN_F32, 1, one, &t->scale));
    BN_TRY(bn_tensor_new(backend, BN_I32, 2, tally, &t->tally));
    BN_TRY(bn_storage_new(backend, (size_t)bn_ceil_div(weight->count, BN_BLOCK) * sizeof(double), &t->partial));
    BN_TRY(bn_tensor_zero(t->panels));
    return bn_tensor_zero(t->turned);
}

static bn_status requantize(const bn_tensor *weight, bn_ternary *t) {
    const bn_backend *backend = bn_backend_of(weight);
    const int64_t blocks = bn_ceil_div(weight->count, BN_BLOCK);
    const reduce_blocks_args sums = {
        .x = bn_f32(weight), .partial = t->partial->data, .n = weight->count, .kind = BN_REDUCE_ABS};
    BN_TRY(bn_run_reduce_blocks(backend, &sums, blocks, 4));
    const reduce_finish_args mean = {.partial = t->partial->data,
                                     .out = bn_f32(t->scale),
                                     .count = blocks,
                                     .factor = 1.0 / (double)bn_max_i64(weight->count, 1),
                                     .minimum = BN_QUANT_EPS};
    BN_TRY(bn_run_reduce_finish(backend, &mean, 1, 1));
    const ternarize_args codes = {.w = bn_f32(weight),
                                  .scale = bn_f32(t->scale),
                                  .panels = bn_data(t->panels),
                                  .turned = bn_data(t->turned),
                                  .tally = bn_i32(t->tally),
                                  .rows = weight->shape[0],
                                  .cols = weight->shape[1]};
    return bn_run_ternarize(backend, &codes, bn_ceil_div(weight->shape[0], BN_PANEL_ROWS), 1);
}

bn_status bn_ternary_refresh(bn_tensor *weight) {
    if (weight->dtype == BN_PREPARED) {
        return BN_OK;
    }
    const uint64_t version = bn_storage_version(weight->storage);
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

/* The code at (row, col) in panels on the host. */
static int8_t code_in(const uint8_t *panels, bn_code_form form, int64_t row, int64_t col, int64_t tiles) {
    static const int powers[] = {1, 3, 9, 27, 81};
    const int64_t lane = row % BN_PANEL_ROWS, tile = col / BN_QUANT_PAD;
    const int64_t word = col % BN_QUANT_PAD / BN_PANEL_DEPTH, byte = lane * BN_PANEL_DEPTH + col % BN_PANEL_DEPTH;
    const uint8_t *panel = panels + row / BN_PANEL_ROWS * bn_code_panel_bytes(form, tiles);
    if (form == BN_CODES_8) {
        return (int8_t)(panel[tile * BN_QUANT_TILE + 64 * word + byte] - 1);
    }
    const int64_t five = tile / BN_FIVE_TILES * BN_FIVE_TILES;
    if (form == BN_CODES_5 && five + BN_FIVE_TILES <= tiles) {
        const bool last = tile % BN_FIVE_TILES == BN_FIVE_TILES - 1;
        const int64_t group = last ? word : 4 * (tile - five) + word / 4;
        const int digits = panel[bn_code_panel_bytes(form, five) + 64 * group + byte];
        return (int8_t)(digits / powers[last ? 4 : word % 4] % 3 - 1);
    }
    const int bits = panel[bn_code_panel_bytes(form, tile) + 64 * (word / 4) + byte];
    return (int8_t)((bits >> 2 * (word % 4) & 3) - 1);
}

bn_status bn_ternary_codes(bn_tensor *weight, bn_tensor **out) {
    BN_TRY(bn_ternary_refresh(weight));
    const bn_ternary *t = weight->ternary;
    const int64_t rows = weight->shape[0], cols = weight->shape[1], tiles = bn_ceil_div(cols, BN_QUANT_PAD);
    uint8_t *host = malloc(bn_tensor_bytes(t->panels) + 1);
    if (host == NULL) {
        return bn_fail(BN_ERR_MEMORY, "out of memory for %lld codes", (long long)weight->count);
    }
    bn_status status = bn_backend_of(weight)->download(host, bn_data(t->panels), bn_tensor_bytes(t->panels));
    if (status == BN_OK) {
        status = bn_tensor_new(bn_cpu_backend(), BN_I8, 2, weight->shape, out);
    }
    for (int64_t r = 0; status == BN_OK && r < rows; r++) {
        for (int64_t c = 0; c < cols; c++) {
            bn_i8(*out)[r * cols + c] = code_in(host, t->form, r, c, tiles);
        }
    }
    free(host);
    return status;
}

bn_status bn_ternary_read_stats(bn_tensor *weight, bn_ternary_stats *out) {
    BN_TRY(bn_ternary_refresh(weight));
    const bn_ternary *t = weight->ternary;
    const bn_backend *backend = bn_backend_of(weight);
    const int64_t rows = weight->shape[0];
    *out = (bn_ternary_stats){0};
    BN_TRY(backend->download(&out->scale, bn_data(t->scale), sizeof out->scale));
    int32_t *tally = malloc(bn_tensor_bytes(t->tally) + 1);
    if (tally == NULL) {
        return bn_fail(BN_ERR_MEMORY, "out of memory for the tally of %lld rows", (long long)rows);
    }
    bn_status status = backend->download(tally, bn_data(t->tally), bn_tensor_bytes(t->tally));
    for (int64_t r = 0; status == BN_OK && r < rows; r++) {
        out->minus += tally[4 * r];
        out->zero += tally[4 * r + 1];
        out->plus += tally[4 * r + 2];
        out->flipped += t->refreshes > 1 ? tally[4 * r + 3] : 0;
    }
    free(tally);
    return status;
}
