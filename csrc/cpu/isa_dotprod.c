/*
 * isa_dotprod.c: integer dot products on 128-bit registers (FEAT_DotProd: Cortex-A75, Neoverse N1, Apple A11 and
 * later): four bytes by four a lane in one instruction (Arm ARM, SDOT). Bytes 0..127 are the same signed or unsigned.
 */
#include "cpu/target.h"

#include <stdint.h>
#include <string.h>

#if defined(__aarch64__)
#include <arm_neon.h>

BN_TARGET_BEGIN_ARM("dotprod", "+dotprod")

#include "cpu/words_neon.h"

#include "cpu/dot_sdot.inc"

#include "cpu/lanes.inc"
#include "cpu/micro.h"

#include "cpu/dot.inc"
#define BITLINEAR_MICRO(a) (&micro_i8)
#include "cpu/bitlinear.inc"

extern const bn_kernel_table bn_kernels_dotprod;
const bn_kernel_table bn_kernels_dotprod = {.isa = "dotprod", .bitlinear_forward = bitlinear_forward};

BN_TARGET_END
#else
typedef int bn_no_dotprod;
#endif
