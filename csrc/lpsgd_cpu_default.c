/* SPDX-License-Identifier: MIT
 *
 * The architecture's baseline. x86-64 has no fused multiply-add there: the C library's fmaf() gives
 * the right bits, slowly.
 */
#define LPSGD_KERNEL lpsgd_kernel_default
#define LPSGD_LANES 4
#define LPSGD_TARGET
#include "lpsgd_cpu_vector.h"

#ifdef __aarch64__
#include <arm_neon.h>

LPSGD_VECTOR vfloat fma_each(vfloat a, vfloat b, vfloat c)
{
    return (vfloat)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
}
#else
LPSGD_VECTOR vfloat fma_each(vfloat a, vfloat b, vfloat c)
{
    vfloat result;
    for (int i = 0; i < lanes; i++)
        result[i] = LPSGD_FMAF(a[i], b[i], c[i]);
    return result;
}
#endif

typedef const float *table8;
typedef const float *table32;

LPSGD_VECTOR table8 table8_of(const float *from)
{
    return from;
}

LPSGD_VECTOR vfloat look_up8(table8 table, vint i)
{
    vfloat result;
    for (int j = 0; j < lanes; j++)
        result[j] = table[i[j] & 7];
    return result;
}

LPSGD_VECTOR table32 table32_of(const float *from, float least)
{
    (void)least;
    return from;
}

LPSGD_VECTOR vfloat look_up32(const table32 *table, vint i, int careful)
{
    (void)careful;
    vfloat result;
    for (int j = 0; j < lanes; j++)
        result[j] = (*table)[i[j] & 31];
    return result;
}

LPSGD_VECTOR int any_unserved(vfloat y, const table32 *table)
{
    int found = 0;
    (void)table;
    for (int i = 0; i < lanes; i++)
        found |= lpsgd_extraordinary(y[i]) >= LPSGD_ORDINARY && y[i] != 0.0f;
    return found;
}

LPSGD_VECTOR vfloat from_float16(vhalf h)
{
    vfloat result = {0.0f}; /* gcc -O2 does not see that all are set */
    for (int i = 0; i < lanes; i++)
        result[i] = lpsgd_from_float16(h[i]);
    return result;
}

LPSGD_VECTOR vhalf to_float16(vfloat x)
{
    vhalf result;
    for (int i = 0; i < lanes; i++)
        result[i] = lpsgd_to_float16(x[i]);
    return result;
}

LPSGD_VECTOR vfloat load_float8(const char *from)
{
    vfloat result;
    for (int i = 0; i < lanes; i++)
        result[i] = lpsgd_from_float8((uint8_t)from[i]);
    return result;
}

LPSGD_VECTOR void store_float8(char *to, vfloat a, vfloat b, const uint16_t *random8)
{
    for (int i = 0; i < 2 * lanes; i++)
        to[i] = (char)lpsgd_to_float8_stochastic(i < lanes ? a[i] : b[i - lanes], random8[i]);
}

#include "lpsgd_cpu_kernel.h"
