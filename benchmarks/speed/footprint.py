# SPDX-License-Identifier: MIT
"""What a step needs besides time: memory; and what the package costs before the first step."""

import io
import math
import os
import re
import statistics
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import Parameter

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


def _status(name: str) -> int:
    """A number of bytes from the kernel's account of this process."""
    text = Path("/proc/self/status").read_text()
    found = re.search(rf"^{name}:\s*(\d+) kB$", text, re.MULTILINE)
    assert found is not None, name
    return int(found[1]) * 1024


def temporaries(list_: str, optimizer: str) -> int:
    """How far memory rises in the third step. To be called in a fresh process."""
    torch.set_num_threads(1)
    params = [Parameter(torch.ones(shape)) for shape in shapes_of(list_)]
    for param in params:
        param.grad = torch.ones_like(param)
    step = CONTENDERS[optimizer](params).step
    for _ in range(2):
        step()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _status("VmRSS")
    step()
    return _status("VmHWM") - before


def memory(list_: str, optimizers: Sequence[str] = MEMORY_OF) -> list[Memory]:
    """Of these optimizers, each in a process of its own that returns freed memory at once."""
    environment = {
        **os.environ,
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "0",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
    }
    found = []
    for name in optimizers:
        code = f"from {__name__} import temporaries as t; print(t({list_!r}, {name!r}))"
        output = subprocess.check_output([sys.executable, "-c", code], env=environment)
        size = sum(map(math.prod, shapes_of(list_))) * torch.float32.itemsize
        found.append(Memory(list_, name, size, int(output)))
    return found


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
