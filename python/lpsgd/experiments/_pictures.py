# SPDX-License-Identifier: MIT
"""What pictures of compared methods have in common: colours, curves over epochs, final values."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ._style import styles

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Row:
    """A method's results.

    Attributes:
        lr: the best of those that were tried.
        at_edge: whether it was the first or the last of them, so may not be the best.
        values: what is measured after the last epoch, for each seed.
        history: by the name of a metric, its value after each epoch, or a list of those of the
            seeds, or None where it was not measured.
        validation: each lr that was tried, with what it came to.
    """

    name: str
    lr: float
    at_edge: bool
    values: list[float]
    history: Mapping[str, Any]
    validation: list[tuple[float, float]]

    def per_epoch(self, metric: str) -> NDArray[np.float64]:
        """A metric (epochs) or (epochs, seeds); NaN where it was not measured."""
        column = self.history[metric]
        width = max((len(x) for x in column if isinstance(x, list)), default=0)
        absent = [np.nan] * width if width else np.nan
        return np.array([absent if x is None else x for x in column], dtype=np.float64)


def spread(values: Sequence[float], digits: int) -> str:
    """Mean ± standard deviation."""
    deviation = np.std(values, ddof=1) if len(values) > 1 else 0.0
    return f"{fmean(values):.{digits}f} ± {deviation:.{digits}f}"


def draw_curves(axes: "Axes", rows: Sequence[Row], metric: str) -> list[tuple[float, str, str]]:
    """A metric over epochs: the median of the seeds and, in a band, all of them. Returns the
    ends of the lines, for `label_lines`.

    Methods of fixed p are drawn without bands, which would hide the others.
    """
    looks, ends = styles(row.name for row in rows), []
    for row in rows:
        values = row.per_epoch(metric)
        values = values if values.ndim == 2 else values[:, None]
        epochs = np.arange(1, len(values) + 1)
        measured = ~np.isnan(values).all(axis=1)
        epochs, values = epochs[measured], values[measured]
        (color, line), middle = looks[row.name], np.median(values, axis=1)
        axes.plot(epochs, middle, line, color=color, linewidth=1.8)
        ends.append((float(middle[-1]), row.name, color))
        if " p=" not in row.name:
            low, high = values.min(axis=1), values.max(axis=1)
            axes.fill_between(epochs, low, high, color=color, alpha=0.13, linewidth=0)
    axes.set(xlabel="epoch")
    axes.grid(alpha=0.3)
    return ends


def draw_values(axes: "Axes", rows: Sequence[Row], label: str, digits: int) -> None:
    """What is measured, per method: every seed as a dot, the mean as a bar, figures beside them."""
    looks = styles(row.name for row in rows)
    for place, row in enumerate(rows):
        jitter = np.linspace(-0.25, 0.25, len(row.values)) if len(row.values) > 1 else [0.0]
        color, _ = looks[row.name]
        axes.plot(row.values, place + np.array(jitter), ".", color=color, alpha=0.5, markersize=5)
        axes.plot([fmean(row.values)] * 2, [place - 0.4, place + 0.4], color=color, linewidth=3)
        axes.annotate(
            spread(row.values, digits),
            (1.03, place),
            xycoords=("axes fraction", "data"),
            va="center",
        )
    axes.set_yticks(range(len(rows)), [row.name for row in rows])
    for text, row in zip(axes.get_yticklabels(), rows, strict=False):  # shared axes have none
        text.set(color=looks[row.name][0], fontweight="bold")
    axes.set(xlabel=label)
    axes.grid(alpha=0.3)
