# SPDX-License-Identifier: MIT
"""Lion, imported by who makes one: nothing else here needs its package."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.optim import Optimizer


def lion(params: Iterable[Tensor], **settings: Any) -> Optimizer:
    """lion-pytorch's Lion with these keyword arguments."""
    from lion_pytorch import Lion

    optimizer: Optimizer = Lion(params, **settings)
    return optimizer
