/* ternary.c: the numeric contract of ternary.h, written to be read rather than to be fast. */
#include "quant/ternary.h"

#include <math.h>
#include <string.h>

float bn_absmean_scale(const float *w, int64_t n) {
    double sum = 0.0;
    for (int64_t i = 0; i < n; i++) {
        sum += fabs((double)w[i]);
    }
    float mean = n > 0 ? (float)(sum / (double)n) : 0.0f;
    return mean < BN_QUANT_EPS ? BN_QUANT_EPS : mean;
}

int8_t bn_ternary_code(float w, float weight_scale) {
    float rounded = rintf(w * (1.0f / weight_scale));
    if (isnan(rounded)) {
        return 0;
    }
    return (int8_t)fminf(fmaxf(rounded, -1.0f), 1.0f);
}

float bn_int8_row(const float *x, int64_t n, int bits, int8_t *q) {
    float most = bn_activation_most(bits);
    float absmax = BN_QUANT_EPS;
    for (int64_t i = 0; i < n; i++) {
        if (!isfinite(x[i])) {
            memset(q, 0, (size_t)n);
            return NAN;
        }
        absmax = fmaxf(absmax, fabsf(x[i]));
    }
    float to_int8 = most / absmax;
    for (int64_t i = 0; i < n; i++) {
        q[i] = (int8_t)fminf(fmaxf(rintf(x[i] * to_int8), -most - 1.0f), most);
    }
    return absmax / most;
}

size_t bn_ternary_packed_bytes(int64_t n) { return ((size_t)n + BN_CODES_PER_BYTE - 1) / BN_CODES_PER_BYTE; }

bn_status bn_ternary_pack(const int8_t *codes, int64_t n, uint8_t *packed) {
    memset(packed, 0, bn_ternary_packed_bytes(n));
    for (int64_t i = 0; i < n; i++) {
        if (codes[i] < -1 || codes[i] > 1) {
            return bn_fail(BN_ERR_VALUE, "ternary code %lld is %d; only -1, 0 and 1 can be packed", (long long)i,
                           codes[i]);
        }
        int shift = BN_CODE_BITS * (int)(i % BN_CODES_PER_BYTE);
        packed[i / BN_CODES_PER_BYTE] |= (uint8_t)((codes[i] + 1) << shift);
    }
    return BN_OK;
}

bn_status bn_ternary_unpack(const uint8_t *packed, int64_t n, int8_t *codes) {
    for (int64_t i = 0; i < n; i++) {
        int shift = BN_CODE_BITS * (int)(i % BN_CODES_PER_BYTE);
        int code = packed[i / BN_CODES_PER_BYTE] >> shift & BN_CODE_UNUSED;
        if (code == BN_CODE_UNUSED) {
            return bn_fail(BN_ERR_VALUE, "packed ternary code %lld is 3; only 0, 1 and 2 stand for values",
                           (long long)i);
        }
        codes[i] = (int8_t)(code - 1);
    }
    return BN_OK;
}
