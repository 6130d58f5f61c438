/* SPDX-License-Identifier: MIT
 *
 * torch_api.h: what the module takes from PyTorch when it is imported.
 */
#ifndef LPSGD_TORCH_API_H
#define LPSGD_TORCH_API_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "dlpack_abi.h"

/* A method of torch.Tensor without arguments. */
typedef struct tensor_method {
    PyObject *object;
    PyCFunction direct; /* what a call of `object` comes to; NULL if that cannot be told */
} tensor_method;

/* One per module object, which owns every reference. Changed by nothing after the import. */
typedef struct torch_api {
    PyObject *tensor_type, *parameter_type;
    tensor_method is_neg, is_inference, untyped_storage, storage_offset;
    PyObject *increment_version, *get_num_threads, *is_inference_mode_enabled;
    PyObject *float32, *bfloat16, *float8_e5m2; /* of torch.dtype, what momentum_dtype may be */
    const lpsgd_dl_api *dlpack; /* static memory of PyTorch's */
} torch_api;

/* Imports torch and fills `torch`, in part where it fails. Returns 0, or -1 with an exception. */
int torch_api_load(torch_api *torch);

/* Whether the object is of type Tensor or Parameter exactly. */
static inline int torch_api_is_tensor(const torch_api *torch, PyObject *object)
{
    const PyTypeObject *type = Py_TYPE(object);
    return type == (PyTypeObject *)torch->tensor_type ||
           type == (PyTypeObject *)torch->parameter_type;
}

#endif
