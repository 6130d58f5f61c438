# SPDX-License-Identifier: MIT
"""Tables and pictures of studies: `python -m benchmarks.paper.report RESULT.json ...`.

Writes a page, README.md beside the first result, with a table for each study and its pictures, of
which the study's configuration says what they are (see FIGURES).
"""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from benchmarks.paper import spectra
from lpsgd.experiments import _pictures as pictures
from lpsgd.experiments._pictures import draw_curves, draw_values, spread
from lpsgd.experiments._style import label_lines, style
from lpsgd.experiments.statistics import welch

CAVEAT = (
    "The p-schedule is also a learning-rate decay: as p falls to 2, the update falls from about 1 "
    "to about |m|.\nWith a constant learning rate it thus has a decay that the others lack; with a "
    "cosine one it has two."
)


@dataclass(frozen=True)
class Row(pictures.Row):
    """A method's results; accuracies in %, losses in nats."""

    lr_schedule: str
    settings: dict[str, Any]


@dataclass(frozen=True)
class Report:
    """A study's result file."""

    name: str
    title: str
    data: str
    measure: str
    reference: str | None
    seeds: int
    figures: Mapping[str, Mapping[str, Any]]
    rows: list[Row]

    def only(
        self, methods: Sequence[str] | None = None, lr_schedule: str | None = None
    ) -> "Report":
        """The report with these rows alone, in the order of the study."""
        rows = [
            row
            for row in self.rows
            if methods is None or row.name in methods
            if lr_schedule is None or row.lr_schedule == lr_schedule
        ]
        return replace(self, rows=rows)

    def by_lr_schedule(self) -> dict[str, list[Row]]:
        """The rows under each lr schedule."""
        schedules = dict.fromkeys(row.lr_schedule for row in self.rows)
        return {schedule: self.only(lr_schedule=schedule).rows for schedule in schedules}

    @property
    def heading(self) -> str:
        """What was trained on what, and for how long."""
        epochs = max(len(row.history["loss"]) for row in self.rows)
        return f"{self.data}; {self.title}; {epochs} epochs"

    @property
    def label(self) -> str:
        """What the values are."""
        return "test accuracy (%)" if self.measure == "accuracy" else "test loss (nats)"

    @property
    def digits(self) -> int:
        """How many of them to print."""
        return 1 if self.measure == "accuracy" else 3


def read(file: Path) -> Report:
    """The result that `sweep` wrote."""
    record = json.loads(file.read_text(encoding="utf-8"))
    measure = record["measure"]
    scale = 100.0 if measure == "accuracy" else 1.0
    rows = [
        Row(
            result["method"],
            result["run"]["lr"],
            result["lr_at_grid_edge"],
            [scale * float(value) for value in result[f"test_{measure}"]],
            result["history"],
            [(one["lr"], scale * fmean(map(float, one[measure]))) for one in result["validation"]],
            result["run"]["lr_schedule"],
            result["run"]["settings"],
        )
        for result in record["results"]
    ]
    return Report(
        record["study"],
        record["title"],
        record["data"],
        measure,
        record["reference"],
        len(record["seeds"]),
        record["figures"],
        rows,
    )


def table(report: Report) -> str:
    """The final runs in Markdown, one table for each lr schedule."""
    lines = [f"{report.heading}. Mean ± standard deviation of {report.seeds} seeds."]
    for lr_schedule, rows in report.by_lr_schedule().items():
        reference = next((row for row in rows if row.name == report.reference), None)
        against = f" P against {reference.name} |" if reference else ""
        lines += [
            "",
            f"| {lr_schedule} lr | lr | {report.label} |{against} training loss |",
            "|---|---|---|" + ("---|" if reference else "") + "---|",
        ]
        for row in rows:
            edge = "*" if row.at_edge else ""
            cells = [row.name, f"{row.lr:.3g}{edge}", spread(row.values, report.digits)]
            if reference:
                cells.append(
                    "" if row is reference else f"{welch(row.values, reference.values):.2g}"
                )
            cells.append(f"{np.nanmean(row.per_epoch('loss')[-1]):.3g}")
            lines.append("| " + " | ".join(cells) + " |")
    if any(row.at_edge for row in report.rows):
        lines += ["", "\\* at the edge of its grid, so perhaps not the best."]
    return "\n".join(lines)


def draw_headline(report: Report) -> Figure:
    """The training loss, one panel per lr schedule; what rises above the start is cut off."""
    columns = report.by_lr_schedule()
    figure, axes = plt.subplots(
        1, len(columns), figsize=(8, 3.4), layout="constrained", squeeze=False, sharey=True
    )
    ends = [draw_curves(*pair, "loss") for pair in zip(axes[0], columns.values(), strict=True)]
    for panel, schedule in zip(axes[0], columns, strict=True):
        panel.set(yscale="log", title=f"{schedule} learning rate")
    start = max(row.per_epoch("loss")[0].max() for row in report.rows)
    axes[0, 0].set(ylabel="training loss (nats)", ylim=(None, 1.5 * start))
    for panel, names in zip(axes[0], ends, strict=True):
        label_lines(panel, names)
    figure.suptitle(f"{report.heading}:\nmedian and range of {report.seeds} seeds", fontsize=11)
    return figure


def draw_overview(report: Report) -> Figure:
    """Losses, final values, and what the schedules do to the steps: one column per lr schedule.

    The method names beside the values are the legend of all panels.
    """
    columns = report.by_lr_schedule()
    figure = plt.figure(figsize=(8, 9), layout="constrained")
    parts: Any = figure.subfigures(3, 1, height_ratios=(4, 3.2, 2.8))
    count = len(columns)
    loss_panels = parts[0].subplots(1, count, sharey=True, squeeze=False)[0]
    value_panels = parts[1].subplots(1, count, sharex=True, sharey=True, squeeze=False)[0]
    *step_panels, p_panel = parts[2].subplots(1, count + 1)
    for i, (schedule, column) in enumerate(columns.items()):
        draw_curves(loss_panels[i], column, "loss")
        loss_panels[i].set(yscale="log", title=f"{schedule} learning rate")
        draw_values(value_panels[i], column, report.label, report.digits)
        if i:
            step_panels[i].sharey(step_panels[0])
        draw_curves(step_panels[i], column, "update")
        step_panels[i].set(yscale="log")
        step_panels[i].set_title(f"{schedule} lr", fontsize=10)
    value_panels[0].invert_yaxis()
    loss_panels[0].set_ylabel("training loss (nats)")
    step_panels[0].set_ylabel("mean |Δθ| per step")
    with_p = [row for row in next(iter(columns.values())) if np.isfinite(row.per_epoch("p")).all()]
    draw_curves(p_panel, [row for row in with_p if row.name.startswith("LP")], "p")
    p_panel.set(ylabel="p")
    figure.suptitle(
        f"{report.heading}:\nmedian and range of {report.seeds} seeds, learning rates tuned on "
        "validation data"
    )
    figure.supxlabel(CAVEAT, fontsize=9)
    return figure


def draw_steps(report: Report) -> Figure:
    """What a schedule of lr and one of p do to the steps, and what comes of it: one column per lr
    schedule."""
    columns = report.by_lr_schedule()
    figure, axes = plt.subplots(
        3, len(columns), figsize=(8, 8), layout="constrained", squeeze=False, sharey="row"
    )
    for (above, middle, below), (schedule, column) in zip(axes.T, columns.items(), strict=True):
        draw_curves(above, column, "u")
        draw_curves(middle, column, "update")
        if below is not axes[2, 0]:
            below.sharex(axes[2, 0])
        draw_values(below, column, report.label, report.digits)
        above.set(yscale="log", title=f"{schedule} learning rate", xlabel="")
        middle.set(yscale="log")
    axes[0, 0].set_ylabel("mean |u|")
    axes[1, 0].set_ylabel("mean |Δθ| per step")
    axes[2, 0].invert_yaxis()
    figure.suptitle(f"{report.heading}:\nas p goes to 2, |u| falls from about 1 to about |m|")
    return figure


def draw_p_max(report: Report) -> Figure:
    """The final values over the p that the schedule starts at."""
    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    annealed = [row for row in report.rows if row.name.endswith("→2")]
    annealed.sort(key=lambda row: float(row.settings["p"]))
    x, color = np.arange(len(annealed)), style("LPSGDM 6→2")[0]
    for place, row in zip(x, annealed, strict=True):
        axes.plot([place] * len(row.values), row.values, ".", color=color, alpha=0.6)
    axes.plot(x, [fmean(row.values) for row in annealed], color=color, linewidth=2)
    axes.set_xticks(x, [f"{float(row.settings['p']):g}" for row in annealed])
    others = [row for row in report.rows if row not in annealed]
    for row in others:
        own, line = style(row.name)
        axes.axhline(fmean(row.values), color=own, linestyle=line)
    axes.set(xlabel="p_max of LPSGDM p_max→2", ylabel=report.label, title=report.heading)
    axes.grid(alpha=0.3)
    label_lines(axes, [(fmean(row.values), row.name, style(row.name)[0]) for row in others])
    return figure


def best_pivot(rows: Sequence[Row]) -> float:
    """The pivot with which the best lr of every fixed p are as equal as can be.

    A step at p with lr and pivot is the step with pivot 1 and lr · pivot^(-1 / (p - 1)). So if lr*
    is the best one at pivot 1, log lr* is a line over 1 / (p - 1), of slope -log pivot.
    """
    lrs = [row.lr for row in rows]
    slope, _ = np.polyfit([1 / (float(row.settings["p"]) - 1) for row in rows], np.log(lrs), 1)
    return float(np.exp(-slope))


def draw_pivot(report: Report) -> Figure:
    """Whether one lr serves every fixed p, at pivot 1 and at the best one; the schedule beside."""
    rows = report.rows
    fixed = [row for row in rows if " p=" in row.name]
    pivot = best_pivot(fixed)
    figure = plt.figure(figsize=(8, 6.5), layout="constrained")
    above, below = figure.subfigures(2, 1)  # type: ignore[misc]
    panels = above.subplots(1, 2, sharey=True)
    for axes, kappa in zip(panels, (1.0, pivot), strict=True):
        for row in fixed:
            lrs, values = np.array(row.validation).T
            exponent = 1 / (float(row.settings["p"]) - 1)
            color, line = style(row.name)
            axes.plot(lrs * kappa**exponent, values, line, marker=".", color=color)
        axes.set(xscale="log", xlabel="lr", title=f"pivot {kappa:.2g}")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel(report.label.replace("test", "validation"))
    draw_values(axes := below.subplots(), rows, report.label, report.digits)
    axes.invert_yaxis()
    (sign,) = (row for row in fixed if float(row.settings["p"]) == float("inf"))
    figure.suptitle(
        f"{report.heading}:\nfixed p on lr grids, with pivot 1 and with the pivot that joins their "
        "best lr\n(root mean square of m after one epoch at p=∞: "
        f"{sign.per_epoch('m_rms')[0]:.2g}); final runs of fixed p and of the schedule",
        fontsize=11,
    )
    return figure


FIGURES: dict[str, Callable[[Report], Figure]] = {
    "headline": draw_headline,
    "overview": draw_overview,
    "steps": draw_steps,
    "p_max": draw_p_max,
    "pivot": draw_pivot,
}


def save(figure: Figure, file: Path) -> None:
    """Writes a PNG of 100 dots per inch with a palette, which makes it a third as large."""
    figure.savefig(file, dpi=100)
    plt.close(figure)
    with Image.open(file) as image:
        image.convert("RGB").quantize(256).save(file, optimize=True)


def draw(report: Report, directory: Path) -> list[Path]:
    """Writes the study's pictures."""
    files = []
    for name, figure in report.figures.items():
        files.append(directory / f"{name}.png")
        shown = report.only(figure.get("methods"), figure.get("lr_schedule"))
        save(FIGURES[figure["kind"]](shown), files[-1])
    return files


def section(file: Path, directory: Path) -> str:
    """A study's part of the page: what made it, its table and its pictures, which it writes."""
    report = read(file)
    program = f"python -m benchmarks.paper.{{}} {report.name}"
    parts = [
        f"## {report.name}",
        f"`{program.format('sweep')}` made [{file.name}]({file.name}).",
        table(report),
        *(f"![{report.title}]({picture.name})" for picture in draw(report, directory)),
    ]
    hessian = file.parent / "hessian" / file.name
    if hessian.exists():
        moments = json.loads(hessian.read_text(encoding="utf-8"))
        save(spectra.draw(report.heading, moments), hessian.with_suffix(".png"))
        parts += [
            f"`{program.format('hessian')}` made [hessian/{file.name}](hessian/{file.name}).",
            spectra.table(moments),
            f"![Spectral density of the Hessian](hessian/{file.stem}.png)",
        ]
    return "\n\n".join(parts)


def main() -> None:
    """Reports the command line's results."""
    parser = argparse.ArgumentParser(description="Make the page of results, with its pictures.")
    parser.add_argument("results", type=Path, nargs="+", help="files that sweep wrote")
    arguments = parser.parse_args()
    matplotlib.use("Agg")
    directory = arguments.results[0].parent
    head = "<!-- SPDX-License-Identifier: MIT -->\n# Results\n\n"
    head += "`python -m benchmarks.paper.report` made this page of the files that it names."
    page = "\n\n".join([head, *(section(file, directory) for file in arguments.results)])
    (directory / "README.md").write_text(page + "\n", encoding="utf-8")
    print(page)


if __name__ == "__main__":
    main()
