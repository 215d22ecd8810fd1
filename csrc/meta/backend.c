/*
 * backend.c: a device that knows how much memory everything takes, and nothing else. Its arena counts as the CPU's does
 * and takes no memory; launches and copies do nothing. So a model of any size can be made, trained for a step and run
 * in milliseconds, to see what it needs (bitnet/plan.py). What is read back has every bit set, NaN as a float. And
 * because its addresses cannot be touched, a program that runs here is one that leaves elements to kernels.
 */
#include <string.h>

#include "base/parallel.h"
#include "kernels/backend.h"

static bn_arena arena = BN_VIRTUAL_ARENA_INIT;

static bn_status meta_allocate(size_t bytes, void **out) { return bn_arena_allocate(&arena, bytes, out); }
static void meta_release(void *memory, size_t bytes) { bn_arena_release(&arena, memory, bytes); }

static bn_status meta_zero(void *memory, size_t bytes) {
    (void)memory;
    (void)bytes;
    return BN_OK;
}

static bn_status meta_copy(void *dst, const void *src, size_t bytes) {
    (void)dst;
    (void)src;
    (void)bytes;
    return BN_OK;
}

static bn_status meta_download(void *host, const void *device, size_t bytes) {
    (void)device;
    memset(host, 0xff, bytes);
    return BN_OK;
}

static bn_status meta_run(bn_kernel_id id, const void *args, int64_t units, int64_t grain) {
    (void)id;
    (void)args;
    (void)units;
    (void)grain;
    return BN_OK;
}

static bn_status meta_synchronize(void) { return BN_OK; }

static bn_arena_stats meta_memory_stats(void) { return bn_arena_get_stats(&arena); }
static void meta_memory_trim(void) { bn_arena_trim(&arena); }
static void meta_restart_peak(void) { bn_arena_restart_peak(&arena); }

const bn_backend *bn_meta_backend(void) {
    static const bn_backend backend = {
        .name = "meta",
        .has_values = false,
        .allocate = meta_allocate,
        .release = meta_release,
        .zero = meta_zero,
        .upload = meta_copy,
        .download = meta_download,
        .copy = meta_copy,
        .run = meta_run,
        .synchronize = meta_synchronize,
        .parallelism = bn_get_threads, /* tiles, and so what they need, are those of the CPU */
        .memory_stats = meta_memory_stats,
        .memory_trim = meta_memory_trim,
        .restart_peak = meta_restart_peak,
    };
    return &backend;
}
