# SPDX-License-Identifier: MIT
"""A value for `pivot` from what an optimizer sees."""

import math

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from ._eager import BYTE, decoded
from ._schedule import innermost
from ._shards import full
from ._values import momentum_exponent_in


def norm(x: Tensor, order: float = 2.0) -> float:
    """The norm of this order, of a DTensor that of the whole."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return float(full(torch.linalg.vector_norm(x, order, dtype=dtype)))


@torch.no_grad()
def suggest_pivot(optimizer: Optimizer) -> float:
    r"""A `pivot` for this task: the root mean square of what the steps take to a power.

    That is the momentum_buffer of `LPSGDM` (:math:`m` of eq 24) or the gradient of `LPSGD`
    (:math:`g` of eq 21), over all parameters. With it as `pivot`, the steps of p = 2 and of p = inf
    have the same :math:`\ell_2`-length and those between are little shorter: one lr serves every p,
    and a schedule of p no longer shrinks the steps.

    Ask after some dozen steps, when the momentum has settled. The value is for a new training: with
    another `pivot`, lr means another step, except for p = inf.

    Args:
        optimizer: an LPSGD or LPSGDM that has made steps.

    Returns:
        a positive number. A DTensor counts as a whole, so all ranks must ask. Where processes hold
        different plain tensors (FSDP1, ZeRO), each gets a value of its own; they must agree on one.

    Raises:
        TypeError: for another optimizer.
        RuntimeError: if there are no momentum buffers (gradients) yet, or nothing but zeros, or one
            that is not finite.

    Example:
        >>> from lpsgd import LPSGDM
        >>> model = torch.nn.Linear(4, 1)
        >>> optimizer = LPSGDM(model.parameters(), lr=0.001, p=float("inf"))
        >>> for _ in range(30):
        ...     optimizer.zero_grad()
        ...     model(torch.ones(8, 4)).sum().backward()
        ...     optimizer.step()
        >>> round(suggest_pivot(optimizer), 2)  # all gradients are 8
        7.66
    """
    optimizer = innermost(optimizer)
    if not all("pivot" in group for group in optimizer.param_groups):
        raise TypeError(f"suggest_pivot() needs an LPSGD or LPSGDM, not {type(optimizer).__name__}")
    norms, count = [0.0], 0
    for group in optimizer.param_groups:
        for param in group["params"]:
            state = optimizer.state.get(param, {})
            x = state.get("momentum_buffer") if "momentum_dtype" in group else param.grad
            if x is not None:
                x = decoded(x, momentum_exponent_in(group)) if x.dtype == BYTE else x
                x = torch.view_as_real(x.resolve_conj()) if x.is_complex() else x
                norms.append(norm(x))
                count += x.numel()
    length = math.hypot(*norms)
    if not 0.0 < length < math.inf:
        raise RuntimeError(
            "suggest_pivot() needs an optimizer that has made steps, with finite momentum buffers "
            f"(gradients) that are not all zero: their norm is {length}"
        )
    return length / math.sqrt(count)
