/*
 * kernels.h: what every kernel computes, on any device: one plain argument struct each, and the table generated
 * from kernels.def.
 *
 * A kernel is given the half-open range [begin, end) of its *units* (named at each struct) and owns the outputs
 * of those units: no locks, no atomics, and every sum is split by fixed blocks, so the thread count cannot change
 * a bit. All arrays are dense row-major and 64-byte aligned unless a stride is given. `scratch` is BN_SCRATCH_BYTES
 * of memory private to the calling thread, contents undefined (CUDA passes NULL).
 *
 * The order of floating-point operations is part of each contract (the words of cpu/kernels.inc): LANES means sixteen
 * partial results, element i into lane i mod 16, joined by one fixed tree; SEQUENTIAL means one fused multiply-add
 * after another in index order, starting at zero (or at the value already in the output where `accumulate` is set).
 *
 * Letters: B batch, T time, C channels, H query heads, KV key/value heads, D head dimension, V vocabulary.
 */
#ifndef BN_KERNELS_KERNELS_H
#define BN_KERNELS_KERNELS_H

#include "base/common.h"
#include "base/dtype.h"
#include "base/parallel.h" /* BN_SCRATCH_BYTES */

BN_EXTERN_C_BEGIN

/* Elements in a unit of a whole-array kernel: 16 KiB of f32, so three operands of one block fit a 48 KiB L1. */
#define BN_BLOCK 4096
/* Columns in a unit of a kernel that walks down a matrix: two cache lines of f32. */
#define BN_COLUMNS 32
/* Keys in one step of the streaming softmax; part of the numeric contract of attention. */
#define BN_ATTENTION_KEYS 64
/* Keys whose streaming softmax is one chain, a multiple of the above; spans are joined. Part of the contract as well.
 */
#define BN_ATTENTION_SPAN 1024
/* Query rows in a unit of attention_forward, and most of one of attention_span; not part of the numeric contract. */
#define BN_ATTENTION_QUERIES 64
/* Rows (output features) in a panel of prepared ternary weights, and bytes of K in one integer dot step. */
#define BN_PANEL_ROWS 16
#define BN_PANEL_DEPTH 4
/* Rows that bitlinear_forward multiplies by codes of two bits in registers; a tile of units holds them all. */
#define BN_FEW_ROWS 8
/* int8 rows are padded with zeros to a multiple of this many bytes. */
#define BN_QUANT_PAD 64
/* Rows of int8 activations come in tiles of sixteen by BN_QUANT_PAD, as integer products read them. */
#define BN_QUANT_ROWS 16
#define BN_QUANT_TILE (BN_QUANT_ROWS * BN_QUANT_PAD)
/* Rows in a unit of pack_panels, and of rmsnorm_backward. */
#define BN_PACK_ROWS 32
#define BN_NORM_BAND 32
/* Rows and vocabulary in a unit of the fused output head: 192 KiB of logits in scratch. Both hold whole register tiles
 * of every instruction set (tiles.h) and whole tiles of p. */
#define BN_HEAD_ROWS 128
#define BN_HEAD_LANES 384
/* A target with this value takes no part in the loss (the convention of PyTorch and transformers). */
#define BN_IGNORE_INDEX (-100)

/* ---- whole-array arithmetic: units are blocks of BN_BLOCK elements ------------------------------------------ */

/* dst = (dst_dtype) src. f32 -> bf16 rounds to nearest even, NaN stays NaN; i8, i32 -> f32; bf16 -> f32 is exact;
 * ternary2 -> f32 or i8 gives codes -1, 0, 1. Other pairs are refused by the op. */
typedef struct convert_args {
    const void *src;
    void *dst;
    int64_t n;
    bn_dtype src_dtype, dst_dtype;
} convert_args;

/* out = fma(alpha, a, beta * b) with b optional: out = alpha * a when b is NULL. With `bias_n` > 0, b has bias_n
 * elements and is repeated (b[i mod bias_n]). out may be a or b. */
typedef struct axpby_args {
    const float *a, *b;
    float *out;
    int64_t n, bias_n;
    float alpha, beta;
} axpby_args;

/* out[i] = (accumulate ? out[i] : 0) + factor * value[0]. */
typedef struct fill_from_args {
    const float *value;
    float *out;
    int64_t n;
    float factor;
    bool accumulate;
} fill_from_args;

/* out = value[0] * x, or fma(value[0], x, out). */
typedef struct scale_from_args {
    const float *value, *x;
    float *out;
    int64_t n;
    bool accumulate;
} scale_from_args;

/* y = a * b. */
typedef struct mul_forward_args {
    const float *a, *b;
    float *y;
    int64_t n;
} mul_forward_args;

/* da (+)= dy * b, db (+)= dy * a, accumulating by fma(dy, b, da); da or db may be NULL. da and db never alias: for a
 * square the op makes two launches. */
typedef struct mul_backward_args {
    const float *dy, *a, *b;
    float *da, *db;
    int64_t n;
    bool accumulate_a, accumulate_b;
} mul_backward_args;

/* y[b, j, i] (+)= x[b, i, j]. Units: batch * rows of x in bands of 16 rows: unit u is band u mod bands of matrix
 * u / bands, with bands = ceil(rows / 16). */
typedef struct transpose_args {
    const float *x;
    float *y;
    int64_t batch, rows, cols;
    bool accumulate;
} transpose_args;

typedef enum bn_reduce { BN_REDUCE_SUM, BN_REDUCE_SQUARES, BN_REDUCE_ABS } bn_reduce;

/* partial[u] = LANES sum of x, x * x (fused) or |x| over block u, widened to double at the end. Lines of n elements,
 * one after the other, have blocks of their own: unit u is block u mod blocks of line u / blocks, blocks = ceil(n /
 * BN_BLOCK); where there is one line, its blocks. */
typedef struct reduce_blocks_args {
    const float *x;
    double *partial;
    int64_t n;
    bn_reduce kind;
} reduce_blocks_args;

/* out[u] = max(minimum, (float)(sum of partial[u * count ..][0..count) in index order * factor * (factor_ptr ?
 * *factor_ptr : 1))). Units: lines, of which there is mostly one. Doubles, so a mean over any model is exact to far
 * below one f32 ulp. A NaN sum stays NaN. */
typedef struct reduce_finish_args {
    const double *partial;
    const float *factor_ptr;
    float *out;
    int64_t count;
    double factor;
    float minimum;
} reduce_finish_args;

/* out[c] (+)= sum over rows of x[r, c], SEQUENTIAL in r (adds). Units: bands of BN_COLUMNS columns. */
typedef struct column_sum_args {
    const float *x;
    float *out;
    int64_t rows, cols;
    bool accumulate;
} column_sum_args;

/* y = exp(x - max) / sum over the last dimension; LANES sum. Units: rows. */
typedef struct softmax_forward_args {
    const float *x;
    float *y;
    int64_t rows, cols;
} softmax_forward_args;

/* dx (+)= y * (dy - LANES sum of dy * y). Units: rows. */
typedef struct softmax_backward_args {
    const float *dy, *y;
    float *dx;
    int64_t rows, cols;
    bool accumulate;
} softmax_backward_args;

/* ---- indices ------------------------------------------------------------------------------------------------ */

/* The first illegal index a launch met; row < 0 means none. Read by the op after the launch. */
typedef struct bn_fault {
    int64_t row, value;
} bn_fault;

/* Finds the first i with index[i] + offset outside [0, limit), values equal to `ignore` exempt if `has_ignore`. One
 * or, if `distinct`, equal to an earlier one. One unit. */
typedef struct index_check_args {
    const int32_t *index;
    bn_fault *fault;
    int64_t n, limit, offset;
    int32_t ignore;
    bool has_ignore;
    bool distinct; /* takes time that grows with n * n */
} index_check_args;

/* y[r, :] = table[index[r], :]; the table is f32 or bf16. Units: rows of y. */
typedef struct embedding_forward_args {
    const int32_t *index;
    const void *table;
    bn_dtype dtype;
    float *y;
    int64_t rows, C, V;
} embedding_forward_args;

/* dtable[index[r], :] += dy[r, :], SEQUENTIAL in r. Units: bands of BN_COLUMNS columns. Without `accumulate` the
 * band is cleared first. */
typedef struct embedding_backward_args {
    const int32_t *index;
    const float *dy;
    float *dtable;
    int64_t rows, C, V;
    bool accumulate;
} embedding_backward_args;

/* ---- matrix products ---------------------------------------------------------------------------------------- */

/* Where q[row, col] of a quantized activation lies, `stride` being its padded row: tiles of sixteen rows one after the
 * other, the sixteen rows' last tile before the next rows' first. */
static inline int64_t bn_quantized_at(int64_t row, int64_t col, int64_t stride) {
    return row / BN_QUANT_ROWS * BN_QUANT_ROWS * stride + col / BN_QUANT_PAD * BN_QUANT_TILE +
           row % BN_QUANT_ROWS * BN_QUANT_PAD + col % BN_QUANT_PAD;
}

/* Where the code of lane `lane` at p lies in panels of ternary codes, each `depth` (a multiple of BN_QUANT_PAD) deep:
 * [lane / 16][p / 4][lane % 16][p % 4], as integer dot products read them. The byte is code + 1; beyond the last p it
 * is 0. */
static inline int64_t bn_code_at(int64_t lane, int64_t p, int64_t depth) {
    return lane / BN_PANEL_ROWS * BN_PANEL_ROWS * depth + p / BN_PANEL_DEPTH * BN_PANEL_ROWS * BN_PANEL_DEPTH +
           lane % BN_PANEL_ROWS * BN_PANEL_DEPTH + p % BN_PANEL_DEPTH;
}
static inline int64_t bn_code_panels_bytes(int64_t lanes, int64_t p) {
    return bn_round_up(lanes, BN_PANEL_ROWS) * bn_round_up(p, BN_QUANT_PAD);
}

/* Panels of codes as bytes (bn_code_at), or denser. Sixteen words of a panel, 64 bytes each, are a *tile*.
 * BN_CODES_2, four codes a byte: a tile is four groups of four words, and byte j of a group holds byte j of its word n
 * in bits 2 n and 2 n + 1.
 * BN_CODES_5, five codes a byte: five tiles are sixteen groups of 64 bytes; byte j of group g is the sum of 3^n * byte
 * j of word 4 g + n of the first four tiles, n < 4, and 81 * byte j of word g of the fifth. The last tiles, fewer than
 * five, are as in BN_CODES_2. */
typedef enum bn_code_form { BN_CODES_8, BN_CODES_2, BN_CODES_5 } bn_code_form;
enum { BN_FIVE_TILES = 5 };

/* Bytes of the first `tiles` tiles of a panel: where the next one begins, if `tiles` is a multiple of five, or beyond
 * the last one that is. */
static inline int64_t bn_code_panel_bytes(bn_code_form form, int64_t tiles) {
    return form == BN_CODES_8   ? tiles * BN_QUANT_TILE
           : form == BN_CODES_2 ? tiles * (BN_QUANT_TILE / 4)
                                : tiles / BN_FIVE_TILES * BN_QUANT_TILE + tiles % BN_FIVE_TILES * (BN_QUANT_TILE / 4);
}

/* How a factor of a product lies in memory, k being the summed index and a lane an i of a or a j of b. */
typedef enum bn_layout {
    BN_STRIDED, /* element (i, j) at data[i * row_stride + j * col_stride], one of the strides being 1; f32 or i8 */
    BN_TILED,   /* b only: int8 activations (k, n) at bn_quantized_at(k, j, row_stride) */
    BN_CODES,   /* b only: ternary codes at bn_code_at(j, k, row_stride) */
    BN_PANELS   /* a only, gemm_bf16 only: as pack_panels leaves a left factor, scales and all */
} bn_layout;

/* One factor of a product, times scale[0] if given, times depth_scale[k] if given. Each factor is rounded once before
 * the product: to f32. */
typedef struct gemm_operand {
    const void *data;
    const float *scale, *depth_scale;
    int64_t row_stride, col_stride;
    bn_layout layout;
    bn_dtype dtype;
} gemm_operand;

/* c[i, j] (+)= sum over p of a[i, p] * b[p, j], SEQUENTIAL in p, whatever the blocking: partial sums may rest in c
 * between blocks of p because storing f32 loses nothing. a is (m, k), b is (k, n), c is (m, n) with row stride ldc.
 * Units: tiles of tile_m x tile_n of c, row-major over the grid of tiles. k may be 0 (c becomes 0 or stays). */
typedef struct gemm_args {
    gemm_operand a, b;
    float *c;
    int64_t m, n, k, ldc;
    int64_t tile_m, tile_n;
    bool accumulate;
} gemm_args;

/* The same with each factor, times its scales, rounded once to bf16 (to nearest even): codes -1..1 and -128..127 are
 * exact. The sum is in f32 in an order that depends on the instruction set, but on nothing else: not on tiles or
 * threads. */
typedef gemm_args gemm_bf16_args;

/* ---- the output head in inference ---- */

/* y[i, j] = sum over p of x[i, p] * w[j, p] for a bf16 matrix w (n, k) as it lies in memory, SEQUENTIAL in p: the bits
 * of gemm of w widened to f32. With `rows`, only for the j that it names: w and y are as without, unit u has rows[16 u
 * ..]. Units: groups of 16 rows of w, n or `rows` of them in all. */
typedef struct linear_bf16_args {
    const float *x;
    const uint16_t *w;
    float *y;
    const int32_t *rows; /* NULL: all */
    int64_t m, n, k;     /* n: rows of w, or entries of `rows` */
    int64_t ldy;
} linear_bf16_args;

/* An output matrix in 8 or 6 bits a weight: w[j, p] is about scale[j] * (byte - BN_COMPACT_ZERO(bits)). A tile of
 * sixteen rows by 64 columns is sixteen words as in panels of codes (bn_code_at); in 8 bits as it is, in 6 bits each
 * four words are 192 bytes: the lower halves of words 0 and 1 (one in each half of a byte), those of words 2 and 3, and
 * the upper two bits of word n in bits 2 n and 2 n + 1. */
#define BN_COMPACT_ZERO(bits) (1 << ((bits)-1))
static inline int64_t bn_compact_tile_bytes(int bits) { return BN_QUANT_TILE / 8 * bits; }
static inline int64_t bn_compact_bytes(int64_t rows, int64_t cols, int bits) {
    return bn_ceil_div(rows, BN_PANEL_ROWS) * bn_ceil_div(cols, BN_QUANT_PAD) * bn_compact_tile_bytes(bits);
}
/* Terms of a sum of byte * int8: 2^16 * 255 * 128 < 2^31. */
#define BN_COMPACT_MOST_COLS (1 << 16)

/* Rounds rows of w (rows, cols), f32 or bf16: scale = max(absmax, 1e-30) / most with most = 127 or 31, q = rint(w /
 * that). norms[r] = {of what is lost, |w - scale q|, of what is kept, |scale q|}: euclidean, rounded up by at least the
 * error of their own sums. A row that is not finite has infinite norms and q = 0. Units: groups of 16 rows. */
typedef struct compact_rows_args {
    const void *w;
    bn_dtype dtype;
    int bits;
    uint8_t *panels;
    float *scale, *norms;
    int64_t rows, cols;
} compact_rows_args;

/* Activations in two int8 each: a = 32512 / max(absmax, 1e-30), x * a is about 256 high + low, rounded to nearest even,
 * low in -128 .. 127; act_scale = 1 / a; sums of high and of low; and {X, Y}: what the error of a product is bounded by
 * (screen). high and low lie side by side: row r of high at 2 r, of low at 2 r + 1, each `stride` bytes, a multiple of
 * BN_QUANT_PAD, zeros at the end. A row that is not finite has act_scale NaN and zeros. Units: rows. */
typedef struct bn_split_rows {
    int8_t *q;
    float *act_scale, *bound;
    int32_t *sums; /* {of high, of low} */
    int64_t stride;
} bn_split_rows;
typedef struct split_rows_args {
    const float *x;
    bn_split_rows out;
    int64_t rows, cols;
} split_rows_args;

/* y[i, j] = fma(H, 256, L) * (act_scale[i] * scale[j]), H and L the integer sums of high and low by q, as floats.
 * Units: groups of 16 rows of the matrix. */
typedef struct compact_forward_args {
    bn_split_rows x;
    const uint8_t *panels;
    const float *scale;
    int bits;
    float *y;
    int64_t m, n, k;
} compact_forward_args;

/* Which outputs of a product by bf16 rows may be among its `top` largest, told from the same product by compact ones.
 * In row i, output j of linear_bf16 is within e = norms[j, 0] * X[i] + norms[j, 1] * Y[i] of y[i, j]:
 *   |w.x - q.(x + d)| <= |w - q| |x| + |q| |d|, |d| <= 0.51 sqrt(cols) act_scale, and every sum of `cols` products in
 * f32 is within cols 2^-24 / (1 - cols 2^-24) |w| |x| of its own (Higham 2002, section 3.1); X = (1 + 2^-10) |x| (1 +
 * that), Y = (1 + 2^-10) (|d| + |x| (that + 2^-17)). Candidates are those j with y + e >= the `top`-th largest y - e;
 * or all, where that is no number. Their list goes to candidates[i, ..] in ascending order, its length to counts[i],
 * and y[i, j] becomes -infinity. Units: rows. */
typedef struct screen_args {
    float *y;
    const float *norms, *bound;
    int32_t *candidates, *counts;
    int64_t m, n, top;
} screen_args;
#define BN_SCREEN_MOST (BN_SCRATCH_BYTES / (int64_t)sizeof(float))

/* Bytes that hold a factor of `lanes` by `depth` in panels (cpu/micro.h) on any instruction set, sixteen lanes by
 * sixteen values of p to a KiB; where a word holds two values, half of them stay untouched. */
static inline int64_t bn_panels_bytes(int64_t lanes, int64_t depth) {
    return 1024 * bn_ceil_div(lanes, 16) * bn_ceil_div(depth, 16);
}

/* A matrix as a left or as a right factor in panels. */
typedef struct bn_panels {
    void *memory; /* bn_panels_bytes(lanes, depth); NULL: not wanted */
    bool left;
} bn_panels;

/* A weight matrix (rows, cols) of codes to panels for y = x W^T, what pads them included, and tally[r] = {minus, zero,
 * plus, bad}. The codes come as bytes -1, 0, 1, or as *fifths*: of n = rows * cols codes in row-major order, five a
 * byte, byte j of m = ceil(n / 5) is the sum over k < 5 of 3^k * (code[j + k m] + 1), places beyond n being 0; bad
 * counts such bytes above 242 that the row has a part in. Units: groups of BN_PANEL_ROWS rows. */
typedef struct prepare_codes_args {
    const int8_t *codes;
    const uint8_t *fifths; /* where codes is NULL */
    uint8_t *panels;       /* for each group bn_code_panel_bytes(form, ceil(cols / BN_QUANT_PAD)) */
    bn_code_form form;     /* not BN_CODES_8 */
    int32_t *tally;
    int64_t rows, cols;
} prepare_codes_args;

/* Where a row's int8 form goes: q in tiles (bn_quantized_at) with rows padded by zeros to q_stride bytes (tiles of rows
 * that do not exist are not written), and the row's scale and sum. */
typedef struct bn_int8_rows {
    int8_t *q;
    float *act_scale;
    int32_t *row_sum;
    int64_t q_stride;
} bn_int8_rows;

/* A matrix (rows, cols) in the forms that products read it in more than once, each if its memory is given: rounded to
 * bf16 in panels, `by_rows` with its rows as lanes and p along the columns, times scale[0] if given, and `by_cols` with
 * its columns as lanes and p along the rows, times row_scale[row] if given; and as quantize_rows leaves it. With
 * channel_scales, by_rows and the int8 form are of the matrix times scale[column]. Units: bands of BN_PACK_ROWS rows.
 */
typedef struct pack_panels_args {
    const float *data;
    int64_t rows, cols;
    bn_panels by_rows, by_cols;
    const float *scale, *row_scale;
    bn_int8_rows int8;
    bool channel_scales;
} pack_panels_args;

/* gemm_bf16 of two factors in panels: c (+)= left right^T, with the same bits. Units: tiles as of gemm. */
typedef struct gemm_panels_args {
    const void *left, *right; /* m and n lanes, each k deep */
    float *c;
    int64_t m, n, k, ldc;
    int64_t tile_m, tile_n;
    bool accumulate;
} gemm_panels_args;

/* Ternary codes of one weight matrix w (rows, cols): code = clamp(rint(w * (1 / scale[0])), -1, 1), NaN gives 0; with
 * channel_scales, row r has scale[r].
 * Writes them in panels (bn_code_at) twice: `panels` with rows as lanes and p along the columns, for y = x W^T, and
 * `turned` with columns as lanes and p along the rows, for dx = dy W; what pads p is left as it is, and is to be 0.
 * tally[r] = {minus, zero, plus, flipped} counts of row r, flipped = codes that differ from those found in `panels` on
 * entry. Units: groups of BN_PANEL_ROWS rows. */
typedef struct ternarize_args {
    const float *w, *scale;
    uint8_t *panels, *turned; /* bn_code_panels_bytes(rows, cols) and (cols, rows) */
    int32_t *tally;
    int64_t rows, cols;
    bool channel_scales;
} ternarize_args;

/* Per-row absmax, most = 127 (bits 8) or 7 (bits 4): a = most / max(absmax, 1e-5); q = clamp(rint(x * a), -most - 1,
 * most), one int8 each in either case; act_scale = max(absmax, 1e-5) / most; row_sum = sum of q. If any element is NaN
 * or infinite, act_scale is NaN and q is 0 for that row. Units: rows. */
typedef struct quantize_rows_args {
    const float *x;
    bn_int8_rows out;
    int64_t rows, cols;
    int bits;
} quantize_rows_args;

/* y = q * act_scale. Units: rows. */
typedef struct dequantize_rows_args {
    bn_int8_rows x;
    float *y;
    int64_t rows, cols;
} dequantize_rows_args;

/* y[i, j] = (float)(sum over p of q[i, p] * code[j, p]) * (act_scale[i] * weight_scale[0]), plus residual[i, j] where
 * that is given. With channel_scales it is weight_scale[j]; where weight_scale is NULL, 1. The integer sum is
 * (sum of q * panel byte) - row_sum[i] in int32, exact for every cols < 2^23. q as quantize_rows leaves it. Units:
 * tiles of tile_m x tile_n of y, row-major; tile_m is a multiple of BN_QUANT_ROWS, tile_n of BN_PANEL_ROWS. */
typedef struct bitlinear_forward_args {
    const int8_t *q;
    const float *act_scale;
    const int32_t *row_sum;
    const uint8_t *panels;
    bn_code_form form; /* of the panels */
    const float *weight_scale, *residual;
    float *y;
    int64_t m, n, k, q_stride;
    int64_t tile_m, tile_n;
    bool channel_scales;
} bitlinear_forward_args;

/* ---- the transformer block ---------------------------------------------------------------------------------- */

/* rstd = 1 / sqrt(LANES sum of x*x / C + eps); y = (x * rstd) * gain, gain optional. Where int8.q is given y is not
 * stored but quantized, as quantize_rows would. Units: rows. */
typedef struct rmsnorm_forward_args {
    const float *x, *gain;
    float *y, *rstd;
    int64_t rows, C;
    float eps;
    bn_int8_rows int8;
} rmsnorm_forward_args;

/* With g = dy * gain: dx (+)= rstd * (g - x * (rstd^2 * LANES sum of g*x / C)); and the part of dgain that a band of
 * rows has, dgain[band, c] = sum over its r of dy[r, c] * (x[r, c] * rstd[r]), SEQUENTIAL. Either may be NULL. Units:
 * bands of BN_NORM_BAND rows. */
typedef struct rmsnorm_backward_args {
    const float *dy, *x, *gain, *rstd;
    float *dx, *dgain;
    int64_t rows, C;
    bool accumulate; /* dx */
} rmsnorm_backward_args;

/* y (+)= H x, the orthonormal Walsh-Hadamard transform of each block of n channels of a row, n = bn_hadamard_block(C).
 * Stages h = 1, 2, 4 .. n / 2 in this order, each (a, b) -> (a + b, a - b) for elements h apart, element j of a block
 * with bit h of j clear being a; then one multiplication by 1 / sqrtf(n), itself rounded to f32. Units: rows. */
typedef struct hadamard_args {
    const float *x;
    float *y;
    int64_t rows, C, n;
    bool accumulate;
} hadamard_args;
/* The largest power of two that divides C > 0. */
static inline int64_t bn_hadamard_block(int64_t C) { return C & -C; }
/* A row is transformed in a thread's scratch. */
#define BN_HADAMARD_MOST (BN_SCRATCH_BYTES / (int64_t)sizeof(float))

/* Rotates pairs (j, j + D/2) of every head: y1 (+)= x1*cos - x2*sin, y2 (+)= x2*cos + x1*sin, each as
 * fma(x1, cos, -(x2 * sin)) and fma(x2, cos, x1 * sin); `inverse` negates sin (the derivative). Row (b, t) uses
 * position start[b] + t, start NULL meaning 0. cos, sin: (positions, D/2). Units: rows (b, t) of (B, T, heads, D). */
typedef struct rope_args {
    const float *x, *cos, *sin;
    const int32_t *start;
    float *y;
    int64_t B, T, heads, D;
    bool inverse, accumulate;
} rope_args;

/* Keys or values of past tokens, (slots, capacity, KV, D): f32; bf16, rounded to nearest even; or i8, where a head of a
 * position is quantized as quantize_rows does a row, with its own scale. What is read is an f32: the element itself,
 * the bf16 widened, or code * scale. */
typedef struct bn_cache {
    void *data;
    float *scale; /* (slots, capacity, KV), of i8 only */
    bn_dtype dtype;
} bn_cache;

/* cache[slot[b], start[b] + t] = x[b, t], slot NULL meaning b; no two slots are equal. Units: rows (b, t). */
typedef struct cache_write_args {
    const float *x;
    const int32_t *start, *slot;
    bn_cache cache;
    int64_t B, T, KV, D, capacity;
} cache_write_args;

/* Causal grouped-query attention. q: (B, T, H, D); k, v: (slots, S, KV, D), of which sequence b has slot[b] (slot NULL:
 * b); head h reads key/value head h / (H/KV). Query t of sequence b sits at position start[b] + t (start NULL: 0) and
 * sees keys 0 .. that position, in spans of BN_ATTENTION_SPAN and in these in blocks of BN_ATTENTION_KEYS, both counted
 * from key 0. In each span m = -inf, l = 0, o = 0 at first; then for each block, in order:
 *   s_j = scale * (SEQUENTIAL over D of q_d * k_jd)        m' = max(m, max_j s_j)
 *   p_j = exp(s_j - m')    c = exp(m - m')    l = fma(l, c, LANES sum of p_j over the block; unseen lanes are 0)
 *   o_d = SEQUENTIAL over the block's j of p_j * v_jd, starting at o_d * c
 * Spans are joined in order, the first being taken as it is and each later one, with its m2, l2 and o2, by
 *   m' = max(m, m2)    c = exp(m - m')    e = exp(m2 - m')    l = fma(l2, e, l * c)    o = fma(o2, e, o * c)
 * and at the end out = o * (1 / l). Saves stats[b, h, t] = {m, 1 / l} for the backward pass (stats may be NULL).
 * T x T is never stored. Units: (b, h, block of BN_ATTENTION_QUERIES queries), the last fastest. */
typedef struct attention_forward_args {
    const float *q;
    bn_cache k, v;
    const int32_t *start, *slot;
    float *out, *stats;
    int64_t B, T, S, H, KV, D;
    float scale;
} attention_forward_args;

/* The same for few queries over a cache (T * H / KV at most BN_ATTENTION_QUERIES), in two launches, so that many
 * threads can share a long past and each key is read once for its whole group of heads. attention_span leaves m, l and
 * o of each span that the last query of a sequence reaches; spans = ceil(S / BN_ATTENTION_SPAN). Units: (b, key/value
 * head, span), the last fastest. attention_join makes `out` of them. Units: (b, t, h). `whole`'s stats are not made. */
typedef struct attention_span_args {
    attention_forward_args whole;
    float *sums; /* {m, l}: (B, H, T, spans, 2) */
    float *o;    /* (B, H, T, spans, D) */
} attention_span_args;
typedef attention_span_args attention_join_args;

/* Gradients for start = NULL and S == T: p_tj = exp(s_tj - m_t) * (1/l_t); delta_t = LANES sum over D of dout * out;
 * dv_j += p_tj * dout_t;  ds_tj = p_tj * (dout_t . v_j - delta_t) * scale;  dq_t += ds_tj * k_j;  dk_j += ds_tj * q_t.
 * Dot products over D and all sums over t or j are SEQUENTIAL in index order (dk, dv: over the group's heads in
 * order, then t; dq: over j). Units: (b, key/value head), the latter fastest; a unit owns dk, dv of that head and dq of
 * its H/KV query heads. Each of dq, dk, dv is written or, with its flag, added to. */
typedef struct attention_backward_args {
    const float *q, *k, *v, *out, *dout, *stats;
    float *dq, *dk, *dv;
    int64_t B, T, H, KV, D;
    float scale;
    bool accumulate_q, accumulate_k, accumulate_v;
} attention_backward_args;

/* The same with every factor of a product rounded once to bf16: q, k, v, dout, p and ds. exp (within 7.6e-5) and delta
 * are in f32, p is at most 1/l, and sums are in f32 in an order that depends on the instruction set, T and D, but on
 * nothing else. Pairs that are not seen are zeros that are multiplied: an infinity in q, k or dout reaches its
 * neighbours. */
typedef attention_backward_args attention_backward_bf16_args;

/* y = gate * sigmoid(gate) * up. Units: blocks. Where int8.q is given y is not stored but quantized, as quantize_rows
 * would rows of `cols`: units are rows then. */
typedef struct swiglu_forward_args {
    const float *gate, *up;
    float *y;
    int64_t n, cols;
    bn_int8_rows int8;
} swiglu_forward_args;

typedef struct swiglu_backward_args {
    const float *dy, *gate, *up;
    float *dgate, *dup;
    int64_t n;
    bool accumulate_gate, accumulate_up;
} swiglu_backward_args;

/* y = relu(gate)^2 * up; units and int8 as in swiglu_forward. */
typedef struct relu2_forward_args {
    const float *gate, *up;
    float *y;
    int64_t n, cols;
    bn_int8_rows int8;
} relu2_forward_args;

typedef struct relu2_backward_args {
    const float *dy, *gate, *up;
    float *dgate, *dup;
    int64_t n;
    bool accumulate_gate, accumulate_up;
} relu2_backward_args;

/* ---- loss and optimizer ------------------------------------------------------------------------------------- */

/* weight[0] = 1 / max(1, number of targets that are not BN_IGNORE_INDEX). One unit. */
typedef struct target_weight_args {
    const int32_t *targets;
    float *weight;
    int64_t n;
} target_weight_args;

/* Per row of logits (rows, V): loss = (max + log(sum exp(x - max))) - x[target], 0 for an ignored target. LANES sum;
 * the logarithm in double. With `gradient`, the row is overwritten by (softmax - onehot(target)) * weight[0], or by
 * zeros if ignored. Units: rows. */
typedef struct cross_entropy_args {
    float *logits;
    const int32_t *targets;
    const float *weight;
    float *loss;
    int64_t rows, V;
    bool gradient;
} cross_entropy_args;

/* Part of an output head: the logits x w^T of some rows of x and some of w, made in blocks of BN_HEAD_ROWS by
 * BN_HEAD_LANES that never leave a thread's scratch, by the sums of gemm_bf16. */
typedef struct head_part {
    const void *x, *w;      /* panels, left and right: (rows, C) and (V, C) */
    const int32_t *targets; /* of these rows, among the whole vocabulary */
    int64_t rows, V, C;
    int64_t first; /* target that row 0 of w stands for */
} head_part;

/* Of each block's rows max = max x and sum = LANES sum of exp(x - max), at [block of w][row] with `stride` floats from
 * one block of w to the next; at_target[row] = x[target] where the part has the target. Units: blocks, those of the
 * same rows of w side by side. */
typedef struct head_statistics_args {
    head_part part;
    float *max, *sum, *at_target;
    int64_t stride;
} head_statistics_args;

/* lse = max + log(sum over blocks of sum_b * exp(max_b - max)), SEQUENTIAL in b, and loss = lse - at_target, 0 for an
 * ignored target; the logarithm in double. max_b and sum_b are at [block][row]. Units: bands of BN_HEAD_BAND rows. */
#define BN_HEAD_BAND 16
typedef struct head_loss_args {
    const float *max, *sum, *at_target;
    const int32_t *targets;
    float *lse, *loss;
    int64_t rows, blocks;
} head_loss_args;

/* The derivative d (rows, V) = (exp(x - lse) - onehot(target)) * (weight[0] * dloss[0]) of a part, 0 where the target
 * is ignored, as left panels of the two products that follow: by_rows (lanes are rows, p is V) for dx, by_lanes (lanes
 * are V, p is rows) for dw; either may be NULL. The exponential is good to 2^-18 before the rounding to bf16. Units: as
 * head_statistics. */
typedef struct head_gradient_args {
    head_part part;
    const float *lse, *weight, *dloss;
    void *by_rows, *by_lanes;
} head_gradient_args;

/* norm[0] = sqrt(sum of partial); factor[0] = min(1, max_norm / (norm + 1e-6)), or 1 if max_norm <= 0. One unit. */
typedef struct clip_factor_args {
    const double *partial;
    float *norm, *factor;
    int64_t count;
    float max_norm;
} clip_factor_args;

/* Decoupled weight decay (Loshchilov and Hutter 2019, algorithm 2), one pass over flat buffers:
 *   g = grad * factor[0];  m = fma(beta1, m, (1-beta1)*g);  v = fma(beta2, v, ((1-beta2)*g)*g)
 *   p = p - lr * (weight_decay * p) - (lr / correction1) * m / (sqrt(v / correction2) + eps)
 * weight_decay holds for elements [0, decay_end), 0 after. Units: blocks (decay_end need not be a block boundary).
 *
 * m and v are f32, or bf16 rounded at random so that the mean of what is stored is the f32 value: the upper half of
 * bits(x) + r, a NaN cut as in `convert`, with r the lower half of a word for m and the upper half for v. p is made
 * from m and v before they are rounded. Element j of block b has the word mix(key + j) of step `step`, where key is the
 * first word of Philox4x32-10 (base/rng.h) at counter {b, b >> 32, step, step >> 32}, key {BN_ADAMW_KEY0,
 * BN_ADAMW_KEY1}, and mix(x): x ^= x >> 16; x *= 0x7feb352d; x ^= x >> 15; x *= 0x846ca68b; x ^= x >> 16   (Wellons,
 * hash-prospector). */
#define BN_ADAMW_KEY0 0x6d616441u /* "AdamW" */
#define BN_ADAMW_KEY1 0x57u
typedef struct adamw_args {
    float *param;
    const float *grad;
    void *m, *v;
    const float *factor;
    int64_t n, decay_end, step;
    float lr, beta1, beta2, eps, weight_decay, correction1, correction2;
    bn_dtype moments;
} adamw_args;

/* ---- the table ---------------------------------------------------------------------------------------------- */

typedef enum bn_kernel_id {
#define KERNEL(name) BN_KERNEL_##name,
#include "kernels/kernels.def"
#undef KERNEL
    BN_KERNEL_COUNT
} bn_kernel_id;

/* One instruction set's kernels; an empty entry leaves the one of the set below. */
typedef struct bn_kernel_table {
    const char *isa;
#define KERNEL(name) void (*name)(const name##_args *a, int64_t begin, int64_t end, void *scratch);
#include "kernels/kernels.def"
#undef KERNEL
} bn_kernel_table;

BN_EXTERN_C_END
#endif
