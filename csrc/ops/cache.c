/*
 * cache.c: keys or values of past tokens. cache_append writes those of new tokens at each sequence's position, rounded
 * to what the cache holds, and hands the cache on; attention reads all of them back. Which slot of the cache a sequence
 * has, and its position, are read when the op runs: a recorded step can be replayed for other sequences.
 */
#include "ops/cache.h"

bn_status bn_require_cache(const char *op, const char *argument, const bn_tensor *cache, const bn_tensor *scale) {
    BN_TRY(bn_require_ndim(op, argument, cache, 4));
    if (cache->dtype != BN_F32 && cache->dtype != BN_BF16 && cache->dtype != BN_I8) {
        return bn_fail(BN_ERR_DTYPE, "%s: %s is %s, expected f32, bf16 or i8", op, argument,
                       bn_dtype_name(cache->dtype));
    }
    if ((cache->dtype == BN_I8) != (scale != NULL)) {
        return bn_fail(BN_ERR_VALUE, "%s: %s is %s and %s scales", op, argument, bn_dtype_name(cache->dtype),
                       scale == NULL ? "needs its" : "has no");
    }
    if (scale != NULL) {
        BN_TRY(bn_require_dtype(op, "scale", scale, BN_F32));
        bn_shape_text a, b;
        if (scale->ndim != 3 || scale->shape[0] != cache->shape[0] || scale->shape[1] != cache->shape[1] ||
            scale->shape[2] != cache->shape[2]) {
            return bn_fail(BN_ERR_SHAPE, "%s: scales %s do not fit %s %s", op, bn_shape_print(scale, &a), argument,
                           bn_shape_print(cache, &b));
        }
    }
    return BN_OK;
}

bn_status bn_require_places(const char *op, int64_t batch, const bn_tensor *cache, const bn_tensor *start,
                            const bn_tensor *slot) {
    BN_TRY(bn_require_dtype(op, "start", start, BN_I32));
    if (start->count != batch) {
        return bn_fail(BN_ERR_SHAPE, "%s: %lld starts for %lld sequences", op, (long long)start->count,
                       (long long)batch);
    }
    if (slot != NULL) {
        BN_TRY(bn_require_dtype(op, "slot", slot, BN_I32));
    }
    if (slot != NULL ? slot->count != batch : cache->shape[0] < batch) {
        return bn_fail(BN_ERR_SHAPE, "%s: %lld slots for %lld sequences", op,
                       (long long)(slot != NULL ? slot->count : cache->shape[0]), (long long)batch);
    }
    return BN_OK;
}

bn_status bn_require_free_places(const char *op, int64_t length, const bn_tensor *cache, const bn_tensor *start,
                                 const bn_tensor *slot, bool distinct) {
    BN_TRY(bn_require_positions(op, start, length, cache->shape[1]));
    if (slot == NULL) {
        return BN_OK;
    }
    BN_TRY(bn_require_index(op, "slot", slot, cache->shape[0], NULL));
    bn_fault fault = {.row = -1};
    const index_check_args args = {
        .index = bn_i32(slot), .fault = &fault, .n = slot->count, .limit = cache->shape[0], .distinct = true};
    BN_TRY(distinct ? bn_run_index_check(bn_backend_of(slot), &args, 1, 1) : BN_OK);
    if (fault.row >= 0) {
        return bn_fail(BN_ERR_VALUE, "%s: slot %lld at place %lld has been named before", op, (long long)fault.value,
                       (long long)fault.row);
    }
    return BN_OK;
}

/* inputs: x, cache, start, slot or NULL, scale or NULL; the output is a window on the cache */
static bn_status append_run(bn_node *n) {
    const bn_tensor *x = n->inputs[0], *cache = n->inputs[1], *start = n->inputs[2], *slot = n->inputs[3];
    bn_tensor *scale = n->inputs[4];
    BN_TRY(bn_require_free_places("cache_append", x->shape[1], cache, start, slot, true));
    if (scale != NULL) {
        bn_storage_touch(scale->storage);
    }
    const cache_write_args args = {.x = bn_f32(x),
                                   .start = bn_i32(start),
                                   .slot = slot == NULL ? NULL : bn_i32(slot),
                                   .cache = bn_cache_of(cache, scale),
                                   .B = x->shape[0],
                                   .T = x->shape[1],
                                   .KV = x->shape[2],
                                   .D = x->shape[3],
                                   .capacity = cache->shape[1]};
    return bn_run_cache_write(bn_backend_of(x), &args, args.B * args.T, 16);
}

const bn_op bn_op_cache_append = {"cache_append", append_run, NULL};

bn_status bn_cache_append(bn_tensor *x, bn_tensor *cache, bn_tensor *start, bn_tensor *slot, bn_tensor *scale,
                          bn_tensor **out) {
    BN_TRY(bn_require_dtype("cache_append", "x", x, BN_F32));
    BN_TRY(bn_require_ndim("cache_append", "x", x, 4));
    BN_TRY(bn_require_cache("cache_append", "cache", cache, scale));
    if (x->shape[2] != cache->shape[2] || x->shape[3] != cache->shape[3]) {
        bn_shape_text a, b;
        return bn_fail(BN_ERR_SHAPE, "cache_append: x %s does not fit a cache %s", bn_shape_print(x, &a),
                       bn_shape_print(cache, &b));
    }
    BN_TRY(bn_require_places("cache_append", x->shape[0], cache, start, slot));
    BN_TRY(bn_require_writable("cache_append", cache));
    if (scale != NULL) {
        BN_TRY(bn_require_writable("cache_append", scale));
    }
    if (bn_wants_grad(&x, 1)) {
        return bn_fail(BN_ERR_STATE, "cache_append: no gradient flows through a cache; use no_grad()");
    }
    bn_node n = {.op = &bn_op_cache_append, .inputs = {x, cache, start, slot, scale}};
    BN_TRY(bn_tensor_view(cache, cache->ndim, cache->shape, &n.output));
    return bn_tape_run(&n, out);
}

bn_status bn_cache_copy(bn_tensor *cache, int64_t source, int64_t destination, int64_t length) {
    if (cache->ndim < 2 || cache->dtype == BN_TERNARY2 || !bn_dtype_is_stored(cache->dtype)) {
        bn_shape_text text;
        return bn_fail(BN_ERR_SHAPE, "cache_copy: %s %s is no cache", bn_dtype_name(cache->dtype),
                       bn_shape_print(cache, &text));
    }
    const int64_t slots = cache->shape[0], capacity = cache->shape[1];
    if (source < 0 || source >= slots || destination < 0 || destination >= slots || length < 0 || length > capacity) {
        return bn_fail(BN_ERR_INDEX, "cache_copy: %lld positions of slot %lld to %lld, of %lld slots of %lld positions",
                       (long long)length, (long long)source, (long long)destination, (long long)slots,
                       (long long)capacity);
    }
    BN_TRY(bn_require_writable("cache_copy", cache));
    if (source == destination || length == 0 || cache->count == 0) {
        return BN_OK;
    }
    const size_t position = bn_tensor_bytes(cache) / (size_t)(slots * capacity), slot = position * (size_t)capacity;
    char *data = bn_data(cache);
    bn_storage_touch(cache->storage);
    return bn_backend_of(cache)->copy(data + (size_t)destination * slot, data + (size_t)source * slot,
                                      position * (size_t)length);
}
