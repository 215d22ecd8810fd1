/*
 * held_weight.c: ternary codes that outlive the values they were made from; see ternary_weight.h.
 *
 * A held weight has two forms, the held one and that of its present values. What is in use is weight->ternary, the
 * other is weight->aside, and to choose is to exchange two pointers.
 */
#include "tensor/ternary_weight.h"

static void exchange(bn_tensor *weight) {
    bn_ternary *other = weight->aside;
    weight->aside = weight->ternary;
    weight->ternary = other;
}

static bool is_held(const bn_ternary *t) { return t != NULL && t->is_held; }

bn_status bn_ternary_use_held(bn_tensor *weight, bool held) {
    if (held && !is_held(weight->ternary) && !is_held(weight->aside)) {
        return bn_fail(BN_ERR_STATE, "no codes of this weight of %lld x %lld are held", (long long)weight->shape[0],
                       (long long)weight->shape[1]);
    }
    if (is_held(held ? weight->aside : weight->ternary)) {
        exchange(weight);
    }
    return BN_OK;
}

void bn_ternary_release(bn_tensor *weight) {
    if (is_held(weight->aside)) {
        exchange(weight);
    }
    if (!is_held(weight->ternary)) {
        return;
    }
    bn_ternary_free(weight->aside);
    weight->aside = NULL;
    weight->ternary->is_held = false;
    weight->ternary->version = 0;
}

bn_status bn_ternary_hold(bn_tensor *weight) {
    if (weight->dtype != BN_F32 || weight->ndim != 2) {
        bn_shape_text text;
        return bn_fail(BN_ERR_SHAPE, "codes are held of an f32 matrix, not of %s of shape %s",
                       bn_dtype_name(weight->dtype), bn_shape_print(weight, &text));
    }
    bn_ternary_release(weight);
    BN_TRY(bn_ternary_refresh(weight));
    weight->ternary->is_held = true;
    return BN_OK;
}

/* Codes as f32, rounded by a scale of one: those codes again, in every layout. */
static bn_status put_codes(const bn_tensor *codes, const bn_tensor *scale, bn_ternary *t) {
    const bn_backend *backend = bn_backend_of(t->scale);
    const float one = 1.0f;
    bn_tensor *real;
    BN_TRY(bn_tensor_new(backend, BN_F32, 2, codes->shape, &real));
    const convert_args convert = {bn_data(codes), bn_data(real), codes->count, BN_I8, BN_F32};
    bn_status status = bn_run_convert(backend, &convert, bn_ceil_div(codes->count, BN_BLOCK), 2);
    status = status == BN_OK ? backend->upload(bn_data(t->scale), &one, sizeof one) : status;
    if (status == BN_OK) {
        const ternarize_args args = {.w = bn_f32(real),
                                     .scale = bn_f32(t->scale),
                                     .panels = bn_data(t->panels),
                                     .turned = bn_data(t->turned),
                                     .tally = bn_i32(t->tally),
                                     .rows = codes->shape[0],
                                     .cols = codes->shape[1]};
        status = bn_run_ternarize(backend, &args, bn_ceil_div(codes->shape[0], BN_PANEL_ROWS), 1);
    }
    bn_tensor_release(real);
    return status == BN_OK ? backend->upload(bn_data(t->scale), bn_f32(scale), bn_tensor_bytes(scale)) : status;
}

bn_status bn_ternary_hold_codes(bn_tensor *weight, const bn_tensor *codes, const bn_tensor *scale) {
    if (codes->dtype != BN_I8 || !bn_same_shape(codes, weight)) {
        bn_shape_text a, b;
        return bn_fail(BN_ERR_SHAPE, "the codes to hold are %s of shape %s, not i8 of the weight's %s",
                       bn_dtype_name(codes->dtype), bn_shape_print(codes, &a), bn_shape_print(weight, &b));
    }
    if (bn_backend_of(codes) != bn_backend_of(weight) || bn_backend_of(scale) != bn_backend_of(weight)) {
        return bn_fail(BN_ERR_VALUE, "the codes to hold are on %s, their scales on %s, the weight on %s",
                       bn_backend_of(codes)->name, bn_backend_of(scale)->name, bn_backend_of(weight)->name);
    }
    const int64_t scales = weight->channel_scales ? weight->shape[0] : 1;
    if (scale->dtype != BN_F32 || scale->count != scales) {
        return bn_fail(BN_ERR_SHAPE, "the codes to hold have %lld scales in %s, the weight has %lld in f32",
                       (long long)scale->count, bn_dtype_name(scale->dtype), (long long)scales);
    }
    BN_TRY(bn_ternary_require_codes(codes));
    BN_TRY(bn_ternary_hold(weight));
    /* Of no version of the weight, and of none before: a forward pass that read other codes, held ones too, cannot be
     * walked back over these. */
    weight->ternary->version = UINT64_MAX - weight->ternary->refreshes;
    return put_codes(codes, scale, weight->ternary);
}
