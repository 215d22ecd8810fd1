/* compact.c: rounds the rows of a matrix; see compact.h. */
#include "tensor/compact.h"

#include <stdlib.h>

void bn_compact_free(bn_compact *compact) {
    if (compact == NULL) {
        return;
    }
    bn_tensor_release(compact->panels);
    bn_tensor_release(compact->scale);
    bn_tensor_release(compact->norms);
    bn_tensor_release(compact->exact);
    free(compact);
}

static bn_status check(const bn_tensor *weight, int bits, bool screen) {
    if (weight->ndim != 2 || !(weight->dtype == BN_BF16 || (weight->dtype == BN_F32 && !screen))) {
        return bn_fail(BN_ERR_DTYPE, "a compact matrix is made from %s (rows, cols), not from %s with %d dimensions",
                       screen ? "bf16" : "f32 or bf16", bn_dtype_name(weight->dtype), weight->ndim);
    }
    if (weight->shape[1] < 1 || weight->shape[1] > BN_COMPACT_MOST_COLS) {
        return bn_fail(BN_ERR_SHAPE, "a compact matrix has 1 to %d columns, not %lld", BN_COMPACT_MOST_COLS,
                       (long long)weight->shape[1]);
    }
    if (bits != 8 && bits != 6) {
        return bn_fail(BN_ERR_VALUE, "a compact matrix has 8 or 6 bits a weight, not %d", bits);
    }
    return BN_OK;
}

static bn_status fill(bn_tensor *weight, bn_compact *c) {
    const bn_backend *backend = bn_backend_of(weight);
    const int64_t rows = weight->shape[0], cols = weight->shape[1];
    const int64_t bytes[] = {bn_compact_bytes(rows, cols, c->bits)}, norms[] = {rows, 2};
    BN_TRY(bn_tensor_new(backend, BN_I8, 1, bytes, &c->panels));
    BN_TRY(bn_tensor_new(backend, BN_F32, 1, &rows, &c->scale));
    BN_TRY(bn_tensor_new(backend, BN_F32, 2, norms, &c->norms));
    const compact_rows_args args = {.w = bn_data(weight),
                                    .dtype = weight->dtype,
                                    .bits = c->bits,
                                    .panels = bn_data(c->panels),
                                    .scale = bn_f32(c->scale),
                                    .norms = bn_f32(c->norms),
                                    .rows = rows,
                                    .cols = cols};
    return bn_run_compact_rows(backend, &args, bn_ceil_div(rows, BN_PANEL_ROWS), 1);
}

bn_status bn_compact_make(bn_tensor *weight, int bits, bool screen, bn_tensor **out) {
    BN_TRY(check(weight, bits, screen));
    BN_TRY(bn_tensor_new(bn_backend_of(weight), BN_COMPACT, 2, weight->shape, out));
    bn_compact *c = calloc(1, sizeof *c);
    bn_status status = c == NULL ? bn_fail(BN_ERR_MEMORY, "out of memory for a compact matrix") : BN_OK;
    if (status == BN_OK) {
        c->bits = bits;
        c->exact = screen ? bn_tensor_retain(weight) : NULL;
        (*out)->compact = c;
        status = fill(weight, c);
    }
    if (status != BN_OK) {
        bn_tensor_release(*out);
    }
    return status;
}
