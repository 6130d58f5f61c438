# SPDX-License-Identifier: MIT
"""What a step needs besides time: memory; and what the package costs before the first step."""

import gc
import importlib
import io
import json
import math
import os
import re
import statistics
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import SGD, AdamW, Optimizer

import lpsgd
import lpsgd_ext
from benchmarks.speed.step import CONTENDERS, shapes_of

ROOT = Path(__file__).resolve().parents[2]
MEMORY_OF = (
    "LPSGDM p=4",
    "SGD fused",
    "SGD foreach",
    "AdamW fused",
    "AdamW foreach",
    "eager LPSGDM",
)


@dataclass(frozen=True)
class Memory:
    """Bytes of a list's parameters and how far above the level before it a step's peak lies."""

    list: str
    optimizer: str
    parameters: int
    temporaries: int


@dataclass(frozen=True)
class State:
    """Bytes a parameter: those of the state's tensors, and those by which memory has risen at its
    peak in training. Where the optimizer does not run here, its own words instead."""

    dtype: str
    optimizer: str
    state: float
    peak: float
    error: str = ""


def _status(name: str) -> int:
    """A number of bytes from the kernel's account of this process."""
    text = Path("/proc/self/status").read_text()
    found = re.search(rf"^{name}:\s*(\d+) kB$", text, re.MULTILINE)
    assert found is not None, name
    return int(found[1]) * 1024


def temporaries(list_: str) -> list[int]:
    """How far memory rises in the third step of each optimizer. To be called in a fresh process."""
    torch.set_num_threads(1)
    found = []
    for name in MEMORY_OF:
        params = [Parameter(torch.ones(shape)) for shape in shapes_of(list_)]
        for param in params:
            param.grad = torch.ones_like(param)
        step = CONTENDERS[name](params).step
        for _ in range(2):
            step()
        found.append(rise(step)[0])
    return found


def rise(function: Callable[[], Any]) -> tuple[int, Any]:
    """By how many bytes memory is larger than before at the peak of a call; and its value."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _status("VmRSS")
    value = function()
    return _status("VmHWM") - before, value


def in_fresh_process(expression: str, module: str = __name__) -> Any:
    """The value of an expression of a module in a process that returns freed memory at once."""
    environment = {
        **os.environ,
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "0",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
    }
    code = f"import json; from {module} import *; print(json.dumps({expression}))"
    output = subprocess.check_output([sys.executable, "-c", code], env=environment, text=True)
    return json.loads(output.splitlines()[-1])


def memory(list_: str) -> list[Memory]:
    """Of all optimizers."""
    size = sum(map(math.prod, shapes_of(list_))) * torch.float32.itemsize
    found = in_fresh_process(f"temporaries({list_!r})")
    return [Memory(list_, name, size, most) for name, most in zip(MEMORY_OF, found, strict=True)]


def _other(name: str, **values: Any) -> Any:
    """A class of another package's, which is imported when it makes an optimizer."""
    module, _, name = name.rpartition(".")
    return lambda params: getattr(importlib.import_module(module), name)(params, **values)


def _released(params: Any) -> Optimizer:
    optimizer = ONE_BYTE(params)
    lpsgd.release_gradients(optimizer)
    return optimizer


STOCHASTIC = partial(lpsgd.LPSGDM, stochastic_rounding=True)
ONE_BYTE = partial(STOCHASTIC, momentum_dtype=torch.float8_e5m2)
STATE_OF: dict[str, dict[str, Any]] = {
    "float32": {
        "SGD without momentum": partial(SGD, fused=True),
        "SGD": partial(SGD, momentum=0.9, fused=True),
        "AdamW": partial(AdamW, fused=True),
        "LPSGDM": lpsgd.LPSGDM,
        "LPSGDM bfloat16": partial(lpsgd.LPSGDM, momentum_dtype=torch.bfloat16),
        "LPSGDM one byte": partial(lpsgd.LPSGDM, momentum_dtype=torch.float8_e5m2),
    },
    "bfloat16": {
        "SGD": partial(SGD, momentum=0.9, fused=True),
        "AdamW": partial(AdamW, fused=True),
        "LPSGDM": STOCHASTIC,
        "LPSGDM float32": partial(STOCHASTIC, momentum_dtype=torch.float32),
        "LPSGDM one byte": ONE_BYTE,
        "LPSGDM one byte, released": _released,
    },
}
OTHER_STATE_OF: dict[str, dict[str, Any]] = {
    "float32": {
        "torchao AdamW8bit": _other("torchao.optim.AdamW8bit"),
        "torchao AdamWFp8": _other("torchao.optim.AdamWFp8"),
        "bitsandbytes AdamW8bit": _other("bitsandbytes.optim.AdamW8bit"),
    },
    "bfloat16": {
        "torchao AdamW8bit": _other("torchao.optim.AdamW8bit", bf16_stochastic_round=True),
        "torchao AdamWFp8": _other("torchao.optim.AdamWFp8", bf16_stochastic_round=True),
        "bitsandbytes AdamW8bit": _other("bitsandbytes.optim.AdamW8bit"),
    },
}


def _plain(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors that a tensor keeps its elements in."""
    if hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from _plain(getattr(tensor, name))
    else:
        yield tensor


def state_bytes(optimizer: Optimizer) -> int:
    """The bytes of all tensors of the state; what several share counts once."""
    values = (value for state in optimizer.state.values() for value in state.values())
    plain = (part for value in values if torch.is_tensor(value) for part in _plain(value))
    return sum({part.data_ptr(): part.nbytes for part in plain}.values())


def _train(layers: int, width: int, dtype: torch.dtype, make: Any) -> tuple[int, int]:
    """Three steps of a network of square layers, on so few examples that nothing but parameters
    counts. Returns their number and the bytes of the state."""
    model = nn.Sequential(*(nn.Linear(width, width, dtype=dtype) for _ in range(layers)))
    optimizer = make(model.parameters())
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.ones(4, width, dtype=dtype)).square().mean().backward()
        optimizer.step()
    return sum(param.numel() for param in model.parameters()), state_bytes(optimizer)


def state_of(dtype: str, name: str, make: Any, width: int) -> State:
    """What an optimizer keeps and needs. To be called in a fresh process.

    What is loaded or compiled at an optimizer's first steps is not counted: one layer makes them
    before.
    """
    torch.set_num_threads(1)
    train = partial(_train, width=width, dtype=getattr(torch, dtype), make=make)
    try:
        train(1)
        peak, (count, state) = rise(partial(train, 4))
    except Exception as error:
        return State(dtype, name, math.nan, math.nan, f"{type(error).__name__}: {error}")
    return State(dtype, name, state / count, peak / count)


def states_here(width: int, others: bool) -> list[dict[str, Any]]:
    """`states`, to be called in a fresh process."""
    return [
        asdict(state_of(dtype, name, make, width))
        for dtype, makes in STATE_OF.items()
        for name, make in {**makes, **(OTHER_STATE_OF[dtype] if others else {})}.items()
    ]


def states(width: int, others: bool) -> list[State]:
    """What optimizers keep of a parameter, and what training needs; with `others` those of other
    packages as well."""
    return [State(**one) for one in in_fresh_process(f"states_here({width}, {others})")]


def package(times: int) -> dict[str, str]:
    """What the package costs before the first step; the import is the median of so many."""
    code = (
        "import time, torch; t = time.perf_counter(); import lpsgd; print(time.perf_counter() - t)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    seconds = statistics.median(
        float(subprocess.check_output([sys.executable, "-c", code], env=environment))
        for _ in range(times)
    )
    module = Path(lpsgd_ext.__file__)
    files = [module, *Path(lpsgd.__file__).parent.glob("*.py")]
    wheel = io.BytesIO()
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in files:
            archive.write(path, path.name)
    return {
        "import lpsgd after import torch": f"{seconds * 1e3:.0f} ms",
        "wheel": f"{len(wheel.getvalue()) / 1024:.0f} KiB (the package's files, compressed)",
        "installed": f"{sum(path.stat().st_size for path in files) / 1024:.0f} KiB",
        "module": f"{module.stat().st_size / 1024:.0f} KiB of these",
    }
