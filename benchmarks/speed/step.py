# SPDX-License-Identifier: MIT
"""Who is timed on what, and how: one `step()` as a user calls it.

All contenders of a list step the same parameters, with the same gradients and buffers, in one
process, in an order that is shuffled for every round. A figure is the median over the rounds of the
ratio of two contenders' times.
"""

import gc
import math
import os
import random
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from math import inf
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from lion_pytorch import Lion
from torch import Tensor
from torch.nn import Parameter
from torch.optim import SGD, AdamW, Optimizer

from benchmarks.speed.bound import MemoryBound
from lpsgd import LPSGD, LPSGDM, _eager

Shapes = list[tuple[int, ...]]


class Steps(Protocol):
    """What is timed."""

    def step(self) -> object: ...


Make = Callable[[list[Parameter]], Steps]
MakeOptimizer = Callable[[list[Parameter]], Optimizer]


def resnet(blocks: tuple[int, ...], bottleneck: bool) -> Shapes:
    """The parameters of torchvision's ResNet for 1000 classes, without building the network."""
    shapes: Shapes = [(64, 3, 7, 7), (64,), (64,)]
    width_in = 64
    for stage, count in enumerate(blocks):
        width = 64 << stage
        width_out = width * 4 if bottleneck else width
        for block in range(count):
            sizes = (
                [(width, width_in, 1), (width, width, 3), (width_out, width, 1)]
                if bottleneck
                else [(width, width_in, 3), (width, width, 3)]
            )
            if block == 0 and width_in != width_out:
                sizes.append((width_out, width_in, 1))
            for out, channels, kernel in sizes:
                shapes += [(out, channels, kernel, kernel), (out,), (out,)]
            width_in = width_out
    return [*shapes, (1000, width_in), (1000,)]


def transformer(layers: int, width: int) -> Shapes:
    """The parameters of a transformer's blocks and of the normalisation after them."""
    norm: Shapes = [(width,), (width,)]
    sizes = [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)]
    attention_in, attention_out, up, down = ([size, size[:1]] for size in sizes)
    block = [*norm, *attention_in, *attention_out, *norm, *up, *down]
    return [*block * layers, *norm]


LISTS: dict[str, Shapes] = {
    "ResNet-18": resnet((2, 2, 2, 2), bottleneck=False),
    "ResNet-50": resnet((3, 4, 6, 3), bottleneck=True),
    "ViT-B/16": [
        *((1, 1, 768), (1, 197, 768), (768, 3, 16, 16), (768,)),
        *transformer(12, 768),
        *((1000, 768), (1000,)),
    ],
    "GPT-2": [(50257, 768), (1024, 768), *transformer(12, 768)],
    "1000 x 64": [(64,)] * 1000,
    "62 x 1": [(1,)] * 62,
    "4k": [(1 << 12,)],
    "64k": [(1 << 16,)],
    "1M": [(1 << 20,)],
    "16M": [(1 << 24,)],
    "64M": [(1 << 26,)],
}


class CompiledEager:
    """The eager LPSGDM's operations, compiled by torch.compile. (Compiled, `LPSGDM.step` itself
    calls the C kernel.)"""

    def __init__(self, params: list[Parameter]) -> None:
        self.params = params
        self.buffers = [torch.zeros_like(param) for param in params]
        self.compiled = torch.compile(
            partial(_eager.foreach, lr=1e-3, p=4.0, momentum=0.9, weight_decay=1e-2),
            dynamic=False,
        )

    @torch.no_grad()
    def step(self) -> None:
        self.compiled(self.params, [param.grad for param in self.params], self.buffers)


CONTENDERS: dict[str, MakeOptimizer] = {
    **{
        f"LPSGDM p={p:g}": partial(LPSGDM, lr=1e-3, p=p, weight_decay=1e-2, fused=True)
        for p in (2.0, 4.0, inf)
    },
    "SGD fused": partial(SGD, lr=1e-3, momentum=0.9, weight_decay=1e-2, fused=True),
    "SGD foreach": partial(SGD, lr=1e-3, momentum=0.9, weight_decay=1e-2, foreach=True),
    "SGD": partial(SGD, lr=1e-3, momentum=0.9, weight_decay=1e-2),
    "AdamW fused": partial(AdamW, lr=1e-3, fused=True),
    "AdamW foreach": partial(AdamW, lr=1e-3, foreach=True),
    "Lion": partial(Lion, lr=1e-4, weight_decay=1e-2),
    "eager LPSGDM": partial(LPSGDM, lr=1e-3, p=4.0, weight_decay=1e-2, foreach=True),
    "eager LPSGDM for-loop": partial(LPSGDM, lr=1e-3, p=4.0, weight_decay=1e-2, foreach=False),
}
WITHOUT_MOMENTUM: dict[str, MakeOptimizer] = {
    **{
        f"LPSGD p={p:g}": partial(LPSGD, lr=1e-3, p=p, weight_decay=1e-2, fused=True)
        for p in (2.0, 4.0, inf)
    },
    "plain SGD fused": partial(SGD, lr=1e-3, weight_decay=1e-2, fused=True),
    "plain SGD foreach": partial(SGD, lr=1e-3, weight_decay=1e-2, foreach=True),
    "plain SGD": partial(SGD, lr=1e-3, weight_decay=1e-2),
    "eager LPSGD": partial(LPSGD, lr=1e-3, p=4.0, weight_decay=1e-2, foreach=True),
}
OTHERS: dict[str, Make] = {
    "eager LPSGDM compiled": CompiledEager,
    "memory": MemoryBound,
    "memory, no momentum": partial(MemoryBound, momentum=False),
}
ALL: dict[str, Make] = {**CONTENDERS, **WITHOUT_MOMENTUM, **OTHERS}


def cache_sizes() -> dict[str, int]:
    """Bytes of each level of data cache that the first CPU reaches, as "L1", "L2" and so on."""
    sizes = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = (
            (index / name).read_text().strip() for name in ("level", "type", "size")
        )
        if kind != "Instruction":
            sizes[f"L{level}"] = int(size.removesuffix("K")) * 1024
    return sizes


class Setting(NamedTuple):
    """What all contenders are given."""

    list: str
    dtype: torch.dtype = torch.float32
    threads: int = 1
    caches: str = "fresh"

    @property
    def bytes(self) -> int:
        """Those of all parameters."""
        return sum(map(math.prod, LISTS[self.list])) * self.dtype.itemsize


class Ratio(NamedTuple):
    """The median of per-round ratios, their quartiles, and half the width of about the 95 %
    confidence interval of the median (McGill, Tukey and Larsen's notch)."""

    median: float
    low: float
    high: float
    margin: float


class Record(NamedTuple):
    """Seconds of every contender's step in a setting, round by round."""

    setting: Setting
    seconds: dict[str, list[float]]
    others: float  # the mean number of CPUs that other processes used meanwhile

    def microseconds(self, name: str) -> float:
        return statistics.median(self.seconds[name]) * 1e6

    def ratio(self, own: str, *peers: str) -> Ratio:
        """Of a contender's time to the shortest of these peers'."""
        best = map(min, zip(*(self.seconds[peer] for peer in peers), strict=True))
        ratios = [a / b for a, b in zip(self.seconds[own], best, strict=True)]
        low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
        return Ratio(median, low, high, 1.57 * (high - low) / math.sqrt(len(ratios)))


def share_state(optimizers: Sequence[Any]) -> None:
    """Lets optimizers of the same parameters use one tensor for what they call by one name: the
    memory stays small, and no contender's buffers lie better than another's."""
    shared: dict[tuple[Tensor, str], Any] = {}
    for optimizer in optimizers:
        for param, state in getattr(optimizer, "state", {}).items():
            for name, value in state.items():
                state[name] = shared.setdefault((param, name), value)


def cpu_seconds() -> float:
    """What all processes but this one have used of all CPUs since the machine was started."""
    with open("/proc/stat") as stat:
        user, nice, system, _, _, irq, softirq, steal, *_ = map(int, stat.readline().split()[1:])
    busy = user + nice + system + irq + softirq + steal
    return busy / os.sysconf("SC_CLK_TCK") - time.process_time()


def measure(
    setting: Setting,
    contenders: dict[str, Make],
    budget: float,
    rounds: tuple[int, int] = (7, 1000),
) -> Record:
    """Times the contenders until `budget` seconds are over, within these numbers of rounds.

    What happens before each step: "fresh": new gradient tensors are written, as a backward pass
    leaves them. "cold": so they are, and before that a buffer of twice the caches' size, as if the
    activations were so large. "warm": another step, with the same tensors.
    """
    torch.set_num_threads(setting.threads)
    generator = torch.Generator().manual_seed(0)

    def randn(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator).to(setting.dtype)

    shapes = LISTS[setting.list]
    params = [Parameter(randn(shape)) for shape in shapes]
    fresh = [randn(shape) * 1e-2 for shape in shapes]
    grads = [torch.empty_like(grad) for grad in fresh]
    evict = torch.empty(2 * max(cache_sizes().values(), default=1 << 26), dtype=torch.uint8)

    def backward() -> None:
        if setting.caches == "cold":
            evict.zero_()
        torch._foreach_copy_(grads, fresh)
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad.detach()

    backward()
    optimizers = {}
    for name, make in contenders.items():
        optimizers[name] = make(params)
        optimizers[name].step()  # makes the state, compiles
        share_state([*optimizers.values()])
    seconds: dict[str, list[float]] = {name: [] for name in optimizers}
    names = list(optimizers)
    shuffle = random.Random(0).shuffle
    gc.collect()
    gc.disable()
    start_of_all, others = time.perf_counter(), cpu_seconds()
    try:
        for round_ in range(rounds[1] + 1):  # the first is a warm-up
            if round_ > rounds[0] and time.perf_counter() > start_of_all + budget:
                break
            shuffle(names)
            for name in names:
                step = optimizers[name].step
                if setting.caches == "warm":
                    step()
                else:
                    backward()
                start = time.perf_counter()
                step()
                elapsed = time.perf_counter() - start
                if round_:
                    seconds[name].append(elapsed)
    finally:
        gc.enable()
    wall = time.perf_counter() - start_of_all
    return Record(setting, seconds, (cpu_seconds() - others) / wall)
