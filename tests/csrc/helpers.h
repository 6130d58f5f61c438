/* SPDX-License-Identifier: MIT
 *
 * helpers.h: what the tests share: random elements, hyper-parameters, and lists of buffers in one
 * guarded piece of memory. Elements are made from integers alone, so they are the same everywhere.
 */
#ifndef HELPERS_H
#define HELPERS_H

#include "lpsgd_internal.h"

#include <stdio.h>
#include <stdlib.h>

static inline uint64_t next_random(uint64_t *state) /* splitmix64 */
{
    uint64_t r = *state += UINT64_C(0x9e3779b97f4a7c15);
    r = (r ^ r >> 30) * UINT64_C(0xbf58476d1ce4e5b9);
    r = (r ^ r >> 27) * UINT64_C(0x94d049bb133111eb);
    return r ^ r >> 31;
}

typedef struct float_format {
    const char *name;
    int size, exponent_bits, mantissa_bits;
} float_format;

static inline float_format format_of(lpsgd_dtype dtype)
{
    static const float_format formats[] = {
        [LPSGD_FLOAT32] = {"float32", 4, 8, 23},
        [LPSGD_FLOAT64] = {"float64", 8, 11, 52},
        [LPSGD_BFLOAT16] = {"bfloat16", 2, 8, 7},
        [LPSGD_FLOAT16] = {"float16", 2, 5, 10},
        [LPSGD_FLOAT8_E5M2] = {"float8_e5m2", 1, 5, 2},
    };
    return formats[dtype];
}

static inline uint64_t infinity_of(float_format f)
{
    return ((UINT64_C(1) << f.exponent_bits) - 1) << f.mantissa_bits;
}

/* The bits of a random element: with probability awkward / 4096 a zero, subnormal, huge, infinite,
 * NaN or arbitrary one, else one with an exponent from two thirds of the way down up to 1. */
static inline uint64_t random_element(uint64_t *state, float_format f, unsigned awkward)
{
    const uint64_t r = next_random(state), one = UINT64_C(1) << f.mantissa_bits;
    const uint64_t mantissa = next_random(state) % one, infinity = infinity_of(f);
    const uint64_t sign = r >> 63 << (f.exponent_bits + f.mantissa_bits);
    const uint64_t choice = r >> 12 & 0xffff, bias = (UINT64_C(1) << (f.exponent_bits - 1)) - 1;
    if (r % 4096 >= awkward)
        return sign | (bias + 1 - choice % (2 * bias / 3)) * one | mantissa;
    switch (choice % 8) {
    case 0:
        return sign;
    case 1:
        return sign | 1;
    case 2:
        return sign | mantissa;
    case 3:
        return sign | one;
    case 4:
        return sign | (infinity - one) | mantissa;
    case 5:
        return sign | infinity;
    case 6:
        return sign | infinity | one >> 1;
    default:
        return sign | choice / 8 % (infinity / one) * one | mantissa;
    }
}

static inline uint64_t load_bits(const void *buffer, float_format f, int64_t i)
{
    if (f.size == 1)
        return ((const uint8_t *)buffer)[i];
    if (f.size == 2)
        return ((const uint16_t *)buffer)[i];
    return f.size == 4 ? ((const uint32_t *)buffer)[i] : ((const uint64_t *)buffer)[i];
}

static inline void store_bits(void *buffer, float_format f, int64_t i, uint64_t bits)
{
    if (f.size == 1)
        ((uint8_t *)buffer)[i] = (uint8_t)bits;
    else if (f.size == 2)
        ((uint16_t *)buffer)[i] = (uint16_t)bits;
    else if (f.size == 4)
        ((uint32_t *)buffer)[i] = (uint32_t)bits;
    else
        ((uint64_t *)buffer)[i] = bits;
}

enum { few_awkward = 4, many_awkward = 512 }; /* of 4096 elements */

static const lpsgd_hyper usual = {
    .lr = 0.01,
    .p = 6.0,
    .momentum = 0.9,
    .weight_decay = 0.1,
    .eps = 1e-8,
    .pivot = 1.0,
    .grad_scale = 1.0,
    .momentum_exponent = 3,
};

static const double norms[] = {2.0, 2.5, 3.0, 6.0, 9.0, 100.0, 1e9, INFINITY};
enum {
    norm_count = 8,
    ordinary_count = norm_count * 3 * 2 * 2 * 2,
    hyper_count = ordinary_count + 4 + norm_count * 3
};

/* All combinations that a step distinguishes: i < hyper_count. */
static inline lpsgd_hyper hyper_number(int i)
{
    static const double eps[] = {1e-8, 0.0, 1e30};
    static const int exponents[] = {15, 0, -5, 126, -126};
    lpsgd_hyper hyper = usual;
    hyper.momentum_exponent = exponents[i % 5];
    if (i >= ordinary_count && i < ordinary_count + 4) {
        hyper.lr = i % 2 ? 0.0 : 0.01;
        hyper.grad_scale = i / 2 % 2 ? 3.0 : 65536.0;
        return hyper;
    }
    if (i >= ordinary_count) { /* a step's first, middle and last micro-batches */
        i -= ordinary_count + 4;
        hyper.accumulate = 7;
        hyper.continues = i / norm_count > 0;
        hyper.momentum_only = i / norm_count < 2;
    }
    hyper.stochastic_rounding = i % 5 > 1;
    hyper.seed = (uint64_t)i;
    hyper.step = (uint64_t)i << 40;
    hyper.p = norms[i % norm_count];
    hyper.eps = eps[i / norm_count % 3];
    hyper.pivot = i / norm_count / 3 % 2 ? 1e-3 : 1.0;
    hyper.weight_decay = i / norm_count / 6 % 2 ? 0.1 : 0.0;
    hyper.maximize = i / norm_count / 12 % 2;
    return hyper;
}

/* The element types of a list. */
typedef struct test_kind {
    lpsgd_dtype dtype, momentum_dtype;
} test_kind;

/* The first four have one dtype each, in the order of lpsgd_dtype. */
enum { kind_count = 11 };
static const test_kind kinds[kind_count] = {
    {LPSGD_FLOAT32, LPSGD_FLOAT32},      {LPSGD_FLOAT64, LPSGD_FLOAT64},
    {LPSGD_BFLOAT16, LPSGD_BFLOAT16},    {LPSGD_FLOAT16, LPSGD_FLOAT16},
    {LPSGD_BFLOAT16, LPSGD_FLOAT32},     {LPSGD_FLOAT16, LPSGD_FLOAT32},
    {LPSGD_FLOAT32, LPSGD_BFLOAT16},     {LPSGD_FLOAT16, LPSGD_BFLOAT16},
    {LPSGD_FLOAT32, LPSGD_FLOAT8_E5M2},  {LPSGD_BFLOAT16, LPSGD_FLOAT8_E5M2},
    {LPSGD_FLOAT16, LPSGD_FLOAT8_E5M2},
};

/* A list of buffers that lie in one piece of memory, each between guard zones. */
typedef struct test_list {
    test_kind kind;
    int64_t count;
    lpsgd_buffer *buffers;
    unsigned char *memory;
    size_t size;
} test_list;

enum { guard_size = 64, guard_byte = 0xa5 };

/* Lays out and fills one of the three arrays of a buffer, at any multiple of the element's size and
 * between two guard zones. `first` is the place of its element 0 in the list laid end to end: an
 * element depends on the seed and that place, not on how the list is cut. */
static inline void *place_array(test_list *list, lpsgd_dtype dtype, int64_t numel,
                                unsigned awkward, uint64_t seed, int64_t first)
{
    const float_format f = format_of(dtype);
    unsigned char *array = list->memory + list->size + guard_size;
    array += (size_t)(first % 16 * f.size);
    for (int64_t i = 0; i < numel; i++) {
        uint64_t state = seed ^ (uint64_t)(first + i) << 24;
        store_bits(array, f, i, random_element(&state, f, awkward));
    }
    list->size += 2 * guard_size + 128 + (size_t)(numel * f.size + 63) / 64 * 64;
    return array;
}

/* The buffers are the pieces of one parameter: stream 5, index as laid end to end. */
static inline test_list make_list(test_kind kind, const int64_t *numel, int64_t count,
                                  unsigned awkward, uint64_t seed)
{
    test_list list = {.kind = kind, .count = count};
    size_t most = 0;
    int64_t first = 0;
    for (int64_t i = 0; i < count; i++)
        most += 3 * (2 * guard_size + 128 + 64 + 8 * (size_t)numel[i]);
    list.buffers = calloc((size_t)(count + 1), sizeof *list.buffers);
    list.memory = malloc(most + 1);
    if (!list.buffers || !list.memory)
        abort();
    memset(list.memory, guard_byte, most);
    for (int64_t i = 0; i < count; first += numel[i], i++) {
        lpsgd_buffer *b = &list.buffers[i];
        b->numel = numel[i];
        b->stream = 5;
        b->index = (uint64_t)first;
        b->param = place_array(&list, kind.dtype, numel[i], awkward, 3 * seed, first);
        b->grad = place_array(&list, kind.dtype, numel[i], awkward, 3 * seed + 1, first);
        b->momentum_buffer =
            place_array(&list, kind.momentum_dtype, numel[i], awkward, 3 * seed + 2, first);
    }
    return list;
}

static inline void free_list(test_list *list)
{
    free(list->buffers);
    free(list->memory);
}

/* The place in the memory of `list` that `pointer` is at in the memory of `other`; NULL for NULL. */
static inline void *same_place(const test_list *list, const test_list *other, const void *pointer)
{
    return pointer ? list->memory + ((const unsigned char *)pointer - other->memory) : NULL;
}

static inline test_list copy_list(const test_list *from)
{
    test_list list = *from;
    list.buffers = calloc((size_t)(from->count + 1), sizeof *list.buffers);
    list.memory = malloc(from->size + 1);
    if (!list.buffers || !list.memory)
        abort();
    memcpy(list.memory, from->memory, from->size);
    for (int64_t i = 0; i < from->count; i++) {
        lpsgd_buffer *b = &list.buffers[i];
        *b = from->buffers[i];
        b->param = same_place(&list, from, b->param);
        b->grad = same_place(&list, from, b->grad);
        b->momentum_buffer = same_place(&list, from, b->momentum_buffer);
    }
    return list;
}

static inline lpsgd_status step_list(test_list *list, const lpsgd_hyper *hyper, int has_momentum,
                                     int num_threads)
{
    lpsgd_hyper of_kind = *hyper;
    of_kind.momentum_dtype = list->kind.momentum_dtype;
    return (has_momentum ? lpsgdm_step : lpsgd_step)(list->buffers, list->count, list->kind.dtype,
                                                     &of_kind, num_threads);
}

/* Gives every NaN of param and momentum_buffer the same bits. */
static inline void canonicalize_nan(test_list *list)
{
    for (int64_t b = 0; b < 2 * list->count; b++) {
        const lpsgd_buffer *buffer = &list->buffers[b / 2];
        const float_format f = format_of(b % 2 ? list->kind.momentum_dtype : list->kind.dtype);
        const uint64_t infinity = infinity_of(f);
        const uint64_t magnitude = infinity | ((UINT64_C(1) << f.mantissa_bits) - 1);
        void *array = b % 2 ? buffer->momentum_buffer : buffer->param;
        for (int64_t i = 0; i < buffer->numel; i++)
            if ((load_bits(array, f, i) & magnitude) > infinity)
                store_bits(array, f, i, magnitude);
    }
}

/* Whether every byte is the same: params, momentum buffers, gradients and guard zones. */
static inline int same_list(const test_list *a, const test_list *b)
{
    return memcmp(a->memory, b->memory, a->size) == 0;
}

#endif
