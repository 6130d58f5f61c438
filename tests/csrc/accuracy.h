/* SPDX-License-Identifier: MIT
 *
 * accuracy.h: what the tests of accuracy share. The real value for float32 is the C library's pow()
 * in double: its error is below 1e-8 ulp of float32.
 */
#ifndef ACCURACY_H
#define ACCURACY_H

#include "helpers.h"

#include <float.h>

enum { rho_count = 9 };
static const double rhos[rho_count] = {0.0, 0.1, 0.5, 2.0 / 3.0, 0.8, 6.0 / 7.0, 7.0 / 8.0, 0.99, 1.0};

/* A p for rho within an ulp. */
static inline double p_for(double rho)
{
    return rho == 1.0 ? INFINITY : 2.0 + rho / (1.0 - rho);
}

/* The scalars for rho within an ulp (k.rho64 says it exactly), whatever rule it would run by. */
static inline lpsgd_scalars scalars_for(double rho, double eps)
{
    const lpsgd_hyper hyper = {
        .lr = 1.0, .p = p_for(rho), .eps = eps, .pivot = 1.0, .grad_scale = 1.0};
    lpsgd_scalars k;
    if (lpsgd_fold(&hyper, 0, &k) != LPSGD_OK)
        abort();
    return k;
}

/* |value - real| in units of the last place that a float of real's size has, were there no limit
 * to its exponent below `smallest`. */
static inline double error_in_ulp(double value, double real, double smallest)
{
    const double size = fabs(real) > smallest ? fabs(real) : smallest;
    return fabs(value - real) / ldexp(1.0, ilogb(size) - (FLT_MANT_DIG - 1));
}

static inline double power_error(float y, const lpsgd_scalars *k)
{
    const lpsgd_scaled_power power = lpsgd_power(y, &k->tables, k);
    if (!isnormal(power.w))
        return INFINITY;
    const double value = (double)power.w * power.before * power.after;
    return error_in_ulp(value, pow((double)y, -k->rho64), 0.0);
}

#endif
