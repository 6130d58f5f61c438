/* SPDX-License-Identifier: MIT
 *
 * test_guard_pages.c: every CPU kernel, on the instruction set that LPSGD_CPU_CAPABILITY names, at
 * every size and so at every offset from an aligned address: arrays lie directly before or directly
 * after a page that may be neither read nor written.
 *
 * Sizes go to 4096 if the only argument is "all", otherwise to a little more than one block of the
 * kernel (512 elements): it has every remainder after a block, a chunk and a vector by then.
 */
#include "helpers.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>
#include <sys/mman.h>
#include <unistd.h>

enum { most = 4096, a_block_and_more = 600 };
static int64_t last_size = a_block_and_more;

enum { param, grad, momentum_buffer, array_count };
typedef enum { after_guard, before_guard } side;

/* Room for `most` elements between two pages that are out of bounds. */
static struct {
    unsigned char *memory, *before, *expected;
} arrays[array_count];
static size_t room;

static int map_arrays(void **state)
{
    (void)state;
    const size_t page = (size_t)sysconf(_SC_PAGESIZE);
    room = (most * sizeof(double) + page - 1) / page * page;
    for (int a = 0; a < array_count; a++) {
        unsigned char *mapped = mmap(NULL, room + 2 * page, PROT_NONE,
                                     MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (mapped == MAP_FAILED || mprotect(mapped + page, room, PROT_READ | PROT_WRITE))
            return -1;
        arrays[a].memory = mapped + page;
        arrays[a].before = malloc(room);
        arrays[a].expected = malloc(room);
        if (!arrays[a].before || !arrays[a].expected)
            return -1;
    }
    return 0;
}

static int unmap_arrays(void **state)
{
    (void)state;
    const size_t page = (size_t)sysconf(_SC_PAGESIZE);
    for (int a = 0; a < array_count; a++) {
        free(arrays[a].before);
        free(arrays[a].expected);
        munmap(arrays[a].memory - page, room + 2 * page);
    }
    return 0;
}

static float_format format_in(test_kind kind, int a)
{
    return format_of(a == momentum_buffer ? kind.momentum_dtype : kind.dtype);
}

/* Neither infinite nor NaN, as the bits of a NaN may differ. */
static void fill(test_kind kind)
{
    for (int a = 0; a < array_count; a++) {
        const float_format f = format_in(kind, a);
        const uint64_t infinity = infinity_of(f);
        uint64_t state = (uint64_t)a;
        assert_int_equal(mprotect(arrays[a].memory, room, PROT_READ | PROT_WRITE), 0);
        for (int64_t i = 0; i < (int64_t)room / f.size; i++) {
            const uint64_t bits = random_element(&state, f, few_awkward);
            store_bits(arrays[a].memory, f, i, (bits & infinity) == infinity ? 0 : bits);
        }
        memcpy(arrays[a].before, arrays[a].memory, room);
    }
    assert_int_equal(mprotect(arrays[grad].memory, room, PROT_READ), 0);
}

static size_t offset_of(test_kind kind, int a, side where, int64_t numel)
{
    return where == after_guard ? 0 : room - (size_t)(numel * format_in(kind, a).size);
}

/* Steps the `numel` elements nearest to the guard; they are a piece of the `most` nearest ones. */
static void step_piece(test_kind kind, const lpsgd_hyper *hyper, int has_momentum, side where,
                       int64_t numel)
{
    lpsgd_buffer b = {
        .param = arrays[param].memory + offset_of(kind, param, where, numel),
        .grad = arrays[grad].memory + offset_of(kind, grad, where, numel),
        .numel = numel,
        .index = (uint64_t)(where == after_guard ? 0 : most - numel),
    };
    if (has_momentum)
        b.momentum_buffer =
            arrays[momentum_buffer].memory + offset_of(kind, momentum_buffer, where, numel);
    assert_int_equal((has_momentum ? lpsgdm_step : lpsgd_step)(&b, 1, kind.dtype, hyper, 1),
                     LPSGD_OK);
}

/* Whether the piece has what the step of the whole gives it, and all else what it had. Puts back
 * what the piece had. */
static int only_the_piece_was_stepped(test_kind kind, side where, int64_t numel)
{
    int same = 1;
    for (int a = 0; a < array_count; a++) {
        const size_t size = (size_t)(numel * format_in(kind, a).size);
        const size_t from = offset_of(kind, a, where, numel), to = from + size;
        unsigned char *memory = arrays[a].memory, *before = arrays[a].before;
        same &= memcmp(memory, before, from) == 0 &&
                memcmp(memory + from, arrays[a].expected + from, size) == 0 &&
                memcmp(memory + to, before + to, room - to) == 0;
        if (a != grad)
            memcpy(memory + from, before + from, size);
    }
    return same;
}

static void assert_pieces_are_stepped_as_the_whole(test_kind kind, const lpsgd_hyper *hyper,
                                                   int has_momentum, side where)
{
    fill(kind);
    step_piece(kind, hyper, has_momentum, where, most);
    for (int a = 0; a < array_count; a++)
        memcpy(arrays[a].expected, arrays[a].memory, room);
    fill(kind);
    for (int64_t numel = 0; numel <= last_size; numel++) {
        step_piece(kind, hyper, has_momentum, where, numel);
        if (!only_the_piece_was_stepped(kind, where, numel))
            fail_msg("%s%s (momentum %s) p=%g lr=%g stochastic=%d: %d elements %s the guard",
                     has_momentum ? "LPSGDM " : "LPSGD ", format_in(kind, param).name,
                     format_in(kind, momentum_buffer).name, hyper->p, hyper->lr,
                     hyper->stochastic_rounding, (int)numel,
                     where == after_guard ? "after" : "before");
    }
}

static void assert_no_byte_beside_the_arrays_is_touched(side where)
{
    /* One of each rule, all with both ways to round. */
    static const struct {
        double p, lr;
    } rules[] = {{6.0, 0.01}, {2.0, 0.01}, {INFINITY, 0.01}, {6.0, 0.0}};
    for (int i = 0; i < kind_count * 2 * 4; i++) {
        const test_kind kind = kinds[i / 8];
        lpsgd_hyper hyper = usual;
        hyper.p = rules[i % 4].p;
        hyper.lr = rules[i % 4].lr;
        hyper.momentum_dtype = kind.momentum_dtype;
        assert_pieces_are_stepped_as_the_whole(kind, &hyper, i / 4 % 2, where);
        hyper.stochastic_rounding = 1;
        if (kind.dtype == LPSGD_BFLOAT16 || kind.momentum_dtype == LPSGD_BFLOAT16)
            assert_pieces_are_stepped_as_the_whole(kind, &hyper, i / 4 % 2, where);
    }
}

static void test_arrays_that_end_at_a_guard_are_stepped_alone(void **state)
{
    (void)state;
    assert_no_byte_beside_the_arrays_is_touched(before_guard);
}

static void test_arrays_that_begin_after_a_guard_are_stepped_alone(void **state)
{
    (void)state;
    assert_no_byte_beside_the_arrays_is_touched(after_guard);
}

int main(int argc, char **argv)
{
    if (argc == 2 && strcmp(argv[1], "all") == 0)
        last_size = most;
    print_message("capability: %s, sizes to %d\n", lpsgd_cpu_capability(), (int)last_size);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_arrays_that_end_at_a_guard_are_stepped_alone),
        cmocka_unit_test(test_arrays_that_begin_after_a_guard_are_stepped_alone),
    };
    return cmocka_run_group_tests(tests, map_arrays, unmap_arrays);
}
