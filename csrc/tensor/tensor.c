/* tensor.c: making, sharing and releasing tensors, and the rules by which gradients arrive in them. */
#include "tensor/tensor.h"

#include <stdio.h>
#include <stdlib.h>

#include "tensor/compact.h"
#include "tensor/quantized.h"
#include "tensor/ternary_weight.h"

static bn_status new_header(bn_dtype dtype, int ndim, const int64_t *shape, bn_tensor **out, size_t *bytes) {
    if (ndim < 0 || ndim > BN_MAX_DIMS) {
        return bn_fail(BN_ERR_SHAPE, "a tensor has at most %d dimensions, not %d", BN_MAX_DIMS, ndim);
    }
    int64_t count = 1;
    for (int i = 0; i < ndim; i++) {
        if (shape[i] < 0) {
            return bn_fail(BN_ERR_SHAPE, "dimension %d of a tensor is negative: %lld", i, (long long)shape[i]);
        }
        if (__builtin_mul_overflow(count, shape[i], &count)) {
            return bn_fail(BN_ERR_SHAPE, "the sizes of a tensor overflow at dimension %d (%lld)", i,
                           (long long)shape[i]);
        }
    }
    if (!bn_dtype_bytes(dtype, count, bytes)) {
        return bn_fail(BN_ERR_SHAPE, "a tensor of %lld elements is too large", (long long)count);
    }
    bn_tensor *t = calloc(1, sizeof *t);
    if (t == NULL) {
        return bn_fail(BN_ERR_MEMORY, "out of memory for a tensor header");
    }
    atomic_init(&t->references, 1);
    t->dtype = dtype;
    t->ndim = ndim;
    for (int i = 0; i < ndim; i++) {
        t->shape[i] = shape[i];
    }
    t->count = count;
    t->node = -1;
    *out = t;
    return BN_OK;
}

bn_status bn_tensor_new(const bn_backend *backend, bn_dtype dtype, int ndim, const int64_t *shape, bn_tensor **out) {
    bn_tensor *t;
    size_t bytes;
    BN_TRY(new_header(dtype, ndim, shape, &t, &bytes));
    bn_status status = bn_storage_new(backend, bytes, &t->storage);
    if (status != BN_OK) {
        free(t);
        return status;
    }
    *out = t;
    return BN_OK;
}

bn_status bn_tensor_window(bn_storage *storage, size_t offset, bn_dtype dtype, int ndim, const int64_t *shape,
                           bn_tensor **out) {
    bn_tensor *t;
    size_t bytes, end;
    BN_TRY(new_header(dtype, ndim, shape, &t, &bytes));
    if (!bn_add_size(offset, bytes, &end) || end > storage->bytes) {
        free(t);
        return bn_fail(BN_ERR_SHAPE, "%zu bytes at %zu leave a storage of %zu bytes", bytes, offset, storage->bytes);
    }
    t->storage = bn_storage_retain(storage);
    t->offset = offset;
    *out = t;
    return BN_OK;
}

bn_status bn_tensor_view(bn_tensor *source, int ndim, const int64_t *shape, bn_tensor **out) {
    if (!bn_dtype_is_stored(source->dtype)) {
        return bn_fail(BN_ERR_DTYPE, "a %s tensor has no second shape", bn_dtype_name(source->dtype));
    }
    BN_TRY(bn_tensor_window(source->storage, source->offset, source->dtype, ndim, shape, out));
    if ((*out)->count != source->count) {
        bn_shape_text a, b;
        bn_fail(BN_ERR_SHAPE, "reshape: %s has %lld elements, %s has %lld", bn_shape_print(source, &a),
                (long long)source->count, bn_shape_print(*out, &b), (long long)(*out)->count);
        bn_tensor_release(*out);
        return BN_ERR_SHAPE;
    }
    return BN_OK;
}

bn_tensor *bn_tensor_retain(bn_tensor *tensor) {
    atomic_fetch_add(&tensor->references, 1);
    return tensor;
}

void bn_tensor_release(bn_tensor *tensor) {
    if (tensor == NULL || atomic_fetch_sub(&tensor->references, 1) > 1) {
        return;
    }
    bn_tensor_release(tensor->grad);
    bn_ternary_free(tensor->ternary);
    bn_ternary_free(tensor->aside);
    bn_quantized_free(tensor->quantized);
    bn_compact_free(tensor->compact);
    bn_storage_release(tensor->storage);
    free(tensor);
}

int64_t bn_last_dim(const bn_tensor *t) { return t->ndim > 0 ? t->shape[t->ndim - 1] : 1; }

int64_t bn_row_count(const bn_tensor *t) {
    int64_t rows = 1;
    for (int i = 0; i + 1 < t->ndim; i++) {
        rows *= t->shape[i];
    }
    return rows;
}

size_t bn_tensor_bytes(const bn_tensor *t) {
    size_t bytes = 0;
    /* Cannot overflow: it did not when the tensor was made. */
    (void)bn_dtype_bytes(t->dtype, t->count, &bytes);
    return bytes;
}

bool bn_same_shape(const bn_tensor *a, const bn_tensor *b) {
    if (a->ndim != b->ndim) {
        return false;
    }
    for (int i = 0; i < a->ndim; i++) {
        if (a->shape[i] != b->shape[i]) {
            return false;
        }
    }
    return true;
}

const char *bn_shape_print(const bn_tensor *t, bn_shape_text *buffer) {
    size_t used = 0;
    char *text = buffer->text;
    text[used++] = '(';
    for (int i = 0; i < t->ndim; i++) {
        /* 8 dimensions of at most 19 digits each fill the buffer at worst, and snprintf cuts there. */
        int n = snprintf(text + used, sizeof buffer->text - used, i == 0 ? "%lld" : ", %lld", (long long)t->shape[i]);
        used += (size_t)n;
        if (used > sizeof buffer->text - 3) {
            used = sizeof buffer->text - 3;
        }
    }
    if (t->ndim == 1) {
        text[used++] = ',';
    }
    text[used++] = ')';
    text[used] = '\0';
    return text;
}

bn_status bn_require_writable(const char *writer, const bn_tensor *t) {
    bn_shape_text text;
    return !t->storage->is_read_only
               ? BN_OK
               : bn_fail(BN_ERR_STATE, "%s: a %s tensor of shape %s lies in read-only memory; write to a copy", writer,
                         bn_dtype_name(t->dtype), bn_shape_print(t, &text));
}

bn_status bn_tensor_zero(bn_tensor *t) {
    BN_TRY(bn_require_writable("zero", t));
    bn_storage_touch(t->storage);
    return bn_backend_of(t)->zero(bn_data(t), bn_tensor_bytes(t));
}

bn_status bn_tensor_copy(bn_tensor *t, const bn_tensor *source) {
    if (t->dtype != source->dtype || t->count != source->count) {
        return bn_fail(BN_ERR_SHAPE, "copy: %lld elements of %s into %lld of %s", (long long)source->count,
                       bn_dtype_name(source->dtype), (long long)t->count, bn_dtype_name(t->dtype));
    }
    BN_TRY(bn_require_writable("copy", t));
    bn_storage_touch(t->storage);
    const bn_backend *to = bn_backend_of(t), *from = bn_backend_of(source), *host = bn_cpu_backend();
    if (to == from) {
        return to->copy(bn_data(t), bn_data(source), bn_tensor_bytes(t));
    }
    if (from == host) {
        return to->upload(bn_data(t), bn_data(source), bn_tensor_bytes(t));
    }
    return to == host ? from->download(bn_data(t), bn_data(source), bn_tensor_bytes(t))
                      : bn_fail(BN_ERR_VALUE, "copy: from %s to %s goes by way of the cpu", from->name, to->name);
}

/* A gradient whose memory another tensor shares gets memory of its own, with the same values. */
static bn_status make_private(bn_tensor *t) {
    bn_tensor *grad = t->grad;
    if (bn_is_leaf(t) || atomic_load(&grad->storage->references) == 1) {
        return BN_OK; /* a leaf's gradient is never shared by bn_grad_pass; it may be a window of a flat buffer */
    }
    bn_tensor *own;
    BN_TRY(bn_tensor_new(bn_backend_of(grad), BN_F32, t->ndim, t->shape, &own));
    bn_status status = bn_tensor_copy(own, grad);
    if (status != BN_OK) {
        bn_tensor_release(own);
        return status;
    }
    bn_tensor_release(grad);
    t->grad = own;
    return BN_OK;
}

bn_status bn_grad_target(bn_tensor *t, float **out, bool *accumulate) {
    *out = NULL;
    *accumulate = false;
    if (t == NULL || !t->requires_grad) {
        return BN_OK;
    }
    if (t->grad == NULL) {
        BN_TRY(bn_tensor_new(bn_backend_of(t), BN_F32, t->ndim, t->shape, &t->grad));
    } else if (t->grad_is_stale) {
        t->grad_is_stale = false;
    } else {
        BN_TRY(make_private(t));
        *accumulate = true;
    }
    *out = bn_f32(t->grad);
    return BN_OK;
}

bn_status bn_grad_pass(bn_tensor *t, bn_tensor *grad) {
    if (!t->requires_grad) {
        return BN_OK;
    }
    if (t->grad == NULL && !bn_is_leaf(t)) {
        return bn_tensor_view(grad, t->ndim, t->shape, &t->grad);
    }
    float *out;
    bool accumulate;
    BN_TRY(bn_grad_target(t, &out, &accumulate));
    const axpby_args args = {
        .a = bn_f32(grad), .b = accumulate ? out : NULL, .out = out, .n = t->count, .alpha = 1.0f, .beta = 1.0f};
    return bn_run_axpby(bn_backend_of(t), &args, bn_ceil_div(t->count, BN_BLOCK), 1);
}

bn_status bn_grad_settle(bn_tensor *t) {
    if (t->grad != NULL && t->grad_is_stale) {
        t->grad_is_stale = false;
        return bn_tensor_zero(t->grad);
    }
    return BN_OK;
}
