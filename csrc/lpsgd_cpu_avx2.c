/* SPDX-License-Identifier: MIT */
#ifdef __x86_64__
#define LPSGD_F16C
#define LPSGD_KERNEL lpsgd_kernel_avx2
#define LPSGD_TARGET __attribute__((target("avx2,fma,f16c")))
#include "lpsgd_cpu_kernel.h"
#else
typedef int lpsgd_no_avx2;
#endif
