/*
 * cpu.h: what the CPU backend offers beyond backend.h: its instruction sets.
 */
#ifndef BN_CPU_CPU_H
#define BN_CPU_CPU_H

#include "kernels/backend.h"

/* The instruction sets this CPU can run, weakest first; the last is chosen at first use. Names are borrowed. */
int bn_cpu_isa_count(void);
const char *bn_cpu_isa_name(int index);
/* What set `index` does itself, NULL where it leaves a kernel to a set below. Number 0 is scalar and complete. */
const bn_kernel_table *bn_cpu_isa_own_kernels(int index);
const char *bn_cpu_current_isa(void);
/* From the next launch on. BN_ERR_VALUE for a set that is unknown or absent here. */
BN_CHECKED bn_status bn_cpu_use_isa(const char *name);

#endif
