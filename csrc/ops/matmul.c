/* matmul.c: y = a b, a (..., m, k), b (k, n). da = dy b^T, db = a^T dy, the leading dimensions of a summed as rows. */
#include "ops/op.h"

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

static bn_status forward(bn_node *n) {
    const bn_tensor *a = n->inputs[0], *b = n->inputs[1];
    const int64_t k = b->shape[0], cols = b->shape[1];
    return product(a, rows_of(bn_f32(a), k), rows_of(bn_f32(b), cols), bn_f32(n->output), bn_row_count(a), cols, k,
                   false);
}

static bn_status backward(bn_node *n) {
    bn_tensor *a = n->inputs[0], *b = n->inputs[1];
    const int64_t rows = bn_row_count(a), k = b->shape[0], cols = b->shape[1];
    const gemm_operand dy = rows_of(bn_f32(n->output->grad), cols);
    float *target;
    bool accumulate;
    BN_TRY(bn_grad_target(a, &target, &accumulate));
    if (target != NULL) {
        BN_TRY(product(a, dy, transposed(rows_of(bn_f32(b), cols)), target, rows, k, cols, accumulate));
    }
    BN_TRY(bn_grad_target(b, &target, &accumulate));
    if (target != NULL) {
        BN_TRY(product(a, transposed(rows_of(bn_f32(a), k)), dy, target, k, cols, rows, accumulate));
    }
    return BN_OK;
}

const bn_op bn_op_matmul = {"matmul", forward, backward};

bn_status bn_matmul(bn_tensor *a, bn_tensor *b, bn_tensor **out) {
    BN_TRY(bn_require_dtype("matmul", "a", a, BN_F32));
    BN_TRY(bn_require_dtype("matmul", "b", b, BN_F32));
    BN_TRY(bn_require_ndim("matmul", "b", b, 2));
    BN_TRY(bn_require_same_device("matmul", a, b));
    if (a->ndim < 2 || bn_last_dim(a) != b->shape[0]) {
        bn_shape_text x, y;
        return bn_fail(BN_ERR_SHAPE, "matmul: shapes %s and %s do not fit (a (..., m, k), b (k, n))",
                       bn_shape_print(a, &x), bn_shape_print(b, &y));
    }
    bn_node n = {.op = &bn_op_matmul, .inputs = {a, b}};
    BN_TRY(bn_output_last(&n, a, b->shape[1]));
    return bn_tape_run(&n, out);
}
