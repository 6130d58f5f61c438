# SPDX-License-Identifier: MIT
"""For those who experiment with optimizers: `pip install "lpsgd[experiments]"`."""
