/*
 * ops.h: the constructors of all ops. Each checks its shapes once, makes the output, runs the op and records it; each
 * returns a new tensor through `out`. Inputs are borrowed. What an op computes is said at the head of its file.
 */
#ifndef BN_OPS_OPS_H
#define BN_OPS_OPS_H

#include "tensor/tape.h"

/* tokens i32 (...), weight (V, C) -> (..., C). */
BN_CHECKED bn_status bn_embedding(bn_tensor *tokens, bn_tensor *weight, bn_tensor **out);
/* x (..., in), weight (out, in) -> (..., out), plus residual of the result's shape if it is not NULL. A bitlinear also
 * takes an x that exists in its int8 form only (q8); a linear without gradient a weight in bf16. */
BN_CHECKED bn_status bn_linear(bn_tensor *x, bn_tensor *weight, bn_tensor *residual, bn_tensor **out);
/* activation_bits: 8 or 4, of what x is rounded to; a q8 x is in 8. */
BN_CHECKED bn_status bn_bitlinear(bn_tensor *x, bn_tensor *weight, bn_tensor *residual, int activation_bits,
                                  bn_tensor **out);
/* x (..., in), weight compact (out, in) -> (..., out), forward only. top > 0: exact, but -infinity where it cannot be
 * among the `top` largest. */
BN_CHECKED bn_status bn_compact_linear(bn_tensor *x, bn_tensor *weight, int64_t top, bn_tensor **out);
/* x (..., C), weight (C) or NULL; `quantized`: the result is q8. */
BN_CHECKED bn_status bn_rmsnorm(bn_tensor *x, bn_tensor *weight, float eps, bool quantized, bn_tensor **out);
/* x (..., C): the orthonormal transform of blocks of the largest power of two that divides C. */
BN_CHECKED bn_status bn_hadamard(bn_tensor *x, bn_tensor **out);
/* x (B, T, heads, D); cos, sin (positions, D/2); start i32 (B) or NULL: the position of t = 0. */
BN_CHECKED bn_status bn_rope(bn_tensor *x, bn_tensor *cos, bn_tensor *sin, bn_tensor *start, bn_tensor **out);
/* q (B, T, H, D); k, v (slots, S, KV, D), f32, bf16, or i8 with scales f32 (slots, S, KV) that are NULL otherwise;
 * start as above; slot i32 (B) or NULL: the slot of sequence b. With gradients: S == T and nothing but q, k and v. */
BN_CHECKED bn_status bn_attention(bn_tensor *q, bn_tensor *k, bn_tensor *v, bn_tensor *start, bn_tensor *slot,
                                  bn_tensor *k_scale, bn_tensor *v_scale, bn_tensor **out);
/* Writes x (B, T, KV, D) into cache (slots, S, KV, D) at start and returns the cache; slot and scale as above, but no
 * slot twice; no gradient. */
BN_CHECKED bn_status bn_cache_append(bn_tensor *x, bn_tensor *cache, bn_tensor *start, bn_tensor *slot,
                                     bn_tensor *scale, bn_tensor **out);
/* Copies the first `length` positions of slot `source` of cache, or of its scales, to slot `destination`. Not an op: it
 * happens once, and no tape plays it again. */
BN_CHECKED bn_status bn_cache_copy(bn_tensor *cache, int64_t source, int64_t destination, int64_t length);
BN_CHECKED bn_status bn_swiglu(bn_tensor *gate, bn_tensor *up, bool quantized, bn_tensor **out);
BN_CHECKED bn_status bn_relu2(bn_tensor *gate, bn_tensor *up, bool quantized, bn_tensor **out);
/* alpha * a + beta * b; b has a's shape or is a row that is added to every row of a. */
BN_CHECKED bn_status bn_add(bn_tensor *a, bn_tensor *b, float alpha, float beta, bn_tensor **out);
BN_CHECKED bn_status bn_mul(bn_tensor *a, bn_tensor *b, bn_tensor **out);
/* factor * x. */
BN_CHECKED bn_status bn_scale(bn_tensor *x, float factor, bn_tensor **out);
/* a (..., m, k), b (k, n) or (..., k, n) -> (..., m, n). */
BN_CHECKED bn_status bn_matmul(bn_tensor *a, bn_tensor *b, bn_tensor **out);
/* All elements -> scalar. */
BN_CHECKED bn_status bn_sum(bn_tensor *x, bn_tensor **out);
BN_CHECKED bn_status bn_mean(bn_tensor *x, bn_tensor **out);
/* One dimension may be -1. */
BN_CHECKED bn_status bn_reshape(bn_tensor *x, int ndim, const int64_t *shape, bn_tensor **out);
/* Swaps the last two dimensions. */
BN_CHECKED bn_status bn_transpose(bn_tensor *x, bn_tensor **out);
/* Over the last dimension. */
BN_CHECKED bn_status bn_softmax(bn_tensor *x, bn_tensor **out);
/* Between f32 and bf16, and from i8, i32, ternary2 or q8 to f32; gradients flow between floats. */
BN_CHECKED bn_status bn_convert(bn_tensor *x, bn_dtype dtype, bn_tensor **out);
/* Mean over targets (i32, one per row of x, BN_IGNORE_INDEX skipped) of -log softmax(x weight^T)[target]; the head is
 * full precision or, with `ternary`, a bitlinear. Logits exist only for a chunk of rows at a time. */
BN_CHECKED bn_status bn_cross_entropy(bn_tensor *x, bn_tensor *weight, bn_tensor *targets, bool ternary,
                                      bn_tensor **out);
/* Returns new: f32 (rows), the loss of each target (0 of one that is skipped) in the last forward pass of the
 * cross_entropy that made `loss`. Not an op: the op's own memory, which each replay writes. BN_ERR_STATE if no
 * cross_entropy on a tape made it, or one in a segment that is closed. */
BN_CHECKED bn_status bn_cross_entropy_losses(const bn_tensor *loss, bn_tensor **out);

#endif
