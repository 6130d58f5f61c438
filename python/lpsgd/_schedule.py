# SPDX-License-Identifier: MIT
"""The schedules of p."""

import functools
import math
import warnings
from collections.abc import Callable, Iterable
from types import FunctionType
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.optim.lr_scheduler import EPOCH_DEPRECATION_WARNING, LRScheduler
from torch.optim.optimizer import Optimizer

from ._native import lpsgd_ext
from ._unusual import changes_nothing
from ._values import check_integer, with_hints

_P = ParamSpec("_P")
_R = TypeVar("_R")


def innermost(optimizer: Optimizer) -> Optimizer:
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


def _initial_p(optimizer: Optimizer) -> list[float]:
    return [
        group["initial_p"] if "initial_p" in group else float(group["p"])
        for group in optimizer.param_groups
    ]


def _copies(values: Iterable[Any]) -> list[Any]:
    return [value.clone() if isinstance(value, Tensor) else value for value in values]


def outside_of_graphs(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """As torch.compiler.disable, but torch._dynamo is imported by a compiled call alone: that takes
    most of a second."""

    @functools.wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        if torch.compiler.is_compiling():
            disabled: Callable[_P, _R] = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
            return disabled(*args, **kwargs)
        return function(*args, **kwargs)

    return call


def attach(schedule: "_PScheduler", optimizer: Optimizer) -> None:
    """Makes this the schedule of the optimizer, instead of any other. The optimizer keeps it."""
    if not hasattr(optimizer, "_optimizer_step_post_hooks"):
        # An Optimizer whose constructor was never called, such as torchao's for offloading.
        schedule._run["optimizer.step"] = True
        return
    for hooks in (optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks):
        for number in [number for number, hook in hooks.items() if _is_of_a_schedule(hook)]:
            del hooks[number]
    # Once more: timm's Lookahead has hooks, but nothing calls them before Optimizer does this.
    optimizer._patch_step_function()
    if schedule.every_step:
        optimizer.register_step_pre_hook(schedule._p_before_step)
        optimizer.register_step_post_hook(schedule._p_after_step)
    else:
        optimizer.register_step_post_hook(schedule._p_note_step)


def schedule_of(optimizer: Optimizer) -> "_PScheduler | None":
    """What the optimizer keeps of its schedule: all but the optimizer."""
    hooks = getattr(optimizer, "_optimizer_step_post_hooks", {}).values()
    return next((hook.__self__ for hook in hooks if _is_of_a_schedule(hook)), None)


def _is_of_a_schedule(hook: Callable[..., Any]) -> bool:
    # Not by isinstance: importlib.reload() makes the classes anew.
    return getattr(hook, "__name__", "") in ("_p_before_step", "_p_after_step", "_p_note_step")


# What moves this many times its total_iters was hardly meant to: batches were taken for epochs.
# Small enough to be seen in the first epochs, too large for an end that is meant to come early.
_FAR = 10


class _PScheduler(LRScheduler):
    """What the schedules share. A subclass says in `_get_p` what p is.

    It is an LRScheduler for the frameworks that accept nothing else. The constructor of that class
    is not called: it would take over lr, and it keeps the clock in the scheduler.
    """

    # Apart from the other attributes, which are shared with what the optimizer keeps.
    __slots__ = ("optimizer",)

    every_step: bool
    _get_lr_called_within_step = False

    def __init__(self, optimizer: Optimizer, last_epoch: int, every_step: bool) -> None:
        optimizer = innermost(optimizer)
        last_epoch = check_integer("last_epoch", last_epoch, -1)
        for i, group in enumerate(optimizer.param_groups):
            if "p" not in group:
                raise ValueError(f"param_groups[{i}] has no p to schedule")
            if last_epoch >= 0 and "initial_p" not in group:
                raise KeyError(
                    f"param 'initial_p' is not specified in param_groups[{i}] "
                    "when resuming scheduler with last_epoch >= 0."
                )
        if every_step and not hasattr(optimizer, "_optimizer_step_post_hooks"):
            raise TypeError(f"{type(optimizer).__name__} has no hooks for every_step=True")
        self.optimizer = optimizer
        self.every_step = every_step
        groups = optimizer.param_groups
        self.base_lrs = _copies(group.get("initial_lr", group.get("lr")) for group in groups)
        self._step_count = 1  # as after the constructor of LRScheduler
        # Not attributes of the optimizer, as torch has it: a compiled step would not set those.
        self._run: dict[str, Any] = {"optimizer.step": False, "next": None}
        self._set_p(optimizer, self.last_epoch if last_epoch == -1 else last_epoch + 1)
        self._attach()

    # What the optimizer does for the schedule.

    def _attach(self) -> None:
        # Without its own attribute: the optimizer must not keep itself alive.
        kept = object.__new__(type(self))
        kept.__dict__ = self.__dict__
        attach(kept, self.optimizer)

    @outside_of_graphs
    def _p_before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        epoch = (_clock(optimizer) or 0) + 1
        self._check_move(epoch, _initial_p(optimizer))
        self._run["next"] = epoch

    @outside_of_graphs
    def _p_after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        # In a class whose step calls its base's, torch.optim's own run the hooks more than once.
        epoch, self._run["next"] = self._run["next"], None
        # A fused optimizer is told by GradScaler that it has to skip the step.
        skipped = getattr(optimizer, "found_inf", False) or changes_nothing(optimizer)
        if epoch is not None and not skipped:
            self._move(optimizer, epoch)

    def _p_note_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._run["optimizer.step"] = True

    def _move(self, optimizer: Optimizer, epoch: int) -> None:
        count = self._step_count + 1  # first: a loaded one may be no number
        self._set_p(optimizer, epoch)
        self._step_count = count

    # What p is.

    def _get_p(self, epoch: int, initial_p: list[float]) -> list[float]:
        """Every group's p after `epoch` steps."""
        raise NotImplementedError

    def _check_move(self, epoch: int, initial_p: list[float]) -> None:
        """Raises, before anything has changed, if a step to `epoch` cannot be made."""

    def _set_p(self, optimizer: Optimizer, epoch: int) -> None:
        if not epoch >= -1:
            raise ValueError(f"Invalid last_epoch: {epoch}")
        groups = optimizer.param_groups
        initial_p = _initial_p(optimizer)
        # A group added later joins when the clock moves, not when a schedule is made or loaded.
        joins = epoch != _clock(optimizer)
        # Nothing has been written so far, so that a p out of range leaves the groups as they are.
        values = self._get_p(max(epoch, 0), initial_p)
        for group, initial, p in zip(groups, initial_p, values, strict=True):
            if not joins and "p_last_epoch" not in group:
                continue
            group["initial_p"] = initial
            group["p_last_epoch"] = epoch
            if isinstance(group["p"], Tensor):
                group["p"].fill_(p)
            else:
                group["p"] = p

    # What LRScheduler has.

    @property
    def last_epoch(self) -> int:
        """The number of steps so far. The groups hold it.

        It may be set, to an int of at least -1: as in torch, the next `step` goes on from there,
        and `p` stays as it is until then.
        """
        return _clock(self.optimizer) or 0

    @last_epoch.setter
    def last_epoch(self, last_epoch: int) -> None:
        last_epoch = check_integer("last_epoch", last_epoch, -1)
        groups = self.optimizer.param_groups
        for group, initial_p in zip(groups, _initial_p(self.optimizer), strict=True):
            group["initial_p"] = initial_p
            group["p_last_epoch"] = last_epoch

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
        if self._step_count == 1 and not self._run["optimizer.step"]:
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
        self._update_lr(epoch)

    # SequentialLR calls it in the place of `step`. torch.compile would compile anew for every value
    # of the clock.
    @outside_of_graphs
    def _update_lr(self, epoch: int | None = None) -> None:
        if epoch is None:
            epoch = self.last_epoch + 1
            self._check_move(epoch, _initial_p(self.optimizer))
        self._move(self.optimizer, epoch)

    def get_last_p(self) -> list[float | Tensor]:
        """Every group's `p` as it is now."""
        return _copies(group["p"] for group in self.optimizer.param_groups)

    def get_last_lr(self) -> list[float | Tensor]:
        """Every group's `lr` as it is now. A schedule of p does not change it."""
        return _copies(group["lr"] for group in self.optimizer.param_groups)

    def get_lr(self) -> list[float | Tensor]:
        """As `get_last_lr`. Within a step, such as Ignite's, p comes to where `last_epoch` is."""
        if self._get_lr_called_within_step:
            self._set_p(self.optimizer, self.last_epoch)
        return self.get_last_lr()

    @property
    def _last_lr(self) -> list[float | Tensor]:
        return self.get_last_lr()

    @_last_lr.setter
    def _last_lr(self, values: list[float | Tensor]) -> None:
        """Whoever sets it has set the groups' lr, which says more."""

    def state_dict(self) -> dict[str, Any]:
        """Everything but the optimizer, whose own state_dict resumes a schedule by itself."""
        state = {**self.__dict__, "last_epoch": self.last_epoch}
        del state["every_step"], state["_run"]
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

    # Copies.

    def __getstate__(self) -> dict[str, Any]:
        state = {**self.__dict__}
        if hasattr(self, "optimizer"):
            kept = schedule_of(self.optimizer)
            attached = kept is not None and kept.__dict__ is self.__dict__
            state.update(optimizer=self.optimizer, _attached=attached)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = {**state}
        attached = state.pop("_attached", False)
        for name, value in state.items():
            setattr(self, name, value)
        if attached:
            self._attach()

    def __repr__(self) -> str:
        own = ("base_lrs", "optimizer")
        shown = {k: v for k, v in self.__dict__.items() if not k.startswith("_") and k not in own}
        if hasattr(self, "optimizer"):
            shown |= {"last_epoch": self.last_epoch, "p": self.get_last_p()}
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in shown.items())})"


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
    infinite, there is no way: the schedule's step raises, or with `every_step=True` the
    optimizer's, which then has changed nothing.

    Args:
        optimizer: an optimizer whose groups have a `p`, finite and :math:`\geq 2`.
        total_iters: S, the number of epochs or steps, :math:`\geq 1`, whichever `step` is called
            for. After ten times as many a warning says that it may be the wrong one.
        p_min: the last value, finite and :math:`\geq 2`.
        last_epoch: the index of the last epoch that is over; the groups must have `initial_p`. -1
            goes on where the groups are, which is the start if they were never scheduled.
        every_step: the schedule moves on by itself after every `optimizer.step()`, except those
            that GradScaler skips. `step` must not be called then, and the schedule need not be
            kept: the optimizer and its copies have it. A schedule made later for the same
            optimizer takes its place.

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

    @with_hints
    def __init__(
        self,
        optimizer: Optimizer,
        total_iters: int,
        p_min: float = 2.0,
        last_epoch: int = -1,
        *,
        every_step: bool = False,
    ) -> None:
        self.total_iters = check_integer("total_iters", total_iters, 1)
        self.p_min = p_min
        super().__init__(optimizer, last_epoch, every_step)

    def _get_p(self, epoch: int, initial_p: list[float]) -> list[float]:
        for i, p in enumerate(initial_p):
            if not 2.0 <= p < math.inf:
                raise ValueError(f"param_groups[{i}] has p = {p}, which has no cosine")
        return [lpsgd_ext.cosine_p(epoch + 1, self.total_iters, p, self.p_min) for p in initial_p]

    def _check_move(self, epoch: int, initial_p: list[float]) -> None:
        self._get_p(epoch, initial_p)
        if epoch == _FAR * self.total_iters + 1:
            warnings.warn(
                f"This is step {epoch} of a `{type(self).__name__}` with total_iters="
                f"{self.total_iters}: p has been {self.p_min} since then. total_iters counts the "
                "schedule's own steps: if it moves once per batch these are batches, not epochs.",
                UserWarning,
                stacklevel=5 + self.every_step,  # where `step` is called
            )


class LambdaP(_PScheduler):
    r"""Sets the `p` of every group to a function of the number of steps.

    Args:
        optimizer: an optimizer whose groups have a `p`.
        p_lambda: a function that takes k, the number of calls of `step` so far, and returns `p`
            itself, :math:`2 \leq p \leq \infty`; or a list of such functions, one for each group.
            A group added later takes the last of them. An optimizer with `every_step=True` can be
            pickled if they can, which lambdas cannot.

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

    @with_hints
    def __init__(
        self,
        optimizer: Optimizer,
        p_lambda: Callable[[int], float] | list[Callable[[int], float]],
        last_epoch: int = -1,
        *,
        every_step: bool = False,
    ) -> None:
        count = len(innermost(optimizer).param_groups)
        self.p_lambdas = (
            list(p_lambda) if isinstance(p_lambda, list | tuple) else [p_lambda] * count
        )
        if len(self.p_lambdas) != count:
            raise ValueError(f"Expected {count} p_lambdas, but got {len(self.p_lambdas)}")
        for function in self.p_lambdas:
            if not callable(function):
                raise TypeError(f"p_lambda must be a function, not {type(function).__name__}")
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
