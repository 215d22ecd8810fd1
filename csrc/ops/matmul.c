/*
 * matmul.c: y = a b, a (..., m, k), b (k, n). da = dy b^T, db = a^T dy, the leading dimensions of a summed as rows.
 * Where b has a's leading dimensions too, each of its matrices meets its own of a, one product after another.
 */
#include "ops/op.h"

#include <string.h>

static bn_status product(const bn_tensor *like, gemm_operand a, gemm_operand b, float *c, int64_t m, int64_t n,
                         int64_t k, bool accumulate) {
    const gemm_args args = {.a = a, .b = b, .c = c, .m = m, .n = n, .k = k, .ldc = n, .accumulate = accumulate};
    return bn_launch_gemm(bn_backend_of(like), BN_EXACT, args);
}

static gemm_operand rows_of(const float *data, int64_t cols) {
    return (gemm_operand){.data = data, .row_stride = cols, .col_stride = 1, .dtype = BN_F32};
}

static gemm_operand transposed(gemm_operand x) {
    const int64_t rows = x.row_stride;
    x.row_stride = x.col_stride;
    x.col_stride = rows;
    return x;
}

/* How many products there are, each of `rows` rows of a. */
static int64_t products_of(const bn_tensor *a, const bn_tensor *b, int64_t *rows) {
    int64_t count = 1;
    for (int i = 0; i < b->ndim - 2; i++) {
        count *= b->shape[i];
    }
    *rows = count > 0 ? bn_row_count(a) / count : 0;
    return count;
}

static bn_status forward(bn_node *n) {
    const bn_tensor *a = n->inputs[0], *b = n->inputs[1];
    const int64_t k = bn_last_dim(a), cols = bn_last_dim(b);
    int64_t rows;
    const int64_t count = products_of(a, b, &rows);
    for (int64_t i = 0; i < count; i++) {
        const gemm_operand left = rows_of(bn_f32(a) + i * rows * k, k), right = rows_of(bn_f32(b) + i * k * cols, cols);
        BN_TRY(product(a, left, right, bn_f32(n->output) + i * rows * cols, rows, cols, k, false));
    }
    return BN_OK;
}

static bn_status backward(bn_node *n) {
    bn_tensor *a = n->inputs[0], *b = n->inputs[1];
    const int64_t k = bn_last_dim(a), cols = bn_last_dim(b);
    int64_t rows;
    const int64_t count = products_of(a, b, &rows);
    const float *dy = bn_f32(n->output->grad);
    float *target;
    bool accumulate;
    /* One side after the other: in a square both gradients are the same memory. */
    BN_TRY(bn_grad_target(a, &target, &accumulate));
    for (int64_t i = 0; target != NULL && i < count; i++) {
        const gemm_operand up = rows_of(dy + i * rows * cols, cols), right = rows_of(bn_f32(b) + i * k * cols, cols);
        BN_TRY(product(a, up, transposed(right), target + i * rows * k, rows, k, cols, accumulate));
    }
    BN_TRY(bn_grad_target(b, &target, &accumulate));
    for (int64_t i = 0; target != NULL && i < count; i++) {
        const gemm_operand up = rows_of(dy + i * rows * cols, cols), left = rows_of(bn_f32(a) + i * rows * k, k);
        BN_TRY(product(a, transposed(left), up, target + i * k * cols, k, cols, rows, accumulate));
    }
    return BN_OK;
}

const bn_op bn_op_matmul = {"matmul", forward, backward};

bn_status bn_matmul(bn_tensor *a, bn_tensor *b, bn_tensor **out) {
    BN_TRY(bn_require_dtype("matmul", "a", a, BN_F32));
    BN_TRY(bn_require_dtype("matmul", "b", b, BN_F32));
    bool fits = a->ndim >= 2 && b->ndim >= 2 && bn_last_dim(a) == b->shape[b->ndim - 2];
    if (b->ndim > 2) {
        fits = fits && a->ndim == b->ndim && memcmp(a->shape, b->shape, (size_t)(b->ndim - 2) * sizeof *b->shape) == 0;
    }
    if (!fits) {
        bn_shape_text x, y;
        return bn_fail(BN_ERR_SHAPE, "matmul: shapes %s and %s do not fit (a (..., m, k), b (k, n) or (..., k, n))",
                       bn_shape_print(a, &x), bn_shape_print(b, &y));
    }
    bn_node n = {.op = &bn_op_matmul, .inputs = {a, b}};
    BN_TRY(bn_output_last(&n, a, bn_last_dim(b)));
    return bn_tape_run(&n, out);
}
