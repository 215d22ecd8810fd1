/* clock.h: time that only goes forward. */
#ifndef BN_BASE_CLOCK_H
#define BN_BASE_CLOCK_H

#include "base/common.h"

/* Since some moment in the past. */
int64_t bn_nanoseconds(void);
static inline double bn_seconds(void) { return 1e-9 * (double)bn_nanoseconds(); }

#endif
