/* storage.c: reference counting of device memory. */
#include "tensor/storage.h"

#include <stdlib.h>

static bn_status new_header(const bn_backend *backend, size_t bytes, bn_storage **out) {
    bn_storage *s = calloc(1, sizeof *s);
    if (s == NULL) {
        return bn_fail(BN_ERR_MEMORY, "out of memory for a storage header");
    }
    s->backend = backend;
    s->bytes = bytes;
    atomic_init(&s->references, 1);
    atomic_init(&s->version, 1);
    atomic_init(&s->exports, 0);
    *out = s;
    return BN_OK;
}

bn_status bn_storage_new(const bn_backend *backend, size_t bytes, bn_storage **out) {
    bn_storage *s = NULL;
    BN_TRY(new_header(backend, bytes, &s));
    bn_status status = backend->allocate(bytes, &s->data);
    if (status != BN_OK) {
        free(s);
        return status;
    }
    *out = s;
    return BN_OK;
}

bn_status bn_storage_wrap(const bn_backend *backend, void *data, size_t bytes, void (*release)(void *), void *owner,
                          bn_storage **out) {
    BN_TRY(new_header(backend, bytes, out));
    (*out)->data = data;
    (*out)->foreign_release = release;
    (*out)->foreign_owner = owner;
    /* Its owner may write at any time. */
    atomic_init(&(*out)->exports, 1);
    return BN_OK;
}

bn_storage *bn_storage_retain(bn_storage *storage) {
    atomic_fetch_add(&storage->references, 1);
    return storage;
}

void bn_storage_evict(bn_storage *storage) {
    storage->backend->release(storage->data, storage->bytes);
    storage->data = NULL;
}

bn_status bn_storage_ensure(bn_storage *storage) {
    return storage->data != NULL ? BN_OK : storage->backend->allocate(storage->bytes, &storage->data);
}

void bn_storage_release(bn_storage *storage) {
    if (storage == NULL || atomic_fetch_sub(&storage->references, 1) > 1) {
        return;
    }
    if (storage->foreign_release != NULL) {
        storage->foreign_release(storage->foreign_owner);
    } else {
        storage->backend->release(storage->data, storage->bytes);
    }
    free(storage);
}
