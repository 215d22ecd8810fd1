/* clock.c: the system's monotonic clock. */
#define _DEFAULT_SOURCE /* clock_gettime */
#include "base/clock.h"

#include <time.h>

int64_t bn_nanoseconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}
