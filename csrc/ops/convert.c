/*
 * convert.c: y = x in another element type: f32 <-> bf16 (round to nearest even), and i8, i32, ternary2 codes or q8 to
 * f32. Between floats the gradient (always f32) passes unchanged.
 */
#include "ops/op.h"
#include "tensor/quantized.h"

static bn_status forward(bn_node *n) {
    const bn_tensor *x = n->inputs[0];
    if (x->dtype == BN_Q8) {
        const dequantize_rows_args rows = {bn_quantized_rows(x), bn_f32(n->output), bn_row_count(x), bn_last_dim(x)};
        return bn_run_dequantize_rows(bn_backend_of(x), &rows, rows.rows, 16);
    }
    const convert_args args = {bn_data(x), bn_data(n->output), x->count, x->dtype, n->output->dtype};
    return bn_run_convert(bn_backend_of(x), &args, bn_blocks(x->count), 2);
}

static bn_status backward(bn_node *n) { return bn_grad_pass(n->inputs[0], n->output->grad); }

const bn_op bn_op_convert = {"convert", forward, backward};

bn_status bn_convert(bn_tensor *x, bn_dtype dtype, bn_tensor **out) {
    const bool to_f32 = dtype == BN_F32 && x->dtype != BN_F32;
    if (!to_f32 && !(dtype == BN_BF16 && x->dtype == BN_F32) && !(dtype == BN_I8 && x->dtype == BN_TERNARY2)) {
        return bn_fail(BN_ERR_DTYPE, "convert: %s to %s is not offered", bn_dtype_name(x->dtype), bn_dtype_name(dtype));
    }
    bn_node n = {.op = &bn_op_convert, .inputs = {x}};
    BN_TRY(bn_tensor_new(bn_backend_of(x), dtype, x->ndim, x->shape, &n.output));
    return bn_tape_run(&n, out);
}
