/* SPDX-License-Identifier: MIT
 *
 * test_cuda.c: the host side of CUDA steps against a double of the driver (cuda_double.h).
 */
#include "cuda_double.h"
#include "helpers.h"

#include <limits.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>
#include <dlfcn.h>
#include <sys/wait.h>
#include <unistd.h>

/* lpsgd_cuda.c is part of this file so that tests can make it forget what it has loaded. */
static const char *missing = ""; /* the function that the driver does not have */

static void *find_symbol(void *handle, const char *name)
{
    return strcmp(name, missing) ? dlsym(handle, name) : NULL;
}

#define dlsym find_symbol
#include "lpsgd_cuda.c"
#undef dlsym

/* The library and the driver as in a new process. */
static void start_anew(int devices)
{
    memset(&driver, 0, sizeof driver);
    memset(&loaded, 0, sizeof loaded);
    driver.once = (pthread_once_t)PTHREAD_ONCE_INIT;
    loaded.mutex = (pthread_mutex_t)PTHREAD_MUTEX_INITIALIZER;
    missing = "";
    unsetenv("LPSGD_CUDA_CHECK");
    double_reset(devices);
}

/* After the first call on a device, which loads and checks its kernels. */
static void start_ready(int devices)
{
    start_anew(devices);
    for (int i = 0; i < devices; i++)
        assert_int_equal(lpsgd_cuda_prepare(i, NULL, NULL), LPSGD_OK);
    double_forget();
}

/* The driver's log without the check's launches. */
static const char *log_but_checks(void)
{
    static char log[1 << 18];
    const char *line = double_log();
    char *to = log;
    while (*line) {
        const size_t length = (size_t)(strchr(line, '\n') - line) + 1;
        char text[256] = "";
        memcpy(text, line, length);
        if (!strstr(text, "cuLaunchKernel") || !strstr(text, "stream 4 "))
            to = (char *)memcpy(to, line, length) + length;
        line += length;
    }
    *to = 0;
    return log;
}

/* Puts a format and its arguments at the end of a text of TEXT bytes. */
#define APPEND(text, ...) snprintf(text + strlen(text), TEXT - strlen(text), __VA_ARGS__)
enum { TEXT = 1 << 13 };

/* How often a text occurs in the driver's log. */
static int count_calls(const char *text)
{
    int count = 0;
    for (const char *at = double_log(); (at = strstr(at, text)) != NULL; at++)
        count++;
    return count;
}

/* A copy of the list in a device's memory: `memory` is where the host finds it. */
static test_list copy_to_device(const test_list *from, int device)
{
    test_list list = copy_list(from);
    unsigned char *memory = double_allocate(device, list.size);
    assert_non_null(memory);
    for (int64_t i = 0; i < list.count; i++) {
        lpsgd_buffer *b = &list.buffers[i];
        b->param = memory + ((unsigned char *)b->param - list.memory);
        b->grad = memory + ((const unsigned char *)b->grad - list.memory);
        b->momentum_buffer = memory + ((unsigned char *)b->momentum_buffer - list.memory);
    }
    memcpy(double_host(memory), list.memory, list.size);
    free(list.memory);
    list.memory = double_host(memory);
    return list;
}

static void free_device_list(test_list *list)
{
    free(list->buffers);
}

static lpsgd_status cuda_step_list(test_list *list, const lpsgd_hyper *hyper, int has_momentum,
                                   const lpsgd_cuda_target *target)
{
    lpsgd_hyper of_kind = *hyper;
    of_kind.momentum_dtype = list->kind.momentum_dtype;
    return (has_momentum ? lpsgdm_cuda_step : lpsgd_cuda_step)(
        list->buffers, list->count, list->kind.dtype, &of_kind, target);
}

static void assert_list_is_the_cpus(const test_list *list, const test_list *start,
                                    const lpsgd_hyper *hyper, int has_momentum)
{
    test_list expected = copy_list(start);
    assert_int_equal(step_list(&expected, hyper, has_momentum, 1), LPSGD_OK);
    assert_true(same_list(list, &expected));
    free_list(&expected);
}

static const int64_t sizes[] = {5000, 0, 1, 37};

static test_list some_list(test_kind kind)
{
    return make_list(kind, sizes, 4, 0, 1);
}

/* A number in device memory. */
static lpsgd_device_number device_number(int device, lpsgd_dtype dtype, uint64_t bits)
{
    void *pointer = double_allocate(device, 8);
    store_bits(double_host(pointer), format_of(dtype), 0, bits);
    return (lpsgd_device_number){pointer, dtype};
}

/* Calls. */

static void test_nothing_of_the_driver_is_called_before_a_step(void **state)
{
    (void)state;
    start_anew(1);
    assert_int_equal(lpsgd_cuda_version(), 13000);
    assert_string_equal(lpsgd_cuda_architectures(), "sm_90");
    assert_string_equal(lpsgd_cuda_error(), "no error");
    assert_int_equal(lpsgd_cuda_scratch_size(), sizeof(lpsgd_cuda_scalars));
    assert_string_equal(double_log(), "");
}

/* The calls that load a device's kernels and check them, for a step on a stream. */
static void append_once_for_a_device(char *text, int device, int stream)
{
    APPEND(text, "cuCtxPushCurrent_v2 %d\n", device);
    for (int i = 0; i < LPSGD_CUDA_KERNELS; i++)
        APPEND(text, "cuKernelGetFunction %s device %d\ncuFuncLoad %s device %d\n", kernel_names[i], device,
             kernel_names[i], device);
    APPEND(text, "cuStreamIsCapturing device %d stream %d\n", device, stream);
    APPEND(text, "cuLibraryGetGlobal lpsgd_cuda_checked\n");
    APPEND(text, "cuStreamCreate device %d flags 1\n", device);
    APPEND(text, "cuMemcpyAsync device %d stream 4\ncuMemcpyAsync device %d stream 4\n", device, device);
    APPEND(text, "cuStreamSynchronize device %d stream 4\ncuStreamDestroy_v2 device %d\n", device, device);
    APPEND(text, "cuCtxPopCurrent_v2 %d\ncuThreadExchangeStreamCaptureMode 0\n", device);
}

static void test_calls_are_these_and_what_is_loaded_stays(void **state)
{
    (void)state;
    start_anew(2);
    test_list start = some_list(kinds[0]);
    test_list list = copy_to_device(&start, 1), other = copy_to_device(&start, 0);
    const lpsgd_cuda_target target = {.device = 1, .stream = double_stream(1, 2)};
    assert_int_equal(cuda_step_list(&list, &usual, 1, &target), LPSGD_OK);
    char expected[TEXT] = "cuInit 0\n"
                          "cuDriverGetVersion\n"
                          "cuThreadExchangeStreamCaptureMode 2\n"
                          "cuDeviceGet 1\n"
                          "cuDevicePrimaryCtxRetain 1\n"
                          "cuLibraryLoadData\n";
    for (int i = 0; i < LPSGD_CUDA_KERNELS; i++)
        APPEND(expected, "cuLibraryGetKernel %s\n", kernel_names[i]);
    append_once_for_a_device(expected, 1, 2);
    static const char step[] = "cuCtxPushCurrent_v2 1\n"
                               "cuLaunchKernel lpsgd_cuda_float32_few device 1 stream 2"
                               " grid 4 1 1 block 256 1 1 shared 0\n"
                               "cuCtxPopCurrent_v2 1\n";
    APPEND(expected, "%s", step);
    assert_string_equal(log_but_checks(), expected);
    double_forget();
    assert_int_equal(cuda_step_list(&list, &usual, 0, &target), LPSGD_OK);
    assert_string_equal(double_log(), step);
    double_forget();
    const lpsgd_cuda_target first = {.device = 0,
                                     .lr = device_number(0, LPSGD_FLOAT64, 0),
                                     .scratch = double_allocate(0, sizeof(lpsgd_cuda_scalars))};
    assert_int_equal(cuda_step_list(&other, &usual, 0, &first), LPSGD_OK);
    char later[TEXT] = "cuThreadExchangeStreamCaptureMode 2\n"
                           "cuDeviceGet 0\n"
                           "cuDevicePrimaryCtxRetain 0\n";
    append_once_for_a_device(later, 0, 0);
    APPEND(later, "cuCtxPushCurrent_v2 0\n"
                   "cuLaunchKernel lpsgd_cuda_fold_scalars device 0 stream 0"
                   " grid 1 1 1 block 1 1 1 shared 0\n"
                   "cuLaunchKernel lpsgd_cuda_float32_few device 0 stream 0"
                   " grid 4 1 1 block 256 1 1 shared 0\n"
                   "cuCtxPopCurrent_v2 0\n");
    assert_string_equal(log_but_checks(), later);
    free_device_list(&list);
    free_device_list(&other);
    free_list(&start);
}

static void test_arguments_out_of_range_do_not_reach_the_driver(void **state)
{
    (void)state;
    start_anew(1);
    test_list start = some_list(kinds[0]);
    test_list list = copy_to_device(&start, 0);
    lpsgd_cuda_target target = {.device = 0};
    lpsgd_hyper hyper = usual;
    hyper.lr = -1.0;
    assert_int_equal(cuda_step_list(&list, &hyper, 1, &target), LPSGD_ERROR_LR);
    list.buffers[2].param = NULL;
    assert_int_equal(cuda_step_list(&list, &usual, 1, &target), LPSGD_ERROR_NULL);
    list.buffers[2].numel = 0;
    target.found_inf = device_number(0, LPSGD_FLOAT32, 0); /* without scratch */
    assert_int_equal(cuda_step_list(&list, &usual, 1, &target), LPSGD_ERROR_NULL);
    assert_string_equal(double_log(), "");
    free_device_list(&list);
    free_list(&start);
}

static void test_lists_without_elements_launch_nothing(void **state)
{
    (void)state;
    start_ready(1);
    static const int64_t none[] = {0, 0};
    test_list start = make_list(kinds[0], none, 2, 0, 1);
    test_list list = copy_to_device(&start, 0);
    const lpsgd_cuda_target target = {.device = 0};
    for (list.count = 0; list.count <= 2; list.count += 2)
        assert_int_equal(cuda_step_list(&list, &usual, 1, &target), LPSGD_OK);
    assert_int_equal(count_calls("cuCtx"), 0);
    assert_int_equal(count_calls("cuLaunchKernel"), 0);
    free_device_list(&list);
    free_list(&start);
}

/* Steps. */

static void test_every_kind_has_the_cpus_bits(void **state)
{
    (void)state;
    for (int d = 0; d < kind_count; d++) {
        test_list start = some_list(kinds[d]);
        for (int i = d % 2; i < 2 * hyper_count; i += 11) {
            const lpsgd_hyper hyper = hyper_number(i / 2);
            const lpsgd_cuda_target target = {.device = i % 2, .stream = double_stream(i % 2, i % 3)};
            start_ready(2);
            test_list list = copy_to_device(&start, i % 2);
            assert_int_equal(cuda_step_list(&list, &hyper, i % 4 / 2, &target), LPSGD_OK);
            assert_list_is_the_cpus(&list, &start, &hyper, i % 4 / 2);
            free_device_list(&list);
        }
        free_list(&start);
    }
}

/* Empty buffers take no place in a launch. The last one may be of a kernel for few buffers. */
static void test_a_launch_takes_500_buffers(void **state)
{
    (void)state;
    enum { most = 1503 };
    enum { few = LPSGD_CUDA_FEW };
    static const int64_t counts[] = {1,   few - 1,   few,           few + 1, 499,  500,
                                     501, 500 + few, 500 + few + 1, 1000,    1001, most};
    static int64_t numel[most];
    for (int i = 0; i < 12; i++) {
        int64_t full = 0;
        start_ready(1);
        for (int64_t j = 0; j < counts[i]; j++)
            full += (numel[j] = i < 10 ? 3 : j % 3) != 0;
        const int64_t last = full % 500;
        test_list start = make_list(kinds[0], numel, counts[i], 0, 2);
        test_list list = copy_to_device(&start, 0);
        const lpsgd_cuda_target target = {.device = 0};
        assert_int_equal(cuda_step_list(&list, &usual, 1, &target), LPSGD_OK);
        assert_int_equal(count_calls("cuLaunchKernel"), (full + 499) / 500);
        assert_int_equal(count_calls("lpsgd_cuda_float32_few"), 0 < last && last <= few);
        assert_int_equal(count_calls("cuCtxPushCurrent_v2"), 1);
        assert_list_is_the_cpus(&list, &start, &usual, 1);
        free_device_list(&list);
        free_list(&start);
    }
}

/* The buffers' memory is not looked at. */
static void test_grids_stay_within_the_drivers_limit(void **state)
{
    (void)state;
    start_ready(1);
    double_run(0);
    static const struct {
        int64_t numel;
        const char *grid;
    } cases[] = {
        {4096 * (int64_t)INT32_MAX, "grid 2147483647 1 1 block 256 1 1"},
        {4096 * (int64_t)INT32_MAX + 1, "grid 2147483647 1 1 block 256 1 1"},
        {4096 * (int64_t)INT32_MAX - 4096, "grid 2147483646 1 1 block 256 1 1"},
        {INT64_C(1) << 58, "grid 2147483647 1 1 block 256 1 1"},
    };
    char *memory = double_allocate(0, 48);
    for (int i = 0; i < 4; i++) {
        const lpsgd_buffer buffer = {memory, memory + 16, memory + 32, cases[i].numel, 0, 0};
        const lpsgd_cuda_target target = {.device = 0};
        double_forget();
        assert_int_equal(lpsgdm_cuda_step(&buffer, 1, LPSGD_FLOAT32, &usual, &target), LPSGD_OK);
        assert_int_equal(count_calls(cases[i].grid), 1);
    }
}

static void test_numbers_in_device_memory_take_the_place_of_the_hosts(void **state)
{
    (void)state;
    /* 0.0078125, 5, 0.125, 1024 and 0 in each dtype. */
    static const double values[] = {0.0078125, 5.0, 0.125, 1024.0, 0.0};
    static const uint64_t bits[][5] = {
        [LPSGD_FLOAT32] = {0x3c000000, 0x40a00000, 0x3e000000, 0x44800000, 0},
        [LPSGD_FLOAT64] = {0x3f80000000000000, 0x4014000000000000, 0x3fc0000000000000,
                           0x4090000000000000, 0},
        [LPSGD_BFLOAT16] = {0x3c00, 0x40a0, 0x3e00, 0x4480, 0},
        [LPSGD_FLOAT16] = {0x2000, 0x4500, 0x3000, 0x6400, 0},
    };
    test_list start = some_list(kinds[2]);
    for (int dtype = 0; dtype < 4; dtype++)
        for (int mask = 1; mask < 32; mask++) {
            start_ready(1);
            lpsgd_cuda_target target = {.device = 0, .stream = double_stream(0, 1)};
            lpsgd_hyper hyper = usual, given = usual;
            lpsgd_device_number *const places[] = {&target.lr, &target.p, &target.weight_decay,
                                                   &target.grad_scale, &target.found_inf};
            double *const expected[] = {&hyper.lr, &hyper.p, &hyper.weight_decay,
                                        &hyper.grad_scale};
            target.scratch = double_allocate(0, (size_t)lpsgd_cuda_scratch_size());
            for (int i = 0; i < 5; i++)
                if (mask >> i & 1) {
                    *places[i] = device_number(0, (lpsgd_dtype)dtype, bits[dtype][i]);
                    if (i < 4)
                        *expected[i] = values[i];
                }
            test_list list = copy_to_device(&start, 0);
            assert_int_equal(cuda_step_list(&list, &given, 1, &target), LPSGD_OK);
            assert_list_is_the_cpus(&list, &start, &hyper, 1);
            assert_int_equal(count_calls("lpsgd_cuda_fold_scalars device 0 stream 1"), 1);

            /* found_inf */
            test_list before = copy_to_device(&start, 0);
            target.found_inf = device_number(0, (lpsgd_dtype)dtype, bits[dtype][0]);
            assert_int_equal(cuda_step_list(&before, &given, 1, &target), LPSGD_OK);
            assert_true(same_list(&before, &start));
            free_device_list(&before);
            free_device_list(&list);
        }
    free_list(&start);
}

static void test_the_callers_context_is_current_again(void **state)
{
    (void)state;
    test_list start = some_list(kinds[0]);
    for (int i = 0; i < 8; i++) {
        const int was = i % 4 - 1, fails = i / 4; /* none, another's, the same, another's */
        CUdevice device;
        CUcontext context;
        start_anew(3);
        if (was >= 0) {
            assert_int_equal(cuInit(0), 0);
            assert_int_equal(cuDeviceGet(&device, was), 0);
            assert_int_equal(cuDevicePrimaryCtxRetain(&context, device), 0);
            assert_int_equal(cuCtxPushCurrent_v2(context), 0);
        }
        assert_int_equal(lpsgd_cuda_prepare(1, NULL, NULL), LPSGD_OK);
        assert_int_equal(double_current(), was);
        if (fails)
            double_fail("cuLaunchKernel", 1, 719);
        test_list list = copy_to_device(&start, 1);
        const lpsgd_cuda_target target = {.device = 1, .stream = double_stream(1, 1)};
        assert_int_equal(cuda_step_list(&list, &usual, 1, &target),
                         fails ? LPSGD_ERROR_CUDA : LPSGD_OK);
        assert_int_equal(double_current(), was);
        assert_int_equal(count_calls("device 1 stream 1"), 1);
        free_device_list(&list);
    }
    free_list(&start);
}

static void assert_error(const char *name, const char *words)
{
    char expected[256];
    snprintf(expected, sizeof expected, "%s: %s", name, words);
    assert_string_equal(lpsgd_cuda_error(), expected);
}

/* The check. */

/* Without momentum, where x is the gradient: all of the small tables are looked up, and half of the large
 * one at least, and elements need every kind of care. */
static void test_the_check_has_elements_for_all_of_the_power(void **state)
{
    (void)state;
    static const lpsgd_dtype wide[] = {LPSGD_FLOAT32, LPSGD_BFLOAT16};
    for (int w = 0; w < 2; w++) {
        const float_format f = format_of(wide[w]);
        uint32_t coarse = 0, fine = 0, eighth = 0, subnormal = 0;
        int zero = 0, small_power = 0;
        for (int i = 0; i < LPSGD_CUDA_CHECKS; i++) {
            lpsgd_cuda_check_memory memory;
            const lpsgd_cuda_check check = lpsgd_cuda_check_number(i, &memory);
            lpsgd_scalars k;
            assert_int_equal(lpsgd_fold(&check.hyper, check.has_momentum, &k), LPSGD_OK);
            lpsgd_cuda_check_fill(i, &memory);
            if (check.dtype != wide[w] || k.rule != LPSGD_RULE_POWER || check.found_inf ||
                check.has_momentum)
                continue;
            for (int j = 0; j < LPSGD_CUDA_CHECK_NUMEL; j++) {
                const uint32_t x = (uint32_t)load_bits(memory.grad, f, j) << (32 - 8 * f.size);
                const float y = fabsf(lpsgd_float((int32_t)x)) + k.eps;
                const uint32_t bits = (uint32_t)lpsgd_bits(y);
                zero |= y == 0.0f;
                if (y != 0.0f && bits < 0x00800000)
                    subnormal |= 1u << (lpsgd_bits(y * 0x1p24f) >> 26 & 3);
                small_power |= lpsgd_power(y, &k.tables, &k).after != 1.0f;
                coarse |= 1u << (bits >> 26);
                fine |= 1u << (bits >> 23 & 7);
                eighth |= 1u << (bits >> 20 & 7);
            }
        }
        assert_true(zero && small_power && fine == 0xff && eighth == 0xff);
        assert_true(subnormal == 0xf || (w && subnormal & 8)); /* bfloat16 has few of them */
        assert_true(__builtin_popcount(coarse) >= 16);
    }
}

static void test_a_kernel_whose_bits_differ_is_refused_for_good(void **state)
{
    (void)state;
    test_list start = some_list(kinds[0]);
    for (int i = 0; i < LPSGD_CUDA_KERNELS; i++) {
        char words[256], error[sizeof error_text];
        start_anew(2);
        double_wrong(kernel_names[i]);
        test_list list = copy_to_device(&start, 0), other = copy_to_device(&start, 1);
        const lpsgd_cuda_target target = {.device = 0}, second = {.device = 1};
        assert_int_equal(cuda_step_list(&list, &usual, 1, &target), LPSGD_ERROR_CUDA);
        snprintf(error, sizeof error, "%s", lpsgd_cuda_error());
        snprintf(words, sizeof words, "its kernels differ from the CPU's: after a step of %s (p = ",
                 i == LPSGD_CUDA_FOLD ? "lpsgd_cuda_float32" : kernel_names[i]);
        assert_ptr_equal(strstr(error, words), error);
        if (i == LPSGD_CUDA_FOLD)
            assert_non_null(strstr(error, ", numbers on the GPU) element "));
        assert_non_null(strstr(error, i == LPSGD_CUDA_FOLD ? ") element 0 of param is 0x"
                                                           : ") element 0 of momentum_buffer is 0x"));
        assert_non_null(strstr(error, ". Please report this: Double 0, driver of CUDA 13.0, lpsgd "
                                      LPSGD_VERSION " of CUDA 13.0 for sm_90"));
        assert_true(double_is_left_as_found());

        /* Another device is none of its business, and a kernel that is right again none either. */
        double_wrong("");
        double_forget();
        assert_int_equal(cuda_step_list(&list, &usual, 1, &target), LPSGD_ERROR_CUDA);
        assert_string_equal(lpsgd_cuda_error(), error);
        assert_string_equal(double_log(), "");
        assert_true(same_list(&list, &start));
        assert_int_equal(cuda_step_list(&other, &usual, 1, &second), LPSGD_OK);
        assert_list_is_the_cpus(&other, &start, &usual, 1);
        free_device_list(&list);
        free_device_list(&other);
    }
    free_list(&start);
}

static void test_the_environment_leaves_the_check_out(void **state)
{
    (void)state;
    for (int i = 0; i < 2; i++) {
        start_anew(1);
        double_wrong("lpsgd_cuda_float64");
        assert_int_equal(setenv("LPSGD_CUDA_CHECK", i ? "1" : "0", 1), 0);
        assert_int_equal(lpsgd_cuda_prepare(0, NULL, NULL), i ? LPSGD_ERROR_CUDA : LPSGD_OK);
        assert_int_equal(count_calls("cuFuncLoad"), LPSGD_CUDA_KERNELS);
        assert_int_equal(count_calls("cuLaunchKernel") != 0, i);
    }
}

static void test_a_kernel_that_cannot_be_loaded_is_an_error_before_the_first_launch(void **state)
{
    (void)state;
    static const char *const calls[] = {"cuKernelGetFunction", "cuFuncLoad"};
    for (int i = 0; i < 2 * LPSGD_CUDA_KERNELS; i++) {
        start_anew(1);
        double_fail(calls[i % 2], i / 2 + 1, 209);
        assert_int_equal(lpsgd_cuda_prepare(0, NULL, NULL), LPSGD_ERROR_CUDA);
        assert_error(calls[i % 2], "CUDA_ERROR_NO_BINARY_FOR_GPU (209): no kernel image is available "
                                   "for execution on the device");
        assert_int_equal(count_calls("cuLaunchKernel"), 0);
        assert_true(double_is_left_as_found());
    }
}

static void test_a_capture_of_the_stream_puts_the_check_off(void **state)
{
    (void)state;
    test_list start = some_list(kinds[0]);
    for (int stream = 0; stream < 2; stream++) {
        start_anew(1);
        double_capture(0, 1, 1); /* stream 0 waits for stream 1 */
        double_wrong("lpsgd_cuda_float32");
        test_list list = copy_to_device(&start, 0);
        const lpsgd_cuda_target target = {.device = 0, .stream = double_stream(0, stream)};
        int capturing = 0;
        assert_int_equal(lpsgd_cuda_prepare(0, target.stream, &capturing), LPSGD_OK);
        assert_int_equal(capturing, 1);
        assert_int_equal(cuda_step_list(&list, &usual, 1, &target), LPSGD_OK);
        assert_int_equal(count_calls("cuLaunchKernel"), 1);
        assert_true(double_is_left_as_found());
        double_capture(0, 1, 0);
        assert_int_equal(cuda_step_list(&list, &usual, 1, &target), LPSGD_ERROR_CUDA);
        assert_non_null(strstr(lpsgd_cuda_error(), "its kernels differ from the CPU's"));
        free_device_list(&list);
    }
    free_list(&start);
}

static void test_a_capture_of_another_stream_does_not_hinder_the_first_step(void **state)
{
    (void)state;
    start_anew(2);
    double_capture(0, 1, 1);
    for (int device = 0; device < 2; device++) {
        int capturing = 2;
        assert_int_equal(lpsgd_cuda_prepare(device, double_stream(device, 2), &capturing), LPSGD_OK);
        assert_int_equal(capturing, 0);
        assert_int_equal(count_calls("cuStreamSynchronize"), device + 1);
        assert_true(double_is_left_as_found());
    }
}

/* Errors. */

/* Every call of a first step with a number in device memory: its name and how often it is made. */
static const struct {
    const char *name;
    int count;
} first_calls[] = {
    {"cuInit", 1},
    {"cuDriverGetVersion", 1},
    {"cuThreadExchangeStreamCaptureMode", 2},
    {"cuDeviceGet", 1},
    {"cuDevicePrimaryCtxRetain", 1},
    {"cuLibraryLoadData", 1},
    {"cuLibraryGetKernel", LPSGD_CUDA_KERNELS},
    {"cuCtxPushCurrent_v2", 2},
    {"cuKernelGetFunction", LPSGD_CUDA_KERNELS},
    {"cuFuncLoad", LPSGD_CUDA_KERNELS},
    {"cuStreamIsCapturing", 1},
    {"cuLibraryGetGlobal", 1},
    {"cuStreamCreate", 1},
    {"cuMemcpyAsync", 2},
    {"cuStreamSynchronize", 1},
    {"cuStreamDestroy_v2", 1},
    {"cuLaunchKernel", 4}, /* the check's first two and the step's */
};

static const struct {
    CUresult error;
    const char *words;
} some_errors[] = {
    {1, "CUDA_ERROR_INVALID_VALUE (1): invalid argument"},
    {2, "CUDA_ERROR_OUT_OF_MEMORY (2): out of memory"},
    {100, "CUDA_ERROR_NO_DEVICE (100): no CUDA-capable device is detected"},
    {719, "CUDA_ERROR_LAUNCH_FAILED (719): unspecified launch failure"},
    {12345, "unknown error (12345): the driver has no text for it"},
};

static void test_an_error_at_any_call_writes_nothing_and_the_next_step_works(void **state)
{
    (void)state;
    test_list start = some_list(kinds[0]);
    start_anew(1);
    assert_int_equal(lpsgd_cuda_prepare(0, NULL, NULL), LPSGD_OK);
    const int check_launches = count_calls("cuLaunchKernel");
    for (size_t call = 0; call < sizeof first_calls / sizeof *first_calls; call++)
        for (int i = 0; i < 5 * first_calls[call].count; i++) {
            int nth = i / 5 + 1;
            if (nth > 2 && strcmp(first_calls[call].name, "cuLaunchKernel") == 0)
                nth += check_launches - 2;
            start_anew(1);
            test_list list = copy_to_device(&start, 0);
            const lpsgd_cuda_target target = {
                .device = 0,
                .lr = device_number(0, LPSGD_FLOAT64, 0x3f847ae147ae147b), /* 0.01 */
                .scratch = double_allocate(0, (size_t)lpsgd_cuda_scratch_size()),
            };
            double_fail(first_calls[call].name, nth, some_errors[i % 5].error);
            assert_int_equal(cuda_step_list(&list, &usual, 1, &target), LPSGD_ERROR_CUDA);
            assert_error(first_calls[call].name, some_errors[i % 5].words);
            assert_true(same_list(&list, &start));
            assert_int_equal(double_current(), -1);

            assert_int_equal(cuda_step_list(&list, &usual, 1, &target), LPSGD_OK);
            assert_list_is_the_cpus(&list, &start, &usual, 1);
            assert_int_equal(double_current(), -1);
            assert_true(double_is_left_as_found() || strstr(first_calls[call].name, "Exchange"));
            assert_int_equal(count_calls("cuDevicePrimaryCtxRetain 0\n"), 1);
            assert_int_equal(count_calls("cuLibraryLoadData\n"), 1);
            assert_int_equal(count_calls("cuLibraryGetKernel lpsgd_cuda_float32\n"), 1);
            free_device_list(&list);
        }
    free_list(&start);
}

static void test_an_error_after_the_launches_is_told_too(void **state)
{
    (void)state;
    start_ready(1);
    test_list start = some_list(kinds[0]);
    test_list list = copy_to_device(&start, 0);
    const lpsgd_cuda_target target = {.device = 0};
    double_fail("cuCtxPopCurrent_v2", 1, 201);
    assert_int_equal(cuda_step_list(&list, &usual, 1, &target), LPSGD_ERROR_CUDA);
    assert_error("cuCtxPopCurrent_v2", "CUDA_ERROR_INVALID_CONTEXT (201): invalid device context");
    assert_list_is_the_cpus(&list, &start, &usual, 1);
    free_device_list(&list);
    free_list(&start);
}

static void test_a_refused_launch_ends_the_step_after_the_earlier_ones(void **state)
{
    (void)state;
    enum { count = 3 * LPSGD_CUDA_TENSORS };
    static int64_t numel[count];
    for (int i = 0; i < count; i++)
        numel[i] = 2;
    start_ready(1);
    test_list start = make_list(kinds[0], numel, count, 0, 3);
    test_list list = copy_to_device(&start, 0), expected = copy_list(&start);
    const lpsgd_cuda_target target = {.device = 0};
    double_fail("cuLaunchKernel", 2, 719);
    assert_int_equal(cuda_step_list(&list, &usual, 1, &target), LPSGD_ERROR_CUDA);
    assert_error("cuLaunchKernel", "CUDA_ERROR_LAUNCH_FAILED (719): unspecified launch failure");
    assert_int_equal(count_calls("cuLaunchKernel"), 2);
    expected.count = LPSGD_CUDA_TENSORS;
    assert_int_equal(step_list(&expected, &usual, 1, 1), LPSGD_OK);
    assert_true(same_list(&list, &expected));
    assert_int_equal(double_current(), -1);
    free_device_list(&list);
    free_list(&expected);
    free_list(&start);
}

static void test_a_driver_that_is_too_old_is_refused_by_its_version(void **state)
{
    (void)state;
    start_anew(1);
    double_version(12090);
    assert_int_equal(lpsgd_cuda_prepare(0, NULL, NULL), LPSGD_ERROR_CUDA);
    assert_string_equal(lpsgd_cuda_error(), "the NVIDIA driver is too old: it is of CUDA 12.9, and "
                                            "lpsgd needs 13.0");
    assert_int_equal(count_calls("cuDevice"), 0);
    double_version(13000);
    assert_int_equal(lpsgd_cuda_prepare(0, NULL, NULL), LPSGD_OK);
}

static void test_a_driver_without_a_function_is_refused_by_its_name(void **state)
{
    (void)state;
#define NAME(name, parameters) #name,
    static const char *const names[] = {LPSGD_CUDA_DRIVER(NAME)};
    test_list start = some_list(kinds[0]);
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        char expected[128];
        start_anew(1);
        missing = names[i];
        test_list list = copy_to_device(&start, 0);
        const lpsgd_cuda_target target = {.device = 0};
        for (int attempt = 0; attempt < 2; attempt++) {
            assert_int_equal(cuda_step_list(&list, &usual, 1, &target), LPSGD_ERROR_CUDA);
            snprintf(expected, sizeof expected, "the NVIDIA driver is too old: it has no %s",
                     names[i]);
            assert_string_equal(lpsgd_cuda_error(), expected);
        }
        assert_string_equal(double_log(), "");
        assert_true(same_list(&list, &start));
        free_device_list(&list);
    }
    free_list(&start);
}

static void test_devices_that_do_not_exist_are_refused(void **state)
{
    (void)state;
    start_anew(2);
    assert_int_equal(lpsgd_cuda_prepare(2, NULL, NULL), LPSGD_ERROR_CUDA);
    assert_error("cuDeviceGet", "CUDA_ERROR_INVALID_DEVICE (101): invalid device ordinal");
    static const int devices[] = {-1, DEVICES, INT_MAX, INT_MIN};
    for (int i = 0; i < 4; i++) {
        char expected[64];
        snprintf(expected, sizeof expected, "there is no CUDA device %d", devices[i]);
        assert_int_equal(lpsgd_cuda_prepare(devices[i], NULL, NULL), LPSGD_ERROR_CUDA);
        assert_string_equal(lpsgd_cuda_error(), expected);
    }
    start_anew(DEVICES);
    assert_int_equal(lpsgd_cuda_prepare(DEVICES - 1, NULL, NULL), LPSGD_OK);
}

/* Threads and processes. */

enum { threads = 8, steps = 10 };

typedef struct worker {
    pthread_barrier_t *barrier;
    test_list list;
    int device, current;
    lpsgd_status status;
    char error[sizeof error_text];
} worker;

static void *run_worker(void *argument)
{
    worker *w = argument;
    const lpsgd_cuda_target target = {.device = w->device, .stream = double_stream(w->device % 2, 1)};
    pthread_barrier_wait(w->barrier);
    for (int i = 0; i < steps; i++)
        w->status = cuda_step_list(&w->list, &usual, 1, &target);
    w->current = double_current();
    snprintf(w->error, sizeof w->error, "%s", lpsgd_cuda_error());
    return NULL;
}

/* The last one's device does not exist. */
static void test_threads_step_at_once_from_the_start_with_errors_of_their_own(void **state)
{
    (void)state;
    start_anew(2);
    pthread_t thread[threads];
    pthread_barrier_t barrier;
    worker workers[threads];
    test_list start = some_list(kinds[0]);
    test_list expected = copy_list(&start);
    for (int i = 0; i < steps; i++)
        assert_int_equal(step_list(&expected, &usual, 1, 1), LPSGD_OK);
    assert_int_equal(pthread_barrier_init(&barrier, NULL, threads), 0);
    for (int i = 0; i < threads; i++)
        workers[i] = (worker){.barrier = &barrier,
                              .list = copy_to_device(&start, i % 2),
                              .device = i < threads - 1 ? i % 2 : 5};
    for (int i = 0; i < threads; i++)
        assert_int_equal(pthread_create(&thread[i], NULL, run_worker, &workers[i]), 0);
    for (int i = 0; i < threads; i++)
        assert_int_equal(pthread_join(thread[i], NULL), 0);
    for (int i = 0; i < threads; i++) {
        const int fails = i == threads - 1;
        assert_int_equal(workers[i].status, fails ? LPSGD_ERROR_CUDA : LPSGD_OK);
        assert_true(same_list(&workers[i].list, fails ? &start : &expected));
        assert_int_equal(workers[i].current, -1);
        assert_string_equal(
            workers[i].error,
            fails ? "cuDeviceGet: CUDA_ERROR_INVALID_DEVICE (101): invalid device ordinal"
                  : "no error");
        free_device_list(&workers[i].list);
    }
    assert_int_equal(count_calls("cuInit 0\n"), 1);
    assert_int_equal(count_calls("cuLibraryLoadData\n"), 1);
    assert_int_equal(count_calls("cuDevicePrimaryCtxRetain"), 2);
    pthread_barrier_destroy(&barrier);
    free_list(&expected);
    free_list(&start);
}

static void test_a_fork_after_a_step_leaves_the_parent_alone_and_the_child_an_error(void **state)
{
    (void)state;
    start_anew(1);
    test_list start = some_list(kinds[0]);
    test_list list = copy_to_device(&start, 0);
    const lpsgd_cuda_target target = {.device = 0};
    lpsgd_hyper rest = usual;
    rest.lr = 0.0;
    assert_int_equal(cuda_step_list(&list, &rest, 0, &target), LPSGD_OK);
    const pid_t child = fork();
    assert_true(child >= 0);
    if (child == 0)
        _exit(cuda_step_list(&list, &usual, 1, &target) == LPSGD_ERROR_CUDA &&
                      strstr(lpsgd_cuda_error(), "CUDA_ERROR_NOT_INITIALIZED (3)")
                  ? 0
                  : 1);
    int status = 0;
    assert_int_equal(waitpid(child, &status, 0), child);
    assert_int_equal(status, 0);
    assert_int_equal(cuda_step_list(&list, &usual, 1, &target), LPSGD_OK);
    assert_list_is_the_cpus(&list, &start, &usual, 1);
    free_device_list(&list);
    free_list(&start);
}

/* The double itself: a test that relies on a refusal needs to have seen it. */

static void test_the_double_refuses_what_the_driver_refuses(void **state)
{
    (void)state;
    start_anew(2);
    CUdevice device;
    CUcontext context, popped;
    CUlibrary library;
    CUkernel kernel;
    static const unsigned char no_image[16] = {0x7f, 'E', 'L', 'F'};
    assert_int_equal(cuDeviceGet(&device, 0), 3);
    assert_int_equal(cuInit(1), 1);
    assert_int_equal(cuInit(0), 0);
    assert_int_equal(cuDeviceGet(&device, 2), 101);
    assert_int_equal(cuDeviceGet(&device, 1), 0);
    assert_int_equal(cuDevicePrimaryCtxRetain(&context, 1), 101); /* no handle */
    assert_int_equal(cuDevicePrimaryCtxRetain(&context, device), 0);
    assert_int_equal(cuCtxPopCurrent_v2(&popped), 201);
    assert_int_equal(cuCtxPushCurrent_v2(NULL), 201);
    assert_int_equal(cuLibraryLoadData(&library, no_image, NULL, NULL, 0, NULL, NULL, 0), 200);
    assert_int_equal(cuLibraryGetKernel(&kernel, NULL, "lpsgd_cuda_float32"), 400);
    assert_int_equal(cuLibraryLoadData(&library, lpsgd_cuda_image, NULL, NULL, 0, NULL, NULL, 0), 0);
    assert_int_equal(cuLibraryGetKernel(&kernel, library, "lpsgd_cuda_float"), 500);
    assert_int_equal(cuLibraryGetKernel(&kernel, library, "lpsgd_cuda_float32"), 0);

    static lpsgd_cuda_step_arguments a;
    float *memory = double_allocate(1, 64);
    void *arguments[] = {&a};
    const CUfunction function = (CUfunction)kernel;
    const CUstream stream = double_stream(1, 1);
    a.common.count = a.common.tiles = 1;
    a.tensor[0] = (lpsgd_cuda_tensor){.param = memory, .grad = memory + 8, .numel = 1};
#define LAUNCH(function, x, threads, stream, arguments, extra)                                     \
    cuLaunchKernel(function, x, 1, 1, threads, 1, 1, 0, stream, arguments, extra)
    assert_int_equal(LAUNCH(function, 1, 256, stream, arguments, NULL), 201);
    assert_int_equal(cuCtxPushCurrent_v2(context), 0);
    assert_int_equal(LAUNCH(function, 1, 256, stream, arguments, NULL), 0);
    assert_int_equal(LAUNCH(function, 1, 256, NULL, arguments, NULL), 0);
    assert_int_equal(LAUNCH(NULL, 1, 256, stream, arguments, NULL), 400);
    assert_int_equal(LAUNCH(function, 1, 256, double_stream(0, 1), arguments, NULL), 400);
    assert_int_equal(LAUNCH(function, 0, 256, stream, arguments, NULL), 1);
    assert_int_equal(LAUNCH(function, 1u << 31, 256, stream, arguments, NULL), 1);
    assert_int_equal(LAUNCH(function, 1, 257, stream, arguments, NULL), 1);
    assert_int_equal(LAUNCH(function, 1, 256, stream, NULL, NULL), 1);
    assert_int_equal(LAUNCH(function, 1, 256, stream, arguments, arguments), 1);
    a.tensor[0].grad = (char *)memory + 2;
    assert_int_equal(LAUNCH(function, 1, 256, stream, arguments, NULL), 716);
    a.tensor[0].grad = double_allocate(0, 64);
    assert_int_equal(LAUNCH(function, 1, 256, stream, arguments, NULL), 700);
    a.tensor[0].grad = &a;
    assert_int_equal(LAUNCH(function, 1, 256, stream, arguments, NULL), 700);
    assert_int_equal(cuCtxPopCurrent_v2(&popped), 0);
    assert_ptr_equal(popped, context);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_nothing_of_the_driver_is_called_before_a_step),
        cmocka_unit_test(test_calls_are_these_and_what_is_loaded_stays),
        cmocka_unit_test(test_arguments_out_of_range_do_not_reach_the_driver),
        cmocka_unit_test(test_lists_without_elements_launch_nothing),
        cmocka_unit_test(test_every_kind_has_the_cpus_bits),
        cmocka_unit_test(test_a_launch_takes_500_buffers),
        cmocka_unit_test(test_grids_stay_within_the_drivers_limit),
        cmocka_unit_test(test_numbers_in_device_memory_take_the_place_of_the_hosts),
        cmocka_unit_test(test_the_callers_context_is_current_again),
        cmocka_unit_test(test_the_check_has_elements_for_all_of_the_power),
        cmocka_unit_test(test_a_kernel_whose_bits_differ_is_refused_for_good),
        cmocka_unit_test(test_the_environment_leaves_the_check_out),
        cmocka_unit_test(test_a_kernel_that_cannot_be_loaded_is_an_error_before_the_first_launch),
        cmocka_unit_test(test_a_capture_of_the_stream_puts_the_check_off),
        cmocka_unit_test(test_a_capture_of_another_stream_does_not_hinder_the_first_step),
        cmocka_unit_test(test_an_error_at_any_call_writes_nothing_and_the_next_step_works),
        cmocka_unit_test(test_an_error_after_the_launches_is_told_too),
        cmocka_unit_test(test_a_refused_launch_ends_the_step_after_the_earlier_ones),
        cmocka_unit_test(test_a_driver_that_is_too_old_is_refused_by_its_version),
        cmocka_unit_test(test_a_driver_without_a_function_is_refused_by_its_name),
        cmocka_unit_test(test_devices_that_do_not_exist_are_refused),
        cmocka_unit_test(test_threads_step_at_once_from_the_start_with_errors_of_their_own),
        cmocka_unit_test(test_a_fork_after_a_step_leaves_the_parent_alone_and_the_child_an_error),
        cmocka_unit_test(test_the_double_refuses_what_the_driver_refuses),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
