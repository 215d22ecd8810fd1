/*
 * isa_i8mm.c: integer products by 2 x 8 by 8 x 2 bytes (FEAT_I8MM: Neoverse V1 and N2, Apple M2 and later), 32
 * multiply-adds in one instruction (Arm ARM, SMMLA). Over the whole inner loop of gcc 12 that makes 17 an
 * instruction, against 9 by SDOT. Few rows (decoding) leave half of each square empty and go to SDOT, with the same
 * integers.
 */
#include "cpu/target.h"

#include <stdint.h>
#include <string.h>

#if defined(__aarch64__)
#include <arm_neon.h>

BN_TARGET_BEGIN_ARM("dotprod,i8mm", "+dotprod+i8mm")

#include "cpu/words_neon.h"

#include "cpu/dot_sdot.inc"

#include "cpu/lanes.inc"
#include "cpu/micro.h"

#include "cpu/dot.inc"

/* Sums are integers; their bits pass through float registers and memory unread. */
#define MMLA_MULTIPLY multiply_i8_squares
#define MMLA(sum, left, right) __asm__("smmla %0.4s, %1.16b, %2.16b" : "+w"(sum) : "w"(left), "w"(right))
#include "cpu/mmla.inc"

static const bn_micro micro_i8_squares = {.per_word = 4,
                                          .rows = MMLA_ROWS,
                                          .cols = 16 * MMLA_VECTORS,
                                          .multiply = multiply_i8_squares,
                                          .unpack = unpack_codes};

#define BITLINEAR_MICRO(a) ((a)->m < MMLA_ROWS ? &micro_i8 : &micro_i8_squares)
#include "cpu/bitlinear.inc"

extern const bn_kernel_table bn_kernels_i8mm;
const bn_kernel_table bn_kernels_i8mm = {.isa = "i8mm", .bitlinear_forward = bitlinear_forward};

BN_TARGET_END
#else
typedef int bn_no_i8mm;
#endif
