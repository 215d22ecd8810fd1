/*
 * backend.c: the CPU as a device. Memory comes from one arena; a launch is bn_parallel_for over one function of the
 * chosen table; nothing is ever in flight when a call returns.
 *
 * Tables overlay: set i's table is set i-1's with every entry that set i fills replaced, so a set may fill just a few.
 */
#include "cpu/cpu.h"

#include <stdatomic.h>
#include <stdio.h>
#include <string.h>

#include "base/cpu_features.h"
#include "base/interrupt.h"
#include "base/parallel.h"

/* ---- instruction sets ---- */

#define AVX512                                                                                                         \
    (BN_CPU_BIT(AVX2) | BN_CPU_BIT(FMA) | BN_CPU_BIT(AVX512F) | BN_CPU_BIT(AVX512BW) | BN_CPU_BIT(AVX512DQ) |          \
     BN_CPU_BIT(AVX512VL) | BN_CPU_BIT(AVX512VNNI))

extern const bn_kernel_table bn_kernels_scalar;
#if defined(__x86_64__)
extern const bn_kernel_table bn_kernels_avx2, bn_kernels_avxvnni;
extern const bn_kernel_table bn_kernels_avx512vnni, bn_kernels_avx512vbmi, bn_kernels_avx512bf16, bn_kernels_amx;
#elif defined(__aarch64__)
extern const bn_kernel_table bn_kernels_neon, bn_kernels_dotprod, bn_kernels_i8mm, bn_kernels_neonbf16;
#endif

static const struct {
    const bn_kernel_table *table;
    uint32_t needs;
} sets[] = {
    {&bn_kernels_scalar, 0},
#if defined(__x86_64__)
    {&bn_kernels_avx2, BN_CPU_BIT(AVX2) | BN_CPU_BIT(FMA)},
    {&bn_kernels_avxvnni, BN_CPU_BIT(AVX2) | BN_CPU_BIT(FMA) | BN_CPU_BIT(AVXVNNI)},
    {&bn_kernels_avx512vnni, AVX512},
    {&bn_kernels_avx512vbmi, AVX512 | BN_CPU_BIT(AVX512VBMI)},
    {&bn_kernels_avx512bf16, AVX512 | BN_CPU_BIT(AVX512BF16)},
    {&bn_kernels_amx,
     AVX512 | BN_CPU_BIT(AVX512VBMI) | BN_CPU_BIT(AVX512BF16) | BN_CPU_BIT(AMX_INT8) | BN_CPU_BIT(AMX_BF16)},
#elif defined(__aarch64__)
    {&bn_kernels_neon, BN_CPU_BIT(NEON)},
    {&bn_kernels_dotprod, BN_CPU_BIT(NEON) | BN_CPU_BIT(DOTPROD)},
    {&bn_kernels_i8mm, BN_CPU_BIT(NEON) | BN_CPU_BIT(DOTPROD) | BN_CPU_BIT(I8MM)},
    {&bn_kernels_neonbf16, BN_CPU_BIT(NEON) | BN_CPU_BIT(BF16)},
#endif
};
enum { SETS = sizeof sets / sizeof *sets };

static bn_kernel_table usable[SETS];
static const bn_kernel_table *own[SETS]; /* of each usable set, what it fills itself */
static int usable_count;
static _Atomic(const bn_kernel_table *) current;
static pthread_once_t once = PTHREAD_ONCE_INIT;

static bn_arena arena = BN_ARENA_INIT;

/* A forked child must not inherit the arena's lock from a thread it does not have. */
static void before_fork(void) { pthread_mutex_lock(&arena.lock); }
static void after_fork(void) { pthread_mutex_unlock(&arena.lock); }

static void initialize(void) {
    bn_kernel_table table = {0};
    for (int s = 0; s < SETS; s++) {
        if ((sets[s].needs & ~bn_cpu_features()) != 0) {
            continue;
        }
        const bn_kernel_table *over = sets[s].table;
        table.isa = over->isa;
#define KERNEL(name) table.name = over->name ? over->name : table.name;
#include "kernels/kernels.def"
#undef KERNEL
        own[usable_count] = over;
        usable[usable_count++] = table;
    }
    atomic_store(&current, &usable[usable_count - 1]);
    pthread_atfork(before_fork, after_fork, after_fork);
}

static const bn_kernel_table *chosen(void) {
    const bn_kernel_table *table = atomic_load_explicit(&current, memory_order_acquire);
    if (BN_UNLIKELY(!table)) {
        pthread_once(&once, initialize);
        table = atomic_load(&current);
    }
    return table;
}

int bn_cpu_isa_count(void) {
    chosen();
    return usable_count;
}

const char *bn_cpu_isa_name(int index) { return index >= 0 && index < bn_cpu_isa_count() ? usable[index].isa : NULL; }

const bn_kernel_table *bn_cpu_isa_own_kernels(int index) {
    return index >= 0 && index < bn_cpu_isa_count() ? own[index] : NULL;
}

const char *bn_cpu_current_isa(void) { return chosen()->isa; }

bn_status bn_cpu_use_isa(const char *name) {
    char list[128] = "";
    for (int i = 0; i < bn_cpu_isa_count(); i++) {
        if (strcmp(usable[i].isa, name) == 0) {
            atomic_store(&current, &usable[i]);
            return BN_OK;
        }
        size_t used = strlen(list);
        snprintf(list + used, sizeof list - used, "%s%s", i ? ", " : "", usable[i].isa);
    }
    return bn_fail(BN_ERR_VALUE, "cpu: no instruction set '%s' on this machine; it has %s", name, list);
}

/* ---- launches ---- */

typedef struct launch {
    const bn_kernel_table *table;
    const void *args;
    bn_kernel_id id;
} launch;

static void run_range(void *ctx, int64_t begin, int64_t end, void *scratch) {
    const launch *l = ctx;
    switch (l->id) {
#define KERNEL(name)                                                                                                   \
    case BN_KERNEL_##name:                                                                                             \
        l->table->name(l->args, begin, end, scratch);                                                                  \
        break;
#include "kernels/kernels.def"
#undef KERNEL
    case BN_KERNEL_COUNT:
        break;
    }
}

static bn_status cpu_run(bn_kernel_id id, const void *args, int64_t units, int64_t grain) {
    BN_TRY(bn_check_interrupt());
    launch l = {chosen(), args, id};
    return bn_parallel_for(0, units, grain, run_range, &l);
}

static bn_status cpu_synchronize(void) { return BN_OK; }

/* ---- memory ---- */

static bn_status cpu_allocate(size_t bytes, void **out) { return bn_arena_allocate(&arena, bytes, out); }
static void cpu_release(void *memory, size_t bytes) { bn_arena_release(&arena, memory, bytes); }

static bn_arena_stats cpu_memory_stats(void) { return bn_arena_get_stats(&arena); }
static void cpu_memory_trim(void) { bn_arena_trim(&arena); }
static void cpu_restart_peak(void) { bn_arena_restart_peak(&arena); }

/* One thread cannot fill the memory bus: long copies go to all of them in pieces of this size. */
#define MOVE_BYTES ((size_t)256 << 10)

typedef struct move {
    char *dst;
    const char *src; /* NULL: zeros */
    size_t bytes;
} move;

static void move_range(void *ctx, int64_t begin, int64_t end, void *scratch) {
    (void)scratch;
    const move *m = ctx;
    const size_t from = (size_t)begin * MOVE_BYTES, whole = (size_t)(end - begin) * MOVE_BYTES;
    const size_t bytes = whole < m->bytes - from ? whole : m->bytes - from;
    if (m->src) {
        memcpy(m->dst + from, m->src + from, bytes);
    } else {
        memset(m->dst + from, 0, bytes);
    }
}

static bn_status cpu_copy(void *dst, const void *src, size_t bytes) {
    move m = {dst, src, bytes};
    const size_t pieces = bytes / MOVE_BYTES + (bytes % MOVE_BYTES != 0);
    return bn_parallel_for(0, (int64_t)pieces, 1, move_range, &m);
}

static bn_status cpu_zero(void *memory, size_t bytes) { return cpu_copy(memory, NULL, bytes); }

const bn_backend *bn_cpu_backend(void) {
    static const bn_backend backend = {
        .name = "cpu",
        .has_values = true,
        .allocate = cpu_allocate,
        .release = cpu_release,
        .zero = cpu_zero,
        .upload = cpu_copy,
        .download = cpu_copy,
        .copy = cpu_copy,
        .run = cpu_run,
        .synchronize = cpu_synchronize,
        .parallelism = bn_get_threads,
        .memory_stats = cpu_memory_stats,
        .memory_trim = cpu_memory_trim,
        .restart_peak = cpu_restart_peak,
    };
    return &backend;
}
