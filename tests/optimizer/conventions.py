# SPDX-License-Identifier: MIT
"""Which optimizers, arguments and implementations the tests of conventions hold for."""

import copy
import math
from dataclasses import dataclass

import pytest
import torch
from torch.optim import lr_scheduler

import lpsgd


@dataclass(frozen=True)
class OptimizerInfo:
    """What tests that hold for every optimizer need to know of one, after the class of this name
    in torch.testing, which needs packages that PyTorch does not depend on."""

    optim_cls: type
    inputs: dict  # keyword arguments by description, without those that choose an implementation
    error_inputs: list  # keyword arguments, the exception and its text
    schedulers: dict  # functions that make lr_schedulers for an optimizer, by description


IMPLEMENTATIONS = {
    "fused": {"fused": True},
    "foreach": {"foreach": True},
    "forloop": {"foreach": False},
    "default": {},
}

_INPUTS = {
    "defaults": {},
    "lr": {"lr": 1e-2},
    "tensor_lr": {"lr": torch.tensor(1e-3)},
    "p2": {"p": 2.0},
    "p_infinity": {"p": math.inf},
    "weight_decay": {"weight_decay": 0.5},
    "maximize": {"maximize": True, "weight_decay": 0.1},
    "eps": {"eps": 0.1},
    "pivot": {"pivot": 1e-3},
    "stochastic_rounding": {"stochastic_rounding": True, "seed": 3},
}
_MOMENTUM_INPUTS = {
    "momentum": {"momentum": 0.5, "weight_decay": 0.1},
    "no_momentum": {"momentum": 0.0},
    "momentum_dtype": {"momentum_dtype": torch.float32},
    "one_byte": {"momentum_dtype": torch.float8_e5m2},
}

_ERROR_INPUTS = [
    ({"lr": -1.0}, ValueError, "Invalid learning rate: -1.0"),
    ({"lr": torch.tensor(-1.0)}, ValueError, "Invalid learning rate: -1.0"),
    ({"lr": torch.tensor([0.1, 0.1])}, ValueError, "Tensor lr must be 1-element"),
    ({"p": 1.0}, ValueError, "Invalid p value: 1.0"),
    ({"weight_decay": -0.5}, ValueError, "Invalid weight_decay value: -0.5"),
    ({"eps": -1.0}, ValueError, "Invalid epsilon value: -1.0"),
    ({"pivot": 0.0}, ValueError, "Invalid pivot value: 0.0"),
    ({"seed": 0.5}, TypeError, "seed must be an int"),
    (
        {"fused": True, "foreach": True},
        RuntimeError,
        "`fused` and `foreach` cannot be `True` together.",
    ),
    (
        {"fused": True, "differentiable": True},
        RuntimeError,
        "`fused` does not support `differentiable`",
    ),
    (
        {"foreach": True, "differentiable": True},
        RuntimeError,
        "`foreach` does not support `differentiable`",
    ),
    (
        {"stochastic_rounding": True, "differentiable": True},
        RuntimeError,
        "`stochastic_rounding` does not support `differentiable`",
    ),
]
_MOMENTUM_ERROR_INPUTS = [
    ({"momentum": -0.5}, ValueError, "Invalid momentum value: -0.5"),
    ({"momentum_dtype": torch.float16}, ValueError, "Invalid momentum_dtype: torch.float16"),
    ({"momentum_exponent": 127}, ValueError, "Invalid momentum_exponent: 127"),
    ({"momentum_exponent": 15.0}, TypeError, "momentum_exponent must be an int, not float"),
]

# Those with which PyTorch tests SGD.
_SCHEDULERS = {
    "step": [lambda o: lr_scheduler.StepLR(o, gamma=0.9, step_size=10)],
    "linear": [lambda o: lr_scheduler.LinearLR(o, 0.4, 0.8, total_iters=4)],
    "step_and_linear": [
        lambda o: lr_scheduler.StepLR(o, gamma=0.9, step_size=10),
        lambda o: lr_scheduler.LinearLR(o, 0.4, 0.6, total_iters=4),
    ],
    "step_exponential_and_plateau": [
        lambda o: lr_scheduler.StepLR(o, gamma=0.99, step_size=10),
        lambda o: lr_scheduler.ExponentialLR(o, gamma=0.99),
        lr_scheduler.ReduceLROnPlateau,
    ],
    "constant": [lambda o: lr_scheduler.ConstantLR(o, factor=0.4, total_iters=4)],
    "polynomial": [lambda o: lr_scheduler.PolynomialLR(o, power=0.9, total_iters=4)],
    "step_and_plateau": [
        lambda o: lr_scheduler.StepLR(o, gamma=0.9, step_size=10),
        lr_scheduler.ReduceLROnPlateau,
    ],
}

OPTIMIZERS = [
    OptimizerInfo(lpsgd.LPSGD, _INPUTS, _ERROR_INPUTS, _SCHEDULERS),
    OptimizerInfo(
        lpsgd.LPSGDM,
        _INPUTS | _MOMENTUM_INPUTS,
        _ERROR_INPUTS + _MOMENTUM_ERROR_INPUTS,
        _SCHEDULERS,
    ),
]


@dataclass(frozen=True)
class Configuration:
    """An optimizer class and its arguments; calling it with parameters makes the optimizer."""

    cls: type
    kwargs: dict

    def __call__(self, params, **more):
        return self.cls(params, **{**copy.deepcopy(self.kwargs), **more})


def configurations(*implementations):
    """Parametrizes a test over class, arguments and implementation."""
    return pytest.mark.parametrize(
        "make",
        [
            pytest.param(
                Configuration(info.optim_cls, kwargs | IMPLEMENTATIONS[implementation]),
                id=f"{info.optim_cls.__name__}-{description}-{implementation}",
            )
            for info in OPTIMIZERS
            for description, kwargs in info.inputs.items()
            for implementation in implementations or IMPLEMENTATIONS
        ],
    )


implementations = pytest.mark.parametrize(
    "how", [pytest.param(how, id=name) for name, how in IMPLEMENTATIONS.items()]
)
