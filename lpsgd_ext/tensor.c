/* SPDX-License-Identifier: MIT
 *
 * tensor.c: reads one tensor through PyTorch's C exchange table and checks what the table does not:
 * exact types (a subclass may keep its values elsewhere), the negative bit (which the table drops)
 * and the storage's size (which may have shrunk since the tensor was made).
 */
#include "tensor.h"

#include <string.h>

/* The tensor's type has been checked. */
static PyObject *call(const tensor_method *method, PyObject *tensor)
{
    return method->direct ? method->direct(tensor, NULL)
                          : PyObject_CallFunctionObjArgs(method->object, tensor, NULL);
}

static int refuse(const tensor_place *at, PyObject *exception, const char *what)
{
    PyErr_Format(exception, "%s(): %s[%zd] %s", at->function, at->name, at->index, what);
    return -1;
}

/* Puts the place in front of the message of the exception that is set. */
static int refuse_because(const tensor_place *at)
{
    PyObject *type, *value, *traceback;
    PyErr_Fetch(&type, &value, &traceback);
    if (type && PyErr_GivenExceptionMatches(type, PyExc_Exception) &&
        !PyErr_GivenExceptionMatches(type, PyExc_MemoryError))
        PyErr_Format(type, "%s(): %s[%zd]: %S", at->function, at->name, at->index,
                     value ? value : Py_None);
    else {
        PyErr_Restore(type, value, traceback);
        return -1;
    }
    Py_XDECREF(type);
    Py_XDECREF(value);
    Py_XDECREF(traceback);
    return -1;
}

static int check_type(const torch_api *torch, const tensor_place *at, PyObject *tensor)
{
    if (torch_api_is_tensor(torch, tensor))
        return 0;
    PyErr_Format(PyExc_TypeError,
                 "%s(): expected torch.Tensor or torch.nn.Parameter as %s[%zd], but got %R",
                 at->function, at->name, at->index, (PyObject *)Py_TYPE(tensor));
    return -1;
}

enum { DTYPES = LPSGD_FLOAT8_E5M2 + 1 };
static const lpsgd_dl_dtype dl_dtypes[DTYPES] = {
    [LPSGD_FLOAT32] = {LPSGD_DL_FLOAT, 32, 1},
    [LPSGD_FLOAT64] = {LPSGD_DL_FLOAT, 64, 1},
    [LPSGD_BFLOAT16] = {LPSGD_DL_BFLOAT, 16, 1},
    [LPSGD_FLOAT16] = {LPSGD_DL_FLOAT, 16, 1},
    [LPSGD_FLOAT8_E5M2] = {LPSGD_DL_FLOAT8_E5M2, 8, 1},
};

static int same_dtypes(const lpsgd_dl_dtype *a, const lpsgd_dl_dtype *b)
{
    return memcmp(a, b, sizeof *a) == 0;
}

/* The dtype of a parameter, a number, or, if that is what is expected, a momentum buffer. */
static int dtype_of(const lpsgd_dl_dtype *type, lpsgd_dtype expected, lpsgd_dtype *dtype)
{
    for (int i = 0; i < DTYPES; i++)
        if (same_dtypes(type, &dl_dtypes[i]) && (i != LPSGD_FLOAT8_E5M2 || i == (int)expected)) {
            *dtype = (lpsgd_dtype)i;
            return 0;
        }
    return -1;
}

/* The number of elements, if they fill one stretch of memory with no gap or overlap, in whatever
 * order of dimensions (channels_last, transposed); -1 if they don't or the product overflows. */
static int64_t dense_numel(const lpsgd_dl_tensor *t)
{
    int64_t numel = 1, extent = 1;
    if (t->ndim > 0 && (!t->shape || !t->strides))
        return -1;
    for (int d = 0; d < t->ndim; d++) {
        if (t->shape[d] == 0)
            return 0;
        if (t->shape[d] < 0 || __builtin_mul_overflow(numel, t->shape[d], &numel))
            return -1;
    }
    if (numel > INT64_MAX / 8) /* bytes of whatever dtype */
        return -1;
    /* Each round finds the dimension whose stride is the product of the sizes found before. */
    while (extent < numel) {
        int d = t->ndim - 1;
        while (d >= 0 && (t->shape[d] == 1 || t->strides[d] != extent))
            d--;
        if (d < 0)
            return -1;
        extent *= t->shape[d];
    }
    return numel;
}

int tensor_read(const torch_api *torch, const tensor_place *at, PyObject *tensor,
                lpsgd_dl_tensor *out)
{
    if (check_type(torch, at, tensor))
        return -1;
    if (torch->dlpack->dltensor_from_py_object_no_sync(tensor, out)) {
        if (!PyErr_Occurred())
            PyErr_SetString(PyExc_RuntimeError, "PyTorch gives no access to its memory");
        return refuse_because(at);
    }
    out->data = out->data ? (char *)out->data + out->byte_offset : NULL;
    return 0;
}

static int check_kind(const tensor_place *at, PyObject *tensor, const lpsgd_dl_tensor *read,
                      lpsgd_dtype expected, lpsgd_dtype *dtype, int64_t *numel)
{
    const int device_type = read->device.device_type;
    if (device_type != LPSGD_DL_CPU && !(device_type == LPSGD_DL_CUDA && lpsgd_cuda_version())) {
        PyObject *device = PyObject_GetAttrString(tensor, "device");
        if (!device)
            return -1;
        PyErr_Format(PyExc_ValueError, "%s(): %s[%zd] is on %S, but only %s tensors are supported",
                     at->function, at->name, at->index, device,
                     lpsgd_cuda_version() ? "CPU and CUDA" : "CPU");
        Py_DECREF(device);
        return -1;
    }
    if (dtype_of(&read->dtype, expected, dtype)) {
        PyObject *name = PyObject_GetAttrString(tensor, "dtype");
        if (!name)
            return -1;
        PyErr_Format(PyExc_TypeError,
                     "%s(): %s[%zd] has dtype %S, but float32, float64, bfloat16 or float16 is "
                     "expected",
                     at->function, at->name, at->index, name);
        Py_DECREF(name);
        return -1;
    }
    *numel = dense_numel(read);
    if (*numel < 0)
        return refuse(at, PyExc_ValueError,
                      "is not dense: its elements overlap or leave gaps in memory");
    return 0;
}

int tensor_check_kind(const tensor_place *at, PyObject *tensor, const lpsgd_dl_tensor *read,
                      lpsgd_dtype *dtype, int64_t *numel)
{
    return check_kind(at, tensor, read, LPSGD_FLOAT32, dtype, numel);
}

static int same_sizes(const lpsgd_dl_tensor *a, const lpsgd_dl_tensor *b)
{
    for (int d = 0; d < a->ndim; d++)
        if (a->shape[d] != b->shape[d])
            return 0;
    return 1;
}

/* Whether the elements lie in memory in the same order. The shapes are equal. */
static int same_order(const lpsgd_dl_tensor *a, const lpsgd_dl_tensor *b)
{
    for (int d = 0; d < a->ndim; d++)
        if (a->strides[d] != b->strides[d] && a->shape[d] > 1)
            return 0;
    return 1;
}

int tensor_check_match(const tensor_place *at, PyObject *tensor, const lpsgd_dl_tensor *param,
                       const lpsgd_dl_tensor *other, lpsgd_dtype expected, int64_t numel)
{
    static const char *const is_not[DTYPES] = {
        [LPSGD_FLOAT32] = "is not float32",
        [LPSGD_BFLOAT16] = "is not bfloat16",
        [LPSGD_FLOAT8_E5M2] = "is not float8_e5m2",
    };
    const int same_dtype = same_dtypes(&dl_dtypes[expected], &other->dtype);
    const int same_device = memcmp(&param->device, &other->device, sizeof param->device) == 0;
    const int same_shape = param->ndim == other->ndim && same_sizes(param, other);
    if (same_dtype && same_device && same_shape && (!numel || same_order(param, other)))
        return 0;
    lpsgd_dtype dtype;
    if (check_kind(at, tensor, other, expected, &dtype, &numel))
        return -1;
    if (!same_dtype)
        return refuse(at, PyExc_TypeError,
                      same_dtypes(&dl_dtypes[expected], &param->dtype)
                          ? "differs from the parameter in dtype"
                          : is_not[expected]);
    return refuse(at, PyExc_ValueError,
                  !same_device  ? "differs from the parameter in device"
                  : !same_shape ? "differs from the parameter in shape"
                                : "differs from the parameter in strides");
}

/* Whether the answer, which is given away, is true; -1: exception. */
static int truth_of(PyObject *answer)
{
    const int truth = answer ? PyObject_IsTrue(answer) : -1;
    Py_XDECREF(answer);
    return truth;
}

static int check_not_negated(const torch_api *torch, const tensor_place *at, PyObject *tensor)
{
    const int negated = truth_of(call(&torch->is_neg, tensor));
    if (negated < 0)
        return refuse_because(at);
    if (negated)
        return refuse(at, PyExc_RuntimeError,
                      "has its negative bit set: pass tensor.resolve_neg()");
    return 0;
}

/* Sets *inference if it is an inference tensor, which may be written to in inference mode alone. */
static int check_inference(const torch_api *torch, const tensor_place *at, PyObject *tensor,
                           int *inference)
{
    *inference = truth_of(call(&torch->is_inference, tensor));
    int enabled = 0;
    if (*inference > 0)
        enabled = truth_of(PyObject_CallObject(torch->is_inference_mode_enabled, NULL));
    if (*inference < 0 || enabled < 0)
        return refuse_because(at);
    if (*inference && !enabled)
        return refuse(at, PyExc_RuntimeError,
                      "is an inference tensor: Inplace update to inference tensor outside "
                      "InferenceMode is not allowed");
    return 0;
}

/* Does the tensor's memory lie within its storage? */
static int check_storage(const torch_api *torch, const tensor_place *at, PyObject *tensor,
                         int64_t numel, int64_t itemsize)
{
    PyObject *storage = call(&torch->untyped_storage, tensor);
    const Py_ssize_t nbytes = storage ? PyObject_Size(storage) : -1;
    Py_XDECREF(storage);
    if (nbytes < 0)
        return refuse_because(at);
    PyObject *offset_object = call(&torch->storage_offset, tensor);
    const int64_t offset = offset_object ? PyLong_AsLongLong(offset_object) : -1;
    Py_XDECREF(offset_object);
    if (offset < 0 && PyErr_Occurred())
        return refuse_because(at);
    if (offset < 0 || offset > nbytes / itemsize || numel > nbytes / itemsize - offset)
        return refuse(at, PyExc_RuntimeError,
                      "reaches beyond its storage, which has been resized since");
    return 0;
}

/* Is there memory, in the address space, at a place for elements of this size? */
static int check_address(const tensor_place *at, const void *address, int64_t numel,
                         int64_t itemsize)
{
    const uintptr_t data = (uintptr_t)address;
    if (!data)
        return refuse(at, PyExc_RuntimeError, "has no memory: its storage has been freed");
    if (data > UINTPTR_MAX - (uintptr_t)(numel * itemsize))
        return refuse(at, PyExc_RuntimeError, "has memory that ends beyond the address space");
    if (data & (uintptr_t)(itemsize - 1))
        return refuse(at, PyExc_ValueError, "is not aligned to its element size");
    return 0;
}

int tensor_check_memory(const torch_api *torch, const tensor_place *at, PyObject *tensor,
                        const lpsgd_dl_tensor *read, int64_t numel, int *inference)
{
    const int64_t itemsize = read->dtype.bits / 8;
    if (check_not_negated(torch, at, tensor))
        return -1;
    if (inference && check_inference(torch, at, tensor, inference))
        return -1;
    if (check_storage(torch, at, tensor, numel, itemsize))
        return -1;
    return check_address(at, read->data, numel, itemsize);
}

int cuda_number(const torch_api *torch, PyObject *object, lpsgd_device_number *number, int *device)
{
    lpsgd_dl_tensor tensor;
    if (!torch_api_is_tensor(torch, object))
        return 0;
    if (torch->dlpack->dltensor_from_py_object_no_sync(object, &tensor)) {
        PyErr_Clear();
        return 0;
    }
    if (tensor.device.device_type != LPSGD_DL_CUDA || !tensor.data ||
        dtype_of(&tensor.dtype, LPSGD_FLOAT32, &number->dtype) || dense_numel(&tensor) != 1)
        return 0;
    if (truth_of(call(&torch->is_neg, object))) { /* its memory holds another number, or -1 */
        PyErr_Clear();
        return 0;
    }
    number->pointer = (const char *)tensor.data + tensor.byte_offset;
    *device = tensor.device.device_id;
    return 1;
}

void *cuda_scratch(const torch_api *torch, const char *function, PyObject *object, int64_t bytes,
                   int *device)
{
    lpsgd_dl_tensor tensor;
    const tensor_place at = {function, "scratch", 0};
    if (tensor_read(torch, &at, object, &tensor))
        return NULL;
    if (tensor.device.device_type != LPSGD_DL_CUDA || tensor.dtype.code != LPSGD_DL_UINT ||
        tensor.dtype.bits != 8 || tensor.dtype.lanes != 1 || !tensor.data ||
        (uintptr_t)tensor.data % 8 || dense_numel(&tensor) < bytes ||
        check_storage(torch, &at, object, bytes, 1)) {
        if (!PyErr_Occurred())
            PyErr_Format(PyExc_ValueError,
                         "%s(): argument 'scratch' must be a dense uint8 CUDA tensor of at least "
                         "%lld elements",
                         function, (long long)bytes);
        return NULL;
    }
    *device = tensor.device.device_id;
    return tensor.data;
}
