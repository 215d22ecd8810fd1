/*
 * interrupt.h: a question asked before every kernel launch: has the user had enough? The Python edge answers it by
 * looking for pending signals, so Ctrl-C ends a long step between two kernels. One load and one branch where nobody
 * asked.
 */
#ifndef BN_BASE_INTERRUPT_H
#define BN_BASE_INTERRUPT_H

#include <stdatomic.h>

#include "base/error.h"

/* BN_OK to go on; anything else (BN_ERR_INTERRUPTED) is what the launch returns. Called on the launching thread. */
typedef bn_status (*bn_interrupt_fn)(void);

extern _Atomic(bn_interrupt_fn) bn_interrupt_check;

/* NULL removes it. */
void bn_set_interrupt_check(bn_interrupt_fn check);

BN_CHECKED static inline bn_status bn_check_interrupt(void) {
    bn_interrupt_fn check = atomic_load_explicit(&bn_interrupt_check, memory_order_relaxed);
    return BN_LIKELY(!check) ? BN_OK : check();
}

#endif
