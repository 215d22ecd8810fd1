/*
 * rmsnorm.c: y = x * rsqrt(mean(x^2) + eps) * weight over the last dimension (Zhang and Sennrich 2019, eq. 4), in f32
 * or straight into its int8 form. With g = dy * weight and r = the reciprocal root:  dx = r * (g - x * r^2 * mean(g *
 * x)),  dweight = sum dy * x * r.
 */
#include "ops/op.h"
#include "tensor/quantized.h"

enum { RSTD };

static const float *gain_of(const bn_node *n) { return n->inputs[1] == NULL ? NULL : bn_f32(n->inputs[1]); }

static bn_status forward(bn_node *n) {
    const bn_tensor *x = n->inputs[0];
    rmsnorm_forward_args args = {.x = bn_f32(x),
                                 .gain = gain_of(n),
                                 .y = bn_f32(n->output),
                                 .rstd = bn_f32(n->saved[RSTD]),
                                 .rows = bn_row_count(x),
                                 .C = bn_last_dim(x),
                                 .eps = *bn_node_params(n, float)};
    if (n->output->dtype == BN_Q8) {
        args.int8 = bn_quantized_rows(n->output);
        bn_quantized_written(n->output);
    }
    return bn_run_rmsnorm_forward(bn_backend_of(x), &args, args.rows, 16);
}

/* dgain (+)= the sum of its bands' parts. */
static bn_status sum_bands(const bn_tensor *gain, const float *parts, int64_t bands, float *dgain, bool accumulate) {
    const column_sum_args args = {
        .x = parts, .out = dgain, .rows = bands, .cols = gain->count, .accumulate = accumulate};
    return bn_run_column_sum(bn_backend_of(gain), &args, bn_ceil_div(gain->count, BN_COLUMNS), 1);
}

static bn_status backward(bn_node *n) {
    bn_tensor *x = n->inputs[0], *gain = n->inputs[1];
    const bn_backend *backend = bn_backend_of(x);
    float *dx, *dgain;
    bool accumulate, accumulate_gain;
    BN_TRY(bn_grad_target(x, &dx, &accumulate));
    BN_TRY(bn_grad_target(gain, &dgain, &accumulate_gain)); /* after dx also where x is the gain */
    rmsnorm_backward_args args = {.dy = bn_f32(n->output->grad),
                                  .x = bn_f32(x),
                                  .gain = gain_of(n),
                                  .rstd = bn_f32(n->saved[RSTD]),
                                  .dx = dx,
                                  .rows = bn_row_count(x),
                                  .C = bn_last_dim(x),
                                  .accumulate = accumulate};
    const int64_t bands = bn_ceil_div(args.rows, BN_NORM_BAND);
    bn_storage *parts = NULL;
    if (dgain != NULL) {
        BN_TRY(bn_storage_new(backend, (size_t)(bands * args.C) * sizeof(float), &parts));
        args.dgain = parts->data;
    }
    bn_status status = bn_run_rmsnorm_backward(backend, &args, bands, 1);
    if (status == BN_OK && dgain != NULL) {
        status = sum_bands(gain, args.dgain, bands, dgain, accumulate_gain);
    }
    bn_storage_release(parts);
    return status;
}

const bn_op bn_op_rmsnorm = {"rmsnorm", forward, backward};

bn_status bn_rmsnorm(bn_tensor *x, bn_tensor *weight, float eps, bool quantized, bn_tensor **out) {
    BN_TRY(bn_require_dtype("rmsnorm", "x", x, BN_F32));
    if (x->ndim < 1) {
        return bn_fail(BN_ERR_SHAPE, "rmsnorm: x is a scalar");
    }
    if (weight != NULL) {
        BN_TRY(bn_require_dtype("rmsnorm", "weight", weight, BN_F32));
        if (weight->ndim != 1 || weight->count != bn_last_dim(x)) {
            bn_shape_text text;
            return bn_fail(BN_ERR_SHAPE, "rmsnorm: x has %lld channels, weight has shape %s", (long long)bn_last_dim(x),
                           bn_shape_print(weight, &text));
        }
    }
    bn_node n = {.op = &bn_op_rmsnorm, .inputs = {x, weight}};
    *bn_node_params(&n, float) = eps;
    const int64_t rows[] = {bn_row_count(x)};
    BN_NODE_TRY(&n, bn_output_like_or_q8(&n, x, quantized));
    BN_NODE_TRY(&n, bn_tensor_new(bn_backend_of(x), BN_F32, 1, rows, &n.saved[RSTD]));
    return bn_tape_run(&n, out);
}
