# SPDX-License-Identifier: MIT
"""The schedule of p."""

import math
from typing import Any

from torch.optim.optimizer import Optimizer

import lpsgd_ext


class CosineAnnealingP:
    r"""Takes the `p` of every group from its value to `p_min` along a cosine.

    After k calls of `step`, a group's `p` is :math:`p_{k+1}` (arXiv:2606.02078, eq 19):

    .. math::
        p_s = p_{min} + (p_{max} - p_{min}) \cdot (1 + \cos(\pi (s - 1) / (S - 1))) / 2

    with S = `total_iters` and :math:`p_{max}` the group's `p` when the schedule is made, which is
    kept in the group as `initial_p`. It stays at `p_min` after the last. Call `step` once per epoch
    or once per optimizer step, after `optimizer.step()`.

    Args:
        optimizer: an optimizer whose groups have a `p`, finite and :math:`\geq 2`.
        total_iters: S, the number of epochs or steps, :math:`\geq 1`.
        p_min: the last value, finite and :math:`\geq 2`.
        last_epoch: k, the number of calls of `step` that went before; 0 starts afresh.

    Raises:
        ValueError, TypeError: for arguments out of range.

    Example:
        >>> import torch
        >>> from lpsgd import LPSGD
        >>> optimizer = LPSGD([torch.nn.Parameter(torch.zeros(1))], p=6.0)
        >>> schedule = CosineAnnealingP(optimizer, total_iters=3)
        >>> for _ in range(4):
        ...     print(schedule.get_last_p())
        ...     optimizer.step()
        ...     schedule.step()
        [6.0]
        [4.0]
        [2.0]
        [2.0]
    """

    def __init__(
        self, optimizer: Optimizer, total_iters: int, p_min: float = 2.0, last_epoch: int = 0
    ) -> None:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"{type(optimizer).__name__} is not an Optimizer")
        if not total_iters >= 1:
            raise ValueError(f"Invalid total_iters: {total_iters}")
        if not 2.0 <= p_min < math.inf:
            raise ValueError(f"Invalid p_min: {p_min}")
        if not last_epoch >= 0:
            raise ValueError(f"Invalid last_epoch: {last_epoch}")
        for i, group in enumerate(optimizer.param_groups):
            if "p" not in group:
                raise ValueError(f"param_groups[{i}] has no p to schedule")
            initial_p = group.get("initial_p", group["p"])
            if not 2.0 <= initial_p < math.inf:
                raise ValueError(f"param_groups[{i}] has p = {initial_p}, which has no cosine")
        self.optimizer = optimizer
        self.total_iters = total_iters
        self.p_min = p_min
        self.last_epoch = last_epoch
        for group in optimizer.param_groups:
            group.setdefault("initial_p", group["p"])
        self._set_p()

    def _set_p(self) -> None:
        for group in self.optimizer.param_groups:
            group["p"] = lpsgd_ext.cosine_p(
                self.last_epoch + 1,
                self.total_iters,
                group.setdefault("initial_p", group["p"]),
                self.p_min,
            )

    def step(self) -> None:
        """Moves every group's `p` one on."""
        self.last_epoch += 1
        self._set_p()

    def get_last_p(self) -> list[float]:
        """Every group's `p` as it is now."""
        return [group["p"] for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """Everything but the optimizer, whose own state_dict keeps `p` and `initial_p`."""
        return {name: value for name, value in self.__dict__.items() if name != "optimizer"}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from a `state_dict`, also with the optimizer's `p`."""
        self.__dict__.update(state_dict)
        self._set_p()
