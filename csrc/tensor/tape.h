/*
 * tape.h: recorded ops. Running an op while recording appends one node; recording order is already topological order,
 * so backward() is a loop from the last node to the first and replay() a loop from the first to the last.
 *
 * Each thread has an implicit tape, which is what `loss.backward()` in a notebook uses: nodes leave it as the backward
 * pass consumes them, and all of it goes when Python holds no tensor that was recorded on it, so nothing has to be told
 * when a graph is no longer wanted. An explicit tape (bn_tape_new, entered for a while) keeps its nodes and their
 * memory: the same step can be replayed on new inputs without Python, without shape checks and without allocation.
 *
 * On either, the nodes between bn_tape_open_segment and bn_tape_close_segment make a segment, whose intermediate
 * results are made again in the backward pass instead of kept (segment.h). It is walked back as one: on an implicit
 * tape one backward pass through any of its nodes consumes all of them.
 */
#ifndef BN_TENSOR_TAPE_H
#define BN_TENSOR_TAPE_H

#include "tensor/tensor.h"

/* How products are multiplied whose result is not part of the forward pass's promise: gradients, and the logits of a
 * loss that is differentiated. EXACT: f32, the same bits on every instruction set. FAST: factors rounded to bf16, sums
 * in f32, the same bits for any number of threads. */
typedef enum bn_precision { BN_EXACT, BN_FAST, BN_INT8 } bn_precision; /* INT8: FAST, but dx in integers */
/* Of the nodes this thread records from now on; EXACT at first. */
bn_precision bn_get_precision(void);
void bn_set_precision(bn_precision precision);

#define BN_NODE_INPUTS 7
#define BN_NODE_SAVED 5
#define BN_NODE_PARAMS 64

typedef struct bn_node bn_node;

/* What an op is. Both functions read shapes and parameters from the node, fill argument structs and launch kernels. */
typedef struct bn_op {
    const char *name;
    bn_status (*forward)(bn_node *node);  /* NULL: the output is a window on an input, nothing is written */
    bn_status (*backward)(bn_node *node); /* NULL: no gradient flows through it */
} bn_op;

struct bn_node {
    const bn_op *op; /* NULL once consumed */
    bn_tensor *inputs[BN_NODE_INPUTS];
    bn_tensor *saved[BN_NODE_SAVED]; /* what backward needs beside inputs and output */
    bn_tensor *output;
    bn_precision precision;            /* of its products, as it was set when the node was recorded */
    int64_t segment;                   /* neighbours of the same number are one segment; 0: in none */
    uint64_t versions[BN_NODE_INPUTS]; /* of the inputs' storages when forward read them */
    _Alignas(8) unsigned char params[BN_NODE_PARAMS];
};

/* The op's own parameter struct, kept inside the node. */
#define bn_node_params(node, type)                                                                                     \
    ((type *)(void *)(node)->params + 0 * sizeof(char[sizeof(type) <= BN_NODE_PARAMS ? 1 : -1]))

/* An op's constructor returns through this while it owns a half-made node: releases what the node holds on failure. */
#define BN_NODE_TRY(node, expr)                                                                                        \
    do {                                                                                                               \
        bn_status bn_node_status = (expr);                                                                             \
        if (BN_UNLIKELY(bn_node_status != BN_OK)) {                                                                    \
            bn_node_abandon(node);                                                                                     \
            return bn_node_status;                                                                                     \
        }                                                                                                              \
    } while (0)

/* Whether an op of these inputs has to keep what its backward pass needs. inputs may hold NULLs. */
bool bn_wants_grad(bn_tensor *const *inputs, int count);

/*
 * Runs a node made by an op's constructor and, if recording, keeps it. `node` lies on the caller's stack: inputs are
 * borrowed, saved and output are taken. Returns the output through `out` (returns new). On failure everything is
 * released.
 */
BN_CHECKED bn_status bn_tape_run(bn_node *node, bn_tensor **out);
/* Releases saved and output of a node that was not run. */
void bn_node_abandon(bn_node *node);

/*
 * The nodes that this thread's current tape records from here to bn_tape_close_segment become one segment. Refused
 * inside another one of the same tape. A segment that is still open when its tape is left stays ordinary nodes.
 */
BN_CHECKED bn_status bn_tape_open_segment(void);
BN_CHECKED bn_status bn_tape_close_segment(void);

/* Whether replaying what this thread records now will make `tensor` anew: true without an explicit tape. */
bool bn_tape_makes(const bn_tensor *tensor);

/* Returns new. Outputs recorded on it stay alive until it is freed. */
BN_CHECKED bn_status bn_tape_new(bn_tape **out);
/* Accepts NULL. Tensors recorded on it become leaves without history. Leaves it first if it is still entered. */
void bn_tape_free(bn_tape *tape);
/* Makes an explicit tape this thread's current one; bn_tape_leave restores what was before. Entering twice fails. */
BN_CHECKED bn_status bn_tape_enter(bn_tape *tape);
void bn_tape_leave(bn_tape *tape);
/* No explicit tape on this thread until bn_tape_resume, which is given the result. */
bn_tape *bn_tape_suspend(void);
void bn_tape_resume(bn_tape *tape);
int64_t bn_tape_length(const bn_tape *tape);
const char *bn_tape_op_name(const bn_tape *tape, int64_t node);
/* Borrows: the node that made a tensor, NULL for a leaf. */
const bn_node *bn_tape_maker(const bn_tensor *tensor);

/* Runs every recorded op again, in order, into the same tensors. */
BN_CHECKED bn_status bn_tape_replay(bn_tape *tape);
/* d loss / d everything, times `factor`, added to the gradients of the leaves. loss has one element. On the implicit
 * tape the nodes that took part are consumed; an explicit tape keeps them for the next replay. */
BN_CHECKED bn_status bn_tape_backward(bn_tensor *loss, float factor);

/* no_grad: while the depth of this thread is above zero, results require no gradient. */
void bn_grad_disable(void);
void bn_grad_enable(void);
bool bn_grad_is_enabled(void);

/*
 * For the Python edge, which calls these with the GIL held. An object holds `tensor`, or drops it: when the last object
 * of an implicit tape's tensors is gone, its nodes go too. Around a call that gives the GIL away the tape is pinned:
 * another thread's drop may not clear it meanwhile. A thread's implicit tape outlives the thread while objects hold its
 * tensors.
 */
void bn_tensor_hold(bn_tensor *tensor);
void bn_tensor_drop(bn_tensor *tensor);
bn_tape *bn_tape_pin(void);
void bn_tape_unpin(bn_tape *tape);

#endif
