# SPDX-License-Identifier: MIT
"""LPSGD and LPSGDM, the lp-norm optimizers of arXiv:2606.02078, as drop-in PyTorch optimizers."""

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
