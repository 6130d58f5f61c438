# SPDX-License-Identifier: MIT
"""The bound that memory sets: bound.c, compiled for this machine when it is first needed."""

import ctypes
import functools
import os
import shlex
import subprocess
import tempfile
from pathlib import Path

import torch
from torch.nn import Parameter


@functools.cache
def library() -> ctypes.CDLL:
    """bound.c with all that this CPU has. Raises OSError or CalledProcessError without compiler."""
    source = Path(__file__).with_suffix(".c")
    compiler = shlex.split(os.environ.get("CC", "cc"))
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "bound.so"
        options = ["-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"]
        subprocess.run([*compiler, *options, "-o", path, source], check=True)
        return ctypes.CDLL(str(path))


class MemoryBound:
    """Passes over memory as a step does: `step()` of an optimizer that only moves bytes.

    It writes to copies of the parameters and reads the gradients that they have when it is made;
    those have to stay in place. Bytes beyond a tensor's last multiple of 8 are left out.
    """

    def __init__(self, params: list[Parameter], momentum: bool = True) -> None:
        def addresses(tensors: list[torch.Tensor]) -> ctypes.Array[ctypes.c_void_p]:
            return (ctypes.c_void_p * len(tensors))(*[tensor.data_ptr() for tensor in tensors])

        grads = [param.grad for param in params if param.grad is not None]
        self.copies = [torch.zeros_like(param) for param in params]
        self.buffers = [torch.zeros_like(param) for param in params] if momentum else []
        words = [param.numel() * param.itemsize // 8 for param in params]
        self.arguments = (
            addresses(self.copies),
            addresses(grads),
            addresses(self.buffers) if momentum else None,
            (ctypes.c_int64 * len(params))(*words),
            ctypes.c_int64(len(params)),
        )
        self.function = library().bound

    def step(self) -> None:
        self.function(*self.arguments, torch.get_num_threads())
