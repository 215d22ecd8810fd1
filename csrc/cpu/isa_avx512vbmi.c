/*
 * isa_avx512vbmi.c: integer products on 512-bit registers whose five codes a byte are looked up in a table of 128 bytes
 * in one instruction (Intel SDM, VPERMI2B: Ice Lake, Zen 4 and later).
 */
#include "cpu/target.h"

#include <stdint.h>

#if defined(__x86_64__)
#include <immintrin.h>

BN_TARGET_BEGIN("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi")

#define BN_WORDS_VBMI
#include "cpu/words_avx512.h"

#include "cpu/lanes.inc"
#include "cpu/micro.h"

#include "cpu/dot.inc"
#define BITLINEAR_MICRO(a) (&micro_i8)
#include "cpu/bitlinear.inc"

extern const bn_kernel_table bn_kernels_avx512vbmi;
const bn_kernel_table bn_kernels_avx512vbmi = {.isa = "avx512vbmi", .bitlinear_forward = bitlinear_forward};

BN_TARGET_END
#else
typedef int bn_no_avx512vbmi;
#endif
