/*
 * time_product.c: see time_product.h. Four tensors, x (rows, in), weight (out, in), dy (rows, out) and the result.
 */
#include "ops/time_product.h"

#include "base/clock.h"
#include "base/rng.h"
#include "ops/projection.h"
#include "tensor/quantized.h"
#include "tensor/ternary_weight.h"

/* Returns new, f32 of standard normal numbers. */
static bn_status random_matrix(int64_t rows, int64_t cols, uint64_t stream, bn_tensor **out) {
    const int64_t shape[] = {rows, cols};
    BN_TRY(bn_tensor_new(bn_cpu_backend(), BN_F32, 2, shape, out));
    bn_storage_touch((*out)->storage);
    return bn_rng_fill_normal(bn_f32(*out), (*out)->count, 0, stream, 0.0f, 1.0f);
}

static bn_status run(bn_product product, const bn_projection *p, const float *dy, float *result) {
    const int64_t rows = bn_projection_rows(p);
    const bn_precision precision = bn_get_precision();
    const bn_grad_memory nowhere = {NULL, false};
    switch (product) {
    case BN_PRODUCT_DX:
        return bn_projection_backward(p, precision, 0, rows, dy, (bn_grad_memory){result, false}, nowhere);
    case BN_PRODUCT_DW:
        return bn_projection_backward(p, precision, 0, rows, dy, nowhere, (bn_grad_memory){result, false});
    default:
        return bn_projection_forward(p, precision, 0, rows, NULL, result);
    }
}

static bn_status time_runs(bn_product product, const bn_projection *p, const bn_tensor *dy, bn_tensor *result,
                           int repeats, double *seconds) {
    if (p->ternary) {
        BN_TRY(bn_ternary_refresh(p->weight));
        BN_TRY(bn_quantized_make(p->x));
        BN_TRY(bn_quantized_fill(p->x, p->activation_bits));
    }
    BN_TRY(run(product, p, bn_f32(dy), bn_f32(result)));
    for (int i = 0; i < repeats; i++) {
        const double start = bn_seconds();
        BN_TRY(run(product, p, bn_f32(dy), bn_f32(result)));
        seconds[i] = bn_seconds() - start;
    }
    return BN_OK;
}

bn_status bn_time_product(bn_product product, bool ternary, int64_t rows, int64_t in, int64_t out, int repeats,
                          double *seconds) {
    const int64_t shapes[BN_PRODUCTS][2] = {{rows, out}, {rows, in}, {out, in}};
    bn_tensor *dy = NULL, *result = NULL;
    bn_projection p = {.ternary = ternary, .activation_bits = 8};
    bn_status status = random_matrix(rows, in, 0, &p.x);
    status = status != BN_OK ? status : random_matrix(out, in, 1, &p.weight);
    status = status != BN_OK ? status : random_matrix(rows, out, 2, &dy);
    status = status != BN_OK ? status : bn_tensor_new(bn_cpu_backend(), BN_F32, 2, shapes[product], &result);
    status = status != BN_OK ? status : time_runs(product, &p, dy, result, repeats, seconds);
    bn_tensor_release(result);
    bn_tensor_release(dy);
    bn_tensor_release(p.weight);
    bn_tensor_release(p.x);
    return status;
}
