# SPDX-License-Identifier: MIT
"""Loading: what LPSGD and LPSGDM make of each other's checkpoints and of torch.optim.SGD's."""

import copy
from typing import Any

import torch
from torch import Tensor

from ._eager import BYTE, HALF_DTYPES, decoded, nearest_byte
from ._unusual import PLAIN_TYPES, is_aligned, is_out_of_bounds, span
from ._values import momentum_dtype_in, momentum_dtype_of, momentum_exponent_in

_OURS = frozenset({"p", "pivot", "stochastic_rounding"})  # what no other optimizer's groups have
_OF_LPSGDM = ("momentum_dtype", "momentum_exponent")  # what LPSGD's groups lack besides momentum
# What other optimizers of torch.optim keep for a parameter in the place of a momentum_buffer.
_OTHERS = frozenset({"ax", "exp_avg", "prev", "row_var", "square_avg", "sum", "variance"})

Group = dict[str, Any]
Remarks = dict[str, None]  # a set in order


def translate(
    state_dict: dict[str, Any], groups: list[Group], has_momentum: bool
) -> tuple[dict[str, Any], str]:
    """The state_dict as the optimizer that has these groups would have saved it, and what to tell
    the user about that. Raises ValueError for an optimizer's that is none of the three."""
    saved_groups = state_dict["param_groups"]
    _refuse_others(state_dict["state"], saved_groups)
    if len(saved_groups) != len(groups):
        return state_dict, ""  # torch.optim says so
    state, remarks = dict(state_dict["state"]), Remarks()
    translated = []
    for saved, own in zip(saved_groups, groups, strict=True):
        group, scale = _translate_group(saved, own, has_momentum, remarks)
        translated.append(group)
        for number in saved["params"] if scale != 1.0 else ():
            if _buffer_of(state.get(number)) is not None:
                state[number] = _scaled(state[number], scale, remarks)
    return {**state_dict, "state": state, "param_groups": translated}, "; ".join(remarks)


def _is_foreign(group: Group) -> bool:
    return "lr" in group and _OURS.isdisjoint(group)


def _refuse_others(state: dict[Any, Any], groups: list[Group]) -> None:
    entries = [(k, entry) for k, entry in state.items() if isinstance(entry, dict) and entry]
    fits = any("momentum_buffer" in entry for _, entry in entries)
    not_sgd = any(
        _is_foreign(group) and ("dampening" not in group or (group.get("momentum") and not fits))
        for group in groups
    )
    for number, entry in entries:
        if not_sgd or ("momentum_buffer" not in entry and not _OTHERS.isdisjoint(entry)):
            raise ValueError(
                f"loaded state dict has {', '.join(map(str, entry))} in the state of parameter "
                f"{number}: it is no checkpoint of LPSGD, LPSGDM or torch.optim.SGD"
            )


def _translate_group(
    saved: Group, own: Group, has_momentum: bool, remarks: Remarks
) -> tuple[Group, float | None]:
    """The group, and what its momentum buffers are multiplied by; None: they are dropped."""
    if _is_foreign(saved):
        remarks[
            "the groups keep this optimizer's values, as the checkpoint has no p, and its lr and "
            "weight_decay mean something else"
        ] = None
        if saved.get("nesterov"):
            remarks["nesterov is dropped"] = None
        names = {"param_names": saved["param_names"]} if "param_names" in saved else {}
        group = {**own, **names, "params": saved["params"]}
        return group, _scale(saved, own) if has_momentum else None
    if not has_momentum and "momentum_dtype" in saved:  # LPSGDM's
        return {name: value for name, value in saved.items() if name not in _OF_LPSGDM}, None
    if has_momentum and "momentum_dtype" not in saved and saved.get("momentum") == 0.0:  # LPSGD's
        if own["momentum"] != 0.0:
            remarks["the groups keep this optimizer's momentum, as LPSGD has none"] = None
        return {**saved, **{name: own[name] for name in ("momentum", *_OF_LPSGDM)}}, 1.0
    return saved, 1.0


def _scale(saved: Group, own: Group) -> float | None:
    """What turns SGD's buffers, which grow by (1 - dampening) * gradient, into averages."""
    momentum, dampening = saved.get("momentum", 0.0), saved.get("dampening", 0.0)
    if not (0.0 < momentum < 1.0 and dampening < 1.0):  # no gradient of late is in them
        return None
    sign = 1.0 if bool(saved.get("maximize")) == own["maximize"] else -1.0
    return float(sign * (1.0 - momentum) / (1.0 - dampening))


def _buffer_of(entry: Any) -> Tensor | None:
    buffer = entry.get("momentum_buffer") if isinstance(entry, dict) else None
    return buffer if isinstance(buffer, Tensor) else None


def _scaled(entry: dict[str, Any], scale: float | None, remarks: Remarks) -> dict[str, Any]:
    if scale is None:
        remarks["the momentum buffers are dropped"] = None
        return {name: value for name, value in entry.items() if name != "momentum_buffer"}
    remarks[f"the momentum buffers are taken, times {scale:g}, as averages of gradients"] = None
    buffer = entry["momentum_buffer"].detach()
    wide = buffer.float() if buffer.dtype in HALF_DTYPES else buffer
    return {**entry, "momentum_buffer": wide * scale}


def buffers_of(state_dict: dict[str, Any], groups: list[Group]) -> dict[Tensor, Tensor]:
    """The momentum buffers of a state_dict by the parameters that get them."""
    pairs = [
        (param, _buffer_of(state_dict["state"].get(number)))
        for saved, own in zip(state_dict["param_groups"], groups, strict=False)
        for number, param in zip(saved["params"], own["params"], strict=False)
    ]
    return {param: buffer for param, buffer in pairs if buffer is not None}


def fit_buffers(
    state: dict[str, Any], saved: dict[Tensor, Tensor], defaults: dict[str, Any]
) -> None:
    """Gives momentum buffers their dtype and place, in a state that torch.optim has made of a
    state_dict whose buffers were `saved`. `defaults` are for groups that lack a value."""
    for group in state["param_groups"]:
        values = {**defaults, **group}
        momentum_dtype, exponent = momentum_dtype_in(values), momentum_exponent_in(values)
        for param in group["params"]:
            entry = state["state"].get(param)
            buffer = _buffer_of(entry)
            if buffer is not None and param in saved:
                dtype = momentum_dtype_of(param, momentum_dtype)
                one = buffer
                if dtype != buffer.dtype or saved[param].dtype == BYTE:
                    one = _converted(saved[param], dtype, exponent).to(param.device)
                entry["momentum_buffer"] = _placed(param, one)


def _converted(buffer: Tensor, dtype: torch.dtype, exponent: int) -> Tensor:
    """The buffer in another dtype: exact where that can be, else the nearest number."""
    if buffer.dtype == dtype:
        return buffer
    if buffer.dtype == BYTE:
        return decoded(buffer, exponent).to(dtype)
    if dtype != BYTE:
        return buffer.to(dtype)
    if buffer.dtype not in (torch.float32, torch.float64, *HALF_DTYPES):
        raise ValueError(f"a momentum_buffer of {buffer.dtype} cannot be loaded as {dtype}")
    return nearest_byte(buffer, exponent)


def _placed(param: Tensor, buffer: Tensor) -> Tensor:
    """The buffer with its elements where C wants them, in the parameter's order and aligned."""
    if (
        any(type(t) not in PLAIN_TYPES or t.layout != torch.strided for t in (param, buffer))
        or buffer.shape != param.shape
        or (buffer.stride() == param.stride() and is_aligned(buffer, span(buffer)))
        or is_out_of_bounds(buffer)
    ):
        return buffer
    like = torch.empty_like(param, dtype=buffer.dtype, memory_format=torch.preserve_format)
    return like.copy_(buffer.detach())


def as_integers(state: Any, groups: list[Group]) -> Any:
    """A state whose momentum buffers of one byte are seen as integers: PyTorch's pickles cannot be
    read again where they hold a tensor of float8_e5m2."""
    return _seen_as(state, groups, BYTE, torch.uint8)


def from_integers(state: Any, groups: list[Group]) -> Any:
    """The state that as_integers was given."""
    return _seen_as(state, groups, torch.uint8, BYTE)


def _seen_as(state: Any, groups: list[Group], old: torch.dtype, new: torch.dtype) -> Any:
    seen = dict[Tensor, dict[str, Any]]()
    for group in groups:
        for param in group["params"] if momentum_dtype_in(group) is BYTE else ():
            entry = state.get(param)
            buffer = _buffer_of(entry)
            if buffer is not None and type(buffer) in PLAIN_TYPES and buffer.dtype == old:
                seen[param] = {**entry, "momentum_buffer": buffer.view(new)}
    if seen:
        state = copy.copy(state)
        state.update(seen)
    return state
