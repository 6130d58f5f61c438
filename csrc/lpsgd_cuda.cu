/* SPDX-License-Identifier: MIT
 *
 * lpsgd_cuda.cu: the CUDA kernels. Compiled to a fat binary by nvcc -fmad=false and embedded by
 * lpsgd_cuda.c; all of their work is lpsgd_cuda_kernel.h's.
 */
#include "lpsgd_cuda_check.h"
#include "lpsgd_cuda_kernel.h"

static __device__ lpsgd_cuda_place this_thread(void)
{
    const lpsgd_cuda_place place = {(int64_t)blockIdx.x, (int64_t)gridDim.x, (int)threadIdx.x};
    return place;
}

/* A kernel's bounds. For sm_75 nvcc would take more than 64 registers for one of them. */
#define LPSGD_CUDA_FREE (LPSGD_CUDA_THREADS)
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#define LPSGD_CUDA_TIGHT (LPSGD_CUDA_THREADS, 4)
#else
#define LPSGD_CUDA_TIGHT LPSGD_CUDA_FREE
#endif

/* A kernel, which does `work` on as many tensors as its arguments have room for. */
#define LPSGD_CUDA_GLOBAL(name, work, arguments, bounds)                                           \
    extern "C" __global__ void __launch_bounds__ bounds                                            \
        name(const __grid_constant__ arguments a)                                                  \
    {                                                                                              \
        __shared__ lpsgd_tables tables;                                                            \
        lpsgd_cuda_share(&tables, &a.common, (int)threadIdx.x);                                    \
        __syncthreads();                                                                           \
        work(&a.common, a.tensor, &tables, this_thread());                                         \
    }

#define LPSGD_CUDA_GLOBALS(name, few, bounds)                                                      \
    LPSGD_CUDA_GLOBAL(name, name##_work, lpsgd_cuda_step_arguments, bounds)                        \
    LPSGD_CUDA_GLOBAL(few, name##_work, lpsgd_cuda_few_arguments, bounds)

LPSGD_CUDA_GLOBALS(lpsgd_cuda_float32, lpsgd_cuda_float32_few, LPSGD_CUDA_FREE)
LPSGD_CUDA_GLOBALS(lpsgd_cuda_float64, lpsgd_cuda_float64_few, LPSGD_CUDA_FREE)
LPSGD_CUDA_GLOBALS(lpsgd_cuda_bfloat16, lpsgd_cuda_bfloat16_few, LPSGD_CUDA_FREE)
LPSGD_CUDA_GLOBALS(lpsgd_cuda_float16, lpsgd_cuda_float16_few, LPSGD_CUDA_FREE)
LPSGD_CUDA_GLOBALS(lpsgd_cuda_bfloat16_wide, lpsgd_cuda_bfloat16_wide_few, LPSGD_CUDA_FREE)
LPSGD_CUDA_GLOBALS(lpsgd_cuda_float16_wide, lpsgd_cuda_float16_wide_few, LPSGD_CUDA_FREE)
LPSGD_CUDA_GLOBALS(lpsgd_cuda_float32_half, lpsgd_cuda_float32_half_few, LPSGD_CUDA_FREE)
LPSGD_CUDA_GLOBALS(lpsgd_cuda_float16_half, lpsgd_cuda_float16_half_few, LPSGD_CUDA_FREE)
LPSGD_CUDA_GLOBALS(lpsgd_cuda_float32_byte, lpsgd_cuda_float32_byte_few, LPSGD_CUDA_FREE)
LPSGD_CUDA_GLOBALS(lpsgd_cuda_bfloat16_byte, lpsgd_cuda_bfloat16_byte_few, LPSGD_CUDA_TIGHT)
LPSGD_CUDA_GLOBALS(lpsgd_cuda_float16_byte, lpsgd_cuda_float16_byte_few, LPSGD_CUDA_FREE)

extern "C" __global__ void lpsgd_cuda_fold_scalars(const __grid_constant__ lpsgd_cuda_fold_arguments a)
{
    lpsgd_cuda_fold(&a);
}

/* What the steps of lpsgd_cuda_check.h run on. */
extern "C" {
__device__ lpsgd_cuda_check_memory lpsgd_cuda_checked[LPSGD_CUDA_CHECKS];
}
