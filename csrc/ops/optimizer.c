/* optimizer.c: flat parameters, gradient norm, AdamW. */
#include "ops/optimizer.h"

#include <string.h>

#include "ops/op.h"

#define FLAT_STEP (BN_ALIGN / (int64_t)sizeof(float))

static bn_status flat_size(bn_tensor *const *params, int64_t count, int64_t *out) {
    int64_t total = 0;
    for (int64_t i = 0; i < count; i++) {
        const bn_tensor *p = params[i];
        BN_TRY(bn_require_dtype("flatten", "parameter", p, BN_F32));
        if (bn_backend_of(p) != bn_backend_of(params[0])) {
            return bn_fail(BN_ERR_VALUE, "flatten: parameter %lld is on %s, the first on %s", (long long)i,
                           bn_backend_of(p)->name, bn_backend_of(params[0])->name);
        }
        if (!bn_is_leaf(p)) {
            return bn_fail(BN_ERR_STATE, "flatten: parameter %lld was made by an op", (long long)i);
        }
        if (bn_storage_is_exported(p->storage)) {
            return bn_fail(BN_ERR_STATE,
                           "parameter %lld has NumPy views alive, which would no longer follow it; delete them first",
                           (long long)i);
        }
        total += bn_round_up(p->count, FLAT_STEP);
    }
    *out = total;
    return BN_OK;
}

/* Makes p a window of flat with the same values. */
static bn_status move(bn_tensor *p, bn_tensor *flat, size_t offset) {
    bn_tensor *window;
    BN_TRY(bn_tensor_window(flat->storage, offset, BN_F32, p->ndim, p->shape, &window));
    bn_status status = bn_tensor_copy(window, p);
    if (status == BN_OK) {
        bn_storage_release(p->storage);
        p->storage = bn_storage_retain(flat->storage);
        p->offset = offset;
    }
    bn_tensor_release(window);
    return status;
}

static bn_status move_grad(bn_tensor *p, bn_tensor *flat_grad, size_t offset) {
    bn_tensor *window;
    BN_TRY(bn_tensor_window(flat_grad->storage, offset, BN_F32, p->ndim, p->shape, &window));
    if (p->grad != NULL && !p->grad_is_stale) {
        bn_status status = bn_tensor_copy(window, p->grad);
        if (status != BN_OK) {
            bn_tensor_release(window);
            return status;
        }
    } else {
        p->grad_is_stale = true;
    }
    bn_tensor_release(p->grad);
    p->grad = window;
    return BN_OK;
}

bn_status bn_flatten(bn_tensor *const *params, int64_t count, bn_tensor **flat, bn_tensor **flat_grad) {
    int64_t total;
    if (count == 0) {
        return bn_fail(BN_ERR_VALUE, "flatten: there are no parameters");
    }
    BN_TRY(flat_size(params, count, &total));
    const bn_backend *backend = bn_backend_of(params[0]);
    BN_TRY(bn_tensor_new(backend, BN_F32, 1, &total, flat));
    bn_status status = bn_tensor_new(backend, BN_F32, 1, &total, flat_grad);
    if (status != BN_OK) {
        bn_tensor_release(*flat);
        return status;
    }
    status = bn_tensor_zero(*flat);
    status = status == BN_OK ? bn_tensor_zero(*flat_grad) : status;
    size_t offset = 0;
    for (int64_t i = 0; status == BN_OK && i < count; i++) {
        status = move(params[i], *flat, offset);
        status = status == BN_OK ? move_grad(params[i], *flat_grad, offset) : status;
        offset += (size_t)bn_round_up(params[i]->count, FLAT_STEP) * sizeof(float);
    }
    if (status != BN_OK) {
        bn_tensor_release(*flat);
        bn_tensor_release(*flat_grad);
    }
    backend->memory_trim(); /* nothing will have the size of what the parameters left */
    return status;
}

bn_status bn_clip_grad_norm(const bn_tensor *grad, float max_norm, bn_tensor *norm, bn_tensor *factor) {
    const bn_backend *backend = bn_backend_of(grad);
    bn_storage *partial;
    BN_TRY(bn_require_writable("clip_grad_norm", norm));
    BN_TRY(bn_require_writable("clip_grad_norm", factor));
    BN_TRY(bn_storage_new(backend, (size_t)bn_blocks(grad->count) * sizeof(double), &partial));
    const reduce_blocks_args squares = {bn_f32(grad), partial->data, grad->count, BN_REDUCE_SQUARES};
    bn_status status = bn_run_reduce_blocks(backend, &squares, bn_blocks(grad->count), 4);
    if (status == BN_OK) {
        const clip_factor_args clip = {partial->data, bn_f32(norm), bn_f32(factor), bn_blocks(grad->count), max_norm};
        status = bn_run_clip_factor(backend, &clip, 1, 1);
    }
    bn_storage_release(partial);
    return status;
}

/* 1 - beta^step by repeated multiplication in double: the same bits everywhere, and exact enough (step < 2^31 squarings
 * are at most 31 roundings of 2^-53). */
static double correction(float beta, int64_t step) {
    double power = 1.0, base = (double)beta;
    for (int64_t e = step; e > 0; e >>= 1) {
        if (e & 1) {
            power *= base;
        }
        base *= base;
    }
    return 1.0 - power;
}

bn_status bn_adamw(bn_tensor *param, const bn_tensor *grad, bn_tensor *m, bn_tensor *v, const bn_tensor *factor,
                   const bn_adamw_options *o) {
    if (grad->count != param->count || m->count != param->count || v->count != param->count) {
        return bn_fail(BN_ERR_SHAPE, "adamw: %lld parameters, %lld gradients, moments of %lld and %lld",
                       (long long)param->count, (long long)grad->count, (long long)m->count, (long long)v->count);
    }
    BN_TRY(bn_require_dtype("adamw", "param", param, BN_F32));
    BN_TRY(bn_require_dtype("adamw", "grad", grad, BN_F32));
    BN_TRY(bn_require_dtype("adamw", "v", v, m->dtype));
    if (m->dtype != BN_F32 && m->dtype != BN_BF16) {
        return bn_fail(BN_ERR_DTYPE, "adamw: moments are f32 or bf16, not %s", bn_dtype_name(m->dtype));
    }
    BN_TRY(bn_require_writable("adamw", param));
    BN_TRY(bn_require_writable("adamw", m));
    BN_TRY(bn_require_writable("adamw", v));
    if (o->step < 1) {
        return bn_fail(BN_ERR_VALUE, "adamw: steps count from 1, not %lld", (long long)o->step);
    }
    const adamw_args args = {.param = bn_f32(param),
                             .grad = bn_f32(grad),
                             .m = bn_data(m),
                             .v = bn_data(v),
                             .factor = factor == NULL ? NULL : bn_f32(factor),
                             .n = param->count,
                             .decay_end = o->decay_end,
                             .step = o->step,
                             .lr = o->lr,
                             .beta1 = o->beta1,
                             .beta2 = o->beta2,
                             .eps = o->eps,
                             .weight_decay = o->weight_decay,
                             .correction1 = (float)correction(o->beta1, o->step),
                             .correction2 = (float)correction(o->beta2, o->step),
                             .moments = m->dtype};
    bn_storage_touch(param->storage);
    bn_storage_touch(m->storage);
    bn_storage_touch(v->storage);
    return bn_run_adamw(bn_backend_of(param), &args, bn_blocks(param->count), 2);
}
