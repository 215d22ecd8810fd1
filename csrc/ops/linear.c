/* linear.c: y = x W^T in f32, W (out, in). dx = dy W, dW = dy^T x. No bias: add() one. */
#define MAP linear
#define MAP_TERNARY false
#include "ops/linear_map.inc"

bn_status bn_linear(bn_tensor *x, bn_tensor *weight, bn_tensor *residual, bn_tensor **out) {
    return linear_map(x, weight, residual, 0, out);
}
