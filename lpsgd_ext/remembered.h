/* SPDX-License-Identifier: MIT
 *
 * remembered.h: what the checks found of the lists of the last calls, so that the next call need not
 * find it again: every tensor, and the written memory in order of address.
 */
#ifndef LPSGD_REMEMBERED_H
#define LPSGD_REMEMBERED_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stdint.h>

enum { RECENT_COUNT = 8 };

/* What was found of a tensor when it was checked. The object is compared, never looked into. */
typedef struct known_tensor {
    const PyObject *tensor;
    const void *data;
    uintptr_t bytes;
} known_tensor;

/* The memory [low, high) of element `index` of list `list`. */
typedef struct span {
    uintptr_t low, high;
    int list;
    Py_ssize_t index;
} span;

/* `count` lists of n tensors. */
typedef struct checked_lists {
    const PyObject *first; /* the first list's first; compared, never looked into */
    Py_ssize_t n;
    int count;
    int complete; /* `written` is that of `known`, and free of overlaps */
    known_tensor *known; /* n rows of `count`; whoever changes a written one clears `complete` */
    span *written;
    size_t written_count;
} checked_lists;

/* One per module object, which owns them. */
typedef struct remembered {
    checked_lists *recent[RECENT_COUNT]; /* the latest first; NULL where free */
} remembered;

/* Takes what is known of these lists out of `calls`, so that no other thread, which may run while a
 * check calls Python, uses it meanwhile; or starts from nothing, as it always does if that is NULL. The
 * caller owns it until it is put back. NULL, without an exception: no memory. */
checked_lists *remembered_take(remembered *calls, const PyObject *first, Py_ssize_t n, int count);

/* Takes it over, or forgets it if `calls` is NULL. The one that has waited longest is forgotten if there
 * is no room. */
void remembered_put_back(remembered *calls, checked_lists *checked);

/* Frees all. */
void remembered_forget(remembered *calls);

/* Looks for two tensors that share memory which a step writes to; `is_written` says which lists that
 * is. Returns 1 and fills in the two, or 0. */
int checked_lists_overlap(checked_lists *checked, const int *is_written, span *one, span *other);

#endif
