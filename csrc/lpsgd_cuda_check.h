/* SPDX-License-Identifier: MIT
 *
 * lpsgd_cuda_check.h: small known steps by every CUDA kernel. lpsgd_cuda.c makes them before the first
 * step on a device, and compares what they leave with what the CPU's kernels do.
 */
#ifndef LPSGD_CUDA_CHECK_H
#define LPSGD_CUDA_CHECK_H

#include "lpsgd_cuda_kernel.h"

/* By each kernel, without and with a momentum_buffer: three rules, and found_inf. */
enum { LPSGD_CUDA_CHECKS = 2 * LPSGD_CUDA_KINDS * 2 * 4, LPSGD_CUDA_CHECK_NUMEL = 26 };

/* The memory of one step: arrays with room for as many elements of any dtype, which hold the arrays of
 * two buffers, and the numbers that the GPU reads. */
typedef struct LPSGD_ALIGN(16) lpsgd_cuda_check_memory {
    double param[LPSGD_CUDA_CHECK_NUMEL];
    double grad[LPSGD_CUDA_CHECK_NUMEL];
    double momentum_buffer[LPSGD_CUDA_CHECK_NUMEL];
    double lr, p, found_inf;
    lpsgd_cuda_scalars scratch;
} lpsgd_cuda_check_memory;

typedef struct lpsgd_cuda_check {
    lpsgd_dtype dtype;
    lpsgd_hyper hyper;
    int has_momentum, few; /* few: it is the kernel for few tensors */
    int found_inf;
    lpsgd_buffer list[2];                 /* in the memory */
    lpsgd_device_number device_number[3]; /* lr, p and found_inf, if the GPU reads them */
} lpsgd_cuda_check;

/* The step of this number, below LPSGD_CUDA_CHECKS, in memory that is not looked at. */
lpsgd_cuda_check lpsgd_cuda_check_number(int i, lpsgd_cuda_check_memory *memory);

/* Makes the memory as it is before the step. */
void lpsgd_cuda_check_fill(int i, lpsgd_cuda_check_memory *memory);

/* Whether the memory is as the CPU leaves it; `text` says what differs. The power of float64 may
 * differ by some ulp, everything else by no bit. */
int lpsgd_cuda_check_passes(int i, const lpsgd_cuda_check_memory *memory, char *text, size_t size);

#endif
