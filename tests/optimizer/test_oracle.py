# SPDX-License-Identifier: MIT
"""The steps against the equations in float64, over dtypes, sizes and layouts."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lpsgd_ext
from helpers import CLASSES, DTYPES, PS, bits
from lpsgd import _eager

# lr and decay are exact in every dtype; so every bound below is of the step itself.
LR, DECAY, EPS = 0.25, 0.5, 1e-8


def ulps(actual: torch.Tensor, exact: torch.Tensor) -> float:
    """The largest distance from `exact` (float64), in units in the last place of actual's dtype."""
    info = torch.finfo(actual.dtype)
    magnitude = exact.abs().clamp_min(info.smallest_normal)
    exponent = torch.frexp(magnitude).exponent - 1
    unit = torch.ldexp(torch.full_like(magnitude, info.eps), exponent)
    error = (actual.double() - exact).abs() / unit
    return error.max().item() if error.numel() else 0.0


def exact_direction(x, p, eps=EPS):
    """Eq 21 and 24 in float64."""
    rho = 1.0 if math.isinf(p) else (p - 2) / (p - 1)
    return torch.where(x == 0, x, x / (x.abs() + eps) ** rho)


def random(shape, dtype, seed=0):
    """Gradients over several orders of magnitude, exact zeros among them."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(shape, generator=generator, dtype=torch.float64)
    scale = torch.exp(2 * torch.randn(shape, generator=generator, dtype=torch.float64) - 5)
    zero = torch.rand(shape, generator=generator) < 0.05
    return (normal * scale).masked_fill(zero, 0.0).to(dtype)


def check_step(param, grad, buffer, p, has_momentum):
    """Steps in C and compares with float64, in ulp of what is stored."""
    x, g, m = (t.to(torch.float64, copy=True) for t in (param, grad, buffer))
    unchanged = grad.clone()
    if has_momentum:
        lpsgd_ext.lpsgdm_(
            [param], [grad], [buffer], lr=LR, p=p, momentum=0.5, weight_decay=DECAY / LR, eps=EPS
        )
        m = 0.5 * m + 0.5 * g
        assert ulps(buffer, m) <= 0.51  # exact but for the rounding on store
        g = m
    else:
        lpsgd_ext.lpsgd_([param], [grad], lr=LR, p=p, weight_decay=DECAY / LR, eps=EPS)
    u = exact_direction(g, p)
    # In units of the larger term's eps, since terms may cancel but their errors don't: float32 has
    # 2 for the power, 1 for the sums and products in and around it and 1 for the store of a sum of
    # two terms; float64 has twice that, as the oracle is float64 too; the others have the store.
    scale = torch.maximum((LR * u).abs(), (DECAY * x).abs())
    info = torch.finfo(param.dtype)
    units = {4: 4.0, 8: 8.0, 2: 1.01}[param.element_size()]
    bound = units * info.eps * scale + info.smallest_normal * info.eps
    assert ((param.double() - ((1 - DECAY) * x - LR * u)).abs() <= bound).all()
    assert torch.equal(bits(grad), bits(unchanged))


@pytest.mark.parametrize("has_momentum", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", PS)
def test_every_size_agrees_with_float64(has_momentum, dtype, p):
    for size in [*range(71), 511, 512, 513, 1024, 1500]:
        check_step(*(random(size, dtype, seed) for seed in range(3)), p, has_momentum)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("dtype", DTYPES)
def test_thread_boundaries_agree_with_float64(dtype):
    for size in (32767, 32768, 32769, 65536 + 7):
        check_step(*(random(size, dtype, seed) for seed in range(3)), 6.0, True)


@pytest.mark.parametrize("has_momentum", [True, pytest.param(False, marks=pytest.mark.full)])
def test_ten_million_elements_agree_with_float64(has_momentum):
    check_step(*(random(10**7, torch.float32, seed) for seed in range(3)), 6.0, has_momentum)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [1, 2, 3, 5, 7])
def test_unaligned_views_agree_with_float64(dtype, offset):
    tensors = [random(1100 + offset, dtype, seed) for seed in range(3)]
    around = [t.clone() for t in tensors]
    check_step(*(t[offset:-1] for t in tensors), 6.0, True)
    for tensor, before in zip(tensors, around, strict=True):
        assert torch.equal(bits(tensor[:offset]), bits(before[:offset]))
        assert torch.equal(bits(tensor[-1:]), bits(before[-1:]))


LAYOUTS = {
    "scalar": lambda t: t[0].reshape(()),
    "matrix": lambda t: t[:600].reshape(20, 30),
    "transposed": lambda t: t[:600].reshape(20, 30).t(),
    "permuted": lambda t: t[:600].reshape(4, 5, 30).permute(1, 2, 0),
    "channels_last": lambda t: (
        t[:600].reshape(2, 3, 10, 10).contiguous(memory_format=torch.channels_last)
    ),
    "size 1 dimensions": lambda t: t[:600].reshape(1, 600, 1)[:, None],
    "empty": lambda t: t[:0].reshape(3, 0),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_dense_layouts_agree_with_float64(dtype, layout):
    check_step(*(LAYOUTS[layout](random(601, dtype, seed)) for seed in range(3)), 6.0, True)


def test_mixed_dtypes_in_one_call():
    params, grads, buffers = (
        [random(100, dtype, seed) for dtype in DTYPES * 2] for seed in range(3)
    )
    apart = [[t.clone() for t in tensors] for tensors in (params, grads, buffers)]
    lpsgd_ext.lpsgdm_(params, grads, buffers, lr=LR, p=6.0)
    for param, grad, buffer in zip(*apart, strict=True):
        lpsgd_ext.lpsgdm_([param], [grad], [buffer], lr=LR, p=6.0)
    for together, alone in zip(params + buffers, apart[0] + apart[2], strict=True):
        assert torch.equal(bits(together), bits(alone))


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", PS)
@pytest.mark.parametrize("foreach", [False, True])
def test_eager_agrees_with_c(cls, dtype, p, foreach):
    def run(**how):
        params = [torch.nn.Parameter(random(size, dtype, size)) for size in (1, 7, 600)]
        optimizer = cls(params, lr=0.01, p=p, weight_decay=0.1, pivot=1e-3, **how)
        for step in range(5):
            for param in params:
                param.grad = random(param.shape, dtype, step)
            optimizer.step()
        return params

    tolerance = {} if dtype.itemsize == 2 else {"rtol": 20 * torch.finfo(dtype).eps, "atol": 1e-12}
    if dtype == torch.float32:
        tolerance["atol"] = 1e-6
    for native, eager in zip(run(fused=True), run(foreach=foreach), strict=True):
        torch.testing.assert_close(native, eager, **tolerance)


@pytest.mark.parametrize("step", [_eager.for_loop, _eager.foreach])
@pytest.mark.parametrize("p", PS)
def test_eager_agrees_with_float64(step, p):
    for has_momentum in (False, True):
        x, g, m = (random(2000, torch.float64, seed) for seed in range(3))
        expected_m = 0.5 * m + 0.5 * g if has_momentum else g
        expected = (1 - DECAY) * x - LR * exact_direction(expected_m, p)
        step([x], [g], [m] if has_momentum else None, lr=LR, p=p, momentum=0.5, weight_decay=2.0)
        torch.testing.assert_close(x, expected, rtol=1e-14, atol=1e-15)


@settings(max_examples=200, deadline=None)
@given(
    x=st.floats(width=32, allow_nan=False, allow_infinity=False),
    p=st.floats(2.0, 1e6),
    eps=st.sampled_from([0.0, 1e-40, 1e-8, 1.0, 1e30]),
)
def test_any_float32_agrees_with_float64(x, p, eps):
    grad = torch.tensor([x], dtype=torch.float32)
    param = torch.zeros(1)
    lpsgd_ext.lpsgd_([param], [grad], lr=1.0, p=p, eps=eps)
    y = (grad.abs() + torch.tensor(eps, dtype=torch.float32)).double()
    exact = torch.where(grad == 0, 0.0, -grad.double() / y ** lpsgd_ext.rho(p))
    assert ulps(param, exact) <= 3
