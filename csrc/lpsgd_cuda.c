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
#include "lpsgd_cuda_check.h"
#include "lpsgd_cuda_driver.h"
#include "lpsgd_internal.h"

#include <stdio.h>

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

lpsgd_status lpsgd_cuda_prepare(int device, void *stream, int *capturing)
{
    (void)device, (void)stream, (void)capturing;
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

#else /* on Linux */

#include <dlfcn.h>
#include <pthread.h>
#include <stdlib.h>

int lpsgd_cuda_version(void)
{
    return LPSGD_CUDA_VERSION;
}

const char *lpsgd_cuda_architectures(void)
{
    return LPSGD_CUDA_ARCHITECTURES;
}

/* The section that nvcc's own objects have it in, where cuobjdump looks. */
__asm__(".section .nv_fatbin,\"a\"\n"
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
    int ready[DEVICES]; /* all kernels are loaded there, and have passed the check */
    char failure[DEVICES][sizeof error_text]; /* why the check failed, or "" */
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
    if (loaded.initialized)
        return LPSGD_OK;
    CHECK(cuInit, 0);
    CHECK(cuDriverGetVersion, &version);
    if (version < LEAST_DRIVER) {
        snprintf(error_text, sizeof error_text,
                 "the NVIDIA driver is too old: it is of CUDA %d.%d, and lpsgd needs %d.%d",
                 version / 1000, version % 1000 / 10, LEAST_DRIVER / 1000,
                 LEAST_DRIVER % 1000 / 10);
        return LPSGD_ERROR_CUDA;
    }
    loaded.initialized = 1;
    return LPSGD_OK;
}

#define LPSGD_CUDA_NAMES(kind, name)                                                               \
    [kind] = name, [LPSGD_CUDA_KINDS + kind] = name "_few"
static const char *const kernel_names[LPSGD_CUDA_KERNELS] = {
    LPSGD_CUDA_NAMES(LPSGD_CUDA_FLOAT32, "lpsgd_cuda_float32"),
    LPSGD_CUDA_NAMES(LPSGD_CUDA_FLOAT64, "lpsgd_cuda_float64"),
    LPSGD_CUDA_NAMES(LPSGD_CUDA_BFLOAT16, "lpsgd_cuda_bfloat16"),
    LPSGD_CUDA_NAMES(LPSGD_CUDA_FLOAT16, "lpsgd_cuda_float16"),
    LPSGD_CUDA_NAMES(LPSGD_CUDA_BFLOAT16_WIDE, "lpsgd_cuda_bfloat16_wide"),
    LPSGD_CUDA_NAMES(LPSGD_CUDA_FLOAT16_WIDE, "lpsgd_cuda_float16_wide"),
    LPSGD_CUDA_NAMES(LPSGD_CUDA_FLOAT32_HALF, "lpsgd_cuda_float32_half"),
    LPSGD_CUDA_NAMES(LPSGD_CUDA_FLOAT16_HALF, "lpsgd_cuda_float16_half"),
    LPSGD_CUDA_NAMES(LPSGD_CUDA_FLOAT32_BYTE, "lpsgd_cuda_float32_byte"),
    LPSGD_CUDA_NAMES(LPSGD_CUDA_BFLOAT16_BYTE, "lpsgd_cuda_bfloat16_byte"),
    LPSGD_CUDA_NAMES(LPSGD_CUDA_FLOAT16_BYTE, "lpsgd_cuda_float16_byte"),
    [LPSGD_CUDA_FOLD] = "lpsgd_cuda_fold_scalars",
};

static lpsgd_status load_kernels(void)
{
    CUlibrary library;
    CUkernel kernel;
    if (!loaded.library) {
        CHECK(cuLibraryLoadData, &library, lpsgd_cuda_image, NULL, NULL, 0, NULL, NULL, 0);
        loaded.library = library;
    }
    for (int i = 0; i < LPSGD_CUDA_KERNELS; i++)
        if (!loaded.kernel[i]) {
            CHECK(cuLibraryGetKernel, &kernel, loaded.library, kernel_names[i]);
            loaded.kernel[i] = kernel;
        }
    return LPSGD_OK;
}

static lpsgd_status load(int device)
{
    CUdevice handle;
    CUcontext context;
    if (!loaded.context[device]) {
        CHECK(cuDeviceGet, &handle, device);
        CHECK(cuDevicePrimaryCtxRetain, &context, handle);
        loaded.context[device] = context;
    }
    return load_kernels();
}

/* For dtypes that go together, or for LPSGD. */
static int kernel_for(lpsgd_dtype dtype, lpsgd_dtype momentum_dtype, int has_momentum)
{
    static const int kernels[][5] = {
        [LPSGD_FLOAT32] = {[LPSGD_FLOAT32] = LPSGD_CUDA_FLOAT32,
                           [LPSGD_BFLOAT16] = LPSGD_CUDA_FLOAT32_HALF,
                           [LPSGD_FLOAT8_E5M2] = LPSGD_CUDA_FLOAT32_BYTE},
        [LPSGD_FLOAT64] = {[LPSGD_FLOAT64] = LPSGD_CUDA_FLOAT64},
        [LPSGD_BFLOAT16] = {[LPSGD_FLOAT32] = LPSGD_CUDA_BFLOAT16_WIDE,
                            [LPSGD_BFLOAT16] = LPSGD_CUDA_BFLOAT16,
                            [LPSGD_FLOAT8_E5M2] = LPSGD_CUDA_BFLOAT16_BYTE},
        [LPSGD_FLOAT16] = {[LPSGD_FLOAT32] = LPSGD_CUDA_FLOAT16_WIDE,
                           [LPSGD_BFLOAT16] = LPSGD_CUDA_FLOAT16_HALF,
                           [LPSGD_FLOAT16] = LPSGD_CUDA_FLOAT16,
                           [LPSGD_FLOAT8_E5M2] = LPSGD_CUDA_FLOAT16_BYTE},
    };
    return kernels[dtype][has_momentum ? momentum_dtype : dtype];
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

/* One launch for as many buffers as fit. *done counts the buffers of the list so far. Up to `few` are a
 * kernel's for few tensors. */
static lpsgd_status launch_some(lpsgd_cuda_step_arguments *a, const lpsgd_buffer *list,
                                int64_t count, lpsgd_dtype dtype, int kernel, int has_momentum,
                                int few, const lpsgd_cuda_target *target, int64_t *done)
{
    lpsgd_cuda_fill(a, list, count, lpsgd_itemsize(dtype), has_momentum, done);
    const int64_t tiles = a->common.tiles;
    if (!tiles)
        return LPSGD_OK;
    void *arguments[] = {a}; /* the driver reads what the kernel's arguments have room for */
    return launch(a->common.count <= few ? LPSGD_CUDA_KINDS + kernel : kernel,
                  tiles < INT32_MAX ? (unsigned)tiles : INT32_MAX, LPSGD_CUDA_THREADS, target,
                  arguments);
}

static lpsgd_status out_of_memory(void)
{
    snprintf(error_text, sizeof error_text, "out of memory");
    return LPSGD_ERROR_CUDA;
}

static int has_device_number(const lpsgd_cuda_target *t)
{
    return t->lr.pointer || t->p.pointer || t->weight_decay.pointer || t->grad_scale.pointer ||
           t->found_inf.pointer;
}

static lpsgd_status launch_all(const lpsgd_buffer *list, int64_t count, lpsgd_dtype dtype,
                               const lpsgd_hyper *hyper, const lpsgd_scalars *k, int has_momentum,
                               int few, const lpsgd_cuda_target *target)
{
    lpsgd_cuda_step_arguments *a = malloc(sizeof *a);
    if (!a)
        return out_of_memory();
    const int kernel = kernel_for(dtype, k->momentum_dtype, has_momentum);
    const int on_device = has_device_number(target);
    a->common.device_scalars = on_device ? target->scratch : NULL;
    a->common.scalars = *k;
    lpsgd_status status = on_device ? launch_fold(hyper, target) : LPSGD_OK;
    for (int64_t done = 0; done < count && status == LPSGD_OK;)
        status = launch_some(a, list, count, dtype, kernel, has_momentum, few, target, &done);
    free(a);
    return status;
}

/* Pops the context; what was wrong before is the error that is told. */
static lpsgd_status leave_context(lpsgd_status status)
{
    CUcontext popped;
    const CUresult result = driver.cuCtxPopCurrent_v2(&popped);
    return status != LPSGD_OK ? status : check("cuCtxPopCurrent_v2", result);
}

/* Whether the stream is being captured, or depends on one that is. Its context is current. */
static lpsgd_status ask_capturing(CUstream stream, int *capturing)
{
    enum { CAPTURE_IMPLICIT = 906 }; /* the legacy stream, while a stream that waits for it is */
    CUstreamCaptureStatus answer = 0;
    const CUresult result = driver.cuStreamIsCapturing(stream, &answer);
    *capturing = result == CAPTURE_IMPLICIT || answer != 0;
    return result == CAPTURE_IMPLICIT ? LPSGD_OK : check("cuStreamIsCapturing", result);
}

/* Loads the machine code of every kernel, which the driver would put off until its first launch. */
static lpsgd_status load_functions(void)
{
    CUfunction function;
    for (int i = 0; i < LPSGD_CUDA_KERNELS; i++) {
        CHECK(cuKernelGetFunction, &function, loaded.kernel[i]);
        CHECK(cuFuncLoad, function);
    }
    return LPSGD_OK;
}

/* All steps of lpsgd_cuda_check.h on the device, from and to `memory`. */
static lpsgd_status launch_checks(lpsgd_cuda_check_memory *memory, CUdeviceptr there,
                                  lpsgd_cuda_target *target)
{
    const size_t size = LPSGD_CUDA_CHECKS * sizeof *memory;
    CHECK(cuMemcpyAsync, there, (CUdeviceptr)(uintptr_t)memory, size, target->stream);
    for (int i = 0; i < LPSGD_CUDA_CHECKS; i++) {
        lpsgd_cuda_check_memory *const on_device = (lpsgd_cuda_check_memory *)(uintptr_t)there + i;
        lpsgd_cuda_check c = lpsgd_cuda_check_number(i, on_device);
        lpsgd_scalars k;
        target->lr = c.device_number[0];
        target->p = c.device_number[1];
        target->found_inf = c.device_number[2];
        target->scratch = &on_device->scratch;
        lpsgd_status status = lpsgd_fold(&c.hyper, c.has_momentum, &k);
        if (target->lr.pointer)
            c.hyper.lr = c.hyper.p = 3.0; /* not to be read */
        if (status == LPSGD_OK)
            status = launch_all(c.list, 2, c.dtype, &c.hyper, &k, c.has_momentum, c.few ? 2 : 0,
                                target);
        if (status != LPSGD_OK)
            return status;
    }
    CHECK(cuMemcpyAsync, (CUdeviceptr)(uintptr_t)memory, there, size, target->stream);
    CHECK(cuStreamSynchronize, target->stream);
    return LPSGD_OK;
}

/* The same on a stream of its own, which waits for no other. */
static lpsgd_status run_checks(lpsgd_cuda_check_memory *memory)
{
    lpsgd_cuda_target target = {.device = 0};
    CUdeviceptr there;
    CUstream stream;
    size_t size;
    CHECK(cuLibraryGetGlobal, &there, &size, loaded.library, "lpsgd_cuda_checked");
    CHECK(cuStreamCreate, &stream, CU_STREAM_NON_BLOCKING);
    target.stream = stream;
    const lpsgd_status status = launch_checks(memory, there, &target);
    const CUresult destroyed = driver.cuStreamDestroy_v2(stream);
    return status != LPSGD_OK ? status : check("cuStreamDestroy_v2", destroyed);
}

/* Remembers for the device that its kernels are wrong, in words to be reported. */
static lpsgd_status fail_check(int device, const lpsgd_cuda_check *c, const char *difference)
{
    char name[64] = "a GPU";
    CUdevice handle;
    int version = 0;
    if (driver.cuDeviceGet(&handle, device) == 0)
        driver.cuDeviceGetName(name, sizeof name, handle);
    driver.cuDriverGetVersion(&version);
    snprintf(error_text, sizeof error_text,
             "its kernels differ from the CPU's: after a step of %s (p = %g%s%s) %s. Please report "
             "this: %s, driver of CUDA %d.%d, lpsgd " LPSGD_VERSION " of CUDA %d.%d for %s",
             kernel_names[kernel_for(c->dtype, c->hyper.momentum_dtype, c->has_momentum) +
                          c->few * LPSGD_CUDA_KINDS],
             c->hyper.p, c->has_momentum ? ", momentum" : "",
             c->device_number[0].pointer ? ", numbers on the GPU" : "", difference, name,
             version / 1000, version % 1000 / 10, LPSGD_CUDA_VERSION / 1000,
             LPSGD_CUDA_VERSION % 1000 / 10, LPSGD_CUDA_ARCHITECTURES);
    memcpy(loaded.failure[device], error_text, sizeof error_text);
    return LPSGD_ERROR_CUDA;
}

/* Compares a step by every kernel with the CPU's, unless LPSGD_CUDA_CHECK=0. */
static lpsgd_status check_kernels(int device)
{
    const char *wish = getenv("LPSGD_CUDA_CHECK");
    if (wish && strcmp(wish, "0") == 0)
        return LPSGD_OK;
    char difference[128];
    lpsgd_cuda_check_memory *memory = malloc(LPSGD_CUDA_CHECKS * sizeof *memory);
    if (!memory)
        return out_of_memory();
    for (int i = 0; i < LPSGD_CUDA_CHECKS; i++)
        lpsgd_cuda_check_fill(i, &memory[i]);
    lpsgd_status status = run_checks(memory);
    for (int i = 0; i < LPSGD_CUDA_CHECKS && status == LPSGD_OK; i++)
        if (!lpsgd_cuda_check_passes(i, &memory[i], difference, sizeof difference)) {
            const lpsgd_cuda_check failed = lpsgd_cuda_check_number(i, &memory[i]);
            status = fail_check(device, &failed, difference);
        }
    free(memory);
    return status;
}

/* A device's kernels, loaded and checked; not checked yet where the stream is being captured. */
static lpsgd_status make_ready(int device, CUstream stream)
{
    int capturing = 0;
    lpsgd_status status = load(device);
    if (status != LPSGD_OK)
        return status;
    CHECK(cuCtxPushCurrent_v2, loaded.context[device]);
    status = load_functions();
    if (status == LPSGD_OK)
        status = ask_capturing(stream, &capturing);
    if (status == LPSGD_OK && !capturing)
        status = check_kernels(device);
    status = leave_context(status);
    loaded.ready[device] = status == LPSGD_OK && !capturing;
    return status;
}

/* With the mutex. While another stream is being captured the driver would refuse a thread in the usual
 * mode most of what loads kernels. */
static lpsgd_status prepare(int device, CUstream stream)
{
    CUstreamCaptureMode mode = CU_STREAM_CAPTURE_MODE_RELAXED;
    if (loaded.ready[device])
        return LPSGD_OK;
    if (loaded.failure[device][0]) {
        snprintf(error_text, sizeof error_text, "%s", loaded.failure[device]);
        return LPSGD_ERROR_CUDA;
    }
    lpsgd_status status = initialize();
    if (status != LPSGD_OK)
        return status;
    CHECK(cuThreadExchangeStreamCaptureMode, &mode);
    status = make_ready(device, stream);
    const CUresult result = driver.cuThreadExchangeStreamCaptureMode(&mode);
    return status != LPSGD_OK ? status : check("cuThreadExchangeStreamCaptureMode", result);
}

lpsgd_status lpsgd_cuda_prepare(int device, void *stream, int *capturing)
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
    const lpsgd_status status = prepare(device, stream);
    pthread_mutex_unlock(&loaded.mutex);
    if (status != LPSGD_OK || !capturing)
        return status;
    CHECK(cuCtxPushCurrent_v2, loaded.context[device]);
    return leave_context(ask_capturing(stream, capturing));
}

static lpsgd_status step(const lpsgd_buffer *list, int64_t count, lpsgd_dtype dtype,
                         const lpsgd_hyper *hyper, const lpsgd_cuda_target *target,
                         int has_momentum)
{
    lpsgd_scalars k;
    int64_t total;
    lpsgd_status status = lpsgd_fold(hyper, has_momentum, &k);
    if (status == LPSGD_OK)
        status = lpsgd_check_list(list, count, dtype, has_momentum, &k, &total);
    if (status == LPSGD_OK && has_device_number(target) && !target->scratch)
        status = LPSGD_ERROR_NULL;
    if (status == LPSGD_OK)
        status = lpsgd_cuda_prepare(target->device, target->stream, NULL);
    if (status != LPSGD_OK || !total)
        return status;
    CHECK(cuCtxPushCurrent_v2, loaded.context[target->device]);
    status = launch_all(list, count, dtype, hyper, &k, has_momentum, LPSGD_CUDA_FEW, target);
    return leave_context(status);
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
