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

/* Finds the C function behind a method: a call of it takes half as long as one of the object. */
static int find_direct(PyObject *tensor, const char *name, tensor_method *method)
{
    PyObject *bound = PyObject_GetAttrString(tensor, name);
    if (!bound)
        return -1;
    if (PyCFunction_CheckExact(bound) && PyCFunction_GetFlags(bound) == METH_NOARGS)
        method->direct = PyCFunction_GetFunction(bound);
    Py_DECREF(bound);
    return 0;
}

static int find_directs(torch_api *torch)
{
    PyObject *tensor = PyObject_CallObject(torch->tensor_type, NULL);
    const int failed = !tensor || find_direct(tensor, "is_neg", &torch->is_neg) ||
                       find_direct(tensor, "is_inference", &torch->is_inference) ||
                       find_direct(tensor, "untyped_storage", &torch->untyped_storage) ||
                       find_direct(tensor, "storage_offset", &torch->storage_offset);
    Py_XDECREF(tensor);
    return failed ? -1 : 0;
}

/* The tensor's type has been checked. */
static PyObject *call(const tensor_method *method, PyObject *tensor)
{
    return method->direct ? method->direct(tensor, NULL)
                          : PyObject_CallFunctionObjArgs(method->object, tensor, NULL);
}

int torch_api_load(torch_api *torch)
{
    struct {
        PyObject **to;
        const char *module_name, *attribute, *attribute2;
    } const wanted[] = {
        {&torch->tensor_type, "torch", "Tensor", NULL},
        {&torch->parameter_type, "torch.nn", "Parameter", NULL},
        {&torch->is_neg.object, "torch", "Tensor", "is_neg"},
        {&torch->is_inference.object, "torch", "Tensor", "is_inference"},
        {&torch->untyped_storage.object, "torch", "Tensor", "untyped_storage"},
        {&torch->storage_offset.object, "torch", "Tensor", "storage_offset"},
        {&torch->increment_version, "torch.autograd.graph", "increment_version", NULL},
        {&torch->get_num_threads, "torch", "get_num_threads", NULL},
        {&torch->is_inference_mode_enabled, "torch", "is_inference_mode_enabled", NULL},
    };
    for (size_t i = 0; i < sizeof wanted / sizeof *wanted; i++) {
        *wanted[i].to =
            get_path(wanted[i].module_name, wanted[i].attribute, wanted[i].attribute2);
        if (!*wanted[i].to)
            return -1;
    }
    torch->dlpack = find_table(torch->tensor_type);
    return torch->dlpack ? find_directs(torch) : -1;
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

static int dtype_of(const lpsgd_dl_dtype *type, lpsgd_dtype *dtype)
{
    if (type->lanes != 1)
        return -1;
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

/* Does the tensor's memory lie within its storage? */
static int check_storage(const torch_api *torch, const place *at, PyObject *tensor, int64_t numel,
                         int64_t itemsize)
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

/* Whether the answer, which is given away, is true; -1: exception. */
static int truth_of(PyObject *answer)
{
    const int truth = answer ? PyObject_IsTrue(answer) : -1;
    Py_XDECREF(answer);
    return truth;
}

/* Sets *inference if it is an inference tensor, which may be written to in inference mode alone. */
static int check_inference(const torch_api *torch, const place *at, PyObject *tensor, int *inference)
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

static int check_not_negated(const torch_api *torch, const place *at, PyObject *tensor)
{
    const int negated = truth_of(call(&torch->is_neg, tensor));
    if (negated < 0)
        return refuse_because(at);
    if (negated)
        return refuse(at, PyExc_RuntimeError,
                      "has its negative bit set: pass tensor.resolve_neg()");
    return 0;
}

/* Reads a tensor through PyTorch's table, which gives no place in memory to an empty one. */
static int read_tensor(const torch_api *torch, const place *at, PyObject *tensor,
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

/* What kernels can step at all; *dtype and *numel are the tensor's. */
static int check_kind(const place *at, PyObject *tensor, const lpsgd_dl_tensor *read,
                      lpsgd_dtype *dtype, int64_t *numel)
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
    if (dtype_of(&read->dtype, dtype)) {
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

/* `other` must match the parameter of the same index element for element. `expected`: its dtype. */
static int check_match(const place *at, PyObject *tensor, const lpsgd_dl_tensor *param,
                       const lpsgd_dl_tensor *other, lpsgd_dl_dtype expected, int64_t numel)
{
    const int same_dtype = memcmp(&expected, &other->dtype, sizeof expected) == 0;
    const int same_device = memcmp(&param->device, &other->device, sizeof param->device) == 0;
    const int same_shape = param->ndim == other->ndim && same_sizes(param, other);
    if (same_dtype && same_device && same_shape && (!numel || same_order(param, other)))
        return 0;
    lpsgd_dtype dtype;
    if (check_kind(at, tensor, other, &dtype, &numel))
        return -1;
    if (!same_dtype)
        return refuse(at, PyExc_TypeError,
                      expected.bits != param->dtype.bits ? "is not float32"
                                                         : "differs from the parameter in dtype");
    return refuse(at, PyExc_ValueError,
                  !same_device  ? "differs from the parameter in device"
                  : !same_shape ? "differs from the parameter in shape"
                                : "differs from the parameter in strides");
}

/* What was found of a tensor when it was checked. The object is compared, never looked into. */
typedef struct known_tensor {
    const PyObject *tensor;
    const void *data;
    uintptr_t bytes;
} known_tensor;

/* Is there memory, in the address space, at a place for elements of this size? */
static int check_address(const place *at, const known_tensor *found, int64_t itemsize)
{
    const uintptr_t data = (uintptr_t)found->data;
    if (!data)
        return refuse(at, PyExc_RuntimeError, "has no memory: its storage has been freed");
    if (data > UINTPTR_MAX - found->bytes)
        return refuse(at, PyExc_RuntimeError, "has memory that ends beyond the address space");
    if (data & (uintptr_t)(itemsize - 1))
        return refuse(at, PyExc_ValueError, "is not aligned to its element size");
    return 0;
}

/* Whether it is an inference tensor is not asked of an object that passed in the call before, by its
 * address, and still has the same memory. The negative bit and the storage's size may change even
 * then: `.data = ` takes any view of the memory, and a storage that shrinks moves, but may move back
 * when it shrinks again. Sets *changed and *known if the tensor is another one. */
static int check_memory(const torch_api *torch, const place *at, PyObject *tensor, int written,
                        const lpsgd_dl_tensor *read, int64_t numel, known_tensor *known,
                        int *changed)
{
    const int64_t itemsize = read->dtype.bits / 8;
    const known_tensor found = {tensor, numel ? read->data : NULL, (uintptr_t)(numel * itemsize)};
    const int same = known->tensor == found.tensor && known->data == found.data &&
                     known->bytes == found.bytes;
    int inference = 0;
    if (numel) {
        if (check_not_negated(torch, at, tensor))
            return -1;
        if (!same && written && check_inference(torch, at, tensor, &inference))
            return -1;
        if (check_storage(torch, at, tensor, numel, itemsize) ||
            check_address(at, &found, itemsize))
            return -1;
    }
    if (!same) {
        *known = found;
        if (inference) /* asks again next time */
            known->tensor = NULL;
        *changed |= written;
    }
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

/* What the checks found of the lists that start with `first`, so that the next call need not find it
 * again: every tensor, and the written memory in order of address. */
typedef struct checked_lists {
    const PyObject *first; /* compared, never looked into */
    Py_ssize_t n;
    int count;
    int complete; /* `written` is that of `known`, and free of overlaps */
    known_tensor *known; /* n rows of `count` */
    span *written;
    size_t written_count;
} checked_lists;

static void forget(checked_lists *checked)
{
    if (checked) {
        PyMem_Free(checked->known);
        PyMem_Free(checked->written);
        PyMem_Free(checked);
    }
}

void torch_api_forget(torch_api *torch)
{
    for (int i = 0; i < RECENT_COUNT; i++) {
        forget(torch->recent[i]);
        torch->recent[i] = NULL;
    }
}

/* Takes what is known of these lists out of the module's state, so that no other thread, which may
 * run while a check calls Python, uses it meanwhile; or starts from nothing. NULL: no memory. */
static checked_lists *take(torch_api *torch, const tensor_lists *lists, Py_ssize_t n)
{
    const PyObject *first = PyTuple_GetItem(lists->tuple[0], 0);
    for (int i = 0; i < RECENT_COUNT; i++) {
        checked_lists *checked = torch->recent[i];
        if (checked && checked->first == first && checked->n == n &&
            checked->count == lists->count) {
            torch->recent[i] = NULL;
            return checked;
        }
    }
    checked_lists *checked = PyMem_Calloc(1, sizeof *checked);
    if (!checked)
        return NULL;
    checked->first = first;
    checked->n = n;
    checked->count = lists->count;
    checked->known = PyMem_Calloc((size_t)n, (size_t)lists->count * sizeof *checked->known);
    checked->written = PyMem_Calloc((size_t)n, (size_t)lists->count * sizeof *checked->written);
    if (!checked->known || !checked->written) {
        forget(checked);
        return NULL;
    }
    return checked;
}

/* Puts it in front; the one that has waited longest is forgotten if there is no room. */
static void put_back(torch_api *torch, checked_lists *checked)
{
    int i = 0;
    while (i < RECENT_COUNT - 1 && torch->recent[i])
        i++;
    forget(torch->recent[i]);
    for (; i > 0; i--)
        torch->recent[i] = torch->recent[i - 1];
    torch->recent[0] = checked;
}

static int refuse_overlap(const tensor_lists *lists, const span *a, const span *b)
{
    PyErr_Format(PyExc_ValueError, "%s(): %s[%zd] and %s[%zd] share memory that the step writes to",
                 lists->function, lists->name[a->list], a->index, lists->name[b->list], b->index);
    return -1;
}

/* Fills `written` from `known` and refuses overlaps within it. */
static int check_written(const tensor_lists *lists, checked_lists *checked)
{
    span *written = checked->written;
    size_t count = 0;
    for (Py_ssize_t i = 0; i < checked->n; i++)
        for (int j = 0; j < checked->count; j++) {
            const known_tensor *known = &checked->known[i * checked->count + j];
            const uintptr_t low = (uintptr_t)known->data;
            if (lists->written[j] && known->bytes)
                written[count++] = (span){low, low + known->bytes, j, i};
        }
    qsort(written, count, sizeof *written, compare_spans);
    for (size_t i = 1; i < count; i++)
        if (written[i - 1].high > written[i].low)
            return refuse_overlap(lists, &written[i - 1], &written[i]);
    checked->written_count = count;
    checked->complete = 1;
    return 0;
}

/* Refuses a tensor that is only read but overlaps with a written one. */
static int check_read(const tensor_lists *lists, const checked_lists *checked)
{
    for (Py_ssize_t i = 0; i < checked->n; i++)
        for (int j = 0; j < checked->count; j++) {
            const known_tensor *known = &checked->known[i * checked->count + j];
            if (lists->written[j] || !known->bytes)
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
            if (from < checked->written_count && checked->written[from].low < read.high)
                return refuse_overlap(lists, &checked->written[from], &read);
        }
    return 0;
}

/* The int of a parameter in `sequence`, modulo 2^64, or `otherwise` if there is no sequence. */
static int read_number(const tensor_lists *lists, const char *name, PyObject *sequence,
                       Py_ssize_t i, uint64_t otherwise, uint64_t *number)
{
    *number = otherwise;
    if (!sequence)
        return 0;
    PyObject *object = PySequence_GetItem(sequence, i);
    if (object) {
        *number = PyLong_AsUnsignedLongLongMask(object);
        Py_DECREF(object);
    }
    if (!PyErr_Occurred())
        return 0;
    if (PyErr_ExceptionMatches(PyExc_TypeError))
        PyErr_Format(PyExc_TypeError, "%s(): argument '%s' must have an int for each parameter",
                     lists->function, name);
    return -1;
}

static int check_lengths(const tensor_lists *lists)
{
    const Py_ssize_t n = PyTuple_Size(lists->tuple[0]);
    for (int j = 1; j < lists->count; j++)
        if (PyTuple_Size(lists->tuple[j]) != n) {
            PyErr_Format(PyExc_ValueError,
                         "%s(): Tensor lists must have the same number of tensors, got %zd params "
                         "and %zd %s",
                         lists->function, n, PyTuple_Size(lists->tuple[j]), lists->name[j]);
            return -1;
        }
    return 0;
}

/* A buffer and the index of its group. */
typedef struct grouped_buffer {
    lpsgd_buffer buffer;
    int group;
} grouped_buffer;

/* The index of the group, made if there is none yet; -1: too many. */
static int find_group(buffer_groups *groups, int section, lpsgd_dl_device device, lpsgd_dtype dtype)
{
    for (int i = groups->count - 1; i >= 0; i--) {
        const buffer_group *g = &groups->group[i];
        if (g->section == section && g->dtype == dtype && memcmp(&g->device, &device, sizeof device) == 0)
            return i;
    }
    if (groups->count == MAX_GROUPS)
        return -1;
    groups->group[groups->count] =
        (buffer_group){.section = section, .device = device, .dtype = dtype};
    return groups->count++;
}

/* Lays the groups' buffers one behind the other into `list`. */
static void distribute(buffer_groups *groups, const grouped_buffer *from, Py_ssize_t count,
                       lpsgd_buffer *list)
{
    for (Py_ssize_t i = 0; i < count; i++)
        groups->group[from[i].group].count++;
    for (int g = 0; g < groups->count; g++) {
        groups->group[g].list = list;
        list += groups->group[g].count;
        groups->group[g].count = 0;
    }
    for (Py_ssize_t i = 0; i < count; i++) {
        buffer_group *g = &groups->group[from[i].group];
        g->list[g->count++] = from[i].buffer;
    }
}

/* Reads the tensors of index i and checks them; *numel is 0 if they are empty. *changed is set if one
 * that is written is another than in the call before. Shapes and strides, which are the tensors' own,
 * are compared before check_memory calls PyTorch, where other threads may run. */
static int read_row(const torch_api *torch, const tensor_lists *lists, Py_ssize_t i,
                    int momentum_float32, known_tensor *known, lpsgd_dl_tensor *row,
                    lpsgd_dtype *dtype, int64_t *numel, int *changed)
{
    static const lpsgd_dl_dtype single = {LPSGD_DL_FLOAT, 32, 1};
    for (int j = 0; j < lists->count; j++) {
        const place at = {lists->function, lists->name[j], i};
        PyObject *tensor = PyTuple_GetItem(lists->tuple[j], i);
        if (!tensor || read_tensor(torch, &at, tensor, &row[j]))
            return -1;
        const int wide = j == 2 && momentum_float32 && row[0].dtype.bits == 16;
        if (j == 0 ? check_kind(&at, tensor, row, dtype, numel)
                   : check_match(&at, tensor, row, &row[j], wide ? single : row[0].dtype, *numel))
            return -1;
    }
    for (int j = 0; j < lists->count; j++) {
        const place at = {lists->function, lists->name[j], i};
        if (check_memory(torch, &at, PyTuple_GetItem(lists->tuple[j], i), lists->written[j],
                         &row[j], *numel, &known[j], changed))
            return -1;
    }
    return 0;
}

int tensor_lists_read(torch_api *torch, const tensor_lists *lists, buffer_groups *groups)
{
    const Py_ssize_t n = PyTuple_Size(lists->tuple[0]);
    groups->count = 0;
    groups->memory = NULL;
    if (check_lengths(lists))
        return -1;
    if (n == 0)
        return 0;
    checked_lists *checked = take(torch, lists, n);
    lpsgd_buffer *list = PyMem_Calloc((size_t)n, sizeof *list + sizeof(grouped_buffer));
    grouped_buffer *buffers = list ? (grouped_buffer *)(list + n) : NULL;
    Py_ssize_t count = 0;
    groups->memory = list;
    int result = -1;
    if (!checked || !list) {
        PyErr_NoMemory();
        goto done;
    }

    const int complete = checked->complete;
    int written_changed = 0, section = 0;
    checked->complete = 0;
    for (Py_ssize_t i = 0; i < n; i++) {
        lpsgd_dl_tensor row[MAX_LISTS];
        lpsgd_dtype dtype;
        int64_t numel;
        uint64_t stream, index;
        while (i == lists->sections[section].end)
            section++;
        if (read_row(torch, lists, i, lists->sections[section].hyper.momentum_float32,
                     &checked->known[i * lists->count], row, &dtype, &numel, &written_changed) ||
            read_number(lists, "streams", lists->streams, i, (uint64_t)i, &stream) ||
            read_number(lists, "offsets", lists->indices, i, 0, &index))
            goto done;
        if (!numel)
            continue;
        const int group = find_group(groups, section, row[0].device, dtype);
        if (group < 0) {
            PyErr_Format(PyExc_ValueError, "%s(): tensors of too many kinds", lists->function);
            goto done;
        }
        buffers[count].group = group;
        buffers[count++].buffer = (lpsgd_buffer){
            .param = row[0].data,
            .grad = row[1].data,
            .momentum_buffer = lists->count > 2 ? row[2].data : NULL,
            .numel = numel,
            .stream = stream,
            .index = index,
        };
    }
    distribute(groups, buffers, count, list);
    checked->complete = complete && !written_changed;
    if (!checked->complete && check_written(lists, checked))
        goto done;
    result = check_read(lists, checked);
done:
    if (checked)
        put_back(torch, checked);
    return result;
}

int cuda_number(const torch_api *torch, PyObject *object, lpsgd_device_number *number, int *device)
{
    lpsgd_dl_tensor tensor;
    const PyTypeObject *type = Py_TYPE(object);
    if (type != (PyTypeObject *)torch->tensor_type && type != (PyTypeObject *)torch->parameter_type)
        return 0;
    if (torch->dlpack->dltensor_from_py_object_no_sync(object, &tensor)) {
        PyErr_Clear();
        return 0;
    }
    if (tensor.device.device_type != LPSGD_DL_CUDA || !tensor.data ||
        dtype_of(&tensor.dtype, &number->dtype) || dense_numel(&tensor) != 1)
        return 0;
    if (truth_of(call(&torch->is_neg, object))) { /* its memory holds another number, or there was an error */
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
    const place at = {function, "scratch", 0};
    if (check_type(torch, &at, object))
        return NULL;
    if (torch->dlpack->dltensor_from_py_object_no_sync(object, &tensor)) {
        if (!PyErr_Occurred())
            PyErr_SetString(PyExc_RuntimeError, "PyTorch gives no access to its memory");
        refuse_because(&at);
        return NULL;
    }
    const uintptr_t data = (uintptr_t)tensor.data + tensor.byte_offset;
    if (tensor.device.device_type != LPSGD_DL_CUDA || tensor.dtype.code != LPSGD_DL_UINT ||
        tensor.dtype.bits != 8 || tensor.dtype.lanes != 1 || !tensor.data || data % 8 ||
        dense_numel(&tensor) < bytes || check_storage(torch, &at, object, bytes, 1)) {
        if (!PyErr_Occurred())
            PyErr_Format(PyExc_ValueError,
                         "%s(): argument 'scratch' must be a dense uint8 CUDA tensor of at least "
                         "%lld elements",
                         function, (long long)bytes);
        return NULL;
    }
    *device = tensor.device.device_id;
    return (void *)data;
}
