/* SPDX-License-Identifier: MIT
 *
 * test_threads.c: steps from several threads at once, each of them on several threads. Made for
 * ThreadSanitizer (make check-threads); bits are compared besides.
 */
#include "helpers.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>
#include <pthread.h>

enum { worker_count = 4, steps = 3, num_threads = 3 };

/* More than three shares of useful_threads(), cut within buffers and within a cache line of them. */
static const int64_t numel[] = {1, 16391, 0, 30, 40003, 16385};
enum { buffer_count = 6 };

typedef struct worker {
    pthread_barrier_t *barrier;
    test_list list;
    lpsgd_hyper hyper;
    int has_momentum;
    lpsgd_status status;
    const char *capability;
} worker;

static worker make_worker(int number, pthread_barrier_t *barrier)
{
    worker w = {.barrier = barrier, .hyper = usual, .has_momentum = number % 2};
    w.hyper.stochastic_rounding = number / 2 % 2;
    w.hyper.p = number % 3 ? 6.0 : 2.0;
    w.list = make_list(kinds[number % kind_count], numel, buffer_count, 0, (uint64_t)number);
    return w;
}

static void *step_some_times(void *argument)
{
    worker *w = argument;
    pthread_barrier_wait(w->barrier);
    w->capability = lpsgd_cpu_capability();
    for (int i = 0; i < steps && w->status == LPSGD_OK; i++)
        w->status = step_list(&w->list, &w->hyper, w->has_momentum, num_threads);
    return NULL;
}

static void run_at_once(worker *workers, pthread_barrier_t *barrier)
{
    pthread_t threads[worker_count];
    assert_int_equal(pthread_barrier_init(barrier, NULL, worker_count), 0);
    for (int i = 0; i < worker_count; i++)
        assert_int_equal(pthread_create(&threads[i], NULL, step_some_times, &workers[i]), 0);
    for (int i = 0; i < worker_count; i++)
        assert_int_equal(pthread_join(threads[i], NULL), 0);
    pthread_barrier_destroy(barrier);
}

static void assert_stepped_as_alone(worker *w, worker *alone)
{
    assert_int_equal(w->status, LPSGD_OK);
    assert_string_equal(w->capability, lpsgd_cpu_capability());
    for (int i = 0; i < steps; i++)
        assert_int_equal(step_list(&alone->list, &alone->hyper, alone->has_momentum, 1), LPSGD_OK);
    assert_true(same_list(&w->list, &alone->list));
    free_list(&w->list);
    free_list(&alone->list);
}

/* The first calls of the library in this process among them, so this test is the first. */
static void test_steps_at_once_give_the_bits_of_steps_alone(void **state)
{
    (void)state;
    for (int first = 0; first < kind_count; first += worker_count) {
        pthread_barrier_t barrier;
        worker at_once[worker_count], alone[worker_count];
        for (int i = 0; i < worker_count; i++) {
            at_once[i] = make_worker(first + i, &barrier);
            alone[i] = make_worker(first + i, &barrier);
        }
        run_at_once(at_once, &barrier);
        for (int i = 0; i < worker_count; i++)
            assert_stepped_as_alone(&at_once[i], &alone[i]);
    }
}

/* What is read alone may be shared. */
static void test_steps_at_once_may_share_their_gradients(void **state)
{
    (void)state;
    pthread_barrier_t barrier;
    worker at_once[worker_count], alone[worker_count];
    for (int i = 0; i < worker_count; i++) {
        at_once[i] = make_worker(kind_count - 1, &barrier); /* the same of each */
        alone[i] = make_worker(kind_count - 1, &barrier);
        for (int b = 0; b < buffer_count; b++)
            at_once[i].list.buffers[b].grad = at_once[0].list.buffers[b].grad;
    }
    run_at_once(at_once, &barrier);
    for (int i = 0; i < worker_count; i++)
        assert_stepped_as_alone(&at_once[i], &alone[i]);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_steps_at_once_give_the_bits_of_steps_alone),
        cmocka_unit_test(test_steps_at_once_may_share_their_gradients),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
