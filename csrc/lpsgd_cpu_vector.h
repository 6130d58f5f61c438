/* SPDX-License-Identifier: MIT
 *
 * lpsgd_cpu_vector.h: vectors of LPSGD_LANES elements in the vector types of GCC and clang, which have
 * C's operators. A file lpsgd_cpu_<name>.c adds what the operators lack, by the instructions it has.
 */
#include "lpsgd_internal.h"

#include <stddef.h>

#define LPSGD_VECTOR LPSGD_TARGET static inline __attribute__((always_inline))

enum { lanes = LPSGD_LANES };

typedef float vfloat __attribute__((vector_size(4 * LPSGD_LANES)));
typedef int32_t vint __attribute__((vector_size(4 * LPSGD_LANES)));
typedef uint32_t vuint __attribute__((vector_size(4 * LPSGD_LANES)));
typedef uint16_t vhalf __attribute__((vector_size(2 * LPSGD_LANES)));

LPSGD_VECTOR vfloat splat(float x)
{
    vfloat all;
    for (int i = 0; i < lanes; i++)
        all[i] = x;
    return all;
}

LPSGD_VECTOR vfloat load_float(const void *from)
{
    vfloat x;
    memcpy(&x, from, sizeof x);
    return x;
}
