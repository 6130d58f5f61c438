# SPDX-License-Identifier: MIT
"""Gradients that are stepped and freed in backward."""

from torch.optim.optimizer import Optimizer

from ._base import LPOptimizer
from ._parts import Parts
from ._schedule import innermost
from ._values import check_integer


class ReleasedGradients:
    """What `release_gradients` returns."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    def remove(self) -> None:
        """Lets backward leave gradients to `optimizer.step()` again.

        Raises:
            RuntimeError: between a backward and the step that ends with it.
        """
        parts = self._parts
        if not parts.released:
            return
        if parts.taken:
            raise RuntimeError("remove() cannot come before the optimizer.step() of a backward")
        parts.detach()
        optimizer = parts.optimizer
        optimizer._parts = None
        if not optimizer.defaults["fused"]:
            del optimizer._step_supports_amp_scaling


def release_gradients(
    optimizer: Optimizer, accumulate: int = 1, *, mean: bool = True
) -> ReleasedGradients:
    r"""Lets backward step every parameter as soon as its gradient is complete, and free the
    gradient, so that memory never holds all of them.

    `optimizer.step()` then only ends the step, for hooks and schedules. Parameters have the bits
    that they would have without. With `accumulate` = K, the gradients of K calls of backward are
    summed within the momentum, without a buffer: the first one makes it
    :math:`\beta m + (1 - \beta) / K \cdot g`, the others add :math:`(1 - \beta) / K \cdot g`, and
    the last one moves the parameter. That is the step by the mean of the K gradients, up to
    rounding.

    Args:
        optimizer: an LPSGD or LPSGDM, or what a framework has wrapped around one. Of its options,
            `differentiable` and `capturable` are excluded.
        accumulate: K, how often backward is called for each `optimizer.step()`. More than 1 needs
            LPSGDM (with momentum=0 it is LPSGD).
        mean: the step is by the mean of the K gradients. False: by their sum, for loops that divide
            the loss by K.

    Returns:
        A handle, whose `remove()` undoes it.

    Raises:
        ValueError, TypeError, RuntimeError: for what it cannot be combined with; then nothing has
            changed. `backward()` raises where a parameter gets more than K gradients before
            `optimizer.step()`, and `step` for a closure and for GradScaler.

    Note:
        A parameter without a gradient in all of the K is not stepped, and one with fewer moves in
        `optimizer.step()`. A backward that is interrupted has stepped the parameters that it has
        come to, and no others; `optimizer.step()` or `optimizer.zero_grad()` ends that step.

    Example:
        >>> import torch
        >>> from lpsgd import LPSGDM
        >>> model = torch.nn.Linear(4, 1)
        >>> optimizer = LPSGDM(model.parameters(), lr=0.01)
        >>> handle = release_gradients(optimizer, accumulate=2)
        >>> for step in range(3):
        ...     for micro_batch in torch.ones(2, 8, 4):
        ...         model(micro_batch).square().mean().backward()
        ...     optimizer.step()
        >>> model.weight.grad is None
        True
    """
    optimizer = innermost(optimizer)
    accumulate = check_integer("accumulate", accumulate, 1)
    if not isinstance(optimizer, LPOptimizer):
        raise TypeError(f"only LPSGD and LPSGDM can do that, not {type(optimizer).__name__}")
    if accumulate > 1 and "momentum" not in optimizer._HYPER:
        raise ValueError(
            "LPSGD has no momentum to sum gradients in: accumulate > 1 needs LPSGDM, which with "
            "momentum=0 is LPSGD"
        )
    if optimizer._parts is not None and optimizer._parts.released:
        raise RuntimeError("this optimizer's gradients are released already")
    listed: set[int] = set()
    for i, group in enumerate(optimizer.param_groups):
        for name in ("differentiable", "capturable"):
            if group[name]:
                raise RuntimeError(f"gradients cannot be released with {name}=True (group {i})")
        for param in group["params"]:
            if id(param) in listed:
                raise RuntimeError(
                    f"a parameter of group {i} is listed twice, but has one gradient"
                )
            listed.add(id(param))
            if getattr(param, "_is_flat_param", False) or getattr(param, "_fsdp_flattened", False):
                raise RuntimeError(
                    "gradients cannot be released with FullyShardedDataParallel, which reduces "
                    "them later: use fully_shard"
                )
            if getattr(param, "_post_accumulate_grad_hooks", None):
                raise RuntimeError(
                    f"a parameter of group {i} has a post-accumulate-grad hook already, which may "
                    "step it, or replace or free its gradient"
                )
            if param.grad is not None:
                raise RuntimeError(
                    f"a parameter of group {i} has a gradient already, which would be part of the "
                    "first step: zero_grad() has to come first"
                )
    parts = Parts(optimizer, accumulate, mean)
    parts.released = True
    optimizer._parts = parts
    optimizer._step_supports_amp_scaling = True  # GradScaler comes to step(), which refuses it
    for i in range(len(optimizer.param_groups)):
        parts.attach(i)
    return ReleasedGradients(parts)
