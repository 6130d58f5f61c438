# SPDX-License-Identifier: MIT
"""Which tensors the C kernels step and which PyTorch's operations, and the checks of the latter."""

import functools
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import _get_capturable_supported_devices

import lpsgd_ext

from . import _eager, _shards

Lists = list[list[Tensor]]  # parameters, gradients and, for LPSGDM, momentum buffers

PLAIN_TYPES = (Tensor, torch.nn.Parameter)

_NATIVE_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_NO_SPARSE = "LPSGD and LPSGDM do not support sparse tensors"


class Row(NamedTuple):
    """One parameter, or a piece of it, in a step; `stream` and `offset` as for lpsgd_ext.lpsgd_."""

    tensors: tuple[Tensor, ...]  # the parameter, its gradient and what the state holds
    stream: int
    offset: int = 0


def observed() -> bool:
    """Whether something other than a device context watches PyTorch's operations."""
    if (
        torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack()
        or torch.autograd.forward_ad._current_level >= 0
    ):
        return True
    return any(
        not isinstance(torch._C._get_function_stack_at(i), torch.utils._device.DeviceContext)
        for i in range(torch._C._len_torch_function_stack())
    )


def cuda_refusal(device: torch.device) -> str | None:
    """Why the C kernels don't run on this device, if it is a CUDA device."""
    if device.type != "cuda":
        return None
    if torch.version.hip:
        return "this PyTorch is built for ROCm"
    return lpsgd_ext.cuda_refusal(device.index)


def warn_of_fallback(rows: Iterable[Row]) -> None:
    """Says once for a device that the C kernels cannot be used there, and why."""
    for device, _ in by_device(rows):
        refusal = cuda_refusal(device)
        if refusal:
            _warn_once(f"PyTorch's operations step on {device}: {refusal}")


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=2)


def is_native(tensors: tuple[Tensor, ...]) -> bool:
    """Whether the C kernels are meant for this parameter and what goes with it."""
    param, grad, *_ = tensors
    device = param.device
    return (
        device.type in ("cpu", "cuda")
        and cuda_refusal(device) is None
        and grad.dtype == param.dtype in _NATIVE_DTYPES
        and all(_has_native_memory(param, tensor) for tensor in tensors)
        and _is_dense(param)
    )


def _has_native_memory(param: Tensor, other: Tensor) -> bool:
    """Whether `other`'s elements lie in memory as `param`'s do, as the C kernels need it."""
    return (
        type(other) in PLAIN_TYPES
        and other.layout == torch.strided
        and not other.is_neg()
        and other.stride() == param.stride()
    )


def _is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one stretch of memory in some order of the dimensions."""
    extent = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride != extent:
            return tensor.numel() == 0
        extent *= size
    return True


def _is_out_of_bounds(tensor: Tensor) -> bool:
    """Whether the tensor reaches beyond its storage, which PyTorch's operations don't notice."""
    if tensor.device.type == "meta" or tensor.numel() == 0:
        return False
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    end = (tensor.storage_offset() + last + 1) * tensor.element_size()
    return bool(end > tensor.untyped_storage().nbytes())


def check_eager(tensors: tuple[Tensor, ...], momentum_float32: bool) -> None:
    """What PyTorch's own operations would not refuse, or only after some have been made."""
    param, grad, *buffers = tensors
    for buffer in buffers:
        if type(buffer) not in (*PLAIN_TYPES, type(param)):
            raise TypeError(
                f"momentum_buffer must be a Tensor as its parameter is, not {type(buffer).__name__}"
            )
    _check_eager_match(param, grad, buffers, momentum_float32)
    transformed = torch._C._functorch.peek_interpreter_stack() is not None  # no memory to look at
    for tensor in (param, *buffers):
        _check_eager_written(tensor, transformed)
    if not transformed and any(
        type(tensor) in PLAIN_TYPES and _is_out_of_bounds(tensor) for tensor in tensors
    ):
        raise RuntimeError("a tensor reaches beyond its storage, which has been resized since")


def _check_eager_match(
    param: Tensor, grad: Tensor, buffers: Sequence[Tensor], momentum_float32: bool
) -> None:
    tensors = (param, grad, *buffers)
    if any(tensor.layout != torch.strided for tensor in tensors):
        raise RuntimeError(_NO_SPARSE)
    for tensor in tensors[1:]:
        if tensor.shape != param.shape:
            raise RuntimeError(
                f"gradient and momentum_buffer must have the parameter's shape, "
                f"{tuple(param.shape)}, but got {tuple(tensor.shape)}"
            )
        if tensor.device != param.device:
            raise RuntimeError(
                "Expected all tensors to be on the same device, "
                f"but found at least two devices, {param.device} and {tensor.device}!"
            )
    if param.dtype not in _NATIVE_DTYPES and not param.is_complex():
        raise RuntimeError(f"LPSGD and LPSGDM cannot step parameters of {param.dtype}")
    if grad.is_complex() != param.is_complex():
        raise RuntimeError(f"a gradient of {grad.dtype} does not fit a parameter of {param.dtype}")
    for buffer in buffers:
        expected = momentum_dtype_of(param, momentum_float32)
        if buffer.dtype != expected:
            raise RuntimeError(f"momentum_buffer must be {expected}, but is {buffer.dtype}")


def _check_eager_written(tensor: Tensor, transformed: bool) -> None:
    if tensor.is_inference() and not torch.is_inference_mode_enabled():
        raise RuntimeError(
            "Inplace update to inference tensor outside InferenceMode is not allowed"
        )
    if torch.is_grad_enabled() and tensor.requires_grad and tensor.is_leaf:
        raise RuntimeError(
            "a leaf Variable that requires grad is being used in an in-place operation."
        )
    if not transformed and torch._debug_has_internal_overlap(tensor) == 1:
        raise RuntimeError(
            "unsupported operation: more than one element of the written-to tensor refers to "
            "a single memory location. Please clone() the tensor before performing the "
            "operation."
        )


def check_fused(rows: Sequence[Row]) -> None:
    """torch.optim's error for `fused=True` where a parameter has no C kernel that can run."""
    supported = ["cpu", "cuda"] if lpsgd_ext.build_info()["cuda"] else ["cpu"]
    for row in rows:
        if row.tensors[1].layout != torch.strided:
            raise RuntimeError(_NO_SPARSE)
        param = row.tensors[0]
        if param.device.type not in supported or param.dtype not in _NATIVE_DTYPES:
            raise RuntimeError(
                "`fused=True` requires all the params to be floating point Tensors of "
                f"supported devices: {supported} but {param.dtype} and {param.device.type}"
            )
        refusal = cuda_refusal(param.device)
        if refusal:
            raise RuntimeError(f"`fused=True` cannot be used on {param.device}: {refusal}")


def check_capturable(params: Sequence[Tensor]) -> None:
    devices = _get_capturable_supported_devices(supports_xla=False)
    if any(param.device.type not in devices for param in params):
        raise AssertionError(f"If capturable=True, params must be on supported devices: {devices}.")


def is_on_cuda(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_cuda


def for_device(values: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Values as the C kernels on a device take them. Those that are on a GPU stay on one: nothing
    waits for it."""
    on_cuda = [name for name, value in values.items() if is_on_cuda(value)]
    moved = {name: values[name].to(device, non_blocking=device.type == "cuda") for name in on_cuda}
    if on_cuda and device.type == "cuda":
        size = lpsgd_ext.cuda_scratch_size()
        moved["scratch"] = torch.empty(size, dtype=torch.uint8, device=device)
    return {**values, **moved}


def for_eager(group: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """Values of a group as _eager takes them: numbers, except where tensors have to stay."""
    keep = ("lr", "weight_decay") if group["differentiable"] or group["capturable"] else ()
    return {
        name: value.item() if isinstance(value, Tensor) and name not in keep else value
        for name, value in values.items()
    }


def momentum_dtype_of(param: Tensor, momentum_float32: bool) -> torch.dtype:
    """The dtype of the parameter's momentum_buffer."""
    wide = momentum_float32 and param.dtype in _eager.HALF_DTYPES
    return torch.float32 if wide else param.dtype


def eager_calls(
    rows: Iterable[Row], use_foreach: bool, values: dict[str, Any], rounding: dict[str, int]
) -> list[Callable[[], None]]:
    """The step in PyTorch's operations; checks the rows."""
    values = dict(values)
    momentum_float32 = values.pop("momentum_float32", False)

    def can_foreach(row: Row) -> bool:
        param = row.tensors[0]
        return (
            use_foreach
            and all(type(t) in PLAIN_TYPES and not t.is_neg() for t in row.tensors)
            and not param.is_complex()
            and not (rounding and param.dtype == torch.bfloat16)
        )

    def key(row: Row) -> tuple[bool, str, str]:
        return can_foreach(row), str(row.tensors[0].device), str(row.tensors[0].dtype)

    rows = sorted(rows, key=key)
    for row in rows:
        check_eager(row.tensors, momentum_float32)
    calls: list[Callable[[], None]] = []
    for (in_foreach, *_), group in groupby(rows, key=key):
        same = list(group)
        params, grads, *buffers = columns(same)
        momentum_buffers = buffers[0] if buffers else None
        if in_foreach:
            calls.append(partial(_eager.foreach, params, grads, momentum_buffers, **values))
        else:
            numbers = {**values, **rounding, **numbers_of(same)}
            calls.append(partial(_eager.for_loop, params, grads, momentum_buffers, **numbers))
    return calls


def by_device(rows: Iterable[Row]) -> list[tuple[torch.device, list[Row]]]:
    on: dict[torch.device, list[Row]] = {}
    for row in rows:
        on.setdefault(row.tensors[0].device, []).append(row)
    return list(on.items())


def numbers_of(rows: Sequence[Row]) -> dict[str, Any]:
    return {"streams": [row.stream for row in rows], "offsets": [row.offset for row in rows]}


def columns(rows: Sequence[Row]) -> Lists:
    return [list(column) for column in zip(*(row.tensors for row in rows), strict=True)]


def localize(row: Row, in_pieces: bool) -> list[Row]:
    """A DTensor's row as one of its local shard, or as one for each run of elements that are
    neighbours in the whole parameter; any other row as it is."""
    param = row.tensors[0]
    if not _shards.is_dtensor(param):
        return [row]
    tensors = _shards.local_tensors(row.tensors)
    if not in_pieces or not all(tensor.numel() and tensor.is_contiguous() for tensor in tensors):
        return [row._replace(tensors=tensors)]
    length, starts = _shards.runs(param)
    pieces = zip(*(torch.split(tensor.view(-1), length) for tensor in tensors), strict=True)
    return [Row(piece, row.stream, start) for piece, start in zip(pieces, starts, strict=True)]
