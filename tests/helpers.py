# SPDX-License-Identifier: MIT
"""What several test files share."""

import contextlib
import copy
import gc
import math
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch.nn import Parameter
from torch.optim import lr_scheduler

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


def run(command, cwd=ROOT, **environment) -> str:
    """What a program prints in these variables of the environment besides; it must succeed."""
    result = subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )
    print(result.stdout)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-4000:]
    return result.stdout


def count_references() -> int:
    """The references to all objects that the garbage collector knows or finds within those."""
    gc.collect()
    known = gc.get_objects()
    found = {id(one): one for one in (*known, *gc.get_referents(*known))}
    counts = map(sys.getrefcount, found.values())
    return sum(count for count in counts if count < 100_000_000)  # others are immortal


@contextlib.contextmanager
def references_kept(objects):
    """What is done 50 times within keeps and loses no reference to any of these objects."""

    def changed():
        counts = map(sys.getrefcount, objects)
        # Others come and go by a few.
        return [i for i, count in enumerate(counts) if abs(count - before[i]) >= 25]

    before = list(map(sys.getrefcount, objects))
    yield
    if changed():
        gc.collect()  # a traceback may be in a cycle
    assert not changed(), [objects[i] for i in changed()]


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


def parameters(*shapes, seed=0, dtype=torch.float32):
    """Parameters of these shapes with values that the seed decides."""
    generator = torch.Generator().manual_seed(seed)
    return [
        Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype))
        for shape in shapes or [(2, 3), (4,)]
    ]


def set_grads(params, seed=1):
    """Gives every parameter a gradient that the seed decides."""
    generator = torch.Generator().manual_seed(seed)
    for param in params:
        grad = torch.randn(param.shape, generator=generator, dtype=torch.float64)
        param.grad = grad.to(param.dtype)


def steps(optimizer, params, seeds):
    """Steps once with the gradients of each seed."""
    for seed in seeds:
        set_grads(params, seed)
        optimizer.step()


def same_bits(tensors, others):
    """Whether the tensors of two lists have the same bits, pairwise."""
    return all(torch.equal(bits(a), bits(b)) for a, b in zip(tensors, others, strict=True))
