# SPDX-License-Identifier: MIT
"""The motivating quadratics of Xu & Yang (arXiv:2606.02078): two parameters, two curvatures.

    f(a, b) = A / 2 (a - 1)^2 + B / 2 (b - 4)^2

Under strong anisotropy (A = 200, B = 0.05) gradient descent stalls along b, and sign descent gets
there but oscillates. Under weak anisotropy (1.2, 0.8) gradient descent converges and sign descent
oscillates around the minimum. LPSGD with p on its way from large to 2 does well on both.
"""

import math
from dataclasses import dataclass

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import Parameter

from lpsgd import LPSGD, CosineAnnealingP

START = (-1.0, 0.52)
MINIMUM = (1.0, 4.0)
COLORS = {"gradient descent": "#0072B2", "sign descent": "#E69F00", "LPSGD": "#009E73"}


@dataclass(frozen=True)
class Problem:
    """A quadratic with every method's settings; p is scheduled per step."""

    name: str
    curvature: tuple[float, float]
    steps: int
    lr: dict[str, float]
    p_max: float

    def loss(self, point: Tensor) -> Tensor:
        """f at points (..., 2)."""
        squares = (point - point.new_tensor(MINIMUM)).square()
        return (squares * point.new_tensor(self.curvature)).sum(dim=-1) / 2


PROBLEMS = (
    Problem(
        "Strong anisotropy",
        (200.0, 0.05),
        1000,
        {"gradient descent": 0.002, "sign descent": 0.05, "LPSGD": 0.0075},
        p_max=20.0,
    ),
    Problem(
        "Weak anisotropy",
        (1.2, 0.8),
        40,
        {"gradient descent": 0.8, "sign descent": 0.2, "LPSGD": 0.2},
        p_max=6.0,
    ),
)


def descend(problem: Problem, method: str) -> Tensor:
    """The points (steps + 1, 2) that a method visits, in float64."""
    point = Parameter(torch.tensor(START, dtype=torch.float64))
    p = {"gradient descent": 2.0, "sign descent": math.inf, "LPSGD": problem.p_max}[method]
    optimizer = LPSGD([point], lr=problem.lr[method], p=p)
    schedule = CosineAnnealingP(optimizer, problem.steps) if method == "LPSGD" else None
    path = [point.detach().clone()]
    for _ in range(problem.steps):
        optimizer.zero_grad()
        torch.autograd.backward(problem.loss(point))
        optimizer.step()
        if schedule is not None:
            schedule.step()
        path.append(point.detach().clone())
    return torch.stack(path)


def label(problem: Problem, method: str) -> str:
    """A method with its settings."""
    p = f"p {problem.p_max:g}→2, " if method == "LPSGD" else ""
    return f"{method}, {p}lr {problem.lr[method]:g}"


def draw_paths(ax: Axes, problem: Problem, paths: dict[str, Tensor]) -> None:
    """Paths over the contour lines of the loss."""
    a = torch.linspace(-1.6, 3.0, 200, dtype=torch.float64)
    b = torch.linspace(-0.2, 5.2, 200, dtype=torch.float64)
    grid = torch.stack(torch.meshgrid(a, b, indexing="xy"), dim=-1)
    levels = torch.logspace(-3, 3, 19).tolist()
    loss = problem.loss(grid).numpy()
    ax.contour(a.numpy(), b.numpy(), loss, levels, colors="0.82", linewidths=0.8)
    for method, path in paths.items():
        ax.plot(*path.T.numpy(), color=COLORS[method], marker=".", markersize=3, linewidth=1)
    ax.plot(*START, "ko", markersize=5)
    ax.annotate("start", START, xytext=(4, -11), textcoords="offset points")
    ax.plot(*MINIMUM, "k*", markersize=10)
    ax.set(xlabel="a", ylabel="b", title=f"{problem.name}: curvatures {problem.curvature}")


def draw_losses(ax: Axes, problem: Problem, paths: dict[str, Tensor]) -> None:
    """Loss over steps."""
    for method, path in paths.items():
        losses = problem.loss(path).clamp_min(1e-20).numpy()
        ax.semilogy(losses, color=COLORS[method], label=label(problem, method))
    ax.set(xlabel="step", ylabel="loss f(a, b)", ylim=(1e-20, 1e7))
    ax.legend(loc="upper right", frameon=False, fontsize=9)
    ax.grid(alpha=0.3)


def run() -> tuple[Figure, dict[str, dict[str, float]]]:
    """Runs every method on every problem; returns the picture and the final losses."""
    figure = Figure(figsize=(10, 7.6), layout="constrained")
    final: dict[str, dict[str, float]] = {}
    for column, problem in enumerate(PROBLEMS):
        paths = {method: descend(problem, method) for method in problem.lr}
        final[problem.name] = {m: problem.loss(path[-1]).item() for m, path in paths.items()}
        draw_paths(figure.add_subplot(2, 2, 1 + column), problem, paths)
        draw_losses(figure.add_subplot(2, 2, 3 + column), problem, paths)
    return figure, final
