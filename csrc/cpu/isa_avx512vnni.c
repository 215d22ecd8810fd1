/*
 * isa_avx512vnni.c: every kernel on 512-bit registers, for CPUs with AVX-512 F, BW, DQ, VL and VNNI (Ice Lake, Sapphire
 * Rapids, Zen 4 and later).
 */
#include "cpu/target.h"

#include <stdint.h>

#if defined(__x86_64__)
#include <immintrin.h>

BN_TARGET_BEGIN("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")

#include "cpu/words_avx512.h"

#define BN_ISA avx512vnni
#define BN_ISA_NAME "avx512vnni"
#include "cpu/kernels.inc"

BN_TARGET_END
#else
typedef int bn_no_avx512vnni;
#endif
