/*
 * arena.h: a caching allocator for tensor memory. Released blocks are kept by size and handed out again, in any order
 * of release, so a training step that repeats the last one's calls takes nothing from the system and finds its pages
 * mapped.
 *
 * Blocks come in classes, eight to each power of two, so at most one part in eight is unused (below 512 bytes:
 * rounded up to 64). All functions may be called by several threads.
 *
 * A virtual arena counts in the same way and takes no memory: its blocks have addresses of their own, in a part of the
 * address space where no process has pages, so whoever reads or writes one is stopped by the processor.
 */
#ifndef BN_BASE_ARENA_H
#define BN_BASE_ARENA_H

#include <pthread.h>

#include "base/error.h"

BN_EXTERN_C_BEGIN

/* Eight classes of 64, 128 .. 512 bytes, then eight per power of two up to the largest size_t. */
#define BN_ARENA_CLASSES (8 + 8 * 55)

typedef struct bn_arena_stats {
    size_t in_use, cached; /* bytes of blocks held by callers, and kept for reuse */
    size_t high_water;     /* largest in_use so far */
    size_t system_calls;   /* blocks taken from the system so far */
} bn_arena_stats;

typedef struct bn_arena {
    pthread_mutex_t lock;
    struct bn_arena_block *cached[BN_ARENA_CLASSES];
    bn_arena_stats stats;
    bool is_virtual;
    size_t cached_count[BN_ARENA_CLASSES]; /* of a virtual one, whose blocks cannot be linked */
    uintptr_t used;                        /* of a virtual one: addresses given out so far */
} bn_arena;

#define BN_ARENA_INIT                                                                                                  \
    { .lock = PTHREAD_MUTEX_INITIALIZER }
#define BN_VIRTUAL_ARENA_INIT                                                                                          \
    { .lock = PTHREAD_MUTEX_INITIALIZER, .is_virtual = true }

/* Memory of at least `bytes` (0 included), 64-byte aligned, contents undefined; the caller owns it until release. */
BN_CHECKED bn_status bn_arena_allocate(bn_arena *arena, size_t bytes, void **out);
/* Takes back memory from bn_arena_allocate(arena, bytes, ...): the same bytes, which name its class. Accepts NULL. */
void bn_arena_release(bn_arena *arena, void *memory, size_t bytes);
/* Gives every cached block back to the system: worth a call when the shape of the work changes. */
void bn_arena_trim(bn_arena *arena);
bn_arena_stats bn_arena_get_stats(bn_arena *arena);
/* From now on, high_water is that of what is in use from now on. */
void bn_arena_restart_peak(bn_arena *arena);

BN_EXTERN_C_END

#endif
