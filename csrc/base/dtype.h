/*
 * dtype.h: the element types of a tensor. ternary2 packs four codes a byte (value + 1, low bits first), so its
 * size is asked of bn_dtype_bytes, never computed from an item size. q8 is an activation that exists in its int8 form
 * alone (tensor/quantized.h), prepared a ternary weight laid out for products alone (tensor/ternary_weight.h),
 * compact an output matrix rounded for inference (tensor/compact.h): their storages are empty.
 */
#ifndef BN_BASE_DTYPE_H
#define BN_BASE_DTYPE_H

#include "base/common.h"

BN_EXTERN_C_BEGIN

typedef enum bn_dtype {
    BN_F32,
    BN_BF16,
    BN_I8,
    BN_I32,
    BN_TERNARY2,
    BN_Q8,
    BN_PREPARED,
    BN_COMPACT,
    BN_DTYPE_COUNT
} bn_dtype;

/* Whether elements of this type lie in the tensor's own storage. */
static inline bool bn_dtype_is_stored(bn_dtype dtype) { return dtype < BN_Q8; }

const char *bn_dtype_name(bn_dtype dtype);
/* Bytes of `count` elements; false on overflow. */
bool bn_dtype_bytes(bn_dtype dtype, int64_t count, size_t *out);

BN_EXTERN_C_END
#endif
