# SPDX-License-Identifier: MIT
"""For those who experiment with optimizers: `pip install "lpsgd[experiments]"`.

`Recorder` tells what an optimizer's steps do. `compare` trains your network with several
optimizers, each with its best lr. `spectrum` tells the curvature of its loss. The module
`lpsgd.experiments.geometry` draws what p does in two dimensions, and `lpsgd.experiments.statistics`
has tests for a few seeds.
"""

from ._compare import METHODS, Comparison, Method, accuracy, compare, cross_entropy
from ._hessian import Spectrum, flatness, spectrum
from ._recorder import Record, Recorder

__all__ = [
    "METHODS",
    "Comparison",
    "Method",
    "Record",
    "Recorder",
    "Spectrum",
    "accuracy",
    "compare",
    "cross_entropy",
    "flatness",
    "spectrum",
]
