/*
 * storage.h: reference-counted memory on a device. Tensors are windows into a storage; all parameters of a model share
 * one, their gradients another, so an optimizer step is one pass over flat memory.
 */
#ifndef BN_TENSOR_STORAGE_H
#define BN_TENSOR_STORAGE_H

#include <stdatomic.h>

#include "kernels/backend.h"

typedef struct bn_storage {
    const bn_backend *backend;
    void *data;
    size_t bytes;
    atomic_int references;
    /* Counts writes. A quantized copy of a weight remembers the version it was made from. */
    atomic_ullong version;
    /* Buffers outside this core (NumPy views) through which the memory may be written at any time without a word. */
    atomic_int exports;
    /* A segment's intermediate result (segment.h): away between forward and backward, when data is NULL. */
    bool is_temporary;
    /* Memory that must not be written to, such as a mapped file: bn_require_writable. */
    bool is_read_only;
    /* Memory of someone else (DLPack): called once instead of backend->release. NULL for our own. */
    void (*foreign_release)(void *owner);
    void *foreign_owner;
} bn_storage;

/* Returns new, with one reference; contents undefined. */
BN_CHECKED bn_status bn_storage_new(const bn_backend *backend, size_t bytes, bn_storage **out);
/* Returns new around foreign memory; on failure the caller still owns it. */
BN_CHECKED bn_status bn_storage_wrap(const bn_backend *backend, void *data, size_t bytes, void (*release)(void *),
                                     void *owner, bn_storage **out);
bn_storage *bn_storage_retain(bn_storage *storage);
/* Accepts NULL. */
void bn_storage_release(bn_storage *storage);
/* Gives the memory back and keeps the header; bn_storage_ensure takes memory again, contents undefined. Neither does
 * anything twice. Neither is a write: the caller puts the same values there again. */
void bn_storage_evict(bn_storage *storage);
BN_CHECKED bn_status bn_storage_ensure(bn_storage *storage);

/* True when two reads of the storage with no bn_storage_touch between them may differ. */
static inline bool bn_storage_is_exported(bn_storage *s) { return atomic_load(&s->exports) > 0; }
/* Tells that the contents changed. */
static inline void bn_storage_touch(bn_storage *s) { atomic_fetch_add(&s->version, 1); }
static inline uint64_t bn_storage_version(bn_storage *s) { return atomic_load(&s->version); }

#endif
