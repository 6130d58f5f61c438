# SPDX-License-Identifier: MIT
"""bfloat16 parameters with and without what makes them train: `python -m
benchmarks.paper.low_precision`.

Trains the network of `digits` with LPSGDM at p = 6 and a small learning rate, where most updates
are below half a unit in the last place of a bfloat16 parameter. Prints the loss on the training
data, evaluated in float32, and writes low_precision.png into the output directory.
"""

import argparse
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from benchmarks.paper.digits import Digits
from benchmarks.paper.report import save
from benchmarks.paper.task import Source
from lpsgd import LPSGDM

WIDE = {"momentum_dtype": torch.float32}
METHODS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "float32": (torch.float32, {}),
    "bfloat16": (torch.bfloat16, {}),
    "bfloat16, float32 momentum": (torch.bfloat16, WIDE),
    "bfloat16, stochastic rounding": (torch.bfloat16, {"stochastic_rounding": True}),
    "bfloat16, both": (torch.bfloat16, {"stochastic_rounding": True, **WIDE}),
}


def train(name: str, lr: float, epochs: int, seeds: int) -> list[float]:
    """The training loss before every epoch and after the last, the mean over the seeds."""
    dtype, values = METHODS[name]
    task = Digits(False, Source())
    generators = [torch.Generator().manual_seed(seed) for seed in range(seeds)]
    model = task.make_model(generators)
    params = list(model.parameters())
    low = [param.detach().to(dtype).requires_grad_() for param in params]
    optimizer = LPSGDM(low, lr=lr, p=6.0, **values)

    @torch.no_grad()
    def widen() -> None:
        for param, source in zip(params, low, strict=True):
            param.copy_(source)

    def loss() -> float:
        widen()
        with torch.no_grad():
            losses, _ = task.losses(model, task.x[None], task.y[None])
        return losses.mean().item()

    history = [loss()]
    for _ in tqdm(range(epochs), desc=name, leave=False, mininterval=1):
        for batch in torch.split(task.order(generators), 64, dim=1):
            widen()
            losses, _ = task.losses(model, task.x[batch], task.y[batch])
            gradients: tuple[Tensor, ...] = torch.autograd.grad(losses.mean(dim=1).sum(), params)
            for source, gradient in zip(low, gradients, strict=True):
                source.grad = gradient.to(dtype)
            optimizer.step()
        history.append(loss())
    return history


def draw(histories: dict[str, list[float]]) -> Figure:
    """The losses over the epochs."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    styles = ("-", "-", "--", "-.", ":")
    for (name, history), style in zip(histories.items(), styles, strict=True):
        axes.plot(history, style, label=name)
    axes.set(xlabel="epoch", ylabel="training loss", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def main() -> None:
    """Runs the comparison with the command line's settings."""
    parser = argparse.ArgumentParser(description="Train bfloat16 parameters with LPSGDM.")
    parser.add_argument("--output", type=Path, default=Path("build/demo"), help="directory")
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    matplotlib.use("Agg")
    arguments.output.mkdir(parents=True, exist_ok=True)
    histories = {
        name: train(name, arguments.lr, arguments.epochs, arguments.seeds) for name in METHODS
    }
    print("| parameters | loss at the start | at half time | at the end |\n|---|---|---|---|")
    for name, history in histories.items():
        middle = history[len(history) // 2]
        print(f"| {name} | {history[0]:.3f} | {middle:.3f} | {history[-1]:.3f} |")
    save(draw(histories), arguments.output / "low_precision.png")


if __name__ == "__main__":
    main()
