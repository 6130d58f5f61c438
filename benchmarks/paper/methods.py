# SPDX-License-Identifier: MIT
"""The optimizers compared, and the schedules of their lr and p."""

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from torch import Tensor
from torch.optim import SGD, AdamW, NAdam, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR

from benchmarks.lion import lion
from benchmarks.paper.config import Run
from lpsgd import LPSGD, LPSGDM, CosineAnnealingP


def cautious_adamw(params: Iterable[Tensor], **settings: Any) -> Optimizer:
    """timm's AdamW with the mask of arXiv:2411.16085; nothing else here needs its package."""
    from timm.optim.adamw import AdamWLegacy

    optimizer: Optimizer = AdamWLegacy(params, caution=True, **settings)
    return optimizer


OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "SGD": partial(SGD, fused=True),
    "SGDM": partial(SGD, momentum=0.9, fused=True),
    "AdamW": partial(AdamW, fused=True),
    "NAdamW": partial(NAdam, decoupled_weight_decay=True),
    "CautiousAdamW": cautious_adamw,
    "Lion": lion,
    "LPSGD": LPSGD,
    "LPSGDM": LPSGDM,
}


def make_optimizer(run: Run, params: Iterable[Tensor]) -> Optimizer:
    """The optimizer of a run; all settings that it doesn't name are the optimizer's defaults."""
    return OPTIMIZERS[run.optimizer](params, lr=run.lr, **run.settings)


def make_schedules(run: Run, optimizer: Optimizer, steps_per_epoch: int) -> list[LRScheduler]:
    """What to step once per epoch or per step, as the run says."""
    per_epoch = steps_per_epoch if run.every == "step" else 1
    total, warmup = run.epochs * per_epoch, round(run.warmup * per_epoch)
    schedules: list[LRScheduler] = []
    if run.anneal_p:
        schedules.append(CosineAnnealingP(optimizer, total, run.p_end))
    parts: list[LRScheduler] = []
    if warmup:
        parts.append(LinearLR(optimizer, 1 / (warmup + 1), total_iters=warmup))
    if run.lr_schedule == "cosine":
        parts.append(CosineAnnealingLR(optimizer, total - warmup))
    return schedules + (parts if len(parts) < 2 else [SequentialLR(optimizer, parts, [warmup])])


def p_of(optimizer: Optimizer) -> float:
    """The p of an optimizer's first group; 2 for optimizers without one, except those that are sign
    descent."""
    sign = type(optimizer).__name__ == "Lion"
    return float(optimizer.param_groups[0].get("p", math.inf if sign else 2.0))
