# SPDX-License-Identifier: MIT
"""LPSGD and LPSGDM in plain PyTorch operations: the oracle of the tests, the fallback for tensors
that the C kernels refuse, and their peer in the benchmarks.

Equation numbers are those of arXiv:2606.02078. Every function takes parallel lists of tensors, one
of each per parameter and of its shape and device; buffers may have the dtypes of momentum_dtype. It
writes to `params` and `momentum_buffers`, never to `grads`, and raises what PyTorch's own
operations raise. All but float64 is computed in float32 with one rounding on store, as in C.
"""

import ctypes
import math
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from . import _reference

HALF_DTYPES = (torch.bfloat16, torch.float16)
BYTE = torch.float8_e5m2  # the upper byte of a float16
LARGEST_BYTE = 57344.0  # the largest finite number of this dtype: 0x7b00 as float16

_Number = TypeVar("_Number", float, Tensor, float | Tensor)


def _smallest(dtype: torch.dtype) -> float:
    """The smallest positive number of a dtype: in place of y = 0 it turns 0 / 0 into 0."""
    info = torch.finfo(dtype)
    return info.tiny * info.eps


def _direction(x: Tensor, rho: float, eps: float) -> Tensor:
    """u of eq 21 and 24: x / (|x| + eps)^rho, and 0 (never -0, as in C) for x = 0."""
    if rho == 0.0:
        return x + 0.0
    y = x.abs().add_(eps).clamp_min_(_smallest(x.dtype))
    return (x / y.pow_(rho)).add_(0.0)


def _directions(xs: list[Tensor], rho: float, eps: float) -> list[Tensor]:
    """`_direction` of every tensor; all share one dtype."""
    if rho == 0.0:
        return list(torch._foreach_add(xs, 0.0))
    ys = list(torch._foreach_abs(xs))
    torch._foreach_add_(ys, eps)
    torch._foreach_clamp_min_(ys, _smallest(ys[0].dtype))
    torch._foreach_pow_(ys, rho)
    us = list(torch._foreach_div(xs, ys))
    torch._foreach_add_(us, 0.0)
    return us


def decoded(buffer: Tensor, exponent: int) -> Tensor:
    """The float32 momentum that a buffer of one byte holds times 2^exponent."""
    return buffer.float() * 2.0**-exponent


def _widened(buffer: Tensor, dtype: torch.dtype, exponent: int) -> Tensor:
    """The momentum in the dtype of the arithmetic; `buffer` itself where it has that."""
    return decoded(buffer, exponent) if buffer.dtype == BYTE else buffer.to(dtype)


def nearest_byte(x: Tensor, exponent: int) -> Tensor:
    """Momentum as a buffer of one byte: for checkpoints alone, since steps round at random."""
    scaled = x.float() * 2.0**exponent
    return scaled.clamp(-LARGEST_BYTE, LARGEST_BYTE).to(BYTE)


def _draw(
    param: Tensor, buffer: Tensor | None, bits: bool, where: tuple[int, int, int, int]
) -> tuple[Tensor | None, Tensor | None]:
    """What is random in rounding the parameter and the buffer; `bits`: to bfloat16 as well. `where`
    is what _reference.random_bits takes."""
    written = (param.dtype, buffer.dtype if buffer is not None else None)
    of_param, of_buffer = None, None
    if bits and torch.bfloat16 in written:
        random = _reference.random_bits(param, *where)
        of_param, of_buffer = random & 0xFFFF, random >> 16
    if buffer is not None and buffer.dtype == BYTE:
        of_buffer = _reference.random_bytes(param, *where)
    return of_param, of_buffer


def _store_byte(to: Tensor, x: Tensor, exponent: int, random: Tensor) -> None:
    """Rounds float32 `x` times 2^exponent into `to` of one byte: up with the probability that 8
    random bits give, among the numbers of float16, the larger of which it keeps at 57344."""
    half = (x * 2.0**exponent).half().view(torch.int16).int()
    magnitude = half & 0x7FFF
    value = (magnitude.clamp_max(0x7B00) + random.int()) >> 8
    value.masked_fill_(magnitude > 0x7C00, 0x7E)  # NaN
    byte = value | half >> 8 & 0x80
    to.copy_(byte.to(torch.uint8).view(BYTE))


def _store(to: Tensor, x: Tensor, random: Tensor | None, exponent: int = 0) -> None:
    """Rounds float32 `x` into `to`: to one byte or, given 16 random bits, to bfloat16 up with the
    probability that these give."""
    if random is not None and to.dtype == BYTE:
        _store_byte(to, x, exponent, random)
    elif random is None or to.dtype != torch.bfloat16:
        to.copy_(x)
    else:
        rounded = (x.view(torch.int32) + random.to(torch.int32)) & -0x10000
        to.copy_(torch.where(x.isnan(), x, rounded.view(torch.float32)))


def _fold(
    lr: float | Tensor, p: float, pivot: float, grad_scale: float, maximize: bool
) -> tuple[float, float | Tensor, float]:
    """The numbers that all tensors of a step share: rho of eq 20; lr times the pivot's factor,
    infinite where a float64 cannot hold that, as in C; and what gradients are multiplied by,
    1 / grad_scale as float32, negated to maximize."""
    rho = _reference.rho(p)
    try:
        unit = math.pow(pivot, -1.0 / (p - 1.0))
    except OverflowError:
        unit = math.inf
    inverse = ctypes.c_float(1.0 / grad_scale).value
    return rho, lr * unit, -inverse if maximize else inverse


def _fit(x: _Number, dtype: torch.dtype) -> _Number:
    """A number beyond a dtype's range as infinity, as in C. PyTorch's operations would raise, when
    some have been made."""
    if isinstance(x, Tensor) or abs(x) <= torch.finfo(dtype).max:
        return x
    return math.copysign(math.inf, x) if x == x else x


def _as_real(
    param: Tensor, grad: Tensor, buffer: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, list[tuple[Tensor, Tensor]]]:
    """Complex tensors as pairs of real numbers. Conjugated ones have no such view: copies are
    stepped, which the last result has beside them."""
    written = [param] if buffer is None else [param, buffer]
    plain = [tensor.resolve_conj() for tensor in written]
    conjugated = [(a, b) for a, b in zip(written, plain, strict=True) if a.is_conj()]
    param, *buffers = map(torch.view_as_real, plain)
    grad = torch.view_as_real(grad.resolve_conj())
    return param, grad, buffers[0] if buffers else None, conjugated


def for_loop(
    params: list[Tensor],
    grads: list[Tensor],
    momentum_buffers: list[Tensor] | None,
    *,
    lr: float | Tensor,
    p: float,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    eps: float = 1e-8,
    pivot: float = 1.0,
    maximize: bool = False,
    momentum_exponent: int = 15,
    grad_scale: float = 1.0,
    stochastic_rounding: bool = True,
    seed: int | None = None,
    step: int = 0,
    streams: Sequence[int] | None = None,
    offsets: Sequence[int] | None = None,
    accumulate: int = 1,
    continues: bool = False,
    momentum_only: bool = False,
) -> None:
    """One step, parameter by parameter; `momentum_buffers=None` is LPSGD, else LPSGDM.

    It can be differentiated with respect to everything but p. `momentum_exponent` and what follows
    are those of `lpsgd_ext.lpsgdm_`.

    Example:
        >>> param, grad, buffer = torch.zeros(2), torch.tensor([8.0, -1.0]), torch.zeros(2)
        >>> for_loop([param], [grad], [buffer], lr=1.0, p=4.0, momentum=0.0, eps=0.0)
        >>> param  # the cube roots
        tensor([-2.,  1.])
    """
    rho, step_size, factor = _fold(lr, p, pivot, grad_scale, maximize)
    for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
        buffer = momentum_buffers[i] if momentum_buffers is not None else None
        conjugated: list[tuple[Tensor, Tensor]] = []
        if param.is_complex():
            param, grad, buffer, conjugated = _as_real(param, grad, buffer)
        half = param.dtype in HALF_DTYPES
        w = param.float() if half else param
        where = seed or 0, step, streams[i] if streams else i, offsets[i] if offsets else 0
        bits = stochastic_rounding and seed is not None
        of_param, of_buffer = _draw(param, buffer, bits, where)
        x = grad.to(w.dtype)
        if factor != 1.0:
            x = x * factor
        if buffer is not None:  # eq 23
            m = _widened(buffer, w.dtype, momentum_exponent)
            m.mul_(1.0 if continues else momentum)
            x = m.add_(x, alpha=(1.0 - momentum) / accumulate)
            if x.requires_grad:
                x = x.clone()  # what backward needs; the next step changes m
            if m is not buffer:
                _store(buffer, m, of_buffer, momentum_exponent)
        if not momentum_only and (isinstance(lr, Tensor) or lr != 0.0):
            u = _direction(x, rho, _fit(eps, x.dtype))  # eq 21, 24
            if weight_decay != 0.0:  # eq 25
                w.mul_(_fit(1.0 - lr * weight_decay, w.dtype))
            if isinstance(step_size, Tensor):  # eq 22, 25
                w.sub_(u * step_size.to(w.dtype))
            else:
                w.add_(u, alpha=-_fit(step_size, w.dtype))
            if half:
                _store(param, w, of_param)
        for tensor, stepped in conjugated:
            tensor.copy_(stepped)


def foreach(
    params: list[Tensor],
    grads: list[Tensor],
    momentum_buffers: list[Tensor] | None,
    *,
    lr: float | Tensor,
    p: float,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    eps: float = 1e-8,
    pivot: float = 1.0,
    maximize: bool = False,
    grad_scale: float = 1.0,
    accumulate: int = 1,
    continues: bool = False,
    momentum_only: bool = False,
) -> None:
    """One step by `torch._foreach_*` over whole lists. They share one device, one real dtype of
    parameters and one of buffers, which is not of one byte.

    Example:
        >>> params, grads = [torch.zeros(2), torch.zeros(1)], [torch.ones(2), -torch.ones(1)]
        >>> foreach(params, grads, None, lr=0.5, p=6.0)
        >>> params
        [tensor([-0.5000, -0.5000]), tensor([0.5000])]
    """
    if not params:
        return
    rho, step_size, factor = _fold(lr, p, pivot, grad_scale, maximize)
    half = params[0].dtype in HALF_DTYPES
    ws = [param.float() for param in params] if half else params
    xs = [grad.to(ws[0].dtype) for grad in grads]
    if factor != 1.0:
        xs = list(torch._foreach_mul(xs, factor))
    if momentum_buffers is not None:  # eq 23
        ms = [buffer.to(ws[0].dtype) for buffer in momentum_buffers]
        torch._foreach_mul_(ms, 1.0 if continues else momentum)
        torch._foreach_add_(ms, xs, alpha=(1.0 - momentum) / accumulate)
        xs = ms
        if ms[0] is not momentum_buffers[0]:
            torch._foreach_copy_(momentum_buffers, ms)
    if momentum_only or (not isinstance(lr, Tensor) and lr == 0.0):
        return
    us = _directions(xs, rho, _fit(eps, xs[0].dtype))  # eq 21, 24
    if weight_decay != 0.0:  # eq 25
        torch._foreach_mul_(ws, _fit(1.0 - lr * weight_decay, ws[0].dtype))
    if isinstance(step_size, Tensor):  # eq 22, 25
        torch._foreach_sub_(ws, torch._foreach_mul(us, step_size))
    else:
        torch._foreach_add_(ws, us, alpha=-_fit(step_size, ws[0].dtype))
    if half:
        torch._foreach_copy_(params, ws)
