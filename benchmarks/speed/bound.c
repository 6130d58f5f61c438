// SPDX-License-Identifier: MIT
// The memory's share of a step: reads and writes every parameter and, if there is one, its momentum
// buffer, and reads every gradient. The arithmetic is one addition and one exclusive or of integers,
// which no value of the tensors slows down. Each thread takes an equal stretch of the whole list.
#include <stdint.h>

static void pass(uint64_t *restrict param, const uint64_t *restrict grad, uint64_t *restrict buffer,
                 int64_t count)
{
    if (buffer)
        for (int64_t i = 0; i < count; i++)
            param[i] ^= buffer[i] += grad[i];
    else
        for (int64_t i = 0; i < count; i++)
            param[i] ^= grad[i];
}

// `words` counts those of 8 bytes of each of `count` tensors. `buffers` may be NULL.
void bound(uint64_t *const *params, const uint64_t *const *grads, uint64_t *const *buffers,
           const int64_t *words, int64_t count, int threads)
{
    int64_t total = 0;
    for (int64_t i = 0; i < count; i++)
        total += words[i];
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int thread = 0; thread < threads; thread++) {
        const int64_t begin = total * thread / threads;
        const int64_t end = total * (thread + 1) / threads;
        int64_t first = 0; // of the tensor, in the whole list
        for (int64_t i = 0; i < count && first < end; first += words[i++]) {
            const int64_t from = begin > first ? begin - first : 0;
            const int64_t to = end - first < words[i] ? end - first : words[i];
            if (from < to)
                pass(params[i] + from, grads[i] + from, buffers ? buffers[i] + from : 0, to - from);
        }
    }
}
