/* SPDX-License-Identifier: MIT
 *
 * test_accuracy.c: the bounds in ulp that lpsgd.h and lpsgd_element.h promise, and the edge cases of
 * u.
 */
#include "accuracy.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>

enum { mantissas = 3000 };

static float direction_by(lpsgd_rule rule, float x, const lpsgd_scalars *k)
{
    return lpsgd_direction(x, rule, &k->tables, k);
}

static float direction(float x, const lpsgd_scalars *k)
{
    return direction_by(LPSGD_RULE_POWER, x, k);
}

static void test_power_is_within_4_ulp_for_every_exponent(void **state)
{
    (void)state;
    uint64_t random = 1;
    for (int r = 0; r < rho_count; r++) {
        const lpsgd_scalars k = scalars_for(rhos[r], 0.0);
        double worst = 0.0, worst_in_octave = 0.0;
        /* Exponent 0 is that of the subnormal numbers: all 23 of their binades. */
        for (int32_t exponent = 0; exponent < 255; exponent++)
            for (int32_t i = 0; i < mantissas; i++) {
                int32_t mantissa = (int32_t)(next_random(&random) & 0x7fffff);
                if (exponent == 0)
                    mantissa = mantissa >> i % 23 | 1;
                else if (i < 2)
                    mantissa = i * 0x7fffff;
                worst = fmax(worst, power_error(lpsgd_float(exponent << 23 | mantissa), &k));
            }
        for (int32_t mantissa = r % 3; mantissa < 1 << 23; mantissa += 3)
            worst_in_octave =
                fmax(worst_in_octave, power_error(lpsgd_float(127 << 23 | mantissa), &k));
        print_message("rho %.4f: worst %.4f ulp over all exponents, %.4f over a third of [1, 2)\n",
                      k.rho64, worst, worst_in_octave);
        assert_true(worst <= 4.0);
        assert_true(worst_in_octave <= 4.0);
    }
}

/* Where roundings of the tables add up: the exponent, ordinary, whose coarse * fine errs most in a
 * direction, and the eighth whose root does, as the bits of the least y there. */
static int32_t worst_tables(const lpsgd_tables *tables, double rho, double direction)
{
    double octaves = 0.0, root = 0.0;
    int32_t exponent = 1, eighth = 0;
    for (int32_t i = 1; i < 252; i++) {
        const double product = (double)tables->coarse[i >> 3] * tables->fine[i & 7];
        const double error = direction * (product * pow(2.0, rho * (i - 127)) - 1.0);
        if (error > octaves)
            octaves = error, exponent = i;
    }
    for (int32_t i = 0; i < 8; i++) {
        const double error = direction * (tables->root[i] * pow(tables->reciprocal[i], -rho) - 1.0);
        if (error > root)
            root = error, eighth = i;
    }
    return exponent << 23 | eighth << 20;
}

static void test_power_is_within_4_ulp_and_u_within_5_for_any_rho(void **state)
{
    (void)state;
    uint64_t random = 5;
    double worst = 0.0, worst_u = 0.0;
    for (int r = 0; r < 4000; r++) {
        const double uniform = (double)(next_random(&random) >> 11) * 0x1p-53;
        const lpsgd_scalars k = scalars_for(r % 4 ? 0.85 + 0.15 * uniform : uniform, 0.0);
        const int32_t least = worst_tables(&k.tables, k.rho64, r % 2 ? 1.0 : -1.0);
        for (int i = 0; i < 1000; i++) {
            const float y = lpsgd_float(least | (int32_t)(next_random(&random) >> 44));
            const double power = pow((double)y, -k.rho64);
            worst = fmax(worst, power_error(y, &k));
            worst_u = fmax(worst_u, error_in_ulp(direction(y, &k), y * power, FLT_MIN));
        }
    }
    print_message("random rho: worst %.4f ulp, u within %.4f ulp\n", worst, worst_u);
    assert_true(worst <= 4.0);
    assert_true(worst_u <= 5.0);
}

static void test_power_of_ordinary_y_needs_no_scaling(void **state)
{
    (void)state;
    uint64_t random = 2;
    for (int r = 0; r < rho_count; r++) {
        const lpsgd_scalars k = scalars_for(rhos[r], 0.0);
        for (int i = 0; i < 100000; i++) {
            const float y = lpsgd_float((int32_t)(next_random(&random) & 0x7fffffff));
            const lpsgd_scaled_power power = lpsgd_power(y, &k.tables, &k);
            const float coarse = k.tables.coarse[lpsgd_bits(y) >> 26];
            const int ordinary = y >= 0x1p-126f && y < 0x1p125f;
            assert_int_equal(lpsgd_extraordinary(y) < LPSGD_ORDINARY, ordinary);
            if (ordinary)
                assert_true(power.w == lpsgd_ordinary_power(y, coarse, &k.tables, &k) &&
                            power.before == 1 && power.after == 1);
        }
        /* The kernels take 0 for ordinary. */
        assert_true(isfinite(lpsgd_ordinary_power(0.0f, k.tables.coarse[0], &k.tables, &k)));
    }
}

static void test_direction_is_within_5_ulp_and_odd(void **state)
{
    (void)state;
    static const double eps[] = {0.0, 1e-42, 1e-8, 1.0, 1e38};
    uint64_t random = 3;
    for (int r = 0; r < rho_count; r++) {
        double worst = 0.0;
        for (int e = 0; e < 5; e++) {
            const lpsgd_scalars k = scalars_for(rhos[r], eps[e]);
            for (int32_t exponent = 0; exponent < 255; exponent++)
                for (int i = 0; i < 400; i++) {
                    int32_t mantissa = (int32_t)(next_random(&random) & 0x7fffff);
                    if (exponent == 0)
                        mantissa = mantissa >> i % 23 | 1;
                    const float x = lpsgd_float(exponent << 23 | mantissa), y = x + k.eps;
                    const float u = direction(x, &k);
                    assert_true(u == 0.0f || lpsgd_bits(direction(-x, &k)) == lpsgd_bits(-u));
                    if (isinf(y))
                        assert_true(u == 0.0f);
                    else
                        worst = fmax(worst, error_in_ulp(u, x * pow(y, -k.rho64), FLT_MIN));
                }
        }
        print_message("rho %.4f: u within %.4f ulp\n", rhos[r], worst);
        assert_true(worst <= 5.0);
    }
}

static void test_edge_cases_of_direction(void **state)
{
    (void)state;
    static const lpsgd_rule rules[] = {LPSGD_RULE_SGD, LPSGD_RULE_POWER, LPSGD_RULE_SIGN};
    for (int r = 0; r < rho_count; r++)
        for (int e = 0; e < 2; e++) {
            const lpsgd_scalars k = scalars_for(rhos[r], e ? 1e-8 : 0.0);
            const lpsgd_rule rule = rules[(rhos[r] > 0.0) + (rhos[r] == 1.0)];
            assert_int_equal(k.rule, rule);
            assert_int_equal(lpsgd_bits(direction_by(rule, 0.0f, &k)), lpsgd_bits(0.0f));
            assert_int_equal(lpsgd_bits(direction_by(rule, -0.0f, &k)), lpsgd_bits(0.0f));
            assert_true(isnan(direction_by(rule, NAN, &k)));
            assert_true(lpsgd_direction64(-0.0, rule, &k) == 0.0);
            assert_false(signbit(lpsgd_direction64(-0.0, rule, &k)));
            assert_true(isnan(lpsgd_direction64(NAN, rule, &k)));
            if (rule == LPSGD_RULE_SGD) {
                assert_true(direction_by(rule, INFINITY, &k) == INFINITY);
                assert_true(lpsgd_direction64(INFINITY, rule, &k) == INFINITY);
                continue;
            }
            /* inf / inf. */
            assert_true(isnan(direction_by(rule, INFINITY, &k)));
            assert_true(isnan(direction_by(rule, -INFINITY, &k)));
            assert_true(isnan(lpsgd_direction64(INFINITY, rule, &k)));
            lpsgd_scalars huge = k;
            huge.eps = FLT_MAX;
            huge.eps64 = DBL_MAX;
            assert_true(direction_by(rule, FLT_MAX, &huge) == 0.0f); /* y infinite, x not */
            assert_true(lpsgd_direction64(DBL_MAX, rule, &huge) == 0.0);
        }
    /* |u| = |x|^(1 - rho) at both ends of the range. */
    const float ends[] = {FLT_TRUE_MIN, 0x1p-127f, FLT_MIN, 0x1p127f, FLT_MAX};
    for (int i = 0; i < 5; i++) {
        const lpsgd_scalars near_0 = scalars_for(1e-6, 0.0), near_1 = scalars_for(1.0 - 1e-9, 0.0);
        assert_true(error_in_ulp(direction(ends[i], &near_0),
                                 pow(ends[i], 1.0 - near_0.rho64), FLT_MIN) <= 5.0);
        assert_true(error_in_ulp(direction(ends[i], &near_1),
                                 pow(ends[i], 1.0 - near_1.rho64), FLT_MIN) <= 5.0);
    }
}

/* x86's long double has 11 bits more than double; elsewhere there may be nothing to compare with. */
static void test_float64_direction_is_within_3_ulp(void **state)
{
    (void)state;
#if LDBL_MANT_DIG < 64
    print_message("SKIPPED: long double is no wider than double\n");
    skip();
#else
    uint64_t random = 4;
    for (int r = 0; r < rho_count; r++) {
        long double worst[2] = {0.0L, 0.0L}; /* where pow() suffices, and where its root is squared */
        for (int i = 0; i < 150000; i++) {
            const lpsgd_scalars k = scalars_for(rhos[r], i % 4 ? 0.0 : 1e-8);
            int64_t bits = (int64_t)(next_random(&random) >> 12);
            if (i % 8 == 1) /* subnormal */
                bits = bits >> next_random(&random) % 52 | 1;
            else
                bits |= (i % 8 == 2 ? 2046 : 1 + (int64_t)(next_random(&random) % 2046)) << 52;
            double x;
            memcpy(&x, &bits, sizeof x);
            const double y = x + k.eps64, u = lpsgd_direction64(x, k.rule, &k);
            assert_true(lpsgd_direction64(-x, k.rule, &k) == -u);
            const long double real = x * powl(y, -(long double)k.rho64);
            const long double size = fmaxl(real, DBL_MIN);
            const long double ulp = ldexpl(1.0L, ilogbl(size) - (DBL_MANT_DIG - 1));
            const int rare = y < 0x1p-1022 || y >= 0x1p1022;
            worst[rare] = fmaxl(worst[rare], fabsl(u - real) / ulp);
        }
        print_message("rho %.4f: float64 u within %.3Lf ulp, %.3Lf for subnormal and huge x\n",
                      rhos[r], worst[0], worst[1]);
        assert_true(worst[0] <= 3.0L && worst[1] <= 3.0L);
    }
#endif
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_power_is_within_4_ulp_for_every_exponent),
        cmocka_unit_test(test_power_is_within_4_ulp_and_u_within_5_for_any_rho),
        cmocka_unit_test(test_power_of_ordinary_y_needs_no_scaling),
        cmocka_unit_test(test_direction_is_within_5_ulp_and_odd),
        cmocka_unit_test(test_edge_cases_of_direction),
        cmocka_unit_test(test_float64_direction_is_within_3_ulp),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
