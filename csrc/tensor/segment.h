/*
 * segment.h: activation checkpointing (Chen et al. 2016, arXiv 1604.06174). A segment is a run of neighbouring nodes of
 * a tape whose intermediate results give their memory back after the forward pass and are made again, from what the
 * segment reads of the outside, when the backward pass arrives at it. Forward passes are deterministic, so the bits are
 * those that were given back, and their storages keep their version.
 *
 * Given back is a storage to which every reference is the segment's own: outputs, saved values and inputs of its nodes.
 * Whatever anybody else can reach when the segment is closed stays for good: results that Python holds, or of which it
 * holds a view; memory that other nodes read; all that was made outside. So nobody ever meets memory that is away. The
 * int8 form of an activation goes where the activation goes, and comes back with it. A node whose results all stay, as
 * the last one of a block, is not run again.
 */
#ifndef BN_TENSOR_SEGMENT_H
#define BN_TENSOR_SEGMENT_H

#include "tensor/tape.h"

/* Nodes first .. first + count - 1 of `tape`, which lie at `nodes`, become a segment: decides what is given back, and
 * gives it back. */
BN_CHECKED bn_status bn_segment_close(const bn_tape *tape, int64_t first, bn_node *nodes, int64_t count);
/* Gives back what a node made. Does nothing for what is away already, for nodes outside of segments and for consumed
 * ones. */
void bn_node_evict(bn_node *node);
/* Memory, contents undefined, for what was given back of a node. */
BN_CHECKED bn_status bn_node_ensure(bn_node *node);
/* Makes again what was given back of the first `count` nodes of a segment. Refuses, with a sentence, if an input was
 * written to since the forward pass. On failure all is given back. */
BN_CHECKED bn_status bn_segment_make_again(bn_node *nodes, int64_t count);

#endif
