# SPDX-License-Identifier: MIT
"""The schedules of p."""

import functools
import math
import warnings
from collections.abc import Callable
from functools import partial
from types import FunctionType
from typing import Any, ParamSpec, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.optim.lr_scheduler import EPOCH_DEPRECATION_WARNING, LRScheduler
from torch.optim.optimizer import Optimizer
from torch.utils.hooks import RemovableHandle

import lpsgd_ext

from ._unusual import changes_nothing

_P = ParamSpec("_P")
_R = TypeVar("_R")

# Every optimizer's one hook, that of the schedule made last.
_hooks: WeakKeyDictionary[Optimizer, RemovableHandle] = WeakKeyDictionary()


def _note_step(calls: dict[str, bool], *hook_arguments: Any) -> None:
    calls["optimizer.step"] = True


def _innermost(optimizer: Optimizer) -> Optimizer:
    """The optimizer itself, not Accelerate's wrapper around it, which calls no hooks."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"{type(optimizer).__name__} is not an Optimizer")
    return optimizer


def _clock(optimizer: Optimizer) -> int | None:
    """The number of steps of the schedule so far, which the groups have in common."""
    groups = optimizer.param_groups
    return next((group["p_last_epoch"] for group in groups if "p_last_epoch" in group), None)


def _values(optimizer: Optimizer, name: str) -> list[Any]:
    values = [group[name] for group in optimizer.param_groups]
    return [value.clone() if isinstance(value, Tensor) else value for value in values]


def _outside_of_graphs(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """As torch.compiler.disable, but torch._dynamo is imported by a compiled call alone: that takes
    most of a second."""

    @functools.wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        if torch.compiler.is_compiling():
            disabled: Callable[_P, _R] = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
            return disabled(*args, **kwargs)
        return function(*args, **kwargs)

    return call


class _PScheduler(LRScheduler):
    """What the schedules share. A subclass says in `_get_p` what p is.

    It is an LRScheduler for the frameworks that accept nothing else. The constructor of that class
    is not called: it would take over lr, and it keeps the clock in the scheduler.
    """

    # Apart from the other attributes, so that a hook can have these without the optimizer.
    __slots__ = ("optimizer",)

    every_step: bool

    def __init__(self, optimizer: Optimizer, last_epoch: int, every_step: bool) -> None:
        optimizer = _innermost(optimizer)
        if not last_epoch >= -1:
            raise ValueError(f"Invalid last_epoch: {last_epoch}")
        for i, group in enumerate(optimizer.param_groups):
            if "p" not in group:
                raise ValueError(f"param_groups[{i}] has no p to schedule")
            if last_epoch >= 0 and "initial_p" not in group:
                raise KeyError(
                    f"param 'initial_p' is not specified in param_groups[{i}] "
                    "when resuming scheduler with last_epoch >= 0."
                )
        self.optimizer = optimizer
        self.every_step = every_step
        self._step_count = 1  # as after the constructor of LRScheduler
        # Not an attribute of the optimizer, as torch has it: a compiled step would not set that.
        self._calls = {"optimizer.step": False}
        self._set_p(optimizer, self.last_epoch if last_epoch == -1 else last_epoch + 1)
        self._attach()

    def _attach(self) -> None:
        """Makes this the schedule of the optimizer: one that drove itself does so no more."""
        if self.optimizer in _hooks:
            _hooks[self.optimizer].remove()
        hook: Callable[..., None] = partial(_note_step, self._calls)
        if self.every_step:
            # The optimizer keeps what drives p. It must not keep itself alive through that.
            driver = object.__new__(type(self))
            driver.__dict__ = self.__dict__
            hook = driver._drive
        if not hasattr(self.optimizer, "_optimizer_step_post_hooks"):
            # An Optimizer whose constructor was never called, such as torchao's for offloading.
            if self.every_step:
                raise TypeError(f"{type(self.optimizer).__name__} has no hooks for every_step=True")
            self._calls["optimizer.step"] = True
            return
        # Once more: timm's Lookahead has hooks, but nothing calls them before Optimizer does this.
        self.optimizer._patch_step_function()
        _hooks[self.optimizer] = self.optimizer.register_step_post_hook(hook)

    @_outside_of_graphs
    def _drive(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[Any, Any]) -> None:
        # A fused optimizer is told by GradScaler that it has to skip the step.
        if not getattr(optimizer, "found_inf", False) and not changes_nothing(optimizer):
            self._advance(optimizer)

    # torch.compile would compile anew for every value of the clock.
    @_outside_of_graphs
    def _advance(self, optimizer: Optimizer, epoch: int | None = None) -> None:
        count = self._step_count + 1  # first: a loaded one may be no number
        self._set_p(optimizer, (_clock(optimizer) or 0) + 1 if epoch is None else epoch)
        self._step_count = count

    def _get_p(self, epoch: int, initial_p: list[float]) -> list[float]:
        """Every group's p after `epoch` steps."""
        raise NotImplementedError

    def _set_p(self, optimizer: Optimizer, epoch: int) -> None:
        groups = optimizer.param_groups
        initial_p = [
            group["initial_p"] if "initial_p" in group else float(group["p"]) for group in groups
        ]
        # A group added later joins when the clock moves, not when a schedule is made or loaded.
        joins = epoch != _clock(optimizer)
        # Nothing has been written so far, so that a p out of range leaves the groups as they are.
        for group, initial, p in zip(groups, initial_p, self._get_p(epoch, initial_p), strict=True):
            if not joins and "p_last_epoch" not in group:
                continue
            group["initial_p"] = initial
            group["p_last_epoch"] = epoch
            if isinstance(group["p"], Tensor):
                group["p"].fill_(p)
            else:
                group["p"] = p

    @property
    def last_epoch(self) -> int:  # type: ignore[override]
        """The number of steps so far. The groups hold it."""
        return _clock(self.optimizer) or 0

    def step(self, epoch: int | None = None) -> None:
        """Moves every group's `p` one on. Call it after `optimizer.step()`.

        Args:
            epoch: deprecated as in torch: the number of steps to go to.

        Raises:
            RuntimeError: for a schedule with `every_step=True`.
        """
        name = type(self).__name__
        if self.every_step:
            raise RuntimeError(
                f"`{name}.step()` must not be called with every_step=True: "
                "the schedule moves on by itself after every `optimizer.step()`."
            )
        if self._step_count == 1 and not self._calls["optimizer.step"]:
            warnings.warn(
                f"Detected call of `{name}.step()` before `optimizer.step()`. You should call them "
                f"in the opposite order: `optimizer.step()` before `{name}.step()`. Failure to do "
                "this will result in skipping the first value of the schedule of p. See more "
                "details at https://pytorch.org/docs/stable/optim.html#how-to-adjust-learning-rate",
                UserWarning,
                stacklevel=2,
            )
        if epoch is not None:
            warnings.warn(EPOCH_DEPRECATION_WARNING, UserWarning, stacklevel=2)
        self._advance(self.optimizer, epoch)

    def get_last_p(self) -> list[float | Tensor]:
        """Every group's `p` as it is now."""
        return _values(self.optimizer, "p")

    def get_last_lr(self) -> list[float | Tensor]:
        """Every group's `lr` as it is now. A schedule of p does not change it."""
        return _values(self.optimizer, "lr")

    get_lr = get_last_lr

    def state_dict(self) -> dict[str, Any]:
        """Everything but the optimizer, whose own state_dict resumes a schedule by itself."""
        state = {**self.__dict__, "last_epoch": self.last_epoch}
        del state["every_step"], state["_calls"]
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from a `state_dict`, also with the optimizer's `p`."""
        state = {**state_dict}
        last_epoch = state.pop("last_epoch")
        before = {**self.__dict__}
        self.__dict__.update(state)
        try:
            self._set_p(self.optimizer, last_epoch)
        except BaseException:
            self.__dict__.clear()
            self.__dict__.update(before)
            raise

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "optimizer": self.optimizer}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)
        self._attach()


class CosineAnnealingP(_PScheduler):
    r"""Takes the `p` of every group from its value to `p_min` along a cosine.

    After k calls of `step`, a group's `p` is :math:`p_{k+1}` (arXiv:2606.02078, eq 19):

    .. math::
        p_s = p_{min} + (p_{max} - p_{min}) \cdot (1 + \cos(\pi (s - 1) / (S - 1))) / 2

    with S = `total_iters` and :math:`p_{max}` the group's `p` when the schedule is made, which is
    kept in the group as `initial_p`. It stays at `p_min` after the last. Call `step` once per epoch
    or once per optimizer step, after `optimizer.step()`.

    k is kept in the group too, as `p_last_epoch`. So the optimizer's state_dict alone resumes the
    schedule, loaded before or after the schedule is made. A group added later joins the others at
    the next step: its `p` is then as far on the way from its own value as theirs. If that is
    infinite, there is no way: the schedule's step raises, which with `every_step=True` comes after
    the optimizer's.

    Args:
        optimizer: an optimizer whose groups have a `p`, finite and :math:`\geq 2`.
        total_iters: S, the number of epochs or steps, :math:`\geq 1`.
        p_min: the last value, finite and :math:`\geq 2`.
        last_epoch: the index of the last epoch that is over; the groups must have `initial_p`. -1
            goes on where the groups are, which is the start if they were never scheduled.
        every_step: the schedule moves on by itself after every `optimizer.step()`, except those
            that GradScaler skips. `step` must not be called then, and the schedule need not be
            kept. A schedule made later for the same optimizer takes its place.

    Raises:
        ValueError, TypeError, KeyError: for arguments out of range.

    Example:
        >>> import torch
        >>> from lpsgd import LPSGD
        >>> optimizer = LPSGD([torch.nn.Parameter(torch.zeros(1))], p=6.0)
        >>> schedule = CosineAnnealingP(optimizer, total_iters=3)
        >>> for _ in range(4):
        ...     print(schedule.get_last_p())
        ...     optimizer.step()
        ...     schedule.step()
        [6.0]
        [4.0]
        [2.0]
        [2.0]
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_iters: int,
        p_min: float = 2.0,
        last_epoch: int = -1,
        *,
        every_step: bool = False,
    ) -> None:
        if not total_iters >= 1:
            raise ValueError(f"Invalid total_iters: {total_iters}")
        self.total_iters = total_iters
        self.p_min = p_min
        super().__init__(optimizer, last_epoch, every_step)

    def _get_p(self, epoch: int, initial_p: list[float]) -> list[float]:
        for i, p in enumerate(initial_p):
            if not 2.0 <= p < math.inf:
                raise ValueError(f"param_groups[{i}] has p = {p}, which has no cosine")
        return [lpsgd_ext.cosine_p(epoch + 1, self.total_iters, p, self.p_min) for p in initial_p]


class LambdaP(_PScheduler):
    r"""Sets the `p` of every group to a function of the number of steps.

    Args:
        optimizer: an optimizer whose groups have a `p`.
        p_lambda: a function that takes k, the number of calls of `step` so far, and returns `p`
            itself, :math:`2 \leq p \leq \infty`; or a list of such functions, one for each group.
            A group added later takes the last of them.

    The other arguments, and all that is said about `step`, resuming and groups added later, are
    those of :class:`CosineAnnealingP`.

    Raises:
        ValueError, TypeError, KeyError: for arguments out of range. `step` raises them too, for
            what `p_lambda` returns; then no group has changed.

    Example:
        >>> import torch
        >>> from lpsgd import LPSGD
        >>> optimizer = LPSGD([torch.nn.Parameter(torch.zeros(1))])
        >>> schedule = LambdaP(optimizer, lambda k: float("inf") if k < 2 else 2.0)
        >>> for _ in range(4):
        ...     print(schedule.get_last_p())
        ...     optimizer.step()
        ...     schedule.step()
        [inf]
        [inf]
        [2.0]
        [2.0]
    """

    def __init__(
        self,
        optimizer: Optimizer,
        p_lambda: Callable[[int], float] | list[Callable[[int], float]],
        last_epoch: int = -1,
        *,
        every_step: bool = False,
    ) -> None:
        count = len(_innermost(optimizer).param_groups)
        self.p_lambdas = (
            list(p_lambda) if isinstance(p_lambda, list | tuple) else [p_lambda] * count
        )
        if len(self.p_lambdas) != count:
            raise ValueError(f"Expected {count} p_lambdas, but got {len(self.p_lambdas)}")
        super().__init__(optimizer, last_epoch, every_step)

    def _get_p(self, epoch: int, initial_p: list[float]) -> list[float]:
        last = len(self.p_lambdas) - 1
        values = [float(self.p_lambdas[min(i, last)](epoch)) for i in range(len(initial_p))]
        for p in values:
            if not p >= 2.0:
                raise ValueError(f"Invalid p value: {p}")
        return values

    def state_dict(self) -> dict[str, Any]:
        """Everything but the optimizer and functions. Of other callables it has the attributes."""
        state = super().state_dict()
        state["p_lambdas"] = [
            None if isinstance(function, FunctionType) else {**getattr(function, "__dict__", {})}
            for function in self.p_lambdas
        ]
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from a `state_dict`, also with the optimizer's `p`."""
        state = {**state_dict}
        for function, attributes in zip(self.p_lambdas, state.pop("p_lambdas"), strict=False):
            if attributes:
                vars(function).update(attributes)
        super().load_state_dict(state)
