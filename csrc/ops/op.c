/* op.c: checks and launches shared by the op files. */
#include "ops/op.h"

#include "kernels/tiles.h"
#include "tensor/quantized.h"

bn_status bn_require_dtype(const char *op, const char *argument, const bn_tensor *t, bn_dtype dtype) {
    if (t->dtype != dtype) {
        return bn_fail(BN_ERR_DTYPE, "%s: %s is %s, expected %s", op, argument, bn_dtype_name(t->dtype),
                       bn_dtype_name(dtype));
    }
    return BN_OK;
}

bn_status bn_require_ndim(const char *op, const char *argument, const bn_tensor *t, int ndim) {
    if (t->ndim != ndim) {
        bn_shape_text text;
        return bn_fail(BN_ERR_SHAPE, "%s: %s has shape %s, expected %d dimensions", op, argument,
                       bn_shape_print(t, &text), ndim);
    }
    return BN_OK;
}

bn_status bn_require_same_shape(const char *op, const bn_tensor *a, const bn_tensor *b) {
    if (!bn_same_shape(a, b)) {
        bn_shape_text x, y;
        return bn_fail(BN_ERR_SHAPE, "%s: shapes %s and %s differ", op, bn_shape_print(a, &x), bn_shape_print(b, &y));
    }
    return BN_OK;
}

static bn_status check_index(const char *op, const char *what, const index_check_args *args,
                             const bn_backend *backend) {
    BN_TRY(bn_run_index_check(backend, args, 1, 1));
    if (args->fault->row >= 0) {
        return bn_fail(BN_ERR_INDEX, "%s: %s %lld at place %lld is outside [0, %lld)", op, what,
                       (long long)(args->fault->value + args->offset), (long long)args->fault->row,
                       (long long)args->limit);
    }
    return BN_OK;
}

bn_status bn_require_index(const char *op, const char *what, const bn_tensor *index, int64_t limit,
                           const int32_t *ignore) {
    bn_fault fault = {.row = -1};
    const index_check_args args = {.index = bn_i32(index),
                                   .fault = &fault,
                                   .n = index->count,
                                   .limit = limit,
                                   .ignore = ignore == NULL ? 0 : *ignore,
                                   .has_ignore = ignore != NULL};
    return check_index(op, what, &args, bn_backend_of(index));
}

bn_status bn_require_positions(const char *op, const bn_tensor *start, int64_t length, int64_t limit) {
    bn_fault fault = {.row = -1};
    const index_check_args first = {.index = bn_i32(start), .fault = &fault, .n = start->count, .limit = limit};
    index_check_args last = first;
    last.offset = bn_max_i64(length, 1) - 1;
    BN_TRY(check_index(op, "position", &first, bn_backend_of(start)));
    return check_index(op, "position", &last, bn_backend_of(start));
}

bn_status bn_output_like(bn_node *node, const bn_tensor *x) {
    return bn_tensor_new(bn_backend_of(x), BN_F32, x->ndim, x->shape, &node->output);
}

bn_status bn_output_like_or_q8(bn_node *node, const bn_tensor *x, bool quantized) {
    return quantized ? bn_quantized_new(node->op->name, bn_backend_of(x), x->ndim, x->shape, &node->output)
                     : bn_output_like(node, x);
}

bn_status bn_output_last(bn_node *node, const bn_tensor *x, int64_t last) {
    int64_t shape[BN_MAX_DIMS];
    for (int i = 0; i < x->ndim; i++) {
        shape[i] = x->shape[i];
    }
    shape[x->ndim - 1] = last;
    return bn_tensor_new(bn_backend_of(x), BN_F32, x->ndim, shape, &node->output);
}

bn_status bn_launch_axpby(const bn_tensor *like, float alpha, const float *a, float beta, const float *b,
                          int64_t bias_n, float *out) {
    const axpby_args args = {
        .a = a, .b = b, .out = out, .n = like->count, .bias_n = bias_n, .alpha = alpha, .beta = beta};
    return bn_run_axpby(bn_backend_of(like), &args, bn_blocks(like->count), 2);
}

bn_status bn_launch_gemm(const bn_backend *backend, bn_precision precision, gemm_args args) {
    const bn_tiles tiles = bn_product_tiles(args.m, args.n, args.k, backend->parallelism());
    args.tile_m = tiles.tile_m;
    args.tile_n = tiles.tile_n;
    return precision != BN_EXACT ? bn_run_gemm_bf16(backend, &args, tiles.units, tiles.grain)
                                 : bn_run_gemm(backend, &args, tiles.units, tiles.grain);
}
