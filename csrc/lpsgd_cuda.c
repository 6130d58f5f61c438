/* SPDX-License-Identifier: MIT
 *
 * lpsgd_cuda.c: steps on an NVIDIA GPU through the driver's C interface, found by dlopen. There is no
 * CUDA runtime, and nothing of CUDA is touched before the first step, so that this file links and
 * the library loads anywhere, and a process that has not stepped on a GPU may fork.
 *
 * LPSGD_CUDA_IMAGE is the path of the fat binary made of lpsgd_cuda.cu, LPSGD_CUDA_VERSION the CUDA
 * that made it and LPSGD_CUDA_ARCHITECTURES what it is for; without them the functions answer that
 * there are no kernels.
 */
#include "lpsgd_cuda_driver.h"
#include "lpsgd_cuda_kernel.h"
#include "lpsgd_internal.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>

static _Thread_local char error_text[512] = "no error";

const char *lpsgd_cuda_error(void)
{
    return error_text;
}

int64_t lpsgd_cuda_scratch_size(void)
{
    return (int64_t)sizeof(lpsgd_cuda_scalars);
}

#ifndef LPSGD_CUDA_IMAGE

int lpsgd_cuda_version(void)
{
    return 0;
}

const char *lpsgd_cuda_architectures(void)
{
    return "";
}

static lpsgd_status no_kernels(void)
{
    snprintf(error_text, sizeof error_text, "this build of lpsgd has no CUDA kernels");
    return LPSGD_ERROR_CUDA;
}

lpsgd_status lpsgd_cuda_prepare(int device)
{
    (void)device;
    return no_kernels();
}

lpsgd_status lpsgd_cuda_step(const lpsgd_buffer *list, int64_t count, lpsgd_dtype dtype,
                             const lpsgd_hyper *hyper, const lpsgd_cuda_target *target)
{
    (void)list, (void)count, (void)dtype, (void)hyper, (void)target;
    return no_kernels();
}

lpsgd_status lpsgdm_cuda_step(const lpsgd_buffer *list, int64_t count, lpsgd_dtype dtype,
                              const lpsgd_hyper *hyper, const lpsgd_cuda_target *target)
{
    (void)list, (void)count, (void)dtype, (void)hyper, (void)target;
    return no_kernels();
}

#else

int lpsgd_cuda_version(void)
{
    return LPSGD_CUDA_VERSION;
}

const char *lpsgd_cuda_architectures(void)
{
    return LPSGD_CUDA_ARCHITECTURES;
}

__asm__(".section .rodata\n"
        ".balign 64\n"
        ".globl lpsgd_cuda_image\n"
        ".hidden lpsgd_cuda_image\n"
        "lpsgd_cuda_image:\n"
        ".incbin \"" LPSGD_CUDA_IMAGE "\"\n"
        ".previous\n");
extern const unsigned char lpsgd_cuda_image[];

static struct {
    pthread_once_t once;
    char refusal[256]; /* why there is no driver, or "" */
#define LPSGD_POINTER(name, parameters) CUresult(*name) parameters;
    LPSGD_CUDA_DRIVER(LPSGD_POINTER)
} driver = {.once = PTHREAD_ONCE_INIT};

/* A driver takes no machine code of a later major version; those before 12.4 cannot unpack it. */
enum {
    DEVICES = 64,
    LEAST_DRIVER = LPSGD_CUDA_VERSION < 13000 ? 12040 : LPSGD_CUDA_VERSION / 1000 * 1000,
};

/* What has been loaded so far; a call that failed is tried again, whatever it left in its result. */
static struct {
    pthread_mutex_t mutex;
    int initialized;
    CUlibrary library;
    CUkernel kernel[LPSGD_CUDA_KERNELS];
    CUcontext context[DEVICES]; /* primary contexts, retained for the life of the process */
} loaded = {.mutex = PTHREAD_MUTEX_INITIALIZER};

static void find_driver(void)
{
    const struct {
        const char *name;
        void *function;
    } wanted[] = {
#define LPSGD_WANTED(name, parameters) {#name, &driver.name},
        LPSGD_CUDA_DRIVER(LPSGD_WANTED)
    };
    void *handle = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (!handle) {
        snprintf(driver.refusal, sizeof driver.refusal, "the NVIDIA driver cannot be used: %s",
                 dlerror());
        return;
    }
    for (size_t i = 0; i < sizeof wanted / sizeof *wanted; i++) {
        void *symbol = dlsym(handle, wanted[i].name);
        if (!symbol) {
            snprintf(driver.refusal, sizeof driver.refusal,
                     "the NVIDIA driver is too old: it has no %s", wanted[i].name);
            return;
        }
        memcpy(wanted[i].function, &symbol, sizeof symbol);
    }
}

/* LPSGD_OK, or LPSGD_ERROR_CUDA with the driver's name and text for the error. */
static lpsgd_status check(const char *function, CUresult result)
{
    const char *name = NULL, *text = NULL;
    if (result == 0)
        return LPSGD_OK;
    if (driver.cuGetErrorName(result, &name) != 0 || !name)
        name = "unknown error";
    if (driver.cuGetErrorString(result, &text) != 0 || !text)
        text = "the driver has no text for it";
    snprintf(error_text, sizeof error_text, "%s: %s (%d): %s", function, name, result, text);
    return LPSGD_ERROR_CUDA;
}

#define CHECK(function, ...)                                                                       \
    do {                                                                                           \
        const lpsgd_status answer = check(#function, driver.function(__VA_ARGS__));                \
        if (answer != LPSGD_OK)                                                                    \
            return answer;                                                                         \
    } while (0)

static lpsgd_status initialize(void)
{
    int version = 0;
    CHECK(cuInit, 0);
    CHECK(cuDriverGetVersion, &version);
    if (version < LEAST_DRIVER) {
        snprintf(error_text, sizeof error_text,
                 "the NVIDIA driver is too old: it is of CUDA %d.%d, and lpsgd needs %d.%d",
                 version / 1000, version % 1000 / 10, LEAST_DRIVER / 1000,
                 LEAST_DRIVER % 1000 / 10);
        return LPSGD_ERROR_CUDA;
    }
    return LPSGD_OK;
}

static lpsgd_status load_kernels(void)
{
    static const char *const names[LPSGD_CUDA_KERNELS] = {
        [LPSGD_CUDA_FLOAT32] = "lpsgd_cuda_float32",
        [LPSGD_CUDA_FLOAT64] = "lpsgd_cuda_float64",
        [LPSGD_CUDA_BFLOAT16] = "lpsgd_cuda_bfloat16",
        [LPSGD_CUDA_FLOAT16] = "lpsgd_cuda_float16",
        [LPSGD_CUDA_BFLOAT16_WIDE] = "lpsgd_cuda_bfloat16_wide",
        [LPSGD_CUDA_FLOAT16_WIDE] = "lpsgd_cuda_float16_wide",
        [LPSGD_CUDA_FOLD] = "lpsgd_cuda_fold_scalars",
    };
    CUlibrary library;
    CUkernel kernel;
    if (!loaded.library) {
        CHECK(cuLibraryLoadData, &library, lpsgd_cuda_image, NULL, NULL, 0, NULL, NULL, 0);
        loaded.library = library;
    }
    for (int i = 0; i < LPSGD_CUDA_KERNELS; i++)
        if (!loaded.kernel[i]) {
            CHECK(cuLibraryGetKernel, &kernel, loaded.library, names[i]);
            loaded.kernel[i] = kernel;
        }
    return LPSGD_OK;
}

static lpsgd_status load(int device)
{
    CUdevice handle;
    CUcontext context;
    if (!loaded.initialized) {
        const lpsgd_status status = initialize();
        if (status != LPSGD_OK)
            return status;
        loaded.initialized = 1;
    }
    if (!loaded.context[device]) {
        CHECK(cuDeviceGet, &handle, device);
        CHECK(cuDevicePrimaryCtxRetain, &context, handle);
        loaded.context[device] = context;
    }
    return load_kernels();
}

lpsgd_status lpsgd_cuda_prepare(int device)
{
    pthread_once(&driver.once, find_driver);
    if (driver.refusal[0]) {
        snprintf(error_text, sizeof error_text, "%s", driver.refusal);
        return LPSGD_ERROR_CUDA;
    }
    if (device < 0 || device >= DEVICES) {
        snprintf(error_text, sizeof error_text, "there is no CUDA device %d", device);
        return LPSGD_ERROR_CUDA;
    }
    pthread_mutex_lock(&loaded.mutex);
    const lpsgd_status status = load(device);
    pthread_mutex_unlock(&loaded.mutex);
    return status;
}

static int kernel_for(lpsgd_dtype dtype, int momentum_float32)
{
    switch (dtype) {
    case LPSGD_FLOAT64:
        return LPSGD_CUDA_FLOAT64;
    case LPSGD_BFLOAT16:
        return momentum_float32 ? LPSGD_CUDA_BFLOAT16_WIDE : LPSGD_CUDA_BFLOAT16;
    case LPSGD_FLOAT16:
        return momentum_float32 ? LPSGD_CUDA_FLOAT16_WIDE : LPSGD_CUDA_FLOAT16;
    default:
        return LPSGD_CUDA_FLOAT32;
    }
}

static lpsgd_status launch(int kernel, unsigned blocks, unsigned threads,
                           const lpsgd_cuda_target *target, void **arguments)
{
    CHECK(cuLaunchKernel, (CUfunction)loaded.kernel[kernel], blocks, 1, 1, threads, 1, 1, 0,
          target->stream, arguments, NULL);
    return LPSGD_OK;
}

static lpsgd_status launch_fold(const lpsgd_hyper *hyper, const lpsgd_cuda_target *target)
{
    lpsgd_cuda_fold_arguments a = {
        .hyper = *hyper,
        .lr = target->lr,
        .p = target->p,
        .weight_decay = target->weight_decay,
        .grad_scale = target->grad_scale,
        .found_inf = target->found_inf,
        .result = target->scratch,
    };
    void *arguments[] = {&a};
    return launch(LPSGD_CUDA_FOLD, 1, 1, target, arguments);
}

/* One launch for as many buffers as fit. *done counts the buffers of the list so far. */
static lpsgd_status launch_some(lpsgd_cuda_step_arguments *a, const lpsgd_buffer *list,
                                int64_t count, lpsgd_dtype dtype, int kernel, int has_momentum,
                                const lpsgd_cuda_target *target, int64_t *done)
{
    lpsgd_cuda_fill(a, list, count, lpsgd_itemsize(dtype), has_momentum, done);
    if (!a->tiles)
        return LPSGD_OK;
    const unsigned blocks = a->tiles < INT32_MAX ? (unsigned)a->tiles : INT32_MAX;
    void *arguments[] = {a};
    return launch(kernel, blocks, LPSGD_CUDA_THREADS, target, arguments);
}

static int has_device_number(const lpsgd_cuda_target *t)
{
    return t->lr.pointer || t->p.pointer || t->weight_decay.pointer || t->grad_scale.pointer ||
           t->found_inf.pointer;
}

static lpsgd_status launch_all(const lpsgd_buffer *list, int64_t count, lpsgd_dtype dtype,
                               const lpsgd_hyper *hyper, const lpsgd_scalars *k, int has_momentum,
                               const lpsgd_cuda_target *target)
{
    lpsgd_cuda_step_arguments *a = malloc(sizeof *a);
    if (!a) {
        snprintf(error_text, sizeof error_text, "out of memory");
        return LPSGD_ERROR_CUDA;
    }
    const int kernel = kernel_for(dtype, k->momentum_float32);
    const int on_device = has_device_number(target);
    a->device_scalars = on_device ? target->scratch : NULL;
    a->scalars = (lpsgd_cuda_scalars){*k, 0};
    lpsgd_status status = on_device ? launch_fold(hyper, target) : LPSGD_OK;
    for (int64_t done = 0; done < count && status == LPSGD_OK;)
        status = launch_some(a, list, count, dtype, kernel, has_momentum, target, &done);
    free(a);
    return status;
}

static lpsgd_status step(const lpsgd_buffer *list, int64_t count, lpsgd_dtype dtype,
                         const lpsgd_hyper *hyper, const lpsgd_cuda_target *target,
                         int has_momentum)
{
    lpsgd_scalars k;
    int64_t total;
    CUcontext popped;
    lpsgd_status status = lpsgd_fold(hyper, has_momentum, &k);
    if (status == LPSGD_OK)
        status = lpsgd_check_list(list, count, dtype, has_momentum, &k, &total);
    if (status == LPSGD_OK && has_device_number(target) && !target->scratch)
        status = LPSGD_ERROR_NULL;
    if (status == LPSGD_OK)
        status = lpsgd_cuda_prepare(target->device);
    if (status != LPSGD_OK || !total)
        return status;
    CHECK(cuCtxPushCurrent_v2, loaded.context[target->device]);
    status = launch_all(list, count, dtype, hyper, &k, has_momentum, target);
    const lpsgd_status after = check("cuCtxPopCurrent_v2", driver.cuCtxPopCurrent_v2(&popped));
    return status != LPSGD_OK ? status : after;
}

lpsgd_status lpsgd_cuda_step(const lpsgd_buffer *list, int64_t count, lpsgd_dtype dtype,
                             const lpsgd_hyper *hyper, const lpsgd_cuda_target *target)
{
    return step(list, count, dtype, hyper, target, 0);
}

lpsgd_status lpsgdm_cuda_step(const lpsgd_buffer *list, int64_t count, lpsgd_dtype dtype,
                              const lpsgd_hyper *hyper, const lpsgd_cuda_target *target)
{
    return step(list, count, dtype, hyper, target, 1);
}

#endif
