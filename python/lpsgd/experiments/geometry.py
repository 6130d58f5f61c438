# SPDX-License-Identifier: MIT
"""What p does, in two dimensions: unit balls and their steepest steps, and the two quadratics with
which Xu & Yang (arXiv:2606.02078) motivate LPSGD.

Gradient descent, sign descent (LPSGD at p = ∞) and LPSGD with p on the schedule of equation 19 go
from the same start for the same number of steps. The first two have the paper's learning rates.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import inf

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from numpy.typing import NDArray
from torch import Tensor
from torch.optim import SGD, Optimizer

import lpsgd_ext

from .._optimizer import LPSGD
from .._schedule import CosineAnnealingP
from ._style import style

MINIMUM = (1.0, 4.0)
# A start at a multiple of sign descent's step away from the minimum would hit it by chance.
START = (-1.0, 0.52)
SMALLEST_DRAWN_LOSS = 1e-12


@dataclass(frozen=True)
class Quadratic:
    """f(a, b) = k_a/2 (a - 1)² + k_b/2 (b - 4)² and what to minimise it with."""

    name: str
    curvatures: tuple[float, float]
    steps: int
    gradient_lr: float
    sign_lr: float
    lpsgd_lr: float
    p_max: float

    def __call__(self, point: Tensor) -> Tensor:
        """The value at points (..., 2)."""
        curvatures = torch.tensor(self.curvatures, dtype=point.dtype)
        return (curvatures / 2 * (point - torch.tensor(MINIMUM)) ** 2).sum(dim=-1)


# LPSGD ends at p = 2 as gradient descent, so its lr must stay below 2 / (largest curvature).
QUADRATICS = (
    Quadratic("Strong anisotropy", (200.0, 0.05), 1000, 0.002, 0.05, 0.0075, 20.0),
    Quadratic("Weak anisotropy", (1.2, 0.8), 40, 0.8, 0.2, 0.2, 6.0),
)


def descend(f: Quadratic, make: Callable[[list[Tensor]], Optimizer], anneal_p: bool) -> Tensor:
    """The points (steps + 1, 2) an optimizer visits; `anneal_p` takes its p to 2 on the way."""
    point = torch.tensor(START, dtype=torch.float64, requires_grad=True)
    optimizer = make([point])
    schedule = CosineAnnealingP(optimizer, f.steps) if anneal_p else None
    path = [point.detach().clone()]
    for _ in range(f.steps):
        optimizer.zero_grad()
        torch.autograd.backward(f(point))
        optimizer.step()
        if schedule is not None:
            schedule.step()
        path.append(point.detach().clone())
    return torch.stack(path)


def paths(f: Quadratic) -> dict[str, Tensor]:
    """The path (steps + 1, 2) of each of the three methods."""
    return {
        "gradient descent": descend(f, lambda params: SGD(params, f.gradient_lr), False),
        "sign descent": descend(f, lambda params: LPSGD(params, f.sign_lr, p=inf), False),
        "LPSGD": descend(f, lambda params: LPSGD(params, f.lpsgd_lr, p=f.p_max), True),
    }


def settings_of(f: Quadratic) -> dict[str, str]:
    """Each method's learning rate and p, in words."""
    return {
        "gradient descent": f"lr {f.gradient_lr:g}",
        "sign descent": f"lr {f.sign_lr:g}",
        "LPSGD": f"lr {f.lpsgd_lr:g}, p {f.p_max:g}→2",
    }


def table() -> str:
    """The loss of every method on both quadratics after the last step, as text."""
    lines = [f"{'quadratic':<20}{'steps':>6}  {'method':<18}{'settings':<20}{'final loss':>10}"]
    for f in QUADRATICS:
        for name, path in paths(f).items():
            settings = settings_of(f)[name]
            lines.append(
                f"{f.name:<20}{f.steps:>6}  {name:<18}{settings:<20}{f(path[-1]).item():>10.1e}"
            )
    return "\n".join(lines)


def draw_contours(axes: Axes, f: Quadratic) -> None:
    """The contour lines of f with the start and the minimum."""
    a, b = np.meshgrid(np.linspace(-1.25, 2.0, 200), np.linspace(0.2, 4.6, 200))
    heights = f(torch.tensor(np.stack([a, b], axis=-1))).numpy()
    levels = np.geomspace(heights.max() / 3e4, heights.max(), 14)
    axes.contour(a, b, heights, levels=levels, colors="0.8", linewidths=0.7, zorder=0)
    axes.plot(*START, "ks", markersize=5)
    axes.plot(*MINIMUM, "k*", markersize=9)


def draw_paths(axes: Axes, f: Quadratic) -> None:
    """The three paths over the contour lines of f."""
    draw_contours(axes, f)
    for name, path in paths(f).items():
        marker, (color, line) = "." if f.steps <= 100 else None, style(name)
        axes.plot(*path.T.numpy(), line, color=color, marker=marker, linewidth=1.5)
    axes.annotate("start", START, (6, -3), textcoords="offset points", va="top")
    axes.annotate("minimum", MINIMUM, (8, 5), textcoords="offset points")
    title = f"{f.name} (curvatures {f.curvatures[0]:g}, {f.curvatures[1]:g})"
    axes.set(xlabel="parameter a", ylabel="parameter b")
    axes.set_title(title, fontsize=11)


def draw_losses(axes: Axes, f: Quadratic) -> None:
    """The three losses over steps; those below the axis are left out."""
    for name, path in paths(f).items():
        label = f"{name} ({settings_of(f)[name]})"
        color, line = style(name)
        axes.plot(f(path).numpy(), line, color=color, linewidth=1.5, label=label)
    axes.set(xlabel="step", ylabel="loss f(a, b)", yscale="log", xlim=(0, f.steps))
    axes.set_ylim(bottom=SMALLEST_DRAWN_LOSS)
    axes.yaxis.set_major_locator(LogLocator(numticks=8))
    axes.grid(alpha=0.3)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), frameon=False)


def draw() -> Figure:
    """The picture: one column per quadratic, paths above, losses below."""
    figure, axes = plt.subplots(2, 2, figsize=(8, 8), layout="constrained", height_ratios=(5, 4))
    for column, f in enumerate(QUADRATICS):
        draw_paths(axes[0, column], f)
        draw_losses(axes[1, column], f)
    figure.suptitle("LPSGD descends like sign descent first and like gradient descent last")
    plt.close(figure)  # it is shown by who gets it, not by pyplot a second time
    return figure


def ball(p: float) -> NDArray[np.float64]:
    """Points (n, 2) all around the unit ball of the lp norm."""
    angles = np.linspace(0, 2 * np.pi, 401)
    corner = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    points: NDArray[np.float64] = corner / np.linalg.norm(corner, ord=p, axis=1, keepdims=True)
    return points


def direction(gradient: Tensor, p: float) -> Tensor:
    """The point of the unit ball of the lp norm where a linear function of this gradient is least
    (equation 10): LPSGD's step, but for its length."""
    point = torch.zeros_like(gradient, requires_grad=True)
    point.grad = gradient
    LPSGD([point], lr=1.0, p=p, eps=0.0).step()
    step: Tensor = point.detach()
    length: Tensor = torch.linalg.vector_norm(step, p)
    return step / length


def draw_ball(axes: Axes, gradient: Tensor, p: float) -> None:
    """The unit ball, minus the gradient, and the point of the ball that is furthest along it."""
    axes.plot(*ball(p).T, color=style("LPSGD")[0], linewidth=1.5)
    for vector, color in ((-gradient / gradient.norm(), "0.5"), (direction(gradient, p), "k")):
        arrow = {"arrowstyle": "->", "color": color, "linewidth": 1.5}
        x, y = vector.tolist()
        axes.annotate("", (x, y), (0, 0), arrowprops=arrow)
    axes.set(xlim=(-1.2, 1.2), ylim=(-1.2, 1.2), aspect="equal", xticks=[], yticks=[])


def draw_moment(above: Axes, below: Axes, f: Quadratic, path: Tensor, step: int) -> None:
    """LPSGD's path until a step, and below it the ball whose steepest descent that step is."""
    p = lpsgd_ext.cosine_p(step + 1, f.steps, f.p_max)
    draw_contours(above, f)
    above.plot(*path[: step + 1].T.numpy(), ".-", color=style("LPSGD")[0], linewidth=1.5)
    above.set(xticks=[], yticks=[])
    above.set_title(f"step {step}, p = {p:.3g}", fontsize=10)
    point = path[step].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(f(point), point)
    draw_ball(below, gradient, p)


def draw_moments(f: Quadratic) -> Figure:
    """Five moments of LPSGD's descent."""
    figure, axes = plt.subplots(2, 5, figsize=(8, 4.4), layout="constrained", height_ratios=(3, 2))
    path = paths(f)["LPSGD"]
    for column, step in enumerate(np.linspace(0, f.steps - 1, 5).astype(int)):
        draw_moment(axes[0, column], axes[1, column], f, path, int(step))
    figure.suptitle("Steepest descent as p → 2: sign descent first, gradient descent last")
    figure.supxlabel("grey: minus the gradient; black: the step, up to its length", fontsize=9)
    plt.close(figure)
    return figure
