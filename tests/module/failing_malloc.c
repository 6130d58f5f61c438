/* SPDX-License-Identifier: MIT
 *
 * failing_malloc.c: an allocator for LD_PRELOAD whose allocations fail on demand, in the thread that
 * asks for it, and that counts what is allocated. tests/module/test_allocation_failures.py drives it.
 */
#include <errno.h>
#include <stddef.h>

void *__libc_malloc(size_t size);
void *__libc_calloc(size_t count, size_t size);
void *__libc_realloc(void *old, size_t size);
void *__libc_memalign(size_t alignment, size_t size);
void __libc_free(void *memory);

static _Thread_local long before_failure = -1, failures;
static long live;

/* After `skipped` allocations of this thread, the next `count` fail. */
void fail_after(long skipped, long count)
{
    failures = count;
    before_failure = skipped;
}

/* How many of the failures asked for are still to come; there will be none any more. */
long failures_left(void)
{
    before_failure = -1;
    return failures;
}

/* The number of pieces of memory in use. */
long live_allocations(void)
{
    return __atomic_load_n(&live, __ATOMIC_RELAXED);
}

static int fails(void)
{
    if (before_failure < 0 || !failures)
        return 0;
    if (before_failure > 0) {
        before_failure--;
        return 0;
    }
    failures--;
    errno = ENOMEM;
    return 1;
}

static void *counted(void *memory)
{
    if (memory)
        __atomic_fetch_add(&live, 1, __ATOMIC_RELAXED);
    return memory;
}

void *malloc(size_t size)
{
    return fails() ? NULL : counted(__libc_malloc(size));
}

void *calloc(size_t count, size_t size)
{
    return fails() ? NULL : counted(__libc_calloc(count, size));
}

void *realloc(void *old, size_t size)
{
    if (fails())
        return NULL;
    void *memory = __libc_realloc(old, size);
    return old ? memory : counted(memory);
}

void *memalign(size_t alignment, size_t size)
{
    return fails() ? NULL : counted(__libc_memalign(alignment, size));
}

void *aligned_alloc(size_t alignment, size_t size)
{
    return memalign(alignment, size);
}

int posix_memalign(void **memory, size_t alignment, size_t size)
{
    void *new = memalign(alignment, size);
    if (!new)
        return ENOMEM;
    *memory = new;
    return 0;
}

void free(void *memory)
{
    if (memory)
        __atomic_fetch_sub(&live, 1, __ATOMIC_RELAXED);
    __libc_free(memory);
}
