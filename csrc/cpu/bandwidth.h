/*
 * bandwidth.h: how many bytes a second all threads together can read from memory, measured: the roof under which
 * decoding is judged.
 */
#ifndef BN_CPU_BANDWIDTH_H
#define BN_CPU_BANDWIDTH_H

#include "base/error.h"

/* The best of several ways to read 256 MiB, some 0.2 seconds. BN_ERR_MEMORY if they cannot be had. */
BN_CHECKED bn_status bn_cpu_read_bandwidth(double *bytes_per_second);

#endif
