/* SPDX-License-Identifier: MIT
 *
 * tensor_lists.c: checks lists of tensors row by row, one parameter with its gradient and momentum
 * buffer after the other, then their memory as a whole, and groups what can be stepped together.
 */
#include "tensor_lists.h"

#include <string.h>

#include "tensor.h"

void tensor_lists_release(tensor_lists *lists)
{
    for (int j = 0; j < lists->count; j++)
        Py_CLEAR(lists->tuple[j]);
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

/* Whether it is an inference tensor is not asked of an object that passed in the call before, by its
 * address, and still has the same memory. The negative bit and the storage's size may change even
 * then: `.data = ` takes any view of the memory, and a storage that shrinks moves, but may move back
 * when it shrinks again. */
static int check_memory(const torch_api *torch, const tensor_place *at, PyObject *tensor,
                        int is_written, const lpsgd_dl_tensor *read, int64_t numel,
                        known_tensor *known, int *complete)
{
    const uintptr_t bytes = (uintptr_t)(numel * (read->dtype.bits / 8));
    const known_tensor found = {tensor, numel ? read->data : NULL, bytes};
    const int same = known->tensor == found.tensor && known->data == found.data &&
                     known->bytes == found.bytes;
    int inference = 0;
    if (numel && tensor_check_memory(torch, at, tensor, read, numel,
                                     !same && is_written ? &inference : NULL))
        return -1;
    if (same)
        return 0;
    *known = found;
    if (inference) /* asks again next time */
        known->tensor = NULL;
    if (is_written)
        *complete = 0;
    return 0;
}

/* Reads the tensors of index i and checks them; *numel is 0 if they are empty. Shapes and strides,
 * which are the tensors' own, are compared before check_memory calls PyTorch, where other threads may
 * run. */
static int read_row(const torch_api *torch, const tensor_lists *lists, Py_ssize_t i,
                    const param_section *section, checked_lists *checked, lpsgd_dl_tensor *row,
                    lpsgd_dtype *dtype, int64_t *numel)
{
    PyObject *tensor[MAX_LISTS]; /* borrowed from the tuples */
    for (int j = 0; j < lists->count; j++) {
        const tensor_place at = {lists->function, lists->name[j], i};
        tensor[j] = PyTuple_GetItem(lists->tuple[j], i);
        if (!tensor[j] || tensor_read(torch, &at, tensor[j], &row[j]))
            return -1;
        if (j == 0 ? tensor_check_kind(&at, tensor[0], row, dtype, numel)
                   : tensor_check_match(
                         &at, tensor[j], row, &row[j],
                         j == 2 ? section_hyper(section, *dtype).momentum_dtype : *dtype, *numel))
            return -1;
    }
    for (int j = 0; j < lists->count; j++) {
        const tensor_place at = {lists->function, lists->name[j], i};
        if (check_memory(torch, &at, tensor[j], lists->written[j], &row[j], *numel,
                         &checked->known[i * lists->count + j], &checked->complete))
            return -1;
    }
    return 0;
}

static int refuse_overlaps(const tensor_lists *lists, checked_lists *checked)
{
    span a, b;
    if (!checked_lists_overlap(checked, lists->written, &a, &b))
        return 0;
    PyErr_Format(PyExc_ValueError, "%s(): %s[%zd] and %s[%zd] share memory that the step writes to",
                 lists->function, lists->name[a.list], a.index, lists->name[b.list], b.index);
    return -1;
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
        if (g->section == section && g->dtype == dtype &&
            memcmp(&g->device, &device, sizeof device) == 0)
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

int tensor_lists_read(const torch_api *torch, remembered *calls, const tensor_lists *lists,
                      buffer_groups *groups)
{
    const Py_ssize_t n = PyTuple_Size(lists->tuple[0]);
    groups->count = 0;
    groups->memory = NULL;
    if (check_lengths(lists))
        return -1;
    if (n == 0)
        return 0;
    checked_lists *checked =
        remembered_take(calls, PyTuple_GetItem(lists->tuple[0], 0), n, lists->count);
    lpsgd_buffer *list = PyMem_Calloc((size_t)n, sizeof *list + sizeof(grouped_buffer));
    grouped_buffer *buffers = list ? (grouped_buffer *)(list + n) : NULL;
    Py_ssize_t count = 0;
    groups->memory = list;
    int result = -1;
    if (!checked || !list) {
        PyErr_NoMemory();
        goto done;
    }

    int section = 0;
    for (Py_ssize_t i = 0; i < n; i++) {
        lpsgd_dl_tensor row[MAX_LISTS] = {{.data = NULL}};
        lpsgd_dtype dtype = LPSGD_FLOAT32;
        int64_t numel = 0;
        while (i == lists->sections[section].end)
            section++;
        if (read_row(torch, lists, i, &lists->sections[section], checked, row, &dtype, &numel))
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
            .stream = lists->streams ? lists->streams[i] : (uint64_t)i,
            .index = lists->indices ? lists->indices[i] : 0,
        };
    }
    distribute(groups, buffers, count, list);
    result = refuse_overlaps(lists, checked);
done:
    if (checked)
        remembered_put_back(calls, checked);
    return result;
}
