/*
 * test_kernels.c: every kernel of kernels.def, on every instruction set this CPU can run, gives the bits that the
 * scalar set gives, whole or one unit at a time in reverse, and writes nothing outside its outputs.
 *
 * Prints one line per kernel, its name and a hash of all scalar outputs: the text is the same on every machine, so the
 * output of an x86 build and of an ARM build can be compared with diff. Inputs come from an integer generator; NaNs are
 * compared as NaNs, because machines make different ones.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cpu/cpu.h"

/* ---- memory for one run of one kernel's cases: inputs, and outputs between guards ------------------------------- */

enum { ROOM = 24 << 20, GUARD = 64, MOST_OUTPUTS = 4096 };

static _Alignas(64) unsigned char room[ROOM], scratch[BN_SCRATCH_BYTES];
static size_t room_used;
static uint32_t seed;
static struct {
    unsigned char *data;
    size_t bytes;
    bool is_float;
} outputs[MOST_OUTPUTS];
static int output_count;

static void need(bool condition, const char *sentence) {
    if (!condition) {
        fprintf(stderr, "test_kernels: %s\n", sentence);
        exit(1);
    }
}

/* 64-byte aligned, with guard bytes on both sides. 0xFF is NaN as a float: an input read too far shows in the sum. */
static void *take(size_t bytes, int guard) {
    const size_t rounded = (bytes + 2 * GUARD + BN_ALIGN - 1) / BN_ALIGN * BN_ALIGN;
    unsigned char *data = room + room_used + GUARD;
    need(room_used + rounded <= ROOM, "the cases of one kernel need more room");
    memset(room + room_used, guard, rounded);
    room_used += rounded;
    return data;
}

static void *register_output(size_t bytes, bool is_float) {
    void *data = take(bytes, 0xA5);
    need(output_count < MOST_OUTPUTS, "the cases of one kernel have too many outputs");
    outputs[output_count].data = data;
    outputs[output_count].bytes = bytes;
    outputs[output_count++].is_float = is_float;
    return data;
}

/* Marsaglia's xorshift, the high bits of it. */
static uint32_t draw(uint32_t limit) {
    seed ^= seed << 13;
    seed ^= seed >> 17;
    seed ^= seed << 5;
    return (seed >> 8) % limit;
}

static void fill_reals(float *p, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        p[i] = (float)((int32_t)draw(1u << 24) - (1 << 23)) * 0x1p-22f; /* exact, in [-2, 2) */
    }
}

static size_t size_of(int64_t n, size_t item) { return (size_t)n * item; }

static float *reals(int64_t n) {
    float *p = take(size_of(n, sizeof *p), 0xFF);
    fill_reals(p, n);
    return p;
}
/* Reals with zeros, infinities, a NaN, a subnormal and the neighbourhood of exp's bounds among them. */
static float *wild(int64_t n) {
    static const float odd[] = {0.0f, -0.0f, INFINITY, -INFINITY, NAN, 1e-40f, -87.4f, 88.8f, 3e38f, -1e-30f, 0.5f};
    float *p = reals(n);
    for (int64_t i = 3; i < n; i += 1 + draw(9)) {
        p[i] = odd[draw(sizeof odd / sizeof *odd)];
    }
    return p;
}
static float *positive(int64_t n) {
    float *p = reals(n);
    for (int64_t i = 0; i < n; i++) {
        p[i] = fabsf(p[i]) + 0x1p-6f;
    }
    return p;
}
static double *doubles(int64_t n) {
    double *p = take(size_of(n, sizeof *p), 0xFF);
    for (int64_t i = 0; i < n; i++) {
        p[i] = (double)draw(1u << 24) * 0x1p-20 + (double)draw(1u << 24) * 0x1p-44;
    }
    return p;
}
static int32_t *indices(int64_t n, uint32_t limit) {
    int32_t *p = take(size_of(n, sizeof *p), 0xFF);
    for (int64_t i = 0; i < n; i++) {
        p[i] = (int32_t)draw(limit);
    }
    return p;
}
/* Integers in [low, low + span). */
static int8_t *small(int64_t n, int low, uint32_t span) {
    int8_t *p = take(size_of(n, 1), 0x7F);
    for (int64_t i = 0; i < n; i++) {
        p[i] = (int8_t)(low + (int)draw(span));
    }
    return p;
}

/* bf16 of moderate size: the upper halves of reals. */
static uint16_t *halves(int64_t n) {
    const float *from = reals(n);
    uint16_t *p = take(size_of(n, sizeof *p), 0xFF);
    for (int64_t i = 0; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, from + i, sizeof bits);
        p[i] = (uint16_t)(bits >> 16);
    }
    return p;
}

/* Outputs begin with contents of their own, so that accumulating and overwriting differ. */
static float *result(int64_t n) {
    float *p = register_output(size_of(n, sizeof *p), true);
    fill_reals(p, n);
    return p;
}
static void *result_bytes(int64_t n, size_t item, int low, uint32_t span) {
    int8_t *p = register_output(size_of(n, item), false);
    for (size_t i = 0; i < size_of(n, item); i++) {
        p[i] = (int8_t)(low + (int)draw(span));
    }
    return p;
}

/* ---- launching ----------------------------------------------------------------------------------------------- */

static const bn_kernel_table *table;
static bool singly;

/* Runs a kernel on all its units. The initializers draw their numbers in the order written, with gcc and clang alike.
 */
#define LAUNCH(name, units, ...)                                                                                       \
    do {                                                                                                               \
        const name##_args launch_args = {__VA_ARGS__};                                                                 \
        const int64_t launch_units = (units);                                                                          \
        memset(scratch, 0xFF, sizeof scratch);                                                                         \
        for (int64_t u = launch_units; singly && u-- > 0;) {                                                           \
            table->name(&launch_args, u, u + 1, scratch);                                                              \
        }                                                                                                              \
        if (!singly) {                                                                                                 \
            table->name(&launch_args, 0, launch_units, scratch);                                                       \
        }                                                                                                              \
    } while (0)

/* FOR_EACH(n, 0, 1, 17) { ... }: the body once for each value of n. */
#define FOR_EACH(n, ...)                                                                                               \
    for (const int64_t n##_list[] = {__VA_ARGS__}, *n##_at = n##_list;                                                 \
         n##_at < n##_list + sizeof n##_list / sizeof *n##_list; n##_at++)                                             \
        for (int64_t n = *n##_at, n##_once = 1; n##_once; n##_once = 0)
#define FOR_EACH_SIZE(n) FOR_EACH(n, 0, 1, 15, 16, 17, 33, BN_BLOCK - 1, BN_BLOCK + 17)
#define FOR_EACH_WIDTH(C) FOR_EACH(C, 1, 2, 15, 16, 17, 31, 33, 80)

static int64_t blocks(int64_t n) { return bn_ceil_div(n, BN_BLOCK); }
static int64_t bands(int64_t columns) { return bn_ceil_div(columns, BN_COLUMNS); }

/* ---- whole arrays -------------------------------------------------------------------------------------------- */

static void test_convert(void) {
    FOR_EACH_SIZE(n) {
        uint8_t *codes = take(size_of(bn_ceil_div(n, 4), 1), 0xFF);
        for (int64_t i = 0; i < bn_ceil_div(n, 4); i++) {
            codes[i] = (uint8_t)(draw(3) | draw(3) << 2 | draw(3) << 4 | draw(3) << 6);
        }
        int32_t *halves = indices(n, 1u << 24);
        LAUNCH(convert, blocks(n), wild(n), result_bytes(n, 2, 0, 256), n, BN_F32, BN_BF16);
        LAUNCH(convert, blocks(n), halves, result(n), n, BN_BF16, BN_F32);
        LAUNCH(convert, blocks(n), small(n, -128, 256), result(n), n, BN_I8, BN_F32);
        LAUNCH(convert, blocks(n), halves, result(n), n, BN_I32, BN_F32);
        LAUNCH(convert, blocks(n), codes, result(n), n, BN_TERNARY2, BN_F32);
        LAUNCH(convert, blocks(n), codes, result_bytes(n, 1, 0, 256), n, BN_TERNARY2, BN_I8);
    }
}

static void test_axpby(void) {
    FOR_EACH_SIZE(n) {
        float *in_place = result(n);
        LAUNCH(axpby, blocks(n), wild(n), NULL, result(n), n, 0, 1.7f, 0.3f);
        LAUNCH(axpby, blocks(n), wild(n), reals(n), result(n), n, 0, 1.7f, 0.3f);
        LAUNCH(axpby, blocks(n), in_place, reals(n), in_place, n, 0, 0.9f, -1.1f);
        LAUNCH(axpby, blocks(n), reals(n), reals(19), result(n), n, 19, 1.0f, 1.0f);
    }
}

static void test_fill_from(void) {
    FOR_EACH_SIZE(n) FOR_EACH(accumulate, 0, 1) {
        LAUNCH(fill_from, blocks(n), reals(1), result(n), n, 0.37f, accumulate != 0);
    }
}

static void test_scale_from(void) {
    FOR_EACH_SIZE(n) FOR_EACH(accumulate, 0, 1) {
        LAUNCH(scale_from, blocks(n), reals(1), wild(n), result(n), n, accumulate != 0);
    }
}

static void test_mul_forward(void) {
    FOR_EACH_SIZE(n) { LAUNCH(mul_forward, blocks(n), wild(n), reals(n), result(n), n); }
}

static void test_mul_backward(void) {
    FOR_EACH_SIZE(n) FOR_EACH(flags, 0, 1, 2, 3) {
        LAUNCH(mul_backward, blocks(n), wild(n), reals(n), reals(n), flags == 1 ? NULL : result(n),
               flags == 2 ? NULL : result(n), n, (flags & 1) != 0, (flags & 2) != 0);
    }
}

static void test_transpose(void) {
    FOR_EACH_WIDTH(rows) FOR_EACH(cols, 1, 16, 35) FOR_EACH(accumulate, 0, 1) {
        LAUNCH(transpose, 2 * bn_ceil_div(rows, 16), reals(2 * rows * cols), result(2 * rows * cols), 2, rows, cols,
               accumulate != 0);
    }
}

static void test_reduce_blocks(void) {
    FOR_EACH_SIZE(n) FOR_EACH(kind, BN_REDUCE_SUM, BN_REDUCE_SQUARES, BN_REDUCE_ABS) {
        LAUNCH(reduce_blocks, blocks(n), reals(n), result_bytes(blocks(n), sizeof(double), 0, 1), n, (bn_reduce)kind);
    }
}

static void test_reduce_finish(void) {
    FOR_EACH(count, 0, 1, 2, 77) {
        LAUNCH(reduce_finish, 1, doubles(count), NULL, result(1), count, 1.0 / 3.0, 0.0f);
        LAUNCH(reduce_finish, 1, doubles(count), reals(1), result(1), count, 1.0 / 7.0, 1e-5f);
    }
}

static void test_column_sum(void) {
    FOR_EACH_WIDTH(cols) FOR_EACH(rows, 0, 1, 21) {
        LAUNCH(column_sum, bands(cols), reals(rows * cols), result(cols), rows, cols, rows == 21);
    }
}

static void test_softmax_forward(void) {
    FOR_EACH_WIDTH(cols) { LAUNCH(softmax_forward, 3, reals(3 * cols), result(3 * cols), 3, cols); }
}

static void test_softmax_backward(void) {
    FOR_EACH_WIDTH(cols) FOR_EACH(accumulate, 0, 1) {
        LAUNCH(softmax_backward, 3, reals(3 * cols), reals(3 * cols), result(3 * cols), 3, cols, accumulate != 0);
    }
}

/* ---- indices ------------------------------------------------------------------------------------------------- */

static void test_index_check(void) {
    FOR_EACH(n, 0, 1, 16, 90) FOR_EACH(limit, 55, 59, 60) FOR_EACH(has_ignore, 0, 1) {
        LAUNCH(index_check, 1, indices(n, 60), result_bytes(1, sizeof(bn_fault), 0, 1), n, limit, limit == 60, 59,
               has_ignore != 0, false);
        LAUNCH(index_check, 1, indices(n, 9000), result_bytes(1, sizeof(bn_fault), 0, 1), n, 9000, 0, 0, false, true);
    }
}

static void test_embedding_forward(void) {
    FOR_EACH_WIDTH(C) {
        LAUNCH(embedding_forward, 9, indices(9, 5), reals(5 * C), BN_F32, result(9 * C), 9, C, 5);
        LAUNCH(embedding_forward, 9, indices(9, 5), halves(5 * C), BN_BF16, result(9 * C), 9, C, 5);
    }
}

static void test_embedding_backward(void) {
    FOR_EACH_WIDTH(C) FOR_EACH(accumulate, 0, 1) {
        LAUNCH(embedding_backward, bands(C), indices(9, 5), reals(9 * C), result(5 * C), 9, C, 5, accumulate != 0);
    }
}

/* ---- matrix products ----------------------------------------------------------------------------------------- */

/* rows x cols of either dtype, stored by rows or by columns with a gap of three between lines. `depth` is the length of
 * depth_scale, or 0 for none. */
static gemm_operand operand(int64_t rows, int64_t cols, bool by_rows, bool is_i8, int64_t depth) {
    const int64_t line = (by_rows ? cols : rows) + 3, n = line * (by_rows ? rows : cols);
    return (gemm_operand){.data = is_i8 ? (void *)small(n, -1, 3) : (void *)reals(n),
                          .scale = is_i8 ? reals(1) : NULL,
                          .depth_scale = depth > 0 ? reals(depth) : NULL,
                          .row_stride = by_rows ? line : 1,
                          .col_stride = by_rows ? 1 : line,
                          .dtype = is_i8 ? BN_I8 : BN_F32};
}

/* k x n: activations in tiles or codes in panels. */
static gemm_operand in_bytes(int64_t k, int64_t n, bool codes) {
    if (codes) {
        return (gemm_operand){.data = small(bn_code_panels_bytes(n, k), 0, 3),
                              .row_stride = bn_round_up(k, BN_QUANT_PAD),
                              .layout = BN_CODES,
                              .dtype = BN_I8};
    }
    const int64_t stride = bn_round_up(n, BN_QUANT_PAD);
    return (gemm_operand){.data = small(bn_round_up(k, BN_QUANT_ROWS) * stride, -128, 256),
                          .row_stride = stride,
                          .layout = BN_TILED,
                          .dtype = BN_I8};
}

static void test_gemm(void) {
    static const int64_t shapes[][5] = {/* m, n, k, tile_m, tile_n */
                                        {1, 1, 1, 16, 16},   {1, 70, 33, 8, 32},    {13, 17, 0, 16, 16},
                                        {5, 33, 65, 48, 48}, {29, 40, 300, 12, 32}, {50, 100, 17, 24, 64}};
    for (size_t s = 0; s < sizeof shapes / sizeof *shapes; s++) {
        const int64_t m = shapes[s][0], n = shapes[s][1], k = shapes[s][2], tm = shapes[s][3], tn = shapes[s][4];
        for (int kind = 0; kind < 16; kind++) {
            const bool a_rows = kind & 1, b_rows = kind & 2, is_i8 = kind & 4, accumulate = kind & 8;
            LAUNCH(gemm, bn_ceil_div(m, tm) * bn_ceil_div(n, tn), .a = operand(m, k, a_rows, false, accumulate ? k : 0),
                   .b = operand(k, n, b_rows, is_i8, 0), .c = result(m * (n + 5)), .m = m, .n = n, .k = k, .ldc = n + 5,
                   .tile_m = tm, .tile_n = tn, .accumulate = accumulate);
        }
        FOR_EACH(codes, 0, 1) {
            LAUNCH(gemm, bn_ceil_div(m, tm) * bn_ceil_div(n, tn), .a = operand(m, k, false, false, 0),
                   .b = in_bytes(k, n, codes), .c = result(m * n), .m = m, .n = n, .k = k, .ldc = n, .tile_m = tm,
                   .tile_n = tn);
        }
        LAUNCH(gemm, 1, .a = operand(m, k, true, true, k), .b = operand(k, n, true, true, k), .c = result(m * n),
               .m = m, .n = n, .k = k, .ldc = n, .tile_m = m, .tile_n = n);
    }
}

/* A factor of lanes x depth in panels; NaNs where nothing is written. */
static void *panels(int64_t lanes, int64_t depth, bool along, bool left, bool scaled, bool is_output) {
    const size_t bytes = size_of(bn_panels_bytes(lanes, depth), 1);
    void *out = is_output ? register_output(bytes, false) : take(bytes, 0xFF);
    const int64_t rows = along ? lanes : depth, cols = along ? depth : lanes;
    LAUNCH(pack_panels, bn_ceil_div(rows, BN_PACK_ROWS), reals(rows * cols), rows, cols, {along ? out : NULL, left},
           {along ? NULL : out, left}, scaled ? positive(1) : NULL, scaled ? positive(rows) : NULL, {0}, false);
    return out;
}

static void test_gemm_bf16(void) {
    FOR_EACH(m, 1, 16, 45) FOR_EACH(n, 1, 33, 64) FOR_EACH(k, 0, 1, 31, 100) {
        FOR_EACH(kind, 0, 1, 2, 3, 4, 5) {
            const bool by_rows = kind & 1, accumulate = kind & 2, in_panels = kind & 4;
            const gemm_operand left = {.data = panels(m, k, by_rows, true, false, false), .layout = BN_PANELS};
            LAUNCH(gemm_bf16, bn_ceil_div(m, 32) * bn_ceil_div(n, 32),
                   .a = in_panels ? left : operand(m, k, by_rows, false, 0),
                   .b = operand(k, n, by_rows, !accumulate, k), .c = result(m * (n + 5)), .m = m, .n = n, .k = k,
                   .ldc = n + 5, .tile_m = 32, .tile_n = 32, .accumulate = accumulate);
        }
    }
}

static void test_pack_panels(void) {
    FOR_EACH(lanes, 1, 16, 45) FOR_EACH(depth, 1, 31, 32, 300) FOR_EACH(kind, 0, 1, 2, 3, 4, 5, 6, 7) {
        panels(lanes, depth, kind & 1, kind & 2, kind & 4, true);
    }
}

static void test_gemm_panels(void) {
    FOR_EACH(m, 1, 45) FOR_EACH(n, 1, 33, 64) FOR_EACH(k, 1, 31, 100, 1000) FOR_EACH(accumulate, 0, 1) {
        LAUNCH(gemm_panels, bn_ceil_div(m, 32) * bn_ceil_div(n, 32), panels(m, k, true, true, false, false),
               panels(n, k, true, false, false, false), result(m * (n + 5)), m, n, k, n + 5, 32, 32, accumulate != 0);
    }
}

static void test_ternarize(void) {
    FOR_EACH(rows, 1, 16, 19) FOR_EACH(cols, 1, 17, 64, 70) {
        LAUNCH(ternarize, bn_ceil_div(rows, BN_PANEL_ROWS), cols == 70 ? wild(rows * cols) : reals(rows * cols),
               positive(1), result_bytes(bn_code_panels_bytes(rows, cols), 1, 0, 3),
               result_bytes(bn_code_panels_bytes(cols, rows), 1, 0, 3), result_bytes(4 * rows, sizeof(int32_t), 0, 256),
               rows, cols, false);
    }
}

static void test_prepare_codes(void) {
    FOR_EACH(rows, 1, 16, 19) FOR_EACH(cols, 1, 17, 64, 70, 330) FOR_EACH(form, BN_CODES_2, BN_CODES_5) {
        const int64_t groups = bn_ceil_div(rows, BN_PANEL_ROWS);
        const int64_t bytes = groups * bn_code_panel_bytes((bn_code_form)form, bn_ceil_div(cols, BN_QUANT_PAD));
        LAUNCH(prepare_codes, groups, small(rows * cols, -1, 3), NULL, result_bytes(bytes, 1, 0, 256),
               (bn_code_form)form, result_bytes(4 * rows, sizeof(int32_t), 0, 256), rows, cols);
        const uint8_t *fifths = (const uint8_t *)small(bn_ceil_div(rows * cols, 5), -128, 256);
        LAUNCH(prepare_codes, groups, NULL, fifths, result_bytes(bytes, 1, 0, 256), (bn_code_form)form,
               result_bytes(4 * rows, sizeof(int32_t), 0, 256), rows, cols);
    }
}

static void test_linear_bf16(void) {
    FOR_EACH(m, 1, 2, 3, 6) FOR_EACH(n, 1, 16, 37) FOR_EACH(k, 1, 31, 64, 75) {
        LAUNCH(linear_bf16, bn_ceil_div(n, 16), reals(m * k), halves(n * k), result(m * n), NULL, m, n, k, n);
        const int32_t some[] = {0, (int32_t)(n - 1)}, count = n > 1 ? 2 : 1;
        LAUNCH(linear_bf16, 1, reals(m * k), halves(n * k), result(m * (n + 3)), some, m, count, k, n + 3);
    }
}

static void test_compact_rows(void) {
    FOR_EACH(rows, 1, 16, 19) FOR_EACH(cols, 1, 63, 64, 130) FOR_EACH(bits, 6, 8) FOR_EACH(dtype, BN_F32, BN_BF16) {
        const void *w = dtype == BN_BF16 ? (void *)halves(rows * cols)
                        : cols == 63     ? (void *)wild(rows * cols)
                                         : (void *)reals(rows * cols);
        LAUNCH(compact_rows, bn_ceil_div(rows, BN_PANEL_ROWS), w, (bn_dtype)dtype, (int)bits,
               result_bytes(bn_compact_bytes(rows, cols, (int)bits), 1, 0, 256), result(rows), result(2 * rows), rows,
               cols);
    }
}

static bn_split_rows split_result(int64_t rows, int64_t stride) {
    int8_t *q = result_bytes(2 * rows * stride, 1, 0, 256);
    float *act_scale = result(rows), *bound = result(2 * rows);
    return (bn_split_rows){q, act_scale, bound, result_bytes(2 * rows, sizeof(int32_t), 0, 256), stride};
}

static void test_split_rows(void) {
    FOR_EACH(rows, 1, 5) FOR_EACH(cols, 1, 16, 63, 64, 130) {
        LAUNCH(split_rows, rows, cols == 63 ? wild(rows * cols) : reals(rows * cols),
               split_result(rows, bn_round_up(cols, BN_QUANT_PAD)), rows, cols);
    }
}

static void test_compact_forward(void) {
    FOR_EACH(m, 1, 2, 5) FOR_EACH(n, 1, 16, 37) FOR_EACH(k, 1, 64, 130) FOR_EACH(bits, 6, 8) {
        const int64_t stride = bn_round_up(k, BN_QUANT_PAD);
        const bn_split_rows x = {small(2 * m * stride, -128, 256), positive(m), NULL, indices(2 * m, 1000), stride};
        const uint8_t *panels = (const uint8_t *)small(bn_compact_bytes(n, k, (int)bits), -128, 256);
        LAUNCH(compact_forward, bn_ceil_div(n, BN_PANEL_ROWS), x, panels, positive(n), (int)bits, result(m * n), m, n,
               k);
    }
}

static void test_screen(void) {
    FOR_EACH(m, 1, 3) FOR_EACH(n, 1, 16, 37, 200) FOR_EACH(top, 1, 5, 40) {
        float *norms = positive(2 * n), *bound = m == 3 ? wild(2 * m) : positive(2 * m);
        LAUNCH(screen, m, result(m * n), norms, bound, result_bytes(m * n, sizeof(int32_t), 0, 256),
               result_bytes(m, sizeof(int32_t), 0, 256), m, n, top);
    }
}

static bn_int8_rows int8_result(int64_t rows, int64_t cols) {
    const int64_t stride = bn_round_up(cols, BN_QUANT_PAD);
    int8_t *q = result_bytes(bn_round_up(rows, BN_QUANT_ROWS) * stride, 1, 0, 256);
    float *act_scale = result(rows);
    return (bn_int8_rows){q, act_scale, result_bytes(rows, sizeof(int32_t), 0, 256), stride};
}

static void test_quantize_rows(void) {
    FOR_EACH(cols, 1, 15, 16, 17, 63, 64, 65) FOR_EACH(kind, 0, 1) {
        float *x = kind ? wild(5 * cols) : reals(5 * cols);
        memset(x, 0, size_of(cols, sizeof *x)); /* a row of zeros */
        LAUNCH(quantize_rows, 5, x, int8_result(5, cols), 5, cols, 8);
    }
}

static void test_dequantize_rows(void) {
    FOR_EACH(cols, 1, 15, 16, 17, 63, 64, 65) {
        const int64_t stride = bn_round_up(cols, BN_QUANT_PAD);
        const bn_int8_rows x = {small(32 * stride, -128, 256), positive(17), NULL, stride};
        LAUNCH(dequantize_rows, 17, x, result(17 * cols), 17, cols);
    }
}

static void test_bitlinear_forward(void) {
    FOR_EACH(m, 1, 4, 13, 37) FOR_EACH(n, 1, 16, 47, 70) FOR_EACH(k, 1, 64, 150) {
        const int64_t stride = bn_round_up(k, BN_QUANT_PAD);
        const int64_t bytes = bn_code_panels_bytes(n, k);
        const uint8_t *forms[] = {(const uint8_t *)small(bytes, 0, 3), (const uint8_t *)small(bytes / 4, 0, 128)};
        const int8_t *q = small(bn_round_up(m, BN_QUANT_ROWS) * stride, -128, 256);
        FOR_EACH(kind, 0, 1, 2, 3) {
            LAUNCH(bitlinear_forward, bn_ceil_div(m, 16) * bn_ceil_div(n, 32), q, positive(m), indices(m, 1000),
                   forms[kind & 1], (bn_code_form)(kind & 1), positive(1), kind & 2 ? reals(m * n) : NULL,
                   result(m * n), m, n, k, stride, 16, 32, false);
        }
    }
}

/* ---- the transformer block ----------------------------------------------------------------------------------- */

static void test_hadamard(void) {
    FOR_EACH(C, 0, 1, 2, 12, 16, 24, 31, 48, 272, 320, 384, 1024) FOR_EACH(accumulate, 0, 1) {
        LAUNCH(hadamard, 3, reals(3 * C), result(3 * C), 3, C, bn_hadamard_block(C), accumulate != 0);
    }
    LAUNCH(hadamard, 4, wild(4 * 80), result(4 * 80), 4, 80, 16, false);
}

static void test_rmsnorm_forward(void) {
    FOR_EACH_WIDTH(C) FOR_EACH(gain, 0, 1) {
        LAUNCH(rmsnorm_forward, 3, reals(3 * C), gain ? reals(C) : NULL, result(3 * C), result(3), 3, C, 1e-5f, {0});
        LAUNCH(rmsnorm_forward, 3, reals(3 * C), gain ? reals(C) : NULL, NULL, result(3), 3, C, 1e-5f,
               int8_result(3, C));
    }
}

static void test_rmsnorm_backward(void) {
    FOR_EACH_WIDTH(C) FOR_EACH(gain, 0, 1) {
        FOR_EACH(wanted, 1, 2, 3) {
            const int64_t rows = wanted == 3 ? 2 * BN_NORM_BAND + 3 : 3, bands = bn_ceil_div(rows, BN_NORM_BAND);
            LAUNCH(rmsnorm_backward, bands, reals(rows * C), reals(rows * C), gain ? reals(C) : NULL, positive(rows),
                   wanted & 1 ? result(rows * C) : NULL, wanted & 2 ? result(bands * C) : NULL, rows, C, gain != 0);
        }
    }
}

static void test_rope(void) {
    FOR_EACH(D, 2, 6, 32, 80) FOR_EACH(flags, 0, 1, 2, 3) {
        const int64_t B = 2, T = 3, heads = 3, n = B * T * heads * D;
        LAUNCH(rope, B * T, reals(n), reals(9 * D / 2), reals(9 * D / 2), flags ? indices(B, 7) : NULL, result(n), B, T,
               heads, D, (flags & 1) != 0, (flags & 2) != 0);
    }
}

static const bn_dtype cache_dtypes[] = {BN_F32, BN_BF16, BN_I8};

/* `lines` heads of D as a cache holds them. */
static bn_cache cached(int64_t lines, int64_t D, bn_dtype dtype) {
    bn_cache c = {NULL, NULL, dtype};
    if (dtype == BN_F32) {
        c.data = reals(lines * D);
    } else if (dtype == BN_BF16) {
        uint16_t *halves = take(size_of(lines * D, sizeof *halves), 0xFF);
        for (int64_t i = 0; i < lines * D; i++) {
            halves[i] = (uint16_t)(draw(1u << 8) | (0x3e80u + draw(2) * 0x8000u + draw(2) * 0x80u));
        }
        c.data = halves;
    } else {
        c.data = small(lines * D, -128, 256);
        c.scale = positive(lines);
        for (int64_t i = 0; i < lines; i++) {
            c.scale[i] *= 0x1p-7f;
        }
    }
    return c;
}

static bn_cache cache_result(int64_t lines, int64_t D, bn_dtype dtype) {
    bn_cache c = {NULL, NULL, dtype};
    if (dtype == BN_F32) {
        c.data = result(lines * D);
    } else {
        c.data = result_bytes(lines * D, dtype == BN_BF16 ? 2 : 1, 0, 100);
        c.scale = dtype == BN_I8 ? result(lines) : NULL;
    }
    return c;
}

/* Slots of three sequences among four. */
static const int32_t some_slots[] = {2, 0, 3};

static void test_cache_write(void) {
    FOR_EACH(T, 1, 3) FOR_EACH(D, 2, 34, 80) FOR_EACH(KV, 1, 3) FOR_EACH(kind, 0, 1, 2) FOR_EACH(slots, 0, 1) {
        LAUNCH(cache_write, 3 * T, kind ? wild(3 * T * KV * D) : reals(3 * T * KV * D), indices(3, 5),
               slots ? some_slots : NULL, cache_result(4 * 8 * KV, D, cache_dtypes[kind]), 3, T, KV, D, 8);
    }
}

static void test_attention_forward(void) {
    static const int64_t heads[][2] = {{1, 1}, {2, 1}, {4, 2}};
    FOR_EACH(T, 1, 5, 17, 65, 130) FOR_EACH(D, 2, 32, 80) FOR_EACH(i, 0, 1, 2) {
        const int64_t B = i == 1 ? 2 : 1, H = heads[i][0], KV = heads[i][1], past = i == 1 ? 70 : 0, S = T + past;
        if (i < 2 || T < 130) {
            LAUNCH(attention_forward, B * H * bn_ceil_div(T, BN_ATTENTION_QUERIES), reals(B * T * H * D),
                   cached(B * S * KV, D, BN_F32), cached(B * S * KV, D, BN_F32), past ? indices(B, 71) : NULL, NULL,
                   result(B * T * H * D), i ? result(2 * B * H * T) : NULL, B, T, S, H, KV, D, 0.4f);
        }
    }
    FOR_EACH(T, 5, 70) FOR_EACH(D, 2, 34, 80) FOR_EACH(kind, 0, 1, 2) {
        const int64_t B = 3, H = 4, KV = 2, S = T + 70;
        LAUNCH(attention_forward, B * H * bn_ceil_div(T, BN_ATTENTION_QUERIES), reals(B * T * H * D),
               cached(4 * S * KV, D, cache_dtypes[kind]), cached(4 * S * KV, D, cache_dtypes[kind]), indices(B, 71),
               some_slots, result(B * T * H * D), NULL, B, T, S, H, KV, D, 0.4f);
    }
    FOR_EACH(T, 70, BN_ATTENTION_SPAN + 40) {
        const int64_t S = BN_ATTENTION_SPAN + 100, D = 6;
        static const int32_t start = BN_ATTENTION_SPAN - 40;
        LAUNCH(attention_forward, 2 * bn_ceil_div(T, BN_ATTENTION_QUERIES), reals(T * 2 * D), cached(S, D, BN_F32),
               cached(S, D, BN_F32), T == 70 ? &start : NULL, NULL, result(T * 2 * D), result(4 * T), 1, T, S, 2, 1, D,
               0.4f);
    }
}

/* Few queries beside the joint of two spans: sequences of both, and one that ends in the first. */
static attention_span_args span_case(int64_t T, int64_t H, int64_t KV, int64_t D, bn_dtype dtype) {
    enum { S = BN_ATTENTION_SPAN + 70 };
    static const int32_t starts[] = {BN_ATTENTION_SPAN - 3, 40, BN_ATTENTION_SPAN + 33};
    return (attention_span_args){.whole = {.q = reals(3 * T * H * D),
                                           .k = cached(4 * S * KV, D, dtype),
                                           .v = cached(4 * S * KV, D, dtype),
                                           .start = starts,
                                           .slot = some_slots,
                                           .B = 3,
                                           .T = T,
                                           .S = S,
                                           .H = H,
                                           .KV = KV,
                                           .D = D,
                                           .scale = 0.4f}};
}

static void test_attention_span(void) {
    static const int64_t shapes[][4] = {{1, 1, 1, 16}, {1, 6, 2, 34}, {5, 3, 1, 80}, {16, 4, 1, 2}}; /* T, H, KV, D */
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
        FOR_EACH(kind, 0, 1, 2) {
            const int64_t T = shapes[i][0], H = shapes[i][1], KV = shapes[i][2], D = shapes[i][3];
            const attention_span_args a = span_case(T, H, KV, D, cache_dtypes[kind]);
            LAUNCH(attention_span, 3 * KV * 2, a.whole, result(3 * H * T * 2 * 2), result(3 * H * T * 2 * D));
        }
    }
}

static void test_attention_join(void) {
    FOR_EACH(T, 1, 5) FOR_EACH(D, 2, 34, 80) {
        attention_span_args a = span_case(T, 2, 1, D, BN_F32);
        a.whole.out = result(3 * T * 2 * D);
        LAUNCH(attention_join, 3 * T * 2, a.whole, positive(3 * 2 * T * 2 * 2), reals(3 * 2 * T * 2 * D));
    }
}

/* `n` maxima that keep exp in range, whatever the scores, and reciprocal sums. */
static float *statistics(int64_t n) {
    float *stats = reals(2 * n);
    for (int64_t i = 0; i < n; i++) {
        stats[2 * i] += 4.0f;
    }
    return stats;
}

static void test_attention_backward(void) {
    FOR_EACH(T, 1, 17, 130) FOR_EACH(D, 2, 32, 80) FOR_EACH(accumulate, 0, 1) {
        const int64_t B = T < 130 ? 2 : 1, KV = T < 130 ? 2 : 1, H = 2 * KV, q = B * T * H * D, k = B * T * KV * D;
        const float *stats = statistics(B * H * T);
        LAUNCH(attention_backward, B * KV, reals(q), reals(k), reals(k), reals(q), reals(q), stats, result(q),
               result(k), result(k), B, T, H, KV, D, 0.2f, accumulate != 0, accumulate != 0, accumulate != 0);
    }
}

/* The last two are longer than a block of queries, the last also than a span of keys. That one, once and with one head
 * of queries, is most of this test's time in plain C under sanitizers. */
static void test_attention_backward_bf16(void) {
    static const int64_t shapes[][2] = {{1, 2},   {17, 32},  {33, 80},  {64, 16},
                                        {130, 2}, {130, 80}, {300, 32}, {530, 256}}; /* T, D */
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
        const int64_t T = shapes[i][0], D = shapes[i][1], B = T < 130 ? 2 : 1, KV = B, H = T < 530 ? 2 * KV : KV;
        const int64_t q = B * T * H * D, k = B * T * KV * D;
        for (int accumulate = 0; accumulate < (T < 530 ? 2 : 1); accumulate++) {
            const float *stats = statistics(B * H * T);
            LAUNCH(attention_backward_bf16, B * KV, reals(q), reals(k), reals(k), reals(q), reals(q), stats, result(q),
                   result(k), result(k), B, T, H, KV, D, 0.2f, accumulate != 0, accumulate != 0, accumulate != 0);
        }
    }
}

static void test_swiglu_forward(void) {
    FOR_EACH_SIZE(n) { LAUNCH(swiglu_forward, blocks(n), wild(n), reals(n), result(n), n, n, {0}); }
    FOR_EACH_WIDTH(C) { LAUNCH(swiglu_forward, 3, reals(3 * C), reals(3 * C), NULL, 3 * C, C, int8_result(3, C)); }
}

static void test_swiglu_backward(void) {
    FOR_EACH_SIZE(n) FOR_EACH(flags, 0, 1, 2) {
        LAUNCH(swiglu_backward, blocks(n), reals(n), wild(n), reals(n), result(n), result(n), n, flags == 1,
               flags == 2);
    }
}

static void test_relu2_forward(void) {
    FOR_EACH_SIZE(n) { LAUNCH(relu2_forward, blocks(n), wild(n), reals(n), result(n), n, n, {0}); }
    FOR_EACH_WIDTH(C) { LAUNCH(relu2_forward, 3, reals(3 * C), reals(3 * C), NULL, 3 * C, C, int8_result(3, C)); }
}

static void test_relu2_backward(void) {
    FOR_EACH_SIZE(n) FOR_EACH(flags, 0, 1, 2) {
        LAUNCH(relu2_backward, blocks(n), reals(n), wild(n), reals(n), result(n), result(n), n, flags == 1, flags == 2);
    }
}

/* ---- loss and optimizer -------------------------------------------------------------------------------------- */

static int32_t *targets_with_gaps(int64_t n, int64_t V) {
    int32_t *targets = indices(n, (uint32_t)V);
    for (int64_t i = 1; i < n; i += 3) {
        targets[i] = BN_IGNORE_INDEX;
    }
    return targets;
}

static void test_target_weight(void) {
    FOR_EACH(n, 0, 1, 2, 50) { LAUNCH(target_weight, 1, targets_with_gaps(n, 9), result(1), n); }
}

static void test_cross_entropy(void) {
    FOR_EACH_WIDTH(V) FOR_EACH(gradient, 0, 1) {
        LAUNCH(cross_entropy, 4, result(4 * V), targets_with_gaps(4, V), positive(1), result(4), 4, V, gradient != 0);
    }
}

/* Logits in [-20, 20), of the 3 V targets from V on: a third of the rows has its target here. */
static head_part head(int64_t rows, int64_t V) {
    const int64_t C = 5;
    return (head_part){panels(rows, C, true, true, false, false),
                       panels(V, C, true, false, false, false),
                       targets_with_gaps(rows, 3 * V),
                       rows,
                       V,
                       C,
                       V};
}
static int64_t head_blocks(int64_t rows, int64_t V) {
    return bn_ceil_div(rows, BN_HEAD_ROWS) * bn_ceil_div(V, BN_HEAD_LANES);
}

static void test_head_statistics(void) {
    FOR_EACH(rows, 1, 37, BN_HEAD_ROWS + 3) FOR_EACH(V, 1, 65, BN_HEAD_LANES + 17) {
        const int64_t n = bn_ceil_div(V, BN_HEAD_LANES) * (rows + 2);
        const head_part part = head(rows, V);
        LAUNCH(head_statistics, head_blocks(rows, V), part, result(n), result(n), result(rows), rows + 2);
    }
}

static void test_head_loss(void) {
    FOR_EACH(rows, 1, 16, 45) FOR_EACH(blocks, 1, 5) {
        const int64_t n = rows * blocks;
        LAUNCH(head_loss, bn_ceil_div(rows, BN_HEAD_BAND), reals(n), positive(n), reals(rows),
               targets_with_gaps(rows, 9), result(rows), result(rows), rows, blocks);
    }
}

static void test_head_gradient(void) {
    FOR_EACH(rows, 1, 37, BN_HEAD_ROWS + 3) FOR_EACH(V, 1, 65, BN_HEAD_LANES + 17) FOR_EACH(flags, 1, 2, 3) {
        const head_part part = head(rows, V);
        const size_t bytes = size_of(bn_panels_bytes(rows, V), 1), across = size_of(bn_panels_bytes(V, rows), 1);
        LAUNCH(head_gradient, head_blocks(rows, V), part, reals(rows), reals(1), reals(1),
               flags & 1 ? register_output(bytes, false) : NULL, flags & 2 ? register_output(across, false) : NULL);
    }
}

static void test_clip_factor(void) {
    FOR_EACH(count, 0, 1, 40) FOR_EACH(max_norm, 0, 1, 1000) {
        LAUNCH(clip_factor, 1, doubles(count), result(1), result(1), count, (float)max_norm);
    }
}

static void test_adamw(void) {
    FOR_EACH_SIZE(n) FOR_EACH(decay_end, 0, n / 2, n) {
        float *v = result(n);
        for (int64_t i = 0; i < n; i++) {
            v[i] = fabsf(v[i]);
        }
        LAUNCH(adamw, blocks(n), result(n), reals(n), result(n), v, positive(1), n, decay_end, 3, 1e-3f, 0.9f, 0.95f,
               1e-8f, 0.1f, 0.271f, 0.142f, BN_F32);
        /* Bytes of 0xB0 to 0xBE and of 0x30 to 0x3E: bf16 from -0.19 to -6e-10, and from 6e-10 to 0.19. */
        LAUNCH(adamw, blocks(n), result(n), reals(n), result_bytes(n, 2, -80, 15), result_bytes(n, 2, 48, 15),
               positive(1), n, decay_end, ((int64_t)7 << 32) + 5, 1e-3f, 0.9f, 0.95f, 1e-8f, 0.1f, 0.271f, 0.142f,
               BN_BF16);
    }
}

/* ---- the comparison ------------------------------------------------------------------------------------------ */

static void run(void (*cases)(void), const bn_kernel_table *set, bool one_by_one) {
    room_used = 0;
    output_count = 0;
    seed = 2463534242u;
    table = set;
    singly = one_by_one;
    cases();
    for (int i = 0; i < output_count; i++) { /* one NaN for all */
        for (size_t j = 0; outputs[i].is_float && j < outputs[i].bytes; j += sizeof(float)) {
            float x;
            memcpy(&x, outputs[i].data + j, sizeof x);
            if (x != x) {
                memset(outputs[i].data + j, 0x7F, sizeof x);
            }
        }
    }
}

static bool guards_hold(int i) {
    for (size_t j = 0; j < GUARD; j++) {
        if (outputs[i].data[outputs[i].bytes + j] != 0xA5 || outputs[i].data[-1 - (ptrdiff_t)j] != 0xA5) {
            return false;
        }
    }
    return true;
}

/* The set's outputs against `expected`, which the first (scalar) run fills. Reports the first output that is wrong. */
static bool agrees(const char *name, unsigned char *expected, bool first) {
    for (int i = 0; i < output_count; i++) {
        const unsigned char *data = outputs[i].data;
        const size_t bytes = outputs[i].bytes;
        size_t same = 0;
        if (first) {
            memcpy(expected, data, bytes);
        }
        while (same < bytes && data[same] == expected[same]) {
            same++;
        }
        if (same < bytes || !guards_hold(i)) {
            fprintf(stderr, "%s, %s%s: output %d of %zu bytes: ", name, table->isa, singly ? " unit by unit" : "", i,
                    bytes);
            fprintf(stderr, same < bytes ? "differs from byte %zu on\n" : "written outside\n", same);
            return false;
        }
        expected += bytes;
    }
    return true;
}

/* FNV-1a over the outputs of the last run. */
static unsigned long long hash_outputs(void) {
    uint64_t hash = 0xcbf29ce484222325u;
    for (int i = 0; i < output_count; i++) {
        for (size_t j = 0; j < outputs[i].bytes; j++) {
            hash = (hash ^ outputs[i].data[j]) * 0x100000001b3u;
        }
    }
    return hash;
}

/* A set's first run of a fast kernel is its own measure where it has an order of sums of its own. */
static bool has_own_order(const bn_kernel_table *set) {
    return set != bn_cpu_isa_own_kernels(0) && set->rope == NULL; /* sets that are complete multiply bf16 in f32 */
}

int main(void) {
    static const struct {
        const char *name;
        size_t entry; /* where a table has it */
        bool is_fast;
        void (*cases)(void);
    } kernels[] = {
#define KERNEL(name) {#name, offsetof(bn_kernel_table, name), false, test_##name},
#define FAST_KERNEL(name) {#name, offsetof(bn_kernel_table, name), true, test_##name},
#include "kernels/kernels.def"
#undef KERNEL
    };
    static unsigned char expected[ROOM];
    bool right = true;
    for (int i = 0; i < bn_cpu_isa_count(); i++) {
        fprintf(stderr, "%s: tested\n", bn_cpu_isa_name(i));
    }
    for (size_t k = 0; k < sizeof kernels / sizeof *kernels; k++) {
        for (int i = 0; i < bn_cpu_isa_count(); i++) {
            const bn_kernel_table *set = bn_cpu_isa_own_kernels(i);
            void (*entry)(void);
            memcpy(&entry, (const char *)set + kernels[k].entry, sizeof entry);
            for (int one_by_one = 0; entry != NULL && one_by_one < 2; one_by_one++) {
                run(kernels[k].cases, set, one_by_one);
                const bool first = !one_by_one && (i == 0 || (kernels[k].is_fast && has_own_order(set)));
                right &= agrees(kernels[k].name, expected, first);
                if (first && i == 0) {
                    printf("%-22s %016llx\n", kernels[k].name, hash_outputs());
                }
            }
        }
    }
    return right ? 0 : 1;
}
