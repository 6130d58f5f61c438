/* SPDX-License-Identifier: MIT
 *
 * param_groups.c: reads what an optimizer of PyTorch keeps. No Python code runs meanwhile, except for
 * the hash of a parameter whose state is out of order; then the lists may change, never the tuples.
 */
#include "param_groups.h"

#include <limits.h>

int attribute_names_make(attribute_names *names)
{
#define LPSGD_NAME(name)                                                                           \
    if (!(names->name = PyUnicode_InternFromString(#name)))                                        \
        return -1;
    LPSGD_NAMES(LPSGD_NAME)
#undef LPSGD_NAME
    return 0;
}

int momentum_dtype_read(const torch_api *torch, const attribute_names *names, PyObject *value,
                        param_section *section)
{
    const struct {
        PyObject *object, *name;
        lpsgd_dtype dtype;
    } dtypes[] = {
        {torch->float32, names->float32, LPSGD_FLOAT32},
        {torch->bfloat16, names->bfloat16, LPSGD_BFLOAT16},
        {torch->float8_e5m2, names->float8_e5m2, LPSGD_FLOAT8_E5M2},
    };
    section->own_momentum_dtype = value == Py_None;
    if (value == Py_None)
        return 1;
    for (size_t i = 0; i < sizeof dtypes / sizeof *dtypes; i++)
        if (value == dtypes[i].object ||
            (PyUnicode_CheckExact(value) && PyUnicode_Compare(value, dtypes[i].name) == 0)) {
            section->hyper.momentum_dtype = dtypes[i].dtype;
            return 1;
        }
    return 0;
}

/* Borrows; None where there is no such key. NULL: exception. */
static PyObject *get(PyObject *dict, PyObject *key)
{
    PyObject *value = PyDict_GetItemWithError(dict, key);
    return value || PyErr_Occurred() ? value : Py_None;
}

/* All of these return 1, 0 for something unusual, or -1 with an exception. */

static int read_number(PyObject *group, PyObject *key, double *number)
{
    PyObject *value = get(group, key);
    if (!value)
        return -1;
    if (!PyFloat_CheckExact(value) && !PyLong_CheckExact(value))
        return 0;
    *number = PyFloat_AsDouble(value);
    return *number == -1.0 && PyErr_Occurred() ? -1 : 1;
}

static int read_bool(PyObject *group, PyObject *key, int *truth)
{
    PyObject *value = get(group, key);
    if (!value)
        return -1;
    *truth = value == Py_True;
    return value == Py_True || value == Py_False;
}

static int read_hyper(const torch_api *torch, const attribute_names *names, PyObject *group,
                      int has_momentum, param_section *section)
{
    lpsgd_hyper *hyper = &section->hyper;
    *hyper = (lpsgd_hyper){.grad_scale = 1.0};
    const struct {
        PyObject *key;
        double *number;
    } numbers[] = {
        {names->lr, &hyper->lr},
        {names->p, &hyper->p},
        {names->weight_decay, &hyper->weight_decay},
        {names->eps, &hyper->eps},
        {names->pivot, &hyper->pivot},
        {names->momentum, &hyper->momentum}, /* the last: LPSGD has none */
    };
    const size_t count = sizeof numbers / sizeof *numbers - !has_momentum;
    int answer = read_bool(group, names->maximize, &hyper->maximize);
    for (size_t i = 0; i < count && answer == 1; i++)
        answer = read_number(group, numbers[i].key, numbers[i].number);
    if (answer == 1 && has_momentum) {
        PyObject *dtype = get(group, names->momentum_dtype);
        if (!dtype)
            return -1;
        answer = momentum_dtype_read(torch, names, dtype, section);
    }
    if (answer == 1)
        answer = read_bool(group, names->stochastic_rounding, &hyper->stochastic_rounding);
    return answer;
}

static int read_integer(PyObject *group, PyObject *key, long long *number)
{
    PyObject *value = get(group, key);
    if (!value)
        return -1;
    if (!PyLong_CheckExact(value))
        return 0;
    *number = PyLong_AsLongLong(value);
    return *number == -1 && PyErr_Occurred() ? -1 : 1;
}

/* What a group that is rounded at random needs besides. */
static int read_rounding(const attribute_names *names, PyObject *group, lpsgd_hyper *hyper,
                         step_count *count)
{
    const int in_bytes = hyper->momentum_dtype == LPSGD_FLOAT8_E5M2;
    long long exponent = 0, step = 0;
    PyObject *seed = get(group, names->seed);
    if (!seed)
        return -1;
    if (!PyLong_CheckExact(seed))
        return 0;
    hyper->seed = PyLong_AsUnsignedLongLongMask(seed);
    int answer = read_integer(group, names->rounding_step, &step);
    if (answer == 1 && in_bytes)
        answer = read_integer(group, names->momentum_exponent, &exponent);
    if (answer != 1 || step == LLONG_MAX || exponent != (int)exponent)
        return answer == 1 ? 0 : answer;
    hyper->step = (uint64_t)step;
    hyper->momentum_exponent = (int)exponent;
    count->group = Py_NewRef(group);
    count->next = PyLong_FromLongLong(step + 1);
    return count->next ? 1 : -1;
}

/* Whether the group's options leave the step to C. */
static int read_options(const attribute_names *names, PyObject *group, int observed)
{
    PyObject *const others[] = {names->differentiable, names->capturable};
    for (int i = 0; i < 2; i++) {
        int truth = 0;
        const int answer = read_bool(group, others[i], &truth);
        if (answer != 1 || truth)
            return answer == 1 ? 0 : answer;
    }
    PyObject *fused = get(group, names->fused), *foreach = fused ? get(group, names->foreach) : NULL;
    if (!foreach)
        return -1;
    return fused == Py_True ? foreach != Py_True
                            : fused == Py_None && foreach == Py_None && !observed;
}

/* A new reference to the momentum buffer. States lie in the order of the parameters as a rule;
 * *position is behind that of the parameter before. */
static int find_buffer(const attribute_names *names, PyObject *states, PyObject *param,
                       Py_ssize_t *position, PyObject **buffer)
{
    PyObject *key, *state;
    Py_ssize_t next = *position;
    if (PyDict_Next(states, &next, &key, &state) && key == param)
        *position = next;
    else
        state = PyDict_GetItemWithError(states, param);
    if (!state || !PyDict_CheckExact(state))
        return PyErr_Occurred() ? -1 : 0;
    *buffer = get(state, names->momentum_buffer);
    if (!*buffer)
        return -1;
    Py_INCREF(*buffer);
    return *buffer != Py_None;
}

typedef struct gathering {
    const torch_api *torch;
    const attribute_names *names;
    PyObject *state;
    gathered_step *to;
    Py_ssize_t room, seen, found, position;
} gathering;

/* Gives away the reference. */
static int add(gathering *g, int list, PyObject *tensor)
{
    return PyTuple_SetItem(g->to->lists.tuple[list], g->found, tensor) ? -1 : 1;
}

static int gather_param(gathering *g, PyObject *param)
{
    const Py_ssize_t number = g->seen++;
    if (!torch_api_is_tensor(g->torch, param))
        return 0;
    PyObject *grad = PyObject_GetAttr(param, g->names->grad), *buffer = NULL;
    if (!grad)
        return -1;
    if (grad == Py_None) {
        Py_DECREF(grad);
        return 1;
    }
    int answer = add(g, 1, grad);
    if (answer == 1)
        answer = add(g, 0, Py_NewRef(param));
    if (answer == 1 && g->state) {
        answer = find_buffer(g->names, g->state, param, &g->position, &buffer);
        if (buffer && add(g, 2, buffer) < 0)
            answer = -1;
    }
    g->to->streams[g->found] = (uint64_t)number;
    g->found += answer == 1;
    return answer;
}

/* The parameters are those of the group, or only `one`. */
static int gather_group(gathering *g, PyObject *group, int observed, Py_ssize_t i, PyObject *one)
{
    param_section *section = &g->to->sections[i];
    lpsgd_hyper *hyper = &section->hyper;
    const Py_ssize_t first = g->found;
    PyObject *params = one ? NULL : get(group, g->names->params);
    if (!one && (!params || !PyList_Check(params)))
        return params ? 0 : -1;
    int answer = read_options(g->names, group, observed);
    if (answer == 1)
        answer = read_hyper(g->torch, g->names, group, g->state != NULL, section);
    if (answer == 1 && one)
        answer = gather_param(g, one);
    Py_XINCREF(params);
    for (Py_ssize_t j = 0; params && j < PyList_Size(params) && answer == 1; j++) {
        PyObject *param = Py_NewRef(PyList_GetItem(params, j));
        answer = g->seen < g->room ? gather_param(g, param) : 0;
        Py_DECREF(param);
    }
    Py_XDECREF(params);
    section->end = g->found;
    const int at_random = hyper->stochastic_rounding || hyper->momentum_dtype == LPSGD_FLOAT8_E5M2;
    if (answer == 1 && at_random && g->found > first)
        answer = read_rounding(g->names, group, hyper, &g->to->counts[i]);
    return answer;
}

/* The number of parameters in all groups, with or without a gradient; -1: something is unusual. */
static Py_ssize_t count_params(const attribute_names *names, PyObject *param_groups)
{
    Py_ssize_t count = 0;
    for (Py_ssize_t i = 0; i < PyList_Size(param_groups); i++) {
        PyObject *group = PyList_GetItem(param_groups, i);
        PyObject *params = PyDict_Check(group) ? get(group, names->params) : NULL;
        if (!params || !PyList_Check(params))
            return -1;
        count += PyList_Size(params);
    }
    return count;
}

/* The tuples were made with room for parameters that turned out to have no gradient. */
static int cut(tensor_lists *lists, Py_ssize_t count)
{
    for (int j = 0; j < lists->count; j++) {
        PyObject *whole = lists->tuple[j];
        lists->tuple[j] = PyTuple_GetSlice(whole, 0, count);
        Py_DECREF(whole);
        if (!lists->tuple[j])
            return -1;
    }
    return 1;
}

/* A step with lr = 0 and gradients of zeros is not counted. */
static int may_be_idle(const gathered_step *to, Py_ssize_t count)
{
    int counted = 0;
    for (Py_ssize_t i = 0; i < count; i++) {
        if (to->sections[i].hyper.lr != 0.0)
            return 0;
        counted |= to->counts[i].group != NULL;
    }
    return counted;
}

/* Memory for so many groups and parameters. Returns 1, or -1 with an exception. */
static int make_room(gathered_step *to, Py_ssize_t count, Py_ssize_t room)
{
    tensor_lists *lists = &to->lists;
    to->sections = PyMem_Calloc((size_t)count + 1, sizeof *to->sections + sizeof *to->counts);
    to->streams = PyMem_Calloc((size_t)room + 1, sizeof *to->streams);
    if (!to->sections || !to->streams) {
        PyErr_NoMemory();
        return -1;
    }
    to->counts = (step_count *)(to->sections + count + 1);
    lists->sections = to->sections;
    lists->section_count = (int)count;
    lists->streams = to->streams;
    for (int j = 0; j < lists->count; j++) {
        lists->tuple[j] = PyTuple_New(room);
        if (!lists->tuple[j])
            return -1;
    }
    return 1;
}

int param_groups_gather(const torch_api *torch, const attribute_names *names,
                        PyObject *param_groups, PyObject *state, int observed, gathered_step *to)
{
    const Py_ssize_t count = PyList_Size(param_groups), room = count_params(names, param_groups);
    gathering g = {torch, names, state, to, room, 0, 0, 0};
    if (room < 0)
        return PyErr_Occurred() ? -1 : 0;
    int answer = make_room(to, count, room);
    for (Py_ssize_t i = 0; i < count && answer == 1; i++) {
        PyObject *group = Py_XNewRef(PyList_GetItem(param_groups, i));
        answer = group ? gather_group(&g, group, observed, i, NULL) : -1;
        Py_XDECREF(group);
    }
    if (answer == 1 && may_be_idle(to, count))
        return 0;
    return answer == 1 && g.found < room ? cut(&to->lists, g.found) : answer;
}

int param_gather(const torch_api *torch, const attribute_names *names, PyObject *param,
                 PyObject *group, PyObject *state, int observed, Py_ssize_t number,
                 gathered_step *to)
{
    gathering g = {torch, names, state, to, 1, number, 0, 0};
    int answer = make_room(to, 1, 1);
    if (answer == 1)
        answer = gather_group(&g, group, observed, 0, param);
    return answer == 1 ? g.found == 1 : answer;
}

int gathered_step_count(const attribute_names *names, const gathered_step *step)
{
    for (int i = 0; i < step->lists.section_count; i++) {
        const step_count *count = &step->counts[i];
        if (count->group && PyDict_SetItem(count->group, names->rounding_step, count->next))
            return -1;
    }
    return 0;
}

void gathered_step_release(gathered_step *step)
{
    for (int i = 0; i < step->lists.section_count; i++) {
        Py_XDECREF(step->counts[i].group);
        Py_XDECREF(step->counts[i].next);
    }
    tensor_lists_release(&step->lists);
    PyMem_Free(step->sections);
    PyMem_Free(step->streams);
}
