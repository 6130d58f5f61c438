# SPDX-License-Identifier: MIT
"""LPSGD and LPSGDM in plain PyTorch operations: the oracle of the tests, the fallback for tensors
that the C kernels refuse, and their peer in the benchmarks.

Equation numbers are those of arXiv:2606.02078. Every function takes parallel lists of tensors, one
of each per parameter and of its shape, dtype and device. It writes to `params` and
`momentum_buffers`, never to `grads`, and raises what PyTorch's own operations raise. bfloat16 and
float16 are computed in float32 with one rounding on store, as in C.
"""

import torch
from torch import Tensor

import lpsgd_ext

_HALF = (torch.bfloat16, torch.float16)


def _smallest(dtype: torch.dtype) -> float:
    """The smallest positive number of a dtype: in place of y = 0 it turns 0 / 0 into 0."""
    info = torch.finfo(dtype)
    return info.tiny * info.eps


def _direction(x: Tensor, rho: float, eps: float) -> Tensor:
    """u of eq 21 and 24: x / (|x| + eps)^rho, and 0 for x = 0."""
    if rho == 0.0:
        return x
    y = x.abs().add_(eps).clamp_min_(_smallest(x.dtype))
    return x / y.pow_(rho)


def _directions(xs: list[Tensor], rho: float, eps: float) -> list[Tensor]:
    """`_direction` of every tensor; all share one dtype."""
    if rho == 0.0:
        return xs
    ys = list(torch._foreach_abs(xs))
    torch._foreach_add_(ys, eps)
    torch._foreach_clamp_min_(ys, _smallest(ys[0].dtype))
    torch._foreach_pow_(ys, rho)
    return list(torch._foreach_div(xs, ys))


def for_loop(
    params: list[Tensor],
    grads: list[Tensor],
    momentum_buffers: list[Tensor] | None,
    *,
    lr: float,
    p: float,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    eps: float = 1e-8,
    pivot: float = 1.0,
    maximize: bool = False,
) -> None:
    """One step, parameter by parameter; `momentum_buffers=None` is LPSGD, else LPSGDM.

    Example:
        >>> param, grad, buffer = torch.zeros(2), torch.tensor([8.0, -1.0]), torch.zeros(2)
        >>> for_loop([param], [grad], [buffer], lr=1.0, p=4.0, momentum=0.0, eps=0.0)
        >>> param  # the cube roots
        tensor([-2.,  1.])
    """
    rho = lpsgd_ext.rho(p)
    step_size = lr * pivot ** (-1.0 / (p - 1.0))
    for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
        buffer = momentum_buffers[i] if momentum_buffers is not None else None
        if param.is_complex():
            param, grad = torch.view_as_real(param), torch.view_as_real(grad)
            buffer = torch.view_as_real(buffer) if buffer is not None else None
        half = param.dtype in _HALF
        x = -grad if maximize else grad
        w = param
        if half:
            x, w = x.float(), w.float()
        if buffer is not None:  # eq 23
            m = buffer.float() if half else buffer
            x = m.mul_(momentum).add_(x, alpha=1.0 - momentum)
            if half:
                buffer.copy_(m)
        u = _direction(x, rho, eps)  # eq 21, 24
        if weight_decay != 0.0:  # eq 25
            w.mul_(1.0 - lr * weight_decay)
        w.add_(u, alpha=-step_size)  # eq 22, 25
        if half:
            param.copy_(w)


def foreach(
    params: list[Tensor],
    grads: list[Tensor],
    momentum_buffers: list[Tensor] | None,
    *,
    lr: float,
    p: float,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    eps: float = 1e-8,
    pivot: float = 1.0,
    maximize: bool = False,
) -> None:
    """One step by `torch._foreach_*` over whole lists, which share one real dtype and one device.

    Example:
        >>> params, grads = [torch.zeros(2), torch.zeros(1)], [torch.ones(2), -torch.ones(1)]
        >>> foreach(params, grads, None, lr=0.5, p=6.0)
        >>> params
        [tensor([-0.5000, -0.5000]), tensor([0.5000])]
    """
    if not params:
        return
    rho = lpsgd_ext.rho(p)
    step_size = lr * pivot ** (-1.0 / (p - 1.0))
    half = params[0].dtype in _HALF
    xs = [grad.float() for grad in grads] if half else grads
    ws = [param.float() for param in params] if half else params
    if maximize:
        xs = list(torch._foreach_neg(xs))
    if momentum_buffers is not None:  # eq 23
        ms = [buffer.float() for buffer in momentum_buffers] if half else momentum_buffers
        torch._foreach_mul_(ms, momentum)
        torch._foreach_add_(ms, xs, alpha=1.0 - momentum)
        xs = ms
        if half:
            torch._foreach_copy_(momentum_buffers, ms)
    us = _directions(xs, rho, eps)  # eq 21, 24
    if weight_decay != 0.0:  # eq 25
        torch._foreach_mul_(ws, 1.0 - lr * weight_decay)
    torch._foreach_add_(ws, us, alpha=-step_size)  # eq 22, 25
    if half:
        torch._foreach_copy_(params, ws)
