/* SPDX-License-Identifier: MIT
 *
 * test_step.c: the drivers against a plain loop over one element's arithmetic, bit for bit, on the
 * instruction set that LPSGD_CPU_CAPABILITY names; refused calls; limits of the hyper-parameters.
 */
#include "plain_loop.h"

#include <limits.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>
#include <sys/wait.h>
#include <unistd.h>

static void reference_step(test_list *list, const lpsgd_hyper *hyper, int has_momentum)
{
    lpsgd_scalars k;
    assert_int_equal(lpsgd_fold(hyper, has_momentum, &k), LPSGD_OK);
    plain_loop(list->buffers, list->count, list->kind, has_momentum, &k);
    canonicalize_nan(list);
}

static void assert_step_is_the_plain_loop(const test_list *start, const lpsgd_hyper *hyper,
                                          int has_momentum, const int *num_threads, int count)
{
    test_list expected = copy_list(start);
    reference_step(&expected, hyper, has_momentum);
    for (int t = 0; t < count; t++) {
        test_list actual = copy_list(start);
        assert_int_equal(step_list(&actual, hyper, has_momentum, num_threads[t]), LPSGD_OK);
        canonicalize_nan(&actual);
        if (!same_list(&actual, &expected))
            fail_msg("%s%s (momentum %s) lr=%g p=%g eps=%g pivot=%g weight_decay=%g maximize=%d "
                     "stochastic=%d: %d threads differ",
                     has_momentum ? "LPSGDM " : "LPSGD ", format_of(start->kind.dtype).name,
                     format_of(start->kind.momentum_dtype).name, hyper->lr, hyper->p, hyper->eps,
                     hyper->pivot, hyper->weight_decay, hyper->maximize, hyper->stochastic_rounding,
                     num_threads[t]);
        free_list(&actual);
    }
    free_list(&expected);
}

static void test_step_is_the_plain_loop_for_all_hyper_parameters_and_sizes(void **state)
{
    (void)state;
    static const int64_t around_blocks[] = {511, 512, 513, 1023, 1024, 1025, 1600};
    enum { small = 71, count = small + 7 };
    int64_t numel[count];
    for (int i = 0; i < count; i++)
        numel[i] = i < small ? i : around_blocks[i - small];
    const int one = 1;
    for (int d = 0; d < kind_count; d++)
        for (int awkward = 0; awkward < 3; awkward++) {
            static const unsigned of_4096[] = {0, few_awkward, many_awkward};
            test_list start = make_list(kinds[d], numel, count, of_4096[awkward], 1);
            for (int i = (d + awkward) % 3; i < hyper_count; i += 3) { /* each with one of the three */
                const lpsgd_hyper hyper = hyper_number(i);
                assert_step_is_the_plain_loop(&start, &hyper, 0, &one, 1);
                assert_step_is_the_plain_loop(&start, &hyper, 1, &one, 1);
            }
            free_list(&start);
        }
}

static void test_step_is_the_plain_loop_for_every_number_of_threads(void **state)
{
    (void)state;
    static const int num_threads[] = {1, 2, 3, 7, 0};
    static const double some_norms[] = {2.0, 6.0, INFINITY};
    /* Two shares of useful_threads() for float64 and for the rest, three and seven of them. */
    static const int64_t totals[] = {2047, 2048, 7169, 32767, 32769, 49153, 114689};
    for (int d = 0; d < kind_count; d++)
        for (int n = 0; n < 7; n++) {
            const int64_t a_third = totals[n] / 3, numel[] = {a_third, 0, 1, totals[n] - a_third - 1};
            test_list start = make_list(kinds[d], numel, 4, few_awkward, 2);
            lpsgd_hyper hyper = usual;
            hyper.p = some_norms[n % 3];
            assert_step_is_the_plain_loop(&start, &hyper, n % 2, num_threads, 5);
            hyper.p = 3.0;
            assert_step_is_the_plain_loop(&start, &hyper, 1, num_threads, 5);
            free_list(&start);
        }
}

static void test_step_is_the_plain_loop_for_many_small_buffers(void **state)
{
    (void)state;
    static const int num_threads[] = {1, 7};
    enum { count = 4000 };
    static int64_t numel[count];
    uint64_t random = 3;
    for (int i = 0; i < count; i++)
        numel[i] = (int64_t)(next_random(&random) % 41);
    for (int d = 0; d < kind_count; d++) {
        test_list start = make_list(kinds[d], numel, count, few_awkward, 3);
        assert_step_is_the_plain_loop(&start, &usual, 1, num_threads, 2);
        free_list(&start);
    }
}

/* Limits. */

static const int64_t some_sizes[] = {700, 1, 33};

static void test_lpsgdm_without_momentum_and_decay_is_lpsgd(void **state)
{
    (void)state;
    for (int d = 0; d < kind_count; d++)
        for (int n = 0; n < norm_count; n++) {
            lpsgd_hyper hyper = usual;
            hyper.p = norms[n];
            hyper.momentum = hyper.weight_decay = 0.0;
            test_list a = make_list(kinds[d], some_sizes, 3, 0, 4), b = copy_list(&a);
            assert_int_equal(step_list(&a, &hyper, 0, 1), LPSGD_OK);
            assert_int_equal(step_list(&b, &hyper, 1, 1), LPSGD_OK);
            for (int i = 0; i < 3; i++)
                memcpy(a.buffers[i].momentum_buffer, b.buffers[i].momentum_buffer,
                       (size_t)(some_sizes[i] * format_of(kinds[d].momentum_dtype).size));
            assert_true(same_list(&a, &b));
            free_list(&a);
            free_list(&b);
        }
}

static void test_p2_is_gradient_descent_bitwise(void **state)
{
    (void)state;
    lpsgd_hyper hyper = usual;
    hyper.p = 2.0;
    hyper.weight_decay = 0.0;
    test_list a = make_list(kinds[0], some_sizes, 3, many_awkward, 5), b = copy_list(&a);
    for (int i = 0; i < 3; i++)
        for (int64_t j = 0; j < some_sizes[i]; j++) {
            float *param = a.buffers[i].param;
            const float *grad = a.buffers[i].grad;
            param[j] = fmaf((float)-hyper.lr, grad[j], param[j]);
        }
    assert_int_equal(step_list(&b, &hyper, 0, 1), LPSGD_OK);
    canonicalize_nan(&a);
    canonicalize_nan(&b);
    assert_true(same_list(&a, &b));
    free_list(&a);
    free_list(&b);
}

static void test_maximize_is_the_negated_gradient(void **state)
{
    (void)state;
    for (int i = 0; i < 2 * kind_count * norm_count; i++) {
        const int has_momentum = i % 2;
        const float_format f = format_of(kinds[i / 2 % kind_count].dtype);
        const float_format m = format_of(kinds[i / 2 % kind_count].momentum_dtype);
        lpsgd_hyper hyper = usual;
        hyper.p = norms[i / 2 / kind_count];
        test_list ascent = make_list(kinds[i / 2 % kind_count], some_sizes, 3, many_awkward, 6);
        test_list descent = copy_list(&ascent);
        assert_int_equal(step_list(&descent, &hyper, has_momentum, 1), LPSGD_OK);
        for (int b = 0; b < 3; b++)
            for (int64_t j = 0; j < some_sizes[b]; j++) {
                void *grad = same_place(&ascent, &ascent, ascent.buffers[b].grad);
                const uint64_t sign = UINT64_C(1) << (8 * f.size - 1);
                store_bits(grad, f, j, load_bits(grad, f, j) ^ sign);
            }
        hyper.maximize = 1;
        assert_int_equal(step_list(&ascent, &hyper, has_momentum, 1), LPSGD_OK);
        canonicalize_nan(&ascent);
        canonicalize_nan(&descent);
        for (int b = 0; b < 3; b++) {
            const lpsgd_buffer *x = &ascent.buffers[b], *y = &descent.buffers[b];
            assert_memory_equal(x->param, y->param, (size_t)(some_sizes[b] * f.size));
            assert_memory_equal(x->momentum_buffer, y->momentum_buffer,
                                (size_t)(some_sizes[b] * m.size));
        }
        free_list(&ascent);
        free_list(&descent);
    }
}

static void fill_with_zeros(test_list *list, int sign)
{
    const float_format f = format_of(list->kind.dtype), m = format_of(list->kind.momentum_dtype);
    for (const lpsgd_buffer *b = list->buffers; b < list->buffers + list->count; b++) {
        void *grad = same_place(list, list, b->grad);
        for (int64_t i = 0; i < b->numel; i++) {
            store_bits(grad, f, i, sign ? UINT64_C(1) << (8 * f.size - 1) : 0);
            store_bits(b->momentum_buffer, m, i, 0);
            if (i % 3 == 0)
                store_bits(b->param, f, i, UINT64_C(1) << (8 * f.size - 1));
        }
    }
}

static void test_zero_gradients_without_decay_change_no_bit(void **state)
{
    (void)state;
    for (int i = 0; i < 2 * 2 * 2 * kind_count * norm_count; i++) {
        lpsgd_hyper hyper = usual;
        hyper.weight_decay = 0.0;
        hyper.maximize = i / 2 % 2;
        hyper.stochastic_rounding = i % 3 == 0;
        hyper.p = norms[i / 8 / kind_count];
        hyper.eps = i % 5 ? 1e-8 : 0.0;
        test_list list = make_list(kinds[i / 8 % kind_count], some_sizes, 3, 0, 9);
        fill_with_zeros(&list, i / 4 % 2);
        test_list before = copy_list(&list);
        assert_int_equal(step_list(&list, &hyper, i % 2, 1), LPSGD_OK);
        assert_true(same_list(&list, &before));
        free_list(&list);
        free_list(&before);
    }
}

static void test_lr_0_changes_no_bit_of_a_parameter(void **state)
{
    (void)state;
    for (int i = 0; i < 2 * 2 * kind_count * norm_count; i++) {
        lpsgd_hyper hyper = usual;
        hyper.lr = 0.0;
        hyper.maximize = i / 2 % 2;
        hyper.stochastic_rounding = i % 3 == 0;
        hyper.p = norms[i / 4 / kind_count];
        test_list list = make_list(kinds[i / 4 % kind_count], some_sizes, 3, many_awkward, 10);
        test_list before = copy_list(&list);
        assert_int_equal(step_list(&list, &hyper, i % 2, 1), LPSGD_OK);
        assert_int_equal(same_list(&list, &before), i % 2 == 0); /* momentum moves */
        for (int b = 0; b < 3; b++)
            assert_memory_equal(list.buffers[b].param, before.buffers[b].param,
                                (size_t)(some_sizes[b] * format_of(list.kind.dtype).size));
        free_list(&list);
        free_list(&before);
    }
}

/* Accumulation. */

/* The weights of the first, a middle and the last of K micro-batches, in float32 and float64. */
static void test_micro_batches_are_summed_in_the_momentum(void **state)
{
    (void)state;
    enum { numel = 37 };
    static const int64_t size[] = {numel};
    for (int i = 0; i < 2 * 3 * 5; i++) {
        const int parts = 1 + i / 2 % 3 * 3; /* 1, 4, 7 */
        lpsgd_hyper hyper = usual;
        hyper.p = norms[i / 6];
        hyper.accumulate = parts;
        test_list list = make_list(kinds[i % 2], size, 1, 0, (uint64_t)i), before = copy_list(&list);
        const lpsgd_buffer *b = list.buffers, *old = before.buffers;
        for (int part = 0; part < parts; part++) {
            hyper.continues = part > 0;
            hyper.momentum_only = part < parts - 1;
            assert_memory_equal(b->param, old->param, (size_t)(numel * (i % 2 ? 8 : 4)));
            assert_int_equal(step_list(&list, &hyper, 1, 1), LPSGD_OK);
        }
        for (int j = 0; j < numel; j++) {
            const double share = (1.0 - hyper.momentum) / parts;
            if (i % 2) {
                double m = ((const double *)old->momentum_buffer)[j];
                for (int part = 0; part < parts; part++)
                    m = fma(share, ((const double *)old->grad)[j], (part ? 1.0 : 0.9) * m);
                assert_memory_equal((const double *)b->momentum_buffer + j, &m, sizeof m);
            } else {
                float m = ((const float *)old->momentum_buffer)[j];
                for (int part = 0; part < parts; part++)
                    m = fmaf((float)share, ((const float *)old->grad)[j], (part ? 1.0f : 0.9f) * m);
                assert_memory_equal((const float *)b->momentum_buffer + j, &m, sizeof m);
            }
        }
        assert_memory_not_equal(b->param, old->param, (size_t)(numel * (i % 2 ? 8 : 4)));
        free_list(&list);
        free_list(&before);
    }
}

/* A last micro-batch of zeros moves the parameter by what the momentum has, and rounds that to itself. */
static void test_a_last_micro_batch_of_zeros_keeps_the_momentum(void **state)
{
    (void)state;
    for (int d = 0; d < kind_count; d++) {
        lpsgd_hyper hyper = usual;
        hyper.accumulate = 4;
        hyper.continues = 1;
        hyper.stochastic_rounding = 1;
        test_list list = make_list(kinds[d], some_sizes, 3, 0, 12), before = copy_list(&list);
        for (int b = 0; b < 3; b++)
            for (int64_t i = 0; i < some_sizes[b]; i++)
                store_bits((void *)(uintptr_t)list.buffers[b].grad, format_of(kinds[d].dtype), i, 0);
        assert_int_equal(step_list(&list, &hyper, 1, 1), LPSGD_OK);
        for (int b = 0; b < 3; b++)
            assert_memory_equal(list.buffers[b].momentum_buffer, before.buffers[b].momentum_buffer,
                                (size_t)(some_sizes[b] * format_of(kinds[d].momentum_dtype).size));
        assert_false(same_list(&list, &before));
        free_list(&list);
        free_list(&before);
    }
}

/* Stochastic rounding. */

static void test_stochastic_rounding_keeps_the_mean(void **state)
{
    (void)state;
    enum { numel = 1 << 20 };
    static const float fractions[] = {0.0f, 0x1p-16f, 0.125f, 0.5f, 0.9f};
    for (int f = 0; f < 5; f++)
        for (uint64_t step = 0; step < 3; step++) {
            const float x = -(1.0f + fractions[f] * 0x1p-7f);
            const uint64_t key = lpsgd_key(lpsgd_key(lpsgd_mix(1), step), 2);
            int64_t up[2] = {0, 0};
            for (uint64_t i = 0; i < numel; i++)
                for (int half = 0; half < 2; half++) {
                    const uint32_t random16 = lpsgd_random(key, i) >> 16 * half & 0xffff;
                    const uint16_t rounded = lpsgd_to_bfloat16_stochastic(x, random16);
                    assert_in_range(rounded, 0xbf80, 0xbf81);
                    up[half] += rounded == 0xbf81;
                }
            for (int half = 0; half < 2; half++) {
                const double mean = numel * (double)fractions[f];
                const double deviation = sqrt(mean * (1.0 - (double)fractions[f]));
                assert_true(fabs((double)up[half] - mean) <= 5.0 * deviation);
            }
        }
}

/* The mean is that of float16, whatever the number: normal, subnormal, near the largest. */
static void test_float8_rounding_keeps_the_mean(void **state)
{
    (void)state;
    enum { numel = 1000000 };
    static const float numbers[] = {1.0f,     1.0009765625f, -1.1f,    -0x1.fcp-3f, 0x1.5p-15f,
                                    0x1p-17f, -0x1.8p-24f,   50000.0f, 57343.0f,    0x1.2p-16f};
    for (int f = 0; f < 10; f++)
        for (uint64_t step = 0; step < 3; step++) {
            const float x = numbers[f], half = lpsgd_from_float16(lpsgd_to_float16(x));
            const uint64_t key = lpsgd_byte_key(lpsgd_key(lpsgd_mix(1), step), 2);
            const uint8_t low = (uint8_t)(lpsgd_to_float16(x) >> 8);
            const double from = (double)lpsgd_from_float8(low);
            const double to = (double)lpsgd_from_float8((uint8_t)(low + 1));
            int64_t away = 0;
            for (uint64_t i = 0; i < numel; i++) {
                const uint8_t b = lpsgd_to_float8_stochastic(x, lpsgd_random_byte(key, i));
                assert_in_range(b, low, low + 1);
                away += b != low;
            }
            const double probability = ((double)half - from) / (to - from);
            const double deviation = sqrt(numel * probability * (1.0 - probability));
            assert_true(fabs((double)away - numel * probability) <= 4.0 * deviation);
        }
}

/* What E5M2 holds stays, whatever the random bits; what it does not is one of its neighbours; beyond
 * the largest number it saturates. */
static void test_float8_rounding_leaves_what_is_exact_and_saturates(void **state)
{
    (void)state;
    for (uint32_t random8 = 0; random8 < 256; random8++) {
        for (uint32_t b = 0; b < 256; b++) {
            const float x = lpsgd_from_float8((uint8_t)b);
            const uint32_t expected = isnan(x)   ? (b & 0x80) | 0x7e
                                      : isinf(x) ? b - 1
                                                 : b;
            const uint8_t rounded = lpsgd_to_float8_stochastic(x, random8);
            assert_int_equal(isnan(x) ? rounded & 0x7f : rounded, isnan(x) ? 0x7e : expected);
        }
        static const float large[] = {57344.0f, 57345.0f, 61440.0f, 65504.0f, 65520.0f, 1e30f, INFINITY};
        for (int i = 0; i < 7; i++) {
            assert_int_equal(lpsgd_to_float8_stochastic(large[i], random8), 0x7b);
            assert_int_equal(lpsgd_to_float8_stochastic(-large[i], random8), 0xfb);
        }
        for (uint32_t h = 0; h < 0x7c00; h++) {
            const float x = lpsgd_from_float16((uint16_t)h);
            const uint32_t up = (h & 0xff) + random8 > 0xff && h < 0x7b00;
            assert_int_equal(lpsgd_to_float8_stochastic(x, random8), (h >> 8) + up);
            assert_int_equal(lpsgd_to_float8_stochastic(-x, random8), (h >> 8 | 0x80) + up);
        }
    }
    assert_int_equal(lpsgd_to_float8_stochastic(0x1p-25f, 255), 0); /* float16 has it as 0 */
    assert_int_equal(lpsgd_to_float8_stochastic(-0x1p-149f, 255), 0x80);
}

/* Every exponent: a buffer's numbers are read exactly, and kept where nothing moves them. */
static void test_every_momentum_exponent_keeps_what_a_buffer_holds(void **state)
{
    (void)state;
    for (int exponent = -126; exponent <= 126; exponent++) {
        lpsgd_hyper hyper = usual;
        lpsgd_scalars k;
        hyper.momentum_exponent = exponent;
        assert_int_equal(lpsgd_fold(&hyper, 1, &k), LPSGD_OK);
        for (uint32_t b = 0; b < 256; b++) {
            const float m = lpsgd_momentum_of_float8((uint8_t)b, &k);
            const double real = ldexp((double)lpsgd_from_float8((uint8_t)b), -exponent);
            if (isnan(m) || !(fabs(real) < 0x1p128))
                continue; /* beyond float32, as no step leaves it */
            assert_true((double)m == real);
            assert_int_equal(!signbit(m), b < 0x80);
            assert_int_equal(lpsgd_momentum_to_float8(m, 255, &k), b);
        }
    }
}

/* Between neighbours, steps, streams, seeds, distant indices, the elements of one hash, and with what
 * rounds bfloat16 the bits of bytes agree as often as coins do. */
static void test_random_bytes_are_independent(void **state)
{
    (void)state;
    enum { numel = 1 << 18, pairs = 12 };
    int64_t equal[pairs][8] = {{0}};
    const uint64_t rounding_key = lpsgd_key(lpsgd_mix(0), 0), key = lpsgd_byte_key(rounding_key, 0);
    for (uint64_t i = 0; i < numel; i++) {
        const uint32_t r = lpsgd_random_byte(key, i), bits = lpsgd_random(lpsgd_key(rounding_key, 0), i);
        const uint32_t others[pairs] = {
            lpsgd_random_byte(key, i + 1),
            lpsgd_random_byte(key, i + 16),
            lpsgd_random_byte(key, i + 32),
            lpsgd_random_byte(key, i + 64),
            lpsgd_random_byte(key, i + (UINT64_C(1) << 32)),
            lpsgd_random_byte(key, i + (UINT64_C(1) << 34)),
            lpsgd_random_byte(lpsgd_byte_key(lpsgd_key(lpsgd_mix(0), 1), 0), i),
            lpsgd_random_byte(lpsgd_byte_key(rounding_key, 1), i),
            lpsgd_random_byte(lpsgd_byte_key(lpsgd_key(lpsgd_mix(1), 0), 0), i),
            bits,
            bits >> 16,
            0,
        };
        for (int j = 0; j < pairs; j++)
            for (int bit = 0; bit < 8; bit++)
                equal[j][bit] += ~(r ^ others[j]) >> bit & 1;
    }
    for (int j = 0; j < pairs; j++)
        for (int bit = 0; bit < 8; bit++)
            assert_in_range(equal[j][bit], numel / 2 - 5 * 256, numel / 2 + 5 * 256);
}

/* The definition in numbers, so that no other order of the bytes passes. */
static void test_random_bytes_are_these_of_the_hash(void **state)
{
    (void)state;
    static const uint64_t bases[] = {0, 64, 1000 * 64, (UINT64_C(1) << 34) - 64, UINT64_C(1) << 40};
    for (int b = 0; b < 5; b++)
        for (uint64_t i = 0; i < 64; i++) {
            const uint32_t hash = lpsgd_random(7, bases[b] / 4 + i % 16);
            assert_int_equal(lpsgd_random_byte(7, bases[b] + i), hash >> 8 * (i / 16) & 0xff);
        }
    /* No two streams or steps, nor a stream and the step, share a key by their constants. */
    assert_true(lpsgd_byte_key(1, 2) == lpsgd_key(lpsgd_key(1, 0x6d6f6d656e74), 2));
}

/* A piece that begins at any element is stepped as a part of the whole: every offset, every length up to a
 * block and a bit. */
static void test_pieces_may_begin_anywhere(void **state)
{
    (void)state;
    enum { numel = 200 };
    const int64_t whole = numel;
    lpsgd_hyper hyper = usual;
    hyper.stochastic_rounding = 1;
    for (int d = 0; d < kind_count; d++) {
        const float_format f = format_of(kinds[d].dtype), m = format_of(kinds[d].momentum_dtype);
        test_list start = make_list(kinds[d], &whole, 1, 0, 11), expected = copy_list(&start);
        assert_int_equal(step_list(&expected, &hyper, 1, 1), LPSGD_OK);
        for (int64_t first = 0; first < 130; first++) {
            test_list cut = copy_list(&start);
            const lpsgd_buffer all = cut.buffers[0];
            for (int part = 0; part < 3; part++) {
                const int64_t ends[] = {0, first, first + (first * 7 + 1) % 70, numel};
                lpsgd_buffer *b = cut.buffers;
                b->numel = ends[part + 1] - ends[part];
                b->index = (uint64_t)ends[part];
                b->param = (char *)all.param + ends[part] * f.size;
                b->grad = (const char *)all.grad + ends[part] * f.size;
                b->momentum_buffer = (char *)all.momentum_buffer + ends[part] * m.size;
                assert_int_equal(step_list(&cut, &hyper, 1, 1), LPSGD_OK);
            }
            assert_true(same_list(&cut, &expected));
            free_list(&cut);
        }
        free_list(&start);
        free_list(&expected);
    }
}

/* Between neighbours, steps, streams, seeds, halves and distant indices the bits agree as often as
 * coins do. */
static void test_random_bits_are_independent(void **state)
{
    (void)state;
    enum { numel = 1 << 18, pairs = 8 };
    static const uint64_t far = UINT64_C(1) << 32;
    int64_t equal[pairs][32] = {{0}};
    const uint64_t key = lpsgd_key(lpsgd_key(lpsgd_mix(0), 0), 0);
    for (uint64_t i = 0; i < numel; i++) {
        const uint32_t r = lpsgd_random(key, i);
        const uint32_t others[pairs] = {
            lpsgd_random(key, i + 1),
            lpsgd_random(key, i + 64),
            lpsgd_random(key, i + far),
            lpsgd_random(lpsgd_key(lpsgd_key(lpsgd_mix(0), 1), 0), i),
            lpsgd_random(lpsgd_key(lpsgd_key(lpsgd_mix(0), 0), 1), i),
            lpsgd_random(lpsgd_key(lpsgd_key(lpsgd_mix(1), 0), 0), i),
            r << 16 | r >> 16,
            0,
        };
        for (int j = 0; j < pairs; j++)
            for (int bit = 0; bit < 32; bit++)
                equal[j][bit] += ~(r ^ others[j]) >> bit & 1;
    }
    for (int j = 0; j < pairs; j++)
        for (int bit = 0; bit < 32; bit++)
            assert_in_range(equal[j][bit], numel / 2 - 5 * 256, numel / 2 + 5 * 256);
}

static void test_stochastic_rounding_leaves_what_is_exact(void **state)
{
    (void)state;
    for (uint32_t h = 0; h <= 0xffff; h++) {
        const float x = lpsgd_from_bfloat16((uint16_t)h);
        const uint16_t rounded = lpsgd_to_bfloat16_stochastic(x, 0xffff);
        assert_int_equal(rounded, isnan(x) ? 0x7fc0 : h);
    }
}

/* Refused calls. */

typedef struct call {
    test_list list;
    lpsgd_hyper hyper;
    lpsgd_dtype dtype;
} call;

static call good_call(void)
{
    const call c = {make_list(kinds[0], some_sizes, 3, 0, 7), usual, LPSGD_FLOAT32};
    return c;
}

/* Makes the call, which must answer `status` and, unless that is LPSGD_OK, leave all bytes alone. */
static void assert_answer(const call *c, int has_momentum, lpsgd_status status)
{
    test_list before = copy_list(&c->list);
    const lpsgd_status answer = (has_momentum ? lpsgdm_step : lpsgd_step)(
        c->list.buffers, c->list.count, c->dtype, &c->hyper, 1);
    assert_string_equal(lpsgd_status_text(answer), lpsgd_status_text(status));
    assert_int_equal(same_list(&c->list, &before), status != LPSGD_OK);
    free_list(&before);
}

/* The statuses in the order in which a step checks, which is the order of lpsgd_status. The last
 * buffer is the bad one: those before it must stay untouched too. */
static void spoil(call *c, lpsgd_status with)
{
    lpsgd_buffer *last = &c->list.buffers[c->list.count - 1];
    switch (with) {
    case LPSGD_OK:
    case LPSGD_ERROR_CUDA:
        break;
    case LPSGD_ERROR_LR:
        c->hyper.lr = -1e-9;
        break;
    case LPSGD_ERROR_P:
        c->hyper.p = 1.999;
        break;
    case LPSGD_ERROR_MOMENTUM:
        c->hyper.momentum = 1.0;
        break;
    case LPSGD_ERROR_WEIGHT_DECAY:
        c->hyper.weight_decay = -1e-9;
        break;
    case LPSGD_ERROR_EPS:
        c->hyper.eps = -1e-9;
        break;
    case LPSGD_ERROR_PIVOT:
        c->hyper.pivot = 0.0;
        break;
    case LPSGD_ERROR_GRAD_SCALE:
        c->hyper.grad_scale = 0.0;
        break;
    case LPSGD_ERROR_MOMENTUM_EXPONENT:
        c->hyper.momentum_exponent = 127;
        break;
    case LPSGD_ERROR_ACCUMULATE:
        c->hyper.accumulate = -1;
        break;
    case LPSGD_ERROR_DTYPE:
        c->dtype = (lpsgd_dtype)5;
        break;
    case LPSGD_ERROR_NUMEL:
        last->numel = -1;
        break;
    case LPSGD_ERROR_NULL:
        last->param = NULL;
        break;
    case LPSGD_ERROR_ALIGNMENT:
        last->grad = (const char *)last->grad + 2;
        break;
    }
}

/* What LPSGD does not read. */
static int is_of_momentum(int status)
{
    return status == LPSGD_ERROR_MOMENTUM || status == LPSGD_ERROR_MOMENTUM_EXPONENT ||
           status == LPSGD_ERROR_ACCUMULATE;
}

static void test_a_refused_step_names_the_first_error_and_writes_nothing(void **state)
{
    (void)state;
    for (int first = LPSGD_OK; first <= LPSGD_ERROR_ALIGNMENT; first++)
        for (int second = first; second <= LPSGD_ERROR_ALIGNMENT; second++)
            for (int has_momentum = 0; has_momentum < 2; has_momentum++) {
                call c = good_call();
                spoil(&c, (lpsgd_status)first);
                if (second != first)
                    spoil(&c, (lpsgd_status)second);
                const int unread = !has_momentum && is_of_momentum(first);
                const int unread_too = !has_momentum && is_of_momentum(second);
                const int expected = first && !unread ? first : unread_too ? LPSGD_OK : second;
                assert_answer(&c, has_momentum, (lpsgd_status)expected);
                if (expected < LPSGD_ERROR_DTYPE && has_momentum)
                    assert_int_equal(lpsgd_check_hyper(&c.hyper), expected);
                free_list(&c.list);
            }
}

static void test_every_value_outside_a_range_is_refused(void **state)
{
    (void)state;
    static const struct {
        size_t offset;
        lpsgd_status status;
        double bad[4];
    } ranges[] = {
        {offsetof(lpsgd_hyper, lr), LPSGD_ERROR_LR, {NAN, -INFINITY, -1e-300, -1.0}},
        {offsetof(lpsgd_hyper, p), LPSGD_ERROR_P, {NAN, -INFINITY, 0x1.fffffffffffffp0, 0.0}},
        {offsetof(lpsgd_hyper, momentum), LPSGD_ERROR_MOMENTUM, {NAN, INFINITY, 1.0, -1e-300}},
        {offsetof(lpsgd_hyper, weight_decay), LPSGD_ERROR_WEIGHT_DECAY, {NAN, -INFINITY, -1e-300, -1.0}},
        {offsetof(lpsgd_hyper, eps), LPSGD_ERROR_EPS, {NAN, -INFINITY, -1e-300, -1.0}},
        {offsetof(lpsgd_hyper, pivot), LPSGD_ERROR_PIVOT, {NAN, INFINITY, 0.0, -1.0}},
        {offsetof(lpsgd_hyper, grad_scale), LPSGD_ERROR_GRAD_SCALE, {NAN, INFINITY, 0.0, -1.0}},
    };
    call c = good_call();
    for (int r = 0; r < 7; r++)
        for (int i = 0; i < 4; i++) {
            c.hyper = usual;
            memcpy((char *)&c.hyper + ranges[r].offset, &ranges[r].bad[i], sizeof(double));
            assert_answer(&c, 1, ranges[r].status);
            assert_answer(&c, 0, r == 2 ? LPSGD_OK : ranges[r].status);
        }
    free_list(&c.list);
}

static void test_exponents_outside_the_range_are_refused(void **state)
{
    (void)state;
    static const int bad[] = {-127, 127, INT_MIN, INT_MAX};
    call c = good_call();
    for (int i = 0; i < 4; i++) {
        c.hyper = usual;
        c.hyper.momentum_exponent = bad[i];
        assert_answer(&c, 1, LPSGD_ERROR_MOMENTUM_EXPONENT);
        assert_answer(&c, 0, LPSGD_OK);
    }
    free_list(&c.list);
}

/* Every pair of dtypes, and what is none. */
static void test_dtypes_that_do_not_go_together_are_refused(void **state)
{
    (void)state;
    const int64_t numel = 40;
    for (int i = 0; i < 7 * 7; i++) {
        const test_kind kind = {(lpsgd_dtype)(i / 7 - 1), (lpsgd_dtype)(i % 7 - 1)};
        int known = 0, is_param = 0;
        for (int d = 0; d < kind_count; d++) {
            known |= kinds[d].dtype == kind.dtype && kinds[d].momentum_dtype == kind.momentum_dtype;
            is_param |= kinds[d].dtype == kind.dtype;
        }
        call c = {make_list(kinds[1], &numel, 1, 0, 7), usual, kind.dtype};
        c.hyper.momentum_dtype = kind.momentum_dtype;
        assert_answer(&c, 0, is_param ? LPSGD_OK : LPSGD_ERROR_DTYPE);
        assert_answer(&c, 1, known ? LPSGD_OK : LPSGD_ERROR_DTYPE);
        free_list(&c.list);
    }
}

static void test_lists_that_are_no_lists_are_refused(void **state)
{
    (void)state;
    call c = good_call();
    c.list.count = -1;
    assert_int_equal(step_list(&c.list, &usual, 1, 1), LPSGD_ERROR_NUMEL);
    assert_int_equal(lpsgdm_step(NULL, 1, LPSGD_FLOAT32, &usual, 1), LPSGD_ERROR_NULL);
    assert_int_equal(lpsgdm_step(NULL, 0, LPSGD_FLOAT32, &usual, 1), LPSGD_OK);
    assert_int_equal(lpsgdm_step(NULL, 0, (lpsgd_dtype)-1, &usual, 1), LPSGD_ERROR_DTYPE);
    c.list.count = 3;
    c.list.buffers[0].numel = INT64_MAX / 4 - 33; /* the sum with the last is one too many */
    c.list.buffers[1].numel = 1;
    assert_answer(&c, 1, LPSGD_ERROR_NUMEL);
    free_list(&c.list);
}

static void test_pointers_that_are_not_looked_at_may_be_anything(void **state)
{
    (void)state;
    call c = good_call();
    const lpsgd_buffer good = c.list.buffers[0], empty = {.grad = (char *)good.param + 1};
    c.list.buffers[2] = empty;
    lpsgd_buffer *b = c.list.buffers;
    b[0].momentum_buffer = NULL;
    assert_int_equal(step_list(&c.list, &usual, 0, 1), LPSGD_OK);
    assert_int_equal(step_list(&c.list, &usual, 1, 1), LPSGD_ERROR_NULL);
    b[0].momentum_buffer = (char *)good.momentum_buffer + 1;
    assert_int_equal(step_list(&c.list, &usual, 0, 1), LPSGD_OK);
    assert_int_equal(step_list(&c.list, &usual, 1, 1), LPSGD_ERROR_ALIGNMENT);
    b[0] = good;
    assert_int_equal(step_list(&c.list, &usual, 1, 1), LPSGD_OK);
    free_list(&c.list);
}

static void test_status_texts_name_the_argument(void **state)
{
    (void)state;
    static const char *const names[] = {"no error", "lr",         "p ",    "momentum", "weight_decay",
                                        "eps",      "pivot",      "grad_scale", "momentum_exponent",
                                        "accumulate", "dtype",    "numel", "NULL",     "aligned",
                                        "CUDA",     "unknown"};
    for (int status = LPSGD_OK; status <= LPSGD_ERROR_CUDA + 1; status++)
        assert_non_null(strstr(lpsgd_status_text((lpsgd_status)status), names[status]));
    assert_non_null(strstr(lpsgd_status_text((lpsgd_status)-1), "unknown"));
}

/* The process: instruction sets and forks. */

static const char *const capabilities[] = {"default", "avx2", "avx512"};

static int best_capability(void)
{
#ifdef __x86_64__
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma"))
        return 0;
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                   __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                   __builtin_cpu_supports("avx512vl")
               ? 2
               : 1;
#else
    return 0;
#endif
}

/* What LPSGD_CPU_CAPABILITY = name (or NULL: unset) must give on this CPU. */
static const char *expected_capability(const char *name)
{
    int limit = 2;
    for (int i = 0; i < 2; i++)
        if (name && strcmp(name, capabilities[i]) == 0)
            limit = i;
    return capabilities[limit < best_capability() ? limit : best_capability()];
}

/* Runs body(argument) in a forked child, killed after 10 s; answers whether it returned 1. */
static int holds_in_child(int (*body)(const void *), const void *argument)
{
    fflush(NULL);
    const pid_t child = fork();
    if (child == 0) {
        alarm(10);
        _exit(body(argument) == 1 ? 0 : 1);
    }
    int status = 0;
    return child > 0 && waitpid(child, &status, 0) == child && WIFEXITED(status) &&
           WEXITSTATUS(status) == 0;
}

static int gives_expected_capability(const void *name)
{
    if (name)
        setenv("LPSGD_CPU_CAPABILITY", name, 1);
    else
        unsetenv("LPSGD_CPU_CAPABILITY");
    const int right = strcmp(lpsgd_cpu_capability(), expected_capability(name)) == 0;
    setenv("LPSGD_CPU_CAPABILITY", "default", 1); /* too late to matter */
    return right && strcmp(lpsgd_cpu_capability(), expected_capability(name)) == 0;
}

static void test_capability_is_the_best_unless_the_environment_names_a_lower(void **state)
{
    (void)state;
    static const char *const names[] = {NULL, "default", "avx2", "avx512", "avx1024", "AVX2", ""};
    for (int i = 0; i < 7; i++)
        assert_true(holds_in_child(gives_expected_capability, names[i]));
    const char *asked = getenv("LPSGD_CPU_CAPABILITY");
    assert_string_equal(lpsgd_cpu_capability(), expected_capability(asked));
    print_message("capability: %s, OpenMP: %d\n", lpsgd_cpu_capability(), lpsgd_has_openmp());
}

enum { worth_two_threads = 40000 };

static int steps_as_the_plain_loop(const void *unused)
{
    (void)unused;
    const int64_t numel = worth_two_threads;
    test_list list = make_list(kinds[0], &numel, 1, few_awkward, 8), expected = copy_list(&list);
    reference_step(&expected, &usual, 1);
    const int done = step_list(&list, &usual, 1, 2) == LPSGD_OK;
    canonicalize_nan(&list);
    const int same = same_list(&list, &expected);
    free_list(&list);
    free_list(&expected);
    return done && same;
}

static void test_a_forked_child_steps_after_a_parallel_step_of_its_parent(void **state)
{
    (void)state;
    assert_true(steps_as_the_plain_loop(NULL));
    assert_true(holds_in_child(steps_as_the_plain_loop, NULL));
}

static int grandchild_steps_after_a_parallel_region(const void *unused)
{
    int threads = 0;
#ifdef _OPENMP
#pragma omp parallel num_threads(2) reduction(+ : threads)
#endif
    threads++;
    return threads > 0 && holds_in_child(steps_as_the_plain_loop, unused);
}

/* Of a program that had not called the library before it forked. */
static void test_a_forked_child_steps_after_a_parallel_region_of_its_parent(void **state)
{
    (void)state;
    assert_true(holds_in_child(grandchild_steps_after_a_parallel_region, NULL));
}

int main(void)
{
    const char *asked = getenv("LPSGD_CPU_CAPABILITY");
    for (int i = best_capability() + 1; i < 3; i++)
        if (asked && strcmp(asked, capabilities[i]) == 0) {
            printf("SKIPPED: test_step for %s, which this CPU does not have\n", asked);
            return 0;
        }
    const struct CMUnitTest tests[] = {
        /* First, because children inherit what a call of the library has chosen; and before more
         * than two threads have run: a child of a fork while surplus threads end may find a lock of
         * the address sanitizer's allocator held for ever. */
        cmocka_unit_test(test_a_forked_child_steps_after_a_parallel_region_of_its_parent),
        cmocka_unit_test(test_capability_is_the_best_unless_the_environment_names_a_lower),
        cmocka_unit_test(test_a_forked_child_steps_after_a_parallel_step_of_its_parent),
        cmocka_unit_test(test_step_is_the_plain_loop_for_all_hyper_parameters_and_sizes),
        cmocka_unit_test(test_step_is_the_plain_loop_for_every_number_of_threads),
        cmocka_unit_test(test_step_is_the_plain_loop_for_many_small_buffers),
        cmocka_unit_test(test_lpsgdm_without_momentum_and_decay_is_lpsgd),
        cmocka_unit_test(test_p2_is_gradient_descent_bitwise),
        cmocka_unit_test(test_maximize_is_the_negated_gradient),
        cmocka_unit_test(test_zero_gradients_without_decay_change_no_bit),
        cmocka_unit_test(test_lr_0_changes_no_bit_of_a_parameter),
        cmocka_unit_test(test_micro_batches_are_summed_in_the_momentum),
        cmocka_unit_test(test_a_last_micro_batch_of_zeros_keeps_the_momentum),
        cmocka_unit_test(test_stochastic_rounding_keeps_the_mean),
        cmocka_unit_test(test_float8_rounding_keeps_the_mean),
        cmocka_unit_test(test_float8_rounding_leaves_what_is_exact_and_saturates),
        cmocka_unit_test(test_every_momentum_exponent_keeps_what_a_buffer_holds),
        cmocka_unit_test(test_random_bytes_are_independent),
        cmocka_unit_test(test_random_bytes_are_these_of_the_hash),
        cmocka_unit_test(test_pieces_may_begin_anywhere),
        cmocka_unit_test(test_random_bits_are_independent),
        cmocka_unit_test(test_stochastic_rounding_leaves_what_is_exact),
        cmocka_unit_test(test_a_refused_step_names_the_first_error_and_writes_nothing),
        cmocka_unit_test(test_every_value_outside_a_range_is_refused),
        cmocka_unit_test(test_exponents_outside_the_range_are_refused),
        cmocka_unit_test(test_dtypes_that_do_not_go_together_are_refused),
        cmocka_unit_test(test_lists_that_are_no_lists_are_refused),
        cmocka_unit_test(test_pointers_that_are_not_looked_at_may_be_anything),
        cmocka_unit_test(test_status_texts_name_the_argument),
    };
    cmocka_set_skip_filter(getenv("LPSGD_SKIP_TEST")); /* NULL skips none */
    return cmocka_run_group_tests(tests, NULL, NULL);
}
