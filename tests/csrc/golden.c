/* SPDX-License-Identifier: MIT
 *
 * golden.c: the contract of bits across machines. Steps a fixed data set with every float type whose
 * bits are promised, for every cutting of the data and number of threads alike, and compares one
 * checksum of all results with the one below. Needs no test library, so that it can be compiled for
 * any processor. golden [CAPABILITY] also fails unless the steps run on that instruction set;
 * golden CAPABILITY whole leaves the cuttings out, for an emulator, which takes long.
 *
 * CUDA_GRID: the steps are those of the CUDA kernels' source, on an emulated grid of as many blocks
 * as there would be threads.
 */
#ifdef CUDA_GRID
#include "cuda_grid.h"
#define STEP_LIST grid_step_list
#define CAPABILITY "emulated CUDA grid"
#else
#include "helpers.h"
#define STEP_LIST step_list
#define CAPABILITY lpsgd_cpu_capability()
#endif

/* Of the kinds whose momentum_buffer has the parameter's dtype or float32, of the others, and of both with
 * gradients that are summed in the momentum. */
static const uint64_t golden[4] = {UINT64_C(0xace62127d253de95), UINT64_C(0xac13901252f63c7a),
                                   UINT64_C(0x4f67a794ce45e889), UINT64_C(0xb016083fbfb89f59)};

static uint64_t mix(uint64_t checksum, uint64_t value) /* FNV-1a, 64 bits at a time */
{
    return (checksum ^ value) * UINT64_C(0x100000001b3);
}

/* Of the results in the order of the elements, however they are cut into buffers. */
static uint64_t checksum_of(test_list *list)
{
    const float_format f = format_of(list->kind.dtype), m = format_of(list->kind.momentum_dtype);
    uint64_t params = 1, momentum_buffers = 2;
    canonicalize_nan(list);
    for (const lpsgd_buffer *b = list->buffers; b < list->buffers + list->count; b++)
        for (int64_t i = 0; i < b->numel; i++) {
            params = mix(params, load_bits(b->param, f, i));
            momentum_buffers = mix(momentum_buffers, load_bits(b->momentum_buffer, m, i));
        }
    return mix(params, momentum_buffers);
}

/* What is stepped: `awkward` of 4096 elements are zero, subnormal, huge, infinite or NaN. */
typedef struct data_set {
    int64_t total;
    unsigned awkward;
} data_set;

/* Two steps of the data cut into buffers of `piece` elements (the last one may be smaller). */
static uint64_t run(test_kind kind, const lpsgd_hyper *hyper, int has_momentum, data_set data,
                    int64_t piece, int num_threads)
{
    static int64_t numel[1400];
    int64_t count = 0;
    for (int64_t left = data.total; left > 0; left -= piece)
        numel[count++] = left < piece ? left : piece;
    test_list list = make_list(kind, numel, count, data.awkward, (uint64_t)data.total);
    for (int i = 0; i < 2; i++)
        if (STEP_LIST(&list, hyper, has_momentum, num_threads) != LPSGD_OK)
            abort();
    const uint64_t checksum = checksum_of(&list);
    free_list(&list);
    return checksum;
}

static int cuttings = 3;

/* The same from every cutting and number of threads, which clears *same where it isn't. */
static uint64_t run_all_ways(test_kind kind, const lpsgd_hyper *hyper, int has_momentum,
                             data_set data, int *same)
{
    static const int64_t pieces[] = {37, 1000, 50000};
    const uint64_t whole = run(kind, hyper, has_momentum, data, data.total, 1);
    for (int i = 0; i < cuttings; i++) {
        const int num_threads = i + 1; /* of use to long lists alone */
        if (run(kind, hyper, has_momentum, data, pieces[i], num_threads) != whole)
            *same = 0;
    }
    return whole;
}

/* Of all steps of five kinds. */
static uint64_t run_kinds(const int *of_kinds, int *same)
{
    static const double eps[] = {1e-8, 0.0, 0.5};
    static const int exponents[] = {15, 3, -4, 126, -126, 12, 0};
    /* The last is for the parallel steps: a share per thread with 3 threads, and one element more. */
    const data_set few = {1100, 4}, many = {500, 1024}, large = {3 * 16384 + 1, 1};
    uint64_t checksum = 0;
    for (int i = 0; i < 5 * 2 * 8 * 3; i++) {
        const test_kind kind = kinds[of_kinds[i % 5]];
        const int has_momentum = i / 5 % 2, norm = i / 10 % 8, e = i / 80;
        const lpsgd_hyper hyper = {.lr = 0.01,
                                   .p = norms[norm],
                                   .momentum = 0.9,
                                   .weight_decay = (i + norm) % 2 ? 0.1 : 0.0,
                                   .eps = eps[e],
                                   .grad_scale = i % 7 ? 1.0 : 3.0,
                                   .pivot = 1.0, /* for another one libm's pow() has a say */
                                   .maximize = (i / 2 + e) % 2,
                                   .momentum_exponent = exponents[i / 5 % 7],
                                   .stochastic_rounding = norm % 2,
                                   .seed = (uint64_t)i,
                                   .step = 3};
        checksum = mix(checksum, run_all_ways(kind, &hyper, has_momentum, few, same));
        checksum = mix(checksum, run_all_ways(kind, &hyper, has_momentum, many, same));
        if (norm == 3 && e == 0)
            checksum = mix(checksum, run_all_ways(kind, &hyper, has_momentum, large, same));
    }
    return checksum;
}

/* Of the first, a middle and the last of 7 micro-batches, of five kinds. */
static uint64_t run_accumulating(const int *of_kinds, int *same)
{
    const data_set data = {1100, 4};
    uint64_t checksum = 0;
    for (int i = 0; i < 5 * 8 * 3; i++) {
        const int part = i / 40;
        lpsgd_hyper hyper = usual;
        hyper.p = norms[i / 5 % 8];
        hyper.stochastic_rounding = i / 5 % 2;
        hyper.seed = (uint64_t)i;
        hyper.accumulate = 7;
        hyper.continues = part > 0;
        hyper.momentum_only = part < 2;
        checksum = mix(checksum, run_all_ways(kinds[of_kinds[i % 5]], &hyper, 1, data, same));
    }
    return checksum;
}

int main(int argc, char **argv)
{
    static const int promised[2][5] = {{0, 2, 3, 4, 5}, {6, 7, 8, 9, 10}}; /* without float64 */
    int same = 1, right = 1;
    if (argc == 3 && strcmp(argv[2], "whole") == 0)
        cuttings = 0;
    for (int i = 0; i < 4; i++) {
        const uint64_t checksum =
            (i < 2 ? run_kinds : run_accumulating)(promised[i % 2], &same);
        printf("golden: capability %s, OpenMP %d, checksum 0x%016llx\n", CAPABILITY,
               lpsgd_has_openmp(), (unsigned long long)checksum);
        if (checksum != golden[i]) {
            printf("golden: the checksum should be 0x%016llx\n", (unsigned long long)golden[i]);
            right = 0;
        }
    }
    const int asked = argc < 2 || strcmp(CAPABILITY, argv[1]) == 0;
    if (!same)
        printf("golden: the bits depend on the cutting or on the number of threads\n");
    if (!asked)
        printf("golden: the capability should be %s\n", argv[1]);
    return !(same && right && asked);
}
