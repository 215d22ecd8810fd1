/*
 * math64.h: exp, log, sin, cos and pow in double, from plain additions, multiplications and divisions in a fixed order.
 *
 * C libraries differ from each other in the last bit; these do not, so rotary tables, initial weights and losses are
 * the same bits on every machine (built with -ffp-contract=off; no fma). Largest error against exact values, over the
 * ranges tests/c/test_base.c samples: exp and log 0.9 ulp, sin and cos 0.8 ulp, pow about
 * (1 + |y ln x|) 2^-52 relative.
 */
#ifndef BN_BASE_MATH64_H
#define BN_BASE_MATH64_H

#include "base/common.h"

BN_EXTERN_C_BEGIN

/* e^x; +infinity above 709.78, 0 below -745.13, subnormal results included. */
double bn_exp64(double x);
/* Natural logarithm; -infinity at 0, NaN below. */
double bn_log64(double x);
/* For |x| <= 2^20; NaN beyond, where the argument reduction would no longer be exact. */
double bn_sin64(double x);
double bn_cos64(double x);
/* x^y = exp(y ln x) for x >= 0; NaN for x < 0. x^0 is 1. */
double bn_pow64(double x, double y);

BN_EXTERN_C_END
#endif
