# SPDX-License-Identifier: MIT
"""What the tests of several folders share."""

import math
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch.nn import Parameter

import lpsgd
import lpsgd_ext

ROOT = Path(__file__).resolve().parent.parent
CLASSES = [lpsgd.LPSGD, lpsgd.LPSGDM]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
PS = [2.0, 2.5, 3.0, 6.0, 9.0, 100.0, math.inf]

IN_C = lpsgd.build_info()["fallback"] is None  # not in `make test-pure`
needs_c = pytest.mark.skipif(not IN_C, reason="PyTorch's operations do not promise it")

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


def blocks_of(page: str) -> dict[str, list[str]]:
    """The blocks of Python in a page of docs, without prompts, by their sections' headings."""
    text = (ROOT / "docs" / page).read_text()
    fence = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
    sections = text.split("\n## ")[1:]
    return {section.splitlines()[0]: fence.findall(section) for section in sections}


def run_block(code: str, page: str) -> None:
    """As in a program of its own, of one seed. A block says by an assert what must come of it."""
    assert "\nassert " in code
    torch.manual_seed(0)
    exec(compile(code, page, "exec"), {"__name__": "__main__"})


def quick_compiler(folder: Path) -> str:
    """The path of a C compiler that leaves the optimization out, and with ccache what it has
    compiled before for another test."""
    script = folder / "cc"
    cache = f"CCACHE_DIR={ROOT}/build/ccache CCACHE_NOHASHDIR=1 ccache"
    compiler = f"{cache if shutil.which('ccache') else ''} {os.environ.get('CC', 'cc')}"
    script.write_text(f'#!/bin/sh\n{compiler} "$@" -O0 -U_FORTIFY_SOURCE\n')
    script.chmod(0o755)
    return str(script)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's bits as integers, so that comparisons see signs of zero and NaNs."""
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[
        tensor.element_size()
    ]
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
