/* tape.c: recording, replaying and walking back over ops. */
#include "tensor/tape.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "tensor/segment.h"

struct bn_tape {
    bn_node *nodes;
    int64_t length, capacity;
    bool is_explicit;
    atomic_int held;  /* tensors recorded here that Python holds */
    atomic_int lives; /* those, and the thread or object whose tape it is: the last to go frees an implicit tape */
    int64_t segments; /* opened so far: their numbers */
    int64_t open;     /* the one that is open now, or 0 */
    int pins;         /* calls running on it: it may not be cleared under them */
    bn_tape *outer;   /* what was current before this explicit tape was entered */
    bool entered;
};

static _Thread_local bn_tape *implicit_tape; /* made on first use */
static _Thread_local bn_tape *entered_tape;  /* NULL: the implicit one */
static pthread_key_t implicit_key;           /* for its destructor: tells when a thread ends */
static pthread_once_t once = PTHREAD_ONCE_INIT;
static _Thread_local int grad_disabled;

void bn_grad_disable(void) { grad_disabled++; }
void bn_grad_enable(void) { grad_disabled--; }
bool bn_grad_is_enabled(void) { return grad_disabled == 0; }

static _Thread_local bn_precision precision = BN_EXACT;

bn_precision bn_get_precision(void) { return precision; }
void bn_set_precision(bn_precision wanted) { precision = wanted; }

bool bn_tape_makes(const bn_tensor *tensor) { return entered_tape == NULL || tensor->tape == entered_tape; }

bool bn_wants_grad(bn_tensor *const *inputs, int count) {
    bool any = false;
    for (int i = 0; i < count; i++) {
        any = any || (inputs[i] != NULL && inputs[i]->requires_grad);
    }
    return any && bn_grad_is_enabled();
}

void bn_node_abandon(bn_node *node) {
    for (int i = 0; i < BN_NODE_SAVED; i++) {
        bn_tensor_release(node->saved[i]);
        node->saved[i] = NULL;
    }
    bn_tensor_release(node->output);
    node->output = NULL;
}

/* Lets go of a recorded node; its output, if somebody else still has it, becomes a leaf. */
static void consume(bn_tape *tape, bn_node *node) {
    if (node->op == NULL) {
        return;
    }
    node->op = NULL;
    bn_tensor *output = node->output;
    if (atomic_load(&output->handles) > 0) {
        atomic_fetch_sub(&tape->held, 1);
        atomic_fetch_sub(&tape->lives, 1); /* not the last: whoever consumes nodes has one */
    }
    output->tape = NULL;
    output->node = -1;
    output->is_consumed = true;
    for (int i = 0; i < BN_NODE_INPUTS; i++) {
        bn_tensor_release(node->inputs[i]);
        node->inputs[i] = NULL;
    }
    bn_node_abandon(node);
}

static void clear(bn_tape *tape) {
    while (tape->length > 0) {
        consume(tape, &tape->nodes[--tape->length]);
    }
}

static void free_tape(bn_tape *tape) {
    clear(tape);
    free(tape->nodes);
    free(tape);
}

static void let_go(void *tape) {
    if (atomic_fetch_sub(&((bn_tape *)tape)->lives, 1) == 1) {
        free_tape(tape);
    }
}

static void make_key(void) { (void)pthread_key_create(&implicit_key, let_go); }

static bn_status current_tape(bn_tape **out) {
    *out = entered_tape != NULL ? entered_tape : implicit_tape;
    if (*out != NULL) {
        return BN_OK;
    }
    pthread_once(&once, make_key);
    bn_tape *tape = calloc(1, sizeof *tape);
    if (tape == NULL || pthread_setspecific(implicit_key, tape) != 0) {
        free(tape);
        return bn_fail(BN_ERR_MEMORY, "out of memory for this thread's tape");
    }
    atomic_init(&tape->lives, 1);
    *out = implicit_tape = tape;
    return BN_OK;
}

/* The implicit tape of nobody's tensors is empty. */
static void clear_if_unheld(bn_tape *tape) {
    if (!tape->is_explicit && atomic_load(&tape->held) == 0 && tape->pins == 0) {
        clear(tape);
    }
}

void bn_tensor_hold(bn_tensor *tensor) {
    if (atomic_fetch_add(&tensor->handles, 1) == 0 && tensor->tape != NULL) {
        atomic_fetch_add(&tensor->tape->held, 1);
        atomic_fetch_add(&tensor->tape->lives, 1);
    }
}

void bn_tensor_drop(bn_tensor *tensor) {
    if (atomic_fetch_sub(&tensor->handles, 1) == 1 && tensor->tape != NULL) {
        bn_tape *tape = tensor->tape;
        atomic_fetch_sub(&tape->held, 1);
        clear_if_unheld(tape);
        let_go(tape);
    }
}

bn_tape *bn_tape_pin(void) {
    bn_tape *tape;
    if (current_tape(&tape) != BN_OK) {
        return NULL; /* the op that is pinned for will fail in the same way, and say so */
    }
    tape->pins++;
    return tape;
}

void bn_tape_unpin(bn_tape *tape) {
    if (tape == NULL) {
        return;
    }
    tape->pins--;
    clear_if_unheld(tape);
}

bn_status bn_tape_new(bn_tape **out) {
    *out = calloc(1, sizeof **out);
    if (*out == NULL) {
        return bn_fail(BN_ERR_MEMORY, "out of memory for a tape");
    }
    (*out)->is_explicit = true;
    atomic_init(&(*out)->lives, 1);
    return BN_OK;
}

void bn_tape_free(bn_tape *tape) {
    if (tape == NULL) {
        return;
    }
    if (tape->entered) {
        bn_tape_leave(tape);
    }
    free_tape(tape);
}

bn_status bn_tape_enter(bn_tape *tape) {
    if (tape->entered) {
        return bn_fail(BN_ERR_STATE, "this tape is already recording");
    }
    tape->entered = true;
    tape->outer = entered_tape;
    entered_tape = tape;
    return BN_OK;
}

void bn_tape_leave(bn_tape *tape) {
    if (tape->entered) {
        tape->entered = false;
        tape->open = 0;
        entered_tape = tape->outer;
    }
}

bn_tape *bn_tape_suspend(void) {
    bn_tape *tape = entered_tape;
    entered_tape = NULL;
    return tape;
}

void bn_tape_resume(bn_tape *tape) { entered_tape = tape; }

int64_t bn_tape_length(const bn_tape *tape) { return tape->length; }

const char *bn_tape_op_name(const bn_tape *tape, int64_t node) {
    return tape->nodes[node].op == NULL ? "consumed" : tape->nodes[node].op->name;
}

const bn_node *bn_tape_maker(const bn_tensor *tensor) {
    return tensor->tape == NULL ? NULL : &tensor->tape->nodes[tensor->node];
}

static bn_status append(bn_tape *tape, const bn_node *node) {
    if (tape->length == tape->capacity) {
        int64_t capacity = bn_max_i64(64, 2 * tape->capacity);
        bn_node *nodes = realloc(tape->nodes, (size_t)capacity * sizeof *nodes);
        if (nodes == NULL) {
            return bn_fail(BN_ERR_MEMORY, "out of memory for a tape of %lld nodes", (long long)capacity);
        }
        tape->nodes = nodes;
        tape->capacity = capacity;
    }
    tape->nodes[tape->length] = *node;
    return BN_OK;
}

/* Every op that reads a tensor comes by here: no launch meets memory of two devices. */
static bn_status refuse_other_devices(const bn_node *node) {
    const bn_backend *home = bn_backend_of(node->output);
    for (int i = 0; i < BN_NODE_INPUTS; i++) {
        if (node->inputs[i] != NULL && bn_backend_of(node->inputs[i]) != home) {
            return bn_fail(BN_ERR_VALUE, "%s: one tensor is on %s, another on %s", node->op->name, home->name,
                           bn_backend_of(node->inputs[i])->name);
        }
    }
    return BN_OK;
}

static bn_status refuse_other_tapes(const bn_tape *tape, const bn_node *node) {
    for (int i = 0; i < BN_NODE_INPUTS; i++) {
        if (node->inputs[i] != NULL && node->inputs[i]->tape != NULL && node->inputs[i]->tape != tape) {
            return bn_fail(BN_ERR_STATE,
                           "%s: input %d was recorded on another tape or thread; detach() it, or record both there",
                           node->op->name, i);
        }
    }
    return BN_OK;
}

static bn_status run_forward(bn_node *node) {
    if (node->op->forward != NULL) {
        bn_storage_touch(node->output->storage);
        BN_TRY(node->op->forward(node));
    }
    for (int i = 0; i < BN_NODE_INPUTS; i++) {
        node->versions[i] = node->inputs[i] == NULL ? 0 : bn_storage_version(node->inputs[i]->storage);
    }
    return BN_OK;
}

/* What is made from an open segment's own is recorded even where no gradient flows, so that it can be made again. */
static bool is_of_open_segment(const bn_tape *tape, const bn_node *node) {
    for (int i = 0; tape->open != 0 && i < BN_NODE_INPUTS; i++) {
        const bn_tensor *input = node->inputs[i];
        if (input != NULL && input->tape == tape && tape->nodes[input->node].segment == tape->open) {
            return true;
        }
    }
    return false;
}

bn_status bn_tape_run(bn_node *node, bn_tensor **out) {
    bn_tape *tape;
    node->precision = precision;
    BN_NODE_TRY(node, refuse_other_devices(node));
    BN_NODE_TRY(node, current_tape(&tape));
    const bool grad = node->op->backward != NULL && bn_wants_grad(node->inputs, BN_NODE_INPUTS);
    const bool record = grad || tape->is_explicit || is_of_open_segment(tape, node);
    node->segment = tape->open;
    bn_status status = record ? refuse_other_tapes(tape, node) : BN_OK;
    if (status == BN_OK) {
        status = run_forward(node);
    }
    if (status == BN_OK && record) {
        status = append(tape, node);
    }
    if (status != BN_OK) {
        bn_node_abandon(node);
        return status;
    }
    *out = bn_tensor_retain(node->output);
    if (!record) {
        bn_node_abandon(node);
        return BN_OK;
    }
    node->output->requires_grad = grad;
    node->output->tape = tape;
    node->output->node = tape->length++;
    for (int i = 0; i < BN_NODE_INPUTS; i++) {
        if (node->inputs[i] != NULL) {
            bn_tensor_retain(node->inputs[i]);
        }
    }
    return BN_OK;
}

/* ---- segments ------------------------------------------------------------------------------------------------ */

static bn_status refuse_open_segment(const bn_tape *tape, const char *what) {
    return tape->open == 0 ? BN_OK
                           : bn_fail(BN_ERR_STATE, "%s: a segment is still being recorded; leave it first", what);
}

bn_status bn_tape_open_segment(void) {
    bn_tape *tape;
    BN_TRY(current_tape(&tape));
    if (tape->open != 0) {
        return bn_fail(BN_ERR_STATE, "segment: this tape is already recording one, and segments do not nest");
    }
    tape->open = ++tape->segments;
    return BN_OK;
}

/* The neighbours of node i that are in its segment: [*first, *end). */
static void segment_of(const bn_tape *tape, int64_t i, int64_t *first, int64_t *end) {
    const int64_t segment = tape->nodes[i].segment;
    for (*first = i; *first > 0 && tape->nodes[*first - 1].segment == segment;) {
        --*first;
    }
    for (*end = i + 1; *end < tape->length && tape->nodes[*end].segment == segment;) {
        ++*end;
    }
}

bn_status bn_tape_close_segment(void) {
    bn_tape *tape;
    BN_TRY(current_tape(&tape));
    const int64_t segment = tape->open;
    if (segment == 0) {
        return bn_fail(BN_ERR_STATE, "segment: none is being recorded on this tape");
    }
    tape->open = 0;
    if (tape->length == 0 || tape->nodes[tape->length - 1].segment != segment) {
        return BN_OK; /* nothing was recorded in it */
    }
    int64_t first, end;
    segment_of(tape, tape->length - 1, &first, &end);
    return bn_segment_close(tape, first, &tape->nodes[first], end - first);
}

static bn_status replay_segment(bn_node *nodes, int64_t count) {
    bn_status status = BN_OK;
    for (int64_t i = 0; status == BN_OK && i < count; i++) {
        status = bn_node_ensure(&nodes[i]);
        status = status == BN_OK ? run_forward(&nodes[i]) : status;
    }
    for (int64_t i = 0; i < count; i++) {
        bn_node_evict(&nodes[i]);
    }
    return status;
}

bn_status bn_tape_replay(bn_tape *tape) {
    BN_TRY(refuse_open_segment(tape, "replay"));
    for (int64_t i = 0, first, end; i < tape->length; i = end) {
        if (tape->nodes[i].segment == 0) {
            BN_TRY(run_forward(&tape->nodes[i]));
            end = i + 1;
        } else {
            segment_of(tape, i, &first, &end);
            BN_TRY(replay_segment(&tape->nodes[first], end - first));
        }
    }
    return BN_OK;
}

/* ---- backward ------------------------------------------------------------------------------------------------ */

static void drop_gradient(bn_tensor *tensor) {
    bn_tensor_release(tensor->grad);
    tensor->grad = NULL;
}

/* Nodes at the end that are gone need not be walked again. */
static void trim(bn_tape *tape) {
    while (tape->length > 0 && tape->nodes[tape->length - 1].op == NULL) {
        tape->length--;
    }
}

static bn_status refuse_consumed(const bn_node *node) {
    for (int i = 0; i < BN_NODE_INPUTS; i++) {
        if (node->inputs[i] != NULL && node->inputs[i]->is_consumed && node->inputs[i]->requires_grad) {
            return bn_fail(BN_ERR_STATE,
                           "backward: input %d of %s belongs to a graph that an earlier backward() consumed; call "
                           "backward() once on the sum of the losses, or detach() the input",
                           i, node->op->name);
        }
    }
    return BN_OK;
}

static bool has_gradient(const bn_node *node) { return node->op != NULL && node->output->grad != NULL; }

static bn_status step_back(bn_tape *tape, bn_node *node) {
    if (!has_gradient(node)) {
        return BN_OK;
    }
    if (node->op->backward != NULL) {
        BN_TRY(refuse_consumed(node));
        BN_TRY(node->op->backward(node));
    }
    drop_gradient(node->output);
    if (!tape->is_explicit) {
        consume(tape, node);
    }
    return BN_OK;
}

/* Nodes first .. from of a segment that ends before `end`. */
static bn_status segment_back(bn_tape *tape, int64_t first, int64_t from, int64_t end) {
    bn_node *nodes = tape->nodes;
    bool reached = false;
    for (int64_t i = first; i <= from; i++) {
        reached = reached || has_gradient(&nodes[i]);
    }
    if (!reached) {
        return BN_OK;
    }
    bn_status status = bn_segment_make_again(&nodes[first], from + 1 - first);
    for (int64_t i = from; status == BN_OK && i >= first; i--) {
        status = step_back(tape, &nodes[i]);
    }
    for (int64_t i = end - 1; i >= first; i--) {
        if (nodes[i].op == NULL) {
            continue;
        }
        if (status == BN_OK && !tape->is_explicit) {
            consume(tape, &nodes[i]);
        } else {
            bn_node_evict(&nodes[i]);
        }
    }
    return status;
}

static bn_status walk_back(bn_tape *tape, int64_t from) {
    for (int64_t i = from, first = from, end; i >= 0; i = first - 1) {
        if (tape->nodes[i].segment == 0) {
            first = i;
            BN_TRY(step_back(tape, &tape->nodes[i]));
        } else {
            segment_of(tape, i, &first, &end);
            BN_TRY(segment_back(tape, first, i, end));
        }
    }
    return BN_OK;
}

bn_status bn_tape_backward(bn_tensor *loss, float factor) {
    bn_tape *tape = loss->tape;
    if (tape == NULL) {
        return bn_fail(BN_ERR_STATE, loss->requires_grad
                                         ? "backward: this tensor is a leaf, or its graph was already consumed"
                                         : "backward: this tensor requires no gradient; it was made under no_grad() or "
                                           "from tensors that require none");
    }
    if (!loss->requires_grad) {
        return bn_fail(BN_ERR_STATE, "backward: this tensor requires no gradient");
    }
    if (loss->count != 1) {
        bn_shape_text text;
        return bn_fail(BN_ERR_SHAPE, "backward: needs a scalar, not a tensor of shape %s; take its sum() or mean()",
                       bn_shape_print(loss, &text));
    }
    BN_TRY(refuse_open_segment(tape, "backward"));
    const int64_t from = loss->node;
    drop_gradient(loss);
    BN_TRY(bn_tensor_new(bn_backend_of(loss), BN_F32, loss->ndim, loss->shape, &loss->grad));
    BN_TRY(bn_backend_of(loss)->upload(bn_data(loss->grad), &factor, sizeof factor));
    bn_status status = walk_back(tape, from);
    if (status != BN_OK) {
        /* A half-walked tape has half-made gradients: forget those of its own tensors. */
        for (int64_t i = 0; i <= from && i < tape->length; i++) {
            if (tape->nodes[i].op != NULL) {
                drop_gradient(tape->nodes[i].output);
            }
        }
    }
    trim(tape);
    clear_if_unheld(tape);
    return status;
}
