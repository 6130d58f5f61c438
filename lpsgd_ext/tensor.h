/* SPDX-License-Identifier: MIT
 *
 * tensor.h: one PyTorch tensor, read and checked.
 *
 * Nothing here takes or gives references, or writes to a tensor. Unless said otherwise, a function
 * returns 0, or -1 with an exception that names the place.
 */
#ifndef LPSGD_TENSOR_H
#define LPSGD_TENSOR_H

#include "lpsgd.h"
#include "torch_api.h"

/* One element of one list, as messages name it. */
typedef struct tensor_place {
    const char *function, *name;
    Py_ssize_t index;
} tensor_place;

/* Refuses whatever is not a Tensor or Parameter, and reads it through PyTorch's table, which gives no
 * place in memory to an empty one. Shape and strides stay the tensor's own. */
int tensor_read(const torch_api *torch, const tensor_place *at, PyObject *tensor,
                lpsgd_dl_tensor *out);

/* Refuses what kernels cannot step at all: its device, its dtype, or gaps between its elements.
 * *dtype and *numel are the tensor's. */
int tensor_check_kind(const tensor_place *at, PyObject *tensor, const lpsgd_dl_tensor *read,
                      lpsgd_dtype *dtype, int64_t *numel);

/* Refuses what does not match the parameter of the same index, which has `numel` elements, element for
 * element. `expected`: its dtype; unless that is the parameter's, one that a momentum buffer may have
 * beside it. */
int tensor_check_match(const tensor_place *at, PyObject *tensor, const lpsgd_dl_tensor *param,
                       const lpsgd_dl_tensor *other, lpsgd_dtype expected, int64_t numel);

/* Refuses memory that is not what it seems; numel > 0. Calls PyTorch, where other threads may run.
 * *inference says whether it is an inference tensor, which may be written to in inference mode
 * alone; NULL: does not ask. */
int tensor_check_memory(const torch_api *torch, const tensor_place *at, PyObject *tensor,
                        const lpsgd_dl_tensor *read, int64_t numel, int *inference);

/* Reads a Tensor of one floating-point element on a CUDA device. Returns 1 and fills the number and
 * its device; 0 if `object` is anything else. Raises nothing. */
int cuda_number(const torch_api *torch, PyObject *object, lpsgd_device_number *number, int *device);

/* The memory of a dense uint8 Tensor of at least `bytes` elements on a CUDA device, which it fills
 * in; NULL with an exception for anything else. */
void *cuda_scratch(const torch_api *torch, const char *function, PyObject *object, int64_t bytes,
                   int *device);

#endif
