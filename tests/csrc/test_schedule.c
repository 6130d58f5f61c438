/* SPDX-License-Identifier: MIT
 *
 * test_schedule.c: p over the epochs (eq 19) and rho of p (eq 20).
 */
#include "helpers.h"

#include <float.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>

static const struct {
    double p_max, p_min;
} ranges[] = {{6.0, 2.0}, {9.0, 2.0}, {2.0, 2.0}, {2.0, 20.3}, {7.7, 3.1}, {1e300, 2.0}, {5.3, 2.1}};
enum { range_count = sizeof ranges / sizeof *ranges };
static const double totals[] = {2.0, 3.0, 7.0, 60.0, 200.0, 1000.5, 1e5};
enum { total_count = sizeof totals / sizeof *totals };

/* Of the larger end: the sum of eq 19 is rounded at its size. */
static void test_cosine_p_is_within_2_ulp_of_the_larger_end(void **state)
{
    (void)state;
    const long double pi = 3.14159265358979323846264338327950288L;
    long double worst = 0.0L;
    for (int r = 0; r < range_count; r++)
        for (int t = 0; t < total_count; t++)
            for (double i = 0.0; i <= 1000.0; i++) {
                const double p_max = ranges[r].p_max, p_min = ranges[r].p_min, total = totals[t];
                const double s = i < 500.0 && i < total ? i + 1.0 : 1.0 + (total - 1.0) * i / 1000.0;
                const long double x = ((long double)s - 1.0L) / ((long double)total - 1.0L);
                const long double half = sinl(pi / 2.0L * (1.0L - x));
                const long double p = p_min + ((long double)p_max - p_min) * half * half;
                const double ulp = ldexp(1.0, ilogb(fmax(p_max, p_min)) - (DBL_MANT_DIG - 1));
                worst = fmaxl(worst, fabsl(lpsgd_cosine_p(s, total, p_max, p_min) - p) / ulp);
            }
    print_message("cosine_p: worst %.3Lf ulp\n", worst);
    assert_true(worst <= 2.0L);
}

static void test_cosine_p_starts_at_p_max_and_ends_at_p_min_exactly(void **state)
{
    (void)state;
    for (int r = 0; r < range_count; r++) {
        const double p_max = ranges[r].p_max, p_min = ranges[r].p_min;
        for (int t = 0; t < total_count; t++) {
            const double total = totals[t];
            assert_true(lpsgd_cosine_p(1.0, total, p_max, p_min) == p_max);
            assert_true(lpsgd_cosine_p(total, total, p_max, p_min) == p_min);
            assert_true(lpsgd_cosine_p(total + 0.5, total, p_max, p_min) == p_min);
            assert_true(lpsgd_cosine_p(1e300, total, p_max, p_min) == p_min);
        }
        assert_true(lpsgd_cosine_p(1.0, 1.0, p_max, p_min) == p_max);
        assert_true(lpsgd_cosine_p(1.5, 1.0, p_max, p_min) == p_min);
        assert_true(lpsgd_cosine_p(2.0, 1.0, p_max, p_min) == p_min);
        assert_true(lpsgd_cosine_p(2.0, 3.0, p_max, p_min) == p_min + (p_max - p_min) * 0.5);
    }
}

static void test_cosine_p_never_turns_back(void **state)
{
    (void)state;
    for (int r = 0; r < range_count; r++)
        for (int t = 0; t < total_count; t++) {
            const double p_max = ranges[r].p_max, p_min = ranges[r].p_min, total = totals[t];
            const double up = p_max < p_min ? -1.0 : 1.0;
            double before = p_max;
            for (double i = 0.0; i <= 20000.0; i++) {
                const double s = total < 20000.0 ? 1.0 + (total - 1.0) * i / 20000.0 : 1.0 + i;
                const double p = lpsgd_cosine_p(s, total, p_max, p_min);
                assert_true(up * p <= up * before && up * p >= up * p_min);
                before = p;
            }
        }
}

/* Rounding must not carry p beyond an end, where a step might even refuse it. */
static void test_cosine_p_stays_between_its_ends(void **state)
{
    (void)state;
    assert_true(lpsgd_cosine_p(2.0, 1e9, 2.0, 1e17) >= 2.0);
    uint64_t random = 1;
    for (int i = 0; i < 1000000; i++) {
        const double p_max = 2.0 + (double)(next_random(&random) % 100000) * 1e-3;
        const double p_min = 2.0 + (double)(next_random(&random) % 100000) * 1e-3;
        const double s = i % 2 ? 2.0 : 1e9 - 1.0, p = lpsgd_cosine_p(s, 1e9, p_max, p_min);
        assert_true(fmin(p_max, p_min) <= p && p <= fmax(p_max, p_min));
    }
}

static void test_cosine_p_of_bad_arguments_is_nan(void **state)
{
    (void)state;
    static const double bad[][4] = {
        {NAN, 9.0, 6.0, 2.0},      {1.0, NAN, 6.0, 2.0},      {1.0, 9.0, NAN, 2.0},
        {1.0, 9.0, 6.0, NAN},      {0.99, 9.0, 6.0, 2.0},     {-1.0, 9.0, 6.0, 2.0},
        {1.0, 0.99, 6.0, 2.0},     {1.0, 9.0, 1.99, 2.0},     {1.0, 9.0, 6.0, 1.99},
        {INFINITY, 9.0, 6.0, 2.0}, {1.0, INFINITY, 6.0, 2.0}, {1.0, 9.0, INFINITY, 2.0},
        {1.0, 9.0, 6.0, INFINITY},
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        assert_true(isnan(lpsgd_cosine_p(bad[i][0], bad[i][1], bad[i][2], bad[i][3])));
}

static void test_rho_is_eq_20(void **state)
{
    (void)state;
    assert_true(lpsgd_rho(2.0) == 0.0);
    assert_true(lpsgd_rho(3.0) == 0.5);
    assert_true(lpsgd_rho(6.0) == 0.8);
    assert_true(lpsgd_rho(1e300) == 1.0);
    assert_true(lpsgd_rho(INFINITY) == 1.0);
    for (double p = 2.0; p < 200.0; p += 0.37) {
        const long double rho = ((long double)p - 2.0L) / ((long double)p - 1.0L);
        assert_true(fabsl(lpsgd_rho(p) - rho) <= 0x1.8p-53L * rho * 2.0L);
        assert_true(lpsgd_rho(p) >= 0.0 && lpsgd_rho(p) < 1.0);
    }
    static const double bad[] = {NAN, 0x1.fffffffffffffp0, 1.0, 0.0, -3.0, -INFINITY};
    for (int i = 0; i < 6; i++)
        assert_true(isnan(lpsgd_rho(bad[i])));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_cosine_p_is_within_2_ulp_of_the_larger_end),
        cmocka_unit_test(test_cosine_p_starts_at_p_max_and_ends_at_p_min_exactly),
        cmocka_unit_test(test_cosine_p_never_turns_back),
        cmocka_unit_test(test_cosine_p_stays_between_its_ends),
        cmocka_unit_test(test_cosine_p_of_bad_arguments_is_nan),
        cmocka_unit_test(test_rho_is_eq_20),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
