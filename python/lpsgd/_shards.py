# SPDX-License-Identifier: MIT
"""DTensors (FSDP2, tensor parallel). The update is elementwise: a shard is a tensor like others."""

import math
import sys
from typing import Any

import torch
from torch import Tensor


def is_dtensor(tensor: Any) -> bool:
    """Whether it is a DTensor; doesn't import torch.distributed for it."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Any) -> Tensor:
    """This rank's shard of a DTensor."""
    shard: Any = tensor._local_tensor
    result: Tensor = shard.wait() if hasattr(shard, "wait") else shard
    return result


def full(tensor: Any) -> Tensor:
    """The tensor, gathered of all ranks if it is a DTensor: then all must ask."""
    result: Tensor = tensor.full_tensor() if is_dtensor(tensor) else tensor
    return result


def has_nonzero(tensor: Any) -> bool:
    """Whether an element is not 0; of a DTensor, in any rank's shard: all ranks must ask."""
    return bool(full(tensor.any()))


def largest(tensor: Any) -> float:
    """The largest element, or 0; of a DTensor, in all ranks' shards: all ranks must ask."""
    if not is_dtensor(tensor):
        return float(tensor.max().clamp_min(0.0)) if tensor.numel() else 0.0
    from torch.distributed.tensor import DTensor, Partial

    mesh = tensor.device_mesh
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    one = torch.full((), largest(local(tensor)), dtype=dtype, device=mesh.device_type)
    return float(DTensor.from_local(one, mesh, [Partial("max")] * mesh.ndim).full_tensor())


def local_tensors(tensors: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """This rank's shards of a DTensor parameter, its gradient and its momentum_buffer.

    A gradient of other placements is redistributed. Raises RuntimeError for what cannot be stepped
    shard by shard.
    """
    param, grad, *buffers = tensors
    if not all(is_dtensor(tensor) for tensor in tensors):
        raise RuntimeError(
            "got mixed torch.Tensor and DTensor: the parameter, its gradient and its "
            "momentum_buffer must all be DTensors or none of them"
        )
    if any(placement.is_partial() for placement in param.placements):
        raise RuntimeError(f"parameters with placements {param.placements} cannot be stepped")
    if any(tensor.shape != param.shape for tensor in tensors):
        raise RuntimeError("gradient and momentum_buffer must have the parameter's shape")
    for buffer in buffers:
        if buffer.device_mesh != param.device_mesh or buffer.placements != param.placements:
            raise RuntimeError(
                f"momentum_buffer must have the parameter's placements, {param.placements}, "
                f"but has {buffer.placements}"
            )
    local_param = local(param)
    if grad.device_mesh != param.device_mesh or grad.placements != param.placements:
        grad = grad.redistribute(param.device_mesh, param.placements)
    local_grad = local(grad)
    if local_grad.stride() != local_param.stride() and local_grad.shape == local_param.shape:
        local_grad = torch.empty_like(local_param, dtype=local_grad.dtype).copy_(local_grad)
    return local_param, local_grad, *(local(buffer) for buffer in buffers)


def runs(param: Any) -> tuple[int, list[int]]:
    """How this rank's shard lies in the whole parameter, both contiguous: the length of the runs of
    elements that are neighbours there, and the index of each run's first element there."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    sizes = param.shape
    shape, offset = compute_local_shape_and_global_offset(
        sizes, param.device_mesh, param.placements
    )
    if 0 in shape:
        return 1, []
    strides = [math.prod(sizes[d + 1 :]) for d in range(len(sizes))]
    # A run: the inner dimensions that the rank has whole, and its stretch of the next one.
    run_dim = len(sizes)
    while run_dim and (run_dim == len(sizes) or shape[run_dim] == sizes[run_dim]):
        run_dim -= 1
    length = math.prod(shape[run_dim:])
    starts = torch.tensor(sum(o * stride for o, stride in zip(offset, strides, strict=True)))
    for d in range(run_dim):
        starts = starts[..., None] + torch.arange(shape[d]) * strides[d]
    return length, starts.flatten().tolist()
