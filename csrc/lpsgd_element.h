/* SPDX-License-Identifier: MIT
 *
 * lpsgd_element.h: the arithmetic of one element, for C and CUDA alike.
 *
 * Contract of bits (lpsgd.h): only + - * /, fused multiply-add, comparisons and integer operations,
 * in the order written here. Compile with contraction off (-ffp-contract=off, -fmad=false).
 *
 * (|x| + eps)^-rho is computed as 2^(-rho * log2(y)) in three stages that a driver may run one
 * after the other over a block: split, log2, exp2. Within 2 ulp: worst seen 1.85
 * (tests/csrc/test_accuracy.c).
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
    LPSGD_RULE_REST /* lr = 0: param is not written, so that even a NaN keeps its bits */
} lpsgd_rule;

enum { LPSGD_LOG2_DEGREE = 8 };

/* The hyper-parameters of one step, folded once in double by lpsgd_fold_values. */
typedef struct lpsgd_scalars {
    lpsgd_rule rule;
    float momentum;
    float one_minus_momentum;
    float grad_factor; /* 1 / grad_scale; its sign carries `maximize` */
    float decay;       /* 1 - lr * weight_decay */
    float step_size;   /* -lr * pivot^(-1 / (p - 1)) <= 0 */
    float eps;
    /* -rho = head + rest, head of 16 bits, so that head * exponent is exact; both times 2^-23,
     * because the exponent arrives as an integer shifted left by 23. */
    float head, rest;
    float log2[LPSGD_LOG2_DEGREE + 1]; /* -rho times the coefficients of log2(1 + z) */
    /* The same in double, for float64. */
    double momentum64, one_minus_momentum64, grad_factor64, decay64, step_size64, eps64, rho64;
    int momentum_float32;
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

/* The scalars of a step with these values, which have been checked. */
LPSGD_INLINE void lpsgd_fold_values(const lpsgd_hyper *hyper, lpsgd_scalars *k)
{
    /* log2(1 + z): minimax on [sqrt(1/2) - 1, sqrt(2) - 1], absolute error 2^-24.5. */
    const double log2_coefficient[LPSGD_LOG2_DEGREE + 1] = {
        4.004342720557683725e-8, 1.4426946873478279736,   -0.72136079519971322446,
        0.48094521158582925949,  -0.36000595722490072668, 0.28657905936484055932,
        -0.25061093785603813339, 0.23777395523308612983,  -0.14542252578901752504,
    };
    const double rho = lpsgd_rho_of(hyper->p);
    const double unit = hyper->pivot == 1.0 ? 1.0 : pow(hyper->pivot, -1.0 / (hyper->p - 1.0));
    const float inverse_scale = (float)(1.0 / hyper->grad_scale);
    const int decays = hyper->weight_decay != 0.0 && hyper->lr != 0.0; /* 0 * INFINITY is NaN */
    k->momentum64 = hyper->momentum;
    k->one_minus_momentum64 = 1.0 - hyper->momentum;
    k->grad_factor64 = hyper->maximize ? -inverse_scale : inverse_scale;
    k->decay64 = decays ? 1.0 - hyper->lr * hyper->weight_decay : 1.0;
    k->step_size64 = -hyper->lr * unit;
    k->eps64 = hyper->eps;
    k->rho64 = rho;

    k->rule = hyper->lr == 0.0 ? LPSGD_RULE_REST
              : rho == 0.0     ? LPSGD_RULE_SGD
              : rho == 1.0     ? LPSGD_RULE_SIGN
                               : LPSGD_RULE_POWER;
    k->momentum = (float)k->momentum64;
    k->one_minus_momentum = (float)k->one_minus_momentum64;
    k->grad_factor = (float)k->grad_factor64;
    k->decay = (float)k->decay64;
    k->step_size = (float)k->step_size64;
    k->eps = (float)k->eps64;
    const float head = lpsgd_float(lpsgd_bits((float)-rho) & ~0xff);
    k->head = head * 0x1p-23f;
    k->rest = (float)(-rho - (double)head) * 0x1p-23f;
    for (int i = 0; i <= LPSGD_LOG2_DEGREE; i++)
        k->log2[i] = (float)(-rho * log2_coefficient[i]);
    k->momentum_float32 = hyper->momentum_float32 != 0;
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
    return LPSGD_FMAF(k->one_minus_momentum, g, k->momentum * m);
}

/* Eq 22 and 25. A zero u is never -0, so that step_size * u is -0 and adds nothing even to -0. */
LPSGD_INLINE float lpsgd_apply(float param, float u, const lpsgd_scalars *k)
{
    return LPSGD_FMAF(k->step_size, u, k->decay * param);
}

/* Stage 1: y = 2^(e23 / 2^23) * (1 + z) with 1 + z in [sqrt(1/2), sqrt(2)); y positive and normal. */
LPSGD_INLINE int32_t lpsgd_split(float y, float *z)
{
    const int32_t bits = lpsgd_bits(y), sqrt_half = 0x3f3504f3;
    const int32_t e23 = (bits - sqrt_half) & (int32_t)0xff800000;
    *z = lpsgd_float(bits - e23) - 1.0f;
    return e23;
}

/* Stage 2: -rho * log2(y) = n + f with n an integer and |f| <= 1/2; returns n << 23 (modulo 2^32). */
LPSGD_INLINE uint32_t lpsgd_log2(float z, float e23, const lpsgd_scalars *k, float *f)
{
    const float *c = k->log2;
    const float round_to_integer = 0x1.8p23f;
    float poly = c[8];
    poly = LPSGD_FMAF(poly, z, c[7]);
    poly = LPSGD_FMAF(poly, z, c[6]);
    poly = LPSGD_FMAF(poly, z, c[5]);
    poly = LPSGD_FMAF(poly, z, c[4]);
    poly = LPSGD_FMAF(poly, z, c[3]);
    poly = LPSGD_FMAF(poly, z, c[2]);
    poly = LPSGD_FMAF(poly, z, c[1]);
    const float t = LPSGD_FMAF(poly, z, LPSGD_FMAF(e23, k->rest, c[0]));
    const float shifted = LPSGD_FMAF(e23, k->head, t) + round_to_integer;
    const float n = shifted - round_to_integer;
    *f = LPSGD_FMAF(e23, k->head, -n) + t;
    return (uint32_t)lpsgd_bits(shifted) << 23;
}

/* Stage 3: 2^(n + f), given n << 23. Minimax polynomial on [-1/2, 1/2], relative error 2^-28.5. */
LPSGD_INLINE float lpsgd_exp2(float f, uint32_t n23)
{
    float poly = 1.5594677971951511e-4f;
    poly = LPSGD_FMAF(poly, f, 1.3406643929025969e-3f);
    poly = LPSGD_FMAF(poly, f, 9.6176929737622875e-3f);
    poly = LPSGD_FMAF(poly, f, 5.5503105509232276e-2f);
    poly = LPSGD_FMAF(poly, f, 2.4022652782877592e-1f);
    poly = LPSGD_FMAF(poly, f, 6.9314721496807344e-1f);
    poly = LPSGD_FMAF(poly, f, 1.0f);
    return lpsgd_float((int32_t)((uint32_t)lpsgd_bits(poly) + n23));
}

/* Whether y needs the care of lpsgd_power: 2^-126 <= y < 2^125 answers a value below
 * LPSGD_ORDINARY; zero, subnormal, huge, infinite and NaN y answer one that is not. A driver takes
 * the maximum over a block and skips the care where it can. */
#define LPSGD_ORDINARY 0x7d800000u
LPSGD_INLINE uint32_t lpsgd_extraordinary(float y)
{
    return (uint32_t)lpsgd_bits(y) - 0x00800000u;
}

/* y^-rho = w * before * after for every y >= 0, with w normal (or 0, for infinite y) although y^-rho
 * may lie outside the range of normal numbers. `before` scales x exactly, ahead of the product with
 * w; `after` scales the product. All are 1 and w has the bits of the three stages for ordinary y. */
typedef struct lpsgd_scaled_power {
    float w, before, after;
} lpsgd_scaled_power;

LPSGD_INLINE lpsgd_scaled_power lpsgd_power(float y, const lpsgd_scalars *k)
{
    const int32_t bits = lpsgd_bits(y), scale23 = 24 << 23, small_power23 = -(100 << 23);
    const int32_t tiny = bits < 0x00800000, huge = bits >= 0x7e000000;
    lpsgd_scaled_power power;
    float z, f;
    power.before = tiny ? 0x1p24f : 1.0f;
    const int32_t e23 = lpsgd_split(y * power.before, &z) - (tiny ? scale23 : 0);
    const uint32_t n23 = lpsgd_log2(z, (float)e23, k, &f);
    const int32_t subnormal = huge && (int32_t)n23 < small_power23;
    power.after = subnormal ? 0x1p-24f : 1.0f;
    const uint32_t shift = (uint32_t)((subnormal ? scale23 : 0) - (tiny ? scale23 : 0));
    const float w = lpsgd_exp2(f, n23 + shift);
    power.w = bits == 0x7f800000 ? 0.0f : w;
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
LPSGD_INLINE float lpsgd_direction(float x, lpsgd_rule rule, const lpsgd_scalars *k)
{
    const float y = fabsf(x) + k->eps;
    if (rule == LPSGD_RULE_REST)
        return 0.0f;
    if (rule == LPSGD_RULE_SGD)
        return x + 0.0f;
    if (rule == LPSGD_RULE_SIGN)
        return y == 0.0f ? 0.0f : x / y + 0.0f;
    const lpsgd_scaled_power power = lpsgd_power(y, k);
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
    return LPSGD_FMA(k->one_minus_momentum64, g, k->momentum64 * m);
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

#endif
