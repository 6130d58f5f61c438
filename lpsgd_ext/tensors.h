/* SPDX-License-Identifier: MIT
 *
 * tensors.h: from lists of PyTorch tensors to checked raw buffers.
 */
#ifndef LPSGD_TENSORS_H
#define LPSGD_TENSORS_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "dlpack_abi.h"
#include "lpsgd.h"

enum { MAX_LISTS = 3, MAX_GROUPS = 256, RECENT_COUNT = 8 };

/* A method of torch.Tensor without arguments. */
typedef struct tensor_method {
    PyObject *object;
    PyCFunction direct; /* what a call of `object` comes to; NULL if that cannot be told */
} tensor_method;

/* What the module keeps of PyTorch, and of the calls before; one per module object. */
typedef struct torch_api {
    PyObject *tensor_type, *parameter_type;
    tensor_method is_neg, is_inference, untyped_storage, storage_offset;
    PyObject *increment_version, *get_num_threads, *is_inference_mode_enabled;
    PyObject *cuda_error; /* the module's exception */
    const lpsgd_dl_api *dlpack;
    struct checked_lists *recent[RECENT_COUNT]; /* NULL where free */
} torch_api;

/* Parameters that are stepped alike: those from the end of the section before to `end`. */
typedef struct param_section {
    Py_ssize_t end;
    lpsgd_hyper hyper;
} param_section;

/* Parallel tuples of tensors, params first; `written` says which a step writes to. Owns
 * references, so that tensors outlive a step although other threads may change the lists. */
typedef struct tensor_lists {
    const char *function; /* for messages */
    int count;
    const char *name[MAX_LISTS];
    int written[MAX_LISTS];
    PyObject *tuple[MAX_LISTS];
    PyObject *streams, *indices; /* sequences of one int per parameter; NULL: 0, 1, ... and all 0 */
    const param_section *sections; /* the last one's end is the tuples' length */
    int section_count;
} tensor_lists;

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

/* Imports torch and fills `torch`. Returns 0, or -1 with an exception. */
int torch_api_load(torch_api *torch);

/* Forgets the calls before. */
void torch_api_forget(torch_api *torch);

/* Checks everything there is to check about the tensors and fills `groups`. Writes to no tensor.
 * Returns 0, or -1 with an exception that names the argument and the index. */
int tensor_lists_read(torch_api *torch, const tensor_lists *lists, buffer_groups *groups);

/* Reads a Tensor of one floating-point element on a CUDA device. Returns 1 and fills the number and
 * its device; 0 if `object` is anything else. Raises nothing. */
int cuda_number(const torch_api *torch, PyObject *object, lpsgd_device_number *number, int *device);

/* The memory of a dense uint8 Tensor of at least `bytes` elements on a CUDA device, which it fills
 * in; NULL with an exception for anything else. */
void *cuda_scratch(const torch_api *torch, const char *function, PyObject *object, int64_t bytes,
                   int *device);

#endif
