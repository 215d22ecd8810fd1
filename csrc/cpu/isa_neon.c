/*
 * isa_neon.c: every kernel on baseline Advanced SIMD, for every 64-bit ARM CPU.
 */
#include "cpu/target.h"

#include <stdint.h>
#include <string.h>

#if defined(__aarch64__)
#include "cpu/words_neon.h"

#include "cpu/dot_neon.inc"

#define DOT_ROWS 4
#define DOT_VECTORS 1
#define FEW_ROWS_STREAMS 1

#define BN_ISA neon
#define BN_ISA_NAME "neon"
#include "cpu/kernels.inc"
#else
typedef int bn_no_neon;
#endif
