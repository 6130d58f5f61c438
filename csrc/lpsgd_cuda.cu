/* SPDX-License-Identifier: MIT
 *
 * lpsgd_cuda.cu: the CUDA kernels. Compiled to a fat binary by nvcc -fmad=false and embedded by
 * lpsgd_cuda.c; all of their work is lpsgd_cuda_kernel.h's.
 */
#include "lpsgd_cuda_kernel.h"

static __device__ lpsgd_cuda_place this_thread(void)
{
    const lpsgd_cuda_place place = {(int64_t)blockIdx.x, (int64_t)gridDim.x, (int)threadIdx.x};
    return place;
}

#define LPSGD_CUDA_GLOBAL(name)                                                                    \
    extern "C" __global__ void __launch_bounds__(LPSGD_CUDA_THREADS)                               \
        name(const __grid_constant__ lpsgd_cuda_step_arguments a)                                  \
    {                                                                                              \
        name##_work(&a, this_thread());                                                            \
    }

LPSGD_CUDA_GLOBAL(lpsgd_cuda_float32)
LPSGD_CUDA_GLOBAL(lpsgd_cuda_float64)
LPSGD_CUDA_GLOBAL(lpsgd_cuda_bfloat16)
LPSGD_CUDA_GLOBAL(lpsgd_cuda_float16)
LPSGD_CUDA_GLOBAL(lpsgd_cuda_bfloat16_wide)
LPSGD_CUDA_GLOBAL(lpsgd_cuda_float16_wide)

extern "C" __global__ void lpsgd_cuda_fold_scalars(const __grid_constant__ lpsgd_cuda_fold_arguments a)
{
    lpsgd_cuda_fold(&a);
}
