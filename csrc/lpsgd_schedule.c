/* SPDX-License-Identifier: MIT
 *
 * lpsgd_schedule.c: everything that is computed once per step or per epoch, in double.
 */
#include "lpsgd_internal.h"

double lpsgd_rho(double p)
{
    return lpsgd_rho_of(p);
}

/* sin(pi z / 2)^2 for 0 <= z <= 1/2: Taylor series, truncated below 2^-56. */
static double sine_squared(double z)
{
    static const double coefficient[] = {
        -1.0 / 1307674368000.0, 1.0 / 6227020800.0, -1.0 / 39916800.0, 1.0 / 362880.0,
        -1.0 / 5040.0,          1.0 / 120.0,        -1.0 / 6.0,        1.0,
    };
    const double angle = z * 1.5707963267948966, square = angle * angle;
    double series = 0.0;
    for (int i = 0; i < 8; i++)
        series = series * square + coefficient[i];
    return series * angle * (series * angle);
}

double lpsgd_cosine_p(double s, double total, double p_max, double p_min)
{
    if (!(s >= 1.0) || !(total >= 1.0) || !(p_max >= 2.0) || !(p_min >= 2.0) || isinf(s) ||
        isinf(total) || isinf(p_max) || isinf(p_min))
        return NAN;
    if (s == 1.0)
        return p_max;
    if (s >= total)
        return p_min;
    /* With x = (s - 1) / (total - 1): (1 + cos(pi x)) / 2 = 1 - sin(pi x / 2)^2
     *                                                      = sin(pi (1 - x) / 2)^2. */
    const double done = s - 1.0, left = total - s;
    const double weight = done < left    ? 1.0 - sine_squared(done / (total - 1.0))
                          : done == left ? 0.5
                                         : sine_squared(left / (total - 1.0));
    const double p = p_min + (p_max - p_min) * weight;
    /* Rounding may carry p an ulp beyond its ends, below 2 even. */
    return fmin(fmax(p, fmin(p_min, p_max)), fmax(p_min, p_max));
}

lpsgd_status lpsgd_check_hyper(const lpsgd_hyper *hyper)
{
    if (!(hyper->lr >= 0.0))
        return LPSGD_ERROR_LR;
    if (!(hyper->p >= 2.0))
        return LPSGD_ERROR_P;
    if (!(hyper->momentum >= 0.0 && hyper->momentum < 1.0))
        return LPSGD_ERROR_MOMENTUM;
    if (!(hyper->weight_decay >= 0.0))
        return LPSGD_ERROR_WEIGHT_DECAY;
    if (!(hyper->eps >= 0.0))
        return LPSGD_ERROR_EPS;
    if (!(hyper->pivot > 0.0) || isinf(hyper->pivot))
        return LPSGD_ERROR_PIVOT;
    if (!(hyper->grad_scale > 0.0) || isinf(hyper->grad_scale))
        return LPSGD_ERROR_GRAD_SCALE;
    if (hyper->momentum_exponent < -126 || hyper->momentum_exponent > 126)
        return LPSGD_ERROR_MOMENTUM_EXPONENT;
    if (hyper->accumulate < 0)
        return LPSGD_ERROR_ACCUMULATE;
    return LPSGD_OK;
}

lpsgd_status lpsgd_fold(const lpsgd_hyper *hyper, int has_momentum, lpsgd_scalars *k)
{
    lpsgd_hyper checked = *hyper;
    if (!has_momentum) {
        checked.momentum = 0.0;
        checked.momentum_exponent = checked.accumulate = 0;
        checked.continues = checked.momentum_only = 0;
    }
    const lpsgd_status status = lpsgd_check_hyper(&checked);
    if (status == LPSGD_OK)
        lpsgd_fold_values(&checked, k);
    return status;
}

const char *lpsgd_status_text(lpsgd_status status)
{
    switch (status) {
    case LPSGD_OK:
        return "no error";
    case LPSGD_ERROR_LR:
        return "lr must be >= 0";
    case LPSGD_ERROR_P:
        return "p must be >= 2";
    case LPSGD_ERROR_MOMENTUM:
        return "momentum must be in [0, 1)";
    case LPSGD_ERROR_WEIGHT_DECAY:
        return "weight_decay must be >= 0";
    case LPSGD_ERROR_EPS:
        return "eps must be >= 0";
    case LPSGD_ERROR_PIVOT:
        return "pivot must be > 0 and finite";
    case LPSGD_ERROR_GRAD_SCALE:
        return "grad_scale must be > 0 and finite";
    case LPSGD_ERROR_MOMENTUM_EXPONENT:
        return "momentum_exponent must be in [-126, 126]";
    case LPSGD_ERROR_ACCUMULATE:
        return "accumulate must be >= 0";
    case LPSGD_ERROR_DTYPE:
        return "dtype must be one of lpsgd_dtype, and momentum_dtype one that goes with it";
    case LPSGD_ERROR_NUMEL:
        return "numel must be >= 0, and the total within int64";
    case LPSGD_ERROR_NULL:
        return "a pointer is NULL where numel > 0";
    case LPSGD_ERROR_ALIGNMENT:
        return "a pointer is not aligned to the element's size";
    case LPSGD_ERROR_CUDA:
        return "CUDA refused: lpsgd_cuda_error() says why";
    }
    return "unknown status";
}
