# SPDX-License-Identifier: MIT
"""The classes: bookkeeping in torch.optim's style around the steps of lpsgd_ext and _eager."""

from collections import deque
from collections.abc import Callable
from itertools import groupby
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

import lpsgd_ext

from . import _eager

_States = deque[tuple[Tensor, dict[str, Any]]]

_NATIVE_TYPES = (Tensor, torch.nn.Parameter)
_NATIVE_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

_RANGES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "lr": ("learning rate", lambda value: value >= 0.0),
    "p": ("p value", lambda value: value >= 2.0),
    "momentum": ("momentum value", lambda value: 0.0 <= value < 1.0),
    "weight_decay": ("weight_decay value", lambda value: value >= 0.0),
    "eps": ("epsilon value", lambda value: value >= 0.0),
    "pivot": ("pivot value", lambda value: 0.0 < value < float("inf")),
}


def _check_values(values: dict[str, Any]) -> None:
    """Raises, naming the argument, for a hyper-parameter that is out of range or no number."""
    for name, (text, in_range) in _RANGES.items():
        if name not in values:
            continue
        value = values[name]
        try:
            valid = in_range(value)
        except TypeError:
            raise TypeError(f"{name} must be a number, not {type(value).__name__}") from None
        if not valid:
            raise ValueError(f"Invalid {text}: {value}")
    if values["fused"] and values["foreach"]:
        raise RuntimeError("`fused` and `foreach` cannot be `True` together.")


def _has_native_memory(param: Tensor, other: Tensor) -> bool:
    """Whether `other`'s elements lie in memory as `param`'s do, as the C kernels need it."""
    return (
        type(other) in _NATIVE_TYPES
        and other.layout == torch.strided
        and not other.is_neg()
        and other.stride() == param.stride()
    )


def _is_native(tensors: tuple[Tensor, ...]) -> bool:
    """Whether the C kernels are meant for this parameter and what goes with it."""
    param = tensors[0]
    return (
        param.device.type == "cpu"
        and param.dtype in _NATIVE_DTYPES
        and all(_has_native_memory(param, tensor) for tensor in tensors)
        and _is_dense(param)
    )


def _is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one stretch of memory in some order of the dimensions."""
    extent = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride != extent:
            return tensor.numel() == 0
        extent *= size
    return True


def _check_eager(tensors: tuple[Tensor, ...]) -> None:
    """What PyTorch's own operations would not refuse, but broadcast or convert."""
    param, *others = tensors
    if any(tensor.is_sparse for tensor in tensors):
        raise RuntimeError("LPSGD and LPSGDM do not support sparse tensors")
    for other in others:
        if other.shape != param.shape or other.dtype != param.dtype:
            raise RuntimeError(
                f"gradient and momentum_buffer must have the parameter's shape and dtype, "
                f"{tuple(param.shape)} and {param.dtype}, "
                f"but got {tuple(other.shape)} and {other.dtype}"
            )
        if other.device != param.device:
            raise RuntimeError(
                "Expected all tensors to be on the same device, "
                f"but found at least two devices, {param.device} and {other.device}!"
            )


def _eager_step(tensors: list[tuple[Tensor, ...]], foreach: bool, values: dict[str, Any]) -> None:
    """The step in PyTorch's operations; `tensors` has one checked tuple per parameter."""

    def can_foreach(each: tuple[Tensor, ...]) -> bool:
        return (
            foreach
            and all(type(tensor) in _NATIVE_TYPES for tensor in each)
            and not each[0].is_complex()
        )

    def key(each: tuple[Tensor, ...]) -> tuple[bool, str, str]:
        return can_foreach(each), str(each[0].device), str(each[0].dtype)

    for (use_foreach, *_), group in groupby(sorted(tensors, key=key), key=key):
        step = _eager.foreach if use_foreach else _eager.for_loop
        lists = [list(column) for column in zip(*group, strict=True)]
        step(lists[0], lists[1], lists[2] if len(lists) > 2 else None, **values)


class _LPOptimizer(Optimizer):
    """What LPSGD and LPSGDM share."""

    _HYPER: tuple[str, ...]  # the keys of a group that a step takes

    def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        _check_values(defaults)
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        _check_values({**self.defaults, **param_group})
        super().add_param_group(param_group)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)

    def _gather(self, group: dict[str, Any], known: _States) -> list[list[Tensor]]:
        """The parameters that have a gradient, their gradients and what the state holds.

        `known` has the states that no earlier group of this step took, in their order.
        """
        raise NotImplementedError

    def _native_step(self, lists: list[list[Tensor]], values: dict[str, Any]) -> None:
        raise NotImplementedError

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Performs a single optimization step.

        Args:
            closure: reevaluates the model and returns the loss, which `step` returns.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        known: _States = deque(self.state.items())
        for group in self.param_groups:
            lists = self._gather(group, known)
            if lists[0]:
                self._step_group(group, lists)
        return loss

    def _step_group(self, group: dict[str, Any], lists: list[list[Tensor]]) -> None:
        values = {name: group[name] for name in self._HYPER}
        fused, foreach = group["fused"], group["foreach"]
        if fused or (fused is None and foreach is None):
            try:
                self._native_step(lists, values)
                return
            except (TypeError, ValueError, RuntimeError):
                if fused:
                    raise
                _check_values(group)
                tensors = list(zip(*lists, strict=True))
                native = [each for each in tensors if _is_native(each)]
                eager = [each for each in tensors if not _is_native(each)]
                if not eager:
                    raise
            # Nothing has been written so far. What C refuses goes to PyTorch's operations.
            for each in eager:
                _check_eager(each)
            if native:
                self._native_step([list(column) for column in zip(*native, strict=True)], values)
            _eager_step(eager, True, values)
        else:
            _check_values(group)
            tensors = list(zip(*lists, strict=True))
            for each in tensors:
                _check_eager(each)
            _eager_step(tensors, bool(foreach), values)


class LPSGD(_LPOptimizer):
    r"""LPSGD: steepest descent between the :math:`\ell_2` and the :math:`\ell_\infty` norm.

    For every element, with :math:`\rho = (p - 2) / (p - 1)` (arXiv:2606.02078, eq 20 to 22):

    .. math::
        u = g / (|g| + \epsilon)^\rho \cdot \kappa^{-1/(p-1)}, \qquad
        \theta \leftarrow (1 - \eta \lambda) \theta - \eta u

    p = 2 is `torch.optim.SGD`, p = inf is sign descent smoothed by eps. `CosineAnnealingP` takes p
    from its first value to 2 in the course of training.

    Note:
        :math:`|u|` is about 1 for large p and :math:`|g|` for p = 2, so the schedule of p is also
        a decay of the step: p = 2 wants an lr 100 to 300 times that of p = 6. With an lr that
        decays by itself, keep p fixed or set `pivot`.

    Args:
        params: parameters, named parameters or groups of them, as for torch.optim. Any shape;
            float32, float64, bfloat16 or float16 on the CPU run in C, the rest in PyTorch's
            operations.
        lr: learning rate :math:`\eta \geq 0`.
        p: the norm, :math:`2 \leq p \leq \infty`.
        weight_decay: decoupled weight decay :math:`\lambda \geq 0` (torch.optim.SGD's is coupled).
        eps: :math:`\epsilon \geq 0`.
        pivot: :math:`\kappa > 0`, the gradient at which :math:`|u| = 1` for every p. 1 is the
            paper; about 1e-4 keeps the step from shrinking as p goes to 2.
        maximize: maximize the objective instead of minimizing it.
        foreach: True forces PyTorch's `torch._foreach_*` operations, False one by one.
        fused: True demands the C kernels and raises where they can't be used; None takes them
            wherever they can; False never does.

    Raises:
        ValueError, TypeError: for arguments out of range. `step` raises them too, and
        RuntimeError, for tensors it cannot update; then no tensor has changed.

    Example:
        >>> param = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
        >>> optimizer = LPSGD([param], lr=0.5, p=3.0)
        >>> param.grad = torch.tensor([0.04, -4.0])  # p = 3 takes the square root
        >>> optimizer.step()
        >>> param
        Parameter containing:
        tensor([0.9000, 2.0000], requires_grad=True)
    """

    _HYPER = ("lr", "p", "weight_decay", "eps", "pivot", "maximize")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        p: float = 6.0,
        weight_decay: float = 0.0,
        eps: float = 1e-8,
        pivot: float = 1.0,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "p": p,
            "weight_decay": weight_decay,
            "eps": eps,
            "pivot": pivot,
            "maximize": maximize,
            "foreach": foreach,
            "fused": fused,
        }
        super().__init__(params, defaults)

    def _gather(self, group: dict[str, Any], known: _States) -> list[list[Tensor]]:
        params = [param for param in group["params"] if param.grad is not None]
        return [params, [param.grad for param in params]]

    def _native_step(self, lists: list[list[Tensor]], values: dict[str, Any]) -> None:
        lpsgd_ext.lpsgd_(lists[0], lists[1], **values)


class LPSGDM(_LPOptimizer):
    r"""LPSGDM: LPSGD on an exponential average of the gradient, with decoupled weight decay.

    For every element, with :math:`\rho = (p - 2) / (p - 1)` (arXiv:2606.02078, eq 20 and 23 to 25):

    .. math::
        m \leftarrow \beta m + (1 - \beta) g, \qquad
        u = m / (|m| + \epsilon)^\rho \cdot \kappa^{-1/(p-1)}, \qquad
        \theta \leftarrow (1 - \eta \lambda) \theta - \eta u

    p = 2 is `torch.optim.SGD(momentum=beta, dampening=beta)` from a zero buffer, p = inf is Signum.
    The state of a parameter is `momentum_buffer`, as for torch.optim.SGD.

    Args:
        momentum: :math:`0 \leq \beta < 1`.

    The other arguments, the note on lr and the errors are those of :class:`LPSGD`; eps and pivot
    refer to :math:`|m|`.

    Example:
        >>> from lpsgd import CosineAnnealingP
        >>> model = torch.nn.Linear(4, 1)
        >>> optimizer = LPSGDM(model.parameters(), lr=0.01, p=6.0)
        >>> schedule = CosineAnnealingP(optimizer, total_iters=30)
        >>> for epoch in range(30):
        ...     optimizer.zero_grad()
        ...     model(torch.ones(8, 4)).square().mean().backward()
        ...     optimizer.step()
        ...     schedule.step()
        >>> optimizer.param_groups[0]["p"]
        2.0
    """

    _HYPER = ("lr", "p", "momentum", "weight_decay", "eps", "pivot", "maximize")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        p: float = 6.0,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        eps: float = 1e-8,
        pivot: float = 1.0,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "p": p,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "eps": eps,
            "pivot": pivot,
            "maximize": maximize,
            "foreach": foreach,
            "fused": fused,
        }
        super().__init__(params, defaults)

    def _gather(self, group: dict[str, Any], known: _States) -> list[list[Tensor]]:
        params, grads, momentum_buffers = [], [], []
        for param in group["params"]:
            # A look-up calls Tensor.__hash__, which is slow; most states come in order.
            in_order = known and known[0][0] is param
            state = known.popleft()[1] if in_order else None
            grad = param.grad
            if grad is None:
                continue
            if state is None:
                state = self.state[param]
            buffer = state.get("momentum_buffer")
            if buffer is None:
                buffer = torch.zeros_like(param, memory_format=torch.preserve_format)
                state["momentum_buffer"] = buffer
            params.append(param)
            grads.append(grad)
            momentum_buffers.append(buffer)
        return [params, grads, momentum_buffers]

    def _native_step(self, lists: list[list[Tensor]], values: dict[str, Any]) -> None:
        lpsgd_ext.lpsgdm_(lists[0], lists[1], lists[2], **values)
