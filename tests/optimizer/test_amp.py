# SPDX-License-Identifier: MIT
"""torch.amp.GradScaler, with the scale handled by the optimizer (fused=True) and without."""

import math

import pytest
import torch
from torch.nn import Parameter

from helpers import CLASSES, DTYPES, bits

SCALES = [65536.0, 3.0]


def parameter(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return Parameter(torch.randn(300, generator=generator, dtype=torch.float64).to(dtype))


def scaled_grad(step, scale, dtype=torch.float32):
    generator = torch.Generator().manual_seed(step + 1)
    grad = torch.randn(300, generator=generator, dtype=torch.float64).to(dtype)
    return grad * scale


def scaler_step(optimizer, scaler, param, grad):
    """What scaler.scale(loss).backward(); scaler.step(optimizer) does, with a given gradient."""
    scaler.scale(torch.ones(()))  # makes the scale
    param.grad = grad
    scaler.step(optimizer)


def snapshot(optimizer, param):
    buffers = [state["momentum_buffer"].clone() for state in optimizer.state.values()]
    return [bits(tensor).clone() for tensor in (param, *buffers)]


def equal(before, after):
    return len(before) == len(after) and all(map(torch.equal, before, after))


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("how", [{}, {"foreach": True}, {"foreach": False}, {"fused": True}])
@pytest.mark.parametrize("scale", SCALES)
def test_scaled_training_has_the_bits_of_unscaled_gradients(cls, how, scale):
    param, other = parameter(), parameter()
    optimizer, plain = cls([param], lr=0.1, **how), cls([other], lr=0.1, **how)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    for step in range(4):
        grad = scaled_grad(step, scaler.get_scale())
        other.grad = grad * torch.tensor(1.0 / scaler.get_scale())
        scaler_step(optimizer, scaler, param, grad)
        scaler.update()
        plain.step()
        assert torch.equal(bits(param), bits(other))


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("how", [{}, {"fused": True}])
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_a_step_with_an_infinite_gradient_changes_no_bit(cls, how, bad):
    param = parameter()
    optimizer = cls([param], lr=0.1, weight_decay=0.1, **how)
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    for step in range(2):
        before, version = snapshot(optimizer, param), param._version
        grad = scaled_grad(step, 16.0)
        grad[7] = bad
        scaler_step(optimizer, scaler, param, grad)
        assert equal(before, snapshot(optimizer, param)) and param._version == version
        scaler.update()
        assert scaler.get_scale() == 8.0
        scaler_step(optimizer, scaler, param, scaled_grad(step, 8.0))
        scaler.update(16.0)
        assert not torch.equal(before[0], bits(param))


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_fused_unscales_in_the_kernel_and_leaves_the_gradient_scaled(cls, dtype):
    param, other = parameter(dtype), parameter(dtype)
    optimizer, plain = cls([param], lr=0.1, fused=True), cls([other], lr=0.1, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    other.grad = scaled_grad(0, 1.0, dtype)
    grad = other.grad * 2.0
    expected, version = grad.clone(), grad._version
    scaler_step(optimizer, scaler, param, grad)
    plain.step()
    assert param.grad is grad and grad._version == version and torch.equal(grad, expected)
    assert torch.equal(bits(param), bits(other))
    assert not hasattr(optimizer, "grad_scale") and not hasattr(optimizer, "found_inf")


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("how", [{}, {"fused": True}])
def test_gradients_can_be_unscaled_and_clipped_before_the_step(cls, how):
    param, other = parameter(), parameter()
    optimizer, plain = cls([param], lr=0.1, **how), cls([other], lr=0.1, **how)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.ones(()))
    param.grad, other.grad = scaled_grad(0, 1024.0), scaled_grad(0, 1.0)
    scaler.unscale_(optimizer)
    for group in (param, other):
        torch.nn.utils.clip_grad_norm_([group], 0.5)
    scaler.step(optimizer)
    scaler.update()
    plain.step()
    assert torch.equal(bits(param), bits(other))


@pytest.mark.parametrize("cls", CLASSES)
def test_the_scale_reaches_what_takes_the_eager_path_too(cls):
    """grad_scale and found_inf are honoured on every path, as a custom loop may set them."""
    strided = torch.zeros(4, 6)[:, ::2].requires_grad_()
    strided.grad = torch.full((4, 3), 8.0)
    optimizer = cls([strided], lr=0.5, p=2.0, **({"momentum": 0.0} if "M" in cls.__name__ else {}))
    optimizer.grad_scale = torch.tensor(4.0)
    optimizer.step()
    assert torch.equal(strided.detach(), torch.full((4, 3), -1.0))
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    assert torch.equal(strided.detach(), torch.full((4, 3), -1.0))


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("scale", [0.0, -1.0, math.nan, math.inf])
def test_an_impossible_scale_is_refused(cls, scale):
    param = parameter()
    optimizer = cls([param], fused=True)
    param.grad = scaled_grad(0, 1.0)
    optimizer.grad_scale = torch.tensor(scale)
    before = bits(param).clone()
    with pytest.raises(ValueError, match="Invalid grad_scale"):
        optimizer.step()
    assert torch.equal(before, bits(param))


@pytest.mark.parametrize("cls", CLASSES)
def test_float16_autocast_trains(cls):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 1))
    x = torch.randn(64, 8)
    y = x[:, :1] - 2 * x[:, 1:2]
    optimizer = cls(model.parameters(), lr=0.01, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=128.0)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            loss = torch.nn.functional.mse_loss(model(x), y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]
