/* SPDX-License-Identifier: MIT
 *
 * lpsgd_cpu_kernel.h: one step over one buffer, for one instruction set.
 *
 * An include template: lpsgd_cpu_<name>.c defines LPSGD_KERNEL, the function's name, LPSGD_TARGET, its
 * instruction set as a function attribute, and vectors (lpsgd_cpu_vector.h), and includes this file.
 * Every operation is elementwise, so the vectors' width cannot change a bit.
 *
 * One loop does it all, two vectors at a time, a batch. One that has an element out of the ordinary, for
 * whose power the tables do not serve, leaves the loop and is stepped with care.
 */

/* What distinguishes the loops: constants in each of them. */
typedef struct form {
    lpsgd_dtype dtype, momentum_dtype; /* of param and grad, of momentum_buffer */
    int has_momentum;
} form;

/* The elements that are stepped at once, as float32. Where all that is read and written is bfloat16,
 * which takes no more than a shift or a mask then, those of even number and those of odd number;
 * else the first half and the second. */
typedef struct pair {
    vfloat part[2];
} pair;

enum {
    batch = 2 * lanes,
    bytes_block = 64, /* elements that share the hashes of lpsgd_random_byte */
    low_part = __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__, /* of a bfloat16 in the lower half of 32 bits */
};

/* The step's scalars in vectors. */
typedef struct vscalars {
    vfloat momentum_weight, grad_weight, grad_factor, decay, step_size, eps, series[5];
    vfloat momentum_scale, momentum_unscale;
    table8 fine, reciprocal, root;
    table32 coarse;
} vscalars;

/* The random bits of a buffer. Bytes are made for a block of elements at a time, which a batch of them
 * does not leave, as it begins at a multiple of its size. */
typedef struct noise {
    uint64_t key, byte_key;
    uint64_t block; /* whose bytes are there: elements from bytes_block * block on */
    uint16_t bytes[bytes_block];
} noise;

/* A batch's place in the buffer. */
typedef struct place {
    char *param;
    const char *grad;
    char *momentum_buffer;
    uint64_t index; /* of its first element in the whole parameter */
} place;

LPSGD_VECTOR vscalars vscalars_of(const lpsgd_scalars *k)
{
    const lpsgd_tables *tables = &k->tables;
    vscalars s = {
        .momentum_weight = splat(k->momentum_weight),
        .grad_weight = splat(k->grad_weight),
        .grad_factor = splat(k->grad_factor),
        .decay = splat(k->decay),
        .step_size = splat(k->step_size),
        .eps = splat(k->eps),
        .momentum_scale = splat(k->momentum_scale),
        .momentum_unscale = splat(k->momentum_unscale),
        .fine = table8_of(tables->fine),
        .reciprocal = table8_of(tables->reciprocal),
        .root = table8_of(tables->root),
        .coarse = table32_of(tables->coarse, k->eps),
    };
    for (int i = 0; i < 5; i++)
        s.series[i] = splat(k->series[i]);
    return s;
}

/* lpsgd_ordinary_power, with the entry of `coarse`. */
LPSGD_VECTOR vfloat power(vfloat y, int careful, const vscalars *s)
{
    const vint bits = (vint)y;
    const vfloat *c = s->series, root = look_up8(s->root, bits >> 20);
    const vfloat m = (vfloat)((bits & 0x007fffff) | 0x3f800000);
    const vfloat r = fma_each(m, look_up8(s->reciprocal, bits >> 20), splat(-1.0f));
    vfloat series = c[4];
    series = fma_each(series, r, c[3]);
    series = fma_each(series, r, c[2]);
    series = fma_each(series, r, c[1]);
    series = fma_each(series, r, c[0]);
    const vfloat coarse = look_up32(&s->coarse, bits >> 26, careful);
    const vfloat fine = look_up8(s->fine, bits >> 23), octaves = coarse * fine;
    const vfloat rest = fma_each(coarse, fine, -octaves), mantissa = fma_each(series * r, root, root);
    return fma_each(octaves, mantissa, rest * mantissa);
}

/* u, as lpsgd_direction has it. */
LPSGD_VECTOR pair direction(pair x, const vfloat y[2], lpsgd_rule rule, int careful,
                            const vscalars *s)
{
    const vfloat zero = {0.0f};
    pair u = {{zero, zero}};
    switch (rule) {
    case LPSGD_RULE_SGD:
        for (int i = 0; i < 2; i++)
            u.part[i] = x.part[i] + zero;
        break;
    case LPSGD_RULE_SIGN:
        for (int i = 0; i < 2; i++)
            u.part[i] = (vfloat)((vint)(x.part[i] / y[i] + zero) & (y[i] != zero));
        break;
    case LPSGD_RULE_POWER:
        for (int i = 0; i < 2; i++)
            u.part[i] = fma_each(x.part[i], power(y[i], careful, s), zero);
        break;
    case LPSGD_RULE_REST:
        break;
    }
    return u;
}

LPSGD_TARGET __attribute__((noinline)) static float careful_direction(float x, const lpsgd_scalars *k)
{
    return lpsgd_direction(x, LPSGD_RULE_POWER, &k->tables, k);
}

/* u with what lpsgd_direction has for elements out of the ordinary. The tables serve y = 0 as well: x is 0
 * there, and whatever they say is finite. */
LPSGD_VECTOR vfloat replace_extraordinary(vfloat u, vfloat x, vfloat y, const lpsgd_scalars *k)
{
    const vuint bits = (vuint)y;
    const vint extraordinary = (bits - 0x00800000u >= LPSGD_ORDINARY) & (bits != 0);
    int32_t any = 0;
    for (int i = 0; i < lanes; i++)
        any |= extraordinary[i];
    for (int i = 0; any && i < lanes; i++)
        if (extraordinary[i])
            u[i] = careful_direction(x[i], k);
    return u;
}

LPSGD_VECTOR int is_interleaved(const form f)
{
    return f.dtype == LPSGD_BFLOAT16 && f.momentum_dtype == LPSGD_BFLOAT16;
}

LPSGD_VECTOR int size_of(lpsgd_dtype dtype)
{
    return dtype == LPSGD_FLOAT32 ? 4 : dtype == LPSGD_FLOAT8_E5M2 ? 1 : 2;
}

/* lpsgd_random for the numbers first, first + by, ... */
LPSGD_VECTOR vuint random_each(uint64_t key, uint64_t first, int by)
{
    const uint32_t high = (uint32_t)(key >> 32) + (uint32_t)(first >> 32) * 0x9e3779b9u;
    vuint low;
    for (int i = 0; i < lanes; i++)
        low[i] = (uint32_t)(by * i);
    low += (uint32_t)first;
    const vuint carries = (vuint)(low < (uint32_t)first);
    vuint x = low ^ (uint32_t)key;
    x = (x ^ x >> 17) * 0xed5ad4bbu;
    x ^= high + (carries & 0x9e3779b9u);
    x = (x ^ x >> 11) * 0xac4c1b51u;
    x = (x ^ x >> 15) * 0x31848babu;
    return x ^ x >> 14;
}

/* Makes the bytes of the block that has this element, if they are not there: lpsgd_random_byte's, each
 * hash's in four places 16 elements apart. */
LPSGD_VECTOR void make_bytes(noise *random, uint64_t index)
{
    const uint64_t block = index / bytes_block;
    if (block == random->block)
        return;
    random->block = block;
    for (int i = 0; i < 16; i += lanes) {
        const vuint hash = random_each(random->byte_key, 16 * block + (uint64_t)i, 1);
        const vhalf low = __builtin_convertvector(hash, vhalf);
        const vhalf high = __builtin_convertvector(hash >> 16, vhalf);
        const vhalf bytes[4] = {low & 0xff, low >> 8, high & 0xff, high >> 8};
        for (int j = 0; j < 4; j++)
            memcpy(random->bytes + 16 * j + i, &bytes[j], sizeof bytes[j]);
    }
}

LPSGD_VECTOR vfloat load_vector(const char *from, lpsgd_dtype dtype)
{
    vhalf h;
    if (dtype == LPSGD_FLOAT32)
        return load_float(from);
    memcpy(&h, from, sizeof h);
    return dtype == LPSGD_FLOAT16 ? from_float16(h)
                                  : (vfloat)(__builtin_convertvector(h, vuint) << 16);
}

LPSGD_VECTOR pair load(const char *from, lpsgd_dtype dtype, const form f)
{
    pair x;
    if (is_interleaved(f)) {
        const vuint both = (vuint)load_float(from);
        x.part[low_part] = (vfloat)(both << 16);
        x.part[!low_part] = (vfloat)(both & 0xffff0000u);
    } else
        for (int i = 0; i < 2; i++)
            x.part[i] = load_vector(from + i * lanes * size_of(dtype), dtype);
    return x;
}

/* In the upper 16 bits that of lpsgd_to_bfloat16, or with `stochastic` of
 * lpsgd_to_bfloat16_stochastic. */
LPSGD_VECTOR vuint round_to_bfloat16(vfloat x, int stochastic, vuint random16)
{
    const vuint bits = (vuint)x, is_nan = (vuint)(x != x);
    const vuint rounded = bits + (stochastic ? random16 : 0x7fffu + (bits >> 16 & 1u));
    return (rounded & ~is_nan) | (0x7fc00000u & is_nan);
}

/* lpsgd_to_float16. */
LPSGD_VECTOR vhalf round_to_float16(vfloat x)
{
    const vhalf h = to_float16(x), is_nan = (vhalf)((h & 0x7fff) > 0x7c00);
    return (h & ~is_nan) | (((h & 0x8000) | 0x7e00) & is_nan);
}

LPSGD_VECTOR void store_vector(char *to, vfloat x, lpsgd_dtype dtype, int stochastic,
                               vuint random16)
{
    if (dtype == LPSGD_FLOAT32) {
        memcpy(to, &x, sizeof x);
        return;
    }
    const vhalf h =
        dtype == LPSGD_FLOAT16
            ? round_to_float16(x)
            : __builtin_convertvector(round_to_bfloat16(x, stochastic, random16) >> 16, vhalf);
    memcpy(to, &h, sizeof h);
}

/* The random bits that are used are those from `shift` on. */
LPSGD_VECTOR void store(char *to, pair x, lpsgd_dtype dtype, int stochastic, const vuint random[2],
                        int shift, const form f)
{
    vuint random16[2], rounded[2];
    for (int i = 0; i < 2; i++) {
        random16[i] = random[i] >> shift & 0xffffu;
        if (is_interleaved(f))
            rounded[i] = round_to_bfloat16(x.part[i], stochastic, random16[i]);
        else
            store_vector(to + i * lanes * size_of(dtype), x.part[i], dtype, stochastic,
                         random16[i]);
    }
    if (is_interleaved(f)) {
        const vuint both = rounded[low_part] >> 16 | (rounded[!low_part] & 0xffff0000u);
        memcpy(to, &both, sizeof both);
    }
}

/* Of float8_e5m2 as lpsgd_momentum_of_float8 and lpsgd_momentum_to_float8 have it. */
LPSGD_VECTOR pair load_momentum(const char *from, const form f, const vscalars *s)
{
    if (f.momentum_dtype != LPSGD_FLOAT8_E5M2)
        return load(from, f.momentum_dtype, f);
    return (pair){{load_float8(from) * s->momentum_unscale,
                   load_float8(from + lanes) * s->momentum_unscale}};
}

LPSGD_VECTOR void store_momentum(place at, pair x, int stochastic, const vuint random[2],
                                 const noise *bits, const form f, const vscalars *s)
{
    if (f.momentum_dtype != LPSGD_FLOAT8_E5M2) {
        store(at.momentum_buffer, x, f.momentum_dtype, stochastic, random, 16, f);
        return;
    }
    store_float8(at.momentum_buffer, x.part[0] * s->momentum_scale,
                 x.part[1] * s->momentum_scale, bits->bytes + at.index % bytes_block);
}

/* Steps a batch by k's rule. Without `careful` returns whether one of its elements is out of the ordinary;
 * then nothing has been written. */
LPSGD_VECTOR int step_batch(place at, const form f, lpsgd_rule rule, noise *bits, int careful,
                            const vscalars *s, const lpsgd_scalars *k)
{
    pair x = load(at.grad, f.dtype, f), m, param, u;
    vfloat y[2];
    vuint random[2] = {{0}, {0}};
    if (f.has_momentum)
        m = load_momentum(at.momentum_buffer, f, s);
    if (f.momentum_dtype == LPSGD_FLOAT8_E5M2) /* now, long before they are loaded */
        make_bytes(bits, at.index);
    for (int i = 0; i < 2; i++) {
        x.part[i] *= s->grad_factor;
        if (f.has_momentum)
            x.part[i] = fma_each(s->grad_weight, x.part[i], s->momentum_weight * m.part[i]);
        y[i] = (vfloat)((vint)x.part[i] & 0x7fffffff) + s->eps;
        if (rule == LPSGD_RULE_POWER && !careful &&
            __builtin_expect(any_unserved(y[i], &s->coarse), 0))
            return 1;
    }
    u = direction(x, y, rule, careful, s);
    for (int i = 0; i < 2 && careful && rule == LPSGD_RULE_POWER; i++)
        u.part[i] = replace_extraordinary(u.part[i], x.part[i], y[i], k);
    const int rounds = f.dtype == LPSGD_BFLOAT16 || f.momentum_dtype == LPSGD_BFLOAT16;
    const int stochastic = rounds && k->stochastic_rounding;
    for (int i = 0; i < 2 && stochastic; i++) {
        const int first = is_interleaved(f) ? i : i * lanes;
        random[i] = random_each(bits->key, at.index + (uint64_t)first, is_interleaved(f) ? 2 : 1);
    }
    if (f.has_momentum)
        store_momentum(at, x, stochastic, random, bits, f, s);
    if (rule == LPSGD_RULE_REST)
        return 0;
    param = load(at.param, f.dtype, f);
    for (int i = 0; i < 2; i++)
        param.part[i] = fma_each(s->step_size, u.part[i], s->decay * param.part[i]);
    store(at.param, param, f.dtype, stochastic, random, 0, f);
    return 0;
}

LPSGD_VECTOR place place_of(const lpsgd_buffer *buffer, int64_t i, const form f)
{
    char *const momentum_buffer = buffer->momentum_buffer;
    return (place){
        .param = (char *)buffer->param + i * size_of(f.dtype),
        .grad = (const char *)buffer->grad + i * size_of(f.dtype),
        .momentum_buffer = f.has_momentum ? momentum_buffer + i * size_of(f.momentum_dtype) : NULL,
        .index = buffer->index + (uint64_t)i,
    };
}

/* A batch that has an element out of the ordinary, or n elements, fewer than a batch: by way of a whole
 * one elsewhere, in which they come after `skip` others. One function for all forms, which compiles sooner. */
LPSGD_TARGET __attribute__((noinline)) static void
step_with_care(place at, int skip, int n, form f, noise *bits, const vscalars *s,
               const lpsgd_scalars *k)
{
    char param[4 * batch] = {0}, grad[4 * batch] = {0}, momentum_buffer[4 * batch] = {0};
    const size_t bytes = (size_t)(n * size_of(f.dtype)), from = (size_t)(skip * size_of(f.dtype));
    const size_t momentum_bytes = (size_t)(n * size_of(f.momentum_dtype));
    const size_t momentum_from = (size_t)(skip * size_of(f.momentum_dtype));
    memcpy(param + from, at.param, bytes);
    memcpy(grad + from, at.grad, bytes);
    if (f.has_momentum)
        memcpy(momentum_buffer + momentum_from, at.momentum_buffer, momentum_bytes);
    step_batch((place){param, grad, momentum_buffer, at.index - (uint64_t)skip}, f, k->rule, bits, 1,
               s, k);
    if (k->rule != LPSGD_RULE_REST)
        memcpy(at.param, param + from, bytes);
    if (f.has_momentum)
        memcpy(at.momentum_buffer, momentum_buffer + momentum_from, momentum_bytes);
}

/* Steps batches from element i on up to the last whole one, or to one that has an element out of the
 * ordinary. Returns where it has come to. */
LPSGD_VECTOR int64_t step_batches(const lpsgd_buffer *buffer, int64_t i, const form f, lpsgd_rule rule,
                                  noise *bits, const vscalars *s, const lpsgd_scalars *k)
{
    while (i + batch <= buffer->numel && !step_batch(place_of(buffer, i, f), f, rule, bits, 0, s, k))
        i += batch;
    return i;
}

/* The power has a loop of its own; the other rules are asked for at every batch. */
LPSGD_VECTOR void step_all(const lpsgd_buffer *list, const form f, const lpsgd_scalars *k)
{
    const lpsgd_buffer copy = *list, *const b = &copy; /* which no store changes */
    const vscalars s = vscalars_of(k);
    noise bits = {.key = lpsgd_key(k->rounding_key, b->stream),
                  .byte_key = lpsgd_byte_key(k->rounding_key, b->stream),
                  .block = UINT64_MAX};
    /* Of the first batch, which begins at a multiple of its size, so many elements lie before b. */
    int skip = f.momentum_dtype == LPSGD_FLOAT8_E5M2 ? (int)(b->index % batch) : 0;
    for (int64_t i = 0; i < b->numel; skip = 0) {
        if (!skip && k->rule == LPSGD_RULE_POWER)
            i = step_batches(b, i, f, LPSGD_RULE_POWER, &bits, &s, k);
        else if (!skip)
            i = step_batches(b, i, f, k->rule, &bits, &s, k);
        const int room = batch - skip, n = b->numel - i < room ? (int)(b->numel - i) : room;
        if (n)
            step_with_care(place_of(b, i, f), skip, n, f, &bits, &s, k);
        i += n;
    }
}

LPSGD_VECTOR void step_dtype(const lpsgd_buffer *buffer, lpsgd_dtype dtype, const lpsgd_scalars *k)
{
    if (!buffer->momentum_buffer)
        step_all(buffer, (form){dtype, dtype, 0}, k);
    else if (k->momentum_dtype == LPSGD_FLOAT32)
        step_all(buffer, (form){dtype, LPSGD_FLOAT32, 1}, k);
    else if (k->momentum_dtype == LPSGD_BFLOAT16)
        step_all(buffer, (form){dtype, LPSGD_BFLOAT16, 1}, k);
    else if (k->momentum_dtype == LPSGD_FLOAT8_E5M2)
        step_all(buffer, (form){dtype, LPSGD_FLOAT8_E5M2, 1}, k);
    else if (dtype == LPSGD_FLOAT16)
        step_all(buffer, (form){dtype, LPSGD_FLOAT16, 1}, k);
}

LPSGD_VECTOR void step_float64(double *restrict param, const double *restrict grad,
                               double *restrict momentum_buffer, int64_t numel, lpsgd_rule rule,
                               const lpsgd_scalars *k)
{
    for (int64_t i = 0; i < numel; i++) {
        double x = lpsgd_grad64(grad[i], k);
        if (momentum_buffer)
            momentum_buffer[i] = x = lpsgd_momentum64(momentum_buffer[i], x, k);
        if (rule != LPSGD_RULE_REST)
            param[i] = lpsgd_apply64(param[i], lpsgd_direction64(x, rule, k), k);
    }
}

LPSGD_TARGET void LPSGD_KERNEL(const lpsgd_buffer *buffer, lpsgd_dtype dtype,
                               const lpsgd_scalars *k)
{
    void *param = buffer->param, *momentum_buffer = buffer->momentum_buffer;
    switch (dtype) {
    case LPSGD_FLOAT32:
        step_dtype(buffer, LPSGD_FLOAT32, k);
        break;
    case LPSGD_BFLOAT16:
        step_dtype(buffer, LPSGD_BFLOAT16, k);
        break;
    case LPSGD_FLOAT16:
        step_dtype(buffer, LPSGD_FLOAT16, k);
        break;
    case LPSGD_FLOAT64:
        if (k->rule == LPSGD_RULE_SGD)
            step_float64(param, buffer->grad, momentum_buffer, buffer->numel, LPSGD_RULE_SGD, k);
        else
            step_float64(param, buffer->grad, momentum_buffer, buffer->numel, k->rule, k);
        break;
    case LPSGD_FLOAT8_E5M2:
        break;
    }
}
