/*
 * tensor.h: dtype + shape + a window into a storage; always dense row-major. A tensor also carries what autograd needs
 * to know of it: its gradient, and the tape and node that made it.
 */
#ifndef BN_TENSOR_TENSOR_H
#define BN_TENSOR_TENSOR_H

#include "tensor/storage.h"

#define BN_MAX_DIMS 8

typedef struct bn_tape bn_tape;
typedef struct bn_ternary bn_ternary;     /* ternary_weight.h */
typedef struct bn_quantized bn_quantized; /* quantized.h */
typedef struct bn_compact bn_compact;     /* compact.h */

typedef struct bn_tensor {
    atomic_int references;
    bn_dtype dtype;
    int ndim;
    int64_t shape[BN_MAX_DIMS];
    int64_t count; /* elements */
    bn_storage *storage;
    size_t offset; /* bytes from the start of the storage */

    bool requires_grad;
    struct bn_tensor *grad; /* same shape, f32; NULL until the first gradient arrives */
    bool grad_is_stale;     /* the gradient is zero whatever its memory holds: the next writer overwrites it */

    bn_tape *tape;      /* the tape this tensor was recorded on, borrowed; NULL for a leaf */
    int64_t node;       /* its place there */
    bool is_consumed;   /* its history was walked and forgotten: no gradient can reach beyond it any more */
    atomic_int handles; /* Python objects that hold this tensor */

    bn_ternary *ternary; /* this weight's ternary codes, prepared for dot products; NULL unless a bitlinear read it */
    bn_ternary *aside;   /* the other form of a weight whose codes are held (held_weight.c); NULL otherwise */
    bool channel_scales; /* as a ternary weight it has a scale for each row (quant/ternary.h) instead of one */
    bn_quantized *quantized; /* this activation's int8 form; NULL unless a bitlinear read it */
    bn_compact *compact;     /* what an output matrix of dtype compact is */
} bn_tensor;

/* Returns new, contents undefined. Refuses negative or overflowing sizes and more than BN_MAX_DIMS dimensions. */
BN_CHECKED bn_status bn_tensor_new(const bn_backend *backend, bn_dtype dtype, int ndim, const int64_t *shape,
                                   bn_tensor **out);
/* Returns new: another shape (same count) over the same memory, without history. */
BN_CHECKED bn_status bn_tensor_view(bn_tensor *source, int ndim, const int64_t *shape, bn_tensor **out);
/* Returns new around `storage` (retained) at a byte offset; refuses a window that leaves the storage. */
BN_CHECKED bn_status bn_tensor_window(bn_storage *storage, size_t offset, bn_dtype dtype, int ndim,
                                      const int64_t *shape, bn_tensor **out);
bn_tensor *bn_tensor_retain(bn_tensor *tensor);
/* Accepts NULL. */
void bn_tensor_release(bn_tensor *tensor);

static inline void *bn_data(const bn_tensor *t) { return (char *)t->storage->data + t->offset; }
static inline float *bn_f32(const bn_tensor *t) { return (float *)bn_data(t); }
static inline int32_t *bn_i32(const bn_tensor *t) { return (int32_t *)bn_data(t); }
static inline int8_t *bn_i8(const bn_tensor *t) { return (int8_t *)bn_data(t); }
static inline const bn_backend *bn_backend_of(const bn_tensor *t) { return t->storage->backend; }
static inline bool bn_is_leaf(const bn_tensor *t) { return t->tape == NULL; }
/* Size of the last dimension (1 for a scalar) and how many such rows there are. */
int64_t bn_last_dim(const bn_tensor *t);
int64_t bn_row_count(const bn_tensor *t);
size_t bn_tensor_bytes(const bn_tensor *t);
bool bn_same_shape(const bn_tensor *a, const bn_tensor *b);
/* "(2, 3, 4)" into a caller's buffer, which it returns; for sentences. */
typedef struct bn_shape_text {
    char text[160];
} bn_shape_text;
const char *bn_shape_print(const bn_tensor *t, bn_shape_text *buffer);

/* BN_ERR_STATE, naming the writer, if t lies in memory that must not be written to. */
BN_CHECKED bn_status bn_require_writable(const char *writer, const bn_tensor *t);
BN_CHECKED bn_status bn_tensor_zero(bn_tensor *t);
/* Copies the values of `source` (same dtype and count), from device to device where one of them is the CPU. */
BN_CHECKED bn_status bn_tensor_copy(bn_tensor *t, const bn_tensor *source);

/*
 * Where an op's backward pass puts the gradient of t: *out is its memory, or NULL if t wants none; *accumulate tells
 * whether to add to what is there or to overwrite it.
 */
BN_CHECKED bn_status bn_grad_target(bn_tensor *t, float **out, bool *accumulate);
/*
 * The gradient of t is `grad` itself (same count), or that is added to it. Where t has no gradient yet its memory is
 * shared instead of copied; a later bn_grad_target on shared memory makes it private first.
 */
BN_CHECKED bn_status bn_grad_pass(bn_tensor *t, bn_tensor *grad);
/* Clears the memory of stale gradients, so that code that reads flat buffers sees zeros. */
BN_CHECKED bn_status bn_grad_settle(bn_tensor *t);

#endif
