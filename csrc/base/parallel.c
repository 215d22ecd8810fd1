/*
 * parallel.c: the pool behind bn_parallel_for.
 *
 * `state` is one atomic word: launch number, an open bit, and how many workers are inside. A worker that sees a new
 * open launch enters by incrementing it; the caller works until no piece is left, clears the open bit and waits for
 * those inside to leave. A worker that wakes late finds the launch closed and is not waited for, so a launch never
 * costs more than the caller doing all of it alone. Idle workers watch `state` for SPIN_NANOSECONDS, then sleep.
 */
#if defined(__linux__)
#define _GNU_SOURCE /* sched_getaffinity */
#include <sched.h>
#endif
#include "base/parallel.h"

#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <unistd.h>

#include "base/clock.h"

/* Longer than the gap between two launches of one layer, shorter than what a sleeping thread needs to wake (50 us). */
#define SPIN_NANOSECONDS 40000

#define OPEN ((uint64_t)1 << 31)
#define INSIDE(state) ((uint32_t)((state) & (OPEN - 1)))
#define LAUNCH(state) ((uint32_t)((state) >> 32))

static struct {
    pthread_mutex_t launch; /* held by the thread that owns the pool: a caller, or bn_set_threads */
    pthread_mutex_t sleep;  /* guards the two conditions */
    pthread_cond_t wake, done;
    _Atomic uint64_t state;
    _Atomic int threads; /* asked for; 0 before the first use */
    _Atomic int sleepers;
    _Atomic bool caller_sleeps, stop, spin;
    _Atomic int64_t next;
    /* Written by the owner while no worker is inside. */
    bn_range_fn fn;
    void *ctx;
    int64_t end, grain;
    bool made;
    int workers;
    pthread_t worker[BN_MAX_THREADS];
    void *scratch[BN_MAX_THREADS]; /* a worker's; kept for the next pool, so a forked child inherits it */
} pool = {
    .launch = PTHREAD_MUTEX_INITIALIZER,
    .sleep = PTHREAD_MUTEX_INITIALIZER,
    .wake = PTHREAD_COND_INITIALIZER,
    .done = PTHREAD_COND_INITIALIZER,
};

static _Thread_local bool inside; /* a range function is running on this thread */
static pthread_key_t scratch_key; /* a calling thread's scratch between calls; freed when the thread ends */
static bool scratch_key_made;
static pthread_once_t once = PTHREAD_ONCE_INIT;

static inline void relax(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static int available_cpus(void) {
#if defined(__linux__)
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0) {
        return CPU_COUNT(&set);
    }
#endif
    return (int)sysconf(_SC_NPROCESSORS_ONLN);
}

static int clamp_threads(int count) { return count < 1 ? 1 : (count > BN_MAX_THREADS ? BN_MAX_THREADS : count); }

/* ---- fork: taken around it so that the child finds a pool at rest, without its threads ---- */

static void before_fork(void) {
    pthread_mutex_lock(&pool.launch);
    pthread_mutex_lock(&pool.sleep);
}
static void after_fork_parent(void) {
    pthread_mutex_unlock(&pool.sleep);
    pthread_mutex_unlock(&pool.launch);
}
static void after_fork_child(void) {
    /* The parent's workers still count as waiters in these; a fresh start forgets them. */
    pthread_cond_init(&pool.wake, NULL);
    pthread_cond_init(&pool.done, NULL);
    atomic_store(&pool.sleepers, 0);
    pool.made = false;
    pool.workers = 0;
    after_fork_parent();
}

static void initialize(void) {
    scratch_key_made = pthread_key_create(&scratch_key, free) == 0;
    pthread_atfork(before_fork, after_fork_parent, after_fork_child);
    atomic_store(&pool.threads, clamp_threads(available_cpus()));
}

/* ---- scratch of calling threads: taken out of the thread's slot while in use, so a nested call gets its own ---- */

static bn_status take_scratch(void **out) {
    *out = scratch_key_made ? pthread_getspecific(scratch_key) : NULL;
    if (*out) {
        pthread_setspecific(scratch_key, NULL);
        return BN_OK;
    }
    if (posix_memalign(out, BN_ALIGN, BN_SCRATCH_BYTES) != 0) {
        return bn_fail(BN_ERR_MEMORY, "parallel: no memory for %d bytes of scratch", BN_SCRATCH_BYTES);
    }
    return BN_OK;
}

static void give_scratch(void *scratch) {
    if (!scratch_key_made || pthread_getspecific(scratch_key) || pthread_setspecific(scratch_key, scratch) != 0) {
        free(scratch);
    }
}

/* ---- workers ---- */

/* Pieces shrink with what is left, so that the last ones finish close together. */
static void work(void *scratch) {
    const int64_t shares = 2 * (int64_t)(pool.workers + 1);
    int64_t begin = atomic_load_explicit(&pool.next, memory_order_relaxed);
    while (begin < pool.end) {
        int64_t size = bn_min_i64(bn_max_i64((pool.end - begin) / shares, pool.grain), pool.end - begin);
        if (atomic_compare_exchange_weak_explicit(&pool.next, &begin, begin + size, memory_order_relaxed,
                                                  memory_order_relaxed)) {
            pool.fn(pool.ctx, begin, begin + size, scratch);
            begin = atomic_load_explicit(&pool.next, memory_order_relaxed);
        }
    }
}

/* Returns when the launch number is no longer `seen`. */
static void await_launch(uint32_t seen) {
    if (atomic_load(&pool.spin)) {
        for (int64_t start = bn_nanoseconds(); bn_nanoseconds() - start < SPIN_NANOSECONDS;) {
            for (int i = 0; i < 16; i++) {
                if (LAUNCH(atomic_load(&pool.state)) != seen) {
                    return;
                }
                relax();
            }
        }
    }
    /* The owner changes state, then reads sleepers; this thread does the reverse: one of the two sees the other. */
    pthread_mutex_lock(&pool.sleep);
    atomic_fetch_add(&pool.sleepers, 1);
    while (LAUNCH(atomic_load(&pool.state)) == seen) {
        pthread_cond_wait(&pool.wake, &pool.sleep);
    }
    atomic_fetch_sub(&pool.sleepers, 1);
    pthread_mutex_unlock(&pool.sleep);
}

static void leave(void) {
    uint64_t state = atomic_fetch_sub(&pool.state, 1) - 1;
    if (INSIDE(state) == 0 && !(state & OPEN) && atomic_load(&pool.caller_sleeps)) {
        pthread_mutex_lock(&pool.sleep);
        pthread_cond_signal(&pool.done);
        pthread_mutex_unlock(&pool.sleep);
    }
}

static void *worker_main(void *scratch) {
    inside = true;
    uint32_t seen = 0; /* so any launch but number 0 (mod 2^32) is new to it; to miss that one is harmless */
    for (;;) {
        await_launch(seen);
        uint64_t state = atomic_load(&pool.state);
        if (atomic_load(&pool.stop)) {
            return NULL;
        }
        while ((state & OPEN) && !atomic_compare_exchange_weak(&pool.state, &state, state + 1)) {
        }
        seen = LAUNCH(state);
        if (state & OPEN) {
            work(scratch);
            leave();
        }
    }
}

static void wake(int count) {
    if (atomic_load(&pool.sleepers) > 0) {
        pthread_mutex_lock(&pool.sleep);
        for (int i = 0; i < count; i++) {
            pthread_cond_signal(&pool.wake);
        }
        pthread_mutex_unlock(&pool.sleep);
    }
}

/* The functions below want pool.launch held. */

static void make_workers(void) {
    int wanted = atomic_load(&pool.threads) - 1;
    atomic_store(&pool.spin, wanted < available_cpus()); /* spinning for a CPU that someone else needs only hurts */
    /* Signals go to the threads the program made: Ctrl-C must reach Python's. */
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    pool.made = true;
    for (pool.workers = 0; pool.workers < wanted; pool.workers++) {
        void **scratch = &pool.scratch[pool.workers];
        if (!*scratch && posix_memalign(scratch, BN_ALIGN, BN_SCRATCH_BYTES) != 0) {
            *scratch = NULL;
            break;
        }
        if (pthread_create(&pool.worker[pool.workers], NULL, worker_main, *scratch) != 0) {
            break; /* fewer threads give the same results */
        }
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

static void stop_workers(void) {
    atomic_store(&pool.stop, true);
    atomic_fetch_add(&pool.state, (uint64_t)1 << 32);
    wake(pool.workers);
    for (int i = 0; i < pool.workers; i++) {
        pthread_join(pool.worker[i], NULL);
    }
    for (int i = 0; i < BN_MAX_THREADS; i++) {
        free(pool.scratch[i]);
        pool.scratch[i] = NULL;
    }
    atomic_store(&pool.stop, false);
    pool.workers = 0;
    pool.made = false;
}

static void wait_for_workers(void) {
    for (int64_t start = bn_nanoseconds(); bn_nanoseconds() - start < SPIN_NANOSECONDS;) {
        for (int i = 0; i < 16; i++) {
            if (INSIDE(atomic_load(&pool.state)) == 0) {
                return;
            }
            relax();
        }
    }
    pthread_mutex_lock(&pool.sleep);
    atomic_store(&pool.caller_sleeps, true);
    while (INSIDE(atomic_load(&pool.state)) != 0) {
        pthread_cond_wait(&pool.done, &pool.sleep);
    }
    atomic_store(&pool.caller_sleeps, false);
    pthread_mutex_unlock(&pool.sleep);
}

static void launch(int64_t begin, int64_t end, int64_t grain, bn_range_fn fn, void *ctx, void *scratch) {
    pool.fn = fn;
    pool.ctx = ctx;
    pool.end = end;
    pool.grain = grain;
    atomic_store_explicit(&pool.next, begin, memory_order_relaxed);
    uint64_t number = (uint64_t)LAUNCH(atomic_load(&pool.state)) + 1;
    atomic_store(&pool.state, number << 32 | OPEN); /* publishes the fields above */
    wake((int)bn_min_i64(pool.workers, bn_ceil_div(end - begin, grain) - 1));
    work(scratch);
    atomic_fetch_and(&pool.state, ~OPEN);
    wait_for_workers();
}

/* ---- the interface ---- */

bn_status bn_parallel_for(int64_t begin, int64_t end, int64_t grain, bn_range_fn fn, void *ctx) {
    if (begin >= end) {
        return BN_OK;
    }
    pthread_once(&once, initialize);
    void *scratch;
    BN_TRY(take_scratch(&scratch));
    grain = bn_max_i64(grain, 1);
    bool nested = inside;
    inside = true;
    if (end - begin > grain && !nested && atomic_load_explicit(&pool.threads, memory_order_relaxed) > 1 &&
        pthread_mutex_trylock(&pool.launch) == 0) {
        if (!pool.made) {
            make_workers();
        }
        launch(begin, end, grain, fn, ctx, scratch);
        pthread_mutex_unlock(&pool.launch);
    } else {
        fn(ctx, begin, end, scratch);
    }
    inside = nested;
    give_scratch(scratch);
    return BN_OK;
}

int bn_get_threads(void) {
    pthread_once(&once, initialize);
    return atomic_load(&pool.threads);
}

void bn_set_threads(int count) {
    pthread_once(&once, initialize);
    count = clamp_threads(count < 1 ? available_cpus() : count);
    if (inside) {
        return;
    }
    pthread_mutex_lock(&pool.launch);
    if (count != atomic_load(&pool.threads)) {
        stop_workers();
        atomic_store(&pool.threads, count);
    }
    pthread_mutex_unlock(&pool.launch);
}
