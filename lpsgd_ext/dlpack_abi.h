/* SPDX-License-Identifier: MIT
 *
 * dlpack_abi.h: the part of DLPack 1.x's C exchange table that lpsgd_ext reads, declared here so
 * that the build needs no PyTorch. tests/module/test_abi.py compares every size and offset with the
 * installed PyTorch's own ATen/dlpack.h.
 */
#ifndef LPSGD_DLPACK_ABI_H
#define LPSGD_DLPACK_ABI_H

#include <stdint.h>

#define LPSGD_DL_CAPSULE "dlpack_exchange_api"

enum { LPSGD_DL_MAJOR = 1 };
enum { LPSGD_DL_CPU = 1, LPSGD_DL_CUDA = 2 };
enum { LPSGD_DL_UINT = 1, LPSGD_DL_FLOAT = 2, LPSGD_DL_BFLOAT = 4, LPSGD_DL_FLOAT8_E5M2 = 12 };

typedef struct lpsgd_dl_device {
    int32_t device_type;
    int32_t device_id;
} lpsgd_dl_device;

typedef struct lpsgd_dl_dtype {
    uint8_t code;
    uint8_t bits;
    uint16_t lanes;
} lpsgd_dl_dtype;

/* A view that owns nothing: shape and strides are the tensor's own, valid while it is unchanged. */
typedef struct lpsgd_dl_tensor {
    void *data;
    lpsgd_dl_device device;
    int32_t ndim;
    lpsgd_dl_dtype dtype;
    int64_t *shape;
    int64_t *strides; /* in elements */
    uint64_t byte_offset;
} lpsgd_dl_tensor;

typedef struct lpsgd_dl_header {
    uint32_t major, minor;
    const struct lpsgd_dl_header *prev_api;
} lpsgd_dl_header;

typedef struct lpsgd_dl_api {
    lpsgd_dl_header header;
    void (*managed_tensor_allocator)(void);
    void (*managed_tensor_from_py_object_no_sync)(void);
    void (*managed_tensor_to_py_object_no_sync)(void);
    int (*dltensor_from_py_object_no_sync)(void *py_object, lpsgd_dl_tensor *out);
    int (*current_work_stream)(int32_t device_type, int32_t device_id, void **out);
} lpsgd_dl_api;

#endif
