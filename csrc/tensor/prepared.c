/* prepared.c: ternary weights for products alone, from codes that were made elsewhere; see ternary_weight.h. */
#include <stdlib.h>

#include "quant/ternary.h"
#include "tensor/ternary_weight.h"

/* The kernel's tally keeps no count of codes out of range: bytes are looked at here, so many at a time. */
#define LOOK_BYTES ((int64_t)64 << 10)

bn_status bn_ternary_require_codes(const bn_tensor *codes) {
    int8_t part[LOOK_BYTES];
    for (int64_t first = 0, count; bn_backend_of(codes)->has_values && first < codes->count; first += count) {
        count = bn_min_i64(codes->count - first, LOOK_BYTES);
        BN_TRY(bn_backend_of(codes)->download(part, bn_i8(codes) + first, (size_t)count));
        for (int64_t i = 0; i < count; i++) {
            if (part[i] < -1 || part[i] > 1) {
                return bn_fail(BN_ERR_VALUE, "code %lld of a ternary weight is %d, not -1, 0 or 1",
                               (long long)(first + i), part[i]);
            }
        }
    }
    return BN_OK;
}

static bn_status require_fifths(const bn_ternary *t, int64_t rows) {
    for (int64_t r = 0; r < rows; r++) {
        if (bn_i32(t->tally)[4 * r + 3] != 0) {
            return bn_fail(BN_ERR_VALUE, "row %lld of a ternary weight has %d bytes above 242, which are no five codes",
                           (long long)r, bn_i32(t->tally)[4 * r + 3]);
        }
    }
    return BN_OK;
}

const bn_backend *bn_ternary_source_device(const bn_ternary_source *source) {
    return source->codes == NULL ? bn_cpu_backend() : bn_backend_of(source->codes);
}

static bn_status fill(const bn_ternary_source *source, bn_ternary *t) {
    const bn_backend *backend = bn_ternary_source_device(source);
    const int64_t scales = source->channel_scales ? source->rows : 1;
    const int64_t groups = bn_ceil_div(source->rows, BN_PANEL_ROWS), tiles = bn_ceil_div(source->cols, BN_QUANT_PAD);
    const int64_t panels[] = {groups * bn_code_panel_bytes(t->form, tiles)}, tally[] = {source->rows, 4};
    BN_TRY(bn_tensor_new(backend, BN_I8, 1, panels, &t->panels));
    BN_TRY(bn_tensor_new(backend, BN_F32, 1, &scales, &t->scale));
    BN_TRY(bn_tensor_new(backend, BN_I32, 2, tally, &t->tally));
    BN_TRY(backend->upload(bn_data(t->scale), source->scale, (size_t)scales * sizeof(float)));
    const prepare_codes_args args = {.codes = source->codes == NULL ? NULL : bn_i8(source->codes),
                                     .fifths = source->fifths,
                                     .panels = bn_data(t->panels),
                                     .form = t->form,
                                     .tally = bn_i32(t->tally),
                                     .rows = source->rows,
                                     .cols = source->cols};
    BN_TRY(bn_run_prepare_codes(backend, &args, groups, 1));
    return source->codes == NULL ? require_fifths(t, source->rows) : BN_OK;
}

bn_status bn_ternary_prepare(const bn_ternary_source *source, bn_code_form form, bn_tensor **out) {
    if (source->codes != NULL) {
        BN_TRY(bn_ternary_require_codes(source->codes));
    }
    const int64_t shape[] = {source->rows, source->cols};
    BN_TRY(bn_tensor_new(bn_ternary_source_device(source), BN_PREPARED, 2, shape, out));
    bn_ternary *t = calloc(1, sizeof *t);
    bn_status status = t == NULL ? bn_fail(BN_ERR_MEMORY, "out of memory for a ternary weight") : BN_OK;
    if (status == BN_OK) {
        t->form = form;
        t->refreshes = 1;
        (*out)->ternary = t;
        (*out)->channel_scales = source->channel_scales;
        status = fill(source, t);
    }
    if (status != BN_OK) {
        bn_tensor_release(*out);
    }
    return status;
}
