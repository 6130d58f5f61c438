/* SPDX-License-Identifier: MIT
 *
 * lpsgd_element.h: the arithmetic of one element, for C and CUDA alike.
 *
 * Contract of bits (lpsgd.h): only + - * /, fused multiply-add, comparisons and integer operations,
 * in the order written here. Compile with contraction off (-ffp-contract=off, -fmad=false).
 *
 * (|x| + eps)^-rho is a product of three entries of tables, which are made anew for every step, and of
 * a polynomial of degree 5. Within 4 ulp (tests/csrc/test_accuracy.c).
 */
#ifndef LPSGD_ELEMENT_H
#define LPSGD_ELEMENT_H

#include "lpsgd.h"

#include <math.h>
#include <stdint.h>
#include <string.h>

#ifdef __CUDACC__
#define LPSGD_INLINE static __host__ __device__ __forceinline__
#define LPSGD_FMAF(a, b, c) fmaf(a, b, c)
#define LPSGD_FMA(a, b, c) fma(a, b, c)
#else
#define LPSGD_INLINE static inline __attribute__((always_inline))
#define LPSGD_FMAF(a, b, c) __builtin_fmaf(a, b, c)
#define LPSGD_FMA(a, b, c) __builtin_fma(a, b, c)
#endif

/* What u needs: nothing at rho = 0, a division at rho = 1, else the power. */
typedef enum lpsgd_rule {
    LPSGD_RULE_SGD,
    LPSGD_RULE_SIGN,
    LPSGD_RULE_POWER,
    LPSGD_RULE_REST /* lr = 0, or momentum only: param is not written, so that even a NaN keeps its bits */
} lpsgd_rule;

/* y^-rho for y = 2^e * m, 1 <= m < 2 (lpsgd_power). The upper five bits of e + 127 choose from `coarse`,
 * the lower three from `fine`, and the upper three bits after m's point from `reciprocal` and `root`. */
typedef struct lpsgd_tables {
    float coarse[32];    /* 2^(-rho (8 i - 127)) */
    float fine[8];       /* 2^(-rho i) */
    float reciprocal[8]; /* of the middle of an eighth of [1, 2) */
    float root[8];       /* reciprocal^rho */
    float subnormal[4];  /* coarse for e + 127 - 24, times 2^-24 */
} lpsgd_tables;

/* The hyper-parameters of one step, folded once in double by lpsgd_fold_values. */
typedef struct lpsgd_scalars {
    lpsgd_rule rule;
    float momentum_weight;
    float grad_weight;
    float grad_factor; /* 1 / grad_scale; its sign carries `maximize` */
    float decay;       /* 1 - lr * weight_decay */
    float step_size;   /* -lr * pivot^(-1 / (p - 1)) <= 0 */
    float eps;
    lpsgd_tables tables;
    float series[5]; /* (1 + r)^-rho = 1 + r (series[0] + r (series[1] + ...)), |r| < 1/16 */
    /* The same in double, for float64. */
    double momentum_weight64, grad_weight64, grad_factor64, decay64, step_size64, eps64, rho64;
    lpsgd_dtype momentum_dtype;
    float momentum_scale, momentum_unscale; /* of float8_e5m2: 2^momentum_exponent and its inverse */
    int stochastic_rounding;
    uint64_t rounding_key; /* of seed and step */
} lpsgd_scalars;

/* Eq 20; NaN for p < 2. */
LPSGD_INLINE double lpsgd_rho_of(double p)
{
    if (!(p >= 2.0))
        return NAN;
    return isinf(p) ? 1.0 : (p - 2.0) / (p - 1.0);
}

LPSGD_INLINE int32_t lpsgd_bits(float x)
{
    int32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

LPSGD_INLINE float lpsgd_float(int32_t bits)
{
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* Spreads the bits of x over 64 (the finalizer of SplitMix64). */
LPSGD_INLINE uint64_t lpsgd_mix(uint64_t x)
{
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    return x ^ x >> 31;
}

/* A key from a key and a number; different numbers give different keys. */
LPSGD_INLINE uint64_t lpsgd_key(uint64_t key, uint64_t number)
{
    return lpsgd_mix(key + 0x9e3779b97f4a7c15u * (number + 1));
}

/* The key of the random bytes that round a parameter's float8_e5m2, independent of the one of its
 * bfloat16, lpsgd_key(rounding_key, stream). */
LPSGD_INLINE uint64_t lpsgd_byte_key(uint64_t rounding_key, uint64_t stream)
{
    return lpsgd_key(lpsgd_key(rounding_key, 0x6d6f6d656e74u), stream);
}

/* 2^x for -1 <= x <= 0, by Taylor's series about -1/2. */
LPSGD_INLINE double lpsgd_exp2_of(double x)
{
    const double coefficient[] = {
        1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880, 1.0 / 40320, 1.0 / 5040,
        1.0 / 720,       1.0 / 120,      1.0 / 24,      1.0 / 6,      1.0 / 2,     1.0,
    };
    const double t = (x + 0.5) * 0.69314718055994530942;
    double series = coefficient[0];
    for (int i = 1; i < 12; i++)
        series = series * t + coefficient[i];
    return 0.70710678118654752440 * (series * t + 1.0);
}

LPSGD_INLINE void lpsgd_fold_tables(double rho, lpsgd_tables *tables)
{
    const double reciprocal[8] = {
        /* 16 / (17 + 2 i) in float */
        0x1.e1e1e2p-1, 0x1.af286cp-1, 0x1.861862p-1, 0x1.642c86p-1,
        0x1.47ae14p-1, 0x1.2f684cp-1, 0x1.1a7b96p-1, 0x1.08421p-1,
    };
    const double log2_reciprocal[8] = {
        -0.087462835875881578802, -0.24792750269466985491, -0.39231739590647134185,
        -0.52356192918472392525,  -0.6438562220214720929,  -0.75488749141455290548,
        -0.85798100050202997019,  -0.95419635338253856519,
    };
    const double octave = lpsgd_exp2_of(-rho); /* y^-rho at y = 2 */
    const double square = octave * octave, eighth_power = square * square * (square * square);
    double fine = 1.0, up = octave, down = octave; /* 8 i - 127 is 1 at i = 16 */
    for (int i = 0; i < 8; i++, fine *= octave) {
        tables->fine[i] = (float)fine;
        tables->reciprocal[i] = (float)reciprocal[i];
        tables->root[i] = (float)lpsgd_exp2_of(rho * log2_reciprocal[i]);
    }
    for (int i = 16; i < 32; i++, up *= eighth_power)
        tables->coarse[i] = (float)up;
    for (int i = 15; i >= 0; i--)
        tables->coarse[i] = (float)(down /= eighth_power);
    for (int i = 3; i >= 0; i--, down /= eighth_power)
        tables->subnormal[i] = (float)(down * 0x1p-24);
}

/* The binomial series up to r^7, with r^6 and r^7 replaced by what the Chebyshev polynomials of their
 * degree say of the lower powers, for |r| <= 1/17. */
LPSGD_INLINE void lpsgd_fold_series(double rho, float *series)
{
    const double square = 1.0 / 17.0 / 17.0;
    double b[8];
    b[0] = 1.0;
    for (int i = 1; i < 8; i++)
        b[i] = b[i - 1] * (-rho - (i - 1)) / i;
    b[5] += b[7] * (7.0 / 4.0) * square;
    b[4] += b[6] * (3.0 / 2.0) * square;
    b[3] -= b[7] * (7.0 / 8.0) * square * square;
    b[2] -= b[6] * (9.0 / 16.0) * square * square;
    b[1] += b[7] * (7.0 / 64.0) * square * square * square;
    for (int i = 0; i < 5; i++)
        series[i] = (float)b[i + 1];
}

/* The scalars of a step with these values, which have been checked. */
LPSGD_INLINE void lpsgd_fold_values(const lpsgd_hyper *hyper, lpsgd_scalars *k)
{
    const double rho = lpsgd_rho_of(hyper->p);
    const double unit = hyper->pivot == 1.0 ? 1.0 : pow(hyper->pivot, -1.0 / (hyper->p - 1.0));
    const float inverse_scale = (float)(1.0 / hyper->grad_scale);
    const int decays = hyper->weight_decay != 0.0 && hyper->lr != 0.0; /* 0 * INFINITY is NaN */
    k->momentum_weight64 = hyper->continues ? 1.0 : hyper->momentum;
    k->grad_weight64 = (1.0 - hyper->momentum) / (hyper->accumulate ? hyper->accumulate : 1);
    k->grad_factor64 = hyper->maximize ? -inverse_scale : inverse_scale;
    k->decay64 = decays ? 1.0 - hyper->lr * hyper->weight_decay : 1.0;
    k->step_size64 = -hyper->lr * unit;
    k->eps64 = hyper->eps;
    k->rho64 = rho;

    k->rule = hyper->lr == 0.0 || hyper->momentum_only ? LPSGD_RULE_REST
              : rho == 0.0                             ? LPSGD_RULE_SGD
              : rho == 1.0                             ? LPSGD_RULE_SIGN
                                                       : LPSGD_RULE_POWER;
    k->momentum_weight = (float)k->momentum_weight64;
    k->grad_weight = (float)k->grad_weight64;
    k->grad_factor = (float)k->grad_factor64;
    k->decay = (float)k->decay64;
    k->step_size = (float)k->step_size64;
    k->eps = (float)k->eps64;
    lpsgd_fold_tables(rho, &k->tables);
    lpsgd_fold_series(rho, k->series);
    k->momentum_dtype = hyper->momentum_dtype;
    k->momentum_scale = lpsgd_float((127 + hyper->momentum_exponent) << 23);
    k->momentum_unscale = lpsgd_float((127 - hyper->momentum_exponent) << 23);
    k->stochastic_rounding = hyper->stochastic_rounding != 0;
    k->rounding_key = lpsgd_key(lpsgd_mix(hyper->seed), hyper->step);
}

/* g of eq 21 and 23. */
LPSGD_INLINE float lpsgd_grad(float grad, const lpsgd_scalars *k)
{
    return k->grad_factor * grad;
}

/* Eq 23. */
LPSGD_INLINE float lpsgd_momentum(float m, float g, const lpsgd_scalars *k)
{
    return LPSGD_FMAF(k->grad_weight, g, k->momentum_weight * m);
}

/* Eq 22 and 25. A zero u is never -0, so that step_size * u is -0 and adds nothing even to -0. */
LPSGD_INLINE float lpsgd_apply(float param, float u, const lpsgd_scalars *k)
{
    return LPSGD_FMAF(k->step_size, u, k->decay * param);
}

/* y^-rho for ordinary y (lpsgd_extraordinary), given the entry of `coarse` or what stands for it. tables
 * are k's or a copy of them. */
LPSGD_INLINE float lpsgd_ordinary_power(float y, float coarse, const lpsgd_tables *tables,
                                        const lpsgd_scalars *k)
{
    const int32_t bits = lpsgd_bits(y), eighth = bits >> 20 & 7;
    const float *c = k->series, root = tables->root[eighth];
    const float m = lpsgd_float((bits & 0x007fffff) | 0x3f800000);
    const float r = LPSGD_FMAF(m, tables->reciprocal[eighth], -1.0f);
    float series = c[4];
    series = LPSGD_FMAF(series, r, c[3]);
    series = LPSGD_FMAF(series, r, c[2]);
    series = LPSGD_FMAF(series, r, c[1]);
    series = LPSGD_FMAF(series, r, c[0]);
    const float fine = tables->fine[bits >> 23 & 7], octaves = coarse * fine;
    const float rest = LPSGD_FMAF(coarse, fine, -octaves); /* what rounding took from the product */
    const float mantissa = LPSGD_FMAF(series * r, root, root);
    return LPSGD_FMAF(octaves, mantissa, rest * mantissa);
}

/* Whether y needs the care of lpsgd_power: 2^-126 <= y < 2^125 answers a value below
 * LPSGD_ORDINARY; zero, subnormal, huge, infinite and NaN y answer one that is not. */
#define LPSGD_ORDINARY 0x7d800000u
LPSGD_INLINE uint32_t lpsgd_extraordinary(float y)
{
    return (uint32_t)lpsgd_bits(y) - 0x00800000u;
}

/* y^-rho = w * before * after for every y >= 0, with w normal (or 0, for infinite y) although y^-rho
 * may lie outside the range of normal numbers. `before` scales x exactly, ahead of the product with
 * w; `after` scales the product. Both are 1 for ordinary y. */
typedef struct lpsgd_scaled_power {
    float w, before, after;
} lpsgd_scaled_power;

LPSGD_INLINE lpsgd_scaled_power lpsgd_power(float y, const lpsgd_tables *tables,
                                            const lpsgd_scalars *k)
{
    lpsgd_scaled_power power = {0.0f, 1.0f, 1.0f};
    float coarse = tables->coarse[lpsgd_bits(y) >> 26 & 31];
    if (lpsgd_bits(y) < 0x00800000) {
        power.before = 0x1p24f;
        y *= power.before;
        coarse = tables->subnormal[lpsgd_bits(y) >> 26 & 3];
    } else if (isinf(y)) {
        coarse = 0.0f;
    } else if (lpsgd_bits(y) >= 0x7e000000 && coarse < 0x1p-100f) {
        power.after = 0x1p-24f;
        coarse *= 0x1p24f;
    }
    power.w = lpsgd_ordinary_power(y, coarse, tables, k);
    return power;
}

/* x * w, where -0 becomes 0. */
LPSGD_INLINE float lpsgd_scale(float x, float w)
{
    return LPSGD_FMAF(x, w, 0.0f);
}

/* u of eq 21 and 24 (without the pivot, which step_size carries), every edge case included.
 * This is the reference that faster drivers must equal bit for bit. rule is k->rule, given apart
 * so that a loop can be compiled for one rule. */
LPSGD_INLINE float lpsgd_direction(float x, lpsgd_rule rule, const lpsgd_tables *tables,
                                   const lpsgd_scalars *k)
{
    const float y = fabsf(x) + k->eps;
    if (rule == LPSGD_RULE_REST)
        return 0.0f;
    if (rule == LPSGD_RULE_SGD)
        return x + 0.0f;
    if (rule == LPSGD_RULE_SIGN)
        return y == 0.0f ? 0.0f : x / y + 0.0f;
    if (lpsgd_extraordinary(y) < LPSGD_ORDINARY) { /* the same with less to do */
        const float coarse = tables->coarse[lpsgd_bits(y) >> 26];
        return lpsgd_scale(x, lpsgd_ordinary_power(y, coarse, tables, k));
    }
    const lpsgd_scaled_power power = lpsgd_power(y, tables, k);
    return lpsgd_scale(x * power.before, power.w) * power.after;
}

/* float64: the same formulas with the C library's pow(), or its root squared where y^-rho would
 * overflow or lose bits. Power within 2 ulp. */
LPSGD_INLINE double lpsgd_grad64(double grad, const lpsgd_scalars *k)
{
    return k->grad_factor64 * grad;
}

LPSGD_INLINE double lpsgd_momentum64(double m, double g, const lpsgd_scalars *k)
{
    return LPSGD_FMA(k->grad_weight64, g, k->momentum_weight64 * m);
}

LPSGD_INLINE double lpsgd_apply64(double param, double u, const lpsgd_scalars *k)
{
    return LPSGD_FMA(k->step_size64, u, k->decay64 * param);
}

LPSGD_INLINE double lpsgd_direction64(double x, lpsgd_rule rule, const lpsgd_scalars *k)
{
    const double y = fabs(x) + k->eps64;
    if (rule == LPSGD_RULE_REST || y == 0.0)
        return 0.0;
    if (rule == LPSGD_RULE_SGD)
        return x + 0.0;
    if (rule == LPSGD_RULE_SIGN)
        return x / y + 0.0;
    if (y >= 0x1p-1022 && y < 0x1p1022)
        return x * pow(y, -k->rho64) + 0.0;
    const double root = pow(y, -0.5 * k->rho64);
    return x * root * root + 0.0;
}

/* bfloat16 and float16 by their bits; to float exactly, from float rounded to nearest even. */
LPSGD_INLINE float lpsgd_from_bfloat16(uint16_t h)
{
    return lpsgd_float((int32_t)((uint32_t)h << 16));
}

LPSGD_INLINE uint16_t lpsgd_to_bfloat16(float x)
{
    const uint32_t bits = (uint32_t)lpsgd_bits(x), magnitude = bits & 0x7fffffffu;
    const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
    return (uint16_t)(magnitude > 0x7f800000u ? 0x7fc0u : rounded);
}

/* 32 random bits for element `index` under a key: three rounds of multiplication (with the constants
 * of triple32), the first two entered with half of the key each. */
LPSGD_INLINE uint32_t lpsgd_random(uint64_t key, uint64_t index)
{
    uint32_t x = (uint32_t)index ^ (uint32_t)key;
    x = (x ^ x >> 17) * 0xed5ad4bbu;
    x ^= (uint32_t)(key >> 32) + (uint32_t)(index >> 32) * 0x9e3779b9u;
    x = (x ^ x >> 11) * 0xac4c1b51u;
    x = (x ^ x >> 15) * 0x31848babu;
    return x ^ x >> 14;
}

/* Rounded up with the probability that the 16 random bits give: mean exactly x. */
LPSGD_INLINE uint16_t lpsgd_to_bfloat16_stochastic(float x, uint32_t random16)
{
    const uint32_t bits = (uint32_t)lpsgd_bits(x), magnitude = bits & 0x7fffffffu;
    return (uint16_t)(magnitude > 0x7f800000u ? 0x7fc0u : (bits + random16) >> 16);
}

LPSGD_INLINE float lpsgd_from_float16(uint16_t h)
{
    const uint32_t sign = (uint32_t)(h & 0x8000) << 16, magnitude = h & 0x7fffu;
    const uint32_t rebias = 112u << 23;
    const uint32_t normal = (magnitude << 13) + rebias + (magnitude >= 0x7c00u ? rebias : 0u);
    const float subnormal = lpsgd_float((int32_t)(0x3f000000u | magnitude)) - 0.5f;
    const uint32_t value = magnitude < 0x0400u ? (uint32_t)lpsgd_bits(subnormal) : normal;
    return lpsgd_float((int32_t)(sign | value));
}

LPSGD_INLINE uint16_t lpsgd_to_float16(float x)
{
    const uint32_t bits = (uint32_t)lpsgd_bits(x), magnitude = bits & 0x7fffffffu;
    const uint32_t normal = (magnitude + 0x0fffu + (magnitude >> 13 & 1u) - (112u << 23)) >> 13;
    const float half_plus = lpsgd_float((int32_t)magnitude) + 0.5f;
    const uint32_t subnormal = (uint32_t)lpsgd_bits(half_plus) - 0x3f000000u;
    uint32_t value = magnitude < 0x38800000u ? subnormal : normal;
    value = magnitude >= 0x47800000u ? 0x7c00u : value;
    value = magnitude > 0x7f800000u ? 0x7e00u : value;
    return (uint16_t)(bits >> 16 & 0x8000u) | (uint16_t)value;
}

/* float8_e5m2 is the upper half of a float16. */
LPSGD_INLINE float lpsgd_from_float8(uint8_t b)
{
#ifdef __CUDA_ARCH__ /* in one instruction what takes 30 */
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"((uint16_t)(b << 8)));
    return x;
#else
    return lpsgd_from_float16((uint16_t)(b << 8));
#endif
}

/* Rounded to float16, and from there stochastically by 8 random bits: mean exactly that float16.
 * Saturates. */
LPSGD_INLINE uint8_t lpsgd_to_float8_stochastic(float x, uint32_t random8)
{
#ifdef __CUDA_ARCH__
    uint16_t half;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(x));
#else
    const uint16_t half = lpsgd_to_float16(x);
#endif
    const uint32_t h = half, magnitude = h & 0x7fffu;
    uint32_t rounded = magnitude + random8;
    rounded = rounded > 0x7bffu ? 0x7bffu : rounded;
    rounded = magnitude > 0x7c00u ? 0x7e00u : rounded;
    return (uint8_t)((rounded | (h & 0x8000u)) >> 8);
}

/* The 8 random bits for element `index` under lpsgd_byte_key: a hash is shared by four elements, 16
 * apart, so that vectors of up to 16 need no other order than its own. */
LPSGD_INLINE uint32_t lpsgd_random_byte(uint64_t key, uint64_t index)
{
    return lpsgd_random(key, index >> 6 << 4 | (index & 15)) >> (index >> 4 & 3) * 8 & 0xffu;
}

/* m in float8_e5m2, of which 2^momentum_exponent times is kept; both products are exact or round what
 * is too small for the format. */
LPSGD_INLINE float lpsgd_momentum_of_float8(uint8_t b, const lpsgd_scalars *k)
{
    return lpsgd_from_float8(b) * k->momentum_unscale;
}

LPSGD_INLINE uint8_t lpsgd_momentum_to_float8(float m, uint32_t random8, const lpsgd_scalars *k)
{
    return lpsgd_to_float8_stochastic(m * k->momentum_scale, random8);
}

#endif
