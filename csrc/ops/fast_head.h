/*
 * fast_head.h: the full-precision output head and its loss in the fast precision, in memory that does not grow with the
 * vocabulary.
 */
#ifndef BN_OPS_FAST_HEAD_H
#define BN_OPS_FAST_HEAD_H

#include "ops/projection.h"

/* Whether this head has a fast form; the other form serves all. */
bool bn_fast_head_serves(const bn_projection *p);
/* Of each row: the loss, and lse = log sum exp of its logits for the backward pass. */
BN_CHECKED bn_status bn_fast_head_forward(const bn_projection *p, const bn_tensor *targets, float *loss, float *lse);

/* dx and dW of sum(loss) * weight[0] * dloss[0]. x, W and targets are those of the forward pass. */
BN_CHECKED bn_status bn_fast_head_backward(const bn_projection *p, const bn_tensor *targets, const float *lse,
                                           const float *weight, const float *dloss, bn_grad_memory dx,
                                           bn_grad_memory dw);

#endif
