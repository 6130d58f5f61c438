# SPDX-License-Identifier: MIT
"""Micro-benchmarks for pytest-benchmark: `make bench-save`, and after a change `make bench-compare`
says what became slower. Caches are warm."""

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch.nn import Parameter

from benchmarks.speed.step import ALL, shapes_of
from lpsgd import LPSGDM, release_gradients

FLOAT32 = ("LPSGD p=4", "LPSGDM p=2", "LPSGDM p=4", "LPSGDM p=inf", "C checks of lists")
CASES = [
    *(
        (name, "float32", list_)
        for list_ in ("62 x 1", "4k", "64k", "1000 x 64")
        for name in FLOAT32
    ),
    *(("LPSGDM p=4", "float32", list_) for list_ in ("ResNet-18", "16M")),
    *(("LPSGDM p=4", dtype, "64k") for dtype in ("bfloat16", "float16", "float64")),
]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name, dtype, list_", CASES)
def test_step(benchmark: BenchmarkFixture, name: str, dtype: str, list_: str, threads: int) -> None:
    torch.set_num_threads(threads)
    benchmark.group = f"{list_}, {dtype}, {threads} threads"
    generator = torch.Generator().manual_seed(0)
    params = []
    for shape in shapes_of(list_):
        param, grad = torch.randn(2, *shape, generator=generator).to(getattr(torch, dtype))
        params.append(Parameter(param.clone()))
        params[-1].grad = grad * 1e-2
    step = ALL[name](params).step
    step()
    benchmark(step)


@pytest.mark.parametrize("dtype", [None, torch.float8_e5m2])
def test_hook_of_released_gradients(benchmark: BenchmarkFixture, dtype: torch.dtype | None) -> None:
    """For one of a thousand parameters of 64 elements; the gradient is given it within the time."""
    torch.set_num_threads(1)
    params = [Parameter(torch.ones(64)) for _ in range(1000)]
    optimizer = LPSGDM(params, momentum_dtype=dtype)  # hooks do not keep it alive
    release_gradients(optimizer, accumulate=2**30)
    (hook,) = params[500]._post_accumulate_grad_hooks.values()
    grad = torch.ones(64)

    def backward() -> None:
        params[500].grad = grad
        hook(params[500])

    backward()
    optimizer.step()  # from here on nothing is unusual: the group has a rounding_step
    benchmark(backward)
