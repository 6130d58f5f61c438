# SPDX-License-Identifier: MIT
"""The gradient falls as O(T^-1/2), which the paper promises for stochastic nonconvex problems.

What is measured is M(T), the mean over T steps of sum |df|^q with 1/p + 1/q = 1: the squared 2-norm
at p = 2, the 1-norm at p = infinity. This is df . u, and so what a step descends by, over lr:

    f(x_t+1) <= f(x_t) - lr df . u + lr^2 L |u|^2 / 2 + noise

Its sum over the steps gives M(T) <= (f(x_1) - min f) / (lr T) + O(lr) + noise, which is O(T^-1/2)
for lr ~ T^-1/2, and no less once the runs come to rest, as f then falls by about the same amount
for every T. As in the theory of sign descent, the batch grows with T, lest the noise choose the
signs.
"""

import math

import pytest
import torch

from helpers import CLASSES

pytestmark = pytest.mark.usefixtures("one_thread")  # these tensors are too small for two

PROBLEMS, ROWS, COLUMNS = 24, 16, 4  # each problem is of its own seed
STEPS = [128, 512, 2048, 8192]
LRS = {2.0: 0.25, 4.0: 0.2, math.inf: 0.2}  # times T^-1/2, by p
STUDENT = 2.069  # the 97.5 % quantile of the t distribution with PROBLEMS - 1 degrees of freedom


def random(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


A = random(PROBLEMS, ROWS, COLUMNS, seed=0)
B = A @ random(PROBLEMS, COLUMNS, 1, seed=1) + 0.3 * random(PROBLEMS, ROWS, 1, seed=2)


def gradient(x):
    """Of the mean of r^2 / 4 + sin(r)^2, r = Ax - b: nonconvex, with many minima."""
    r = A @ x.mT - B
    return (A.mT @ (r / 2 + torch.sin(2 * r)) / ROWS).mT


@torch.no_grad()
def mean_measures(cls, steps, lr, batch, **kwargs):
    """M(T), by problem and p; lr is a function of p and T, batch of T."""
    generator = torch.Generator().manual_seed(steps)
    params = [torch.zeros(PROBLEMS, COLUMNS, requires_grad=True) for _ in LRS]
    groups = [{"params": [x], "p": p, "lr": lr(p, steps)} for x, p in zip(params, LRS, strict=True)]
    optimizer = cls(groups, **kwargs)
    q = torch.tensor([1 if math.isinf(p) else p / (p - 1) for p in LRS])[:, None]
    total = torch.zeros(PROBLEMS, len(LRS))
    for _ in range(steps):
        exact = gradient(torch.stack(params, 1))
        total += (exact.abs() ** q).sum(2)
        noise = 0.5 / math.sqrt(batch(steps)) * torch.randn(PROBLEMS, COLUMNS, generator=generator)
        for i, x in enumerate(params):
            x.grad = exact[:, i] + noise
        optimizer.step()
    return total / steps


def intervals(cls, lr, batch, **kwargs):
    """The 95 % confidence interval of the mean slope of log M over log T, by p."""
    log_t = torch.tensor(STEPS).log()
    log_t -= log_t.mean()
    log_m = torch.stack([mean_measures(cls, t, lr, batch, **kwargs).log() for t in STEPS])
    slopes = (log_t[:, None, None] * log_m).sum(0) / (log_t**2).sum()
    mean, half = slopes.mean(0), STUDENT * slopes.std(0) / math.sqrt(PROBLEMS)
    print(f"p = {list(LRS)}: {mean.tolist()} +- {half.tolist()}")
    return mean - half, mean + half


def falling_lr(p, steps):
    return LRS[p] / math.sqrt(steps)


def growing_batch(steps):
    return steps / STEPS[0]


@pytest.mark.parametrize("cls", CLASSES)
def test_the_gradient_falls_with_the_root_of_the_steps(cls):
    low, high = intervals(cls, falling_lr, growing_batch)
    assert (low > -0.6).all() and (high < -0.4).all()


@pytest.mark.parametrize("cls", CLASSES)
def test_the_gradient_does_not_fall_so_at_a_constant_lr_and_batch(cls):
    low, _ = intervals(cls, lambda p, steps: 0.1, lambda steps: 1)
    assert (low > -0.4).all()


@pytest.mark.parametrize("cls", CLASSES)
def test_the_gradient_does_not_fall_in_ascent(cls):
    low, _ = intervals(cls, falling_lr, growing_batch, maximize=True)
    assert (low > 0).all()
