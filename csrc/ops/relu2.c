/*
 * relu2.c: y = relu(gate)^2 * up, the feed-forward gate of BitNet b1.58 2B-4T.
 * dgate = dy * up * 2 relu(gate), dup = dy * relu(gate)^2.
 */
#define GATE relu2
#include "ops/gate.inc"
