/* SPDX-License-Identifier: MIT
 *
 * lpsgd_cuda_kernel.h: what the CUDA kernels and their host side share, and one thread's work.
 *
 * The same source is compiled by nvcc for the GPU and, in tests, as C for an emulated grid: threads
 * share nothing but a copy of the power's tables, so that a grid is a loop.
 *
 * A launch steps up to LPSGD_CUDA_TENSORS tensors. Each is cut into tiles of equal size, a block
 * takes one tile after the other, and a thread 16 bytes of param at a time (a vector), wherever
 * param, grad and momentum_buffer are aligned to 16 bytes; else, and at a tensor's end, one element
 * at a time.
 *
 * Every kernel is there twice: for up to LPSGD_CUDA_FEW tensors, whose arguments take 4 KiB, and for
 * all of them. Both are made of one source.
 */
#ifndef LPSGD_CUDA_KERNEL_H
#define LPSGD_CUDA_KERNEL_H

#include "lpsgd_element.h"

#ifdef __CUDACC__
#define LPSGD_ALIGN(n) __align__(n)
#define LPSGD_UNROLL _Pragma("unroll")
#else
#define LPSGD_ALIGN(n) __attribute__((aligned(n)))
#define LPSGD_UNROLL
#endif

enum {
    LPSGD_CUDA_THREADS = 256,
    LPSGD_CUDA_ROUNDS = 4,                       /* vectors of a thread in a tile */
    LPSGD_CUDA_TENSORS = 500,                    /* of the 32764 bytes of a kernel's arguments */
    LPSGD_CUDA_FEW = 57,                         /* of 4096 bytes */
    LPSGD_CUDA_TILE_BYTES = LPSGD_CUDA_THREADS * LPSGD_CUDA_ROUNDS * 16
};

/* The kernels by their index; the names are those in lpsgd_cuda.cu. Those for few tensors come
 * LPSGD_CUDA_KINDS later. */
enum {
    LPSGD_CUDA_FLOAT32,
    LPSGD_CUDA_FLOAT64,
    LPSGD_CUDA_BFLOAT16,
    LPSGD_CUDA_FLOAT16,
    LPSGD_CUDA_BFLOAT16_WIDE, /* float32 momentum_buffer */
    LPSGD_CUDA_FLOAT16_WIDE,
    LPSGD_CUDA_FLOAT32_HALF, /* bfloat16 momentum_buffer */
    LPSGD_CUDA_FLOAT16_HALF,
    LPSGD_CUDA_FLOAT32_BYTE, /* float8_e5m2 momentum_buffer */
    LPSGD_CUDA_BFLOAT16_BYTE,
    LPSGD_CUDA_FLOAT16_BYTE,
    LPSGD_CUDA_KINDS,
    LPSGD_CUDA_FOLD = 2 * LPSGD_CUDA_KINDS,
    LPSGD_CUDA_KERNELS
};

typedef struct lpsgd_cuda_tensor {
    void *param;
    const void *grad;
    void *momentum_buffer; /* NULL: LPSGD */
    int64_t numel;
    uint64_t key, byte_key, index; /* of the random bits */
    int64_t first_tile;            /* in the launch */
} lpsgd_cuda_tensor;

/* A step's scalars as the kernels read them, from their arguments or from device memory. */
typedef struct lpsgd_cuda_scalars {
    lpsgd_scalars k;
    int skip; /* a gradient was not finite: nothing is written */
} lpsgd_cuda_scalars;

/* What a launch's tensors have in common. It comes before them, where the addresses of constant memory
 * are short. */
typedef struct lpsgd_cuda_common {
    int64_t count, tiles;
    const lpsgd_cuda_scalars *device_scalars; /* NULL: `scalars` */
    lpsgd_scalars scalars;
} lpsgd_cuda_common;

typedef struct lpsgd_cuda_step_arguments {
    lpsgd_cuda_common common;
    lpsgd_cuda_tensor tensor[LPSGD_CUDA_TENSORS];
} lpsgd_cuda_step_arguments;

/* The beginning of lpsgd_cuda_step_arguments, which is all that a kernel for few tensors is given. */
typedef struct lpsgd_cuda_few_arguments {
    lpsgd_cuda_common common;
    lpsgd_cuda_tensor tensor[LPSGD_CUDA_FEW];
} lpsgd_cuda_few_arguments;

/* A number that a GPU may hold: value is the host's where pointer is NULL. */
typedef struct lpsgd_cuda_fold_arguments {
    lpsgd_hyper hyper;
    lpsgd_device_number lr, p, weight_decay, grad_scale, found_inf;
    lpsgd_cuda_scalars *result;
} lpsgd_cuda_fold_arguments;

/* The host's half of a launch: takes as many buffers of the list as fit, from *done on, and moves
 * *done past them. */
LPSGD_INLINE void lpsgd_cuda_fill(lpsgd_cuda_step_arguments *a, const lpsgd_buffer *list,
                                  int64_t count, int64_t itemsize, int has_momentum, int64_t *done)
{
    const int64_t tile = LPSGD_CUDA_TILE_BYTES / itemsize;
    lpsgd_cuda_common *c = &a->common;
    c->count = c->tiles = 0;
    for (; *done < count && c->count < LPSGD_CUDA_TENSORS; (*done)++) {
        const lpsgd_buffer *b = &list[*done];
        if (!b->numel)
            continue;
        lpsgd_cuda_tensor *t = &a->tensor[c->count++];
        t->param = b->param;
        t->grad = b->grad;
        t->momentum_buffer = has_momentum ? b->momentum_buffer : NULL;
        t->numel = b->numel;
        t->key = lpsgd_key(c->scalars.rounding_key, b->stream);
        t->byte_key = lpsgd_byte_key(c->scalars.rounding_key, b->stream);
        t->index = b->index;
        t->first_tile = c->tiles;
        c->tiles += b->numel / tile + (b->numel % tile != 0);
    }
}

LPSGD_INLINE double lpsgd_cuda_number(lpsgd_device_number number, double value)
{
    if (!number.pointer)
        return value;
    switch (number.dtype) {
    case LPSGD_FLOAT32:
        return *(const float *)number.pointer;
    case LPSGD_FLOAT64:
        return *(const double *)number.pointer;
    case LPSGD_BFLOAT16:
        return lpsgd_from_bfloat16(*(const uint16_t *)number.pointer);
    case LPSGD_FLOAT16:
        return lpsgd_from_float16(*(const uint16_t *)number.pointer);
    case LPSGD_FLOAT8_E5M2:
        break; /* of momentum buffers alone */
    }
    return value;
}

/* The one thread of the fold kernel: numbers in device memory become scalars in device memory. */
LPSGD_INLINE void lpsgd_cuda_fold(const lpsgd_cuda_fold_arguments *a)
{
    lpsgd_hyper hyper = a->hyper;
    hyper.lr = lpsgd_cuda_number(a->lr, hyper.lr);
    hyper.p = lpsgd_cuda_number(a->p, hyper.p);
    hyper.weight_decay = lpsgd_cuda_number(a->weight_decay, hyper.weight_decay);
    hyper.grad_scale = lpsgd_cuda_number(a->grad_scale, hyper.grad_scale);
    lpsgd_fold_values(&hyper, &a->result->k);
    a->result->skip = lpsgd_cuda_number(a->found_inf, 0.0) != 0.0;
}

/* The tensor that a tile of the launch belongs to. */
LPSGD_INLINE const lpsgd_cuda_tensor *lpsgd_cuda_find(const lpsgd_cuda_tensor *tensors, int64_t count,
                                                      int64_t tile)
{
    int64_t low = 0, high = count - 1;
    while (low < high) {
        const int64_t middle = (low + high + 1) / 2;
        if (tensors[middle].first_tile <= tile)
            low = middle;
        else
            high = middle - 1;
    }
    return &tensors[low];
}

/* Whether vectors may be used, for which momentum_buffer is aligned like this. */
LPSGD_INLINE int lpsgd_cuda_aligned(const lpsgd_cuda_tensor *t, int momentum_alignment)
{
    return ((uintptr_t)t->param | (uintptr_t)t->grad) % 16 == 0 &&
           (uintptr_t)t->momentum_buffer % (uintptr_t)momentum_alignment == 0;
}

/* A thread's part of a block's copy of the tables: one word, or none. */
LPSGD_INLINE void lpsgd_cuda_share(lpsgd_tables *copy, const lpsgd_cuda_common *common, int thread)
{
    const lpsgd_cuda_scalars *device = common->device_scalars;
    if (thread < (int)(sizeof *copy / sizeof(float)))
        ((float *)copy)[thread] = device ? ((const float *)&device->k.tables)[thread]
                                         : ((const float *)&common->scalars.tables)[thread];
}

/* Which thread this is, of LPSGD_CUDA_THREADS in each block. */
typedef struct lpsgd_cuda_place {
    int64_t block, blocks;
    int thread;
} lpsgd_cuda_place;

/* The random bits of an element: 32 for bfloat16, where k asks for them, and 8 for float8_e5m2. */
typedef struct lpsgd_cuda_random {
    uint32_t bits, byte;
} lpsgd_cuda_random;

LPSGD_INLINE lpsgd_cuda_random lpsgd_cuda_random_of(const lpsgd_cuda_tensor *t, int64_t i,
                                                    lpsgd_dtype dtype, lpsgd_dtype momentum_dtype,
                                                    const lpsgd_scalars *k)
{
    const uint64_t index = t->index + (uint64_t)i;
    const int rounds = dtype == LPSGD_BFLOAT16 || momentum_dtype == LPSGD_BFLOAT16;
    lpsgd_cuda_random random = {0, 0};
    if (rounds && k->stochastic_rounding)
        random.bits = lpsgd_random(t->key, index);
    if (momentum_dtype == LPSGD_FLOAT8_E5M2)
        random.byte = lpsgd_random_byte(t->byte_key, index);
    return random;
}

/* LPSGD_CUDA_WORK(name, T, M, step, dtype, momentum_dtype) defines one thread's work for parameters of
 * dtype and momentum buffers of momentum_dtype, which are of the types T and M. step(dtype,
 * momentum_dtype, rule, &param, &grad, &m, has_momentum, random, tables, k) steps one element.
 *
 * Threads would take turns to read different entries of a table in constant memory, so a block has a
 * copy of the tables in its shared memory, which lpsgd_cuda_share makes.
 *
 * Three things are so for the sake of the machine code (tests/cuda/test_cuda_code.py): the addresses of
 * a vector have names, as nvcc stores one in pieces where it computes the address anew; the scalars
 * are copied, as it would read them again for every element, in fear of what the stores change; and
 * a vector's elements have a loop for each rule, as it would ask for the rule at every element. */
#define LPSGD_CUDA_WORK(name, T, M, step, dtype, momentum_dtype)                                   \
    enum {                                                                                         \
        name##_width = 16 / (int)sizeof(T),                                                        \
        name##_alignment = sizeof(M) < sizeof(T) ? name##_width * (int)sizeof(M) : 16              \
    };                                                                                             \
    typedef struct LPSGD_ALIGN(16) name##_params {                                                 \
        T x[name##_width];                                                                         \
    } name##_params;                                                                               \
    typedef struct LPSGD_ALIGN(name##_alignment) name##_momentums {                                \
        M x[name##_width];                                                                         \
    } name##_momentums;                                                                            \
                                                                                                   \
    LPSGD_INLINE void name##_steps(lpsgd_rule rule, name##_params *param,                          \
                                   const name##_params *grad, name##_momentums *m,                 \
                                   const lpsgd_cuda_tensor *t, int64_t v,                          \
                                   const lpsgd_tables *tables, const lpsgd_scalars *k)             \
    {                                                                                              \
        const int has_momentum = t->momentum_buffer != NULL;                                       \
        LPSGD_UNROLL                                                                               \
        for (int j = 0; j < name##_width; j++)                                                     \
            step(dtype, momentum_dtype, rule, &param->x[j], &grad->x[j], &m->x[j], has_momentum,   \
                 lpsgd_cuda_random_of(t, v * name##_width + j, dtype, momentum_dtype, k), tables,  \
                 k);                                                                               \
    }                                                                                              \
                                                                                                   \
    LPSGD_INLINE void name##_vector(const lpsgd_cuda_tensor *t, int64_t v,                         \
                                    const lpsgd_tables *tables, const lpsgd_scalars *k)            \
    {                                                                                              \
        const int has_momentum = t->momentum_buffer != NULL;                                       \
        name##_params *const param_at = (name##_params *)t->param + v;                             \
        name##_momentums *const m_at =                                                             \
            has_momentum ? (name##_momentums *)t->momentum_buffer + v : NULL;                      \
        const name##_params grad = ((const name##_params *)t->grad)[v];                            \
        name##_params param = *param_at;                                                           \
        name##_momentums m = {{0}};                                                                \
        if (has_momentum)                                                                          \
            m = *m_at;                                                                             \
        switch (k->rule) {                                                                         \
        case LPSGD_RULE_SGD:                                                                       \
            name##_steps(LPSGD_RULE_SGD, &param, &grad, &m, t, v, tables, k);                      \
            break;                                                                                 \
        case LPSGD_RULE_SIGN:                                                                      \
            name##_steps(LPSGD_RULE_SIGN, &param, &grad, &m, t, v, tables, k);                     \
            break;                                                                                 \
        case LPSGD_RULE_POWER:                                                                     \
            name##_steps(LPSGD_RULE_POWER, &param, &grad, &m, t, v, tables, k);                    \
            break;                                                                                 \
        case LPSGD_RULE_REST:                                                                      \
            name##_steps(LPSGD_RULE_REST, &param, &grad, &m, t, v, tables, k);                     \
            break;                                                                                 \
        }                                                                                          \
        *param_at = param;                                                                         \
        if (has_momentum)                                                                          \
            *m_at = m;                                                                             \
    }                                                                                              \
                                                                                                   \
    LPSGD_INLINE void name##_element(const lpsgd_cuda_tensor *t, int64_t i,                        \
                                     const lpsgd_tables *tables, const lpsgd_scalars *k)           \
    {                                                                                              \
        const int has_momentum = t->momentum_buffer != NULL;                                       \
        T param = ((T *)t->param)[i];                                                              \
        M m = has_momentum ? ((M *)t->momentum_buffer)[i] : (M)0;                                  \
        step(dtype, momentum_dtype, k->rule, &param, (const T *)t->grad + i, &m, has_momentum,     \
             lpsgd_cuda_random_of(t, i, dtype, momentum_dtype, k), tables, k);                     \
        ((T *)t->param)[i] = param;                                                                \
        if (has_momentum)                                                                          \
            ((M *)t->momentum_buffer)[i] = m;                                                      \
    }                                                                                              \
                                                                                                   \
    LPSGD_INLINE void name##_work(const lpsgd_cuda_common *common,                                 \
                                  const lpsgd_cuda_tensor *tensors, const lpsgd_tables *tables,    \
                                  lpsgd_cuda_place place)                                          \
    {                                                                                              \
        const lpsgd_cuda_scalars *device = common->device_scalars;                                 \
        const lpsgd_scalars copy = device ? device->k : common->scalars, *k = &copy;               \
        int64_t tile = device && device->skip ? common->tiles : place.block;                       \
        for (; tile < common->tiles; tile += place.blocks) {                                       \
            const lpsgd_cuda_tensor *t = lpsgd_cuda_find(tensors, common->count, tile);            \
            const int64_t size = (int64_t)LPSGD_CUDA_TILE_BYTES / (int64_t)sizeof(T);              \
            const int64_t start = (tile - t->first_tile) * size, left = t->numel - start;          \
            const int count = (int)(left < size ? left : size);                                    \
            const int aligned = lpsgd_cuda_aligned(t, name##_alignment);                           \
            const int vectors = aligned ? count / name##_width : 0;                                \
            for (int v = place.thread; v < vectors; v += LPSGD_CUDA_THREADS)                       \
                name##_vector(t, start / name##_width + v, tables, k);                             \
            for (int i = vectors * name##_width + place.thread; i < count; i += LPSGD_CUDA_THREADS)\
                name##_element(t, start + i, tables, k);                                           \
        }                                                                                          \
    }

/* One element. dtypes and rule are constants where it counts; rule is k->rule, as in lpsgd_direction. */
LPSGD_INLINE void lpsgd_cuda_double(lpsgd_dtype dtype, lpsgd_dtype momentum_dtype, lpsgd_rule rule,
                                    double *param, const double *grad, double *m, int has_momentum,
                                    lpsgd_cuda_random random, const lpsgd_tables *tables,
                                    const lpsgd_scalars *k)
{
    double x = lpsgd_grad64(*grad, k);
    (void)dtype, (void)momentum_dtype, (void)random, (void)tables;
    if (has_momentum)
        *m = x = lpsgd_momentum64(*m, x, k);
    if (rule != LPSGD_RULE_REST)
        *param = lpsgd_apply64(*param, lpsgd_direction64(x, rule, k), k);
}

LPSGD_INLINE float lpsgd_cuda_load(lpsgd_dtype dtype, const void *from, const lpsgd_scalars *k)
{
    switch (dtype) {
    case LPSGD_BFLOAT16:
        return lpsgd_from_bfloat16(*(const uint16_t *)from);
    case LPSGD_FLOAT16:
        return lpsgd_from_float16(*(const uint16_t *)from);
    case LPSGD_FLOAT8_E5M2:
        return lpsgd_momentum_of_float8(*(const uint8_t *)from, k);
    default:
        return *(const float *)from;
    }
}

/* Of random.bits the lower 16 are used. */
LPSGD_INLINE void lpsgd_cuda_store(lpsgd_dtype dtype, void *to, float x, lpsgd_cuda_random random,
                                   const lpsgd_scalars *k)
{
    switch (dtype) {
    case LPSGD_BFLOAT16:
        *(uint16_t *)to = k->stochastic_rounding
                              ? lpsgd_to_bfloat16_stochastic(x, random.bits & 0xffffu)
                              : lpsgd_to_bfloat16(x);
        break;
    case LPSGD_FLOAT16:
        *(uint16_t *)to = lpsgd_to_float16(x);
        break;
    case LPSGD_FLOAT8_E5M2:
        *(uint8_t *)to = lpsgd_momentum_to_float8(x, random.byte, k);
        break;
    default:
        *(float *)to = x;
    }
}

LPSGD_INLINE void lpsgd_cuda_single(lpsgd_dtype dtype, lpsgd_dtype momentum_dtype, lpsgd_rule rule,
                                    void *param, const void *grad, void *m, int has_momentum,
                                    lpsgd_cuda_random random, const lpsgd_tables *tables,
                                    const lpsgd_scalars *k)
{
    const lpsgd_cuda_random of_momentum = {random.bits >> 16, random.byte};
    float wide = lpsgd_cuda_load(momentum_dtype, m, k); /* 0 and unused, for LPSGD */
    const float before = lpsgd_cuda_load(dtype, param, k);
    float x = lpsgd_grad(lpsgd_cuda_load(dtype, grad, k), k);
    if (has_momentum)
        wide = x = lpsgd_momentum(wide, x, k);
    if (rule != LPSGD_RULE_REST) {
        const float u = lpsgd_direction(x, rule, tables, k);
        lpsgd_cuda_store(dtype, param, lpsgd_apply(before, u, k), random, k);
    }
    lpsgd_cuda_store(momentum_dtype, m, wide, of_momentum, k);
}

LPSGD_CUDA_WORK(lpsgd_cuda_float32, float, float, lpsgd_cuda_single, LPSGD_FLOAT32, LPSGD_FLOAT32)
LPSGD_CUDA_WORK(lpsgd_cuda_float64, double, double, lpsgd_cuda_double, LPSGD_FLOAT64, LPSGD_FLOAT64)
LPSGD_CUDA_WORK(lpsgd_cuda_bfloat16, uint16_t, uint16_t, lpsgd_cuda_single, LPSGD_BFLOAT16,
                LPSGD_BFLOAT16)
LPSGD_CUDA_WORK(lpsgd_cuda_float16, uint16_t, uint16_t, lpsgd_cuda_single, LPSGD_FLOAT16,
                LPSGD_FLOAT16)
LPSGD_CUDA_WORK(lpsgd_cuda_bfloat16_wide, uint16_t, float, lpsgd_cuda_single, LPSGD_BFLOAT16,
                LPSGD_FLOAT32)
LPSGD_CUDA_WORK(lpsgd_cuda_float16_wide, uint16_t, float, lpsgd_cuda_single, LPSGD_FLOAT16,
                LPSGD_FLOAT32)
LPSGD_CUDA_WORK(lpsgd_cuda_float32_half, float, uint16_t, lpsgd_cuda_single, LPSGD_FLOAT32,
                LPSGD_BFLOAT16)
LPSGD_CUDA_WORK(lpsgd_cuda_float16_half, uint16_t, uint16_t, lpsgd_cuda_single, LPSGD_FLOAT16,
                LPSGD_BFLOAT16)
LPSGD_CUDA_WORK(lpsgd_cuda_float32_byte, float, uint8_t, lpsgd_cuda_single, LPSGD_FLOAT32,
                LPSGD_FLOAT8_E5M2)
LPSGD_CUDA_WORK(lpsgd_cuda_bfloat16_byte, uint16_t, uint8_t, lpsgd_cuda_single, LPSGD_BFLOAT16,
                LPSGD_FLOAT8_E5M2)
LPSGD_CUDA_WORK(lpsgd_cuda_float16_byte, uint16_t, uint8_t, lpsgd_cuda_single, LPSGD_FLOAT16,
                LPSGD_FLOAT8_E5M2)

#endif
