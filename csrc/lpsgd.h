/* SPDX-License-Identifier: MIT
 *
 * lpsgd.h: the optimizers LPSGD and LPSGDM as a C library, and its manual.
 *
 * Source: Xu & Yang, "Beyond l2-norm and l-infinity-norm: A Curvature-Inspired lp-Norm Scheme for
 * Deep Neural Networks", arXiv:2606.02078. Equation numbers below are that paper's.
 *
 * For every element, with grad g, param x, momentum_buffer m and rho = (p - 2) / (p - 1) (eq 20):
 *
 *     LPSGD    u = g / (|g| + eps)^rho * c                              (eq 21)
 *              x = (1 - lr * weight_decay) * x - lr * u                 (eq 22, with decoupled decay)
 *
 *     LPSGDM   m = momentum * m + (1 - momentum) * g                    (eq 23)
 *              u = m / (|m| + eps)^rho * c                              (eq 24)
 *              x = (1 - lr * weight_decay) * x - lr * u                 (eq 25)
 *
 *     c = pivot^(-1 / (p - 1)), which is 1 for the paper's pivot = 1.
 *
 * p = 2 is (momentum) gradient descent, p = INFINITY is sign descent smoothed by eps. An element
 * whose |m| + eps is zero has u = 0. NaN stays NaN, and infinities follow IEEE arithmetic. Where
 * u = 0 without decay, and everywhere for lr = 0, x keeps its bits, -0.0 included; m moves at lr = 0.
 *
 * Accumulation. m is linear in g, so the gradients of K micro-batches can be summed in it, with no buffer
 * of their own: accumulate = K, `continues` for all but a step's first one, and momentum_only for all but
 * its last one:
 *
 *     m = (momentum, or 1 if it continues) * m + ((1 - momentum) / accumulate) * g
 *
 * and u and x follow unless momentum_only. That is eq 23 with the mean of the K gradients; with
 * accumulate = 1 it would be their sum.
 *
 * Low precision. The momentum_buffer may have a dtype of its own:
 *
 *     param       momentum_buffer
 *     float32     float32, bfloat16, float8_e5m2
 *     bfloat16    float32, bfloat16, float8_e5m2
 *     float16     float32, bfloat16, float16, float8_e5m2
 *     float64     float64
 *
 * bfloat16, of either, may be rounded stochastically: up or down with probabilities that make the mean
 * exact, so that updates below half a unit in the last place are not lost.
 *
 * A momentum_buffer of float8_e5m2 takes one byte (1 sign, 5 exponent and 2 mantissa bits, subnormal
 * numbers included), and holds m * 2^momentum_exponent, which is always rounded stochastically: a
 * quantum is 12 to 25 % of m, so that to the nearest momentum * m would often be m again. Beyond
 * +-57344, its largest number, it saturates; it never becomes infinite. NaN and the sign of zero stay.
 * u and x follow from m before it is rounded. 15 is a good exponent for most models: normal numbers go
 * from 2^-29 to 1.75 then, subnormal ones down to 2^-31.
 *
 * The random bits are a function of (seed, step, stream, index of the element) alone, so they too do
 * not depend on threads or on the cutting. Those of float8_e5m2 are independent of bfloat16's.
 *
 * The contract of bits. For all dtypes but float64 (computed in float32, one rounding on
 * store) the same inputs give the same bits on every instruction set, for every number of threads
 * and for every way of cutting a buffer in pieces; (|m| + eps)^-rho is within 4 ulp. Two things lie
 * outside it: the sign and payload of a NaN, and the last bit of c where pivot is not 1, for which
 * the C library's pow() is called once per step. float64 uses pow() for every element: within 2 ulp,
 * bits as the C library's. The contract needs the default floating-point environment (round to
 * nearest, subnormals not flushed to zero).
 *
 * Thread-safety: every function may be called from several threads at once, provided that no
 * buffer written by one call is used by another.
 */
#ifndef LPSGD_H
#define LPSGD_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define LPSGD_VERSION "0.1.0"

/* Element type of param and grad, or of momentum_buffer. */
typedef enum lpsgd_dtype {
    LPSGD_FLOAT32,
    LPSGD_FLOAT64,
    LPSGD_BFLOAT16,
    LPSGD_FLOAT16,
    LPSGD_FLOAT8_E5M2 /* of momentum_buffer alone */
} lpsgd_dtype;

/* What a step answers. LPSGD_OK is 0; after any other value nothing has been written. */
typedef enum lpsgd_status {
    LPSGD_OK,
    LPSGD_ERROR_LR,
    LPSGD_ERROR_P,
    LPSGD_ERROR_MOMENTUM,
    LPSGD_ERROR_WEIGHT_DECAY,
    LPSGD_ERROR_EPS,
    LPSGD_ERROR_PIVOT,
    LPSGD_ERROR_GRAD_SCALE,
    LPSGD_ERROR_MOMENTUM_EXPONENT,
    LPSGD_ERROR_ACCUMULATE,
    LPSGD_ERROR_DTYPE,
    LPSGD_ERROR_NUMEL,
    LPSGD_ERROR_NULL,
    LPSGD_ERROR_ALIGNMENT,
    LPSGD_ERROR_CUDA
} lpsgd_status;

/* A static text that names the range the argument is outside of; never NULL. */
const char *lpsgd_status_text(lpsgd_status status);

/* Hyper-parameters of one step. Values outside a range, NaN included, are refused by name. */
typedef struct lpsgd_hyper {
    double lr;           /* learning rate, >= 0 */
    double p;            /* norm, 2 <= p <= INFINITY */
    double momentum;     /* 0 <= momentum < 1; lpsgd_step does not read it */
    double weight_decay; /* >= 0 */
    double eps;          /* >= 0 */
    double pivot;        /* where |u| = 1 for every p: 0 < pivot < INFINITY; 1 is the paper */
    double grad_scale;   /* g = grad * (float)(1 / grad_scale), 0 < grad_scale < INFINITY; 1: none */
    int maximize;        /* 0: descend; otherwise ascend: grad counts as -grad */
    lpsgd_dtype momentum_dtype; /* of momentum_buffer; lpsgd_step reads neither this */
    int momentum_exponent;      /* nor this: float8_e5m2 holds m * 2^this; -126 to 126 */
    int stochastic_rounding;    /* otherwise than 0: bfloat16 results are rounded stochastically */
    uint64_t seed, step;        /* of the random bits: should differ between runs and between steps */
    /* Accumulation; lpsgd_step reads none of these. All 0: an ordinary step. */
    int accumulate;    /* micro-batches of a step, >= 0; 0 counts as 1 */
    int continues;     /* otherwise than 0: m has taken a micro-batch of this step, and does not decay */
    int momentum_only; /* otherwise than 0: x stays */
} lpsgd_hyper;

/* The first of the ranges above that hyper is outside of, momentum's included; LPSGD_OK if none. Which
 * dtypes go together is a step's matter. */
lpsgd_status lpsgd_check_hyper(const lpsgd_hyper *hyper);

/* One parameter of the list: borrowed pointers to numel contiguous elements each, aligned to the
 * element's size. The caller guarantees that no written buffer overlaps any other of the list. */
typedef struct lpsgd_buffer {
    void *param;           /* read and written */
    const void *grad;      /* read */
    void *momentum_buffer; /* read and written by lpsgdm_step; unused by lpsgd_step (may be NULL) */
    int64_t numel;         /* >= 0; pointers of an empty buffer are not looked at */
    /* Of the random bits: the parameter's number in the model, and the index in
     * that parameter of the buffer's first element, for a buffer that is a piece of it. */
    uint64_t stream, index;
} lpsgd_buffer;

/* One step over a list of count buffers, which share dtypes and hyper-parameters.
 *
 * dtype: of param and grad. One that is none, or that does not go with hyper's momentum_dtype, is
 * LPSGD_ERROR_DTYPE.
 * hyper: not NULL.
 * num_threads: most threads to use; 1 runs in the calling thread, < 1 takes OpenMP's number. Small
 * lists run in the calling thread whatever it says, and so does every step in a build without
 * OpenMP or in a process forked from one that had loaded this library (where an OpenMP region
 * could hang).
 *
 * Everything is checked before anything is written. Returns LPSGD_OK or the first error found. */
lpsgd_status lpsgd_step(const lpsgd_buffer *list, int64_t count, lpsgd_dtype dtype,
                        const lpsgd_hyper *hyper, int num_threads);
lpsgd_status lpsgdm_step(const lpsgd_buffer *list, int64_t count, lpsgd_dtype dtype,
                         const lpsgd_hyper *hyper, int num_threads);

/* The same on an NVIDIA GPU (lpsgd_cuda.c), for buffers in its memory: one launch for up to 500
 * buffers, on a stream, without waiting for it. lpsgd_cuda_step answers LPSGD_ERROR_CUDA where the
 * driver refuses, and in a build without CUDA kernels; lpsgd_cuda_error() says why. If the driver
 * refuses a later launch of a list of more than 500 buffers, the earlier ones have been made. */

/* One number in device memory; pointer NULL: there is none. */
typedef struct lpsgd_device_number {
    const void *pointer;
    lpsgd_dtype dtype;
} lpsgd_device_number;

/* Where a step runs, and numbers to be read when it does, in place of those of lpsgd_hyper. They are
 * not checked, as that would have to wait. found_inf != 0: nothing is written. scratch: needed if
 * there is such a number, lpsgd_cuda_scratch_size bytes of device memory, aligned to 8, that nothing
 * else uses until the step is done. */
typedef struct lpsgd_cuda_target {
    int device;
    void *stream; /* CUstream */
    lpsgd_device_number lr, p, weight_decay, grad_scale, found_inf;
    void *scratch;
} lpsgd_cuda_target;

lpsgd_status lpsgd_cuda_step(const lpsgd_buffer *list, int64_t count, lpsgd_dtype dtype,
                             const lpsgd_hyper *hyper, const lpsgd_cuda_target *target);
lpsgd_status lpsgdm_cuda_step(const lpsgd_buffer *list, int64_t count, lpsgd_dtype dtype,
                              const lpsgd_hyper *hyper, const lpsgd_cuda_target *target);

/* Makes all that a step on this device and stream needs: finds the driver, loads the kernels and, once
 * for a device, compares small steps by each of them with the CPU's, which should take a millisecond
 * and waits for no stream. A device whose bits differ is refused for good; LPSGD_CUDA_CHECK=0 in the
 * environment leaves the comparison out. While the stream is being captured in a graph it is put off
 * until the next call. Steps do all this by themselves; this tells beforehand whether they can.
 * capturing: NULL, or set to whether the stream is being captured. */
lpsgd_status lpsgd_cuda_prepare(int device, void *stream, int *capturing);

/* The calling thread's last LPSGD_ERROR_CUDA in words, the driver's own among them; never NULL. */
const char *lpsgd_cuda_error(void);

int64_t lpsgd_cuda_scratch_size(void);

/* The CUDA that made this build's kernels, as 1000 * major + 10 * minor; 0: there are none. */
int lpsgd_cuda_version(void);

/* What the kernels are for: "sm_90 compute_90" is machine code of compute capability 9.0 and PTX for
 * later ones; "" without kernels. */
const char *lpsgd_cuda_architectures(void);

/* rho of eq 20 for 2 <= p <= INFINITY: 0 at p = 2, 1 at INFINITY. NaN for any other p. */
double lpsgd_rho(double p);

/* p of eq 19 at s = 1 ... total (epochs or steps; fractions are allowed):
 *     p_min + (p_max - p_min) * (1 + cos(pi * (s - 1) / (total - 1))) / 2
 * It is exactly p_max at s = 1 and exactly p_min from s = total on (except that total = 1 has
 * p_max at s = 1). s >= 1, total >= 1, and p_max, p_min finite and >= 2; NaN for anything else.
 * It uses + - * / alone, so its bits are the same everywhere. */
double lpsgd_cosine_p(double s, double total, double p_max, double p_min);

/* The instruction set that steps run on: the best that the CPU has, lowered by the environment
 * variable LPSGD_CPU_CAPABILITY = default | avx2 | avx512, which is read at the first call of this
 * or of a step, and then holds for the life of the process. Another value, or one above what the
 * CPU has, is ignored. "default" on other architectures than x86-64. */
const char *lpsgd_cpu_capability(void);

/* Whether this build runs steps on several threads (OpenMP): 1 or 0. */
int lpsgd_has_openmp(void);

#ifdef __cplusplus
}
#endif

#endif
