/* SPDX-License-Identifier: MIT
 *
 * plain_loop.h: the slow driver that judges the fast ones: one element after the other, by nothing but
 * lpsgd_element.h.
 */
#ifndef PLAIN_LOOP_H
#define PLAIN_LOOP_H

#include "helpers.h"

/* The random bits of an element: 16 for bfloat16, 8 for float8_e5m2. */
typedef struct element_random {
    uint32_t random16, random8;
} element_random;

static inline float load_float(const void *buffer, lpsgd_dtype dtype, int64_t i,
                               const lpsgd_scalars *k)
{
    if (dtype == LPSGD_FLOAT32)
        return ((const float *)buffer)[i];
    if (dtype == LPSGD_FLOAT8_E5M2)
        return lpsgd_momentum_of_float8(((const uint8_t *)buffer)[i], k);
    const uint16_t half = ((const uint16_t *)buffer)[i];
    return dtype == LPSGD_BFLOAT16 ? lpsgd_from_bfloat16(half) : lpsgd_from_float16(half);
}

static inline void store_float(void *buffer, lpsgd_dtype dtype, int64_t i, float x,
                               const lpsgd_scalars *k, element_random random)
{
    uint16_t *half = buffer;
    if (dtype == LPSGD_FLOAT32)
        ((float *)buffer)[i] = x;
    else if (dtype == LPSGD_FLOAT8_E5M2)
        ((uint8_t *)buffer)[i] = lpsgd_momentum_to_float8(x, random.random8, k);
    else if (dtype == LPSGD_FLOAT16)
        half[i] = lpsgd_to_float16(x);
    else if (k->stochastic_rounding)
        half[i] = lpsgd_to_bfloat16_stochastic(x, random.random16);
    else
        half[i] = lpsgd_to_bfloat16(x);
}

static inline void plain_loop(const lpsgd_buffer *list, int64_t count, test_kind kind,
                              int has_momentum, const lpsgd_scalars *k)
{
    const lpsgd_dtype dtype = kind.dtype, momentum_dtype = kind.momentum_dtype;
    for (const lpsgd_buffer *b = list; b < list + count; b++)
        for (int64_t i = 0; i < b->numel; i++)
            if (dtype == LPSGD_FLOAT64) {
                double *param = b->param, *m = b->momentum_buffer;
                double x = lpsgd_grad64(((const double *)b->grad)[i], k);
                if (has_momentum)
                    m[i] = x = lpsgd_momentum64(m[i], x, k);
                if (k->rule != LPSGD_RULE_REST)
                    param[i] = lpsgd_apply64(param[i], lpsgd_direction64(x, k->rule, k), k);
            } else {
                const float param = load_float(b->param, dtype, i, k);
                const uint64_t index = b->index + (uint64_t)i;
                const uint32_t random = lpsgd_random(lpsgd_key(k->rounding_key, b->stream), index);
                const element_random of_param = {random & 0xffff, 0};
                float x = lpsgd_grad(load_float(b->grad, dtype, i, k), k);
                if (has_momentum) {
                    const uint64_t byte_key = lpsgd_byte_key(k->rounding_key, b->stream);
                    const element_random of_momentum = {random >> 16,
                                                        lpsgd_random_byte(byte_key, index)};
                    x = lpsgd_momentum(load_float(b->momentum_buffer, momentum_dtype, i, k), x, k);
                    store_float(b->momentum_buffer, momentum_dtype, i, x, k, of_momentum);
                }
                const float u = lpsgd_direction(x, k->rule, &k->tables, k);
                if (k->rule != LPSGD_RULE_REST)
                    store_float(b->param, dtype, i, lpsgd_apply(param, u, k), k, of_param);
            }
}

#endif
