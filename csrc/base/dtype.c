/* dtype.c: names and sizes of the element types. */
#include "base/dtype.h"

const char *bn_dtype_name(bn_dtype dtype) {
    static const char *const names[BN_DTYPE_COUNT] = {"f32",      "bf16", "i8",       "i32",
                                                      "ternary2", "q8",   "prepared", "compact"};
    return names[dtype];
}

bool bn_dtype_bytes(bn_dtype dtype, int64_t count, size_t *out) {
    static const size_t item[BN_DTYPE_COUNT] = {4, 2, 1, 4, 0, 0, 0, 0};
    if (count < 0) {
        return false;
    }
    if (dtype == BN_TERNARY2) {
        *out = ((size_t)count + 3) / 4;
        return true;
    }
    return bn_mul_size((size_t)count, item[dtype], out);
}
