# SPDX-License-Identifier: MIT
"""The step as torch.compile sees it: what Dynamo traces, and one custom operation per group."""

import itertools
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import _unusual
from ._unusual import PLAIN_TYPES, Gathered

if TYPE_CHECKING:
    from ._base import LPOptimizer

# Running optimizers by a number that a compiled graph can hold.
_optimizers: weakref.WeakValueDictionary[int, "LPOptimizer"] = weakref.WeakValueDictionary()
_numbers = itertools.count()


def register(optimizer: "LPOptimizer") -> int:
    """The number by which graphs find the optimizer."""
    number = next(_numbers)
    _optimizers[number] = optimizer
    return number


def running() -> "list[LPOptimizer]":
    """Every optimizer there is."""
    return list(_optimizers.values())


def traced_step(optimizer: "LPOptimizer") -> None:
    """Makes a step in a way that Dynamo can trace."""
    # By any other way to the groups Dynamo would guard on all their values, lr and p included.
    groups = vars(optimizer)["param_groups"]
    # A graph writes to each tensor by itself, and has no place for parts of a step.
    if optimizer._parts is not None or optimizer._shares_memory():
        torch.compiler.disable(optimizer._eager_step)()  # type: ignore[no-untyped-call]
        return
    # All gradients come before any state: Dynamo guards on the identity of what it reaches
    # through the keys of the state.
    streams: list[list[int]] = []
    lists: list[tuple[list[Tensor], list[Tensor]]] = []
    first = 0
    for group in groups:
        params = [param for param in group["params"] if param.grad is not None]
        if any(type(param) not in PLAIN_TYPES for param in params):  # DTensors have no rule
            torch.compiler.disable(optimizer._eager_step)()  # type: ignore[no-untyped-call]
            return
        lists.append((params, [param.grad for param in params]))
        numbered = enumerate(group["params"], first)
        streams.append([i for i, param in numbered if param.grad is not None])
        first += len(group["params"])
    grad_mode = torch.is_grad_enabled()
    # With autograd Inductor would step copies, and copy them back outside of its graph.
    with torch.no_grad():
        for i, (params, grads) in enumerate(lists):
            if params:
                buffers = optimizer._traced_buffers(groups[i], params)
                step = _capturable_step if groups[i]["capturable"] else _compiled_step
                step(params, grads, buffers, streams[i], optimizer._number, i, grad_mode)


def _step_group(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    streams: Sequence[int],
    optimizer: int,
    group: int,
    grad_mode: bool,
) -> None:
    """The step of one group, which runs when the graph does. lr, p and the like are read from the
    group then, so that no graph depends on them."""
    lists = [list(params), list(grads), list(momentum_buffers)]
    if not momentum_buffers:
        del lists[2]
    self = _optimizers[optimizer]
    try:
        if not self.param_groups[group]["capturable"]:
            _unusual.check_capture(self)
        if not _unusual.has_found_inf(self):
            gathered = Gathered(self.param_groups[group], lists, list(streams))
            for call in _unusual.prepare(self, [gathered]):
                call()
    except BaseException:
        torch.set_grad_enabled(grad_mode)  # a graph that raises does not come to its end
        raise


def _step_op(name: str, tags: Sequence[torch.Tag]) -> Callable[..., None]:
    operation = torch.library.custom_op(
        name, _step_group, mutates_args=("params", "momentum_buffers"), tags=tags
    )
    operation.register_fake(lambda *args: None)
    return operation


# A CUDA graph of Inductor's (mode="reduce-overhead") would keep the lr and p of its capture for
# good. What has this tag stays outside of it.
_OUTSIDE_OF_CUDA_GRAPHS = (torch.Tag.cudagraph_unsafe,)
_compiled_step = _step_op("lpsgd::step_", _OUTSIDE_OF_CUDA_GRAPHS)
_capturable_step = _step_op("lpsgd::capturable_step_", ())


def new_buffer(param: Tensor, dtype: torch.dtype) -> Tensor:
    """A momentum buffer."""
    return torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)


# The same as a graph calls it: in a CUDA graph it would lie in memory that the next graph may take.
traced_new_buffer = torch.library.custom_op(
    "lpsgd::new_buffer", new_buffer, mutates_args=(), tags=_OUTSIDE_OF_CUDA_GRAPHS
)
traced_new_buffer.register_fake(new_buffer)
