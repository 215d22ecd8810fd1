/*
 * backend.h: what a device is. Ops fill an argument struct and call bn_run_<kernel>(backend, &args, units, grain);
 * they never see which device runs it.
 */
#ifndef BN_KERNELS_BACKEND_H
#define BN_KERNELS_BACKEND_H

#include "base/arena.h"
#include "base/error.h"
#include "kernels/kernels.h"

BN_EXTERN_C_BEGIN

typedef struct bn_backend {
    const char *name; /* "cpu", "cuda", "meta" */
    bool has_values;  /* false: memory and launches are counted alone, and values need not be made */
    /* 64-byte aligned, contents undefined. Freed memory is kept for reuse: the same sequence of calls takes no
     * memory from the system the second time. */
    bn_status (*allocate)(size_t bytes, void **out);
    void (*release)(void *memory, size_t bytes);
    bn_status (*zero)(void *memory, size_t bytes);
    bn_status (*upload)(void *device, const void *host, size_t bytes);
    bn_status (*download)(void *host, const void *device, size_t bytes);
    bn_status (*copy)(void *dst, const void *src, size_t bytes);
    /* Runs `units` units; pieces smaller than `grain` units are not worth a thread of their own. */
    bn_status (*run)(bn_kernel_id id, const void *args, int64_t units, int64_t grain);
    bn_status (*synchronize)(void);
    /* Workers that a launch can keep busy; ops size tiles by it. It never changes a result. */
    int (*parallelism)(void);
    /* Memory that allocate and release keep: how much there is; what is cached goes back to the system; the peak
     * (high_water) begins anew. */
    bn_arena_stats (*memory_stats)(void);
    void (*memory_trim)(void);
    void (*restart_peak)(void);
} bn_backend;

const bn_backend *bn_cpu_backend(void);
const bn_backend *bn_meta_backend(void);
/* NULL in a build without CUDA. */
const bn_backend *bn_cuda_backend(void);

#define KERNEL(name)                                                                                                   \
    static inline bn_status bn_run_##name(const bn_backend *backend, const name##_args *args, int64_t units,           \
                                          int64_t grain) {                                                             \
        return backend->run(BN_KERNEL_##name, args, units, grain);                                                     \
    }
#include "kernels/kernels.def"
#undef KERNEL

BN_EXTERN_C_END
#endif
