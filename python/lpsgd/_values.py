# SPDX-License-Identifier: MIT
"""The values of a parameter group: their checks, and what the classes read out of them. The checks
of other arguments."""

import functools
import inspect
import numbers
import operator
import re
from collections.abc import Callable
from typing import Any, ParamSpec

import torch
from torch import Tensor

from ._eager import BYTE, HALF_DTYPES

_P = ParamSpec("_P")

# Groups name them by these strings: torch.distributed.checkpoint refuses a torch.dtype.
MOMENTUM_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float8_e5m2": BYTE}

_RANGES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "lr": ("learning rate", lambda value: value >= 0.0),
    "p": ("p value", lambda value: value >= 2.0),
    "momentum": ("momentum value", lambda value: 0.0 <= value < 1.0),
    "weight_decay": ("weight_decay value", lambda value: value >= 0.0),
    "eps": ("epsilon value", lambda value: value >= 0.0),
    "pivot": ("pivot value", lambda value: 0.0 < value < float("inf")),
    "grad_scale": ("grad_scale", lambda value: 0.0 < value < float("inf")),
}


# What the arguments of other optimizers and schedulers are called here.
_HINTS = {
    "T_max": "it is called total_iters",
    "betas": "LPSGDM has momentum, which is one number",
    "dampening": "LPSGDM's momentum_buffer is an average, as with dampening=momentum",
    "eta_min": "the last p is called p_min",
    "lr_lambda": "it is called p_lambda",
    "momentum": "LPSGDM has it",
    "nesterov": "there is no Nesterov momentum",
}


def with_hints(function: Callable[_P, None]) -> Callable[_P, None]:
    """A constructor that says more where it is given an argument of another optimizer's."""

    @functools.wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> None:
        try:
            function(*args, **kwargs)
        except TypeError as error:
            unexpected = re.search(r"unexpected keyword argument '(\w+)'", str(error))
            at_once = error.__traceback__ and error.__traceback__.tb_next is None
            if unexpected and at_once and unexpected[1] in _HINTS:
                error.args = (f"{error} ({_HINTS[unexpected[1]]})",)
            raise

    call.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]
    return call


def check_integer(name: str, value: Any, least: int) -> int:
    """The argument as an int, which a float may be that is one, such as 10.0."""
    try:
        number = operator.index(value)
    except TypeError:
        if not isinstance(value, numbers.Real):
            raise TypeError(f"{name} must be an int, not {type(value).__name__}") from None
        whole = float(value)
        number = int(whole) if whole.is_integer() else least - 1
    if number < least:
        raise ValueError(f"Invalid {name}: {value}")
    return number


def check_values(values: dict[str, Any]) -> None:
    """Raises, naming the argument, for a value of a group that no step can use."""
    check_ranges(values)
    in_bytes = momentum_dtype_in(values) is BYTE
    momentum_exponent_in(values)
    for name in ("seed", "rounding_step"):
        if not isinstance(value := values.get(name, 0), int):
            raise TypeError(f"{name} must be an int, not {type(value).__name__}")
    if values["fused"] and values["foreach"]:
        raise RuntimeError("`fused` and `foreach` cannot be `True` together.")
    for name in ("fused", "foreach"):
        if values["differentiable"] and values[name]:
            raise RuntimeError(f"`{name}` does not support `differentiable`")
    at_random = {"stochastic_rounding": values["stochastic_rounding"]}
    at_random["momentum_dtype=torch.float8_e5m2"] = in_bytes
    for text, chosen in at_random.items():
        for name in ("differentiable", "capturable"):  # replays would repeat the bits
            if chosen and values[name]:
                raise RuntimeError(f"`{text}` does not support `{name}`")


def check_ranges(values: dict[str, Any]) -> None:
    """Raises, naming the argument, for a number out of its range."""
    for name in _RANGES:
        if name in values:
            _check_range(name, values[name])


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
        # torch.optim.SGD's third argument is momentum.
        is_momentum = name == "p" and 0.0 <= value < 1.0
        hint = " (the argument after lr is p; momentum is passed by name)" if is_momentum else ""
        raise ValueError(f"Invalid {text}: {value}{hint}")


def is_on_cuda(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_cuda


def by_default(group: dict[str, Any]) -> bool:
    """Whether the group leaves it to us how to step."""
    return group["fused"] is None and group["foreach"] is None


def momentum_dtype_in(group: dict[str, Any]) -> torch.dtype | None:
    """The group's momentum_dtype, which may be written as a dtype or by its name."""
    value = group.get("momentum_dtype")
    for name, dtype in MOMENTUM_DTYPES.items():
        if value is dtype or (isinstance(value, str) and value == name):
            return dtype
    if value is not None:
        raise ValueError(f"Invalid momentum_dtype: {value}")
    return None


def momentum_exponent_in(group: dict[str, Any]) -> int:
    """The power of two by which momentum buffers of one byte are multiplied."""
    value = group.get("momentum_exponent", 15)
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"momentum_exponent must be an int, not {type(value).__name__}")
    if abs(value) > 126:
        raise ValueError(f"Invalid momentum_exponent: {value}")
    return value


def momentum_dtype_of(param: Tensor, momentum_dtype: torch.dtype | None) -> torch.dtype:
    """The dtype of the parameter's momentum_buffer: the group's, or its own."""
    narrow = param.dtype in (torch.float32, *HALF_DTYPES)
    return momentum_dtype if momentum_dtype is not None and narrow else param.dtype


def rounds_at_random(group: dict[str, Any]) -> bool:
    """Whether a step of the group needs random bits."""
    return bool(group["stochastic_rounding"]) or momentum_dtype_in(group) is BYTE
