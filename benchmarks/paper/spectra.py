# SPDX-License-Identifier: MIT
"""The page's part about the Hessian: the table and the picture of what `hessian` wrote."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from lpsgd.experiments._style import style

Moments = Mapping[str, Sequence[Mapping[str, Any]]]  # of each method, by epoch: hessian.Moment


def epochs_of(moments: Moments) -> list[int]:
    """Those at which all methods were looked at."""
    return [moment["epoch"] for moment in next(iter(moments.values()))]


def table(moments: Moments) -> str:
    """The largest eigenvalue and the gradient's flatness over the epochs, in Markdown."""
    epochs = ", ".join(map(str, epochs_of(moments)))
    lines = [f"| after epoch {epochs} | largest eigenvalue | flatness of the gradient |"]
    lines.append("|---|---|---|")
    for name, at in moments.items():
        series = (", ".join(f"{m[key]:.2g}" for m in at) for key in ("largest", "flatness"))
        lines.append(f"| {name} | {' | '.join(series)} |")
    return "\n".join(lines)


def draw(heading: str, moments: Moments) -> Figure:
    """Densities at the epochs, on the same axes for all methods, a row for each; below what changes
    over the epochs."""
    epochs = epochs_of(moments)
    figure = plt.figure(figsize=(8, 3 + 1.3 * len(moments)), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(1.3 * len(moments), 3))  # type: ignore[misc]
    panels = above.subplots(len(moments), len(epochs), squeeze=False, sharex=True, sharey=True)
    for line, (name, at) in zip(panels, moments.items(), strict=True):
        for axes, moment in zip(line, at, strict=True):
            density = np.maximum(moment["density"], 1e-6)
            axes.fill_between(moment["grid"], density, 1e-6, color=style(name)[0])
            axes.set(yscale="log", ylim=(1e-5, None))
            axes.tick_params(labelsize=7)
        line[0].set_ylabel(name, color=style(name)[0], fontweight="bold", fontsize=9)
    for axes, epoch in zip(panels[0], epochs, strict=True):
        axes.set_title(f"epoch {epoch}", fontsize=10)
    above.supxlabel("eigenvalue of the Hessian", fontsize=9)
    titles = {"largest": "largest eigenvalue", "flatness": "flatness of the gradient"}
    for axes, (key, title) in zip(below.subplots(1, 2), titles.items(), strict=True):
        for name, at in moments.items():
            color, dashes = style(name)
            values = [moment[key] for moment in at]
            axes.plot(epochs, values, color=color, linestyle=dashes, linewidth=1.8, marker=".")
        axes.set(ylim=(0, None), xlabel="epoch", xticks=epochs)
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.3)
    figure.suptitle(f"{heading}:\nspectral density of the Hessian")
    return figure
