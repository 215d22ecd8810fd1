/* linear.c: y = x W^T in f32, W (out, in). dx = dy W, dW = dy^T x. No bias: add() one. */
#define MAP linear
#define MAP_TERNARY false
#include "ops/linear_map.inc"
