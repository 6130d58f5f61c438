/* SPDX-License-Identifier: MIT
 *
 * lpsgd_cpu_kernel.h: one step over one buffer, for one instruction set.
 *
 * An include template: lpsgd_cpu_<name>.c defines LPSGD_KERNEL, the function's name, and
 * LPSGD_TARGET, its instruction set as a function attribute, and includes this file. The compiler
 * vectorizes; every loop below is elementwise, so the vectors' width cannot change a bit.
 *
 * The power runs in three stages over a block that stays in the L1 cache: one fused loop needs more
 * registers than AVX2 has and takes 1.6 times as long. bfloat16 and float16 blocks are converted to
 * float32, stepped and converted back.
 */
#include "lpsgd_internal.h"

#include <stddef.h>

/* `chunk` divides `block`: prefetches are issued once a chunk, for the same place one block on. */
enum { block = 512, chunk = 64, cache_line = 64 };

#define LPSGD_SCRATCH __attribute__((aligned(64)))

LPSGD_INLINE void prefetch(const float *next, int write)
{
    for (int i = 0; i < chunk; i += cache_line / (int)sizeof *next)
        if (write)
            __builtin_prefetch(next + i, 1);
        else
            __builtin_prefetch(next + i, 0);
}

/* x of element i: what u is a function of. Moves momentum_buffer, which is looked at for LPSGDM
 * alone. */
LPSGD_INLINE float next_x(const float *restrict grad, float *restrict momentum_buffer, int i,
                          int has_momentum, const lpsgd_scalars *k)
{
    const float g = lpsgd_grad(grad[i], k);
    return has_momentum ? (momentum_buffer[i] = lpsgd_momentum(momentum_buffer[i], g, k)) : g;
}

/* Every rule but the power, in one loop. */
LPSGD_INLINE void step_block_plain(float *restrict param, const float *restrict grad,
                                   float *restrict momentum_buffer, int n, int has_momentum,
                                   lpsgd_rule rule, const lpsgd_scalars *k)
{
    for (int i = 0; i < n; i++) {
        const float x = next_x(grad, momentum_buffer, i, has_momentum, k);
        if (rule != LPSGD_RULE_REST)
            param[i] = lpsgd_apply(param[i], lpsgd_direction(x, rule, k), k);
    }
}

/* Stages 2 and 3 of a chunk. Called with a constant n wherever possible, for straight loops. */
LPSGD_INLINE void log2_stage(float *restrict z, const float *restrict e23, uint32_t *restrict n23,
                             int n, const lpsgd_scalars *k)
{
    for (int i = 0; i < n; i++)
        n23[i] = lpsgd_log2(z[i], e23[i], k, &z[i]);
}

LPSGD_INLINE void exp2_stage(float *restrict param, const float *restrict x, const float *restrict f,
                             const uint32_t *restrict n23, int n, const lpsgd_scalars *k)
{
    for (int i = 0; i < n; i++)
        param[i] = lpsgd_apply(param[i], lpsgd_scale(x[i], lpsgd_exp2(f[i], n23[i])), k);
}

/* The power in three stages. They equal lpsgd_direction bit for bit for ordinary elements, and leave
 * the block to it where one is not. */
LPSGD_INLINE void step_block_power(float *restrict param, const float *restrict grad,
                                   float *restrict momentum_buffer, int n, int has_momentum,
                                   const lpsgd_scalars *k)
{
    float z[block] LPSGD_SCRATCH, e23[block] LPSGD_SCRATCH, g[block] LPSGD_SCRATCH;
    uint32_t n23[block] LPSGD_SCRATCH, worst = 0;
    float *restrict x = has_momentum ? momentum_buffer : g;

    for (int i = 0; i < n; i++) {
        x[i] = next_x(grad, momentum_buffer, i, has_momentum, k);
        const float y = fabsf(x[i]) + k->eps;
        const uint32_t extraordinary = lpsgd_extraordinary(y);
        worst = worst > extraordinary ? worst : extraordinary;
        e23[i] = (float)lpsgd_split(y, &z[i]);
    }
    if (worst >= LPSGD_ORDINARY) {
        for (int i = 0; i < n; i++)
            param[i] = lpsgd_apply(param[i], lpsgd_direction(x[i], LPSGD_RULE_POWER, k), k);
        return;
    }
    for (int start = 0; start < n; start += chunk) {
        prefetch(grad + block + start, 0);
        if (has_momentum)
            prefetch(momentum_buffer + block + start, 1);
        if (n - start >= chunk)
            log2_stage(z + start, e23 + start, n23 + start, chunk, k);
        else
            log2_stage(z + start, e23 + start, n23 + start, n - start, k);
    }
    for (int start = 0; start < n; start += chunk) {
        prefetch(param + block + start, 1);
        if (n - start >= chunk)
            exp2_stage(param + start, x + start, z + start, n23 + start, chunk, k);
        else
            exp2_stage(param + start, x + start, z + start, n23 + start, n - start, k);
    }
}

LPSGD_INLINE void step_block(float *restrict param, const float *restrict grad,
                             float *restrict momentum_buffer, int n, int has_momentum,
                             const lpsgd_scalars *k)
{
    switch (k->rule) {
    case LPSGD_RULE_POWER:
        step_block_power(param, grad, momentum_buffer, n, has_momentum, k);
        break;
    case LPSGD_RULE_SIGN:
        step_block_plain(param, grad, momentum_buffer, n, has_momentum, LPSGD_RULE_SIGN, k);
        break;
    case LPSGD_RULE_SGD:
        step_block_plain(param, grad, momentum_buffer, n, has_momentum, LPSGD_RULE_SGD, k);
        break;
    case LPSGD_RULE_REST:
        step_block_plain(param, grad, momentum_buffer, n, has_momentum, LPSGD_RULE_REST, k);
        break;
    }
}

LPSGD_TARGET static void step_float32(float *param, const float *grad, float *momentum_buffer,
                                      int64_t numel, const lpsgd_scalars *k)
{
    for (int64_t i = 0; i < numel; i += block) {
        const int n = numel - i < block ? (int)(numel - i) : block;
        if (momentum_buffer)
            step_block(param + i, grad + i, momentum_buffer + i, n, 1, k);
        else
            step_block(param + i, grad + i, NULL, n, 0, k);
    }
}

#ifdef LPSGD_F16C
#include <immintrin.h>

/* float16 by the instructions for it: as many elements, from the first on, as fill vectors of eight.
 * Returns their number. The bits are those of lpsgd_from_float16, except that a signaling NaN becomes
 * quiet, as in any arithmetic, and those of lpsgd_to_float16. */
LPSGD_TARGET static inline int load_float16(float *restrict to, const uint16_t *restrict from, int n)
{
    int i = 0;
    for (; i + 8 <= n; i += 8)
        _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(from + i))));
    return i;
}

LPSGD_TARGET static inline int store_float16(uint16_t *restrict to, const float *restrict from, int n)
{
    const __m128i infinity = _mm_set1_epi16(0x7c00), quiet_nan = _mm_set1_epi16(0x7e00);
    const __m128i sign = _mm_set1_epi16((short)0x8000);
    int i = 0;
    for (; i + 8 <= n; i += 8) {
        const __m128i h = _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT);
        const __m128i is_nan = _mm_cmpgt_epi16(_mm_andnot_si128(sign, h), infinity);
        const __m128i nan = _mm_or_si128(_mm_and_si128(h, sign), quiet_nan);
        _mm_storeu_si128((__m128i *)(to + i), _mm_blendv_epi8(h, nan, is_nan));
    }
    return i;
}
#else
static inline int load_float16(float *to, const uint16_t *from, int n)
{
    (void)to, (void)from, (void)n;
    return 0;
}

static inline int store_float16(uint16_t *to, const float *from, int n)
{
    (void)to, (void)from, (void)n;
    return 0;
}
#endif

LPSGD_INLINE void load_half(float *restrict to, const uint16_t *restrict from, int n,
                            lpsgd_dtype dtype)
{
    for (int i = dtype == LPSGD_FLOAT16 ? load_float16(to, from, n) : 0; i < n; i++)
        to[i] = dtype == LPSGD_BFLOAT16 ? lpsgd_from_bfloat16(from[i]) : lpsgd_from_float16(from[i]);
}

LPSGD_INLINE void store_half(uint16_t *restrict to, const float *restrict from, int n,
                             lpsgd_dtype dtype)
{
    for (int i = dtype == LPSGD_FLOAT16 ? store_float16(to, from, n) : 0; i < n; i++)
        to[i] = dtype == LPSGD_BFLOAT16 ? lpsgd_to_bfloat16(from[i]) : lpsgd_to_float16(from[i]);
}

/* Each element's 32 random bits round param by the lower and momentum_buffer by the upper half. */
LPSGD_INLINE void store_stochastic(uint16_t *restrict to, const float *restrict from, int n,
                                   uint64_t key, uint64_t index, int shift)
{
    for (int i = 0; i < n; i++)
        to[i] = lpsgd_to_bfloat16_stochastic(
            from[i], lpsgd_random(key, index + (uint64_t)i) >> shift & 0xffffu);
}

LPSGD_INLINE void step_half(const lpsgd_buffer *buffer, lpsgd_dtype dtype, const lpsgd_scalars *k)
{
    float x[block] LPSGD_SCRATCH, g[block] LPSGD_SCRATCH, converted[block] LPSGD_SCRATCH;
    uint16_t *param = buffer->param, *momentum_buffer = buffer->momentum_buffer;
    const uint16_t *grad = buffer->grad;
    const int converts = momentum_buffer && !k->momentum_float32;
    const int stochastic = dtype == LPSGD_BFLOAT16 && k->stochastic_rounding;
    const int moves = k->rule != LPSGD_RULE_REST;
    const uint64_t key = lpsgd_key(k->rounding_key, buffer->stream);
    for (int64_t i = 0; i < buffer->numel; i += block) {
        const int n = buffer->numel - i < block ? (int)(buffer->numel - i) : block;
        const uint64_t index = buffer->index + (uint64_t)i;
        float *m = NULL;
        load_half(x, param + i, n, dtype);
        load_half(g, grad + i, n, dtype);
        if (converts)
            load_half(m = converted, momentum_buffer + i, n, dtype);
        else if (momentum_buffer)
            m = (float *)buffer->momentum_buffer + i;
        step_float32(x, g, m, n, k);
        if (moves && stochastic)
            store_stochastic(param + i, x, n, key, index, 0);
        else if (moves)
            store_half(param + i, x, n, dtype);
        if (converts && stochastic)
            store_stochastic(momentum_buffer + i, m, n, key, index, 16);
        else if (converts)
            store_half(momentum_buffer + i, m, n, dtype);
    }
}

LPSGD_INLINE void step_float64(double *restrict param, const double *restrict grad,
                               double *restrict momentum_buffer, int64_t numel, lpsgd_rule rule,
                               const lpsgd_scalars *k)
{
    for (int64_t i = 0; i < numel; i++) {
        double x = lpsgd_grad64(grad[i], k);
        if (momentum_buffer)
            momentum_buffer[i] = x = lpsgd_momentum64(momentum_buffer[i], x, k);
        if (rule != LPSGD_RULE_REST)
            param[i] = lpsgd_apply64(param[i], lpsgd_direction64(x, rule, k), k);
    }
}

LPSGD_TARGET void LPSGD_KERNEL(const lpsgd_buffer *buffer, lpsgd_dtype dtype,
                               const lpsgd_scalars *k)
{
    void *param = buffer->param, *momentum_buffer = buffer->momentum_buffer;
    switch (dtype) {
    case LPSGD_FLOAT32:
        step_float32(param, buffer->grad, momentum_buffer, buffer->numel, k);
        break;
    case LPSGD_BFLOAT16:
        step_half(buffer, LPSGD_BFLOAT16, k);
        break;
    case LPSGD_FLOAT16:
        step_half(buffer, LPSGD_FLOAT16, k);
        break;
    case LPSGD_FLOAT64:
        if (k->rule == LPSGD_RULE_SGD)
            step_float64(param, buffer->grad, momentum_buffer, buffer->numel, LPSGD_RULE_SGD, k);
        else
            step_float64(param, buffer->grad, momentum_buffer, buffer->numel, k->rule, k);
        break;
    }
}
