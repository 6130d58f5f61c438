# SPDX-License-Identifier: MIT
"""Whether training suffers from momentum in fewer bytes.

    python -m benchmarks.paper.momentum_dtype momentum-dtype-digits ...  # trains, then reports
    python -m benchmarks.paper.momentum_dtype                            # reports what is there

A study is a configuration whose methods differ in p, momentum and momentum_dtype, with one lr for
each p. Runs of the same seed begin with the same weights and see the same batches, so that the
differences to float32 are taken seed by seed. Killed and started again, it goes on where it was. It
writes RESULTS/STUDY.json, and RESULTS/momentum-dtype.png of all studies that are there.
"""

import argparse
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tqdm import tqdm

from benchmarks.paper.config import Study, load
from benchmarks.paper.records import dumps, rounded, write_whole
from benchmarks.paper.report import save
from benchmarks.paper.sweep import RESULTS, Pool, one_thread, runs_of
from benchmarks.paper.tasks import make_task
from benchmarks.paper.train import add_machine_arguments, machine_of
from benchmarks.paper.training import Machine
from lpsgd.experiments.statistics import Difference, difference

REFERENCE = "float32"
BYTES = {"bfloat16": ("two bytes", "#E69F00"), "float8_e5m2": ("one byte", "#0072B2")}


@dataclass(frozen=True)
class Setting:
    """A p and a momentum. `values` are, for each momentum_dtype, those of every seed."""

    p: str
    momentum: float
    values: dict[str, list[float]]

    def against_reference(self, momentum_dtype: str) -> Difference:
        return difference(self.values[momentum_dtype], self.values[REFERENCE])


@dataclass(frozen=True)
class Outcome:
    """A study's settings. What they measure is the smaller, the better."""

    data: str
    title: str
    measure: str
    settings: list[Setting]

    @property
    def label(self) -> str:
        return "test error, %" if self.measure == "accuracy" else "test loss, nats"

    @property
    def digits(self) -> int:
        return 2 if self.measure == "accuracy" else 3

    @property
    def common(self) -> list[Setting]:
        """Those without a fixed p of 2, with which some seeds hardly train and others do."""
        return [setting for setting in self.settings if setting.p != "2"]

    def means(self) -> list[Setting]:
        """For each momentum, and over all, the mean of each seed over the common settings, where
        these are several."""
        common = self.common if len(self.common) > 1 else []
        momenta = sorted({setting.momentum for setting in common})
        means = []
        groups = [[one] for one in momenta]
        for chosen in [*groups, momenta] if len(groups) > 1 else groups:
            rows = [setting.values for setting in common if setting.momentum in chosen]
            values = {
                name: [fmean(seed) for seed in zip(*(row[name] for row in rows), strict=True)]
                for name in (REFERENCE, *BYTES)
            }
            momentum = chosen[0] if len(chosen) == 1 else math.nan
            means.append(Setting("all > 2", momentum, values))
        return means


def carry_out(study: Study, output: Path, results: Path, machine: Machine, jobs: int) -> None:
    """Trains what has not been trained and writes the result."""
    task = make_task(study.methods[0].run.task, True, machine.source)  # downloads and decodes once
    groups = [runs_of(method, method.lrs[0], study.seeds, final=True) for method in study.methods]
    total = sum(run.epochs for group in groups for run in group)
    with one_thread(), tqdm(total=total, unit="epoch", smoothing=0.05, mininterval=1.0) as bar:
        pool = Pool(machine.source.runs(output), machine, jobs, bar)
        trained = pool.train(groups, study.name)
    rows = []
    for method, one in zip(study.methods, trained, strict=True):
        run = method.run
        values = (
            [100.0 * (1.0 - accuracy) for accuracy in one.accuracy]
            if study.measure == "accuracy"
            else one.held_out_loss
        )
        rows.append(
            {
                "p": "6→2" if run.anneal_p else f"{run.settings['p']:g}".replace("inf", "∞"),
                "momentum": run.settings["momentum"],
                "momentum_dtype": run.settings["momentum_dtype"],
                "lr": run.lr,
                "values": rounded(values),
            }
        )
    record = {
        "data": task.describe(),
        "title": study.title,
        "measure": study.measure,
        "fingerprint": task.fingerprint(),
        "torch": torch.__version__,
        "seeds": study.seeds,
        "epochs": study.methods[0].run.epochs,
        "rows": rows,
    }
    results.mkdir(parents=True, exist_ok=True)
    text = dumps(record, indent=1)
    write_whole(results / f"{study.name}.json", lambda part: part.write_text(text, "utf-8"))


def read(file: Path) -> Outcome:
    """What `carry_out` wrote."""
    record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    settings = []
    for (p, momentum), rows in groupby(record["rows"], lambda row: (row["p"], row["momentum"])):
        values = {row["momentum_dtype"]: list(map(float, row["values"])) for row in rows}
        settings.append(Setting(p, momentum, values))
    return Outcome(record["data"], record["title"], record["measure"], settings)


def table(outcome: Outcome) -> str:
    """A study's settings in Markdown, and the means over them."""
    digits = outcome.digits
    seeds = len(outcome.settings[0].values[REFERENCE])
    head = [f"float32: {outcome.label}", *(f"{label} minus that" for label, _ in BYTES.values())]
    lines = [
        f"{outcome.data}; {outcome.title}; {seeds} seeds",
        "",
        f"| p | momentum | {' | '.join(head)} |",
        "|---|---|---|---|---|",
    ]
    for setting in (*outcome.settings, *outcome.means()):
        own = setting.values[REFERENCE]
        cells = [
            setting.p,
            "all" if math.isnan(setting.momentum) else f"{setting.momentum:g}",
            f"{fmean(own):.{digits}f} ± {stdev(own):.{digits}f}",
            *(setting.against_reference(name).text(digits) for name in BYTES),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw_differences(axes: Axes, outcome: Outcome, places: dict[tuple[str, float], int]) -> None:
    """A study's differences with their intervals, one above the other at the settings' places."""
    axes.axvline(0.0, color="0.4", linewidth=1)
    first_column = axes.get_subplotspec().is_first_col()  # type: ignore[union-attr]
    for side, (name, (label, color)) in zip((1, -1), BYTES.items(), strict=True):
        for setting in outcome.settings:
            found = setting.against_reference(name)
            y = places[setting.p, setting.momentum] + 0.17 * side
            axes.errorbar(found.mean, y, xerr=found.margin, fmt="o", color=color, markersize=4)
            if first_column and setting is outcome.common[0]:
                axes.annotate(
                    label,
                    (0.98, y + 0.1 * side),
                    xycoords=("axes fraction", "data"),
                    ha="right",
                    va="center",
                    color=color,
                    fontweight="bold",
                )
    axes.set_title(f"{outcome.data.replace(', ', chr(10))}\n{outcome.title}", fontsize=10)
    axes.set(xlabel=f"{outcome.label}, minus float32's")
    axes.grid(axis="x", alpha=0.3)


def draw(outcomes: Sequence[Outcome]) -> Figure:
    """A column for each study; those of one measure have one scale."""
    settings = dict.fromkeys((s.p, s.momentum) for one in outcomes for s in one.settings)
    order = sorted(settings, key=lambda s: (["2", "6", "11", "∞", "6→2"].index(s[0]), s[1]))
    places = {setting: -i for i, setting in enumerate(order)}
    figure = Figure(figsize=(10, 1.4 + 0.33 * len(order)), layout="constrained")
    columns = figure.subplots(1, len(outcomes), sharey=True, squeeze=False)[0]
    first: dict[str, Axes] = {}
    for axes, outcome in zip(columns, outcomes, strict=True):
        draw_differences(axes, outcome, places)
        if outcome.measure in first:
            axes.sharex(first[outcome.measure])
        first.setdefault(outcome.measure, axes)
    for measure, axes in first.items():  # intervals of p = 2 may be so long that they are cut
        shown = [s for one in outcomes if one.measure == measure for s in one.common]
        found = [setting.against_reference(name) for setting in shown for name in BYTES]
        limit = 1.1 * max(abs(one.mean) + one.margin for one in found)
        axes.set_xlim(-limit, limit)
    labels = [f"p {'' if '→' in p else '= '}{p}, β = {momentum:g}" for p, momentum in order]
    columns[0].set_yticks(list(places.values()), labels)
    figure.suptitle(
        "Momentum in one and two bytes against float32: to the right of 0 is worse.\n"
        "Mean of paired seeds with its 95 % interval"
    )
    return figure


def report(results: Path) -> None:
    """Prints the tables of all studies and draws them."""
    outcomes = [read(file) for file in sorted(results.glob("*.json"), reverse=True)]
    print("\n\n".join(map(table, outcomes)))
    save(draw(outcomes), results / "momentum-dtype.png")


def main() -> None:
    """Trains and reports what the command line asks for."""
    parser = argparse.ArgumentParser(description="Compare the dtypes of momentum.")
    add_machine_arguments(parser, configs="*")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="processes")
    parser.add_argument("--results", type=Path, default=RESULTS / "momentum-dtype")
    arguments = parser.parse_args()
    matplotlib.use("Agg")
    machine = machine_of(arguments)
    for config in arguments.config:
        carry_out(load(config), arguments.output, arguments.results, machine, arguments.jobs)
    report(arguments.results)


if __name__ == "__main__":
    main()
