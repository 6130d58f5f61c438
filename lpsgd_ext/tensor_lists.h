/* SPDX-License-Identifier: MIT
 *
 * tensor_lists.h: from lists of PyTorch tensors to checked raw buffers.
 */
#ifndef LPSGD_TENSOR_LISTS_H
#define LPSGD_TENSOR_LISTS_H

#include "lpsgd.h"
#include "remembered.h"
#include "torch_api.h"

enum { MAX_LISTS = 3, MAX_GROUPS = 256 };

/* Parameters that are stepped alike: those from the end of the section before to `end`. If
 * `own_momentum_dtype`, momentum buffers have their parameter's dtype, whatever hyper says, as those of
 * float64 parameters always have. */
typedef struct param_section {
    Py_ssize_t end;
    lpsgd_hyper hyper;
    int own_momentum_dtype;
} param_section;

/* The hyper-parameters of a section's parameters of dtype. */
static inline lpsgd_hyper section_hyper(const param_section *section, lpsgd_dtype dtype)
{
    lpsgd_hyper hyper = section->hyper;
    if (section->own_momentum_dtype || dtype == LPSGD_FLOAT64)
        hyper.momentum_dtype = dtype;
    return hyper;
}

/* Parallel tuples of tensors, params first; `written` says which a step writes to. Owns
 * references, so that tensors outlive a step although other threads may change the lists. */
typedef struct tensor_lists {
    const char *function; /* for messages */
    int count;
    const char *name[MAX_LISTS];
    int written[MAX_LISTS];
    PyObject *tuple[MAX_LISTS];
    const uint64_t *streams, *indices; /* one per parameter; NULL: 0, 1, ... and all 0 */
    const param_section *sections; /* the last one's end is the tuples' length */
    int section_count;
} tensor_lists;

/* Releases the tuples, those that there are. */
void tensor_lists_release(tensor_lists *lists);

/* The non-empty tensors' memory, grouped by section, device and dtype. */
typedef struct buffer_group {
    int section;
    lpsgd_dl_device device;
    lpsgd_dtype dtype;
    lpsgd_buffer *list;
    int64_t count;
} buffer_group;

typedef struct buffer_groups {
    buffer_group group[MAX_GROUPS];
    int count;
    void *memory; /* to be given to PyMem_Free */
} buffer_groups;

/* Checks everything there is to check about the tensors and fills `groups`, with the help of what the
 * calls before found, if that is not NULL. Writes to no tensor. Returns 0, or -1 with an exception that names the argument
 * and the index; either way the caller frees groups->memory. */
int tensor_lists_read(const torch_api *torch, remembered *calls, const tensor_lists *lists,
                      buffer_groups *groups);

#endif
