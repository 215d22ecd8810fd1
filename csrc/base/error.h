/*
 * error.h: how the core fails: a status code returned, a sentence left in thread-local memory. The core never prints,
 * exits or aborts; the Python edge turns a status into an exception with that sentence.
 */
#ifndef BN_BASE_ERROR_H
#define BN_BASE_ERROR_H

#include "base/common.h"

BN_EXTERN_C_BEGIN

typedef enum bn_status {
    BN_OK = 0,
    BN_ERR_MEMORY,      /* MemoryError */
    BN_ERR_SHAPE,       /* bitnet.ShapeError (a ValueError) */
    BN_ERR_DTYPE,       /* TypeError */
    BN_ERR_INDEX,       /* IndexError */
    BN_ERR_VALUE,       /* ValueError */
    BN_ERR_STATE,       /* RuntimeError: right call, wrong moment */
    BN_ERR_INTERRUPTED, /* the caller's own pending exception, e.g. KeyboardInterrupt */
} bn_status;

#define BN_CHECKED __attribute__((warn_unused_result))

/* Stores a formatted sentence (cut at 511 characters) and returns `status`. */
bn_status bn_fail(bn_status status, const char *format, ...) __attribute__((format(printf, 2, 3)));
/* The sentence of this thread's last failure. Borrowed; valid until the next bn_fail on this thread. */
const char *bn_error_message(void);

/* Returns early from a function that owns nothing. */
#define BN_TRY(expr)                                                                                                   \
    do {                                                                                                               \
        bn_status bn_try_status = (expr);                                                                              \
        if (BN_UNLIKELY(bn_try_status != BN_OK)) {                                                                     \
            return bn_try_status;                                                                                      \
        }                                                                                                              \
    } while (0)

BN_EXTERN_C_END
#endif
