# SPDX-License-Identifier: MIT
"""How a `step()` is timed.

All contenders step the same parameters, with the same gradients and buffers, in one process, in an
order that is shuffled for every round. A figure is the median over the rounds of the ratio of two
contenders' times.
"""

import gc
import math
import os
import random
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from benchmarks.speed.step import Make, shapes_of

DISTURBED = 0.05  # CPUs that other processes use, from which on figures are suspect


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


@dataclass(frozen=True)
class Setting:
    """What all contenders are given."""

    list: str
    dtype: str = "float32"
    threads: int = 1
    caches: str = "fresh"

    @property
    def elements(self) -> int:
        return sum(map(math.prod, shapes_of(self.list)))


class Ratio(NamedTuple):
    """The median of per-round ratios, their quartiles, and half the width of about the 95 %
    confidence interval of the median (McGill, Tukey and Larsen's notch)."""

    median: float
    low: float
    high: float
    margin: float


@dataclass(frozen=True)
class Record:
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
    """Lets optimizers of the same parameters use one tensor for what they call by one name, if it
    has one dtype: the memory stays small, and no contender's buffers lie better than another's."""
    shared: dict[tuple[Tensor, str, object], Any] = {}
    for optimizer in optimizers:
        for param, state in getattr(optimizer, "state", {}).items():
            for name, value in state.items():
                key = param, name, getattr(value, "dtype", None)
                state[name] = shared.setdefault(key, value)


def cpu_seconds() -> float:
    """What all processes but this one have used of all CPUs since the machine was started."""
    with open("/proc/stat") as stat:
        user, nice, system, _, _, irq, softirq, steal, *_ = map(int, stat.readline().split()[1:])
    busy = user + nice + system + irq + softirq + steal
    return busy / os.sysconf("SC_CLK_TCK") - time.process_time()


def measure(
    setting: Setting,
    contenders: Mapping[str, Make],
    budget: float,
    rounds: tuple[int, int] = (7, 300),
) -> Record:
    """Times the contenders until `budget` seconds are over, within these numbers of rounds; in
    fewer where they took 20 times as long.

    What happens before each step: "fresh": new gradient tensors are written, as a backward pass
    leaves them. "cold": so they are, and before that a buffer of twice the caches' size, as if the
    activations were so large. "warm": another step, with the same tensors.
    """
    torch.set_num_threads(setting.threads)
    generator = torch.Generator().manual_seed(0)

    def randn(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator).to(getattr(torch, setting.dtype))

    shapes = shapes_of(setting.list)
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
            spent = time.perf_counter() - start_of_all
            if (round_ > rounds[0] and spent > budget) or (round_ > 2 and spent > 20 * budget > 0):
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
                    seconds[name].append(round(elapsed, 9))
    finally:
        gc.enable()
    wall = time.perf_counter() - start_of_all
    return Record(setting, seconds, (cpu_seconds() - others) / wall)
