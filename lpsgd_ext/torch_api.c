/* SPDX-License-Identifier: MIT
 *
 * torch_api.c: finds PyTorch's C exchange table, and the functions behind its methods.
 */
#include "torch_api.h"

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
        {&torch->float32, "torch", "float32", NULL},
        {&torch->bfloat16, "torch", "bfloat16", NULL},
        {&torch->float8_e5m2, "torch", "float8_e5m2", NULL},
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
