# SPDX-License-Identifier: MIT
"""LPSGD and LPSGDM, the lp-norm optimizers of arXiv:2606.02078, as drop-in PyTorch optimizers.

One number, p, says what they are: 2 is gradient descent, inf is sign descent::

    from lpsgd import LPSGDM, CosineAnnealingP

    optimizer = LPSGDM(model.parameters(), lr=0.01, p=6.0, momentum=0.9)
    schedule = CosineAnnealingP(optimizer, total_iters=epochs)  # p from 6 to 2
    for epoch in range(epochs):
        for x, y in batches:
            optimizer.zero_grad()
            loss_function(model(x), y).backward()
            optimizer.step()
        schedule.step()

Do not copy SGD's lr of 0.1. If your lr decays, leave the schedule out and keep p at 6 or inf.

Optimizers:
    LPSGDM: with momentum, which may take as little as one byte a parameter.
    LPSGD: without.

Schedules of p, used as torch's schedulers of lr:
    CosineAnnealingP: from its value to 2, along a cosine.
    LambdaP: what a function says.

Tools:
    suggest_pivot: a value for `pivot`, with which one lr serves every p.
    momentum_report: how the dtype of the momentum fits what it holds.
    release_gradients: steps parameters in backward, and frees their gradients.

`lpsgd_ext` is the module in C below, which serves by itself.
"""

from ._native import build_info
from ._optimizer import LPSGD, LPSGDM
from ._pivot import suggest_pivot
from ._release import ReleasedGradients, release_gradients
from ._report import MomentumReport, momentum_report
from ._schedule import CosineAnnealingP, LambdaP

__version__ = build_info()["version"]

__all__ = [
    "LPSGD",
    "LPSGDM",
    "CosineAnnealingP",
    "LambdaP",
    "MomentumReport",
    "ReleasedGradients",
    "__version__",
    "build_info",
    "momentum_report",
    "release_gradients",
    "suggest_pivot",
]


def __dir__() -> list[str]:
    return __all__
