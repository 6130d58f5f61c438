/* SPDX-License-Identifier: MIT
 *
 * cuda_double.c: a libcuda.so.1 for tests. It checks what the driver checks, and besides what would
 * go wrong on the device (a pointer to other memory) or silently elsewhere (a stream of another
 * context, whose device would make the launch).
 */
#define _GNU_SOURCE
#include "cuda_double.h"

#include "cuda_grid.h"
#include "lpsgd_cuda_check.h"

#include <pthread.h>
#include <stdarg.h>
#include <sys/mman.h>
#include <unistd.h>

enum {
    INVALID_VALUE = 1,
    OUT_OF_MEMORY = 2,
    NOT_INITIALIZED = 3,
    INVALID_DEVICE = 101,
    INVALID_IMAGE = 200,
    INVALID_CONTEXT = 201,
    INVALID_HANDLE = 400,
    NOT_FOUND = 500,
    CAPTURE_UNSUPPORTED = 900,
    CAPTURE_IMPLICIT = 906,
    ILLEGAL_ADDRESS = 700,
    MISALIGNED_ADDRESS = 716,
};

static const struct {
    CUresult error;
    const char *name, *text;
} errors[] = {
    {0, "CUDA_SUCCESS", "no error"},
    {INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {NOT_INITIALIZED, "CUDA_ERROR_NOT_INITIALIZED", "initialization error"},
    {100, "CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"},
    {INVALID_DEVICE, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"},
    {INVALID_IMAGE, "CUDA_ERROR_INVALID_IMAGE", "device kernel image is invalid"},
    {INVALID_CONTEXT, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context"},
    {INVALID_HANDLE, "CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"},
    {NOT_FOUND, "CUDA_ERROR_NOT_FOUND", "named symbol not found"},
    {CAPTURE_UNSUPPORTED, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED",
     "operation not permitted when stream is capturing"},
    {ILLEGAL_ADDRESS, "CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered"},
    {MISALIGNED_ADDRESS, "CUDA_ERROR_MISALIGNED_ADDRESS", "misaligned address"},
    {209, "CUDA_ERROR_NO_BINARY_FOR_GPU", "no kernel image is available for execution on the device"},
    {719, "CUDA_ERROR_LAUNCH_FAILED", "unspecified launch failure"},
};

struct CUctx_st {
    int retained;
};

struct CUstream_st {
    int device, capturing;
};

struct CUkern_st {
    const char *name;
    grid_thread *thread; /* NULL: lpsgd_cuda_fold_scalars */
    int param_size, momentum_size;
    size_t arguments; /* their size, which is all that the driver takes of a launch's */
};

struct CUlib_st {
    const struct fat_binary *image;
};

#define DOUBLE_KERNEL(index, name, param_type, momentum_type)                                      \
    [index] = {#name, name##_thread, (int)sizeof(param_type), (int)sizeof(momentum_type),          \
               sizeof(lpsgd_cuda_step_arguments)},                                                 \
    [LPSGD_CUDA_KINDS + index] = {#name "_few", name##_thread, (int)sizeof(param_type),            \
                                  (int)sizeof(momentum_type), sizeof(lpsgd_cuda_few_arguments)}

static struct CUkern_st kernels[LPSGD_CUDA_KERNELS] = {
    DOUBLE_KERNEL(LPSGD_CUDA_FLOAT32, lpsgd_cuda_float32, float, float),
    DOUBLE_KERNEL(LPSGD_CUDA_FLOAT64, lpsgd_cuda_float64, double, double),
    DOUBLE_KERNEL(LPSGD_CUDA_BFLOAT16, lpsgd_cuda_bfloat16, uint16_t, uint16_t),
    DOUBLE_KERNEL(LPSGD_CUDA_FLOAT16, lpsgd_cuda_float16, uint16_t, uint16_t),
    DOUBLE_KERNEL(LPSGD_CUDA_BFLOAT16_WIDE, lpsgd_cuda_bfloat16_wide, uint16_t, float),
    DOUBLE_KERNEL(LPSGD_CUDA_FLOAT16_WIDE, lpsgd_cuda_float16_wide, uint16_t, float),
    DOUBLE_KERNEL(LPSGD_CUDA_FLOAT32_HALF, lpsgd_cuda_float32_half, float, uint16_t),
    DOUBLE_KERNEL(LPSGD_CUDA_FLOAT16_HALF, lpsgd_cuda_float16_half, uint16_t, uint16_t),
    DOUBLE_KERNEL(LPSGD_CUDA_FLOAT32_BYTE, lpsgd_cuda_float32_byte, float, uint8_t),
    DOUBLE_KERNEL(LPSGD_CUDA_BFLOAT16_BYTE, lpsgd_cuda_bfloat16_byte, uint16_t, uint8_t),
    DOUBLE_KERNEL(LPSGD_CUDA_FLOAT16_BYTE, lpsgd_cuda_float16_byte, uint16_t, uint8_t),
    [LPSGD_CUDA_FOLD] = {"lpsgd_cuda_fold_scalars", NULL, 0, 0, sizeof(lpsgd_cuda_fold_arguments)},
};

_Static_assert(sizeof(lpsgd_cuda_step_arguments) <= 32764, "a kernel's arguments");
_Static_assert(sizeof(lpsgd_cuda_few_arguments) <= 4096, "the arguments of one for few tensors");
_Static_assert(sizeof(lpsgd_cuda_few_arguments) + sizeof(lpsgd_cuda_tensor) > 4096, "no fewer");
_Static_assert(sizeof(lpsgd_tables) <= LPSGD_CUDA_THREADS * sizeof(float), "a word of a thread");
_Static_assert(offsetof(lpsgd_cuda_few_arguments, tensor) ==
                   offsetof(lpsgd_cuda_step_arguments, tensor),
               "the one's beginning is the other");

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static struct {
    int devices, version, run;
    pid_t process; /* that called cuInit; 0: none */
    struct CUctx_st context[DOUBLE_DEVICES];
    struct CUlib_st library;
    size_t used[DOUBLE_DEVICES];
    int has_stream[DOUBLE_DEVICES]; /* one that cuStreamCreate made */
    void *global[DOUBLE_DEVICES];   /* lpsgd_cuda_checked */
    char wrong[64];
    char failing[64];
    int nth;
    CUresult error;
    char log[1 << 18];
} state;
/* The last is that of cuStreamCreate. */
static struct CUstream_st streams[DOUBLE_DEVICES][DOUBLE_STREAMS + 1];
static _Thread_local struct {
    CUcontext context[16];
    int depth;
} stack;
static _Thread_local CUstreamCaptureMode capture_mode; /* 0: global */

/* One file, mapped twice: at the kernels' addresses and at the host's. */
static const size_t total = (size_t)DOUBLE_DEVICES * DOUBLE_MEMORY;
static unsigned char *memory, *host;
static int file;

static void *map(int protection)
{
    void *at = mmap(NULL, total, protection, MAP_SHARED, file, 0);
    if (at == MAP_FAILED)
        abort();
    return at;
}

__attribute__((constructor)) static void start(void)
{
    file = memfd_create("cuda_double", MFD_CLOEXEC);
    if (file < 0 || ftruncate(file, (off_t)total))
        abort();
    memory = map(PROT_NONE);
    host = map(PROT_READ | PROT_WRITE);
    for (int i = 0; i < DOUBLE_DEVICES; i++)
        for (int j = 0; j <= DOUBLE_STREAMS; j++)
            streams[i][j].device = i;
    double_reset(3);
}

/* What tests ask. */

void double_reset(int devices)
{
    mutex = (pthread_mutex_t)PTHREAD_MUTEX_INITIALIZER; /* a launch that crashed has kept it */
    memset(&state, 0, sizeof state);
    state.devices = devices;
    state.version = 13000;
    state.run = 1;
    state.nth = -1;
    stack.depth = 0;
    capture_mode = 0;
    for (int i = 0; i < DOUBLE_DEVICES; i++)
        for (int j = 0; j <= DOUBLE_STREAMS; j++)
            streams[i][j].capturing = 0;
    double_open(0);
    if (ftruncate(file, 0) || ftruncate(file, (off_t)total))
        abort();
}

void double_version(int version)
{
    state.version = version;
}

void double_fail(const char *name, int nth, CUresult error)
{
    snprintf(state.failing, sizeof state.failing, "%s", name);
    state.nth = nth;
    state.error = error;
}

const char *double_log(void)
{
    return state.log;
}

void double_forget(void)
{
    state.log[0] = 0;
}

void double_run(int run)
{
    state.run = run;
}

/* With the mutex. */
static void *allocate(int device, size_t size)
{
    const size_t at = state.used[device], end = at + (size + 255) / 256 * 256;
    if (end > DOUBLE_MEMORY)
        return NULL;
    state.used[device] = end;
    return memory + (size_t)device * DOUBLE_MEMORY + at;
}

void *double_allocate(int device, size_t size)
{
    pthread_mutex_lock(&mutex);
    void *const allocated = allocate(device, size);
    pthread_mutex_unlock(&mutex);
    return allocated;
}

int double_device_of(const void *pointer)
{
    const uintptr_t offset = (uintptr_t)pointer - (uintptr_t)memory;
    return offset < total ? (int)(offset / DOUBLE_MEMORY) : -1;
}

void *double_host(const void *pointer)
{
    return host + ((const unsigned char *)pointer - memory);
}

void double_open(int open)
{
    if (mprotect(memory, total, open ? PROT_READ | PROT_WRITE : PROT_NONE))
        abort();
}

CUstream double_stream(int device, int number)
{
    return number ? &streams[device][number] : NULL;
}

void double_capture(int device, int number, int capturing)
{
    streams[device][number].capturing = capturing;
}

void double_wrong(const char *name)
{
    snprintf(state.wrong, sizeof state.wrong, "%s", name);
}

int double_is_left_as_found(void)
{
    int streams_left = 0;
    for (int i = 0; i < DOUBLE_DEVICES; i++)
        streams_left += state.has_stream[i];
    return !streams_left && !stack.depth && !capture_mode;
}

/* Whether the calling thread is kept from what might disturb a capture. */
static int capture_forbids(void)
{
    int capturing = 0;
    for (int i = 0; i < DOUBLE_DEVICES; i++)
        for (int j = 0; j <= DOUBLE_STREAMS; j++)
            capturing |= streams[i][j].capturing;
    return capturing && capture_mode != CU_STREAM_CAPTURE_MODE_RELAXED;
}

/* -1: it is no context that somebody has retained. */
static int device_of_context(CUcontext context)
{
    for (int i = 0; i < state.devices; i++)
        if (context == &state.context[i] && context->retained)
            return i;
    return -1;
}

int double_current(void)
{
    return stack.depth ? device_of_context(stack.context[stack.depth - 1]) : -1;
}

/* The driver's functions. Each logs its name and arguments when it begins and its error when it
 * ends, and holds the mutex between. */

static void write_log(const char *format, va_list arguments)
{
    const size_t length = strlen(state.log);
    const int more = vsnprintf(state.log + length, sizeof state.log - length, format, arguments);
    if (more < 0 || length + (size_t)more >= sizeof state.log)
        abort();
}

__attribute__((format(printf, 1, 2))) static void add_to_log(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    write_log(format, arguments);
    va_end(arguments);
}

/* 0, or the error that the function answers without doing anything. */
__attribute__((format(printf, 3, 4))) static CUresult begin(const char *name, int needs_init,
                                                            const char *format, ...)
{
    va_list arguments;
    pthread_mutex_lock(&mutex);
    add_to_log("%s", name);
    va_start(arguments, format);
    write_log(format, arguments);
    va_end(arguments);
    if (state.nth >= 0 && strcmp(name, state.failing) == 0) {
        const int now = state.nth <= 1;
        if (state.nth > 0)
            state.nth = now ? -1 : state.nth - 1;
        if (now)
            return state.error;
    }
    return needs_init && state.process != getpid() ? NOT_INITIALIZED : 0;
}

static CUresult end(CUresult error)
{
    if (error)
        add_to_log(" = %d", error);
    add_to_log("\n");
    pthread_mutex_unlock(&mutex);
    return error;
}

/* A caller must not look at what a function that failed has left in its result. */
#define BEGIN(result, ...)                                                                         \
    do {                                                                                           \
        memset(result, 0xab, sizeof *(result));                                                    \
        const CUresult refusal = begin(__func__, __VA_ARGS__);                                     \
        if (refusal)                                                                               \
            return end(refusal);                                                                   \
    } while (0)

CUresult cuInit(unsigned flags)
{
    CUresult error = begin(__func__, 0, " %u", flags);
    if (!error && flags)
        error = INVALID_VALUE;
    if (!error && state.process && state.process != getpid())
        error = NOT_INITIALIZED; /* nor can it be after a fork */
    if (!error)
        state.process = getpid();
    return end(error);
}

CUresult cuGetErrorName(CUresult error, const char **name)
{
    *name = NULL;
    for (size_t i = 0; i < sizeof errors / sizeof *errors; i++)
        if (errors[i].error == error)
            *name = errors[i].name;
    return *name ? 0 : INVALID_VALUE;
}

CUresult cuGetErrorString(CUresult error, const char **text)
{
    *text = NULL;
    for (size_t i = 0; i < sizeof errors / sizeof *errors; i++)
        if (errors[i].error == error)
            *text = errors[i].text;
    return *text ? 0 : INVALID_VALUE;
}

CUresult cuDriverGetVersion(int *version)
{
    BEGIN(version, 0, "%s", "");
    *version = state.version;
    return end(0);
}

CUresult cuDeviceGet(CUdevice *device, int ordinal)
{
    BEGIN(device, 1, " %d", ordinal);
    if (ordinal < 0 || ordinal >= state.devices)
        return end(INVALID_DEVICE);
    *device = 1000 + ordinal; /* a handle, not an index */
    return end(0);
}

CUresult cuDeviceGetName(char *name, int size, CUdevice device)
{
    BEGIN(name, 1, " %d", device - 1000);
    if (device < 1000 || device >= 1000 + state.devices || size < 1)
        return end(INVALID_DEVICE);
    snprintf(name, (size_t)size, "Double %d", device - 1000);
    return end(0);
}

CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device)
{
    const int ordinal = device - 1000;
    BEGIN(context, 1, " %d", ordinal);
    if (ordinal < 0 || ordinal >= state.devices)
        return end(INVALID_DEVICE);
    state.context[ordinal].retained++;
    *context = &state.context[ordinal];
    return end(0);
}

CUresult cuCtxPushCurrent_v2(CUcontext context)
{
    const int device = device_of_context(context);
    CUresult error = begin(__func__, 1, " %d", device);
    if (!error && (device < 0 || stack.depth == 16))
        error = INVALID_CONTEXT;
    if (!error)
        stack.context[stack.depth++] = context;
    return end(error);
}

CUresult cuCtxPopCurrent_v2(CUcontext *context)
{
    BEGIN(context, 1, " %d", double_current());
    if (!stack.depth)
        return end(INVALID_CONTEXT);
    *context = stack.context[--stack.depth];
    return end(0);
}

/* The header of a fat binary. What follows it here is the kernels' source (nvcc_double.sh). */
typedef struct fat_binary {
    uint32_t magic;
    uint16_t version, header_size;
    uint64_t size;
    char content[];
} fat_binary;

CUresult cuLibraryLoadData(CUlibrary *library, const void *image, CUjit_option *jit_options,
                           void **jit_values, unsigned jit_count, CUlibraryOption *options,
                           void **values, unsigned count)
{
    const fat_binary *binary = image;
    BEGIN(library, 1, "%s", "");
    if (capture_forbids())
        return end(CAPTURE_UNSUPPORTED);
    if (!image || jit_count || jit_options || jit_values || count || options || values)
        return end(INVALID_VALUE);
    if (binary->magic != 0xba55ed50 || binary->version != 1 || binary->header_size != 16)
        return end(INVALID_IMAGE);
    state.library.image = binary;
    *library = &state.library;
    return end(0);
}

/* Whether the image has the name followed by a bracket or comma. */
static int has_name(const fat_binary *binary, const char *name)
{
    const size_t length = strlen(name);
    for (size_t i = 0; i + length < binary->size; i++)
        if (memcmp(binary->content + i, name, length) == 0 &&
            strchr("(),[", binary->content[i + length]))
            return 1;
    return 0;
}

CUresult cuLibraryGetKernel(CUkernel *kernel, CUlibrary library, const char *name)
{
    BEGIN(kernel, 1, " %s", name);
    if (library != &state.library || !library->image)
        return end(INVALID_HANDLE);
    for (int i = 0; i < LPSGD_CUDA_KERNELS; i++)
        if (strcmp(kernels[i].name, name) == 0 && has_name(library->image, name)) {
            *kernel = &kernels[i];
            return end(0);
        }
    return end(NOT_FOUND);
}

CUresult cuLibraryGetGlobal(CUdeviceptr *pointer, size_t *size, CUlibrary library, const char *name)
{
    const int device = double_current();
    const size_t needed = LPSGD_CUDA_CHECKS * sizeof(lpsgd_cuda_check_memory);
    BEGIN(pointer, 1, " %s", name);
    if (device < 0)
        return end(INVALID_CONTEXT);
    if (library != &state.library || strcmp(name, "lpsgd_cuda_checked") != 0 ||
        !has_name(library->image, name))
        return end(NOT_FOUND);
    if (!state.global[device])
        state.global[device] = allocate(device, needed);
    *pointer = (CUdeviceptr)(uintptr_t)state.global[device];
    *size = needed;
    return end(state.global[device] ? 0 : OUT_OF_MEMORY);
}

static int is_kernel(CUkernel kernel)
{
    return kernel >= kernels && kernel < kernels + LPSGD_CUDA_KERNELS;
}

CUresult cuKernelGetFunction(CUfunction *function, CUkernel kernel)
{
    BEGIN(function, 1, " %s device %d", is_kernel(kernel) ? kernel->name : "?", double_current());
    if (double_current() < 0)
        return end(INVALID_CONTEXT);
    if (!is_kernel(kernel))
        return end(INVALID_HANDLE);
    if (capture_forbids())
        return end(CAPTURE_UNSUPPORTED);
    *function = (CUfunction)kernel;
    return end(0);
}

CUresult cuFuncLoad(CUfunction function)
{
    const CUkernel kernel = (CUkernel)function;
    CUresult error =
        begin(__func__, 1, " %s device %d", is_kernel(kernel) ? kernel->name : "?", double_current());
    if (!error && !is_kernel(kernel))
        error = INVALID_HANDLE;
    if (!error && capture_forbids())
        error = CAPTURE_UNSUPPORTED;
    return end(error);
}

CUresult cuThreadExchangeStreamCaptureMode(CUstreamCaptureMode *mode)
{
    const CUstreamCaptureMode old = capture_mode;
    CUresult error = begin(__func__, 1, " %d", (int)*mode);
    if (!error && *mode != 0 && *mode != CU_STREAM_CAPTURE_MODE_RELAXED)
        error = INVALID_VALUE;
    if (!error) {
        capture_mode = *mode;
        *mode = old;
    }
    return end(error);
}

/* The number of a stream of the device; -1: it is none of its. */
static int number_of_stream(int device, CUstream stream)
{
    if (device >= 0 && state.has_stream[device] && stream == &streams[device][DOUBLE_STREAMS])
        return DOUBLE_STREAMS;
    for (int i = 0; i < DOUBLE_STREAMS && device >= 0; i++)
        if (stream == double_stream(device, i))
            return i;
    return -1;
}

CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status)
{
    const int device = double_current(), number = number_of_stream(device, stream);
    BEGIN(status, 1, " device %d stream %d", device, number);
    if (number < 0)
        return end(INVALID_HANDLE);
    for (int i = 1; i < DOUBLE_STREAMS && !number; i++)
        if (streams[device][i].capturing)
            return end(CAPTURE_IMPLICIT);
    *status = streams[device][number].capturing;
    return end(0);
}

/* One at a time for a device. */
CUresult cuStreamCreate(CUstream *stream, unsigned flags)
{
    const int device = double_current();
    BEGIN(stream, 1, " device %d flags %u", device, flags);
    if (device < 0 || state.has_stream[device])
        return end(INVALID_CONTEXT);
    if (capture_forbids())
        return end(CAPTURE_UNSUPPORTED);
    state.has_stream[device] = 1;
    *stream = &streams[device][DOUBLE_STREAMS];
    return end(0);
}

CUresult cuStreamDestroy_v2(CUstream stream)
{
    const int device = double_current();
    CUresult error = begin(__func__, 1, " device %d", device);
    if (!error && number_of_stream(device, stream) != DOUBLE_STREAMS)
        error = INVALID_HANDLE;
    if (device >= 0)
        state.has_stream[device] = 0;
    return end(error);
}

CUresult cuStreamSynchronize(CUstream stream)
{
    const int device = double_current(), number = number_of_stream(device, stream);
    CUresult error = begin(__func__, 1, " device %d stream %d", device, number);
    if (!error && number < 0)
        error = INVALID_HANDLE;
    if (!error && (streams[device][number].capturing || capture_forbids()))
        error = CAPTURE_UNSUPPORTED;
    return end(error);
}

/* Where the host finds memory of the device, or its own; NULL: it is another device's, or too short. */
static void *memory_of(int device, CUdeviceptr pointer, size_t size)
{
    void *const at = (void *)(uintptr_t)pointer;
    if (double_device_of(at) < 0)
        return at;
    const int fits = double_device_of((unsigned char *)at + size - 1) == device;
    return fits && double_device_of(at) == device ? double_host(at) : NULL;
}

CUresult cuMemcpyAsync(CUdeviceptr to, CUdeviceptr from, size_t size, CUstream stream)
{
    const int device = double_current(), number = number_of_stream(device, stream);
    void *const target = memory_of(device, to, size), *const source = memory_of(device, from, size);
    CUresult error = begin(__func__, 1, " device %d stream %d", device, number);
    if (!error && number < 0)
        error = INVALID_HANDLE;
    if (!error && (!target || !source || !size))
        error = INVALID_VALUE;
    if (!error && capture_forbids())
        error = CAPTURE_UNSUPPORTED;
    if (!error && state.run)
        memcpy(target, source, size);
    return end(error);
}

/* Turns a kernel's pointer to `size` bytes into the host's. 0 or the error. */
static CUresult translate(int device, void *pointer_to_pointer, int64_t size, int alignment)
{
    unsigned char *pointer;
    memcpy(&pointer, pointer_to_pointer, sizeof pointer);
    const uintptr_t offset = (uintptr_t)pointer - (uintptr_t)memory;
    if (!pointer)
        return 0;
    if (double_device_of(pointer) != device || size > DOUBLE_MEMORY ||
        offset % DOUBLE_MEMORY + (uintptr_t)size > DOUBLE_MEMORY)
        return ILLEGAL_ADDRESS;
    if (offset % (uintptr_t)alignment)
        return MISALIGNED_ADDRESS;
    pointer = double_host(pointer);
    memcpy(pointer_to_pointer, &pointer, sizeof pointer);
    return 0;
}

static CUresult run_fold(int device, const void *arguments)
{
    lpsgd_cuda_fold_arguments a;
    memcpy(&a, arguments, sizeof a);
    lpsgd_device_number *const numbers[] = {&a.lr, &a.p, &a.weight_decay, &a.grad_scale,
                                            &a.found_inf};
    CUresult error = translate(device, &a.result, sizeof *a.result, 8);
    for (int i = 0; i < 5 && !error; i++) {
        const int size = format_of(numbers[i]->dtype).size;
        error = translate(device, &numbers[i]->pointer, size, size);
    }
    if (!error)
        lpsgd_cuda_fold(&a);
    if (!error && strcmp(state.wrong, kernels[LPSGD_CUDA_FOLD].name) == 0)
        a.result->k.step_size *= 1.0f + 0x1p-23f;
    return error;
}

/* What a step's kernel does; of the wrong one, with a bit of the first momentum buffer turned round. */
static CUresult run_step(int device, CUkernel kernel, const void *arguments, unsigned blocks,
                         unsigned threads)
{
    static lpsgd_cuda_step_arguments a; /* the mutex is held */
    memset(&a, 0xab, sizeof a);
    memcpy(&a, arguments, kernel->arguments);
    CUresult error = translate(device, &a.common.device_scalars, sizeof(lpsgd_cuda_scalars), 8);
    for (int64_t i = 0; i < a.common.count && !error; i++) {
        lpsgd_cuda_tensor *t = &a.tensor[i];
        const int64_t size = t->numel * kernel->param_size;
        error = translate(device, &t->param, size, kernel->param_size);
        if (!error)
            error = translate(device, &t->grad, size, kernel->param_size);
        if (!error)
            error = translate(device, &t->momentum_buffer, t->numel * kernel->momentum_size,
                              kernel->momentum_size);
    }
    for (unsigned block = 0; block < blocks && !error; block++)
        run_block(&a, kernel->thread, block, blocks, (int)threads);
    if (!error && strcmp(kernel->name, state.wrong) == 0 && a.tensor[0].momentum_buffer)
        *(unsigned char *)a.tensor[0].momentum_buffer ^= 1;
    return error;
}

CUresult cuLaunchKernel(CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                        unsigned block_x, unsigned block_y, unsigned block_z, unsigned shared_bytes,
                        CUstream stream, void **arguments, void **extra)
{
    const CUkernel kernel = (CUkernel)function;
    const int device = double_current(), number = number_of_stream(device, stream);
    const int known = is_kernel(kernel);
    const CUresult refusal =
        begin(__func__, 1, " %s device %d stream %d grid %u %u %u block %u %u %u shared %u",
              known ? kernel->name : "?", device, number, grid_x, grid_y, grid_z, block_x, block_y,
              block_z, shared_bytes);
    if (refusal)
        return end(refusal);
    if (device < 0)
        return end(INVALID_CONTEXT);
    if (!known || number < 0)
        return end(INVALID_HANDLE);
    const uint64_t threads = (uint64_t)block_x * block_y * block_z;
    if (!arguments || !arguments[0] || extra || !threads || threads > LPSGD_CUDA_THREADS ||
        !grid_x || !grid_y || !grid_z || grid_x > INT32_MAX || grid_y > 65535 || grid_z > 65535 ||
        shared_bytes > 48 * 1024)
        return end(INVALID_VALUE);
    if (!state.run || streams[device][number].capturing)
        return end(0);
    return end(kernel->thread ? run_step(device, kernel, arguments[0], grid_x, block_x)
                              : run_fold(device, arguments[0]));
}
