# SPDX-License-Identifier: MIT
"""The limits that algorithm's equations have, each as a test of the property's name."""

import math

import pytest
import torch
from torch.optim import SGD

import lpsgd
import lpsgd_ext
from helpers import CLASSES, DTYPES, assert_same_bits, bits, needs_fma, sgd_with_dampening


def network(dtype=torch.float32):
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(288, 10)
    ).to(dtype)


def train(optimizer_of, steps=100, dtype=torch.float32):
    """Trains a small convolutional network and returns it with its optimizer."""
    model = network(dtype)
    optimizer = optimizer_of(model.parameters())
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x = torch.randn(4, 3, 8, 8, generator=generator).to(dtype)
        y = torch.randint(10, (4,), generator=generator)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model, optimizer


@needs_fma
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_p2_is_sgd_bitwise(dtype):
    ours, _ = train(lambda params: lpsgd.LPSGD(params, lr=0.05, p=2.0), dtype=dtype)
    theirs, _ = train(lambda params: SGD(params, lr=0.05, foreach=False), dtype=dtype)
    assert_same_bits(ours, theirs)
    assert not torch.equal(bits(ours[0].weight), bits(network(dtype)[0].weight))


@needs_fma
def test_p2_lpsgdm_is_sgd_with_dampening_from_a_zero_buffer_bitwise():
    ours, our_optimizer = train(lambda params: lpsgd.LPSGDM(params, lr=0.5, p=2.0))
    theirs, their_optimizer = train(lambda params: sgd_with_dampening(params, lr=0.5))
    assert_same_bits(ours, theirs)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        a_buffer = our_optimizer.state[a]["momentum_buffer"]
        assert torch.equal(bits(a_buffer), bits(their_optimizer.state[b]["momentum_buffer"]))


@pytest.mark.parametrize("p", [2.0, 6.0, math.inf])
def test_momentum_0_without_decay_is_lpsgd_bitwise(p):
    plain, _ = train(lambda params: lpsgd.LPSGD(params, lr=0.01, p=p), steps=10)
    momentum, _ = train(lambda params: lpsgd.LPSGDM(params, lr=0.01, p=p, momentum=0.0), steps=10)
    assert_same_bits(plain, momentum)


@pytest.mark.parametrize("dtype", DTYPES)
def test_p_infinity_is_smoothed_sign_descent(dtype):
    eps = 0.25
    grad = torch.linspace(-3, 3, 61).to(dtype)
    param = torch.zeros(61, dtype=dtype)
    lpsgd_ext.lpsgd_([param], [grad], lr=1.0, p=math.inf, eps=eps)
    exact = -grad.double() / (grad.double().abs() + eps)
    torch.testing.assert_close(param, exact.to(dtype))


def test_p_infinity_without_eps_is_sign_descent():
    grad = torch.tensor([-4.0, -1e-30, 0.0, 1e-30, 7e30])
    param = torch.zeros(5)
    lpsgd_ext.lpsgd_([param], [grad], lr=0.5, p=math.inf, eps=0.0)
    assert param.tolist() == [0.5, 0.5, 0.0, -0.5, -0.5]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [2.0, 3.0, 100.0, math.inf])
@pytest.mark.parametrize("eps", [0.0, 1e-8])
def test_zero_gradient_moves_nothing(dtype, p, eps):
    param = torch.tensor([1.0, -2.0, 3.0], dtype=dtype)
    buffer = torch.zeros(3, dtype=dtype)
    lpsgd_ext.lpsgdm_([param], [torch.zeros(3, dtype=dtype)], [buffer], lr=1.0, p=p, eps=eps)
    assert param.tolist() == [1.0, -2.0, 3.0]
    assert not bits(buffer).any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [2.0, 3.0, 100.0, math.inf])
def test_nan_and_infinity_stay_where_they_are(dtype, p):
    grad = torch.ones(67, dtype=dtype)
    grad[5], grad[20], grad[66] = math.nan, math.inf, -math.inf
    param = torch.zeros(67, dtype=dtype)
    without = torch.zeros(67, dtype=dtype)
    lpsgd_ext.lpsgd_([param], [grad], lr=0.5, p=p, eps=0.0)
    lpsgd_ext.lpsgd_([without], [torch.ones(67, dtype=dtype)], lr=0.5, p=p, eps=0.0)
    ordinary = torch.ones(67, dtype=torch.bool)
    ordinary[[5, 20, 66]] = False
    assert torch.equal(param[ordinary], without[ordinary])
    torch.testing.assert_close(without, torch.full_like(without, -0.5))
    assert param[5].isnan()
    # inf / inf^rho is inf for rho = 0, else NaN, as IEEE arithmetic on the formula says.
    if p == 2.0:
        assert param[20] == -math.inf and param[66] == math.inf
    else:
        assert param[20].isnan() and param[66].isnan()


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [2.0, 3.0, 7.0, math.inf])
def test_update_is_odd(cls, dtype, p):
    grad = torch.randn(200, generator=torch.Generator().manual_seed(3)).to(dtype)
    moved = []
    for sign in (1, -1):
        param = torch.nn.Parameter(torch.zeros(200, dtype=dtype))
        param.grad = sign * grad
        cls([param], lr=0.1, p=p, fused=True).step()
        moved.append(param.detach())
    assert torch.equal(moved[0], -moved[1])


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("p", [2.0, 3.0, math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_maximize_is_the_negated_gradient(cls, p, dtype):
    grad = torch.randn(200, generator=torch.Generator().manual_seed(3)).to(dtype)
    moved = []
    for maximize in (True, False):
        param = torch.nn.Parameter(torch.ones(200, dtype=dtype))
        optimizer = cls([param], lr=0.1, p=p, weight_decay=0.1, maximize=maximize, fused=True)
        for _ in range(3):
            param.grad = grad if maximize else -grad
            optimizer.step()
        moved.append(param)
    assert torch.equal(bits(moved[0]), bits(moved[1]))


@pytest.mark.parametrize("p", [2.5, 6.0, 100.0])
def test_every_p_crosses_at_the_pivot(p):
    param = torch.zeros(1, dtype=torch.float64)
    grad = torch.full((1,), 1e-4, dtype=torch.float64)
    lpsgd_ext.lpsgd_([param], [grad], lr=1.0, p=p, eps=0.0, pivot=1e-4)
    assert param.item() == pytest.approx(-1.0, rel=1e-14)


def test_p_infinity_does_not_depend_on_the_pivot():
    grad = torch.randn(100, generator=torch.Generator().manual_seed(0))
    params = [torch.zeros(100), torch.zeros(100)]
    for param, pivot in zip(params, (1.0, 1e-3), strict=True):
        lpsgd_ext.lpsgd_([param], [grad], lr=0.1, p=math.inf, pivot=pivot)
    assert torch.equal(*params)
