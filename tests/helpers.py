# SPDX-License-Identifier: MIT
"""What several test files share."""

import math
import shutil
from pathlib import Path

import pytest
import torch

import lpsgd
import lpsgd_ext

ROOT = Path(__file__).resolve().parent.parent
CLASSES = [lpsgd.LPSGD, lpsgd.LPSGDM]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
PS = [2.0, 2.5, 3.0, 6.0, 9.0, 100.0, math.inf]

needs_fma = pytest.mark.skipif(
    lpsgd_ext.cpu_capability() == "default"
    and torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"),
    reason="PyTorch computes SGD without FMA on this CPU, in other bits",
)


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


def assert_same_bits(model: torch.nn.Module, other: torch.nn.Module) -> None:
    """Every parameter of one module has the bits of the other's."""
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(bits(a), bits(b)), name


def sgd_with_dampening(params, lr: float) -> torch.optim.SGD:
    """What LPSGDM is at p = 2: SGD whose momentum is an average, from a zero buffer."""
    optimizer = torch.optim.SGD(params, lr=lr, momentum=0.9, dampening=0.9, foreach=False)
    for param in optimizer.param_groups[0]["params"]:
        optimizer.state[param]["momentum_buffer"] = torch.zeros_like(param)
    return optimizer


def ulps(actual: torch.Tensor, exact: torch.Tensor) -> float:
    """The largest distance from `exact` (float64), in units in the last place of actual's dtype."""
    info = torch.finfo(actual.dtype)
    magnitude = exact.abs().clamp_min(info.smallest_normal)
    exponent = torch.frexp(magnitude).exponent - 1
    unit = torch.ldexp(torch.full_like(magnitude, info.eps), exponent)
    error = (actual.double() - exact).abs() / unit
    return error.max().item() if error.numel() else 0.0
