# SPDX-License-Identifier: MIT
"""The steps against the equations in arbitrary precision (mpmath), where no C library has a part.

The other tests of accuracy trust pow() of the C library or of PyTorch in float64.
"""

import math
from dataclasses import dataclass

import pytest
import torch
from mpmath import mp, mpf

import lpsgd
import lpsgd_ext
from helpers import ROOT

PS = [2.0, 2.1, 2.5, 3.0, 4.0, 6.0, 9.0, 100.0, 1e9, math.inf]
DTYPES = [torch.float32, torch.float64]


@pytest.fixture(autouse=True)
def forty_digits():
    with mp.workdps(40):
        yield


def direction(x, p, eps=0.0, pivot=1.0):
    """u times c, as a first step from zero shows it."""
    param = torch.zeros_like(x, requires_grad=True)
    param.grad = x
    lpsgd.LPSGD([param], lr=1.0, p=p, eps=eps, pivot=pivot, fused=True).step()
    return -param.detach()


def base(x, eps, dtype):
    """|x| + eps as the dtype rounds it; a sum of two numbers is never inexact for being tiny."""
    with mp.workprec(24 if dtype == torch.float32 else 53):
        return abs(mpf(x)) + mpf(torch.tensor(eps, dtype=dtype).item())


def power(y, p):
    """y^-rho with rho as the step uses it: rounded to float64 (see the next test)."""
    return y ** -mpf(lpsgd_ext.rho(p))


@pytest.mark.parametrize("p", PS[:-1])
def test_rho_is_that_of_eq_20_within_its_three_roundings(p):
    exact = (mpf(p) - 2) / (mpf(p) - 1)
    assert abs(mpf(lpsgd_ext.rho(p)) - exact) <= 3 * mpf(2) ** -53 * exact


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pivot", [1.0, 1e-3, 250.0])
@pytest.mark.parametrize("p", PS)
def test_any_gradient_has_its_direction(dtype, pivot, p):
    info = torch.finfo(dtype)
    integer, infinity = {
        torch.float32: (torch.int32, 0x7F800000),
        torch.float64: (torch.int64, 0x7FF0000000000000),
    }[dtype]
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(1, infinity, (150,), generator=generator, dtype=integer).view(dtype)
    x[::2] *= -1
    c = mpf(pivot) ** (0 if math.isinf(p) else -1 / (mpf(p) - 1))
    # In units of eps: 2 for the power, half of one for each rounding of its product with x, of c
    # and of the result, and what the rounding of c's exponent, 1 / (p - 1), makes of c in float64.
    units = 3.5 + (abs(mp.log(c)) if dtype == torch.float64 else 0)
    for eps in (0.0, 1e-8, 1.0):
        for value, g in zip(direction(x, p, eps, pivot).tolist(), x.tolist(), strict=True):
            real = g * power(base(g, eps, dtype), p) * c
            bound = units * info.eps * abs(real) + (1 + c) * info.smallest_normal * info.eps
            if math.isinf(value):
                assert math.copysign(1, value) * real + bound > info.max
            else:
                assert abs(value - real) <= bound, (g, eps)


@dataclass(frozen=True)
class WorstCase:
    p: float
    eps: float
    what: str  # "power" or "u"
    error: float  # ulp
    bits: int


def worst_cases():
    """What `make exhaustive` found, but for powers that no step shows: at p = 2 and infinity, and
    of an x so small that no normal gradient is lost beside it."""
    cases = []
    for line in (ROOT / "tests" / "csrc" / "exhaustive.txt").read_text().splitlines():
        if not line.startswith("#"):
            p, eps, what, error, bits, x = line.split()
            case = WorstCase(float(p), float(eps), what, float(error), int(bits, 16))
            if case.error > 0 and (what == "u" or (case.p < math.inf and float(x) > 2**-95)):
                cases.append(case)
    return cases


@pytest.mark.parametrize(
    "case", worst_cases(), ids=lambda case: f"{case.what}-{case.p:.4g}-{case.eps}"
)
def test_the_largest_error_of_all_floats_is_as_recorded(case):
    x = torch.tensor([case.bits], dtype=torch.int32).view(torch.float32)
    if case.what == "u":
        value, smallest = mpf(direction(x, case.p, case.eps).item()), mpf(2) ** -126
        real = x.item() * power(base(x.item(), case.eps, x.dtype), case.p)
    else:
        # The power itself, by a gradient that is lost beside eps = x and scales it exactly.
        tiny = torch.ldexp(torch.ones(1), torch.frexp(x).exponent - 30)
        assert tiny > 2**-126 and tiny + x == x
        value = mpf(direction(tiny, case.p, eps=x.item()).item()) / mpf(tiny.item())
        smallest, real = 0, power(mpf(x.item()), case.p)
    unit = mpf(2) ** (mp.floor(mp.log(max(abs(real), smallest), 2)) - 23)
    assert abs(abs(value - real) / unit - case.error) < 1e-5
