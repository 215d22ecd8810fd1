/*
 * test_products.c: gemm, gemm_bf16, products of panels, the output head, ternarize, quantize_rows and bitlinear_forward
 * of every instruction set this CPU has, against plain loops and quant/ternary.h, bit for bit (bf16: within the bound
 * of its roundings); with guard bytes around every output, odd shapes, all layouts and tile sizes. One line per check;
 * exit status 1 if any failed.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cpu/cpu.h"
#include "kernels/tiles.h"
#include "quant/ternary.h"

/* What each instruction set of this CPU does itself, scalar first. */
static const bn_kernel_table *tables[16];
static int table_count;
static void *scratch;

static void find_tables(void) {
    for (; table_count < bn_cpu_isa_count(); table_count++) {
        tables[table_count] = bn_cpu_isa_own_kernels(table_count);
    }
}

/* ---- checks, numbers, guarded memory ------------------------------------------------------------------ */

static int failures_here, failures;

static void expect(bool ok, const char *what, const char *isa, int64_t m, int64_t n, int64_t k, int variant) {
    if (!ok && failures_here++ < 5) {
        printf("  failed: %s, %s, m %lld n %lld k %lld variant %d\n", what, isa, (long long)m, (long long)n,
               (long long)k, variant);
    }
}

static void done(const char *name) {
    printf("%s %s\n", failures_here == 0 ? "ok  " : "FAIL", name);
    failures += failures_here;
    failures_here = 0;
}

static uint64_t state = 1;
static uint32_t random_bits(void) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(state >> 33);
}
static float random_float(void) { return (float)random_bits() / 1073741824.0f - 1.0f; }

/* Outputs lie between two fences of 64 bytes; memory starts as noise so that nothing passes by being zero already. */
enum { FENCE = 64 };
static void *fenced(int64_t bytes) {
    uint8_t *p = aligned_alloc(64, (size_t)bn_round_up(bytes, 64) + 2 * FENCE);
    if (p == NULL) {
        exit(2);
    }
    for (int64_t i = 0; i < bn_round_up(bytes, 64) + 2 * FENCE; i++) {
        p[i] = (uint8_t)(0xA5 ^ i);
    }
    return p + FENCE;
}
static bool intact(const void *data, int64_t bytes) {
    const uint8_t *p = (const uint8_t *)data - FENCE;
    for (int64_t i = 0; i < bn_round_up(bytes, 64) + 2 * FENCE; i++) {
        if ((i < FENCE || i >= FENCE + bytes) && p[i] != (uint8_t)(0xA5 ^ i)) {
            return false;
        }
    }
    return true;
}
static void release(void *data) { free((uint8_t *)data - FENCE); }

/* Units one by one, last first: a unit may lean on no other. */
#define EACH_UNIT_BACKWARDS(kernel, args, units)                                                                       \
    for (int64_t u = (units)-1; u >= 0; u--) {                                                                         \
        kernel(args, u, u + 1, scratch);                                                                               \
    }

/* ---- quant/ternary.c, by hand ------------------------------------------------------------------------------------ */

static void by_hand(bool ok, const char *what, int64_t n) { expect(ok, what, "contract", 0, n, 0, 0); }

static void test_contract(void) {
    const float w[] = {-4.0f, 0.0f, 2.0f, 2.0f}, zeros[3] = {0};
    by_hand(bn_absmean_scale(w, 4) == 2.0f, "absmean", 4);
    by_hand(bn_absmean_scale(zeros, 3) == 1e-5f && bn_absmean_scale(zeros, 0) == 1e-5f, "absmean of 0", 3);
    by_hand(isnan(bn_absmean_scale((float[]){1, NAN}, 2)), "absmean of NaN", 2);
    const float at[] = {1.0f, -1.0f, 1.0001f, -1.0001f, 3.0f, -9.0f, INFINITY, NAN, 0.0f};
    const int8_t code[] = {0, 0, 1, -1, 1, -1, 1, 0, 0};
    for (int i = 0; i < 9; i++) {
        by_hand(bn_ternary_code(at[i], 2.0f) == code[i], "code", i);
    }
    const float row[] = {-2.0f, 1.0f, 0.0f, 0.0236f};
    int8_t q[4];
    by_hand(bn_int8_row(row, 4, 8, q) == 2.0f / 127.0f, "act_scale", 4);
    by_hand(q[0] == -127 && q[1] == 64 && q[2] == 0 && q[3] == 1, "int8 row, 63.5 to even", 4);
    by_hand(bn_int8_row(row, 4, 4, q) == 2.0f / 7.0f, "act_scale of 4 bits", 4);
    by_hand(q[0] == -7 && q[1] == 4 && q[2] == 0 && q[3] == 0, "4-bit row, 3.5 to even", 4);
    for (int n = 0; n <= 17; n++) {
        int8_t codes[17], back[17];
        uint8_t packed[5];
        for (int i = 0; i < n; i++) {
            codes[i] = (int8_t)(random_bits() % 3) - 1;
        }
        bool ok = bn_ternary_pack(codes, n, packed) == BN_OK && bn_ternary_unpack(packed, n, back) == BN_OK;
        by_hand(ok && memcmp(codes, back, (size_t)n) == 0, "pack", n);
    }
    uint8_t packed[2];
    const int8_t five[] = {-1, 0, 1, 1, 0};
    by_hand(bn_ternary_pack(five, 5, packed) == BN_OK && packed[0] == 0xA4 && packed[1] == 1, "packed bits", 5);
    by_hand(bn_ternary_pack((const int8_t[]){0, 2}, 2, packed) == BN_ERR_VALUE, "pack refuses 2", 2);
    by_hand(bn_ternary_unpack((const uint8_t[]){0xC0}, 4, q) == BN_ERR_VALUE, "unpack refuses 3", 4);
    by_hand(bn_ternary_unpack((const uint8_t[]){0xC0}, 3, q) == BN_OK, "unused bits are not read", 3);
    done("the numeric contract, by hand");
}

/* ---- gemm -------------------------------------------------------------------------------------------------------- */

/* Bits of `variant`. */
enum { A_TRANSPOSED = 1, B_TRANSPOSED = 2, A_I8 = 4, B_I8 = 8, SCALE = 16, DEPTH_SCALE = 32, ACCUMULATE = 64 };
enum { VARIANTS = 128 };

static float factor(const gemm_operand *x, int64_t i, int64_t j, int64_t p) {
    const int64_t at = i * x->row_stride + j * x->col_stride;
    const float value = x->dtype == BN_F32 ? ((const float *)x->data)[at] : (float)((const int8_t *)x->data)[at];
    const float scale = x->scale != NULL ? x->scale[0] : 1.0f;
    return value * (x->depth_scale != NULL ? scale * x->depth_scale[p] : scale);
}

/* The contract word for word, and the same sum in double within the error of k roundings. */
static bool gemm_oracle(const gemm_args *g, const float *before, float *expected) {
    bool close = true;
    for (int64_t i = 0; i < g->m; i++) {
        for (int64_t j = 0; j < g->n; j++) {
            float sum = g->accumulate ? before[i * g->ldc + j] : 0.0f;
            double exact = sum, size = fabs((double)sum);
            for (int64_t p = 0; p < g->k; p++) {
                const float a = factor(&g->a, i, p, p), b = factor(&g->b, p, j, p);
                sum = fmaf(a, b, sum);
                exact += (double)a * b;
                size += fabs((double)a * b);
            }
            close = close && fabs(sum - exact) <= (double)g->k * 0x1p-24 * size;
            expected[i * g->ldc + j] = sum;
        }
    }
    return close;
}

static float to_bf16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    bits = (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000u;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* The product of factors rounded to bf16: products of two are exact in f32, and each of at most k + 1 sums rounds by
 * half an ulp of at most the sum of sizes, in whatever order. ARM rounds by an ulp, to odd: once for each pair's own
 * sum, all pairs together one ulp of the sum of sizes, and (k + 1) / 2 times for pairs added to the total: k + 3
 * halves. */
static bool is_bf16_product(const gemm_args *g, const float *before) {
    bool close = true;
    for (int64_t i = 0; i < g->m; i++) {
        for (int64_t j = 0; j < g->n; j++) {
            double exact = g->accumulate ? (double)before[i * g->ldc + j] : 0.0, size = fabs(exact);
            for (int64_t p = 0; p < g->k; p++) {
                const double product =
                    (double)to_bf16(factor(&g->a, i, p, p)) * (double)to_bf16(factor(&g->b, p, j, p));
                exact += product;
                size += fabs(product);
            }
            close = close && fabs((double)g->c[i * g->ldc + j] - exact) <= (double)(g->k + 3) * 0x1p-24 * size;
        }
    }
    return close;
}

static void test_gemm_shape(int64_t m, int64_t n, int64_t k, int variant) {
    /* With room to spare after each row, so that no stride is the width by accident. */
    const int64_t lda = (variant & A_TRANSPOSED ? m : k) + 3, ldb = (variant & B_TRANSPOSED ? k : n) + 5, ldc = n + 2;
    const int64_t a_count = lda * (variant & A_TRANSPOSED ? k : m), b_count = ldb * (variant & B_TRANSPOSED ? n : k);
    const int64_t bytes = m * ldc * 4;
    float *af = fenced(a_count * 4), *bf = fenced(b_count * 4), *depth = fenced(k * 4), scale = 0.37f;
    float *before = fenced(bytes), *expected = fenced(bytes), *c = fenced(bytes);
    int8_t *ai = fenced(a_count), *bi = fenced(b_count);
    for (int64_t i = 0; i < a_count; i++) {
        af[i] = random_float();
        ai[i] = (int8_t)random_bits();
    }
    for (int64_t i = 0; i < b_count; i++) {
        bf[i] = random_float();
        bi[i] = (int8_t)random_bits();
    }
    for (int64_t p = 0; p < k; p++) {
        depth[p] = random_float();
    }
    for (int64_t i = 0; i < m * ldc; i++) {
        before[i] = random_float();
    }
    memcpy(expected, before, (size_t)bytes);
    gemm_args g = {.c = c, .m = m, .n = n, .k = k, .ldc = ldc, .accumulate = (variant & ACCUMULATE) != 0};
    const bool across_a = variant & A_TRANSPOSED, across_b = variant & B_TRANSPOSED;
    g.a = (gemm_operand){.row_stride = across_a ? 1 : lda, .col_stride = across_a ? lda : 1};
    g.b = (gemm_operand){.row_stride = across_b ? 1 : ldb, .col_stride = across_b ? ldb : 1};
    g.a.dtype = variant & A_I8 ? BN_I8 : BN_F32;
    g.b.dtype = variant & B_I8 ? BN_I8 : BN_F32;
    g.a.data = variant & A_I8 ? (const void *)ai : af;
    g.b.data = variant & B_I8 ? (const void *)bi : bf;
    g.a.scale = g.b.scale = variant & SCALE ? &scale : NULL;
    g.b.depth_scale = variant & DEPTH_SCALE ? depth : NULL;
    g.a.depth_scale = variant & A_TRANSPOSED ? g.b.depth_scale : NULL;
    expect(gemm_oracle(&g, before, expected), "distance from the double sum", "oracle", m, n, k, variant);
    const bn_tiles chosen = bn_product_tiles(m, n, k, 3);
    const int64_t tiles[][2] = {{m + 1, n + 1}, {5, 7}, {16, 33}, {chosen.tile_m, chosen.tile_n}};
    for (int t = 0; t < table_count; t++) {
        for (int s = 0; tables[t]->gemm != NULL && s < 4; s++) {
            g.tile_m = tiles[s][0];
            g.tile_n = tiles[s][1];
            memcpy(c, before, (size_t)bytes);
            EACH_UNIT_BACKWARDS(tables[t]->gemm, &g, bn_ceil_div(m, g.tile_m) * bn_ceil_div(n, g.tile_n))
            const bool ok = memcmp(c, expected, (size_t)bytes) == 0 && intact(c, bytes);
            expect(ok, "gemm", tables[t]->isa, m, n, k, variant);
        }
    }
    for (int t = 0; t < table_count; t++) {
        for (int s = 0; tables[t]->gemm_bf16 != NULL && s < 4; s++) {
            g.tile_m = tiles[s][0];
            g.tile_n = tiles[s][1];
            memcpy(c, before, (size_t)bytes);
            EACH_UNIT_BACKWARDS(tables[t]->gemm_bf16, &g, bn_ceil_div(m, g.tile_m) * bn_ceil_div(n, g.tile_n))
            expect(is_bf16_product(&g, before) && intact(c, bytes), "gemm_bf16", tables[t]->isa, m, n, k, variant);
            if (s == 0) {
                memcpy(expected, c, (size_t)bytes);
            }
            expect(memcmp(c, expected, (size_t)bytes) == 0, "gemm_bf16, tiles", tables[t]->isa, m, n, k, variant);
        }
    }
    void *all[] = {af, bf, depth, before, expected, c, ai, bi};
    for (int i = 0; i < 8; i++) {
        release(all[i]);
    }
}

static float *random_floats(int64_t count) {
    float *p = fenced(count * 4);
    for (int64_t i = 0; i < count; i++) {
        p[i] = random_float();
    }
    return p;
}

/* Activations in tiles and codes in panels give the bits of rows that lie one after the other. */
static void test_int8_layout(int64_t m, int64_t n, int64_t k, bool codes) {
    const int64_t stride = bn_round_up(codes ? k : n, BN_QUANT_PAD), bytes = m * n * 4;
    const int64_t laid_out = codes ? bn_code_panels_bytes(n, k) : bn_round_up(k, BN_QUANT_ROWS) * stride;
    float *a = random_floats(m * k), *c = fenced(bytes), *expected = fenced(bytes);
    int8_t *plain = fenced(k * n), *other = fenced(laid_out);
    memset(other, 0, (size_t)laid_out);
    for (int64_t i = 0; i < k * n; i++) {
        plain[i] = codes ? (int8_t)(random_bits() % 3) - 1 : (int8_t)(random_bits() % 256);
        if (codes) {
            other[bn_code_at(i % n, i / n, stride)] = (int8_t)(plain[i] + 1);
        } else {
            other[bn_quantized_at(i / n, i % n, stride)] = plain[i];
        }
    }
    gemm_args g = {.a = {.data = a, .row_stride = k, .col_stride = 1, .dtype = BN_F32},
                   .c = c,
                   .m = m,
                   .n = n,
                   .k = k,
                   .ldc = n,
                   .tile_m = m,
                   .tile_n = n};
    for (int t = 0; t < table_count; t++) {
        void (*const kernels[])(const gemm_args *, int64_t, int64_t, void *) = {tables[t]->gemm, tables[t]->gemm_bf16};
        for (int fast = 0; fast < 2; fast++) {
            if (kernels[fast] == NULL) {
                continue;
            }
            g.b = (gemm_operand){.data = plain, .row_stride = n, .col_stride = 1, .dtype = BN_I8};
            kernels[fast](&g, 0, 1, scratch);
            memcpy(expected, c, (size_t)bytes);
            g.b = (gemm_operand){
                .data = other, .row_stride = stride, .layout = codes ? BN_CODES : BN_TILED, .dtype = BN_I8};
            kernels[fast](&g, 0, 1, scratch);
            expect(memcmp(c, expected, (size_t)bytes) == 0, fast ? "gemm_bf16 of int8" : "gemm of int8", tables[t]->isa,
                   m, n, k, codes);
        }
    }
    void *all[] = {a, c, expected, plain, other};
    for (int i = 0; i < 5; i++) {
        release(all[i]);
    }
}

static void test_gemm(void) {
    for (int variant = 0; variant < VARIANTS; variant++) {
        test_gemm_shape(13, 35, 37, variant);
    }
    done("gemm: every layout, type and scale");
    static const int64_t ms[] = {1, 2, 4, 5, 8, 11, 12, 25}, ns[] = {1, 15, 16, 17, 33, 48, 97};
    static const int64_t ks[] = {0, 1, 15, 16, 17, 33};
    for (int i = 0; i < 8; i++) {
        for (int j = 0; j < 7; j++) {
            for (int l = 0; l < 6; l++) {
                test_gemm_shape(ms[i], ns[j], ks[l], (int)(random_bits() % VARIANTS));
            }
        }
    }
    test_gemm_shape(0, 5, 3, 0);
    test_gemm_shape(5, 0, 3, 0);
    done("gemm: odd shapes");
    for (int64_t k = 255; k <= 257; k++) {
        test_gemm_shape(7, 19, k, B_TRANSPOSED);
    }
    test_gemm_shape(25, 40, 700, B_TRANSPOSED | ACCUMULATE);
    test_gemm_shape(25, 40, 700, A_TRANSPOSED | B_I8 | DEPTH_SCALE);
    test_gemm_shape(1100, 17, 19, A_I8 | SCALE); /* more rows than one scratch holds */
    done("gemm: several blocks of depth and of rows");
    for (int codes = 0; codes < 2; codes++) {
        test_int8_layout(3, 1, 1, codes);
        test_int8_layout(17, 70, 45, codes);
        test_int8_layout(20, 130, 700, codes);
    }
    done("gemm: int8 in tiles and codes in panels");
}

/* ---- products of panels ------------------------------------------------------------------------------------------ */

static void *packed(const bn_kernel_table *table, const float *data, bool along, int64_t lanes, int64_t depth,
                    bool left) {
    const int64_t rows = along ? lanes : depth, cols = along ? depth : lanes;
    const bn_panels panels = {fenced(bn_panels_bytes(lanes, depth)), left}, none = {NULL, false};
    const pack_panels_args args = {
        .data = data, .rows = rows, .cols = cols, .by_rows = along ? panels : none, .by_cols = along ? none : panels};
    EACH_UNIT_BACKWARDS(table->pack_panels, &args, bn_ceil_div(rows, BN_PACK_ROWS))
    expect(intact(panels.memory, bn_panels_bytes(lanes, depth)), "pack_panels", table->isa, lanes, 0, depth, left);
    return panels.memory;
}

/* c (+)= left right^T of panels, in tiles as the ops cut it. */
static void multiply_panels(const bn_kernel_table *table, gemm_panels_args args) {
    const bn_tiles tiles = bn_product_tiles(args.m, args.n, args.k, 3);
    args.tile_m = tiles.tile_m;
    args.tile_n = tiles.tile_n;
    EACH_UNIT_BACKWARDS(table->gemm_panels, &args, tiles.units)
}

/* The same bits as gemm_bf16, whatever the layout that was packed. */
static void test_panels_shape(int64_t m, int64_t n, int64_t k, bool accumulate) {
    float *a = random_floats(m * k), *b = random_floats(n * k), *c = random_floats(m * n);
    float *expected = fenced(m * n * 4);
    for (int t = 0; t < table_count; t++) {
        for (int layout = 0; tables[t]->gemm_panels != NULL && layout < 4; layout++) {
            const int64_t ar = layout & 1 ? 1 : k, ap = layout & 1 ? m : 1, bc = layout & 2 ? 1 : k,
                          bp = layout & 2 ? n : 1;
            void *left = packed(tables[t], a, ap == 1, m, k, true), *right = packed(tables[t], b, bp == 1, n, k, false);
            for (int64_t i = 0; i < m * n; i++) {
                expected[i] = c[i] = (float)i;
            }
            const gemm_args g = {.a = {.data = a, .row_stride = ar, .col_stride = ap, .dtype = BN_F32},
                                 .b = {.data = b, .row_stride = bp, .col_stride = bc, .dtype = BN_F32},
                                 .c = expected,
                                 .m = m,
                                 .n = n,
                                 .k = k,
                                 .ldc = n,
                                 .tile_m = m,
                                 .tile_n = n,
                                 .accumulate = accumulate};
            tables[t]->gemm_bf16(&g, 0, 1, scratch);
            multiply_panels(
                tables[t],
                (gemm_panels_args){
                    .left = left, .right = right, .c = c, .m = m, .n = n, .k = k, .ldc = n, .accumulate = accumulate});
            expect(memcmp(c, expected, (size_t)(m * n) * 4) == 0 && intact(c, m * n * 4), "gemm_panels", tables[t]->isa,
                   m, n, k, layout);
            release(left);
            release(right);
        }
    }
    void *all[] = {a, b, c, expected};
    for (int i = 0; i < 4; i++) {
        release(all[i]);
    }
}

static void test_panels(void) {
    static const int64_t sizes[][3] = {{1, 1, 1}, {17, 33, 31}, {33, 48, 64}, {45, 100, 700}, {300, 97, 33}};
    for (int i = 0; i < 5; i++) {
        test_panels_shape(sizes[i][0], sizes[i][1], sizes[i][2], i % 2);
    }
    done("panels: the bits of gemm_bf16");
}

/* ---- the output head --------------------------------------------------------------------------------------------- */

/* One part that is all of the vocabulary, through head_statistics, head_loss and head_gradient, beside doubles.
 * A logit x of rounded factors is off by e <= (C + 3) 2^-24 sum of sizes <= C (C + 3) 2^-24, as are the maximum and,
 * with 2^-17 for the exponential and its shift and 2^-22 for f32, lse; so exp(x - lse) is off by a factor within
 * exp(+-bound), bound = 2 e + 2^-16, and d is rounded to bf16, by 2^-8 of itself. */
static void test_head_shape(int64_t rows, int64_t V, int64_t C) {
    float *x = random_floats(rows * C), *w = random_floats(V * C), *identity = fenced(V * V * 4);
    float *rows_identity = fenced(rows * rows * 4), *d = fenced(rows * V * 4), *dt = fenced(rows * V * 4);
    const int64_t blocks = bn_ceil_div(V, BN_HEAD_LANES), units = bn_ceil_div(rows, BN_HEAD_ROWS) * blocks;
    float *max = fenced(blocks * rows * 4), *sum = fenced(blocks * rows * 4), *at_target = fenced(rows * 4);
    float *loss = fenced(rows * 4), *lse = fenced(rows * 4);
    int32_t *targets = fenced(rows * 4);
    double *exact = fenced(V * 8);
    const float weight = 0.25f, dloss = -3.0f;
    const double e = (double)(C * (C + 3)) * 0x1p-24, bound = 2.0 * e + 0x1p-16;
    for (int64_t i = 0; i < V * V; i++) {
        identity[i] = i / V == i % V ? 1.0f : 0.0f;
    }
    for (int64_t i = 0; i < rows * rows; i++) {
        rows_identity[i] = i / rows == i % rows ? 1.0f : 0.0f;
    }
    for (int64_t r = 0; r < rows; r++) {
        targets[r] = r % 5 == 3 ? BN_IGNORE_INDEX : (int32_t)(random_bits() % (uint32_t)V);
    }
    for (int t = 0; t < table_count; t++) {
        const bn_kernel_table *table = tables[t];
        if (table->head_gradient == NULL) {
            continue;
        }
        head_part part = {.targets = targets, .rows = rows, .V = V, .C = C};
        void *left = packed(table, x, true, rows, C, true), *right = packed(table, w, true, V, C, false);
        void *by_rows = fenced(bn_panels_bytes(rows, V)), *by_lanes = fenced(bn_panels_bytes(V, rows));
        void *one = packed(table, identity, true, V, V, false);
        void *ones = packed(table, rows_identity, true, rows, rows, false);
        part.x = left;
        part.w = right;
        const head_statistics_args statistics = {part, max, sum, at_target, rows};
        EACH_UNIT_BACKWARDS(table->head_statistics, &statistics, units)
        const head_loss_args losses = {max, sum, at_target, targets, lse, loss, rows, blocks};
        EACH_UNIT_BACKWARDS(tables[0]->head_loss, &losses, bn_ceil_div(rows, BN_HEAD_BAND))
        const head_gradient_args gradient = {part, lse, &weight, &dloss, by_rows, by_lanes};
        EACH_UNIT_BACKWARDS(table->head_gradient, &gradient, units)
        multiply_panels(table,
                        (gemm_panels_args){.left = by_rows, .right = one, .c = d, .m = rows, .n = V, .k = V, .ldc = V});
        multiply_panels(
            table,
            (gemm_panels_args){.left = by_lanes, .right = ones, .c = dt, .m = V, .n = rows, .k = rows, .ldc = rows});
        bool close = intact(max, blocks * rows * 4) && intact(by_rows, bn_panels_bytes(rows, V)) &&
                     intact(by_lanes, bn_panels_bytes(V, rows)) && intact(at_target, rows * 4);
        bool same = true;
        for (int64_t r = 0; r < rows; r++) {
            double total = 0.0;
            for (int64_t v = 0; v < V; v++) {
                exact[v] = 0.0;
                for (int64_t c = 0; c < C; c++) {
                    exact[v] += (double)to_bf16(x[r * C + c]) * (double)to_bf16(w[v * C + c]);
                }
                total += exp(exact[v]);
            }
            const bool counts = targets[r] != BN_IGNORE_INDEX;
            const double wanted = counts ? log(total) - exact[targets[r]] : 0.0;
            close = close && fabs((double)loss[r] - wanted) <= (counts ? bound : 0.0);
            for (int64_t v = 0; v < V; v++) {
                const double p = exp(exact[v]) / total, scale = counts ? (double)(weight * dloss) : 0.0;
                const double d_exact = (p - (v == targets[r] ? 1.0 : 0.0)) * scale;
                const double off = fabs(scale) * p * 1.1 * bound;
                close = close && fabs((double)d[r * V + v] - d_exact) <= off + 0x1p-8 * (fabs(d_exact) + off);
                same = same && d[r * V + v] == dt[v * rows + r];
            }
        }
        expect(close, "head", table->isa, rows, V, C, 0);
        expect(same, "head, both layouts", table->isa, rows, V, C, 0);
        void *mine[] = {left, right, by_rows, by_lanes, one, ones};
        for (int i = 0; i < 6; i++) {
            release(mine[i]);
        }
    }
    void *all[] = {x, w, identity, rows_identity, d, dt, max, sum, at_target, loss, lse, targets, exact};
    for (int i = 0; i < 13; i++) {
        release(all[i]);
    }
}

static void test_head(void) {
    test_head_shape(1, 1, 1);
    test_head_shape(5, 3, 17);
    test_head_shape(33, 65, 64);
    test_head_shape(BN_HEAD_ROWS + 5, BN_HEAD_LANES + 31, 40);
    done("output head: loss and derivative, within the bound");
}

/* ---- ternarize --------------------------------------------------------------------------------------------------- */

static void test_ternarize_shape(int64_t rows, int64_t cols) {
    const int64_t depth = bn_round_up(cols, BN_QUANT_PAD), turned_depth = bn_round_up(rows, BN_QUANT_PAD);
    const int64_t groups = bn_ceil_div(rows, BN_PANEL_ROWS), count = rows * cols;
    const int64_t bytes = bn_code_panels_bytes(rows, cols), turned_bytes = bn_code_panels_bytes(cols, rows);
    float *w = fenced(count * 4);
    uint8_t *old = fenced(bytes), *panels = fenced(bytes), *turned = fenced(turned_bytes);
    int32_t *tally = fenced(rows * 16);
    for (int64_t i = 0; i < count; i++) {
        static const float edges[] = {0.25f, -0.25f, 0.75f, 1e30f, -INFINITY, NAN, 0.0f, -0.0f};
        w[i] = random_bits() % 4 ? random_float() : edges[random_bits() % 8];
    }
    memset(old, 0, (size_t)bytes);
    for (int64_t i = 0; i < count; i++) {
        old[bn_code_at(i / cols, i % cols, depth)] = (uint8_t)(random_bits() % 3);
    }
    const float scales[] = {0.5f, 0.3f, 1e-5f, NAN};
    float *by_row = fenced(rows * 4);
    for (int64_t r = 0; r < rows; r++) {
        by_row[r] = scales[random_bits() % 4];
    }
    for (int s = 0; s < 5; s++) {
        const bool channels = s == 4;
        for (int t = 0; t < table_count && tables[t]->ternarize != NULL; t++) {
            memcpy(panels, old, (size_t)bytes);
            memset(turned, 0, (size_t)turned_bytes);
            const ternarize_args a = {w, channels ? by_row : &scales[s], panels, turned, tally, rows, cols, channels};
            EACH_UNIT_BACKWARDS(tables[t]->ternarize, &a, groups)
            bool ok = intact(panels, bytes) && intact(turned, turned_bytes) && intact(tally, rows * 16);
            for (int64_t r = 0; r < groups * BN_PANEL_ROWS; r++) {
                int32_t counts[4] = {0};
                for (int64_t c = 0; c < depth; c++) {
                    const bool real = r < rows && c < cols;
                    const int8_t code = real ? bn_ternary_code(w[r * cols + c], channels ? by_row[r] : scales[s]) : 0;
                    const int64_t at = bn_code_at(r, c, depth);
                    ok = ok && panels[at] == (real ? code + 1 : 0);
                    ok = ok && (c >= bn_round_up(cols, BN_PANEL_ROWS) ||
                                turned[bn_code_at(c, r, turned_depth)] == (real ? code + 1 : 0));
                    if (real) {
                        counts[code + 1]++;
                        counts[3] += code + 1 != old[at];
                    }
                }
                ok = ok && (r >= rows || memcmp(counts, tally + 4 * r, 16) == 0);
            }
            expect(ok, "ternarize", tables[t]->isa, rows, cols, 0, s);
        }
    }
    void *all[] = {w, old, panels, turned, tally, by_row};
    for (int i = 0; i < 6; i++) {
        release(all[i]);
    }
}

/* ---- quantize_rows ----------------------------------------------------------------------------------------------- */

static void test_quantize_shape(int64_t rows, int64_t cols, int64_t spare, int bits) {
    const int64_t stride = bn_round_up(cols, BN_QUANT_PAD) + spare;
    float *x = fenced(rows * cols * 4), *act_scale = fenced(rows * 4);
    const int64_t bytes = bn_round_up(rows, BN_QUANT_ROWS) * stride;
    int8_t *q = fenced(bytes), *expected = fenced(stride);
    int32_t *row_sum = fenced(rows * 4);
    for (int64_t i = 0; i < rows * cols; i++) {
        x[i] = random_float() * ldexpf(1.0f, (int)(i / cols % 7) * 20 - 60); /* rows from far below eps to 2^60 */
    }
    const float edges[] = {NAN, INFINITY, -INFINITY, 3.4e38f};
    for (int64_t r = 0; r < rows && cols > 0; r++) {
        if (r % 3 == 1) {
            x[r * cols + (int64_t)random_bits() % cols] = edges[r / 3 % 4];
        }
    }
    for (int t = 0; t < table_count; t++) {
        const quantize_rows_args a = {x, {q, act_scale, row_sum, stride}, rows, cols, bits};
        if (tables[t]->quantize_rows == NULL) {
            continue;
        }
        EACH_UNIT_BACKWARDS(tables[t]->quantize_rows, &a, rows)
        bool ok = intact(q, bytes) && intact(act_scale, rows * 4) && intact(row_sum, rows * 4);
        for (int64_t r = 0; r < rows; r++) {
            memset(expected, 0, (size_t)stride);
            const float scale = bn_int8_row(x + r * cols, cols, bits, expected);
            int32_t sum = 0;
            for (int64_t c = 0; c < cols; c++) {
                sum += expected[c];
            }
            ok = ok && memcmp(&scale, &act_scale[r], 4) == 0 && sum == row_sum[r];
            for (int64_t c = 0; c < stride; c++) {
                ok = ok && expected[c] == q[bn_quantized_at(r, c, stride)];
            }
        }
        expect(ok, "quantize_rows", tables[t]->isa, rows, cols, bits, (int)spare);
    }
    void *all[] = {x, act_scale, q, expected, row_sum};
    for (int i = 0; i < 5; i++) {
        release(all[i]);
    }
}

static void test_quantizers(void) {
    static const int64_t rows[] = {0, 1, 15, 16, 17, 33}, cols[] = {1, 3, 4, 15, 16, 17, 63, 64, 65, 200};
    for (int i = 0; i < 6; i++) {
        for (int j = 0; j < 10; j++) {
            test_ternarize_shape(rows[i], cols[j]);
        }
    }
    done("ternarize: codes, panels, tally");
    for (int i = 0; i < 6; i++) {
        for (int j = 0; j < 10; j++) {
            test_quantize_shape(rows[i], cols[j], 64 * (j % 2), 8);
            test_quantize_shape(rows[i], cols[j], 64 * (j % 2), 4);
        }
    }
    test_quantize_shape(2, 0, 0, 8);
    test_quantize_shape(7, 9000, 0, 8); /* several blocks of the exact sum */
    done("quantize_rows: codes, scales, sums, padding");
}

/* ---- bitlinear_forward ------------------------------------------------------------------------------------------- */

static void test_bitlinear_shape(int64_t m, int64_t n, int64_t k, int64_t spare) {
    const int64_t padded = bn_round_up(k, BN_QUANT_PAD), stride = padded + spare, bytes = m * n * 4;
    float *x = fenced(m * k * 4), *w = fenced(n * k * 4), *act_scale = fenced(m * 4), *y = fenced(bytes);
    float *expected[3] = {fenced(bytes), fenced(bytes), fenced(bytes)}; /* one scale, one a column, none */
    float *channels = fenced(n * 4);
    int8_t *q = fenced(bn_round_up(m, BN_QUANT_ROWS) * stride);
    uint8_t *turned = fenced(bn_code_panels_bytes(k, n));
    uint8_t *panels = memset(fenced(bn_code_panels_bytes(n, k)), 0, (size_t)bn_code_panels_bytes(n, k));
    int32_t *row_sum = fenced(m * 4), *tally = fenced(n * 16);
    for (int64_t i = 0; i < m * k; i++) {
        x[i] = random_float();
    }
    for (int64_t i = 0; i < n * k; i++) {
        w[i] = random_float();
    }
    if (m > 2 && k > 0) {
        x[2 * k] = NAN; /* its row of y is NaN, and no other */
    }
    const float scale = bn_absmean_scale(w, n * k);
    const quantize_rows_args qa = {x, {q, act_scale, row_sum, stride}, m, k, 8};
    const ternarize_args ta = {w, &scale, panels, turned, tally, n, k, false};
    tables[0]->quantize_rows(&qa, 0, m, scratch);
    tables[0]->ternarize(&ta, 0, bn_ceil_div(n, BN_PANEL_ROWS), scratch);
    for (int64_t j = 0; j < n; j++) {
        channels[j] = random_float();
    }
    for (int64_t i = 0; i < m; i++) {
        for (int64_t j = 0; j < n; j++) {
            int64_t sum = 0;
            for (int64_t p = 0; p < k; p++) {
                sum += q[bn_quantized_at(i, p, stride)] * (panels[bn_code_at(j, p, bn_round_up(k, BN_QUANT_PAD))] - 1);
            }
            expected[0][i * n + j] = (float)sum * (act_scale[i] * scale);
            expected[1][i * n + j] = (float)sum * (act_scale[i] * channels[j]);
            expected[2][i * n + j] = (float)sum * act_scale[i];
        }
    }
    const bn_tiles chosen = bn_product_tiles(m, n, k, 3);
    const int64_t tiles[][2] = {
        {bn_round_up(m + 1, 16), bn_round_up(n + 1, 16)}, {16, 16}, {32, 64}, {chosen.tile_m, chosen.tile_n}};
    int8_t *codes = fenced(n * k);
    for (int64_t i = 0; i < n * k; i++) {
        codes[i] = (int8_t)(panels[bn_code_at(i / k, i % k, padded)] - 1);
    }
    uint8_t *dense[BN_CODES_5 + 1] = {panels};
    int64_t dense_bytes[BN_CODES_5 + 1] = {0};
    for (bn_code_form form = BN_CODES_2; form <= BN_CODES_5; form++) {
        dense_bytes[form] = bn_ceil_div(n, BN_PANEL_ROWS) * bn_code_panel_bytes(form, padded / BN_QUANT_PAD);
        dense[form] = fenced(dense_bytes[form]);
    }
    for (int t = 0; t < table_count; t++) {
        for (bn_code_form form = BN_CODES_2; tables[t]->prepare_codes != NULL && form <= BN_CODES_5; form++) {
            const prepare_codes_args pa = {codes, NULL, dense[form], form, tally, n, k};
            EACH_UNIT_BACKWARDS(tables[t]->prepare_codes, &pa, bn_ceil_div(n, BN_PANEL_ROWS))
            expect(intact(dense[form], dense_bytes[form]), "prepare_codes", tables[t]->isa, m, n, k, (int)form);
        }
        for (int s = 0; tables[t]->bitlinear_forward != NULL && s < 36; s++) {
            const bn_code_form form = (bn_code_form)(s / 4 % 3);
            const float *weight_scales[] = {&scale, channels, NULL};
            const bitlinear_forward_args a = {.q = q,
                                              .act_scale = act_scale,
                                              .row_sum = row_sum,
                                              .panels = dense[form],
                                              .form = form,
                                              .weight_scale = weight_scales[s / 12],
                                              .channel_scales = s / 12 == 1,
                                              .y = y,
                                              .m = m,
                                              .n = n,
                                              .k = k,
                                              .q_stride = stride,
                                              .tile_m = tiles[s % 4][0],
                                              .tile_n = tiles[s % 4][1]};
            memset(y, 0x3C, (size_t)bytes);
            EACH_UNIT_BACKWARDS(tables[t]->bitlinear_forward, &a, bn_ceil_div(m, a.tile_m) * bn_ceil_div(n, a.tile_n))
            bool ok = memcmp(y, expected[s / 12], (size_t)bytes) == 0 && intact(y, bytes);
            expect(ok, "bitlinear_forward", tables[t]->isa, m, n, k, s);
        }
    }
    release(codes);
    release(dense[BN_CODES_2]);
    release(dense[BN_CODES_5]);
    void *all[] = {x,        w, act_scale, y,      expected[0], expected[1], expected[2],
                   channels, q, turned,    panels, row_sum,     tally};
    for (int i = 0; i < 13; i++) {
        release(all[i]);
    }
}

static void test_bitlinear(void) {
    static const int64_t ms[] = {1, 2, 4, 7, 17, 49}, ns[] = {1, 15, 16, 17, 31, 33, 48, 97};
    static const int64_t ks[] = {1, 15, 64, 65, 200, 330};
    for (int i = 0; i < 6; i++) {
        for (int j = 0; j < 8; j++) {
            for (int l = 0; l < 6; l++) {
                test_bitlinear_shape(ms[i], ns[j], ks[l], 64 * (l % 2));
            }
        }
    }
    test_bitlinear_shape(0, 5, 7, 0);
    test_bitlinear_shape(5, 0, 7, 0);
    test_bitlinear_shape(3, 5, 0, 0);
    test_bitlinear_shape(2, 20, 150000, 0); /* sums beyond 2^24, where int to float rounds */
    done("bitlinear_forward: integers, scales, tiles");
}

/* ---- scales of channels ------------------------------------------------------------------------------------------ */

/* Sums and means of lines are those of each line alone. */
static void test_lines(int64_t lines, int64_t n) {
    const int64_t blocks = bn_ceil_div(n, BN_BLOCK);
    float *x = fenced(lines * n * 4), *mean = fenced(lines * 4);
    double *partial = fenced(lines * blocks * 8), *alone = fenced(blocks * 8);
    for (int64_t i = 0; i < lines * n; i++) {
        x[i] = random_float() * ldexpf(1.0f, (int)(i / n % 7) * 10 - 40); /* some means below the least */
    }
    for (int t = 0; t < table_count && tables[t]->reduce_blocks != NULL; t++) {
        const reduce_blocks_args sums = {x, partial, n, BN_REDUCE_ABS};
        EACH_UNIT_BACKWARDS(tables[t]->reduce_blocks, &sums, lines * blocks)
        const reduce_finish_args finish = {
            .partial = partial, .out = mean, .count = blocks, .factor = 1.0 / (double)n, .minimum = BN_QUANT_EPS};
        EACH_UNIT_BACKWARDS(tables[t]->reduce_finish, &finish, lines)
        bool ok = intact(partial, lines * blocks * 8) && intact(mean, lines * 4);
        for (int64_t r = 0; r < lines; r++) {
            float one = 0.0f;
            const reduce_blocks_args line = {x + r * n, alone, n, BN_REDUCE_ABS};
            tables[0]->reduce_blocks(&line, 0, blocks, scratch);
            const reduce_finish_args its = {
                .partial = alone, .out = &one, .count = blocks, .factor = 1.0 / (double)n, .minimum = BN_QUANT_EPS};
            tables[0]->reduce_finish(&its, 0, 1, scratch);
            const float by_hand_scale = bn_absmean_scale(x + r * n, n);
            ok = ok && memcmp(&one, &mean[r], 4) == 0 && fabsf(one - by_hand_scale) <= 1.6e-5f * by_hand_scale;
        }
        expect(ok, "reduce of lines", tables[t]->isa, lines, 0, n, 0);
    }
    void *all[] = {x, mean, partial, alone};
    for (int i = 0; i < 4; i++) {
        release(all[i]);
    }
}

/* Panels and int8 of a matrix times its columns' scales are those of the product made before. */
static void test_pack_channels(int64_t rows, int64_t cols) {
    const int64_t bytes = bn_panels_bytes(rows, cols), stride = bn_round_up(cols, BN_QUANT_PAD);
    const int64_t q_bytes = bn_round_up(rows, BN_QUANT_ROWS) * stride;
    float *x = fenced(rows * cols * 4), *product = fenced(rows * cols * 4), *scales = fenced(cols * 4);
    void *panels[2] = {fenced(bytes), fenced(bytes)};
    int8_t *q[2] = {fenced(q_bytes), fenced(q_bytes)};
    float *act_scale[2] = {fenced(rows * 4), fenced(rows * 4)};
    int32_t *row_sum[2] = {fenced(rows * 4), fenced(rows * 4)};
    for (int64_t j = 0; j < cols; j++) {
        scales[j] = random_float();
    }
    for (int64_t i = 0; i < rows * cols; i++) {
        x[i] = random_float();
        product[i] = x[i] * scales[i % cols];
    }
    for (int t = 0; t < table_count; t++) {
        for (int made = 0; tables[t]->pack_panels != NULL && made < 2; made++) {
            memset(panels[made], 0, (size_t)bytes);
            memset(q[made], 0, (size_t)q_bytes);
            const pack_panels_args args = {.data = made ? product : x,
                                           .rows = rows,
                                           .cols = cols,
                                           .by_rows = {panels[made], true},
                                           .scale = made ? NULL : scales,
                                           .int8 = {q[made], act_scale[made], row_sum[made], stride},
                                           .channel_scales = !made};
            EACH_UNIT_BACKWARDS(tables[t]->pack_panels, &args, bn_ceil_div(rows, BN_PACK_ROWS))
        }
        const bool ok = memcmp(panels[0], panels[1], (size_t)bytes) == 0 && memcmp(q[0], q[1], (size_t)q_bytes) == 0 &&
                        memcmp(act_scale[0], act_scale[1], (size_t)rows * 4) == 0 &&
                        memcmp(row_sum[0], row_sum[1], (size_t)rows * 4) == 0 && intact(panels[0], bytes) &&
                        intact(q[0], q_bytes);
        expect(ok, "pack_panels by channels", tables[t]->isa, rows, 0, cols, 0);
    }
    void *all[] = {x,    product,      scales,       panels[0],  panels[1], q[0],
                   q[1], act_scale[0], act_scale[1], row_sum[0], row_sum[1]};
    for (int i = 0; i < 11; i++) {
        release(all[i]);
    }
}

static void test_channels(void) {
    static const int64_t rows[] = {1, 17, 33}, cols[] = {1, 15, 64, 257, 300};
    for (int i = 0; i < 3; i++) {
        for (int j = 0; j < 5; j++) {
            test_lines(rows[i], cols[j]);
            test_pack_channels(rows[i], cols[j]);
        }
    }
    test_lines(5, BN_BLOCK);
    test_lines(5, 2 * BN_BLOCK + 9);
    done("scales of channels: means of lines, factors of columns");
}

/* ---- tiles ------------------------------------------------------------------------------------------------------- */

static void test_tiles(void) {
    static const int64_t sizes[] = {0, 1, 47, 48, 100, 688, 2048, 32000, 250000};
    for (int i = 0; i < 9 * 9 * 9; i++) {
        const int64_t m = sizes[i / 81], n = sizes[i / 9 % 9], k = sizes[i % 9];
        for (int workers = 1; workers <= 64; workers *= 4) {
            const bn_tiles t = bn_product_tiles(m, n, k, workers);
            bool ok = t.tile_m > 0 && t.tile_n > 0 && t.tile_n % BN_PANEL_ROWS == 0 && t.tile_m % BN_QUANT_ROWS == 0 &&
                      t.grain >= 1;
            ok = ok && t.units == bn_ceil_div(m, t.tile_m) * bn_ceil_div(n, t.tile_n);
            const int64_t smallest = bn_ceil_div(m, BN_TILE_ROWS) * bn_ceil_div(n, BN_TILE_COLUMNS);
            const int64_t plenty = bn_min_i64(smallest / 4, 2 * workers);
            ok = ok && (workers == 1 || m * n * k / workers < 100000000 || t.units >= plenty);
            expect(ok, "tiles", "product", m, n, k, workers);
        }
    }
    done("tiles: legal, and enough for every worker");
}

int main(void) {
    scratch = aligned_alloc(64, BN_SCRATCH_BYTES);
    find_tables();
    printf("instruction sets:");
    for (int t = 0; t < table_count; t++) {
        printf(" %s", tables[t]->isa);
    }
    printf("\n");
    test_contract();
    test_tiles();
    test_gemm();
    test_panels();
    test_head();
    test_quantizers();
    test_bitlinear();
    test_channels();
    free(scratch);
    return failures != 0;
}
