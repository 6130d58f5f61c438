/* SPDX-License-Identifier: MIT
 *
 * lpsgd_schedule.c: everything that is computed once per step or per epoch, in double.
 */
#include "lpsgd_internal.h"

double lpsgd_rho(double p)
{
    if (!(p >= 2.0))
        return NAN;
    return isinf(p) ? 1.0 : (p - 2.0) / (p - 1.0);
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
    return LPSGD_OK;
}

lpsgd_status lpsgd_fold(const lpsgd_hyper *hyper, int has_momentum, lpsgd_scalars *k)
{
    /* Minimax on [sqrt(1/2) - 1, sqrt(2) - 1], absolute error 2^-24.5. */
    static const double log2_coefficient[LPSGD_LOG2_DEGREE + 1] = {
        4.004342720557683725e-8, 1.4426946873478279736,   -0.72136079519971322446,
        0.48094521158582925949,  -0.36000595722490072668, 0.28657905936484055932,
        -0.25061093785603813339, 0.23777395523308612983,  -0.14542252578901752504,
    };
    lpsgd_hyper checked = *hyper;
    if (!has_momentum)
        checked.momentum = 0.0;
    const lpsgd_status status = lpsgd_check_hyper(&checked);
    if (status != LPSGD_OK)
        return status;

    const double rho = lpsgd_rho(hyper->p);
    const double step_size = -hyper->lr * pow(hyper->pivot, -1.0 / (hyper->p - 1.0));
    const float inverse_scale = (float)(1.0 / hyper->grad_scale);
    k->momentum64 = checked.momentum;
    k->one_minus_momentum64 = 1.0 - checked.momentum;
    k->grad_factor64 = hyper->maximize ? -inverse_scale : inverse_scale;
    const int decays = hyper->weight_decay != 0.0 && hyper->lr != 0.0; /* 0 * INFINITY is NaN */
    k->decay64 = decays ? 1.0 - hyper->lr * hyper->weight_decay : 1.0;
    k->step_size64 = step_size;
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
    return LPSGD_OK;
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
    case LPSGD_ERROR_DTYPE:
        return "dtype must be one of lpsgd_dtype";
    case LPSGD_ERROR_NUMEL:
        return "numel must be >= 0, and the total within int64";
    case LPSGD_ERROR_NULL:
        return "a pointer is NULL where numel > 0";
    case LPSGD_ERROR_ALIGNMENT:
        return "a pointer is not aligned to the element's size";
    }
    return "unknown status";
}
