/* SPDX-License-Identifier: MIT
 *
 * fuzz_step.c: libFuzzer's way into the list driver. An input is a list of buffers, in memory between
 * pages that may not be touched, and the hyper-parameters of one step. The step must do what the
 * plain loop does, to the bit and nowhere else; or refuse, for a reason that the input gives, and
 * write nothing. Inputs that are damaged on purpose are stepped by the driver alone, the others by it
 * and by every instruction set that this CPU has.
 *
 * The driver is compiled against the omp.h in serial_openmp, so that it cuts lists for several threads
 * and steps the pieces one after the other: the same input always does the same.
 */
#include "plain_loop.h"

#include <omp.h>
#include <stddef.h>
#include <sys/mman.h>

enum { page = 4096, most_buffers = 5, small = 2048, large = 40000, slack = 64 };
enum { room = (large * 8 + 2 * page - 1) / page * page };

int omp_threads = 1;

/* What is left of the input; beyond its end, random bytes that its whole decides. */
typedef struct source {
    const uint8_t *data;
    size_t size;
    uint64_t random;
} source;

static source source_of(const uint8_t *data, size_t size)
{
    source from = {data, size, size};
    for (size_t i = 0; i < size; i++)
        from.random = (from.random ^ data[i]) * UINT64_C(0x100000001b3);
    return from;
}

static uint64_t take(source *from, size_t bytes)
{
    uint64_t value = 0;
    if (from->size < bytes)
        return next_random(&from->random) >> (64 - 8 * bytes);
    memcpy(&value, from->data, bytes);
    from->data += bytes;
    from->size -= bytes;
    return value;
}

static int take_one_in(source *from, int n)
{
    return (int)take(from, 1) % n == n - 1;
}

static double take_double(source *from, const double *likely, int count)
{
    const uint64_t choice = take(from, 1);
    if (choice < 240)
        return likely[choice % (uint64_t)count];
    const uint64_t bits = take(from, 8);
    double value;
    memcpy(&value, &bits, sizeof value);
    return choice % 2 ? value : fabs(value);
}

#define TAKE_DOUBLE(from, ...)                                                                          \
    take_double(from, (const double[]){__VA_ARGS__},                                                    \
                sizeof((const double[]){__VA_ARGS__}) / sizeof(double))

static lpsgd_hyper take_hyper(source *from)
{
    lpsgd_hyper hyper = {
        .lr = TAKE_DOUBLE(from, 0.01, 1.0, 0.0, 1e30, 1e-40),
        .p = TAKE_DOUBLE(from, 6.0, 2.0, INFINITY, 3.0, 2.0000001, 1e9, 100.0),
        .momentum = TAKE_DOUBLE(from, 0.9, 0.0, 0.5, 0.999999999),
        .weight_decay = TAKE_DOUBLE(from, 0.0, 0.1, 1e30, INFINITY),
        .eps = TAKE_DOUBLE(from, 1e-8, 0.0, 1e-45, 1e30, INFINITY),
        .pivot = TAKE_DOUBLE(from, 1.0, 1e-4, 1e300, 1e-320),
        .grad_scale = TAKE_DOUBLE(from, 1.0, 65536.0, 3.0, 1e-300, 1e300),
    };
    const uint64_t flags = take(from, 1);
    hyper.maximize = flags & 1;
    hyper.stochastic_rounding = flags & 2;
    hyper.continues = flags & 4;
    hyper.momentum_only = flags & 8;
    hyper.accumulate = (int)(flags >> 4 & 15) - 1;
    hyper.momentum_exponent = (int)(take(from, 1) % 256) - 128;
    hyper.seed = take(from, 8);
    hyper.step = take(from, 8);
    return hyper;
}

/* One array in two places alike: what is stepped, and what the plain loop steps. `low` to `high` is
 * the array with a little around it, which must not change. */
typedef struct place {
    unsigned char *actual, *expected;
    ptrdiff_t low, high;
} place;

static place places[most_buffers * 3];
static lpsgd_kernel *kernels[3] = {lpsgd_kernel_default};
static int kernel_count = 1;

static unsigned char *guarded(void)
{
    unsigned char *mapped =
        mmap(NULL, room + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED || mprotect(mapped + page, room, PROT_READ | PROT_WRITE))
        abort();
    return mapped + page;
}

int LLVMFuzzerInitialize(int *argc, char ***argv);
int LLVMFuzzerInitialize(int *argc, char ***argv)
{
    (void)argc, (void)argv;
    for (int i = 0; i < most_buffers * 3; i++)
        places[i] = (place){.actual = guarded(), .expected = guarded()};
#ifdef __x86_64__
    const char *capability = lpsgd_cpu_capability();
    if (strcmp(capability, "default") != 0)
        kernels[kernel_count++] = lpsgd_kernel_avx2;
    if (strcmp(capability, "avx512") == 0)
        kernels[kernel_count++] = lpsgd_kernel_avx512;
#endif
    return 0;
}

/* Where in its place an array lies: touching the page before or the page after, or near one. */
static ptrdiff_t lay_out(place *at, float_format f, int64_t numel, source *from)
{
    const ptrdiff_t bytes = numel * f.size, where = (ptrdiff_t)take(from, 1);
    const ptrdiff_t distance = where / 2 % 64 * f.size;
    const ptrdiff_t offset = where % 2 ? distance : room - bytes - distance;
    at->low = offset < slack ? 0 : offset - slack;
    at->high = offset + bytes + slack > room ? room : offset + bytes + slack;
    return offset;
}

/* Fills it and what is around it: with the input's next bytes over and over, or random elements. */
static void fill(place *at, float_format f, int as_input, source *from)
{
    uint64_t state = take(from, 4);
    const unsigned awkward[] = {0, few_awkward, many_awkward, 4096};
    const unsigned of_4096 = awkward[state % 4];
    for (ptrdiff_t i = at->low; i + f.size <= at->high; i += f.size) {
        const uint64_t pattern = as_input ? state : random_element(&state, f, of_4096);
        store_bits(at->actual + i, f, 0, pattern);
        if (as_input && i % 32 == 0)
            state = state << 8 | take(from, 1);
    }
    memcpy(at->expected + at->low, at->actual + at->low, (size_t)(at->high - at->low));
}

/* The list of buffers in both places. */
typedef struct lists {
    test_kind kind;
    int64_t count;
    lpsgd_buffer actual[most_buffers], expected[most_buffers];
} lists;

static lists take_lists(source *from)
{
    lists all = {.kind = kinds[take(from, 1) % kind_count],
                 .count = (int64_t)take(from, 1) % (most_buffers + 1)};
    for (int64_t i = 0; i < all.count; i++) {
        lpsgd_buffer *b = &all.actual[i], *c = &all.expected[i];
        const int64_t size = (int64_t)take(from, 2);
        b->numel = size % 8 ? size / 8 % small : size / 8 * 11 % large;
        b->stream = take(from, 1);
        b->index = take(from, 1) % 2 ? take(from, 8) : 0;
        *c = *b;
        const int as_input = take_one_in(from, 3), shares = i && take_one_in(from, 8);
        void **const members[3] = {&b->param, &b->momentum_buffer, (void **)&b->grad};
        void **const twins[3] = {&c->param, &c->momentum_buffer, (void **)&c->grad};
        for (int m = 0; m < 3; m++) {
            const float_format f = format_of(m == 1 ? all.kind.momentum_dtype : all.kind.dtype);
            place *at = &places[3 * i + m];
            const ptrdiff_t offset = lay_out(at, f, b->numel, from);
            *members[m] = at->actual + offset;
            *twins[m] = at->expected + offset;
            fill(at, f, as_input, from);
        }
        if (shares && b->numel <= all.actual[i - 1].numel) { /* only gradients may */
            b->grad = all.actual[i - 1].grad;
            c->grad = all.expected[i - 1].grad;
        }
    }
    return all;
}

/* The reasons for which lpsgd.h lets a step refuse, as bits by lpsgd_status. */
static unsigned reasons_of(const lpsgd_hyper *h, int has_momentum)
{
    unsigned reasons = 0;
    reasons |= (unsigned)!(h->lr >= 0) << LPSGD_ERROR_LR;
    reasons |= (unsigned)!(h->p >= 2) << LPSGD_ERROR_P;
    reasons |= (unsigned)(has_momentum && !(h->momentum >= 0 && h->momentum < 1))
               << LPSGD_ERROR_MOMENTUM;
    reasons |= (unsigned)!(h->weight_decay >= 0) << LPSGD_ERROR_WEIGHT_DECAY;
    reasons |= (unsigned)!(h->eps >= 0) << LPSGD_ERROR_EPS;
    reasons |= (unsigned)!(h->pivot > 0 && h->pivot < INFINITY) << LPSGD_ERROR_PIVOT;
    reasons |= (unsigned)!(h->grad_scale > 0 && h->grad_scale < INFINITY) << LPSGD_ERROR_GRAD_SCALE;
    reasons |= (unsigned)(has_momentum && abs(h->momentum_exponent) > 126)
               << LPSGD_ERROR_MOMENTUM_EXPONENT;
    reasons |= (unsigned)(has_momentum && h->accumulate < 0) << LPSGD_ERROR_ACCUMULATE;
    return reasons;
}

/* Makes the list one that must be refused; the dtype may become none. */
static unsigned damage(lists *all, lpsgd_dtype *dtype, int has_momentum, source *from)
{
    const int64_t last = all->count ? all->count - 1 : 0;
    lpsgd_buffer *b = &all->actual[(int64_t)take(from, 1) % (last + 1)];
    const unsigned which = (unsigned)take(from, 1), array = which / 8 % (has_momentum ? 3 : 2);
    void **pointer = array == 2   ? &b->momentum_buffer
                     : array == 1 ? (void **)&b->grad
                                  : &b->param;
    switch (which % 5) {
    case 0:
        *dtype = (lpsgd_dtype)(LPSGD_FLOAT8_E5M2 + take(from, 3));
        return 1u << LPSGD_ERROR_DTYPE;
    case 1:
        all->count = -1 - (int64_t)take(from, 7);
        return 1u << LPSGD_ERROR_NUMEL;
    case 2:
        if (!all->count)
            return 0;
        b->numel = take(from, 1) % 2 ? -1 - (int64_t)take(from, 7) : INT64_MAX - (int64_t)take(from, 2);
        return 1u << LPSGD_ERROR_NUMEL;
    case 3:
        if (!all->count || !b->numel)
            return 0;
        *pointer = NULL;
        return 1u << LPSGD_ERROR_NULL;
    default:
        if (!all->count || !b->numel || (array == 2 && all->kind.momentum_dtype == LPSGD_FLOAT8_E5M2))
            return 0;
        *pointer = (char *)*pointer + lpsgd_itemsize(array == 2 ? all->kind.momentum_dtype : *dtype) / 2;
        return 1u << LPSGD_ERROR_ALIGNMENT;
    }
}

static void check(int holds, const char *what)
{
    if (holds)
        return;
    fprintf(stderr, "fuzz_step: %s\n", what);
    abort();
}

/* Gives every NaN of an array and around it the same bits. */
static void canonicalize(unsigned char *array, const place *at, float_format f)
{
    const uint64_t infinity = infinity_of(f);
    const uint64_t magnitude = infinity | ((UINT64_C(1) << f.mantissa_bits) - 1);
    for (ptrdiff_t i = at->low; i + f.size <= at->high; i += f.size)
        if ((load_bits(array + i, f, 0) & magnitude) > infinity)
            store_bits(array + i, f, 0, magnitude);
}

static void check_places(const lists *all, int64_t count, int any_nan)
{
    for (int64_t i = 0; i < 3 * count; i++) {
        const place *at = &places[i];
        const float_format f =
            format_of(i % 3 == 1 ? all->kind.momentum_dtype : all->kind.dtype);
        if (any_nan && i % 3 < 2) {
            canonicalize(at->actual, at, f);
            canonicalize(at->expected, at, f);
        }
        const size_t size = (size_t)(at->high - at->low);
        check(memcmp(at->actual + at->low, at->expected + at->low, size) == 0, "other bits");
    }
}

/* What lpsgd_schedule.c computes for others than steps. */
static void check_schedule(source *from)
{
    const double s = TAKE_DOUBLE(from, 1.0, 2.0, 1.5, 10.0, INFINITY);
    const double total = TAKE_DOUBLE(from, 1.0, 10.0, 2.0, 1e18, INFINITY);
    const double p_max = TAKE_DOUBLE(from, 6.0, 2.0, 1e300, INFINITY);
    const double p_min = TAKE_DOUBLE(from, 2.0, 6.0, 1.0);
    const int valid = s >= 1 && s < INFINITY && total >= 1 && total < INFINITY && p_max >= 2 &&
                      p_max < INFINITY && p_min >= 2 && p_min < INFINITY;
    const double p = lpsgd_cosine_p(s, total, p_max, p_min);
    check(valid ? p >= fmin(p_min, p_max) && p <= fmax(p_min, p_max) : isnan(p), "cosine_p");
    const double rho = lpsgd_rho(p_max);
    check(p_max >= 2 ? rho >= 0 && rho <= 1 : isnan(rho), "rho");
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    source from = source_of(data, size);
    if (take_one_in(&from, 32)) {
        check_schedule(&from);
        return 0;
    }
    lpsgd_hyper hyper = take_hyper(&from);
    const int has_momentum = !take_one_in(&from, 3);
    const int num_threads = (int)(take(&from, 1) % 9) - 1;
    const int choice = (int)(take(&from, 1) % (uint64_t)(2 * kernel_count));
    const int kernel = choice < kernel_count ? choice : -1; /* -1: the driver */
    const int damaged = take_one_in(&from, 8);
    omp_threads = 1 + (int)take(&from, 1) % 8;

    lists all = take_lists(&from);
    lpsgd_dtype dtype = all.kind.dtype;
    hyper.momentum_dtype = all.kind.momentum_dtype;
    const int64_t count = all.count;
    unsigned reasons = reasons_of(&hyper, has_momentum);
    check(!reasons_of(&hyper, 1) == (lpsgd_check_hyper(&hyper) == LPSGD_OK), "check_hyper");
    if (damaged)
        reasons |= damage(&all, &dtype, has_momentum, &from);

    lpsgd_scalars k;
    lpsgd_status status = LPSGD_OK;
    if (reasons || kernel < 0)
        status = (has_momentum ? lpsgdm_step : lpsgd_step)(all.actual, all.count, dtype, &hyper,
                                                           num_threads);
    check(lpsgd_status_text(status) != NULL, "no text");
    check(reasons ? reasons >> status & 1 : status == LPSGD_OK, lpsgd_status_text(status));
    if (!reasons) {
        check(lpsgd_fold(&hyper, has_momentum, &k) == LPSGD_OK, "fold");
        plain_loop(all.expected, count, all.kind, has_momentum, &k);
        for (int64_t i = 0; kernel >= 0 && i < count; i++) {
            lpsgd_buffer *b = &all.actual[i];
            if (!has_momentum)
                b->momentum_buffer = NULL;
            kernels[kernel](b, dtype, &k);
        }
    }
    check_places(&all, count, !reasons);
    return 0;
}
