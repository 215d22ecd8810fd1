/*
 * bandwidth.h: how many bytes a second all threads together can read from memory, measured: the roof under which
 * decoding is judged.
 */
#ifndef BN_CPU_BANDWIDTH_H
#define BN_CPU_BANDWIDTH_H

#include "base/error.h"

/* The best of several ways to read `bytes` again and again, twelve times in all. A buffer that caches hold in part is
 * read faster than one they do not: give it the size of what it stands for. BN_ERR_MEMORY if it cannot be had. */
BN_CHECKED bn_status bn_cpu_read_bandwidth(int64_t bytes, double *bytes_per_second);

#endif
