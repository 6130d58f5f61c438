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
    X(fused) X(foreach) X(differentiable) X(capturable) X(stochastic_rounding)

typedef struct attribute_names {
#define LPSGD_NAME(name) PyObject *name;
    LPSGD_NAMES(LPSGD_NAME)
#undef LPSGD_NAME
} attribute_names;

/* Returns 0, or -1 with an exception. */
int attribute_names_make(attribute_names *names);

/* Gathers the parameters that have a gradient, their gradients and, unless `state` is NULL, their
 * momentum buffers, as torch.optim does. `sections` has room for each of the groups. `observed`: C
 * may step a group only if that has fused=True.
 *
 * Returns 1; 0 for whatever takes more than a look: a number that is no float, a parameter without
 * a state, an option that C does not serve; or -1 with an exception. In each case the caller
 * releases the tuples of `lists`. */
int param_groups_gather(const torch_api *torch, const attribute_names *names,
                        PyObject *param_groups, PyObject *state, int observed, tensor_lists *lists,
                        param_section *sections);

#endif
