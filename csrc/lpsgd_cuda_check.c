/* SPDX-License-Identifier: MIT
 *
 * lpsgd_cuda_check.c: the steps of lpsgd_cuda_check.h, and the CPU's answer to them.
 */
#include "lpsgd_cuda_check.h"
#include "lpsgd_internal.h"

#include <inttypes.h>
#include <stdio.h>

enum { LONG = 21, SHORT_AT = 23, SHORT = 3, FOUND_INF = 3 };

/* pow() is within 2 ulp on a GPU and 1 ulp here; two products and a sum round what comes of it. */
enum { FLOAT64_POWER_ULPS = 8 };

lpsgd_cuda_check lpsgd_cuda_check_number(int i, lpsgd_cuda_check_memory *memory)
{
    static const lpsgd_dtype dtypes[LPSGD_CUDA_KINDS][2] = {
        [LPSGD_CUDA_FLOAT32] = {LPSGD_FLOAT32, LPSGD_FLOAT32},
        [LPSGD_CUDA_FLOAT64] = {LPSGD_FLOAT64, LPSGD_FLOAT64},
        [LPSGD_CUDA_BFLOAT16] = {LPSGD_BFLOAT16, LPSGD_BFLOAT16},
        [LPSGD_CUDA_FLOAT16] = {LPSGD_FLOAT16, LPSGD_FLOAT16},
        [LPSGD_CUDA_BFLOAT16_WIDE] = {LPSGD_BFLOAT16, LPSGD_FLOAT32},
        [LPSGD_CUDA_FLOAT16_WIDE] = {LPSGD_FLOAT16, LPSGD_FLOAT32},
        [LPSGD_CUDA_FLOAT32_HALF] = {LPSGD_FLOAT32, LPSGD_BFLOAT16},
        [LPSGD_CUDA_FLOAT16_HALF] = {LPSGD_FLOAT16, LPSGD_BFLOAT16},
        [LPSGD_CUDA_FLOAT32_BYTE] = {LPSGD_FLOAT32, LPSGD_FLOAT8_E5M2},
        [LPSGD_CUDA_BFLOAT16_BYTE] = {LPSGD_BFLOAT16, LPSGD_FLOAT8_E5M2},
        [LPSGD_CUDA_FLOAT16_BYTE] = {LPSGD_FLOAT16, LPSGD_FLOAT8_E5M2},
    };
    /* With 8 the power of a huge number is too small for a float of full precision. */
    static const double p[] = {2.0, 8.0, INFINITY, [FOUND_INF] = 8.0};
    const int kind = i / 16, which = i / 4 % 4;
    const lpsgd_dtype dtype = dtypes[kind][0], momentum_dtype = dtypes[kind][1];
    const int64_t size = lpsgd_itemsize(dtype), momentum_size = lpsgd_itemsize(momentum_dtype);
    lpsgd_cuda_check check = {
        .dtype = dtype,
        .hyper =
            {
                .lr = 0.0078125, /* every dtype holds it and p */
                .p = p[which],
                .momentum = 0.9,
                .weight_decay = 0.1,
                .eps = which == 1 ? 0.0 : 1e-8, /* with 0 subnormal numbers take a power, too */
                .pivot = 1.0,
                .grad_scale = 1.0,
                .momentum_dtype = momentum_dtype,
                .momentum_exponent = 3,
                .stochastic_rounding = which == 1,
                .seed = 1,
            },
        .has_momentum = i % 2,
        .few = i / 2 % 2,
        .found_inf = which == FOUND_INF,
    };
    if (check.found_inf || (which + i) % 2) {
        check.device_number[0] = (lpsgd_device_number){&memory->lr, dtype};
        check.device_number[1] = (lpsgd_device_number){&memory->p, dtype};
        check.device_number[2] = (lpsgd_device_number){&memory->found_inf, dtype};
    }
    for (int b = 0; b < 2; b++) {
        const int64_t first = b ? SHORT_AT : 0; /* not aligned to 16 bytes: no vectors */
        check.list[b] = (lpsgd_buffer){
            .param = (char *)memory->param + first * size,
            .grad = (char *)memory->grad + first * size,
            .momentum_buffer = (char *)memory->momentum_buffer + first * momentum_size,
            .numel = b ? SHORT : LONG,
            .stream = (uint64_t)b,
            .index = UINT64_C(1) << 32,
        };
    }
    return check;
}

static void store_number(void *at, lpsgd_dtype dtype, double number)
{
    const float single = (float)number;
    const uint16_t half =
        dtype == LPSGD_BFLOAT16 ? lpsgd_to_bfloat16(single) : lpsgd_to_float16(single);
    const void *from = dtype == LPSGD_FLOAT64   ? (const void *)&number
                       : dtype == LPSGD_FLOAT32 ? (const void *)&single
                                                : &half;
    memcpy(at, from, (size_t)lpsgd_itemsize(dtype));
}

/* Where a GPU is, the first byte is the lowest. */
static void store_bits(void *array, lpsgd_dtype dtype, int j, uint64_t bits)
{
    const size_t size = (size_t)lpsgd_itemsize(dtype);
    memcpy((char *)array + (size_t)j * size, &bits, size);
}

static uint64_t load_bits(const void *array, lpsgd_dtype dtype, int j)
{
    const size_t size = (size_t)lpsgd_itemsize(dtype);
    uint64_t bits = 0;
    memcpy(&bits, (const char *)array + (size_t)j * size, size);
    return bits;
}

/* Of eight elements five are normal, of any size, and one each is huge, zero and subnormal. Parameters
 * are at most 1, and every other one subnormal or zero, so that they hide nothing of a step. Gradients
 * and momentum have the same sign and parameters the other one, so that no step cancels what pow()
 * rounds. */
static void fill_array(void *array, lpsgd_dtype dtype, uint64_t seed, int is_param)
{
    static const struct {
        int mantissa;
        uint64_t bias; /* of the exponents, of which twice it is the highest */
    } formats[] = {
        [LPSGD_FLOAT32] = {23, 127},
        [LPSGD_FLOAT64] = {52, 1023},
        [LPSGD_BFLOAT16] = {7, 127},
        [LPSGD_FLOAT16] = {10, 15},
        [LPSGD_FLOAT8_E5M2] = {2, 15},
    };
    const int mantissa = formats[dtype].mantissa;
    const uint64_t bias = formats[dtype].bias;
    for (int j = 0; j < LPSGD_CUDA_CHECK_NUMEL; j++) {
        const uint64_t random = lpsgd_key(seed, (uint64_t)j), high = random >> 52;
        const uint64_t top = UINT64_C(1) << (mantissa - 1), fraction = random & (2 * top - 1);
        const uint64_t exponent = is_param     ? (j % 2 ? bias - 1 - high % 14 : 0)
                                  : j % 8 == 5 ? 2 * bias
                                               : 1 + high % (2 * bias);
        const uint64_t sign = (uint64_t)(j % 3 == 0) ^ (uint64_t)is_param;
        const uint64_t magnitude = j % 8 == 7   ? (fraction | top) >> (j - 7 + (int)(seed / 2 % 2))
                                   : j % 8 == 6 ? 0
                                                : exponent << mantissa | fraction;
        store_bits(array, dtype, j, sign << (8 * lpsgd_itemsize(dtype) - 1) | magnitude);
    }
}

void lpsgd_cuda_check_fill(int i, lpsgd_cuda_check_memory *memory)
{
    const lpsgd_cuda_check check = lpsgd_cuda_check_number(i, memory);
    memset(memory, 0, sizeof *memory);
    fill_array(memory->param, check.dtype, 3 * (uint64_t)i, 1);
    fill_array(memory->grad, check.dtype, 3 * (uint64_t)i + 1, 0);
    fill_array(memory->momentum_buffer, check.hyper.momentum_dtype, 3 * (uint64_t)i + 2, 0);
    store_number(&memory->lr, check.dtype, check.hyper.lr);
    store_number(&memory->p, check.dtype, check.hyper.p);
    store_number(&memory->found_inf, check.dtype, check.found_inf);
}

/* Whether two arrays are the same, up to `ulps`. */
static int same_arrays(const char *name, const void *array, const void *expected,
                       lpsgd_dtype dtype, uint64_t ulps, char *text, size_t size)
{
    for (int j = 0; j < LPSGD_CUDA_CHECK_NUMEL; j++) {
        const uint64_t a = load_bits(array, dtype, j), b = load_bits(expected, dtype, j);
        if (a - b + ulps > 2 * ulps) {
            const int digits = 2 * (int)lpsgd_itemsize(dtype);
            snprintf(text, size, "element %d of %s is 0x%0*" PRIx64 " in place of 0x%0*" PRIx64, j,
                     name, digits, a, digits, b);
            return 0;
        }
    }
    return 1;
}

int lpsgd_cuda_check_passes(int i, const lpsgd_cuda_check_memory *memory, char *text, size_t size)
{
    lpsgd_cuda_check_memory expected;
    const lpsgd_cuda_check check = lpsgd_cuda_check_number(i, &expected);
    const int rounds_power = check.dtype == LPSGD_FLOAT64 && check.hyper.p == 8.0;
    lpsgd_cuda_check_fill(i, &expected);
    if (!check.found_inf)
        (check.has_momentum ? lpsgdm_step : lpsgd_step)(check.list, 2, check.dtype, &check.hyper, 1);
    return same_arrays("momentum_buffer", memory->momentum_buffer, expected.momentum_buffer,
                       check.hyper.momentum_dtype, 0, text, size) &&
           same_arrays("param", memory->param, expected.param, check.dtype,
                       rounds_power ? FLOAT64_POWER_ULPS : 0, text, size);
}
