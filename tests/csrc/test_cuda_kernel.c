/* SPDX-License-Identifier: MIT
 *
 * test_cuda_kernel.c: the CUDA kernels' source as an emulated grid against the CPU's step, bit for
 * bit. float64 is compared by its bits too, as both call the same pow() here.
 */
#include "cuda_grid.h"

#include <limits.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>
#include <sys/mman.h>

/* Widest grids first: a block per tile, then blocks that take one tile after the other. */
static const int grids[] = {INT_MAX, 2, 1, 3};

/* The width of a kind's vectors and the size of its tiles, in elements. */
static int64_t width_of(test_kind kind)
{
    return 16 / format_of(kind.dtype).size;
}

static int64_t tile_of(test_kind kind)
{
    return LPSGD_CUDA_TILE_BYTES / format_of(kind.dtype).size;
}

static void assert_grid_is_the_cpu(const test_list *start, const lpsgd_hyper *hyper,
                                   int has_momentum, int grid_count)
{
    test_list expected = copy_list(start);
    assert_int_equal(step_list(&expected, hyper, has_momentum, 1), LPSGD_OK);
    canonicalize_nan(&expected);
    for (int i = 0; i < grid_count; i++) {
        test_list actual = copy_list(start);
        assert_int_equal(grid_step_list(&actual, hyper, has_momentum, grids[i]), LPSGD_OK);
        canonicalize_nan(&actual);
        if (!same_list(&actual, &expected))
            fail_msg("%s%s (momentum %s) lr=%g p=%g eps=%g pivot=%g weight_decay=%g maximize=%d "
                     "stochastic=%d: a grid of at most %d blocks differs",
                     has_momentum ? "LPSGDM " : "LPSGD ", format_of(start->kind.dtype).name,
                     format_of(start->kind.momentum_dtype).name, hyper->lr, hyper->p, hyper->eps,
                     hyper->pivot, hyper->weight_decay, hyper->maximize, hyper->stochastic_rounding,
                     grids[i]);
        free_list(&actual);
    }
    free_list(&expected);
}

static void test_grid_is_the_cpu_for_all_hyper_parameters(void **state)
{
    (void)state;
    static const int64_t numel[] = {300, 0, 1, 37};
    static const unsigned of_4096[] = {0, few_awkward, many_awkward};
    for (int d = 0; d < kind_count; d++)
        for (int awkward = 0; awkward < 3; awkward++) {
            test_list start = make_list(kinds[d], numel, 4, of_4096[awkward], 1);
            for (int i = 0; i < 2 * hyper_count; i++) {
                const lpsgd_hyper hyper = hyper_number(i / 2);
                assert_grid_is_the_cpu(&start, &hyper, i % 2, 1);
            }
            free_list(&start);
        }
}

/* Each size twice, aligned and (but for some) not. */
static void test_grid_is_the_cpu_around_vectors_and_tiles(void **state)
{
    (void)state;
    for (int d = 0; d < kind_count; d++) {
        const int64_t width = width_of(kinds[d]), tile = tile_of(kinds[d]);
        const int64_t around[] = {width, LPSGD_CUDA_THREADS, LPSGD_CUDA_THREADS * width,
                                  tile,  tile + width,       3 * tile};
        for (int i = 0; i < 6; i++)
            for (int64_t size = around[i] - 1; size <= around[i] + 1; size++) {
                const int64_t numel[] = {size, 1, size};
                test_list start = make_list(kinds[d], numel, 3, few_awkward, 2);
                lpsgd_hyper hyper = usual;
                hyper.stochastic_rounding = i % 2;
                assert_grid_is_the_cpu(&start, &hyper, 1, 4);
                hyper.p = INFINITY;
                assert_grid_is_the_cpu(&start, &hyper, 0, 4);
                free_list(&start);
            }
    }
}

/* Moves a pointer to the elements of one of several alignments, which `which` counts through. */
static void *shift(test_list *list, const void *array, lpsgd_dtype dtype, int64_t *which)
{
    const int size = format_of(dtype).size;
    const int64_t alignments = 16 / size, shifts = *which % alignments;
    *which /= alignments;
    return (char *)same_place(list, list, array) + shifts * size;
}

static void test_grid_is_the_cpu_for_every_alignment(void **state)
{
    (void)state;
    enum { count = 8 * 8 * 8 };
    static int64_t numel[count];
    for (int i = 0; i < count; i++)
        numel[i] = 48; /* a multiple of 16: every buffer starts aligned */
    for (int d = 0; d < kind_count; d++) {
        test_list start = make_list(kinds[d], numel, count, few_awkward, 3);
        for (int64_t i = 0; i < count; i++) {
            lpsgd_buffer *b = &start.buffers[i];
            int64_t which = i;
            b->numel = 39;
            b->param = shift(&start, b->param, kinds[d].dtype, &which);
            b->grad = shift(&start, b->grad, kinds[d].dtype, &which);
            b->momentum_buffer =
                shift(&start, b->momentum_buffer, kinds[d].momentum_dtype, &which);
        }
        for (int n = 0; n < norm_count; n++) {
            lpsgd_hyper hyper = usual;
            hyper.p = norms[n];
            assert_grid_is_the_cpu(&start, &hyper, n % 2, 2);
        }
        free_list(&start);
    }
}

/* Around one launch and two, and many; a stream and index for each, some beyond 32 bits. */
static void test_grid_is_the_cpu_for_many_small_buffers(void **state)
{
    (void)state;
    enum { most = 3000, launch = LPSGD_CUDA_TENSORS };
    static const int64_t counts[] = {0, launch - 1, launch, launch + 1, 2 * launch + 1, most};
    static int64_t numel[most];
    uint64_t random = 4;
    for (int64_t i = 0; i < 6; i++)
        for (int d = 0; d < kind_count; d++) {
            for (int j = 0; j < most; j++) /* the last list has empty buffers */
                numel[j] = (int64_t)(next_random(&random) % 41) + (i < 5);
            test_list start = make_list(kinds[d], numel, counts[i], few_awkward, 4);
            for (int64_t j = 0; j < counts[i]; j++) {
                start.buffers[j].stream = (uint64_t)j % 7;
                start.buffers[j].index = ((uint64_t)j << 30) - 5;
            }
            lpsgd_hyper hyper = usual;
            hyper.stochastic_rounding = 1;
            assert_grid_is_the_cpu(&start, &hyper, 1, 2);
            free_list(&start);
        }
}

/* Numbers in device memory. */

/* A number that all dtypes hold exactly, and its bits in each, in the order of lpsgd_dtype. */
typedef struct exact_number {
    double value;
    uint64_t bits[4];
} exact_number;

static const exact_number exact_lr = {0.0078125, {0x3c000000, 0x3f80000000000000, 0x3c00, 0x2000}};
static const exact_number exact_decay = {0.125, {0x3e000000, 0x3fc0000000000000, 0x3e00, 0x3000}};
static const exact_number exact_scale = {1024., {0x44800000, 0x4090000000000000, 0x4480, 0x6400}};
static const exact_number exact_p[] = {
    {2.0, {0x40000000, 0x4000000000000000, 0x4000, 0x4000}},
    {5.0, {0x40a00000, 0x4014000000000000, 0x40a0, 0x4500}},
    {INFINITY, {0x7f800000, 0x7ff0000000000000, 0x7f80, 0x7c00}},
};

/* A step with device numbers: of lr, p, weight_decay and grad_scale those whose bit `mask` has. */
static void step_with_device_numbers(test_list *list, const lpsgd_hyper *hyper, int mask,
                                     const exact_number *p, lpsgd_dtype dtype,
                                     lpsgd_device_number found_inf)
{
    static lpsgd_cuda_step_arguments a;
    const exact_number *const numbers[] = {&exact_lr, p, &exact_decay, &exact_scale};
    uint64_t memory[4] = {0};
    lpsgd_cuda_fold_arguments fold = {.hyper = *hyper, .found_inf = found_inf};
    lpsgd_device_number *const places[] = {&fold.lr, &fold.p, &fold.weight_decay, &fold.grad_scale};
    double *const values[] = {&fold.hyper.lr, &fold.hyper.p, &fold.hyper.weight_decay,
                              &fold.hyper.grad_scale};
    fold.hyper.momentum_dtype = list->kind.momentum_dtype;
    for (int i = 0; i < 4; i++)
        if (mask >> i & 1) {
            store_bits(&memory[i], format_of(dtype), 0, numbers[i]->bits[dtype]);
            *places[i] = (lpsgd_device_number){&memory[i], dtype};
            *values[i] = 4.5; /* not to be read */
        }
    assert_int_equal(lpsgd_fold(&fold.hyper, 1, &a.common.scalars), LPSGD_OK);
    fold.result = malloc((size_t)lpsgd_cuda_scratch_size());
    assert_non_null(fold.result);
    lpsgd_cuda_fold(&fold);
    a.common.device_scalars = fold.result;
    run_grids(&a, list, 1, INT_MAX);
    free(fold.result);
}

static void test_numbers_in_device_memory_are_those_of_the_host(void **state)
{
    (void)state;
    static const int64_t numel[] = {33, 5};
    const lpsgd_device_number none = {NULL, LPSGD_FLOAT32};
    for (int d = 0; d < kind_count; d++) {
        test_list start = make_list(kinds[d], numel, 2, few_awkward, 5);
        for (int i = 0; i < 16 * 3 * 4; i++) {
            const exact_number *p = &exact_p[i / 16 % 3];
            lpsgd_hyper hyper = usual;
            hyper.lr = exact_lr.value;
            hyper.p = p->value;
            hyper.weight_decay = exact_decay.value;
            hyper.grad_scale = exact_scale.value;
            hyper.maximize = i % 5 % 2;
            hyper.stochastic_rounding = i % 3 == 0;
            hyper.seed = 6;
            test_list expected = copy_list(&start), actual = copy_list(&start);
            assert_int_equal(step_list(&expected, &hyper, 1, 1), LPSGD_OK);
            step_with_device_numbers(&actual, &hyper, i % 16, p, (lpsgd_dtype)(i / 48), none);
            canonicalize_nan(&expected);
            canonicalize_nan(&actual);
            assert_true(same_list(&actual, &expected));
            free_list(&expected);
            free_list(&actual);
        }
        free_list(&start);
    }
}

static void test_found_inf_writes_nothing(void **state)
{
    (void)state;
    static const int64_t numel[] = {33, 5};
    for (int i = 0; i < kind_count * 4 * 6; i++) {
        const lpsgd_dtype dtype = (lpsgd_dtype)(i / kind_count % 4);
        const float_format f = format_of(dtype);
        const uint64_t infinity = infinity_of(f), sign = UINT64_C(1) << (8 * f.size - 1);
        const uint64_t bits[] = {0, sign, 1, exact_lr.bits[dtype], infinity, infinity | 1};
        const int which = i / kind_count / 4;
        uint64_t memory = 0;
        store_bits(&memory, f, 0, bits[which]);
        test_list list = make_list(kinds[i % kind_count], numel, 2, 0, 6), before = copy_list(&list);
        const lpsgd_device_number found_inf = {&memory, dtype};
        step_with_device_numbers(&list, &usual, 0, &exact_p[0], dtype, found_inf);
        assert_int_equal(same_list(&list, &before), which >= 2); /* neither 0.0 nor -0.0 */
        free_list(&list);
        free_list(&before);
    }
}

/* Size. */

/* 12 GiB of addresses, of which only the tiles that are looked at are ever backed by memory. */
static void test_tensors_may_have_more_than_2_to_the_31_elements(void **state)
{
    (void)state;
    enum { tile = LPSGD_CUDA_TILE_BYTES / 2 };
    static lpsgd_cuda_step_arguments a;
    static uint16_t expected[3][tile], first[3][tile];
    const int64_t two31 = INT64_C(1) << 31, numel = two31 + tile + 5;
    const int64_t starts[] = {0, two31 - tile, two31, two31 + tile}; /* the first stays as it is */
    const float_format f = format_of(LPSGD_BFLOAT16);
    const size_t size = (size_t)numel * 2;
    lpsgd_hyper hyper = usual;
    hyper.stochastic_rounding = 1;
    uint16_t *array[3];
    for (int i = 0; i < 3; i++) {
        array[i] = mmap(NULL, size, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (array[i] == MAP_FAILED) {
            print_message("SKIPPED: there are no 12 GiB of addresses\n");
            skip();
        }
    }
    uint64_t random = 7;
    for (int i = 0; i < 4 * 3 * tile; i++) {
        const int64_t at = starts[i / 3 / tile] + i % tile;
        if (at < numel)
            store_bits(array[i / tile % 3], f, at, random_element(&random, f, 0));
    }
    for (int i = 0; i < 3; i++)
        memcpy(first[i], array[i], sizeof first[i]);

    /* The index of the random bits passes 2^32 in the tile at 2^31. */
    lpsgd_buffer whole = {array[0], array[1], array[2], numel, 5, (uint64_t)two31 - 100};
    test_list list = {.kind = kinds[LPSGD_BFLOAT16], .count = 1, .buffers = &whole};
    int64_t done = 0;
    hyper.momentum_dtype = list.kind.momentum_dtype;
    assert_int_equal(lpsgd_fold(&hyper, 1, &a.common.scalars), LPSGD_OK);
    lpsgd_cuda_fill(&a, list.buffers, list.count, 2, 1, &done);
    assert_int_equal(a.common.tiles, two31 / tile + 2);
    for (int s = 1; s < 4; s++) {
        const int64_t left = numel - starts[s], n = left < tile ? left : tile;
        for (int i = 0; i < 3; i++)
            memcpy(expected[i], array[i] + starts[s], (size_t)n * 2);
        const lpsgd_buffer piece = {expected[0], expected[1],  expected[2],
                                    n,           whole.stream, whole.index + (uint64_t)starts[s]};
        assert_int_equal(lpsgdm_step(&piece, 1, LPSGD_BFLOAT16, &hyper, 1), LPSGD_OK);
        run_block(&a, grid_thread_of(list.kind), starts[s] / tile, a.common.tiles,
                  LPSGD_CUDA_THREADS);
        for (int i = 0; i < 3; i++)
            assert_memory_equal(array[i] + starts[s], expected[i], (size_t)n * 2);
    }
    for (int i = 0; i < 3; i++) {
        assert_memory_equal(array[i], first[i], sizeof first[i]);
        munmap(array[i], size);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_grid_is_the_cpu_for_all_hyper_parameters),
        cmocka_unit_test(test_grid_is_the_cpu_around_vectors_and_tiles),
        cmocka_unit_test(test_grid_is_the_cpu_for_every_alignment),
        cmocka_unit_test(test_grid_is_the_cpu_for_many_small_buffers),
        cmocka_unit_test(test_numbers_in_device_memory_are_those_of_the_host),
        cmocka_unit_test(test_found_inf_writes_nothing),
        cmocka_unit_test(test_tensors_may_have_more_than_2_to_the_31_elements),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
