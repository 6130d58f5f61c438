/* SPDX-License-Identifier: MIT
 *
 * tensors.c: reads tensors through PyTorch's C exchange table and checks what the table does not:
 * exact types (a subclass may keep its values elsewhere), the negative bit (which the table drops),
 * the storage's size (which may have shrunk since the tensor was made) and overlaps.
 */
#include "tensors.h"

#include <stdlib.h>
#include <string.h>

static PyObject *get_path(const char *module_name, const char *attribute, const char *attribute2)
{
    PyObject *object = PyImport_ImportModule(module_name);
    for (int i = 0; i < 2 && object; i++) {
        const char *name = i ? attribute2 : attribute;
        if (!name)
            break;
        PyObject *next = PyObject_GetAttrString(object, name);
        Py_DECREF(object);
        object = next;
    }
    return object;
}

/* The newest table of a major version that this file was written for. */
static const lpsgd_dl_api *find_table(PyObject *tensor_type)
{
    PyObject *capsule = PyObject_GetAttrString(tensor_type, "__dlpack_c_exchange_api__");
    if (!capsule) {
        PyErr_SetString(PyExc_ImportError,
                        "lpsgd_ext needs PyTorch 2.10 or newer: torch.Tensor has no "
                        "__dlpack_c_exchange_api__");
        return NULL;
    }
    const lpsgd_dl_header *header = PyCapsule_GetPointer(capsule, LPSGD_DL_CAPSULE);
    Py_DECREF(capsule); /* the table is static memory of PyTorch's */
    if (!header)
        return NULL;
    while (header && header->major != LPSGD_DL_MAJOR)
        header = header->prev_api;
    const lpsgd_dl_api *table = (const lpsgd_dl_api *)header;
    if (!table || !table->dltensor_from_py_object_no_sync) {
        PyErr_SetString(PyExc_ImportError,
                        "lpsgd_ext needs version 1 of PyTorch's DLPack exchange table");
        return NULL;
    }
    return table;
}

int torch_api_load(torch_api *torch)
{
    struct {
        PyObject **to;
        const char *module_name, *attribute, *attribute2;
    } const wanted[] = {
        {&torch->tensor_type, "torch", "Tensor", NULL},
        {&torch->parameter_type, "torch.nn", "Parameter", NULL},
        {&torch->is_neg, "torch", "Tensor", "is_neg"},
        {&torch->untyped_storage, "torch", "Tensor", "untyped_storage"},
        {&torch->storage_offset, "torch", "Tensor", "storage_offset"},
        {&torch->increment_version, "torch.autograd.graph", "increment_version", NULL},
        {&torch->get_num_threads, "torch", "get_num_threads", NULL},
    };
    for (size_t i = 0; i < sizeof wanted / sizeof *wanted; i++) {
        *wanted[i].to =
            get_path(wanted[i].module_name, wanted[i].attribute, wanted[i].attribute2);
        if (!*wanted[i].to)
            return -1;
    }
    torch->dlpack = find_table(torch->tensor_type);
    return torch->dlpack ? 0 : -1;
}

/* One element of one list, as messages name it. */
typedef struct place {
    const char *function, *name;
    Py_ssize_t index;
} place;

static int refuse(const place *at, PyObject *exception, const char *what)
{
    PyErr_Format(exception, "%s(): %s[%zd] %s", at->function, at->name, at->index, what);
    return -1;
}

/* Puts the place in front of the message of the exception that is set. */
static int refuse_because(const place *at)
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

static int check_type(const torch_api *torch, const place *at, PyObject *tensor)
{
    PyTypeObject *type = Py_TYPE(tensor);
    if (type == (PyTypeObject *)torch->tensor_type || type == (PyTypeObject *)torch->parameter_type)
        return 0;
    PyErr_Format(PyExc_TypeError,
                 "%s(): expected torch.Tensor or torch.nn.Parameter as %s[%zd], but got %R",
                 at->function, at->name, at->index, (PyObject *)type);
    return -1;
}

static int dtype_of(const lpsgd_dl_dtype *type, lpsgd_dtype *dtype, int64_t *itemsize)
{
    if (type->lanes != 1)
        return -1;
    *itemsize = type->bits / 8;
    if (type->code == LPSGD_DL_FLOAT && type->bits == 32)
        *dtype = LPSGD_FLOAT32;
    else if (type->code == LPSGD_DL_FLOAT && type->bits == 64)
        *dtype = LPSGD_FLOAT64;
    else if (type->code == LPSGD_DL_FLOAT && type->bits == 16)
        *dtype = LPSGD_FLOAT16;
    else if (type->code == LPSGD_DL_BFLOAT && type->bits == 16)
        *dtype = LPSGD_BFLOAT16;
    else
        return -1;
    return 0;
}

/* The number of elements, if they fill one stretch of memory with no gap or overlap, in whatever
 * order of dimensions (channels_last, transposed); -1 if they don't or the product overflows. */
static int64_t dense_numel(const lpsgd_dl_tensor *t, int64_t itemsize)
{
    int64_t numel = 1, extent = 1;
    if (t->ndim > 0 && (!t->shape || !t->strides))
        return -1;
    for (int d = 0; d < t->ndim; d++) {
        if (t->shape[d] == 0)
            return 0;
        if (t->shape[d] < 0 || numel > INT64_MAX / itemsize / t->shape[d])
            return -1;
        numel *= t->shape[d];
    }
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

/* Does the tensor's memory lie within its storage? */
static int check_storage(const torch_api *torch, const place *at, PyObject *tensor, int64_t numel,
                         int64_t itemsize)
{
    PyObject *storage = PyObject_CallFunctionObjArgs(torch->untyped_storage, tensor, NULL);
    const Py_ssize_t nbytes = storage ? PyObject_Size(storage) : -1;
    Py_XDECREF(storage);
    if (nbytes < 0)
        return refuse_because(at);
    PyObject *offset_object = PyObject_CallFunctionObjArgs(torch->storage_offset, tensor, NULL);
    const int64_t offset = offset_object ? PyLong_AsLongLong(offset_object) : -1;
    Py_XDECREF(offset_object);
    if (offset < 0 && PyErr_Occurred())
        return refuse_because(at);
    if (offset < 0 || offset > nbytes / itemsize || numel > nbytes / itemsize - offset)
        return refuse(at, PyExc_RuntimeError,
                      "reaches beyond its storage, which has been resized since");
    return 0;
}

static int check_not_negated(const torch_api *torch, const place *at, PyObject *tensor)
{
    PyObject *answer = PyObject_CallFunctionObjArgs(torch->is_neg, tensor, NULL);
    const int negated = answer ? PyObject_IsTrue(answer) : -1;
    Py_XDECREF(answer);
    if (negated < 0)
        return refuse_because(at);
    if (negated)
        return refuse(at, PyExc_RuntimeError,
                      "has its negative bit set: pass tensor.resolve_neg()");
    return 0;
}

static int read_tensor(const torch_api *torch, const place *at, PyObject *tensor,
                       lpsgd_dl_tensor *out, lpsgd_dtype *dtype, int64_t *numel)
{
    int64_t itemsize;
    if (check_type(torch, at, tensor))
        return -1;
    if (torch->dlpack->dltensor_from_py_object_no_sync(tensor, out)) {
        if (!PyErr_Occurred())
            PyErr_SetString(PyExc_RuntimeError, "PyTorch gives no access to its memory");
        return refuse_because(at);
    }
    if (out->device.device_type != LPSGD_DL_CPU) {
        PyObject *device = PyObject_GetAttrString(tensor, "device");
        if (!device)
            return -1;
        PyErr_Format(PyExc_ValueError, "%s(): %s[%zd] is on %S, but only CPU tensors are supported",
                     at->function, at->name, at->index, device);
        Py_DECREF(device);
        return -1;
    }
    if (dtype_of(&out->dtype, dtype, &itemsize)) {
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
    *numel = dense_numel(out, itemsize);
    if (*numel < 0)
        return refuse(at, PyExc_ValueError,
                      "is not dense: its elements overlap or leave gaps in memory");
    if (*numel == 0)
        return 0;
    if (check_not_negated(torch, at, tensor) ||
        check_storage(torch, at, tensor, *numel, itemsize))
        return -1;
    out->data = (char *)out->data + out->byte_offset;
    if (!out->data)
        return refuse(at, PyExc_RuntimeError, "has no memory: its storage has been freed");
    if ((uintptr_t)out->data % (uintptr_t)itemsize)
        return refuse(at, PyExc_ValueError, "is not aligned to its element size");
    if ((uintptr_t)out->data > UINTPTR_MAX - (uintptr_t)(*numel * itemsize))
        return refuse(at, PyExc_RuntimeError, "has memory that ends beyond the address space");
    return 0;
}

/* `other` must match the parameter of the same index element for element. */
static int check_match(const place *at, const lpsgd_dl_tensor *param, const lpsgd_dl_tensor *other)
{
    if (memcmp(&param->dtype, &other->dtype, sizeof param->dtype) != 0)
        return refuse(at, PyExc_TypeError, "differs from the parameter in dtype");
    if (param->ndim != other->ndim)
        return refuse(at, PyExc_ValueError, "differs from the parameter in shape");
    for (int d = 0; d < param->ndim; d++)
        if (param->shape[d] != other->shape[d])
            return refuse(at, PyExc_ValueError, "differs from the parameter in shape");
    for (int d = 0; d < param->ndim; d++)
        if (param->shape[d] > 1 && param->strides[d] != other->strides[d])
            return refuse(at, PyExc_ValueError, "differs from the parameter in strides");
    return 0;
}

/* The memory [low, high) of element `index` of list `list`. */
typedef struct span {
    uintptr_t low, high;
    int list;
    Py_ssize_t index;
} span;

static int compare_spans(const void *a, const void *b)
{
    const uintptr_t x = ((const span *)a)->low, y = ((const span *)b)->low;
    return (x > y) - (x < y);
}

/* Sorts the spans and refuses the first overlap that involves a written one: with the spans in
 * order, only the span seen so far that reaches furthest, of all and of the written, can reach into
 * the next. */
static int check_overlaps(const tensor_lists *lists, span *spans, size_t count)
{
    const span *furthest = NULL, *furthest_written = NULL;
    for (size_t i = 1; i < count; i++)
        if (spans[i].low < spans[i - 1].low) {
            qsort(spans, count, sizeof *spans, compare_spans);
            break;
        }
    for (const span *s = spans; s < spans + count; s++) {
        const int written = lists->written[s->list];
        const span *reaching = written ? furthest : furthest_written;
        if (reaching && reaching->high > s->low) {
            PyErr_Format(PyExc_ValueError,
                         "%s(): %s[%zd] and %s[%zd] share memory that the step writes to",
                         lists->function, lists->name[reaching->list], reaching->index,
                         lists->name[s->list], s->index);
            return -1;
        }
        if (!furthest || s->high > furthest->high)
            furthest = s;
        if (written && (!furthest_written || s->high > furthest_written->high))
            furthest_written = s;
    }
    return 0;
}

int tensor_lists_read(const torch_api *torch, const tensor_lists *lists, buffer_lists *buffers)
{
    const Py_ssize_t n = PyTuple_Size(lists->tuple[0]);
    memset(buffers, 0, sizeof *buffers);
    for (int j = 1; j < lists->count; j++)
        if (PyTuple_Size(lists->tuple[j]) != n) {
            PyErr_Format(PyExc_ValueError,
                         "%s(): Tensor lists must have the same number of tensors, got %zd params "
                         "and %zd %s",
                         lists->function, n, PyTuple_Size(lists->tuple[j]), lists->name[j]);
            return -1;
        }
    if (n == 0)
        return 0;
    size_t span_count = 0;
    int result = -1;
    span *spans = PyMem_Calloc((size_t)n, MAX_LISTS * sizeof *spans);
    lpsgd_buffer *memory = PyMem_Calloc((size_t)n, DTYPE_COUNT * sizeof *memory);
    buffers->memory = memory;
    if (!spans || !memory) {
        PyErr_NoMemory();
        goto done;
    }
    for (int d = 0; d < DTYPE_COUNT; d++)
        buffers->of_dtype[d] = memory + d * n;

    for (Py_ssize_t i = 0; i < n; i++) {
        lpsgd_dl_tensor tensor[MAX_LISTS];
        lpsgd_dtype dtype = LPSGD_FLOAT32;
        int64_t numel = 0;
        for (int j = 0; j < lists->count; j++) {
            const place at = {lists->function, lists->name[j], i};
            PyObject *object = PyTuple_GetItem(lists->tuple[j], i);
            if (!object || read_tensor(torch, &at, object, &tensor[j], &dtype, &numel) ||
                (j > 0 && check_match(&at, &tensor[0], &tensor[j])))
                goto done;
        }
        if (numel == 0)
            continue;
        const uintptr_t bytes = (uintptr_t)numel * (tensor[0].dtype.bits / 8);
        for (int j = 0; j < lists->count; j++) {
            const uintptr_t low = (uintptr_t)tensor[j].data;
            spans[span_count++] = (span){low, low + bytes, j, i};
        }
        buffers->of_dtype[dtype][buffers->count[dtype]++] = (lpsgd_buffer){
            .param = tensor[0].data,
            .grad = tensor[1].data,
            .momentum_buffer = lists->count > 2 ? tensor[2].data : NULL,
            .numel = numel,
        };
    }
    result = check_overlaps(lists, spans, span_count);
done:
    PyMem_Free(spans);
    return result;
}
