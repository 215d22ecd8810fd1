/* quantized.c: per-token absmax int8; see quant/ternary.h. */
#include "tensor/quantized.h"

#include <stdlib.h>

void bn_quantized_free(bn_quantized *quantized) {
    if (quantized == NULL) {
        return;
    }
    bn_tensor_release(quantized->q);
    bn_tensor_release(quantized->act_scale);
    bn_tensor_release(quantized->row_sum);
    free(quantized);
}

bn_status bn_quantized_make(bn_tensor *x) {
    if (x->quantized != NULL) {
        return BN_OK;
    }
    bn_quantized *z = calloc(1, sizeof *z);
    if (z == NULL) {
        return bn_fail(BN_ERR_MEMORY, "out of memory for a quantized activation");
    }
    const int64_t rows[] = {bn_row_count(x)};
    const int64_t padded[] = {bn_round_up(rows[0], BN_QUANT_ROWS), bn_round_up(bn_last_dim(x), BN_QUANT_PAD)};
    bn_status status = bn_tensor_new(bn_backend_of(x), BN_I8, 2, padded, &z->q);
    if (status == BN_OK) {
        status = bn_tensor_new(bn_backend_of(x), BN_F32, 1, rows, &z->act_scale);
    }
    if (status == BN_OK) {
        status = bn_tensor_new(bn_backend_of(x), BN_I32, 1, rows, &z->row_sum);
    }
    if (status != BN_OK) {
        bn_quantized_free(z);
        return status;
    }
    x->quantized = z;
    return BN_OK;
}

bn_status bn_quantized_new(const char *op, const bn_backend *backend, int ndim, const int64_t *shape, bn_tensor **out) {
    if (ndim < 1 || shape[ndim - 1] > BN_QUANT_MOST_COLS) {
        return bn_fail(BN_ERR_SHAPE, "%s: a quantized result has rows of at most %lld channels", op,
                       (long long)BN_QUANT_MOST_COLS);
    }
    BN_TRY(bn_tensor_new(backend, BN_Q8, ndim, shape, out));
    bn_status status = bn_quantized_make(*out);
    if (status != BN_OK) {
        bn_tensor_release(*out);
        return status;
    }
    (*out)->quantized->bits = 8;
    return BN_OK;
}

bn_int8_rows bn_quantized_rows(const bn_tensor *x) {
    const bn_quantized *z = x->quantized;
    return (bn_int8_rows){bn_i8(z->q), bn_f32(z->act_scale), bn_i32(z->row_sum), z->q->shape[1]};
}

void bn_quantized_written(bn_tensor *x) { x->quantized->version = bn_storage_version(x->storage); }

bn_status bn_quantized_fill(bn_tensor *x, int bits) {
    const quantize_rows_args args = {
        .x = bn_f32(x), .out = bn_quantized_rows(x), .rows = bn_row_count(x), .cols = bn_last_dim(x), .bits = bits};
    x->quantized->bits = bits;
    bn_quantized_written(x);
    return bn_run_quantize_rows(bn_backend_of(x), &args, args.rows, 16);
}

bool bn_quantized_is_fresh(const bn_tensor *x, int bits) {
    return x->quantized != NULL && x->quantized->bits == bits &&
           x->quantized->version == bn_storage_version(x->storage) && !bn_storage_is_exported(x->storage);
}
