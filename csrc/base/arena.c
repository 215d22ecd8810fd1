/*
 * arena.c: one list of cached blocks per size class, linked through the blocks themselves.
 *
 * A request is served by its own class or by the system, never by a larger cached block. So the second run of a
 * sequence of calls finds in each class as many blocks as the first run held at once, and asks the system for none.
 * Borrowing from up to four classes above broke that promise in 2290 of 3000 random sequences.
 */
#define _DEFAULT_SOURCE /* madvise */
#include "base/arena.h"

#include <stdlib.h>
#include <sys/mman.h>

#define HUGE_PAGE ((size_t)2 << 20)

typedef struct bn_arena_block {
    struct bn_arena_block *next;
} bn_arena_block;

/* With m = ceil(bytes / 64): class m - 1 for m <= 8; above, 2^k < m <= 2^(k+1) is cut in eight steps of 2^(k-3). */
static int class_of(size_t bytes) {
    size_t m = bytes / BN_ALIGN + (bytes % BN_ALIGN != 0);
    if (m <= 8) {
        return m == 0 ? 0 : (int)m - 1;
    }
    int k = 63 - __builtin_clzll((unsigned long long)(m - 1));
    return 8 * (k - 2) + (int)((m - 1) >> (k - 3)) - 8;
}

static size_t class_bytes(int size_class) {
    size_t steps = (size_t)(size_class % 8) + 1;
    return size_class < 8 ? BN_ALIGN * steps : BN_ALIGN * (8 + steps) << (size_class / 8 - 1);
}

/* No process has pages here: x86-64 gives it 47 bits of addresses, 56 where it asks for them, ARM 48, 52 likewise. */
#define NOWHERE ((uintptr_t)1 << 53)

static void *new_address(bn_arena *arena, size_t bytes) {
    if (bytes >= NOWHERE - arena->used) {
        return NULL;
    }
    const uintptr_t address = NOWHERE + arena->used;
    arena->used += bytes;
    return (void *)address;
}

static void *take_from_system(bn_arena *arena, size_t bytes) {
    if (arena->is_virtual) {
        return new_address(arena, bytes);
    }
    void *memory;
    if (posix_memalign(&memory, bytes >= HUGE_PAGE ? HUGE_PAGE : BN_ALIGN, bytes) != 0) {
        return NULL;
    }
#ifdef MADV_HUGEPAGE
    if (bytes >= HUGE_PAGE) {
        (void)madvise(memory, bytes & ~(HUGE_PAGE - 1), MADV_HUGEPAGE); /* a hint: failure changes nothing */
    }
#endif
    return memory;
}

/* A cached block of a class, or NULL. This and the next two want the lock. */
static void *take_cached(bn_arena *arena, int c) {
    if (arena->is_virtual) {
        if (arena->cached_count[c] == 0) {
            return NULL;
        }
        arena->cached_count[c]--;
        return new_address(arena, class_bytes(c));
    }
    bn_arena_block *block = arena->cached[c];
    if (block) {
        arena->cached[c] = block->next;
    }
    return block;
}

static void keep(bn_arena *arena, int c, void *memory) {
    if (arena->is_virtual) {
        arena->cached_count[c]++;
        return;
    }
    bn_arena_block *block = memory;
    block->next = arena->cached[c];
    arena->cached[c] = block;
}

static void trim(bn_arena *arena) {
    for (int c = 0; c < BN_ARENA_CLASSES; c++) {
        for (bn_arena_block *block = arena->cached[c], *next; block; block = next) {
            next = block->next;
            free(block);
        }
        arena->cached[c] = NULL;
        arena->cached_count[c] = 0;
    }
    arena->stats.cached = 0;
    if (arena->stats.in_use == 0) {
        arena->used = 0; /* nobody has an address of it: all can be given out again */
    }
}

bn_status bn_arena_allocate(bn_arena *arena, size_t bytes, void **out) {
    if (bytes > (size_t)PTRDIFF_MAX / 2) { /* so that a class's size cannot overflow */
        return bn_fail(BN_ERR_MEMORY, "no memory for %zu bytes", bytes);
    }
    const int c = class_of(bytes);
    const size_t block_bytes = class_bytes(c);
    bn_arena_stats *stats = &arena->stats;
    pthread_mutex_lock(&arena->lock);
    void *memory = take_cached(arena, c);
    if (memory) {
        stats->cached -= block_bytes;
    } else {
        memory = take_from_system(arena, block_bytes);
        if (!memory && stats->cached > 0) {
            trim(arena);
            memory = take_from_system(arena, block_bytes);
        }
        stats->system_calls += memory != NULL;
    }
    stats->in_use += memory ? block_bytes : 0;
    stats->high_water = stats->in_use > stats->high_water ? stats->in_use : stats->high_water;
    const size_t in_use = stats->in_use;
    pthread_mutex_unlock(&arena->lock);
    if (!memory) {
        return bn_fail(BN_ERR_MEMORY, "no memory for %zu bytes (%zu bytes are in use)", bytes, in_use);
    }
    *out = memory;
    return BN_OK;
}

void bn_arena_release(bn_arena *arena, void *memory, size_t bytes) {
    if (!memory) {
        return;
    }
    const int c = class_of(bytes);
    pthread_mutex_lock(&arena->lock);
    keep(arena, c, memory);
    arena->stats.in_use -= class_bytes(c);
    arena->stats.cached += class_bytes(c);
    pthread_mutex_unlock(&arena->lock);
}

void bn_arena_trim(bn_arena *arena) {
    pthread_mutex_lock(&arena->lock);
    trim(arena);
    pthread_mutex_unlock(&arena->lock);
}

bn_arena_stats bn_arena_get_stats(bn_arena *arena) {
    pthread_mutex_lock(&arena->lock);
    bn_arena_stats stats = arena->stats;
    pthread_mutex_unlock(&arena->lock);
    return stats;
}

void bn_arena_restart_peak(bn_arena *arena) {
    pthread_mutex_lock(&arena->lock);
    arena->stats.high_water = arena->stats.in_use;
    pthread_mutex_unlock(&arena->lock);
}
