# SPDX-License-Identifier: MIT
"""LPSGD and LPSGDM: the rule, the arguments and the state."""

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ._base import LPOptimizer, defaults_of
from ._compiled import new_buffer, traced_new_buffer
from ._native import lpsgd_ext
from ._unusual import Fresh, Lists, States
from ._values import momentum_dtype_in, momentum_dtype_of, with_hints


class LPSGD(LPOptimizer):
    r"""LPSGD: steepest descent between the :math:`\ell_2` and the :math:`\ell_\infty` norm.

    The rule, for every element by itself::

        rho = (p - 2) / (p - 1)
        u = grad / (|grad| + eps) ** rho * pivot ** (-1 / (p - 1))
        param = (1 - lr * weight_decay) * param - lr * u

    In the letters of arXiv:2606.02078 (eq 20 to 22), with :math:`\kappa` for pivot:

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
        lr: learning rate :math:`\eta \geq 0`, a number or a Tensor of one element (default: 1e-3).
            Try 0.01 with p from 6 to 2 or p = 6, and 0.001 with p = inf. SGD's 0.1 is far too
            large for both.
        p: the norm, :math:`2 \leq p \leq \infty` (default: 6). With a constant lr let
            `CosineAnnealingP` take it to 2; with an lr that decays keep it at 6 or inf.
        weight_decay: decoupled weight decay :math:`\lambda \geq 0` (default: 0). AdamW's value
            times AdamW's lr / lr shrinks weights as much; torch.optim.SGD's is coupled, and means
            something else.
        eps: :math:`\epsilon \geq 0` (default: 1e-8). Leave it; 0 makes p = inf the exact sign.
        pivot: :math:`\kappa > 0`, the gradient at which :math:`|u| = 1` for every p (default: 1,
            the paper). `suggest_pivot`, or about 1e-4, keeps the step from shrinking with p.
        maximize: maximize the objective instead of minimizing it (default: False).
        foreach: True forces PyTorch's `torch._foreach_*` operations, False one by one (default:
            None, C wherever it can). Leave it, except for comparisons.
        capturable: the step may be captured in a CUDA graph, whose replays read a Tensor lr or p on
            the device anew; a number stays what it was (default: False, a capture raises).
        differentiable: autograd goes through the step, also to a Tensor lr or weight_decay
            (default: False). For meta-learning; slow.
        fused: True demands the C kernels and raises where they can't be used; None takes them
            wherever they can; False never does (default: None). Set True to find out what keeps a
            step from being fast.
        stochastic_rounding: round bfloat16 results up or down at random such that the mean is
            exact; other dtypes are rounded to nearest (default: False). Set True for bfloat16
            parameters, which otherwise lose small updates. The random bits depend on seed, on the
            number of the step (`rounding_step` in the group), on the number of the parameter in
            the optimizer and on the index of the element alone: not on threads, nor on the
            sharding of a DTensor.
        seed: an int (default: 0) that the random bits depend on. All replicas of a parameter need
            the same.

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
    _SGD: ClassVar[dict[str, Any]] = {"momentum": 0.0, "dampening": 0.0, "nesterov": False}

    @with_hints
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
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        stochastic_rounding: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(params, defaults_of(locals()))

    def _gather(self, group: dict[str, Any], known: States, fresh: Fresh) -> Lists:
        params = [param for param in group["params"] if param.grad is not None]
        return [params, [param.grad for param in params]]

    def _traced_buffers(self, group: dict[str, Any], params: list[Tensor]) -> list[Tensor]:
        return []

    def _native_step(self, lists: Lists, **values: Any) -> None:
        lpsgd_ext.lpsgd_(lists[0], lists[1], **values)


class LPSGDM(LPOptimizer):
    r"""LPSGDM: LPSGD on an exponential average of the gradient, with decoupled weight decay.

    The rule, for every element by itself::

        rho = (p - 2) / (p - 1)
        m = momentum * m + (1 - momentum) * grad
        u = m / (|m| + eps) ** rho * pivot ** (-1 / (p - 1))
        param = (1 - lr * weight_decay) * param - lr * u

    In the letters of arXiv:2606.02078 (eq 20 and 23 to 25), with :math:`\kappa` for pivot:

    .. math::
        m \leftarrow \beta m + (1 - \beta) g, \qquad
        u = m / (|m| + \epsilon)^\rho \cdot \kappa^{-1/(p-1)}, \qquad
        \theta \leftarrow (1 - \eta \lambda) \theta - \eta u

    p = 2 is `torch.optim.SGD(momentum=beta, dampening=beta)` from a zero buffer, p = inf is Signum.
    The state of a parameter is `momentum_buffer`, m, as for torch.optim.SGD.

    Note:
        :math:`|u|` is about 1 for large p and :math:`|m|` for p = 2, so the schedule of p is also
        a decay of the step. With an lr that decays by itself, keep p fixed or set `pivot`.

    Args:
        params: parameters, named parameters or groups of them, as for torch.optim. Any shape;
            float32, float64, bfloat16 or float16 on the CPU run in C, the rest in PyTorch's
            operations.
        lr: learning rate :math:`\eta \geq 0`, a number or a Tensor of one element (default: 1e-3).
            Try 0.01 with p from 6 to 2 or p = 6, and 0.001 with p = inf. SGD's 0.1 is far too
            large for both.
        p: the norm, :math:`2 \leq p \leq \infty` (default: 6). With a constant lr let
            `CosineAnnealingP` take it to 2; with an lr that decays keep it at 6 or inf.
        momentum: :math:`0 \leq \beta < 1` (default: 0.9). 0.8 is the next to try; 0 is LPSGD.
        weight_decay: decoupled weight decay :math:`\lambda \geq 0` (default: 0). AdamW's value
            times AdamW's lr / lr shrinks weights as much; torch.optim.SGD's is coupled, and means
            something else.
        eps: :math:`\epsilon \geq 0` (default: 1e-8). Leave it; 0 makes p = inf the exact sign.
        pivot: :math:`\kappa > 0`, the :math:`|m|` at which :math:`|u| = 1` for every p (default: 1,
            the paper). `suggest_pivot`, or about 1e-4, keeps the step from shrinking with p.
        maximize: maximize the objective instead of minimizing it (default: False).
        foreach: True forces PyTorch's `torch._foreach_*` operations, False one by one (default:
            None, C wherever it can). Leave it, except for comparisons.
        capturable: as for :class:`LPSGD` (default: False). Set True to capture a CUDA graph.
        differentiable: as for :class:`LPSGD` (default: False). For meta-learning; slow.
        fused: True demands the C kernels and raises where they can't be used; None takes them
            wherever they can; False never does (default: None). Set True to find out what keeps a
            step from being fast.
        momentum_dtype: the dtype of the momentum_buffer of float32, bfloat16 and float16 parameters
            (others have their own): None for their own (default), torch.float32, torch.bfloat16
            (rounded stochastically with stochastic_rounding) or torch.float8_e5m2, one byte. Take
            one byte to save memory: it is not shown to train worse. It is always rounded
            stochastically, by random bits that depend on what stochastic_rounding's do, and
            excludes `capturable` and `differentiable`.
        momentum_exponent: an int of at most 126 in magnitude (default: 15). A momentum_buffer of
            one byte holds :math:`m \cdot 2^\text{momentum_exponent}`, which stays within 57344 in
            magnitude. With 15 that is 1.75 for m; below :math:`2^{-29}` bits are lost, and all
            below :math:`2^{-31}`, but for their mean. `momentum_report` says whether it fits.
        stochastic_rounding: as for :class:`LPSGD` (default: False). Set True for bfloat16
            parameters, which otherwise lose small updates.
        seed: an int (default: 0) that the random bits depend on. All replicas of a parameter need
            the same.

    Raises:
        ValueError, TypeError: for arguments out of range. `step` raises them too, and
            RuntimeError, for tensors it cannot update; then no tensor has changed.

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
    _SGD: ClassVar[dict[str, Any]] = {"dampening": "momentum", "nesterov": False}

    @with_hints
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
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        momentum_dtype: torch.dtype | None = None,
        momentum_exponent: int = 15,
        stochastic_rounding: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(params, defaults_of(locals()))

    def _gather(self, group: dict[str, Any], known: States, fresh: Fresh) -> Lists:
        params, grads, momentum_buffers = [], [], []
        for param in group["params"]:
            # A look-up calls Tensor.__hash__, which is slow; most states come in order.
            in_order = known and known[0][0] is param
            state = known.popleft()[1] if in_order else None
            grad = param.grad
            if grad is None:
                continue
            if not in_order:
                state = self.state.get(param, {})
            if not isinstance(state, dict):
                raise TypeError(f"a parameter's state must be a dict, not {type(state).__name__}")
            buffer = state.get("momentum_buffer")
            if buffer is None:
                if param not in fresh:
                    fresh[param] = new_buffer(param, _buffer_dtype(group, param))
                buffer = fresh[param]
            params.append(param)
            grads.append(grad)
            momentum_buffers.append(buffer)
        return [params, grads, momentum_buffers]

    def _traced_buffers(self, group: dict[str, Any], params: list[Tensor]) -> list[Tensor]:
        states = [self.state[param] for param in params]
        for param, state in zip(params, states, strict=True):
            if state.get("momentum_buffer") is None:
                dtype = _buffer_dtype(group, param)
                state["momentum_buffer"] = traced_new_buffer(param, dtype)
        return [state["momentum_buffer"] for state in states]

    def _native_step(self, lists: Lists, **values: Any) -> None:
        lpsgd_ext.lpsgdm_(lists[0], lists[1], lists[2], **values)


def _buffer_dtype(group: dict[str, Any], param: Tensor) -> torch.dtype:
    return momentum_dtype_of(param, momentum_dtype_in(group))
