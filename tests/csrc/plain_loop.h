/* SPDX-License-Identifier: MIT
 *
 * plain_loop.h: the slow driver that judges the fast ones: one element after the other, by nothing but
 * lpsgd_element.h.
 */
#ifndef PLAIN_LOOP_H
#define PLAIN_LOOP_H

#include "helpers.h"

static inline float load_float(const void *buffer, lpsgd_dtype dtype, int64_t i)
{
    if (dtype == LPSGD_FLOAT32)
        return ((const float *)buffer)[i];
    const uint16_t half = ((const uint16_t *)buffer)[i];
    return dtype == LPSGD_BFLOAT16 ? lpsgd_from_bfloat16(half) : lpsgd_from_float16(half);
}

static inline void store_float(void *buffer, lpsgd_dtype dtype, int64_t i, float x,
                               const lpsgd_scalars *k, uint32_t random16)
{
    uint16_t *half = buffer;
    if (dtype == LPSGD_FLOAT32)
        ((float *)buffer)[i] = x;
    else if (dtype == LPSGD_FLOAT16)
        half[i] = lpsgd_to_float16(x);
    else if (k->stochastic_rounding)
        half[i] = lpsgd_to_bfloat16_stochastic(x, random16);
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
                const float param = load_float(b->param, dtype, i);
                const uint32_t random =
                    lpsgd_random(lpsgd_key(k->rounding_key, b->stream), b->index + (uint64_t)i);
                float x = lpsgd_grad(load_float(b->grad, dtype, i), k);
                if (has_momentum) {
                    x = lpsgd_momentum(load_float(b->momentum_buffer, momentum_dtype, i), x, k);
                    store_float(b->momentum_buffer, momentum_dtype, i, x, k, random >> 16);
                }
                const float u = lpsgd_direction(x, k->rule, &k->tables, k);
                if (k->rule != LPSGD_RULE_REST)
                    store_float(b->param, dtype, i, lpsgd_apply(param, u, k), k, random & 0xffff);
            }
}

#endif
