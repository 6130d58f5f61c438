# SPDX-License-Identifier: MIT
"""`suggest_pivot`."""

import math

import pytest
import torch
from torch.nn import Parameter

from helpers import CLASSES
from lpsgd import LPSGD, LPSGDM, suggest_pivot


def after_steps(cls, grads, steps=300, **settings):
    params = [Parameter(torch.zeros_like(grad)) for grad in grads]
    optimizer = cls(params, lr=1e-3, p=math.inf, **settings)
    for _ in range(steps):
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad.clone()
        optimizer.step()
    return optimizer, params


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_it_is_the_root_mean_square_over_all_groups(cls, dtype):
    grads = [torch.full((6,), 0.5, dtype=dtype), torch.full((2, 1), -8.0, dtype=dtype)]
    optimizer, _ = after_steps(cls, grads)
    optimizer.add_param_group({"params": [Parameter(torch.ones(100))]})  # has no gradient
    assert suggest_pivot(optimizer) == pytest.approx(math.sqrt((6 * 0.25 + 2 * 64) / 8), rel=0.02)


@pytest.mark.parametrize("cls", CLASSES)
def test_with_it_steps_of_every_p_are_about_as_long(cls):
    grads = [torch.randn(2000) * 1e-3, torch.randn(500) * 1e-2]
    pivot = suggest_pivot(after_steps(cls, grads)[0])

    def length(p):
        optimizer, params = after_steps(cls, grads)
        optimizer.param_groups[0].update(p=p, pivot=pivot)
        before = torch.cat([param.detach().clone() for param in params])
        optimizer.step()
        return (torch.cat([param.detach() for param in params]) - before).norm().item()

    sign = length(math.inf)
    assert length(2.0) == pytest.approx(sign, rel=1e-3)
    for p in (2.5, 3.0, 6.0, 100.0):
        assert 0.6 * sign < length(p) < 1.001 * sign


def test_parts_of_complex_parameters_count_each():
    optimizer, _ = after_steps(LPSGD, [torch.full((5,), 3 - 4j)], steps=1)
    assert suggest_pivot(optimizer) == pytest.approx(math.sqrt(12.5))


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("grad", [0.0, math.nan, math.inf])
def test_an_optimizer_without_anything_to_measure_is_refused(cls, grad):
    optimizer = cls([Parameter(torch.ones(3))])
    with pytest.raises(RuntimeError, match="has made steps"):
        suggest_pivot(optimizer)
    optimizer, _ = after_steps(cls, [torch.full((3,), grad)], steps=1)
    with pytest.raises(RuntimeError, match="their norm is"):
        suggest_pivot(optimizer)


def test_it_changes_nothing():
    optimizer, (param,) = after_steps(LPSGDM, [torch.randn(7)])
    buffer = optimizer.state[param]["momentum_buffer"]
    before = [t.clone() for t in (param, param.grad, buffer)], buffer._version
    suggest_pivot(optimizer)
    assert all(map(torch.equal, before[0], (param, param.grad, buffer)))
    assert buffer._version == before[1]


def test_another_optimizer_is_refused_as_one():
    optimizer = torch.optim.SGD([Parameter(torch.zeros(1))])
    with pytest.raises(TypeError, match=r"suggest_pivot\(\) needs an LPSGD or LPSGDM, not SGD"):
        suggest_pivot(optimizer)
