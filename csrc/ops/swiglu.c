/*
 * swiglu.c: y = silu(gate) * up, silu(g) = g * s, s = sigmoid(g) (Shazeer 2020).
 * dgate = dy * up * s * (1 + g * (1 - s)), dup = dy * silu(g).
 */
#define GATE swiglu
#include "ops/gate.inc"
