# SPDX-License-Identifier: MIT
"""What `digits.study` measured, as a table, a picture and JSON."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from statistics import fmean, pstdev
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.paper.digits import LAYERS, LR_SCHEDULES, METHODS, Result, Settings, Study

CAVEAT = (
    "The p-schedule is also a learning-rate decay: as p falls to 2, the update falls from about 1 "
    "to about |m|.\nWith a constant learning rate it thus has a decay that the others lack; with a "
    "cosine one for all, its advantage goes."
)

# Colours that colour-blind readers can tell apart (Okabe & Ito).
COLORS = {
    "SGD": "#E69F00",
    "SGDM": "#D55E00",
    "AdamW": "#0072B2",
    "LPSGD 6→2": "#56B4E9",
    "LPSGDM 6→2": "#009E73",
    "LPSGDM p=6": "#CC79A7",
    "LPSGDM p=∞": "#000000",
}
FIXED_P = ("LPSGDM p=6", "LPSGDM p=∞")


def by_method(study: Study, lr_schedule: str) -> dict[str, Result]:
    """The results under one learning-rate schedule."""
    return {
        result.final.trial.method: result
        for result in study.results
        if result.final.trial.lr_schedule == lr_schedule
    }


def percent(accuracies: Sequence[float]) -> list[float]:
    return [100 * accuracy for accuracy in accuracies]


def table(study: Study, settings: Settings) -> str:
    """One table per learning-rate schedule, the warnings and what to think of it all, as text."""
    seeds = len(settings.seeds)
    lines = [
        "Digits, multilayer perceptron " + "-".join(map(str, LAYERS)) + ", no normalisation, "
        f"{settings.epochs} epochs, batch {settings.batch_size}.",
        f"Test accuracy and training loss after the last epoch: mean ± std of {seeds} seeds. "
        f"Learning rates from a grid of {len(settings.lr_grid)},",
        f"the same for all, by validation accuracy over {len(settings.tuning_seeds)} other seeds. "
        "Seconds: the final run, all seeds together, one thread.",
    ]
    warnings = []
    for lr_schedule in LR_SCHEDULES:
        lines += [
            "",
            f"{lr_schedule + ' learning rate':<24}{'lr':>7}  {'test accuracy %':>15}"
            f"{'worst':>7}{'training loss':>16}{'seconds':>9}",
        ]
        for name, result in by_method(study, lr_schedule).items():
            run = result.final
            accuracy = percent(run.held_out_accuracy)
            lines.append(
                f"{name:<24}{run.trial.lr:>7g}  {fmean(accuracy):>8.1f} ± {pstdev(accuracy):<4.1f}"
                f"{min(accuracy):>7.1f}{fmean(run.train_loss):>16.4f}{run.seconds:>9.2f}"
            )
            if result.at_edge:
                warnings.append(
                    f"Warning: {name} with a {lr_schedule} learning rate is best at the grid's "
                    f"edge, lr = {run.trial.lr:g}."
                )
    return "\n".join([*lines, "", *warnings, CAVEAT])


def draw_losses(axes: Axes, results: dict[str, Result]) -> None:
    """Training loss over epochs: the mean over seeds and, in a band, all of them.

    The variants at fixed p are drawn without bands, which would hide the others.
    """
    for name, result in results.items():
        losses = np.array(result.final.epoch_losses)
        epochs = np.arange(1, len(losses) + 1)
        fixed = name in FIXED_P
        axes.plot(
            epochs,
            losses.mean(axis=1),
            ":" if fixed else "-",
            color=COLORS[name],
            linewidth=1.5 if fixed else 2,
        )
        if not fixed:
            low, high = losses.min(axis=1), losses.max(axis=1)
            axes.fill_between(epochs, low, high, color=COLORS[name], alpha=0.13, linewidth=0)
    axes.set(xlabel="epoch", yscale="log")


def draw_accuracies(axes: Axes, results: dict[str, Result]) -> None:
    """Test accuracy per method: every seed as a dot, the mean as a bar, the figures beside them."""
    for row, (name, result) in enumerate(results.items()):
        accuracy = percent(result.final.held_out_accuracy)
        jitter = np.linspace(-0.25, 0.25, len(accuracy))
        axes.plot(accuracy, row + jitter, ".", color=COLORS[name], alpha=0.5, markersize=5)
        axes.plot([fmean(accuracy)] * 2, [row - 0.4, row + 0.4], color=COLORS[name], linewidth=3)
        axes.annotate(
            f"{fmean(accuracy):.1f} ± {pstdev(accuracy):.1f}",
            (1.03, row),
            xycoords=("axes fraction", "data"),
            va="center",
        )
    axes.set(xlabel="test accuracy (%)", xlim=(0, 100))


def draw_step_sizes(axes: Axes, results: dict[str, Result]) -> None:
    """How far one step moves a parameter on average, over epochs."""
    for name, result in results.items():
        sizes = result.final.step_sizes
        style = ":" if name in FIXED_P else "-"
        axes.plot(range(1, len(sizes) + 1), sizes, style, color=COLORS[name], linewidth=1.5)
    axes.set(xlabel="epoch", yscale="log")


def draw_p(axes: Axes, results: dict[str, Result]) -> None:
    """p over epochs, for the methods whose p is finite; the two on the schedule coincide."""
    for name, style in (("LPSGDM p=6", ":"), ("LPSGDM 6→2", "-"), ("LPSGD 6→2", "--")):
        p = results[name].final.p
        axes.plot(range(1, len(p) + 1), p, style, color=COLORS[name], linewidth=2)
    axes.set(xlabel="epoch", ylabel="p", ylim=(1.8, 6.2))


def draw(study: Study, settings: Settings) -> Figure:
    """The picture: losses, accuracies, and what the schedules do to the steps.

    The method names beside the accuracies are the legend of all panels.
    """
    constant, cosine = (by_method(study, lr_schedule) for lr_schedule in LR_SCHEDULES)
    figure = plt.figure(figsize=(8, 9), layout="constrained")
    rows: Any = figure.subfigures(3, 1, height_ratios=(4, 3.2, 2.8))
    top, middle, bottom = rows

    axes = top.subplots(1, 2, sharey=True)
    draw_losses(axes[0], constant)
    draw_losses(axes[1], cosine)
    axes[0].set_ylabel("training loss (nats)")
    axes[0].set_title("constant learning rate")
    axes[1].set_title("cosine learning rate")

    axes = middle.subplots(1, 2, sharey=True)
    draw_accuracies(axes[0], constant)
    draw_accuracies(axes[1], cosine)
    axes[0].set_yticks(range(len(constant)), list(constant))
    axes[0].invert_yaxis()
    for label, name in zip(axes[0].get_yticklabels(), constant, strict=True):
        label.set(color=COLORS[name], fontweight="bold")

    axes = bottom.subplots(1, 3)
    draw_step_sizes(axes[0], constant)
    draw_step_sizes(axes[1], cosine)
    draw_p(axes[2], constant)
    axes[0].sharey(axes[1])
    axes[0].set_ylabel("mean |Δθ| per step")
    axes[0].set_title("constant lr", fontsize=10)
    axes[1].set_title("cosine lr", fontsize=10)
    axes[2].set_title("both", fontsize=10)

    for panel in figure.get_axes():
        panel.grid(alpha=0.3)
    figure.suptitle(
        "Handwritten digits, six hidden layers of 64 without normalisation:\n"
        f"mean and range of {len(settings.seeds)} seeds, learning rates tuned on validation data"
    )
    figure.supxlabel(CAVEAT, fontsize=9)
    return figure


def jsonable(value: Any) -> Any:
    """The value with tuples as lists and the floats that JSON lacks as strings."""
    if isinstance(value, dict):
        return {key: jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def record(study: Study, settings: Settings) -> dict[str, Any]:
    """All settings and figures, fit for `json.dump`."""
    record: dict[str, Any] = jsonable(
        {
            "settings": asdict(settings),
            "layers": LAYERS,
            "methods": list(METHODS),
            "training_seconds": study.seconds,
            "results": [
                {
                    "method": result.final.trial.method,
                    "lr_schedule": result.final.trial.lr_schedule,
                    "lr": result.final.trial.lr,
                    "lr_at_grid_edge": result.at_edge,
                    "validation": [
                        {"lr": run.trial.lr, "accuracy": run.held_out_accuracy}
                        for run in result.tuning
                    ],
                    "test_accuracy": result.final.held_out_accuracy,
                    "test_loss": result.final.held_out_loss,
                    "training_loss": result.final.train_loss,
                    "epoch_losses": result.final.epoch_losses,
                    "p": result.final.p,
                    "step_sizes": result.final.step_sizes,
                    "seconds": result.final.seconds,
                }
                for result in study.results
            ],
        }
    )
    return record
