/* SPDX-License-Identifier: MIT
 *
 * remembered.c: keeps what is known of the lists of the last calls, and finds overlaps in it.
 */
#include "remembered.h"

#include <stdlib.h>

static void forget(checked_lists *checked)
{
    if (checked) {
        PyMem_Free(checked->known);
        PyMem_Free(checked->written);
        PyMem_Free(checked);
    }
}

checked_lists *remembered_take(remembered *calls, const PyObject *first, Py_ssize_t n, int count)
{
    for (int i = 0; calls && i < RECENT_COUNT; i++) {
        checked_lists *checked = calls->recent[i];
        if (checked && checked->first == first && checked->n == n && checked->count == count) {
            calls->recent[i] = NULL;
            return checked;
        }
    }
    checked_lists *checked = PyMem_Calloc(1, sizeof *checked);
    if (!checked)
        return NULL;
    checked->first = first;
    checked->n = n;
    checked->count = count;
    checked->known = PyMem_Calloc((size_t)n, (size_t)count * sizeof *checked->known);
    checked->written = PyMem_Calloc((size_t)n, (size_t)count * sizeof *checked->written);
    if (!checked->known || !checked->written) {
        forget(checked);
        return NULL;
    }
    return checked;
}

void remembered_put_back(remembered *calls, checked_lists *checked)
{
    int i = 0;
    if (!calls) {
        forget(checked);
        return;
    }
    while (i < RECENT_COUNT - 1 && calls->recent[i])
        i++;
    forget(calls->recent[i]);
    for (; i > 0; i--)
        calls->recent[i] = calls->recent[i - 1];
    calls->recent[0] = checked;
}

void remembered_forget(remembered *calls)
{
    for (int i = 0; i < RECENT_COUNT; i++) {
        forget(calls->recent[i]);
        calls->recent[i] = NULL;
    }
}

static int compare_spans(const void *a, const void *b)
{
    const uintptr_t x = ((const span *)a)->low, y = ((const span *)b)->low;
    return (x > y) - (x < y);
}

/* Fills `written` from `known` and looks for an overlap within it. */
static int find_among_written(checked_lists *checked, const int *is_written, span *one, span *other)
{
    span *written = checked->written;
    size_t count = 0;
    for (Py_ssize_t i = 0; i < checked->n; i++)
        for (int j = 0; j < checked->count; j++) {
            const known_tensor *known = &checked->known[i * checked->count + j];
            const uintptr_t low = (uintptr_t)known->data;
            if (is_written[j] && known->bytes)
                written[count++] = (span){low, low + known->bytes, j, i};
        }
    qsort(written, count, sizeof *written, compare_spans);
    for (size_t i = 1; i < count; i++)
        if (written[i - 1].high > written[i].low) {
            *one = written[i - 1];
            *other = written[i];
            return 1;
        }
    checked->written_count = count;
    checked->complete = 1;
    return 0;
}

/* Looks for a tensor that is only read but overlaps with a written one. */
static int find_among_read(const checked_lists *checked, const int *is_written, span *one,
                           span *other)
{
    for (Py_ssize_t i = 0; i < checked->n; i++)
        for (int j = 0; j < checked->count; j++) {
            const known_tensor *known = &checked->known[i * checked->count + j];
            if (is_written[j] || !known->bytes)
                continue;
            const span read = {(uintptr_t)known->data, (uintptr_t)known->data + known->bytes, j, i};
            /* The first written span that ends behind the start of this one. */
            size_t from = 0, to = checked->written_count;
            while (from < to) {
                const size_t middle = from + (to - from) / 2;
                if (checked->written[middle].high > read.low)
                    to = middle;
                else
                    from = middle + 1;
            }
            if (from < checked->written_count && checked->written[from].low < read.high) {
                *one = checked->written[from];
                *other = read;
                return 1;
            }
        }
    return 0;
}

int checked_lists_overlap(checked_lists *checked, const int *is_written, span *one, span *other)
{
    if (!checked->complete && find_among_written(checked, is_written, one, other))
        return 1;
    return find_among_read(checked, is_written, one, other);
}
