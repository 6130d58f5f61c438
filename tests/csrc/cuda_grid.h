/* SPDX-License-Identifier: MIT
 *
 * cuda_grid.h: a step by the source of the CUDA kernels compiled as C, every block and thread of
 * every launch in turn, up to a block's barrier and from there on.
 */
#ifndef CUDA_GRID_H
#define CUDA_GRID_H

#include "lpsgd_cuda_kernel.h"

#include "helpers.h"

typedef void grid_thread(const lpsgd_cuda_common *common, const lpsgd_cuda_tensor *tensors,
                         const lpsgd_tables *tables, lpsgd_cuda_place place);

#define GRID_THREAD(name)                                                                          \
    static void name##_thread(const lpsgd_cuda_common *common, const lpsgd_cuda_tensor *tensors,   \
                              const lpsgd_tables *tables, lpsgd_cuda_place place)                  \
    {                                                                                              \
        name##_work(common, tensors, tables, place);                                               \
    }

GRID_THREAD(lpsgd_cuda_float32)
GRID_THREAD(lpsgd_cuda_float64)
GRID_THREAD(lpsgd_cuda_bfloat16)
GRID_THREAD(lpsgd_cuda_float16)
GRID_THREAD(lpsgd_cuda_bfloat16_wide)
GRID_THREAD(lpsgd_cuda_float16_wide)
GRID_THREAD(lpsgd_cuda_float32_half)
GRID_THREAD(lpsgd_cuda_float16_half)
GRID_THREAD(lpsgd_cuda_float32_byte)
GRID_THREAD(lpsgd_cuda_bfloat16_byte)
GRID_THREAD(lpsgd_cuda_float16_byte)

static inline grid_thread *grid_thread_of(test_kind kind)
{
    static grid_thread *const of_kinds[kind_count] = {
        lpsgd_cuda_float32_thread,       lpsgd_cuda_float64_thread,
        lpsgd_cuda_bfloat16_thread,      lpsgd_cuda_float16_thread,
        lpsgd_cuda_bfloat16_wide_thread, lpsgd_cuda_float16_wide_thread,
        lpsgd_cuda_float32_half_thread,  lpsgd_cuda_float16_half_thread,
        lpsgd_cuda_float32_byte_thread,  lpsgd_cuda_bfloat16_byte_thread,
        lpsgd_cuda_float16_byte_thread,
    };
    int i = 0;
    while (kinds[i].dtype != kind.dtype || kinds[i].momentum_dtype != kind.momentum_dtype)
        i++;
    return of_kinds[i];
}

/* The tables, of which every word is wrong at first, are shared by all threads before one of them steps. */
static inline void run_block(const lpsgd_cuda_step_arguments *a, grid_thread *thread, int64_t block,
                             int64_t blocks, int threads)
{
    lpsgd_tables tables;
    memset(&tables, 0xff, sizeof tables); /* NaN */
    for (int i = 0; i < threads; i++)
        lpsgd_cuda_share(&tables, &a->common, i);
    for (int i = 0; i < threads; i++)
        thread(&a->common, a->tensor, &tables, (lpsgd_cuda_place){block, blocks, i});
}

/* All launches of a list, each of one block per tile but of no more than most_blocks. */
static inline void run_grids(lpsgd_cuda_step_arguments *a, test_list *list, int has_momentum,
                             int64_t most_blocks)
{
    for (int64_t done = 0; done < list->count;) {
        lpsgd_cuda_fill(a, list->buffers, list->count, format_of(list->kind.dtype).size,
                        has_momentum, &done);
        const int64_t tiles = a->common.tiles, blocks = tiles < most_blocks ? tiles : most_blocks;
        for (int64_t block = 0; block < blocks; block++)
            run_block(a, grid_thread_of(list->kind), block, blocks, LPSGD_CUDA_THREADS);
    }
}

/* What step_list() does, with most_blocks in place of its number of threads. */
static inline lpsgd_status grid_step_list(test_list *list, const lpsgd_hyper *hyper,
                                          int has_momentum, int most_blocks)
{
    static lpsgd_cuda_step_arguments a;
    lpsgd_hyper of_kind = *hyper;
    of_kind.momentum_dtype = list->kind.momentum_dtype;
    const lpsgd_status status = lpsgd_fold(&of_kind, has_momentum, &a.common.scalars);
    if (status == LPSGD_OK)
        run_grids(&a, list, has_momentum, most_blocks);
    return status;
}

#endif
