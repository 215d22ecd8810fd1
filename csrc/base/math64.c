/*
 * math64.c: each function reduces its argument to a small interval and sums a Taylor series there. The splits of ln 2
 * and pi / 2 into parts with spare low bits (Cody and Waite 1980) and the order of the last additions, which keeps the
 * large term's rounding the only one that counts, follow fdlibm (Sun Microsystems 1993).
 */
#include "base/math64.h"

#include <math.h>
#include <string.h>

/* ln 2 to 32 bits, so n * LN2_HIGH is exact for |n| < 2^21, and the rest. */
#define LN2_HIGH 0x1.62e42feep-1
#define LN2_LOW 0x1.a39ef35793c76p-33

/* 2^n by its exponent bits, n in -1022..1023. */
static double pow2(int n) {
    uint64_t bits = (uint64_t)(n + 1023) << 52;
    double out;
    memcpy(&out, &bits, sizeof out);
    return out;
}

/* e^x = 2^n e^r, |r| <= ln 2 / 2. The series stops at r^13 / 13!: the next term is below 5e-18. */
double bn_exp64(double x) {
    if (!(x < 710.0)) {
        return x + INFINITY; /* NaN stays NaN */
    }
    if (x < -746.0) {
        return 0.0;
    }
    double n = rint(x * 0x1.71547652b82fep+0);
    double t = x - n * LN2_HIGH, r = t - n * LN2_LOW, lost = (t - r) - n * LN2_LOW;
    double p = 1.0 / 6227020800.0;
    p = p * r + 1.0 / 479001600.0;
    p = p * r + 1.0 / 39916800.0;
    p = p * r + 1.0 / 3628800.0;
    p = p * r + 1.0 / 362880.0;
    p = p * r + 1.0 / 40320.0;
    p = p * r + 1.0 / 5040.0;
    p = p * r + 1.0 / 720.0;
    p = p * r + 1.0 / 120.0;
    p = p * r + 1.0 / 24.0;
    p = p * r + 1.0 / 6.0;
    p = p * r + 0.5;
    /* n reaches -1076 and 1024, outside pow2: two exact factors, of which only the last product can round. */
    int half = (int)n / 2;
    return (1.0 + (r + (r * r * p + lost))) * pow2(half) * pow2((int)n - half);
}

/* x = 2^k (1 + f), 1/sqrt(2) <= 1 + f <= sqrt(2), s = f / (2 + f): ln(1 + f) = 2 (s + s^3/3 + s^5/5 + ...), summed as
 * f - f^2/2 + s (f^2/2 + R) so that f enters exactly. With s^2 <= 0.0295 the series may stop at s^21. */
double bn_log64(double x) {
    if (!(x > 0.0 && x < INFINITY)) {
        return x == 0.0 ? -INFINITY : (x < 0.0 ? NAN : x);
    }
    int k = 0;
    if (x < 0x1p-1022) { /* subnormal */
        x *= 0x1p54;
        k = -54;
    }
    uint64_t bits;
    memcpy(&bits, &x, sizeof bits);
    k += (int)(bits >> 52) - 1023;
    bits = (bits & 0xfffffffffffffu) | (uint64_t)1023 << 52;
    double m;
    memcpy(&m, &bits, sizeof m);
    if (m > 0x1.6a09e667f3bcdp+0) { /* sqrt(2) */
        m *= 0.5;
        k++;
    }
    double f = m - 1.0, s = f / (2.0 + f), z = s * s, square = 0.5 * f * f, scale = (double)k;
    double p = 2.0 / 21.0;
    p = p * z + 2.0 / 19.0;
    p = p * z + 2.0 / 17.0;
    p = p * z + 2.0 / 15.0;
    p = p * z + 2.0 / 13.0;
    p = p * z + 2.0 / 11.0;
    p = p * z + 2.0 / 9.0;
    p = p * z + 2.0 / 7.0;
    p = p * z + 2.0 / 5.0;
    p = p * z + 2.0 / 3.0;
    return scale * LN2_HIGH - ((square - (s * (square + p * z) + scale * LN2_LOW)) - f);
}

/* x - n pi/2 as high + low, n the nearest integer; returns n mod 4. pi/2 is split 33 + 33 + 53 bits: n < 2^20 makes the
 * first two products exact, and x - n * PART1 is exact because the two nearly cancel. */
static int reduce(double x, double *high, double *low) {
    double n = rint(x * 0x1.45f306dc9c883p-1);
    double t = x - n * 0x1.921fb544p+0, w = n * 0x1.0b4611a6p-34;
    double r = t - w, b = r - t, error = (t - (r - b)) - (w + b); /* r + error == t - w (Knuth) */
    double rest = error - n * 0x1.3198a2e037073p-69;
    *high = r + rest;
    *low = (r - *high) + rest;
    return (int)(n - 4.0 * floor(n * 0.25));
}

/* sin(a + b), |a| <= pi/4, b its rounding error. The series stops at a^17: the next term is below 1e-19. */
static double sin_reduced(double a, double b) {
    double z = a * a;
    double p = 1.0 / 355687428096000.0;
    p = p * z - 1.0 / 1307674368000.0;
    p = p * z + 1.0 / 6227020800.0;
    p = p * z - 1.0 / 39916800.0;
    p = p * z + 1.0 / 362880.0;
    p = p * z - 1.0 / 5040.0;
    p = p * z + 1.0 / 120.0;
    p = p * z - 1.0 / 6.0;
    return a + (a * z * p + b * (1.0 - 0.5 * z));
}

/* cos(a + b), up to a^16: the next term is below 3e-18. (1 - w) - z/2 is what rounding 1 - z/2 lost. */
static double cos_reduced(double a, double b) {
    double z = a * a, half = 0.5 * z, w = 1.0 - half;
    double p = 1.0 / 20922789888000.0;
    p = p * z - 1.0 / 87178291200.0;
    p = p * z + 1.0 / 479001600.0;
    p = p * z - 1.0 / 3628800.0;
    p = p * z + 1.0 / 40320.0;
    p = p * z - 1.0 / 720.0;
    p = p * z + 1.0 / 24.0;
    return w + (((1.0 - w) - half) + (z * z * p - a * b));
}

/* sin(x + turns * pi/2). */
static double circular(double x, int turns) {
    if (!(fabs(x) <= 0x1p20)) {
        return NAN;
    }
    double a, b;
    int quadrant = (reduce(x, &a, &b) + turns) & 3;
    double y = (quadrant & 1) ? cos_reduced(a, b) : sin_reduced(a, b);
    return (quadrant & 2) ? -y : y;
}

double bn_sin64(double x) { return circular(x, 0); }
double bn_cos64(double x) { return circular(x, 1); }

double bn_pow64(double x, double y) { return y == 0.0 ? 1.0 : bn_exp64(y * bn_log64(x)); }
