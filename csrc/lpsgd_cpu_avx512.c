/* SPDX-License-Identifier: MIT */
#ifdef __x86_64__
#define LPSGD_F16C
#define LPSGD_KERNEL lpsgd_kernel_avx512
#define LPSGD_AVX512 "avx512f,avx512bw,avx512cd,avx512dq,avx512vl,avx2,fma,f16c"
#ifdef __clang__
#define LPSGD_TARGET __attribute__((target(LPSGD_AVX512)))
#else
#define LPSGD_TARGET __attribute__((target(LPSGD_AVX512 ",prefer-vector-width=512")))
#endif
#include "lpsgd_cpu_kernel.h"
#else
typedef int lpsgd_no_avx512;
#endif
