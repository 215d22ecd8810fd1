/* interrupt.c: holds the one function that is asked. */
#include "base/interrupt.h"

_Atomic(bn_interrupt_fn) bn_interrupt_check;

void bn_set_interrupt_check(bn_interrupt_fn check) { atomic_store(&bn_interrupt_check, check); }
