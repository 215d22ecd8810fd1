/*
 * isa_avx512bf16.c: bf16 dot products on 512-bit registers (Zen 4, Cooper Lake, Sapphire Rapids and later): two
 * multiply-adds a lane in one instruction, subnormals taken as zero (Intel SDM, VDPBF16PS).
 */
#include "cpu/target.h"

#include <stdint.h>

#if defined(__x86_64__)
#include <immintrin.h>

BN_TARGET_BEGIN("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16")

#include "cpu/words_avx512.h"

#include "cpu/lanes.inc"
#include "cpu/math.inc"
#include "cpu/micro.h"

#include "cpu/pack_avx512bf16.inc"

static inline vf dot_bf16(vf sum, const char *right, const char *left) {
    int32_t pair;
    memcpy(&pair, left, sizeof pair);
    return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_loadu_si512(right), (__m512bh)_mm512_set1_epi32(pair));
}
#define MICRO_MULTIPLY multiply_bf16
#define MICRO_SUM vf
#define MICRO_RIGHT const char *
#define MICRO_READ(p) (p)
#define MICRO_DOT(sum, right, left) sum = dot_bf16(sum, right, left)
#define MICRO_ROWS F32_ROWS
#define MICRO_VECTORS F32_VECTORS
#define MICRO_GET v_get
#define MICRO_PUT v_put
#include "cpu/micro.inc"

static const bn_micro micro_bf16 = {.per_word = 2,
                                    .rows = F32_ROWS,
                                    .cols = 16 * F32_VECTORS,
                                    .multiply = multiply_bf16,
                                    .pack = pack_bf16,
                                    .move = v_move_rows};

#define BF16_MULTIPLY multiply_bf16
#include "cpu/bf16.inc"

extern const bn_kernel_table bn_kernels_avx512bf16;
const bn_kernel_table bn_kernels_avx512bf16 = {
    .isa = "avx512bf16",
#define KERNEL(name)
#define FAST_KERNEL(name) .name = name,
#include "kernels/kernels.def"
#undef KERNEL
};

BN_TARGET_END
#else
typedef int bn_no_avx512bf16;
#endif
