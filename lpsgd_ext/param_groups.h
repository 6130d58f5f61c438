/* SPDX-License-Identifier: MIT
 *
 * param_groups.h: from an optimizer's param_groups and state to lists of tensors.
 */
#ifndef LPSGD_PARAM_GROUPS_H
#define LPSGD_PARAM_GROUPS_H

#include "tensor_lists.h"
#include "torch_api.h"

/* The names by which groups, states and parameters are asked. */
#define LPSGD_NAMES(X)                                                                             \
    X(params) X(grad) X(momentum_buffer)                                                           \
    X(lr) X(p) X(momentum) X(weight_decay) X(eps) X(pivot) X(maximize) X(momentum_dtype)           \
    X(fused) X(foreach) X(differentiable) X(capturable)                                            \
    X(momentum_exponent) X(stochastic_rounding) X(seed) X(rounding_step)                           \
    X(float32) X(bfloat16) X(float8_e5m2)

typedef struct attribute_names {
#define LPSGD_NAME(name) PyObject *name;
    LPSGD_NAMES(LPSGD_NAME)
#undef LPSGD_NAME
} attribute_names;

/* Returns 0, or -1 with an exception. */
int attribute_names_make(attribute_names *names);

/* Reads a momentum_dtype, which is None, a torch.dtype or its name, into the section. Returns 1, or 0
 * for anything else. */
int momentum_dtype_read(const torch_api *torch, const attribute_names *names, PyObject *value,
                        param_section *section);

/* A group whose steps are counted, since they are rounded at random. Owns both. */
typedef struct step_count {
    PyObject *group, *next; /* the number of its next step; NULL: it is not counted */
} step_count;

/* What a step of an optimizer takes. */
typedef struct gathered_step {
    tensor_lists lists;
    param_section *sections; /* one for each group, as are the counts */
    step_count *counts;
    uint64_t *streams; /* the number of each parameter among those of all groups */
} gathered_step;

/* Gathers the parameters that have a gradient, their gradients and, unless `state` is NULL, their
 * momentum buffers, as torch.optim does, into `to`, whose lists have their names. `observed`: C may
 * step a group only if that has fused=True.
 *
 * Returns 1; 0 for whatever takes more than a look: a number that is no float, a parameter without
 * a state, an option that C does not serve; or -1 with an exception. In each case the caller calls
 * gathered_step_release. */
int param_groups_gather(const torch_api *torch, const attribute_names *names,
                        PyObject *param_groups, PyObject *state, int observed, gathered_step *to);

/* The same for one parameter of the group, whose number among those of all groups this is. Its step is
 * not counted. */
int param_gather(const torch_api *torch, const attribute_names *names, PyObject *param,
                 PyObject *group, PyObject *state, int observed, Py_ssize_t number,
                 gathered_step *to);

/* Counts the step, once it is made. Returns 0, or -1 with an exception. */
int gathered_step_count(const attribute_names *names, const gathered_step *step);

void gathered_step_release(gathered_step *step);

#endif
