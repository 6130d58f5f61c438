# SPDX-License-Identifier: MIT
"""Steps that are made parameter by parameter: in backward, or by the hand of a trainer."""

import gc
import weakref
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from ._native import lpsgd_ext
from ._unusual import Part, observed, unusual_part
from ._values import rounds_at_random

if TYPE_CHECKING:
    from ._base import LPOptimizer


class Parts:
    """What of the running step of an optimizer has been made, and the hooks that make it, if
    gradients are released."""

    def __init__(self, optimizer: "LPOptimizer", accumulate: int = 1, mean: bool = True) -> None:
        self._optimizer = weakref.ref(optimizer)
        self.accumulate = accumulate  # how many gradients of a parameter make a step
        self.divisor = accumulate if mean else 1
        # How many of them have been taken, by the indices of the group and of the parameter in it.
        self.taken: dict[tuple[int, int], int] = {}
        self.moved = False  # whether the step that ended last had any part
        self.released = False
        self._has_momentum = "momentum" in optimizer._HYPER
        self._hooks: list[RemovableHandle] = []
        self._engines: list[Any] | None = None  # that reduce gradients; None: not looked for yet
        self._waits = False  # for the end of a backward, with its reductions

    @property
    def optimizer(self) -> "LPOptimizer":
        optimizer = self._optimizer()
        if optimizer is None:
            raise ReferenceError("gradients were released for an optimizer that is gone")
        return optimizer

    # One parameter.

    def take(self, param: Tensor, i: int, j: int, is_last: bool = False) -> None:
        """Steps the parameter of these indices by its gradient, if that is the last one or
        `is_last`; else its momentum takes it. Where it raises, nothing has changed."""
        optimizer, taken = self.optimizer, self.taken.get((i, j), 0)
        groups, number = optimizer.param_groups, j
        for before in groups[:i]:
            number += len(before["params"])
        state = optimizer.state if self._has_momentum else None
        momentum_only = taken + 1 < self.accumulate and not is_last
        usual = param, groups[i], state, observed(), number, self.divisor, taken, momentum_only
        if not lpsgd_ext.step_param(*usual):
            part = Part(number, self.divisor, taken, momentum_only)
            unusual_part(optimizer, groups[i], param, part, partial(lpsgd_ext.step_param, *usual))
        self.taken[i, j] = taken + 1

    def take_and_free(self, i: int, j: int, param: Tensor) -> None:
        """The hook of a parameter, whose gradient is complete."""
        if self._engines is None:
            self._engines = _engines_of(self.optimizer)
        if self._engines:
            self._wait_for_engines()
        else:
            self._take_and_free(i, j, param)

    def _take_and_free(self, i: int, j: int, param: Tensor) -> None:
        if self.taken.get((i, j), 0) == self.accumulate:
            param.grad = None
            raise RuntimeError(
                f"a parameter got another gradient after the {self.accumulate} that "
                "release_gradients() was told of: optimizer.step() has to come first"
            )
        self.take(param, i, j)
        param.grad = None

    def _wait_for_engines(self) -> None:
        """DDP reduces gradients after the hooks of their parameters, and puts them in their places
        in a callback at the end of backward, in front of those that callbacks ask for."""
        if not all(engine.require_backward_grad_sync for engine in self._engines or ()):
            raise RuntimeError(
                "no_sync() cannot be used with released gradients, which every process would take "
                "for itself: let each backward reduce them"
            )
        if not self._waits:
            self._waits = True
            queue = torch.autograd.Variable._execution_engine.queue_callback
            queue(partial(queue, self._take_and_free_all))

    def _take_and_free_all(self) -> None:
        self._waits = False
        for i, group in enumerate(self.optimizer.param_groups):
            for j, param in enumerate(group["params"]):
                if param.grad is not None:
                    self._take_and_free(i, j, param)

    def step_by_hand(self, param: Tensor, i: int, j: int) -> None:
        if self.released:
            raise RuntimeError("step_parameter() cannot be used with released gradients")
        if param.grad is not None:
            if (i, j) in self.taken:
                self.drop()
            self.take(param, i, j)

    # The whole step.

    def check_step(self, closure: Any) -> None:
        """Raises where a step cannot end."""
        if not self.released:
            return
        if closure is not None:
            raise RuntimeError("step() takes no closure while gradients are released in backward")
        values = self.optimizer.__dict__
        if values.get("grad_scale") is not None or values.get("found_inf") is not None:
            for name in ("grad_scale", "found_inf"):  # GradScaler would delete them
                values.pop(name, None)
            raise RuntimeError(
                "GradScaler cannot be used with released gradients, which have been stepped before "
                "it could look at them: train in bfloat16, or without it"
            )

    def end(self) -> None:
        """Ends the step: parameters that got fewer gradients than there are micro-batches move."""
        for (i, j), taken in list(self.taken.items()):
            if taken < self.accumulate:
                param = self.optimizer.param_groups[i]["params"][j]
                kept, param.grad = param.grad, torch.zeros_like(param)
                try:
                    self.take(param, i, j, is_last=True)
                finally:
                    param.grad = kept
                self.taken[i, j] = self.accumulate
        self.drop()

    def drop(self) -> None:
        """Forgets the running step, but counts what it has rounded: that stays as it is."""
        self.moved = bool(self.taken)
        for i in {i for i, _ in self.taken}:
            group = self.optimizer.param_groups[i]
            if rounds_at_random(group):
                group["rounding_step"] = group.get("rounding_step", 0) + self.accumulate
        self.taken.clear()
        self._waits = False

    # Hooks.

    def attach(self, i: int) -> None:
        """Releases the gradients of a group, if those of the others are."""
        for j, param in enumerate(self.optimizer.param_groups[i]["params"] * self.released):
            if not (param.is_floating_point() or param.is_complex()):
                continue
            requires_grad = param.requires_grad
            param.requires_grad_()  # or PyTorch would refuse the hook, which waits for that
            hook = partial(self.take_and_free, i, j)
            self._hooks.append(param.register_post_accumulate_grad_hook(hook))
            param.requires_grad_(requires_grad)

    def detach(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self.released = False


def _engines_of(optimizer: "LPOptimizer") -> list[Any]:
    """The DistributedDataParallel around parameters of the optimizer. They do not know of it."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return []
    cls = torch.nn.parallel.DistributedDataParallel
    params = {id(param) for group in optimizer.param_groups for param in group["params"]}
    engines = [one for one in gc.get_objects() if issubclass(type(one), cls)]
    return [one for one in engines if not params.isdisjoint(map(id, one.parameters()))]
