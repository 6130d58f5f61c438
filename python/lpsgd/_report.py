# SPDX-License-Identifier: MIT
"""How the dtype of the momentum buffers fits what they hold."""

import math
from typing import Any, NamedTuple

import torch
from torch.optim.optimizer import Optimizer

from ._eager import BYTE, LARGEST_BYTE
from ._schedule import innermost
from ._shards import full, largest
from ._values import momentum_exponent_in


class MomentumReport(NamedTuple):
    """What the momentum buffers of a group hold."""

    elements: int  #: in all buffers
    at_largest: float  #: the fraction at the largest number that the dtype has, or infinite
    at_zero: float  #: the fraction that is 0
    largest: float  #: the largest :math:`|m|` that is finite; of saturated buffers, a lower bound
    exponent: int | None  #: the `momentum_exponent` that fits, or None where all is 0


@torch.no_grad()
def momentum_report(optimizer: Optimizer) -> list[MomentumReport]:
    r"""How the momentum buffers' dtype fits what they hold, for every group of the optimizer.

    A buffer of one byte (`momentum_dtype=torch.float8_e5m2`) holds
    :math:`m \cdot 2^\text{momentum_exponent}` up to 57344 and turns what is larger into that. The
    exponent that fits leaves the largest :math:`|m|` one octave of headroom: twice it is still
    within the range, four times is not. Where elements are at the largest number, m may have been
    larger than it seems; then the exponent is that of one octave more.

    Ask now and then in the course of training: it is no part of the step, and reads all buffers. To
    change the exponent of a running optimizer, let the buffers follow through float32::

        for group in optimizer.param_groups:
            group["momentum_dtype"] = "float32"
        optimizer.load_state_dict(optimizer.state_dict())
        for group in optimizer.param_groups:
            group.update(momentum_dtype="float8_e5m2", momentum_exponent=18)
        optimizer.load_state_dict(optimizer.state_dict())

    Args:
        optimizer: an LPSGDM with any `momentum_dtype`.

    Returns:
        a list with a :class:`MomentumReport` of each group. A DTensor counts as a whole, so all
        ranks must ask. Where processes hold different plain tensors (FSDP1, ZeRO), each reports
        its own.

    Raises:
        TypeError: for another optimizer.

    Example:
        >>> import torch
        >>> from lpsgd import LPSGDM
        >>> param = torch.nn.Parameter(torch.zeros(4))
        >>> optimizer = LPSGDM([param], momentum=0.5, momentum_dtype=torch.float8_e5m2)
        >>> param.grad = torch.tensor([0.25, 8.0, 0.0, -0.5])
        >>> optimizer.step()
        >>> momentum_report(optimizer)
        [MomentumReport(elements=4, at_largest=0.25, at_zero=0.25, largest=1.75, exponent=14)]
    """
    optimizer = innermost(optimizer)
    if not all("pivot" in group and "momentum_dtype" in group for group in optimizer.param_groups):
        raise TypeError(f"momentum_report() needs an LPSGDM, not {type(optimizer).__name__}")
    return [report_of(group, optimizer) for group in optimizer.param_groups]


def report_of(
    group: dict[str, Any], optimizer: Optimizer, name: str = "momentum_buffer"
) -> MomentumReport:
    """`momentum_report` of a group; other optimizers call the momentum by other names."""
    elements, at_largest, at_zero, most = 0, 0, 0, 0.0
    for param in group["params"]:
        x = optimizer.state.get(param, {}).get(name)
        if x is None:
            continue
        x = torch.view_as_real(x.resolve_conj()) if x.is_complex() else x
        bound, unit = torch.finfo(x.dtype).max, 1.0
        if x.dtype == BYTE:
            x, unit = x.float(), 2.0 ** -momentum_exponent_in(group)
        x = x.abs()
        elements += x.numel()
        at_largest += int(full((x >= bound).sum()))
        at_zero += int(full((x == 0.0).sum()))
        most = max(most, largest(x.where(x.isfinite(), 0.0)) * unit)
    exponent = None
    if most:
        fitting = math.frexp(LARGEST_BYTE / 2.0 / max(most, 2.0**-126))[1] - 1
        exponent = max(-126, min(126, fitting))
    count = max(elements, 1)
    return MomentumReport(elements, at_largest / count, at_zero / count, most, exponent)
