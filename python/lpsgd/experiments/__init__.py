# SPDX-License-Identifier: MIT
"""For those who experiment with optimizers: `pip install "lpsgd[experiments]"`.

`Recorder` tells what an optimizer's steps do.
"""

from ._recorder import Record, Recorder

__all__ = ["Record", "Recorder"]
