/* SPDX-License-Identifier: MIT
 *
 * lpsgd_ext: the CPython module. PyTorch tensors in, raw buffers out; csrc does the arithmetic.
 *
 * Limited API, so that one binary serves CPython 3.10 and every later one. Import torch first: then
 * both share PyTorch's OpenMP runtime.
 *
 * It relies on the GIL. A free-threaded CPython (3.13t, 3.14t) has no limited API and does not load
 * this binary. One built for it without the limited API turns the GIL on again, since the module
 * does not declare Py_mod_gil; whoever wants to declare it must first
 * - guard `remembered`, where taking and putting back move pointers without a lock: two steps would
 *   free or use the same memory;
 * - hold strong references instead of borrowed ones in param_groups.c (PyDict_Next,
 *   PyDict_GetItemWithError and PyList_GetItem while another thread changes them), and read list
 *   lengths once;
 * - see that no other thread resizes a storage between its check and the end of the step: with a GIL
 *   that can happen while the kernel runs, without one also before.
 */
#include "param_groups.h"
#include "tensor.h"

#include <limits.h>
#include <stdlib.h>
#include <string.h>

typedef struct module_state {
    torch_api torch;
    remembered calls;
    attribute_names names;
    PyObject *cuda_error; /* the exception */
} module_state;

static module_state *state_of(PyObject *module)
{
    return PyModule_GetState(module);
}

/* PyFloat_AsDouble with torch's wording. *value is left as it is where object is NULL. */
static int read_double(const char *function, const char *name, PyObject *object, double *value)
{
    if (!object)
        return 0;
    const double number = PyFloat_AsDouble(object);
    if (number == -1.0 && PyErr_Occurred()) {
        if (PyErr_ExceptionMatches(PyExc_TypeError)) {
            PyErr_Clear();
            PyErr_Format(PyExc_TypeError, "%s(): argument '%s' must be float, not %R", function,
                         name, (PyObject *)Py_TYPE(object));
        }
        return -1;
    }
    *value = number;
    return 0;
}

static int refuse_value(const char *what, double value)
{
    PyObject *number = PyFloat_FromDouble(value);
    if (number)
        PyErr_Format(PyExc_ValueError, "Invalid %s: %R", what, number);
    Py_XDECREF(number);
    return -1;
}

/* torch's wording for a hyper-parameter out of range. */
static int check_hyper(const lpsgd_hyper *hyper)
{
    const lpsgd_status status = lpsgd_check_hyper(hyper);
    switch (status) {
    case LPSGD_OK:
        return 0;
    case LPSGD_ERROR_LR:
        return refuse_value("learning rate", hyper->lr);
    case LPSGD_ERROR_P:
        return refuse_value("p value", hyper->p);
    case LPSGD_ERROR_MOMENTUM:
        return refuse_value("momentum value", hyper->momentum);
    case LPSGD_ERROR_WEIGHT_DECAY:
        return refuse_value("weight_decay value", hyper->weight_decay);
    case LPSGD_ERROR_EPS:
        return refuse_value("epsilon value", hyper->eps);
    case LPSGD_ERROR_PIVOT:
        return refuse_value("pivot value", hyper->pivot);
    case LPSGD_ERROR_GRAD_SCALE:
        return refuse_value("grad_scale", hyper->grad_scale);
    case LPSGD_ERROR_MOMENTUM_EXPONENT:
        PyErr_Format(PyExc_ValueError, "Invalid momentum_exponent: %d", hyper->momentum_exponent);
        return -1;
    default:
        PyErr_SetString(PyExc_SystemError, lpsgd_status_text(status));
        return -1;
    }
}

/* A tuple of the list's or tuple's items: what another thread does to the list no longer matters. */
static PyObject *snapshot(const char *function, const char *name, PyObject *sequence)
{
    if (PyList_Check(sequence))
        return PyList_AsTuple(sequence);
    if (PyTuple_Check(sequence))
        return PySequence_Tuple(sequence);
    PyErr_Format(PyExc_TypeError, "%s(): argument '%s' must be list or tuple of Tensors, not %R",
                 function, name, (PyObject *)Py_TYPE(sequence));
    return NULL;
}

static int get_num_threads(const torch_api *torch)
{
    PyObject *answer = PyObject_CallFunctionObjArgs(torch->get_num_threads, NULL);
    const long threads = answer ? PyLong_AsLong(answer) : -1;
    Py_XDECREF(answer);
    if (threads == -1 && PyErr_Occurred())
        return -1;
    return threads < 1 ? 1 : threads > 4096 ? 4096 : (int)threads;
}

/* Tells autograd which tensors change, so that a stale backward raises. */
static int bump_versions(const torch_api *torch, const tensor_lists *lists)
{
    for (int j = 0; j < lists->count; j++) {
        if (!lists->written[j])
            continue;
        PyObject *none =
            PyObject_CallFunctionObjArgs(torch->increment_version, lists->tuple[j], NULL);
        if (!none)
            return -1;
        Py_DECREF(none);
    }
    return 0;
}

/* PyTorch's current stream of a CUDA device. 0, or -1, perhaps with an exception. */
static int get_stream(const torch_api *torch, int device, void **stream)
{
    return !torch->dlpack->current_work_stream ||
                   torch->dlpack->current_work_stream(LPSGD_DL_CUDA, device, stream)
               ? -1
               : 0;
}

/* Fills in the stream of each CUDA group's device, and makes sure that steps can run there; unless
 * capturable, no stream may be captured: a graph would keep this step's lr and p. */
static int prepare_cuda(const torch_api *torch, const tensor_lists *lists,
                        const buffer_groups *groups, lpsgd_cuda_target *targets,
                        const lpsgd_cuda_target *numbers, int capturable)
{
    for (int i = 0; i < groups->count; i++) {
        const lpsgd_dl_device device = groups->group[i].device;
        int capturing = 0;
        if (numbers->scratch &&
            (device.device_type != LPSGD_DL_CUDA || device.device_id != numbers->device)) {
            PyErr_Format(PyExc_ValueError, "%s(): with scratch, all params must be on its device",
                         lists->function);
            return -1;
        }
        if (device.device_type != LPSGD_DL_CUDA)
            continue;
        targets[i] = *numbers;
        targets[i].device = device.device_id;
        if (get_stream(torch, device.device_id, &targets[i].stream)) {
            if (!PyErr_Occurred())
                PyErr_SetString(PyExc_RuntimeError, "PyTorch does not tell its current stream");
            return -1;
        }
        if (lpsgd_cuda_prepare(device.device_id, targets[i].stream,
                               capturable ? NULL : &capturing) != LPSGD_OK) {
            PyErr_Format(PyExc_RuntimeError, "%s(): %s", lists->function, lpsgd_cuda_error());
            return -1;
        }
        if (capturing) {
            PyErr_Format(PyExc_RuntimeError, "%s(): the stream is being captured", lists->function);
            return -1;
        }
    }
    return 0;
}

/* The CUDA groups come first: a launch may be refused, the rest cannot. */
static lpsgd_status step_groups(const buffer_groups *groups, const lpsgd_cuda_target *targets,
                                const param_section *sections, int has_momentum, int threads)
{
    lpsgd_status status = LPSGD_OK;
    for (int cuda = 1; cuda >= 0; cuda--)
        for (int i = 0; i < groups->count && status == LPSGD_OK; i++) {
            const buffer_group *g = &groups->group[i];
            const lpsgd_hyper hyper = section_hyper(&sections[g->section], g->dtype);
            if ((g->device.device_type == LPSGD_DL_CUDA) != cuda)
                continue;
            if (cuda)
                status = (has_momentum ? lpsgdm_cuda_step : lpsgd_cuda_step)(
                    g->list, g->count, g->dtype, &hyper, &targets[i]);
            else
                status = (has_momentum ? lpsgdm_step : lpsgd_step)(g->list, g->count, g->dtype,
                                                                   &hyper, threads);
        }
    return status;
}

/* A step with numbers that have been checked: validate everything else, with what `calls` remember, then
 * mutate, or don't. Returns 0, or -1 with an exception. */
static int step(module_state *own, remembered *calls, const tensor_lists *lists,
                const lpsgd_cuda_target *numbers, int capturable, int mutate)
{
    const torch_api *torch = &own->torch;
    buffer_groups groups = {.count = 0};
    lpsgd_cuda_target targets[MAX_GROUPS];
    lpsgd_status status;
    int threads = 0, result = -1;

    if (tensor_lists_read(torch, calls, lists, &groups) ||
        prepare_cuda(torch, lists, &groups, targets, numbers, capturable))
        goto done;
    if (!mutate) {
        result = 0;
        goto done;
    }
    threads = get_num_threads(torch);
    if (threads < 0 || bump_versions(torch, lists))
        goto done;

    Py_BEGIN_ALLOW_THREADS
    status = step_groups(&groups, targets, lists->sections, lists->count > 2, threads);
    Py_END_ALLOW_THREADS
    if (status == LPSGD_OK)
        result = 0;
    else if (status == LPSGD_ERROR_CUDA)
        PyErr_Format(own->cuda_error, "%s(): %s", lists->function, lpsgd_cuda_error());
    else
        PyErr_SetString(PyExc_SystemError, lpsgd_status_text(status));
done:
    PyMem_Free(groups.memory);
    return result;
}

PyDoc_STRVAR(lpsgd_doc,
"lpsgd_(params, grads, *, lr, p, weight_decay=0.0, eps=1e-08, pivot=1.0, maximize=False,\n"
"       grad_scale=None, found_inf=None, seed=None, step=0, streams=None, offsets=None,\n"
"       scratch=None, dry_run=False)\n"
"--\n"
"\n"
"One LPSGD step in place (arXiv:2606.02078, eq 21 and 22), for every element::\n"
"\n"
"    u = grad / (|grad| + eps)**rho * pivot**(-1 / (p - 1)),  rho = (p - 2) / (p - 1)\n"
"    param = (1 - lr * weight_decay) * param - lr * u\n"
"\n"
"Args:\n"
"    params: list or tuple of dense CPU or CUDA tensors, float32, float64, bfloat16 or float16, of type\n"
"        Tensor or Parameter exactly; no two may share memory. Updated in place, whether or not\n"
"        they require grad; autograd's version counters are incremented.\n"
"    grads: one tensor for each parameter, of its shape, dtype and strides. Not changed.\n"
"    lr: learning rate, >= 0.\n"
"    p: norm, >= 2; 2 is gradient descent, math.inf is sign descent.\n"
"    weight_decay: decoupled weight decay, >= 0.\n"
"    eps: added to `|grad|`, >= 0.\n"
"    pivot: the `|grad|` at which `|u|` is 1 for every p, > 0; 1 is the paper.\n"
"    maximize: ascend instead of descend.\n"
"    grad_scale: what the gradients have been multiplied by, > 0; None for 1.\n"
"    found_inf: other than 0, everything is checked and nothing changed; None for 0.\n"
"    seed: None rounds to nearest; an int rounds bfloat16 results up or down at random such that the\n"
"        mean is exact. The random bits depend on seed, step, stream and the element's index alone.\n"
"    step: the number of this step.\n"
"    streams: one int for each parameter, its number in the model; None for 0, 1, ...\n"
"    offsets: one int for each parameter, the index of its first element in the whole parameter that\n"
"        it is a shard of; None for zeros.\n"
"    scratch: a uint8 tensor of cuda_scratch_size() elements on the CUDA device of all params. With\n"
"        it, lr, p, weight_decay, grad_scale and found_inf may be one-element tensors there, which\n"
"        the GPU reads when it makes the step, unchecked; without it their values are waited for.\n"
"    dry_run: check everything and change nothing.\n"
"\n"
"Raises TypeError, ValueError or RuntimeError with the name of the argument and the index; then no\n"
"tensor has changed. Several threads may call it at once on different tensors; the GIL is released\n"
"while the kernel runs, on torch.get_num_threads() threads.");

PyDoc_STRVAR(lpsgdm_doc,
"lpsgdm_(params, grads, momentum_buffers, *, lr, p, momentum=0.9, weight_decay=0.0, eps=1e-08, "
"pivot=1.0, maximize=False,\n"
"        momentum_dtype=None, momentum_exponent=15, stochastic_rounding=None, grad_scale=None,\n"
"        found_inf=None, seed=None, step=0, streams=None, offsets=None, scratch=None, dry_run=False,\n"
"        accumulate=1, continues=False, momentum_only=False)\n"
"--\n"
"\n"
"One LPSGDM step in place (arXiv:2606.02078, eq 23 to 25), for every element::\n"
"\n"
"    momentum_buffer = momentum * momentum_buffer + (1 - momentum) * grad\n"
"    u = momentum_buffer / (|momentum_buffer| + eps)**rho * pivot**(-1 / (p - 1))\n"
"    param = (1 - lr * weight_decay) * param - lr * u\n"
"\n"
"Args:\n"
"    momentum_buffers: one tensor for each parameter, of its shape, dtype and strides, zeros before\n"
"        the first step. Updated in place.\n"
"    momentum: 0 <= momentum < 1.\n"
"    momentum_dtype: the dtype of the momentum buffers of float32, bfloat16 and float16 parameters:\n"
"        torch.float32, torch.bfloat16, torch.float8_e5m2 or the name of one; None for the parameter's,\n"
"        which float64 parameters always have.\n"
"    momentum_exponent: float8_e5m2 holds the momentum times 2 to the power of this; an int from -126\n"
"        to 126.\n"
"    stochastic_rounding: whether bfloat16, of parameters and of momentum buffers, is rounded at\n"
"        random; None: if there is a seed. float8_e5m2 always is, and needs a seed.\n"
"    accumulate: how many micro-batches there are in a step, >= 1: (1 - momentum) is divided by it.\n"
"    continues: the momentum buffers have taken a micro-batch of this step: 1 stands for momentum.\n"
"    momentum_only: leave the parameters as they are, since the step goes on.\n"
"        So the momentum sums micro-batches: all but the first continue, and all but the last are\n"
"        momentum_only.\n"
"\n"
"The other arguments, the errors and what it says of threads are those of `lpsgd_`.");

/* Like read_double; but with scratch, a tensor on its device is left for the GPU to read. `number` is
 * NULL where the GPU cannot. */
static int read_number(const torch_api *torch, const char *function, const char *name,
                       PyObject *object, double *value, const lpsgd_cuda_target *target,
                       lpsgd_device_number *number)
{
    int device = 0;
    if (object && number && target->scratch && cuda_number(torch, object, number, &device)) {
        if (device == target->device)
            return 0;
        number->pointer = NULL;
    }
    return read_double(function, name, object, value);
}

static int refuse_argument(const char *function, const char *name, const char *what)
{
    PyErr_Format(PyExc_TypeError, "%s(): argument '%s' must be %s", function, name, what);
    return -1;
}

/* An int modulo 2^64. */
static int read_integer(const char *function, const char *name, PyObject *object, uint64_t *value)
{
    if (!PyLong_Check(object))
        return refuse_argument(function, name, "int");
    *value = PyLong_AsUnsignedLongLongMask(object);
    return 0;
}

/* Makes an array of the n ints of a list or tuple, modulo 2^64, which the caller frees. Leaves *array as
 * it is where object is NULL. */
static int read_numbers(const char *function, const char *name, PyObject *object, Py_ssize_t n,
                        uint64_t **array)
{
    if (!object)
        return 0;
    if (!(PyList_Check(object) || PyTuple_Check(object)) || PySequence_Size(object) != n)
        return refuse_argument(function, name, "list or tuple of one int for each parameter");
    *array = PyMem_Calloc((size_t)n + 1, sizeof **array);
    if (!*array) {
        PyErr_NoMemory();
        return -1;
    }
    for (Py_ssize_t i = 0; i < n; i++) {
        PyObject *number = PySequence_GetItem(object, i);
        if (number) {
            (*array)[i] = PyLong_AsUnsignedLongLongMask(number);
            Py_DECREF(number);
        }
        if (!PyErr_Occurred())
            continue;
        if (PyErr_ExceptionMatches(PyExc_TypeError))
            PyErr_Format(PyExc_TypeError, "%s(): argument '%s' must have an int for each parameter",
                         function, name);
        return -1;
    }
    return 0;
}

/* The arguments of lpsgd_ and lpsgdm_, borrowed. Those left out are NULL, and so is None where it
 * means the same. */
typedef struct arguments {
    PyObject *sequence[MAX_LISTS];
    PyObject *lr, *p, *momentum, *weight_decay, *eps, *pivot;
    PyObject *grad_scale, *found_inf, *seed, *step, *streams, *offsets, *scratch;
    PyObject *momentum_dtype, *momentum_exponent, *stochastic_rounding;
    int maximize, dry_run, accumulate, continues, momentum_only;
} arguments;

static int parse(const char *function, PyObject *args, PyObject *kwargs, int has_momentum,
                 arguments *a)
{
    static char *lpsgd_names[] = {"params",    "grads",      "lr",        "p",       "weight_decay",
                                  "eps",       "pivot",      "maximize",  "grad_scale", "found_inf",
                                  "seed",      "step",       "streams",   "offsets", "scratch",
                                  "dry_run",   NULL};
    static char *lpsgdm_names[] = {"params",     "grads",    "momentum_buffers", "lr",
                                   "p",          "weight_decay", "eps",          "pivot",
                                   "maximize",   "grad_scale", "found_inf",      "seed",
                                   "step",       "streams",  "offsets",          "scratch",
                                   "dry_run",    "momentum", "momentum_dtype",   "momentum_exponent",
                                   "stochastic_rounding", "accumulate", "continues",
                                   "momentum_only", NULL};
    const int parsed =
        has_momentum
            ? PyArg_ParseTupleAndKeywords(
                  args, kwargs, "OOO|$OOOOOpOOOOOOOpOOOOipp:lpsgdm_", lpsgdm_names, &a->sequence[0],
                  &a->sequence[1], &a->sequence[2], &a->lr, &a->p, &a->weight_decay, &a->eps,
                  &a->pivot, &a->maximize, &a->grad_scale, &a->found_inf, &a->seed, &a->step,
                  &a->streams, &a->offsets, &a->scratch, &a->dry_run, &a->momentum,
                  &a->momentum_dtype, &a->momentum_exponent, &a->stochastic_rounding,
                  &a->accumulate, &a->continues, &a->momentum_only)
            : PyArg_ParseTupleAndKeywords(
                  args, kwargs, "OO|$OOOOOpOOOOOOOp:lpsgd_", lpsgd_names, &a->sequence[0],
                  &a->sequence[1], &a->lr, &a->p, &a->weight_decay, &a->eps, &a->pivot,
                  &a->maximize, &a->grad_scale, &a->found_inf, &a->seed, &a->step, &a->streams,
                  &a->offsets, &a->scratch, &a->dry_run);
    if (!parsed)
        return -1;
    if (!a->lr || !a->p) {
        PyErr_Format(PyExc_TypeError, "%s() missing required keyword-only argument: '%s'",
                     function, a->lr ? "p" : "lr");
        return -1;
    }
    PyObject **const optional[] = {
        &a->grad_scale, &a->found_inf, &a->seed,           &a->streams,
        &a->offsets,    &a->scratch,   &a->momentum_dtype, &a->stochastic_rounding,
    };
    for (size_t i = 0; i < sizeof optional / sizeof *optional; i++)
        if (*optional[i] == Py_None)
            *optional[i] = NULL;
    return 0;
}

/* Fills in the numbers that are given, checked for their types alone. Those that stay on a GPU go into
 * `numbers`. */
static int read_hyper(const torch_api *torch, const char *function, const arguments *a,
                      lpsgd_hyper *hyper, lpsgd_cuda_target *numbers, double *found_inf)
{
    hyper->maximize = a->maximize;
    if (a->accumulate < 1) { /* which csrc would take for 1 */
        PyErr_Format(PyExc_ValueError, "Invalid accumulate: %d", a->accumulate);
        return -1;
    }
    hyper->accumulate = a->accumulate;
    hyper->continues = a->continues;
    hyper->momentum_only = a->momentum_only;
    hyper->p = 2.0; /* where the GPU has the number */
    const struct {
        const char *name;
        PyObject *object;
        double *value;
        lpsgd_device_number *number; /* NULL: the GPU cannot read it */
    } all[] = {
        {"lr", a->lr, &hyper->lr, &numbers->lr},
        {"p", a->p, &hyper->p, &numbers->p},
        {"momentum", a->momentum, &hyper->momentum, NULL},
        {"weight_decay", a->weight_decay, &hyper->weight_decay, &numbers->weight_decay},
        {"eps", a->eps, &hyper->eps, NULL},
        {"pivot", a->pivot, &hyper->pivot, NULL},
        {"grad_scale", a->grad_scale, &hyper->grad_scale, &numbers->grad_scale},
        {"found_inf", a->found_inf, found_inf, &numbers->found_inf},
    };
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        if (read_number(torch, function, all[i].name, all[i].object, all[i].value, numbers,
                        all[i].number))
            return -1;
    return 0;
}

static int read_exponent(const char *function, PyObject *object, int *exponent)
{
    if (!PyLong_Check(object) || PyBool_Check(object))
        return refuse_argument(function, "momentum_exponent", "int");
    int overflow = 0;
    const long number = PyLong_AsLongAndOverflow(object, &overflow);
    if (overflow || number != (int)number) {
        PyErr_Format(PyExc_ValueError, "Invalid momentum_exponent: %R", object);
        return -1;
    }
    *exponent = (int)number;
    return 0;
}

/* The momentum's dtype, and how it and bfloat16 are rounded. */
static int read_rounding(const module_state *own, const char *function, const arguments *a,
                         param_section *section)
{
    lpsgd_hyper *hyper = &section->hyper;
    PyObject *dtype = a->momentum_dtype, *stochastic = a->stochastic_rounding;
    if (dtype && !momentum_dtype_read(&own->torch, &own->names, dtype, section)) {
        if (Py_TYPE(dtype) != Py_TYPE(own->torch.float32) && !PyUnicode_Check(dtype))
            return refuse_argument(function, "momentum_dtype", "torch.dtype");
        PyErr_Format(PyExc_ValueError, "Invalid momentum_dtype: %S", dtype);
        return -1;
    }
    if (stochastic && !PyBool_Check(stochastic))
        return refuse_argument(function, "stochastic_rounding", "bool");
    if (a->momentum_exponent &&
        read_exponent(function, a->momentum_exponent, &hyper->momentum_exponent))
        return -1;
    if (a->step && read_integer(function, "step", a->step, &hyper->step))
        return -1;
    if (a->seed && read_integer(function, "seed", a->seed, &hyper->seed))
        return -1;
    hyper->stochastic_rounding = stochastic ? stochastic == Py_True : a->seed != NULL;
    if (a->seed || !(hyper->stochastic_rounding || hyper->momentum_dtype == LPSGD_FLOAT8_E5M2))
        return 0;
    return refuse_argument(function, "seed", "int where something is rounded stochastically");
}

static tensor_lists lists_of(const char *function, int has_momentum)
{
    return (tensor_lists){
        .function = function,
        .count = has_momentum ? 3 : 2,
        .name = {"params", "grads", "momentum_buffers"},
        .written = {1, 0, 1},
    };
}

static PyObject *parse_and_step(PyObject *module, PyObject *args, PyObject *kwargs,
                                int has_momentum)
{
    const char *function = has_momentum ? "lpsgdm_" : "lpsgd_";
    module_state *own = state_of(module);
    const torch_api *torch = &own->torch;
    tensor_lists lists = lists_of(function, has_momentum);
    arguments a = {.accumulate = 1};
    param_section all = {.hyper = {.momentum = has_momentum ? 0.9 : 0.0,
                                   .eps = 1e-8,
                                   .pivot = 1.0,
                                   .grad_scale = 1.0,
                                   .momentum_exponent = 15},
                         .own_momentum_dtype = 1};
    lpsgd_cuda_target numbers = {.scratch = NULL};
    double found_inf = 0.0;
    uint64_t *streams = NULL, *offsets = NULL;
    if (parse(function, args, kwargs, has_momentum, &a))
        return NULL;
    if (a.scratch) {
        numbers.scratch =
            cuda_scratch(torch, function, a.scratch, lpsgd_cuda_scratch_size(), &numbers.device);
        if (!numbers.scratch)
            return NULL;
    }
    int result = read_hyper(torch, function, &a, &all.hyper, &numbers, &found_inf);
    if (result == 0)
        result = read_rounding(own, function, &a, &all);
    if (result == 0)
        result = check_hyper(&all.hyper);
    for (int j = 0; j < lists.count && result == 0; j++) {
        lists.tuple[j] = snapshot(function, lists.name[j], a.sequence[j]);
        result = lists.tuple[j] ? 0 : -1;
    }
    if (result == 0) {
        all.end = PyTuple_Size(lists.tuple[0]);
        result = read_numbers(function, "streams", a.streams, all.end, &streams) ||
                         read_numbers(function, "offsets", a.offsets, all.end, &offsets)
                     ? -1
                     : 0;
    }
    if (result == 0) {
        lists.streams = streams;
        lists.indices = offsets;
        lists.sections = &all;
        lists.section_count = 1;
        result = step(own, &own->calls, &lists, &numbers, 1, !a.dry_run && found_inf == 0.0);
    }
    tensor_lists_release(&lists);
    PyMem_Free(streams);
    PyMem_Free(offsets);
    return result == 0 ? Py_NewRef(Py_None) : NULL;
}

static PyObject *lpsgd(PyObject *module, PyObject *args, PyObject *kwargs)
{
    return parse_and_step(module, args, kwargs, 0);
}

static PyObject *lpsgdm(PyObject *module, PyObject *args, PyObject *kwargs)
{
    return parse_and_step(module, args, kwargs, 1);
}

/* True where `done` is 1. Exceptions are False, as the steps of optimizers find their words elsewhere,
 * but for those that nobody would look for. */
static PyObject *answer_of(const module_state *own, int done)
{
    if (done < 0) {
        const int unusual = PyErr_ExceptionMatches(PyExc_TypeError) ||
                            PyErr_ExceptionMatches(PyExc_ValueError) ||
                            PyErr_ExceptionMatches(PyExc_RuntimeError) ||
                            PyErr_ExceptionMatches(PyExc_OverflowError);
        if (!unusual || PyErr_ExceptionMatches(own->cuda_error))
            return NULL;
        PyErr_Clear();
    }
    return PyBool_FromLong(done == 1);
}

PyDoc_STRVAR(step_param_groups_doc,
"step_param_groups(param_groups, state, observed)\n"
"--\n"
"\n"
"The step of an optimizer, in place, for all of its groups at once.\n"
"\n"
"Args:\n"
"    param_groups: list of dicts with the keys of LPSGD or LPSGDM.\n"
"    state: dict of each parameter's state, a dict with its momentum_buffer; None for LPSGD.\n"
"    observed: step only groups with fused=True.\n"
"\n"
"Returns True if the step has been made, and False if anything about it is unusual, errors and the\n"
"capture of a CUDA graph included: then nothing has changed. Raises CudaError as `lpsgdm_` does.");

static PyObject *step_param_groups(PyObject *module, PyObject *args)
{
    PyObject *param_groups, *state;
    int observed;
    if (!PyArg_ParseTuple(args, "O!Op:step_param_groups", &PyList_Type, &param_groups, &state,
                          &observed))
        return NULL;
    const int has_momentum = state != Py_None;
    if (has_momentum && !PyDict_Check(state)) {
        PyErr_SetString(PyExc_TypeError, "step_param_groups(): argument 'state' must be dict");
        return NULL;
    }
    module_state *own = state_of(module);
    const lpsgd_cuda_target no_numbers = {.scratch = NULL};
    gathered_step gathered = {.lists = lists_of("step_param_groups", has_momentum)};
    int done = param_groups_gather(&own->torch, &own->names, param_groups,
                                   has_momentum ? state : NULL, observed, &gathered);
    for (int i = 0; i < gathered.lists.section_count && done == 1; i++)
        done = check_hyper(&gathered.sections[i].hyper) ? -1 : 1;
    if (done == 1)
        done = step(own, &own->calls, &gathered.lists, &no_numbers, 0, 1) ? -1 : 1;
    if (done == 1)
        done = gathered_step_count(&own->names, &gathered) ? -1 : 1;
    gathered_step_release(&gathered);
    return answer_of(own, done);
}

PyDoc_STRVAR(step_param_doc,
"step_param(param, group, state, observed, number, accumulate=1, taken=0, momentum_only=False)\n"
"--\n"
"\n"
"What `step_param_groups` does, for one parameter, which is to have a gradient.\n"
"\n"
"Args:\n"
"    param: the parameter; it need not be in the group.\n"
"    group: dict with the keys of LPSGD or LPSGDM.\n"
"    state, observed: as for `step_param_groups`.\n"
"    number: the parameter's among those of all groups, as `streams` of `lpsgd_`.\n"
"    accumulate, momentum_only: as for `lpsgdm_`.\n"
"    taken: how many micro-batches of this step the momentum has taken, >= 0. The step goes on with them\n"
"        and is rounded as the one that comes so many later. `rounding_step` is not counted.\n"
"\n"
"Returns and raises what `step_param_groups` does.");

static PyObject *step_param(PyObject *module, PyObject *args)
{
    PyObject *param, *group, *state;
    int observed, accumulate = 1, taken = 0, momentum_only = 0;
    Py_ssize_t number;
    if (!PyArg_ParseTuple(args, "OO!Opn|iip:step_param", &param, &PyDict_Type, &group, &state,
                          &observed, &number, &accumulate, &taken, &momentum_only))
        return NULL;
    const int has_momentum = state != Py_None;
    if (has_momentum && !PyDict_Check(state)) {
        PyErr_SetString(PyExc_TypeError, "step_param(): argument 'state' must be dict");
        return NULL;
    }
    module_state *own = state_of(module);
    const lpsgd_cuda_target no_numbers = {.scratch = NULL};
    gathered_step gathered = {.lists = lists_of("step_param", has_momentum)};
    int done = accumulate < 1 || taken < 0 || (!has_momentum && (accumulate != 1 || taken || momentum_only))
                   ? 0
                   : param_gather(&own->torch, &own->names, param, group,
                                  has_momentum ? state : NULL, observed, number, &gathered);
    if (done == 1) {
        lpsgd_hyper *hyper = &gathered.sections[0].hyper;
        hyper->accumulate = accumulate;
        hyper->continues = taken > 0;
        hyper->momentum_only = momentum_only;
        hyper->step += (uint64_t)taken;
        done = check_hyper(hyper) ? -1 : 1;
    }
    if (done == 1) /* so many other parameters are stepped in between that nothing would be remembered */
        done = step(own, NULL, &gathered.lists, &no_numbers, 0, 1) ? -1 : 1;
    gathered_step_release(&gathered);
    return answer_of(own, done);
}

PyDoc_STRVAR(rho_doc,
"rho(p)\n"
"--\n"
"\n"
"(p - 2) / (p - 1), the exponent of the update (arXiv:2606.02078, eq 20): 0 at p = 2, 1 at\n"
"math.inf. Raises ValueError for p < 2 or NaN.");

static PyObject *rho(PyObject *module, PyObject *object)
{
    double p = 0.0;
    (void)module;
    if (read_double("rho", "p", object, &p))
        return NULL;
    if (!(p >= 2.0)) {
        refuse_value("p value", p);
        return NULL;
    }
    return PyFloat_FromDouble(lpsgd_rho(p));
}

PyDoc_STRVAR(cosine_p_doc,
"cosine_p(s, total, p_max, p_min=2.0)\n"
"--\n"
"\n"
"p of the cosine schedule at epoch or step s = 1 ... total (arXiv:2606.02078, eq 19)::\n"
"\n"
"    p_min + (p_max - p_min) * (1 + cos(pi * (s - 1) / (total - 1))) / 2\n"
"\n"
"Exactly p_max at s = 1 and p_min from s = total on; total = 1 has p_max at s = 1. Fractions are\n"
"allowed. Raises ValueError unless s >= 1, total >= 1 and 2 <= p_max, p_min, all finite.");

static PyObject *cosine_p(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"s", "total", "p_max", "p_min", NULL};
    PyObject *object[4] = {NULL};
    double value[4] = {0.0, 0.0, 0.0, 2.0};
    (void)module;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOO|O:cosine_p", names, &object[0], &object[1],
                                     &object[2], &object[3]))
        return NULL;
    for (int i = 0; i < 4; i++) {
        const double least = i < 2 ? 1.0 : 2.0;
        if (read_double("cosine_p", names[i], object[i], &value[i]))
            return NULL;
        if (!(value[i] >= least && value[i] < Py_HUGE_VAL)) {
            refuse_value(names[i], value[i]);
            return NULL;
        }
    }
    return PyFloat_FromDouble(lpsgd_cosine_p(value[0], value[1], value[2], value[3]));
}

PyDoc_STRVAR(cpu_capability_doc,
"cpu_capability()\n"
"--\n"
"\n"
"The instruction set that steps run on: 'default', 'avx2' or 'avx512'. The best that the CPU has,\n"
"lowered by the environment variable LPSGD_CPU_CAPABILITY, which is read when the module is\n"
"imported. Every one gives the same bits (float64 aside).");

static PyObject *cpu_capability(PyObject *module, PyObject *unused)
{
    (void)module, (void)unused;
    return PyUnicode_FromString(lpsgd_cpu_capability());
}

PyDoc_STRVAR(cuda_refusal_doc,
"cuda_refusal(device)\n"
"--\n"
"\n"
"None if steps can run on the CUDA device of this index, else why they cannot: the driver's own\n"
"words, that this build has no CUDA kernels, or in what their bits differ from the CPU's. Loads the\n"
"driver and the kernels, and compares each once, but not while PyTorch's current stream there is\n"
"captured in a graph, nor with LPSGD_CUDA_CHECK=0 in the environment.");

static PyObject *cuda_refusal(PyObject *module, PyObject *object)
{
    const torch_api *torch = &state_of(module)->torch;
    const long number = PyLong_AsLong(object);
    if (number == -1 && PyErr_Occurred())
        return NULL;
    const int device = number < -1 || number > INT_MAX ? -1 : (int)number;
    void *stream = NULL;
    if (lpsgd_cuda_version() && device >= 0 && get_stream(torch, device, &stream))
        PyErr_Clear(); /* the driver will say what is wrong with the device */
    if (lpsgd_cuda_prepare(device, stream, NULL) == LPSGD_OK)
        return Py_NewRef(Py_None);
    return PyUnicode_FromString(lpsgd_cuda_error());
}

PyDoc_STRVAR(cuda_scratch_size_doc,
"cuda_scratch_size()\n"
"--\n"
"\n"
"The least number of elements of the argument `scratch` of `lpsgd_` and `lpsgdm_`.");

static PyObject *cuda_scratch_size(PyObject *module, PyObject *unused)
{
    (void)module, (void)unused;
    return PyLong_FromLongLong(lpsgd_cuda_scratch_size());
}

PyDoc_STRVAR(build_info_doc,
"build_info()\n"
"--\n"
"\n"
"How this binary was built, as a dict: 'version', 'compiler', 'openmp' (False: every step runs in\n"
"one thread), 'cuda' (the version of CUDA that made the kernels, as '13.0'; None: CUDA tensors take\n"
"PyTorch's operations) and 'cuda_architectures' (what they are for, as 'sm_90 compute_90').");

static PyObject *build_info(PyObject *module, PyObject *unused)
{
    (void)module, (void)unused;
    const int cuda = lpsgd_cuda_version();
    char cuda_text[32];
    PyOS_snprintf(cuda_text, sizeof cuda_text, "%d.%d", cuda / 1000, cuda % 1000 / 10);
    return Py_BuildValue("{s:s,s:s,s:O,s:z,s:s}", "version", LPSGD_VERSION, "compiler",
#ifdef __clang__
                         __VERSION__,
#else
                         "GCC " __VERSION__,
#endif
                         "openmp", lpsgd_has_openmp() ? Py_True : Py_False, "cuda",
                         cuda ? cuda_text : NULL, "cuda_architectures", lpsgd_cuda_architectures());
}

static PyMethodDef methods[] = {
    {"lpsgd_", (PyCFunction)(void (*)(void))lpsgd, METH_VARARGS | METH_KEYWORDS, lpsgd_doc},
    {"lpsgdm_", (PyCFunction)(void (*)(void))lpsgdm, METH_VARARGS | METH_KEYWORDS, lpsgdm_doc},
    {"step_param_groups", step_param_groups, METH_VARARGS, step_param_groups_doc},
    {"step_param", step_param, METH_VARARGS, step_param_doc},
    {"rho", rho, METH_O, rho_doc},
    {"cuda_refusal", cuda_refusal, METH_O, cuda_refusal_doc},
    {"cuda_scratch_size", cuda_scratch_size, METH_NOARGS, cuda_scratch_size_doc},
    {"cosine_p", (PyCFunction)(void (*)(void))cosine_p, METH_VARARGS | METH_KEYWORDS, cosine_p_doc},
    {"cpu_capability", cpu_capability, METH_NOARGS, cpu_capability_doc},
    {"build_info", build_info, METH_NOARGS, build_info_doc},
    {NULL, NULL, 0, NULL},
};

/* A wish that was not fulfilled is said, as PyTorch does for ATEN_CPU_CAPABILITY. */
static int choose_capability(void)
{
    const char *wish = getenv("LPSGD_CPU_CAPABILITY"), *got = lpsgd_cpu_capability();
    if (!wish || !*wish || strcmp(wish, got) == 0)
        return 0;
    return PyErr_WarnFormat(PyExc_RuntimeWarning, 1,
                            "ignoring LPSGD_CPU_CAPABILITY=%s, which is not one of default, avx2, "
                            "avx512 or not supported by this CPU; using %s",
                            wish, got);
}

PyDoc_STRVAR(cuda_error_doc,
"The CUDA driver refused a launch after everything had been checked. Of a step of more than 500\n"
"tensors a part may have been made.");

static int add_cuda_error(PyObject *module)
{
    module_state *own = state_of(module);
    own->cuda_error = PyErr_NewExceptionWithDoc("lpsgd_ext.CudaError", cuda_error_doc,
                                                PyExc_RuntimeError, NULL);
    return own->cuda_error ? PyModule_AddObjectRef(module, "CudaError", own->cuda_error) : -1;
}

/* `import torch` in a second interpreter of the process crashes. (Py_mod_multiple_interpreters would
 * say this too, but CPython 3.10 and 3.11 refuse a module that has it.) */
static int refuse_subinterpreter(void)
{
    const int64_t id = PyInterpreterState_GetID(PyInterpreterState_Get());
    if (id > 0)
        PyErr_SetString(PyExc_ImportError,
                        "lpsgd_ext cannot be imported in a sub-interpreter, nor can PyTorch");
    return id ? -1 : 0;
}

static int module_exec(PyObject *module)
{
    module_state *own = state_of(module);
    const int failed = refuse_subinterpreter() || torch_api_load(&own->torch) ||
                       attribute_names_make(&own->names) || add_cuda_error(module) ||
                       choose_capability();
    return failed ? -1 : 0;
}

/* Applies X to every object of the state. */
#define STATE_OBJECTS(own)                                                                         \
    X((own)->torch.tensor_type)                                                                    \
    X((own)->torch.parameter_type)                                                                 \
    X((own)->torch.is_neg.object)                                                                  \
    X((own)->torch.is_inference.object)                                                            \
    X((own)->torch.is_inference_mode_enabled)                                                      \
    X((own)->torch.untyped_storage.object)                                                         \
    X((own)->torch.storage_offset.object)                                                          \
    X((own)->torch.increment_version)                                                              \
    X((own)->torch.get_num_threads)                                                                \
    X((own)->torch.float32)                                                                        \
    X((own)->torch.bfloat16)                                                                       \
    X((own)->torch.float8_e5m2)                                                                    \
    X((own)->cuda_error)

static int module_traverse(PyObject *module, visitproc visit, void *arg)
{
    const module_state *own = state_of(module);
#define X(object) Py_VISIT(object);
    STATE_OBJECTS(own)
#undef X
    return 0;
}

static int module_clear(PyObject *module)
{
    module_state *own = state_of(module);
    remembered_forget(&own->calls);
#define X(object) Py_CLEAR(object);
    STATE_OBJECTS(own)
#define CLEAR_NAME(name) X(own->names.name)
    LPSGD_NAMES(CLEAR_NAME)
#undef CLEAR_NAME
#undef X
    return 0;
}

static void module_free(void *module)
{
    module_clear(module);
}

static PyModuleDef_Slot slots[] = {{Py_mod_exec, (void *)(uintptr_t)module_exec}, {0, NULL}};

static PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "lpsgd_ext",
    .m_doc = PyDoc_STR("LPSGD and LPSGDM steps on PyTorch tensors, in C (arXiv:2606.02078)."),
    .m_size = sizeof(module_state),
    .m_methods = methods,
    .m_slots = slots,
    .m_traverse = module_traverse,
    .m_clear = module_clear,
    .m_free = module_free,
};

PyMODINIT_FUNC PyInit_lpsgd_ext(void)
{
    return PyModuleDef_Init(&definition);
}
