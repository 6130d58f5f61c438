# SPDX-License-Identifier: MIT
"""The published optimizers that docs/family.md calls points of the family: their updates, written
from their formulas in float64, are ours to rounding."""

import math

import pytest
import torch

from lpsgd import LPSGD, LPSGDM

STEPS, LR, BETA, DECAY, EPS = 5, 0.05, 0.8, 0.1, 1e-8


def gradients(dtype):
    """Over several orders of magnitude, with exact zeros from the first step on."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(STEPS, 1000, generator=generator, dtype=torch.float64)
    scale = torch.exp(2 * torch.randn(STEPS, 1000, generator=generator, dtype=torch.float64) - 5)
    scale[:, :10] = 0
    return (normal * scale).to(dtype)


def power(x, exponent):
    return x.sign() * x.abs() ** exponent


def mean(m, g):
    return BETA * m + (1 - BETA) * g


def sgd(x, g, state):
    return x - LR * g


def heavy_ball(x, g, state):
    state["v"] = BETA * state.get("v", 0) + g
    return x - LR * (1 - BETA) * state["v"]


def sign_sgd(x, g, state):
    return x - LR * g.sign()


def signum(x, g, state):
    state["m"] = mean(state.get("m", 0), g)
    return x - LR * (state["m"].sign() + DECAY * x)


def lion(x, g, state):
    c = BETA * state.get("m", 0) + (1 - BETA) * g
    state["m"] = mean(state.get("m", 0), g)
    return x - LR * (c.sign() + DECAY * x)


def power_step(x, g, state):
    state["m"] = mean(state.get("m", 0), g)
    return x - LR * power(state["m"], 0.1)


def pb_sgd(x, g, state, gamma):
    return x - LR * power(g, gamma)


def pb_sgdm(x, g, state, gamma):
    state["v"] = BETA * state.get("v", 0) + (1 - BETA) * power(g, gamma)
    return x - LR * state["v"]


def stacey(x, g, state, q, tau, beta1, beta2):
    m, z = state.get("m", 0), state.get("z", torch.zeros_like(x))
    c = beta1 * m + (1 - beta1) * g
    state["m"] = beta2 * m + (1 - beta2) * g
    state["z"] = power(power(z, q - 1) - LR * c, 1 / (q - 1))
    u = c * (c.abs() + EPS) ** ((2 - q) / (q - 1))
    return (1 - tau - LR * DECAY) * x - (1 - tau) * LR * u + tau * state["z"]


def descend(dtype, published, **settings):
    """What STEPS of the published update do in float64."""
    x, state = torch.linspace(-1, 1, 1000, dtype=dtype).double(), {}
    for g in gradients(dtype).double():
        x = published(x, g, state, **settings)
    return x


def ours(dtype, make):
    param = torch.nn.Parameter(torch.linspace(-1, 1, 1000, dtype=dtype))
    optimizer = make([param])
    for g in gradients(dtype):
        param.grad = g
        optimizer.step()
    return param.detach().double()


SETTINGS = {"momentum": BETA, "weight_decay": DECAY}
FAMILY = {
    "SGD": (sgd, {}, LPSGD, {"p": 2.0}),
    "SGD with momentum": (heavy_ball, {}, LPSGDM, {"p": 2.0, "momentum": BETA}),
    "signSGD": (sign_sgd, {}, LPSGD, {"p": math.inf, "eps": 0.0}),
    "Signum": (signum, {}, LPSGDM, {"p": math.inf, "eps": 0.0, **SETTINGS}),
    "Lion, β₁ = β₂": (lion, {}, LPSGDM, {"p": math.inf, "eps": 0.0, **SETTINGS}),
    "PowerStep": (power_step, {}, LPSGDM, {"p": 11.0, "eps": 0.0, "momentum": BETA}),
    **{
        f"pbSGD, power {gamma}": (pb_sgd, {"gamma": gamma}, LPSGD, {"p": 1 + 1 / gamma, "eps": 0.0})
        for gamma in (0.1, 0.5, 0.8, 1.0)
    },
    **{
        f"Stacey's first half, p = {q}": (
            stacey,
            {"q": q, "tau": 0.0, "beta1": BETA, "beta2": BETA},
            LPSGDM,
            {"p": float(q), "eps": EPS, **SETTINGS},
        )
        for q in (2, 3, 8)
    },
}


def distance(dtype, published, options, cls, settings):
    """The largest difference of parameters, whose magnitude is at most about 1, in units of the
    dtype's eps."""
    exact = descend(dtype, published, **options)
    difference = ours(dtype, lambda params: cls(params, lr=LR, **settings)) - exact
    return difference.abs().max().item() / torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", FAMILY)
def test_a_published_update_is_ours_to_rounding(name, dtype):
    assert distance(dtype, *FAMILY[name]) < STEPS  # half an eps for each operation on parameters


@pytest.mark.parametrize(
    ("published", "options", "cls", "settings"),
    [
        (pb_sgdm, {"gamma": 0.5}, LPSGDM, {"p": 3.0, "eps": 0.0, "momentum": BETA}),
        (
            stacey,
            {"q": 3, "tau": 0.1, "beta1": BETA, "beta2": BETA},
            *FAMILY["Stacey's first half, p = 3"][2:],
        ),
        (
            stacey,
            {"q": 3, "tau": 0.0, "beta1": BETA, "beta2": 0.9},
            *FAMILY["Stacey's first half, p = 3"][2:],
        ),
    ],
    ids=["pbSGDM", "Stacey with its second half", "Stacey with two betas"],
)
def test_what_docs_call_different_is(published, options, cls, settings):
    assert distance(torch.float64, published, options, cls, settings) > 1e10
