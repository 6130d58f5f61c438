/* SPDX-License-Identifier: MIT
 *
 * exhaustive.c: the error of (|x| + eps)^-rho and of u for every float x >= 0, infinity and NaNs
 * included, and for nine rho. u comes from the kernels of every instruction set that the CPU has,
 * which must agree in every bit; the power is measured for eps = 0, where it is that of x itself.
 *
 * exhaustive [STRIDE] takes every STRIDE-th float. It prints the largest errors to the standard
 * output (kept in exhaustive.txt, confirmed by tests/csrc/test_exact.py), and how far it is to the other
 * one. It fails where a bound of lpsgd.h does not hold.
 */
#include "accuracy.h"

enum { piece = 1 << 14, kernel_count = 3 };
static const int64_t float_count = INT64_C(1) << 31;

static const double largest_power_error = 4.0, largest_u_error = 5.0;

/* The largest error, at the largest x that has it: test_exact.py can see the power of no tiny one. */
typedef struct worst_case {
    double error;
    int32_t bits;
} worst_case;

static void note(worst_case *worst, worst_case other)
{
    const int same = other.error == worst->error && other.error > 0.0;
    if (other.error > worst->error || (same && other.bits > worst->bits))
        *worst = other;
}

static int find_kernels(lpsgd_kernel *kernels[kernel_count])
{
    int count = 0;
    kernels[count++] = lpsgd_kernel_default;
#ifdef __x86_64__
    if (strcmp(lpsgd_cpu_capability(), "default") != 0)
        kernels[count++] = lpsgd_kernel_avx2;
    if (strcmp(lpsgd_cpu_capability(), "avx512") == 0)
        kernels[count++] = lpsgd_kernel_avx512;
#endif
    return count;
}

static double u_error(float u, float x, const lpsgd_scalars *k)
{
    if (isnan(x) || (isinf(x) && k->rho64 > 0.0)) /* inf / inf */
        return isnan(u) ? 0.0 : INFINITY;
    if (x == 0.0f || isinf(x))
        return u == x ? 0.0 : INFINITY;
    return error_in_ulp(u, x * pow(x + k->eps, -k->rho64), FLT_MIN);
}

/* The n floats from number `first` on, of every stride-th float. */
static void examine(int64_t first, int n, int64_t stride, const lpsgd_scalars *k,
                    lpsgd_kernel *const *kernels, int kernels_found, worst_case *power,
                    worst_case *u)
{
    float x[piece], reference[piece], param[piece];
    for (int i = 0; i < n; i++)
        x[i] = lpsgd_float((int32_t)((first + i) * stride));
    for (int kernel = 0; kernel < kernels_found; kernel++) {
        float *const to = kernel ? param : reference; /* 0 - 1 * u */
        memset(to, 0, sizeof param);
        kernels[kernel](&(lpsgd_buffer){.param = to, .grad = x, .numel = n}, LPSGD_FLOAT32, k);
        for (int i = 0; kernel && i < n; i++)
            if (lpsgd_bits(param[i]) != lpsgd_bits(reference[i]) && isfinite(x[i]))
                note(u, (worst_case){INFINITY, lpsgd_bits(x[i])});
    }
    for (int i = 0; i < n; i++) {
        note(u, (worst_case){u_error(-reference[i], x[i], k), lpsgd_bits(x[i])});
        if (k->eps == 0.0f && x[i] > 0.0f && isfinite(x[i]))
            note(power, (worst_case){power_error(x[i], k), lpsgd_bits(x[i])});
    }
}

static int report(const char *what, double p, double eps, worst_case worst, double bound)
{
    printf("%-22.17g %-6g %-6s %.6f  0x%08x %.9g\n", p, eps, what, worst.error,
           (unsigned)worst.bits, lpsgd_float(worst.bits));
    fflush(stdout);
    return worst.error <= bound;
}

/* All floats with one rho and eps. */
static int run(double rho, double eps, int64_t stride)
{
    const lpsgd_scalars k = scalars_for(rho, eps);
    const int64_t count = (float_count + stride - 1) / stride, pieces = (count + piece - 1) / piece;
    worst_case power = {0.0, 0}, u = {0.0, 0};
    lpsgd_kernel *kernels[kernel_count];
    const int kernels_found = find_kernels(kernels);
    int64_t done = 0;
#ifdef _OPENMP
#pragma omp parallel for schedule(dynamic)
#endif
    for (int64_t i = 0; i < pieces; i++) {
        worst_case power_here = {0.0, 0}, u_here = {0.0, 0};
        const int64_t first = i * piece, left = count - first;
        examine(first, left < piece ? (int)left : piece, stride, &k, kernels, kernels_found,
                &power_here, &u_here);
#ifdef _OPENMP
#pragma omp critical
#endif
        {
            note(&power, power_here);
            note(&u, u_here);
            if (++done % 4096 == 0)
                fprintf(stderr, "rho %.4f, eps %g: %lld of %lld\n", k.rho64, eps,
                        (long long)(done * piece), (long long)count);
        }
    }
    const double p = p_for(rho);
    return (eps != 0.0 || report("power", p, eps, power, largest_power_error)) &
           report("u", p, eps, u, largest_u_error);
}

int main(int argc, char **argv)
{
    const int64_t stride = argc > 1 ? atoll(argv[1]) : 1;
    int right = 1;
    if (stride < 1) {
        fprintf(stderr, "exhaustive: STRIDE is a positive integer\n");
        return 2;
    }
    printf("# The 2^31 floats x >= 0 in steps of %lld; instruction sets up to %s.\n"
           "# p, eps, what; its largest error in ulp; the largest x that has it\n",
           (long long)stride, lpsgd_cpu_capability());
    for (int r = 0; r < rho_count; r++)
        right &= run(rhos[r], 0.0, stride) & run(rhos[r], 1e-8, stride);
    return !right;
}
