/* cache.h: the checks that the readers and the writer of a key/value cache share. */
#ifndef BN_OPS_CACHE_H
#define BN_OPS_CACHE_H

#include "ops/op.h"

/* `cache` (slots, S, KV, D) is f32, bf16, or i8 with `scale` f32 (slots, S, KV); `start` and `slot`, which may be NULL,
 * are i32 of `batch` elements; without `slot` there are slots for them all. */
BN_CHECKED bn_status bn_require_cache(const char *op, const char *argument, const bn_tensor *cache,
                                      const bn_tensor *scale);
BN_CHECKED bn_status bn_require_places(const char *op, int64_t batch, const bn_tensor *cache, const bn_tensor *start,
                                       const bn_tensor *slot);
/* At run time: `length` tokens from each start on fit the cache, and slots, if given, are in it; each once, if
 * `distinct`. */
BN_CHECKED bn_status bn_require_free_places(const char *op, int64_t length, const bn_tensor *cache,
                                            const bn_tensor *start, const bn_tensor *slot, bool distinct);

static inline bn_cache bn_cache_of(const bn_tensor *cache, const bn_tensor *scale) {
    return (bn_cache){.data = bn_data(cache), .scale = scale == NULL ? NULL : bn_f32(scale), .dtype = cache->dtype};
}

#endif
