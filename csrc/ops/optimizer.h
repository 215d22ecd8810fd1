/*
 * optimizer.h: the parameters of a model as one flat buffer, and the steps that walk it: never recorded.
 */
#ifndef BN_OPS_OPTIMIZER_H
#define BN_OPS_OPTIMIZER_H

#include "tensor/tensor.h"

/*
 * Moves f32 leaves into one storage, each starting on a cache line, in the order given, and gives them gradients that
 * are windows of a second one. Returns both as flat tensors (returns new); the gaps are zero and stay zero under any
 * step. Refuses a tensor with NumPy views alive, which would silently stop following it.
 */
BN_CHECKED bn_status bn_flatten(bn_tensor *const *params, int64_t count, bn_tensor **flat, bn_tensor **flat_grad);

/* norm (1) = Euclidean norm of grad; factor (1) = min(1, max_norm / (norm + 1e-6)), 1 where max_norm <= 0. */
BN_CHECKED bn_status bn_clip_grad_norm(const bn_tensor *grad, float max_norm, bn_tensor *norm, bn_tensor *factor);

typedef struct bn_adamw_options {
    float lr, beta1, beta2, eps, weight_decay;
    int64_t step;      /* counts from 1 */
    int64_t decay_end; /* weight decay holds for the first so many elements */
} bn_adamw_options;

/* One AdamW step over flat tensors of equal size; factor (1) scales the gradient. m and v: f32, or both bf16, rounded
 * at random by a generator whose counter is the step and the place (kernels.h). */
BN_CHECKED bn_status bn_adamw(bn_tensor *param, const bn_tensor *grad, bn_tensor *m, bn_tensor *v,
                              const bn_tensor *factor, const bn_adamw_options *options);

#endif
