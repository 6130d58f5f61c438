# SPDX-License-Identifier: MIT
"""What several test files share."""

import math
import shutil
from pathlib import Path

import pytest
import torch

import lpsgd

ROOT = Path(__file__).resolve().parent.parent
CLASSES = [lpsgd.LPSGD, lpsgd.LPSGDM]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
PS = [2.0, 2.5, 3.0, 6.0, 9.0, 100.0, math.inf]


def tool(name: str) -> str:
    """The path of a program, or a skip that says which one is missing."""
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed")
    return path


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's bits as integers, so that comparisons see signs of zero and NaNs."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.detach().contiguous().view(integer)


def ulps(actual: torch.Tensor, exact: torch.Tensor) -> float:
    """The largest distance from `exact` (float64), in units in the last place of actual's dtype."""
    info = torch.finfo(actual.dtype)
    magnitude = exact.abs().clamp_min(info.smallest_normal)
    exponent = torch.frexp(magnitude).exponent - 1
    unit = torch.ldexp(torch.full_like(magnitude, info.eps), exponent)
    error = (actual.double() - exact).abs() / unit
    return error.max().item() if error.numel() else 0.0
