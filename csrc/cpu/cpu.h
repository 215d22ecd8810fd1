/*
 * cpu.h: what the CPU backend offers beyond backend.h: its instruction sets, its memory, and the tables the isa_*.c
 * export.
 */
#ifndef BN_CPU_CPU_H
#define BN_CPU_CPU_H

#include "base/arena.h"
#include "kernels/backend.h"

extern const bn_kernel_table bn_kernels_scalar;
#if defined(__x86_64__)
extern const bn_kernel_table bn_kernels_avx2, bn_kernels_avx512vnni;
#elif defined(__aarch64__)
extern const bn_kernel_table bn_kernels_neon;
#endif

/* The instruction sets this CPU can run, weakest first; the last is chosen at first use. Names are borrowed. */
int bn_cpu_isa_count(void);
const char *bn_cpu_isa_name(int index);
const char *bn_cpu_current_isa(void);
/* From the next launch on. BN_ERR_VALUE for a set that is unknown or absent here. */
BN_CHECKED bn_status bn_cpu_use_isa(const char *name);

void bn_cpu_memory_stats(bn_arena_stats *out);
void bn_cpu_memory_trim(void);

#endif
