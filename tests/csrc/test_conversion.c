/* SPDX-License-Identifier: MIT
 *
 * test_conversion.c: bfloat16 and float16 against a slow, obvious reading of their bits.
 */
#include "helpers.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>

typedef struct half_format {
    const char *name;
    int mantissa_bits, smallest_exponent; /* of the normal numbers */
    uint16_t infinity;
    float (*decode)(uint16_t);
    uint16_t (*encode)(float);
} half_format;

static float from_bfloat16(uint16_t h)
{
    return lpsgd_from_bfloat16(h);
}

static uint16_t to_bfloat16(float x)
{
    return lpsgd_to_bfloat16(x);
}

static float from_float16(uint16_t h)
{
    return lpsgd_from_float16(h);
}

static uint16_t to_float16(float x)
{
    return lpsgd_to_float16(x);
}

static const half_format formats[] = {
    {"bfloat16", 7, -126, 0x7f80, from_bfloat16, to_bfloat16},
    {"float16", 10, -14, 0x7c00, from_float16, to_float16},
};

static double reference_decode(uint16_t h, const half_format *f)
{
    const int magnitude = h & 0x7fff, one = 1 << f->mantissa_bits, field = magnitude / one;
    const int mantissa = magnitude % one + (field ? one : 0);
    const double value = ldexp(mantissa, f->smallest_exponent - f->mantissa_bits + field - !!field);
    return h & 0x8000 ? -value : value;
}

/* The bits of |x| rounded to a multiple of its unit in the last place, ties to even; a mantissa that
 * is rounded up to the next power of two carries into the exponent. */
static uint16_t reference_encode(float x, const half_format *f)
{
    const uint16_t sign = signbit(x) ? 0x8000 : 0;
    int exponent = x == 0.0f || isinf(x) ? f->smallest_exponent : ilogbf(x);
    if (exponent < f->smallest_exponent)
        exponent = f->smallest_exponent;
    const double units = nearbyint(ldexp(fabsf(x), f->mantissa_bits - exponent));
    const double bits = ldexp(exponent - f->smallest_exponent, f->mantissa_bits) + units;
    return sign | (bits < f->infinity ? (uint16_t)bits : f->infinity);
}

static void test_every_half_is_read_exactly_and_comes_back(void **state)
{
    (void)state;
    for (const half_format *f = formats; f < formats + 2; f++)
        for (int h = 0; h < 0x10000; h++) {
            const float x = f->decode((uint16_t)h);
            const int magnitude = h & 0x7fff;
            if (magnitude > f->infinity) {
                assert_true(isnan(x));
                assert_true((f->encode(x) & 0x7fff) > f->infinity);
                continue;
            }
            assert_int_equal(f->encode(x), h);
            assert_int_equal(!signbit(x), !(h & 0x8000));
            if (magnitude == f->infinity)
                assert_true(isinf(x));
            else
                assert_true((double)x == reference_decode((uint16_t)h, f));
        }
}

static void test_ties_go_to_even_and_their_neighbours_to_the_nearest(void **state)
{
    (void)state;
    for (const half_format *f = formats; f < formats + 2; f++)
        for (uint16_t h = 0; h < f->infinity; h++) {
            /* Infinity stands for the number that would follow the largest finite one. */
            const double low = reference_decode(h, f), high = reference_decode(h + 1, f);
            const float tie = (float)((low + high) / 2.0);
            const uint16_t even = h & 1 ? h + 1 : h;
            for (int sign = 0; sign < 2; sign++) {
                const uint16_t sign_bit = sign ? 0x8000 : 0;
                const float s = sign ? -1.0f : 1.0f;
                assert_int_equal(f->encode(s * tie), even | sign_bit);
                assert_int_equal(f->encode(s * nextafterf(tie, 0.0f)), h | sign_bit);
                assert_int_equal(f->encode(s * nextafterf(tie, INFINITY)), (h + 1) | sign_bit);
            }
        }
}

static void test_any_float_is_rounded_as_the_reference_does(void **state)
{
    (void)state;
    for (const half_format *f = formats; f < formats + 2; f++)
        for (uint64_t bits = 0; bits < UINT64_C(1) << 32; bits += 1009) {
            const float x = lpsgd_float((int32_t)(uint32_t)bits);
            if (isnan(x))
                assert_true((f->encode(x) & 0x7fff) > f->infinity);
            else
                assert_int_equal(f->encode(x), reference_encode(x, f));
        }
}

static void test_every_nan_stays_nan(void **state)
{
    (void)state;
    for (const half_format *f = formats; f < formats + 2; f++)
        for (int bit = 0; bit < 23; bit++) {
            const int32_t nan = 0x7f800000 | 1 << bit;
            assert_true((f->encode(lpsgd_float(nan)) & 0x7fff) > f->infinity);
            assert_true((f->encode(lpsgd_float(nan | INT32_MIN)) & 0x7fff) > f->infinity);
            assert_true((f->encode(lpsgd_float(nan | 0x7fffff)) & 0x7fff) > f->infinity);
        }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_every_half_is_read_exactly_and_comes_back),
        cmocka_unit_test(test_ties_go_to_even_and_their_neighbours_to_the_nearest),
        cmocka_unit_test(test_any_float_is_rounded_as_the_reference_does),
        cmocka_unit_test(test_every_nan_stays_nan),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
