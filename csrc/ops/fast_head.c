/*
 * fast_head.c: loss = -log softmax(x W^T)[target] of each row, and dx = d W, dW = d^T x with d the derivative of the
 * logits, all factors rounded to bf16. Rows and vocabulary are cut into cells. The forward pass keeps a maximum and a
 * sum of every block of logits (cpu/head.inc); the backward pass makes a cell's logits again, turns them into d and
 * multiplies that twice. Nothing of rows x V elements is ever stored (cf. Wijmans et al. 2024, arXiv 2411.09009).
 *
 * x and W are brought into panels once per cell for all that read them. dx sums over the vocabulary in order and dW
 * over the rows, cell after cell in the gradients' own memory, so neither cells nor threads can change a bit.
 *
 * Against logits in chunks of 32 MiB (CPU time, forward and backward, AMX, two Sapphire Rapids cores shared with other
 * programs, least of ten), with 1 and 2 threads: 2048 x 768 x 32000 is 1.75 and 2.2 times as fast (438 ms), 2048 x 256
 * x 32000 1.65 and 2.1 times (165 ms), 4096 x 384 x 65 1.0 and 1.15 times (3 ms); 59 MB are taken beside the gradients
 * instead of 109. The products run at 0.55 to 0.75 T multiply-adds a second, 1.13 where all of them is in L2.
 */
#include "ops/fast_head.h"

#include "kernels/tiles.h"

/* Elements of a cell's d, and of its part of x and of W, at most: 8 MiB of bf16 each, all of them in L3. */
#define CELL_ELEMENTS ((int64_t)4 << 20)
#define CELL_LANES 2048

typedef struct head_cells {
    int64_t rows, lanes; /* of a cell; multiples of BN_HEAD_ROWS and BN_HEAD_LANES unless they are all there is */
} head_cells;

static int64_t part_of(int64_t all, int64_t most, int64_t multiple) {
    return bn_min_i64(all, bn_max_i64(most / multiple * multiple, multiple));
}

static head_cells cells_of(const bn_projection *p) {
    const int64_t rows = bn_projection_rows(p), V = bn_projection_out(p), C = bn_projection_in(p);
    head_cells cells = {.lanes = bn_min_i64(V, CELL_LANES)};
    cells.rows = part_of(rows, CELL_ELEMENTS / bn_max_i64(cells.lanes, C), BN_HEAD_ROWS);
    cells.lanes = part_of(V, CELL_ELEMENTS / bn_max_i64(cells.rows, C), BN_HEAD_LANES);
    return cells;
}

bool bn_fast_head_serves(const bn_projection *p) {
    return !p->ternary && bn_projection_rows(p) > 0 && bn_projection_in(p) > 0 && bn_projection_out(p) > 0;
}

/* ---- memory for one call ---- */

enum { X_BY_ROWS, X_BY_CHANNELS, W_BY_LANES, W_BY_CHANNELS, D_BY_ROWS, D_BY_LANES, MAXIMA, SUMS, AT_TARGET, PIECES };

typedef struct head_room {
    bn_storage *storage;
    void *piece[PIECES]; /* NULL where its size is 0 */
} head_room;

static bn_status take_room(const bn_backend *backend, const int64_t bytes[PIECES], head_room *room) {
    int64_t total = 0;
    for (int i = 0; i < PIECES; i++) {
        total += bn_round_up(bytes[i], BN_ALIGN);
    }
    BN_TRY(bn_storage_new(backend, (size_t)total, &room->storage));
    char *next = room->storage->data;
    for (int i = 0; i < PIECES; i++) {
        room->piece[i] = bytes[i] > 0 ? next : NULL;
        next += bn_round_up(bytes[i], BN_ALIGN);
    }
    return BN_OK;
}

/* ---- launches ---- */

/* Lines [first, first + count) of a matrix (..., C) as lanes with their channels as p, and the other way round. */
static bn_status pack_lines(const bn_backend *backend, const bn_tensor *matrix, int64_t first, int64_t count, int64_t C,
                            bool left, void *by_lines, void *by_channels) {
    const pack_panels_args args = {.data = bn_f32(matrix) + first * C,
                                   .rows = count,
                                   .cols = C,
                                   .by_rows = {by_lines, left},
                                   .by_cols = {by_channels, false}};
    return bn_run_pack_panels(backend, &args, bn_ceil_div(count, BN_PACK_ROWS), 1);
}

static bn_status multiply(const bn_backend *backend, gemm_panels_args args) {
    const bn_tiles tiles = bn_product_tiles(args.m, args.n, args.k, backend->parallelism());
    args.tile_m = tiles.tile_m;
    args.tile_n = tiles.tile_n;
    return bn_run_gemm_panels(backend, &args, tiles.units, tiles.grain);
}

static int64_t blocks_of(const head_part *part) {
    return bn_ceil_div(part->rows, BN_HEAD_ROWS) * bn_ceil_div(part->V, BN_HEAD_LANES);
}

/* ---- walks over the cells, vocabulary inside rows ---- */

typedef struct head_walk {
    const bn_projection *p;
    const bn_backend *backend;
    const bn_tensor *targets;
    head_cells cells;
    head_room room;
    int64_t row; /* first of the cells walked */
    const float *lse, *weight, *dloss;
    bn_grad_memory dx, dw;
} head_walk;

typedef bn_status head_visit(const head_walk *w, const head_part *part);

static bn_status walk(head_walk *w, head_visit *visit) {
    const int64_t rows = bn_projection_rows(w->p), V = bn_projection_out(w->p), C = bn_projection_in(w->p);
    void *const *piece = w->room.piece;
    head_part part = {.x = piece[X_BY_ROWS], .w = piece[W_BY_LANES], .C = C};
    for (w->row = 0; w->row < rows; w->row += w->cells.rows) {
        part.rows = bn_min_i64(rows - w->row, w->cells.rows);
        part.targets = bn_i32(w->targets) + w->row;
        BN_TRY(pack_lines(w->backend, w->p->x, w->row, part.rows, C, true, piece[X_BY_ROWS], piece[X_BY_CHANNELS]));
        for (part.first = 0; part.first < V; part.first += w->cells.lanes) {
            part.V = bn_min_i64(V - part.first, w->cells.lanes);
            BN_TRY(pack_lines(w->backend, w->p->weight, part.first, part.V, C, false, piece[W_BY_LANES],
                              piece[W_BY_CHANNELS]));
            BN_TRY(visit(w, &part));
        }
    }
    return BN_OK;
}

static bn_status statistics(const head_walk *w, const head_part *part) {
    const int64_t rows = bn_projection_rows(w->p), at = part->first / BN_HEAD_LANES * rows + w->row;
    const head_statistics_args args = {.part = *part,
                                       .max = (float *)w->room.piece[MAXIMA] + at,
                                       .sum = (float *)w->room.piece[SUMS] + at,
                                       .at_target = (float *)w->room.piece[AT_TARGET] + w->row,
                                       .stride = rows};
    return bn_run_head_statistics(w->backend, &args, blocks_of(part), 1);
}

bn_status bn_fast_head_forward(const bn_projection *p, const bn_tensor *targets, float *loss, float *lse) {
    const int64_t rows = bn_projection_rows(p), C = bn_projection_in(p);
    const int64_t blocks = bn_ceil_div(bn_projection_out(p), BN_HEAD_LANES);
    head_walk w = {.p = p, .backend = bn_backend_of(p->x), .targets = targets, .cells = cells_of(p)};
    const int64_t bytes[PIECES] = {[X_BY_ROWS] = bn_panels_bytes(w.cells.rows, C),
                                   [W_BY_LANES] = bn_panels_bytes(w.cells.lanes, C),
                                   [MAXIMA] = 4 * blocks * rows,
                                   [SUMS] = 4 * blocks * rows,
                                   [AT_TARGET] = 4 * rows};
    BN_TRY(take_room(w.backend, bytes, &w.room));
    bn_status status = walk(&w, statistics);
    if (status == BN_OK) {
        const head_loss_args args = {.max = w.room.piece[MAXIMA],
                                     .sum = w.room.piece[SUMS],
                                     .at_target = w.room.piece[AT_TARGET],
                                     .targets = bn_i32(targets),
                                     .lse = lse,
                                     .loss = loss,
                                     .rows = rows,
                                     .blocks = blocks};
        status = bn_run_head_loss(w.backend, &args, bn_ceil_div(rows, BN_HEAD_BAND), 8);
    }
    bn_storage_release(w.room.storage);
    return status;
}

static bn_status gradients(const head_walk *w, const head_part *part) {
    void *const *piece = w->room.piece;
    const head_gradient_args d = {.part = *part,
                                  .lse = w->lse + w->row,
                                  .weight = w->weight,
                                  .dloss = w->dloss,
                                  .by_rows = piece[D_BY_ROWS],
                                  .by_lanes = piece[D_BY_LANES]};
    BN_TRY(bn_run_head_gradient(w->backend, &d, blocks_of(part), 1));
    gemm_panels_args product = {.n = part->C, .ldc = part->C};
    if (w->dx.memory != NULL) {
        product.left = piece[D_BY_ROWS];
        product.right = piece[W_BY_CHANNELS];
        product.c = w->dx.memory + w->row * part->C;
        product.m = part->rows;
        product.k = part->V;
        product.accumulate = w->dx.accumulate || part->first > 0;
        BN_TRY(multiply(w->backend, product));
    }
    if (w->dw.memory != NULL) {
        product.left = piece[D_BY_LANES];
        product.right = piece[X_BY_CHANNELS];
        product.c = w->dw.memory + part->first * part->C;
        product.m = part->V;
        product.k = part->rows;
        product.accumulate = w->dw.accumulate || w->row > 0;
        BN_TRY(multiply(w->backend, product));
    }
    return BN_OK;
}

bn_status bn_fast_head_backward(const bn_projection *p, const bn_tensor *targets, const float *lse, const float *weight,
                                const float *dloss, bn_grad_memory dx, bn_grad_memory dw) {
    const int64_t C = bn_projection_in(p);
    head_walk w = {.p = p,
                   .backend = bn_backend_of(p->x),
                   .targets = targets,
                   .cells = cells_of(p),
                   .lse = lse,
                   .weight = weight,
                   .dloss = dloss,
                   .dx = dx,
                   .dw = dw};
    const int64_t rows = w.cells.rows, lanes = w.cells.lanes;
    const bool has_x = dx.memory != NULL, has_w = dw.memory != NULL;
    const int64_t bytes[PIECES] = {[X_BY_ROWS] = bn_panels_bytes(rows, C),
                                   [W_BY_LANES] = bn_panels_bytes(lanes, C),
                                   [W_BY_CHANNELS] = has_x ? bn_panels_bytes(C, lanes) : 0,
                                   [D_BY_ROWS] = has_x ? bn_panels_bytes(rows, lanes) : 0,
                                   [X_BY_CHANNELS] = has_w ? bn_panels_bytes(C, rows) : 0,
                                   [D_BY_LANES] = has_w ? bn_panels_bytes(lanes, rows) : 0};
    BN_TRY(take_room(w.backend, bytes, &w.room));
    const bn_status status = walk(&w, gradients);
    bn_storage_release(w.room.storage);
    return status;
}
