/*
 * parallel.h: one pool of threads for the process, made on first use and remade in a forked child.
 *
 * The caller works too. Pieces are handed out dynamically, so a range function must give the same result however
 * [begin, end) is cut. A call made from inside a range function, or while another thread's call has the pool, runs on
 * the calling thread alone: nothing waits for a lock, nothing can deadlock.
 */
#ifndef BN_BASE_PARALLEL_H
#define BN_BASE_PARALLEL_H

#include "base/error.h"

BN_EXTERN_C_BEGIN

/* Private memory a range function may use for its tiles. Kept under half of a 2 MiB L2. */
#define BN_SCRATCH_BYTES (2 << 20)
#define BN_MAX_THREADS 64

/* `scratch`: BN_SCRATCH_BYTES of this call's own memory, 64-byte aligned, contents undefined. */
typedef void (*bn_range_fn)(void *ctx, int64_t begin, int64_t end, void *scratch);

/* Calls fn over [begin, end) in pieces of at least `grain` (the last may be smaller) and returns when all are done.
 * Borrows ctx. Fails only for want of scratch memory, before the first piece. */
BN_CHECKED bn_status bn_parallel_for(int64_t begin, int64_t end, int64_t grain, bn_range_fn fn, void *ctx);

/* Threads a call uses, the caller included: 1..BN_MAX_THREADS. At first, the CPUs this process may run on. */
int bn_get_threads(void);
/* Below 1 restores the first value. Waits for a call in progress; does nothing from inside a range function. */
void bn_set_threads(int count);

BN_EXTERN_C_END
#endif
