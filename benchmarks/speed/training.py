# SPDX-License-Identifier: MIT
"""Whole training steps: forward, backward and `step()`, and the share of the last."""

import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.paper.characters import GPT
from benchmarks.paper.networks import Block
from benchmarks.speed.step import MakeOptimizer
from benchmarks.speed.timing import share_state


class ResNet18(nn.Sequential):
    """torchvision's ResNet-18 for 1000 classes."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 64, 7, 2, padding=3, bias=False),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.MaxPool2d(3, 2, padding=1),
            *(Block(a, b, b // a) for width in (64, 128, 256, 512) for a, b in self._widths(width)),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(512, 1000),
        )

    @staticmethod
    def _widths(width: int) -> list[tuple[int, int]]:
        return [(max(width // 2, 64), width), (width, width)]


class Task(NamedTuple):
    """A network and its loss on one batch."""

    model: nn.Module
    loss: Callable[[], Tensor]


def resnet_on_images(batch: int) -> Task:
    """Of the size of CIFAR's."""
    torch.manual_seed(0)
    model, images, labels = ResNet18(), torch.randn(batch, 3, 32, 32), torch.randint(1000, (batch,))
    return Task(model, lambda: F.cross_entropy(model(images), labels))


def gpt_on_tokens(batch: int) -> Task:
    torch.manual_seed(0)
    context = 128
    model = GPT(vocabulary=8192, context=context, width=256, layers=4, heads=4)
    tokens = torch.randint(8192, (batch, context + 1))
    return Task(
        model, lambda: F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    )


TASKS: dict[str, Callable[[], Task]] = {
    "ResNet-18, 32 images of 32 x 32": partial(resnet_on_images, 32),
    "GPT of 4 x 256, 8 x 128 tokens": partial(gpt_on_tokens, 8),
}
CONTENDERS = ("LPSGDM p=4", "SGD fused", "SGD foreach", "AdamW fused", "eager LPSGDM")


@dataclass(frozen=True)
class Times:
    """Seconds of an optimizer's training steps, round by round."""

    task: str
    threads: int
    optimizer: str
    passes: list[float]  # forward and backward
    step: list[float]

    def milliseconds(self) -> tuple[float, float]:
        """The medians of both."""
        return statistics.median(self.passes) * 1e3, statistics.median(self.step) * 1e3

    def share(self) -> float:
        """What step() takes of the whole, as the median over the rounds."""
        return statistics.median(
            step / (passes + step) for passes, step in zip(self.passes, self.step, strict=True)
        )


def train(
    name: str, contenders: Mapping[str, MakeOptimizer], threads: int, rounds: int
) -> list[Times]:
    """Times training steps; the optimizers take turns with one network."""
    torch.set_num_threads(threads)
    model, loss = TASKS[name]()
    optimizers = {key: make([*model.parameters()]) for key, make in contenders.items()}
    times = {key: Times(name, threads, key, [], []) for key in optimizers}
    keys = list(optimizers)
    gc.collect()
    gc.disable()
    try:
        for round_ in range(rounds + 1):  # the first makes the state
            random.Random(round_).shuffle(keys)
            for key in keys:
                optimizer = optimizers[key]
                optimizer.zero_grad()
                start = time.perf_counter()
                loss().backward()  # type: ignore[no-untyped-call]
                middle = time.perf_counter()
                optimizer.step()
                end = time.perf_counter()
                if round_:
                    times[key].passes.append(middle - start)
                    times[key].step.append(end - middle)
            if not round_:
                share_state([*optimizers.values()])
    finally:
        gc.enable()
    return [*times.values()]
