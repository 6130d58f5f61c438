/* SPDX-License-Identifier: MIT
 *
 * lpsgd_cpu.c: the list driver: checks, choice of the instruction set, threads.
 */
#include "lpsgd_internal.h"

#ifdef __x86_64__
#include <cpuid.h>
#endif
#include <pthread.h>
#include <stddef.h>
#include <stdlib.h>
#ifdef _OPENMP
#include <omp.h>
#endif

/* Chosen once, at the first step or query. */
static struct {
    pthread_once_t once;
    const char *capability;
    lpsgd_kernel *kernel;
    int forked; /* an OpenMP region could hang in this process */
} process = {PTHREAD_ONCE_INIT, NULL, NULL, 0};

#ifndef _WIN32 /* which has no fork */
static void in_forked_child(void)
{
    process.forked = 1;
}

/* When the library is loaded, not at its first call: the fork may come before that. */
__attribute__((constructor)) static void watch_forks(void)
{
    pthread_atfork(NULL, NULL, in_forked_child);
}
#endif

#ifdef __x86_64__
/* Whether the CPU has them all, and the system saves the registers `saved`. By hand, since what is
 * behind __builtin_cpu_supports differs: zig's runtime library denies everything. */
static int cpu_has(unsigned features1, unsigned features7, unsigned saved)
{
    unsigned a, b, c, d, low, high;
    features1 |= bit_OSXSAVE;
    if (!__get_cpuid(1, &a, &b, &c, &d) || (c & features1) != features1)
        return 0;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (low & saved) == saved && __get_cpuid_count(7, 0, &a, &b, &c, &d) &&
           (b & features7) == features7;
}
#endif

static void choose(void)
{
    process.capability = "default";
    process.kernel = lpsgd_kernel_default;
#ifdef __x86_64__
    const char *limit = getenv("LPSGD_CPU_CAPABILITY");
    const int no_avx2 = limit && strcmp(limit, "default") == 0;
    const int no_avx512 = no_avx2 || (limit && strcmp(limit, "avx2") == 0);
    const unsigned avx = bit_AVX | bit_FMA | bit_F16C, ymm = 0x6, zmm = 0xe6; /* of XCR0 */
    const unsigned avx512 = bit_AVX512F | bit_AVX512BW | bit_AVX512CD | bit_AVX512DQ | bit_AVX512VL;
    if (!no_avx2 && cpu_has(avx, bit_AVX2, ymm)) {
        process.capability = "avx2";
        process.kernel = lpsgd_kernel_avx2;
        if (!no_avx512 && cpu_has(avx, avx512, zmm)) {
            process.capability = "avx512";
            process.kernel = lpsgd_kernel_avx512;
        }
    }
#endif
}

const char *lpsgd_cpu_capability(void)
{
    pthread_once(&process.once, choose);
    return process.capability;
}

int lpsgd_has_openmp(void)
{
#ifdef _OPENMP
    return 1;
#else
    return 0;
#endif
}

int64_t lpsgd_itemsize(lpsgd_dtype dtype)
{
    switch (dtype) {
    case LPSGD_FLOAT32:
        return 4;
    case LPSGD_FLOAT64:
        return 8;
    case LPSGD_BFLOAT16:
    case LPSGD_FLOAT16:
        return 2;
    case LPSGD_FLOAT8_E5M2:
        return 1;
    }
    return 0;
}

/* Whether a parameter of dtype may have a momentum_buffer of momentum_dtype. */
static int goes_with(lpsgd_dtype dtype, lpsgd_dtype momentum_dtype)
{
    switch (momentum_dtype) {
    case LPSGD_FLOAT32:
    case LPSGD_BFLOAT16:
    case LPSGD_FLOAT8_E5M2:
        return dtype != LPSGD_FLOAT64;
    case LPSGD_FLOAT64:
    case LPSGD_FLOAT16:
        return dtype == momentum_dtype;
    }
    return 0;
}

lpsgd_status lpsgd_check_list(const lpsgd_buffer *list, int64_t count, lpsgd_dtype dtype,
                              int has_momentum, const lpsgd_scalars *k, int64_t *total)
{
    const int64_t size = lpsgd_itemsize(dtype), momentum_size = lpsgd_itemsize(k->momentum_dtype);
    const int64_t most = has_momentum && momentum_size > size ? momentum_size : size;
    if (!size || dtype == LPSGD_FLOAT8_E5M2 || (has_momentum && !goes_with(dtype, k->momentum_dtype)))
        return LPSGD_ERROR_DTYPE;
    if (count < 0)
        return LPSGD_ERROR_NUMEL;
    if (count && !list)
        return LPSGD_ERROR_NULL;
    *total = 0;
    for (int64_t i = 0; i < count; i++) {
        const lpsgd_buffer *b = &list[i];
        if (b->numel < 0 || b->numel > INT64_MAX / most - *total)
            return LPSGD_ERROR_NUMEL;
        *total += b->numel;
        if (!b->numel)
            continue;
        if (!b->param || !b->grad || (has_momentum && !b->momentum_buffer))
            return LPSGD_ERROR_NULL;
        if (((uintptr_t)b->param | (uintptr_t)b->grad) % (uintptr_t)size ||
            (has_momentum && (uintptr_t)b->momentum_buffer % (uintptr_t)momentum_size))
            return LPSGD_ERROR_ALIGNMENT;
    }
    return LPSGD_OK;
}

/* Steps the elements [low, high) of the list laid end to end. */
static void step_range(const lpsgd_buffer *list, int64_t low, int64_t high, lpsgd_dtype dtype,
                       int has_momentum, const lpsgd_scalars *k)
{
    const int64_t size = lpsgd_itemsize(dtype), momentum_size = lpsgd_itemsize(k->momentum_dtype);
    int64_t first = 0; /* of *list, end to end */
    for (; first < high; first += list->numel, list++) {
        const int64_t from = low > first ? low - first : 0;
        const int64_t to = high - first < list->numel ? high - first : list->numel;
        if (from >= to)
            continue;
        const lpsgd_buffer piece = {
            .param = (char *)list->param + from * size,
            .grad = (const char *)list->grad + from * size,
            .momentum_buffer =
                has_momentum ? (char *)list->momentum_buffer + from * momentum_size : NULL,
            .numel = to - from,
            .stream = list->stream,
            .index = list->index + (uint64_t)from,
        };
        process.kernel(&piece, dtype, k);
    }
}

/* How many threads are worth their start: a thread gets at least this many elements. */
static int useful_threads(int64_t total, lpsgd_dtype dtype, const lpsgd_scalars *k, int num_threads)
{
#ifdef _OPENMP
    const int slow = dtype == LPSGD_FLOAT64 && k->rule == LPSGD_RULE_POWER;
    const int64_t share = slow ? 1024 : 16384;
    const int64_t most = num_threads > 0 ? num_threads : omp_get_max_threads();
    if (process.forked || total / share < 2)
        return 1;
    return (int)(total / share < most ? total / share : most);
#else
    (void)total, (void)dtype, (void)k, (void)num_threads;
    return 1;
#endif
}

/* One parallel region per step, over equal element ranges of the whole list. Range boundaries are
 * multiples of 64 elements, so that threads meet inside a cache line only at the ends of buffers. */
static lpsgd_status step(const lpsgd_buffer *list, int64_t count, lpsgd_dtype dtype,
                         const lpsgd_hyper *hyper, int num_threads, int has_momentum)
{
    lpsgd_scalars k;
    int64_t total;
    lpsgd_status status = lpsgd_fold(hyper, has_momentum, &k);
    if (status == LPSGD_OK)
        status = lpsgd_check_list(list, count, dtype, has_momentum, &k, &total);
    if (status != LPSGD_OK)
        return status;

    pthread_once(&process.once, choose);
    const int threads = useful_threads(total, dtype, &k, num_threads);
    if (threads == 1) {
        step_range(list, 0, total, dtype, has_momentum, &k);
        return LPSGD_OK;
    }
    const int64_t share = (total / threads + 63) & ~INT64_C(63);
#ifdef _OPENMP
#pragma omp parallel for num_threads(threads) schedule(static, 1)
#endif
    for (int t = 0; t < threads; t++) {
        const int64_t low = t * share < total ? t * share : total;
        const int64_t high = t + 1 < threads && low + share < total ? low + share : total;
        step_range(list, low, high, dtype, has_momentum, &k);
    }
    return LPSGD_OK;
}

lpsgd_status lpsgd_step(const lpsgd_buffer *list, int64_t count, lpsgd_dtype dtype,
                        const lpsgd_hyper *hyper, int num_threads)
{
    return step(list, count, dtype, hyper, num_threads, 0);
}

lpsgd_status lpsgdm_step(const lpsgd_buffer *list, int64_t count, lpsgd_dtype dtype,
                         const lpsgd_hyper *hyper, int num_threads)
{
    return step(list, count, dtype, hyper, num_threads, 1);
}
