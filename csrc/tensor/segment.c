/* segment.c: which memory of a segment may go, and how its values come back; see segment.h. */
#include "tensor/segment.h"

#include <stdlib.h>

#include "tensor/quantized.h"

static bool is_temporary(const bn_tensor *t) { return t != NULL && t->storage->is_temporary; }

/* ---- giving back and taking again ---------------------------------------------------------------------------- */

/* What goes and comes with t: its own storage, and those of its int8 form, because the node that fills that follows the
 * one that makes t. Returns how many; none if t is not temporary. */
enum { MOST_STORAGES = 4 };

static int storages_of(const bn_tensor *t, bn_storage *out[MOST_STORAGES]) {
    if (!is_temporary(t)) {
        return 0;
    }
    out[0] = t->storage;
    if (t->quantized == NULL) {
        return 1;
    }
    out[1] = t->quantized->q->storage;
    out[2] = t->quantized->act_scale->storage;
    out[3] = t->quantized->row_sum->storage;
    return MOST_STORAGES;
}

static void evict(const bn_tensor *t) {
    bn_storage *storages[MOST_STORAGES];
    for (int i = storages_of(t, storages); i-- > 0;) {
        bn_storage_evict(storages[i]);
    }
}

static bn_status ensure(const bn_tensor *t) {
    bn_storage *storages[MOST_STORAGES];
    for (int i = storages_of(t, storages); i-- > 0;) {
        BN_TRY(bn_storage_ensure(storages[i]));
    }
    return BN_OK;
}

void bn_node_evict(bn_node *node) {
    evict(node->output);
    for (int i = 0; i < BN_NODE_SAVED; i++) {
        evict(node->saved[i]);
    }
}

bn_status bn_node_ensure(bn_node *node) {
    BN_TRY(ensure(node->output));
    for (int i = 0; i < BN_NODE_SAVED; i++) {
        BN_TRY(ensure(node->saved[i]));
    }
    return BN_OK;
}

/* ---- closing: what may go ------------------------------------------------------------------------------------ */

/* One reference that a segment holds on a tensor. */
typedef struct reference {
    bn_storage *storage;
    bn_tensor *tensor;
} reference;

static int by_storage_then_tensor(const void *a, const void *b) {
    const reference *x = a, *y = b;
    if (x->storage != y->storage) {
        return (uintptr_t)x->storage < (uintptr_t)y->storage ? -1 : 1;
    }
    return ((uintptr_t)x->tensor > (uintptr_t)y->tensor) - ((uintptr_t)x->tensor < (uintptr_t)y->tensor);
}

static int64_t collect(const bn_tape *tape, int64_t first, const bn_node *nodes, int64_t count, reference *out) {
    int64_t n = 0;
    for (int64_t i = 0; i < count; i++) {
        out[n++] = (reference){nodes[i].output->storage, nodes[i].output};
        for (int k = 0; k < BN_NODE_SAVED; k++) {
            if (nodes[i].saved[k] != NULL) {
                out[n++] = (reference){nodes[i].saved[k]->storage, nodes[i].saved[k]};
            }
        }
        for (int k = 0; k < BN_NODE_INPUTS; k++) {
            bn_tensor *input = nodes[i].inputs[k];
            if (input != NULL && input->tape == tape && input->node >= first) {
                out[n++] = (reference){input->storage, input};
            }
        }
    }
    return n;
}

/* Marks the storages of which `references`, sorted, are all there are: every window is known, and all that hold it. */
static void mark_own(const reference *references, int64_t n) {
    for (int64_t i = 0, next; i < n; i = next) {
        bn_storage *storage = references[i].storage;
        int windows = 0;
        bool own = true;
        for (next = i; next < n && references[next].storage == storage;) {
            bn_tensor *tensor = references[next].tensor;
            int holders = 0;
            for (; next < n && references[next].tensor == tensor; next++) {
                holders++;
            }
            own = own && atomic_load(&tensor->references) == holders;
            windows++;
        }
        if (own && atomic_load(&storage->references) == windows) {
            storage->is_temporary = true;
        }
    }
}

static void mark_quantized(const bn_node *nodes, int64_t count) {
    for (int64_t i = 0; i < count; i++) {
        bn_storage *storages[MOST_STORAGES];
        for (int k = storages_of(nodes[i].output, storages); k-- > 0;) {
            storages[k]->is_temporary = true;
        }
    }
}

bn_status bn_segment_close(const bn_tape *tape, int64_t first, bn_node *nodes, int64_t count) {
    reference *references = malloc(sizeof *references * (size_t)count * (1 + BN_NODE_SAVED + BN_NODE_INPUTS) + 1);
    if (references == NULL) {
        return bn_fail(BN_ERR_MEMORY, "out of memory for a segment of %lld nodes", (long long)count);
    }
    const int64_t n = collect(tape, first, nodes, count, references);
    qsort(references, (size_t)n, sizeof *references, by_storage_then_tensor);
    mark_own(references, n);
    free(references);
    mark_quantized(nodes, count);
    for (int64_t i = 0; i < count; i++) {
        bn_node_evict(&nodes[i]);
    }
    return BN_OK;
}

/* ---- backward ------------------------------------------------------------------------------------------------ */

static bn_status refuse_changed(const bn_node *node) {
    for (int i = 0; i < BN_NODE_INPUTS; i++) {
        if (node->inputs[i] != NULL && bn_storage_version(node->inputs[i]->storage) != node->versions[i]) {
            return bn_fail(BN_ERR_STATE,
                           "backward: input %d of %s was changed between its forward and its backward pass, and the "
                           "segment it is in needs it to make its results again",
                           i, node->op->name);
        }
    }
    return BN_OK;
}

static bool made_what_is_away(const bn_node *node) {
    bool away = is_temporary(node->output);
    for (int i = 0; i < BN_NODE_SAVED; i++) {
        away = away || is_temporary(node->saved[i]);
    }
    return away;
}

static bn_status run_again(bn_node *node) {
    BN_TRY(refuse_changed(node));
    BN_TRY(bn_node_ensure(node));
    /* Not touched: the bits are those that the version stands for. */
    return node->op->forward == NULL ? BN_OK : node->op->forward(node);
}

bn_status bn_segment_make_again(bn_node *nodes, int64_t count) {
    bn_status status = BN_OK;
    for (int64_t i = 0; status == BN_OK && i < count; i++) {
        status = nodes[i].op != NULL && made_what_is_away(&nodes[i]) ? run_again(&nodes[i]) : BN_OK;
    }
    for (int64_t i = 0; status != BN_OK && i < count; i++) {
        bn_node_evict(&nodes[i]);
    }
    return status;
}
