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

bn_status bn_quantized_fill(bn_tensor *x) {
    bn_quantized *z = x->quantized;
    const quantize_rows_args args = {.x = bn_f32(x),
                                     .q = bn_i8(z->q),
                                     .act_scale = bn_f32(z->act_scale),
                                     .row_sum = bn_i32(z->row_sum),
                                     .rows = bn_row_count(x),
                                     .cols = bn_last_dim(x),
                                     .q_stride = z->q->shape[1]};
    z->version = bn_storage_version(x->storage);
    return bn_run_quantize_rows(bn_backend_of(x), &args, args.rows, 16);
}

bool bn_quantized_is_fresh(const bn_tensor *x) {
    return x->quantized != NULL && x->quantized->version == bn_storage_version(x->storage) &&
           !bn_storage_is_exported(x->storage);
}
