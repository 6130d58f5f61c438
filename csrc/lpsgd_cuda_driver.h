/* SPDX-License-Identifier: MIT
 *
 * lpsgd_cuda_driver.h: the part of cuda.h that is used, declared here so that the build needs no
 * CUDA. tests/module/test_abi.py compares it with cuda.h where there is one.
 */
#ifndef LPSGD_CUDA_DRIVER_H
#define LPSGD_CUDA_DRIVER_H

#ifndef CUDA_VERSION /* without cuda.h */
typedef int CUresult; /* 0: success */
typedef int CUdevice, CUjit_option, CUlibraryOption, CUstreamCaptureMode, CUstreamCaptureStatus;
typedef unsigned long long CUdeviceptr;
enum { CU_STREAM_NON_BLOCKING = 1, CU_STREAM_CAPTURE_MODE_RELAXED = 2 };
typedef struct CUctx_st *CUcontext;
typedef struct CUfunc_st *CUfunction;
typedef struct CUkern_st *CUkernel;
typedef struct CUlib_st *CUlibrary;
typedef struct CUstream_st *CUstream;
#endif

/* X(name, parameters) of every function. */
#define LPSGD_CUDA_DRIVER(X)                                                                       \
    X(cuInit, (unsigned flags))                                                                    \
    X(cuGetErrorName, (CUresult error, const char **name))                                         \
    X(cuGetErrorString, (CUresult error, const char **text))                                       \
    X(cuDriverGetVersion, (int *version))                                                          \
    X(cuDeviceGet, (CUdevice *device, int ordinal))                                                \
    X(cuDeviceGetName, (char *name, int size, CUdevice device))                                    \
    X(cuDevicePrimaryCtxRetain, (CUcontext *context, CUdevice device))                             \
    X(cuCtxPushCurrent_v2, (CUcontext context))                                                    \
    X(cuCtxPopCurrent_v2, (CUcontext *context))                                                    \
    X(cuLibraryLoadData,                                                                           \
      (CUlibrary *library, const void *image, CUjit_option *jit_options, void **jit_values,        \
       unsigned jit_count, CUlibraryOption *options, void **values, unsigned count))               \
    X(cuLibraryGetKernel, (CUkernel *kernel, CUlibrary library, const char *name))                 \
    X(cuLibraryGetGlobal,                                                                          \
      (CUdeviceptr *pointer, size_t *size, CUlibrary library, const char *name))                   \
    X(cuKernelGetFunction, (CUfunction *function, CUkernel kernel))                                \
    X(cuFuncLoad, (CUfunction function))                                                           \
    X(cuThreadExchangeStreamCaptureMode, (CUstreamCaptureMode *mode))                              \
    X(cuStreamIsCapturing, (CUstream stream, CUstreamCaptureStatus *status))                       \
    X(cuStreamCreate, (CUstream *stream, unsigned flags))                                          \
    X(cuStreamSynchronize, (CUstream stream))                                                      \
    X(cuStreamDestroy_v2, (CUstream stream))                                                       \
    X(cuMemcpyAsync, (CUdeviceptr to, CUdeviceptr from, size_t size, CUstream stream))             \
    X(cuLaunchKernel,                                                                              \
      (CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,   \
       unsigned block_y, unsigned block_z, unsigned shared_bytes, CUstream stream,                 \
       void **arguments, void **extra))

#endif
