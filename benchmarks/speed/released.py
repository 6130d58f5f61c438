# SPDX-License-Identifier: MIT
"""Training in few bytes: the memory that a GPT takes, and whether the smallest loses anything.

    python -m benchmarks.speed.released [--quick] [--output FOLDER]

Prints the table of docs/memory.md and draws released.png: the losses of its smallest row and of
float32 throughout, on a GPT that is small enough for a few hundred steps.
"""

import argparse
import itertools
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim import SGD, AdamW, Optimizer

from benchmarks.paper.characters import GPT, VOCABULARY, text
from benchmarks.speed.footprint import ONE_BYTE, ROOT, STOCHASTIC, in_fresh_process, rise
from lpsgd import LPSGDM, release_gradients

SEED = 0
MEAN_OF = 20  # steps, for a point of a curve


@dataclass(frozen=True)
class Way:
    """A way to train."""

    make: Callable[..., Optimizer]
    dtype: torch.dtype  # of the weights
    state: int  # bytes of the optimizer's state, as all below those of a parameter
    released: bool = False
    accumulate: int = 1

    @property
    def weight(self) -> int:
        return self.dtype.itemsize

    @property
    def gradient(self) -> int:
        return 0 if self.released else self.dtype.itemsize

    @property
    def all(self) -> int:
        return self.weight + self.gradient + self.state


ADAMW = partial(AdamW, fused=True)
LARGEST, SMALLEST = "LPSGDM, float32 weights", "LPSGDM, one byte, released, accumulate=4"
WAYS = {
    "AdamW, float32 weights": Way(ADAMW, torch.float32, 8),
    LARGEST: Way(LPSGDM, torch.float32, 4),
    "AdamW": Way(ADAMW, torch.bfloat16, 4),
    "SGD with momentum": Way(partial(SGD, momentum=0.9, fused=True), torch.bfloat16, 2),
    "LPSGDM, float32 momentum": Way(
        partial(STOCHASTIC, momentum_dtype=torch.float32), torch.bfloat16, 4
    ),
    "LPSGDM, one byte": Way(ONE_BYTE, torch.bfloat16, 1),
    "LPSGDM, one byte, released": Way(ONE_BYTE, torch.bfloat16, 1, released=True),
    SMALLEST: Way(ONE_BYTE, torch.bfloat16, 1, released=True, accumulate=4),
}


@dataclass(frozen=True)
class Shape:
    """Of a GPT, and of what it learns from in a micro-batch."""

    context: int
    width: int
    layers: int
    heads: int
    windows: int


def windows(shape: Shape) -> Iterator[tuple[Tensor, Tensor]]:
    characters = text("training")
    generator = torch.Generator().manual_seed(SEED)
    while True:
        starts = torch.randint(
            len(characters) - shape.context, (shape.windows,), generator=generator
        )
        window = characters[starts[:, None] + torch.arange(shape.context + 1)].long()
        yield window[:, :-1], window[:, 1:]


def gpt(way: Way, shape: Shape) -> GPT:
    torch.manual_seed(SEED)
    model = GPT(len(VOCABULARY), shape.context, shape.width, shape.layers, shape.heads)
    return model.to(way.dtype)


def train(
    model: GPT, way: Way, shape: Shape, steps: int, accumulate: int, **values: Any
) -> list[float]:
    """The loss of every step."""
    optimizer = way.make(model.parameters(), **values)
    if way.released:
        release_gradients(optimizer, accumulate)
    data, losses = windows(shape), []
    for _ in range(steps):
        sum_of_losses = 0.0
        for x, y in itertools.islice(data, accumulate):
            loss = F.cross_entropy(model(x).flatten(0, 1).float(), y.flatten())
            sum_of_losses += loss.item()
            torch.autograd.backward(loss if way.released else loss / accumulate)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(sum_of_losses / accumulate)
    return losses


def peak(name: str, *numbers: int) -> float:
    """Bytes a parameter at the peak of two steps of training: of the weights, and by how much
    memory rises above them. To be called in a fresh process."""
    way, shape = WAYS[name], Shape(*numbers)
    torch.set_num_threads(1)
    run = partial(train, way=way, shape=shape, steps=2, accumulate=way.accumulate, lr=1e-4)
    run(gpt(way, replace(shape, layers=1)))  # what PyTorch itself takes at its first steps
    model = gpt(way, shape)
    above, _ = rise(partial(run, model))
    return way.weight + above / sum(param.numel() for param in model.parameters())


def table(numbers: tuple[int, ...]) -> Iterator[str]:
    yield "| weights in bfloat16, if nothing is said | weights | gradients | state | sum | peak |"
    yield "|---|---|---|---|---|---|"
    for name, way in WAYS.items():
        most = in_fresh_process(f"peak({name!r}, *{numbers})", "benchmarks.speed.released")
        gradient = way.gradient or ""
        yield f"| {name} | {way.weight} | {gradient} | {way.state} | {way.all} | {most:.2f} |"


def curve(name: str, shape: Shape, steps: int) -> list[float]:
    """Losses, each the mean of MEAN_OF steps."""
    accumulate = WAYS[SMALLEST].accumulate
    way = WAYS[name]
    losses = train(gpt(way, shape), way, shape, steps, accumulate, lr=0.003, p=6.0)
    return [statistics.fmean(part) for part in zip(*[iter(losses)] * MEAN_OF, strict=True)]


def draw(curves: dict[str, list[float]], path: Path) -> None:
    from matplotlib.figure import Figure

    axes = (figure := Figure(figsize=(6, 3.5), layout="constrained")).subplots()
    for name, means in curves.items():
        steps = [MEAN_OF * (i + 0.5) for i in range(len(means))]
        axes.plot(steps, means, label=f"{name}: {WAYS[name].all} bytes")
    axes.set(xlabel="step of four micro-batches", ylabel="training loss")
    axes.legend()
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a small GPT and few steps")
    parser.add_argument("--output", type=Path, default=ROOT / "docs")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    quick = arguments.quick
    for line in table((16, 64, 2, 2, 1) if quick else (16, 768, 14, 12, 1)):
        print(line, flush=True)
    torch.set_num_threads(1)  # the same sums everywhere
    curves = {}
    for name in (LARGEST, SMALLEST):
        curves[name] = curve(name, Shape(64, 96, 3, 4, 4), 40 if quick else 300)
        first, last = curves[name][0], curves[name][-1]
        print(f"{name}: loss {first:.3f} at first, {last:.3f} at last", flush=True)
    draw(curves, arguments.output / "released.png")


if __name__ == "__main__":
    main()
