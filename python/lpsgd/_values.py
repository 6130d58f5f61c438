# SPDX-License-Identifier: MIT
"""The values of a parameter group: their checks, and what the classes read out of them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._eager import HALF_DTYPES

FLOAT32 = (torch.float32, "float32")  # the two ways to write momentum_dtype

_RANGES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "lr": ("learning rate", lambda value: value >= 0.0),
    "p": ("p value", lambda value: value >= 2.0),
    "momentum": ("momentum value", lambda value: 0.0 <= value < 1.0),
    "weight_decay": ("weight_decay value", lambda value: value >= 0.0),
    "eps": ("epsilon value", lambda value: value >= 0.0),
    "pivot": ("pivot value", lambda value: 0.0 < value < float("inf")),
}


def check_values(values: dict[str, Any]) -> None:
    """Raises, naming the argument, for a value of a group that no step can use."""
    for name in _RANGES:
        if name in values:
            _check_range(name, values[name])
    if values.get("momentum_dtype") not in (None, *FLOAT32):
        raise ValueError(f"Invalid momentum_dtype: {values['momentum_dtype']}")
    for name in ("seed", "rounding_step"):
        if not isinstance(value := values.get(name, 0), int):
            raise TypeError(f"{name} must be an int, not {type(value).__name__}")
    if values["fused"] and values["foreach"]:
        raise RuntimeError("`fused` and `foreach` cannot be `True` together.")
    for name in ("fused", "foreach", "stochastic_rounding"):
        if values["differentiable"] and values[name]:
            raise RuntimeError(f"`{name}` does not support `differentiable`")
    if values["stochastic_rounding"] and values["capturable"]:  # replays would repeat the bits
        raise RuntimeError("`stochastic_rounding` does not support `capturable`")


def _check_range(name: str, value: Any) -> None:
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ValueError(f"Tensor {name} must be 1-element")
    if isinstance(value, Tensor) and value.device.type != "cpu":
        return  # to look at it would wait for the device
    text, in_range = _RANGES[name]
    try:
        valid = in_range(value)
    except (TypeError, NotImplementedError):
        raise TypeError(f"{name} must be a number, not {type(value).__name__}") from None
    if not valid:
        raise ValueError(f"Invalid {text}: {value}")


def is_on_cuda(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_cuda


def by_default(group: dict[str, Any]) -> bool:
    """Whether the group leaves it to us how to step."""
    return group["fused"] is None and group["foreach"] is None


def momentum_dtype_of(param: Tensor, momentum_float32: bool) -> torch.dtype:
    """The dtype of the parameter's momentum_buffer."""
    wide = momentum_float32 and param.dtype in HALF_DTYPES
    return torch.float32 if wide else param.dtype
