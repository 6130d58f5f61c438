# SPDX-License-Identifier: MIT
"""LPSGD and LPSGDM, the lp-norm optimizers of arXiv:2606.02078, as drop-in PyTorch optimizers."""

# torch comes before lpsgd_ext, so that both share PyTorch's OpenMP runtime.
import torch  # noqa: F401  # isort: skip
import lpsgd_ext

from ._optimizer import LPSGD, LPSGDM
from ._pivot import suggest_pivot
from ._release import ReleasedGradients, release_gradients
from ._report import MomentumReport, momentum_report
from ._schedule import CosineAnnealingP, LambdaP

__version__ = lpsgd_ext.build_info()["version"]

__all__ = [
    "LPSGD",
    "LPSGDM",
    "CosineAnnealingP",
    "LambdaP",
    "MomentumReport",
    "ReleasedGradients",
    "__version__",
    "momentum_report",
    "release_gradients",
    "suggest_pivot",
]


def __dir__() -> list[str]:
    return __all__
