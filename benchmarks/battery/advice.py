# SPDX-License-Identifier: MIT
"""Tries the guide's advice where nothing is tuned for LPSGDM: `python -m benchmarks.battery.advice
--data DIR`, 70 minutes in two processes.

On each task of the battery, AdamW's tuned run is repeated with LPSGDM in its place and AdamW's lr,
or a fixed part of it, and then with one thing changed. What AdamW itself loses by the same change
stands beside it. Writes results/advice: a file for each task, and README.md with the tables.
"""

import argparse
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.battery.contenders import CONTENDERS, REFERENCE
from benchmarks.battery.plan import Job, Plan, Results, seconds_of
from benchmarks.battery.records import RESULTS, all_commits, all_runs, hours, read
from benchmarks.battery.report import Report, load, markdown, ratio
from benchmarks.battery.runs import run
from benchmarks.battery.tasks import TASKS
from benchmarks.paper.config import Run
from benchmarks.paper.task import Source

Change = Callable[[Run], Run]


def times(factor: float) -> Change:
    """Another lr."""
    return lambda run: replace(run, lr=run.lr * factor)


def setting(**changed: Any) -> Change:
    """Other arguments of the optimizer."""
    return lambda run: replace(run, settings={**run.settings, **changed})


def long_warmup(run: Run) -> Run:
    """A warm-up of 30 % of the run, where the battery has 10 %."""
    return replace(run, warmup=0.3 * run.epochs)


def after(first: Change, second: Change) -> Change:
    """Both."""
    return lambda run: second(first(run))


def lpsgdm(p: float, factor: float = 1.0) -> Change:
    """LPSGDM in the place of AdamW, at so many times its lr. A step takes as much of each weight
    away: lr · weight_decay stays."""

    def change(run: Run) -> Run:
        decay = run.settings["weight_decay"] / factor
        settings = {"p": p, "momentum": 0.8, "weight_decay": decay}
        return replace(times(factor)(run), optimizer="LPSGDM", settings=settings)

    return change


# A start, and what is changed of it: AdamW's run before LPSGDM takes its place, or LPSGDM's own.
STARTS: Mapping[str, Change] = {
    "p = ∞, a third of AdamW's lr": lpsgdm(math.inf, 1 / 3),
    "p = 11, two thirds of AdamW's lr": lpsgdm(11.0, 2 / 3),
    "p = 6, AdamW's lr": lpsgdm(6.0),
}
SHARED: Mapping[str, Change] = {
    "a third of the lr": times(1 / 3),
    "three times the lr": times(3.0),
    "warm-up of 30 %": long_warmup,
    "weight decay (AdamW's: 0.1)": setting(weight_decay=0.1),
}
BYTE = setting(momentum_dtype="float8_e5m2")
OWN: Mapping[str, Change] = {
    "momentum 0.6": setting(momentum=0.6),
    "momentum 0.9": setting(momentum=0.9),
    "momentum in one byte": BYTE,
    "one byte, warm-up of 30 %": after(BYTE, long_warmup),
}
AS_IT_IS = "as it is"


def variants() -> Iterator[tuple[str, str, Change]]:
    """What becomes of AdamW's tuned run, by the names of the start and of the change."""
    for start, convert in STARTS.items():
        yield start, AS_IT_IS, convert
        for name, change in SHARED.items():
            yield start, name, after(change, convert)
        for name, change in OWN.items():
            yield start, name, after(convert, change)
    for name, change in SHARED.items():
        yield REFERENCE, name, change


@dataclass(frozen=True, kw_only=True)
class Advice(Plan):
    """The runs, of which all are known from the start.

    Attributes:
        battery: what the battery has found: AdamW's settings and costs.
    """

    battery: Report

    def wanted(self, results: Results) -> list[Job]:
        """All runs, seed by seed, so that what is done first can be read first."""
        (adamw,) = (one for one in CONTENDERS if one.name == REFERENCE)
        jobs = []
        for seed in self.seeds:
            for task in self.tasks:
                trial = self.battery.results[task, REFERENCE].tuned.trial
                if trial is None:
                    raise ValueError(f"{REFERENCE} has not been tuned on {task}")
                theirs = self.job(task, adamw, trial, seed).run
                jobs += [
                    Job(task, start, name, change(theirs)) for start, name, change in variants()
                ]
        return jobs

    def seconds(self) -> float:
        return sum(seconds_of(job, self.shrink) for job in self.wanted({}))


def page(plan: Advice, directory: Path) -> str:
    """The tables in Markdown."""
    heads = {task: read(directory / f"{task}.json") for task in plan.tasks}
    runs = all_runs(heads)
    costs: dict[tuple[str, str], dict[str, list[float]]] = {}
    for job in plan.wanted({}):
        by_task = costs.setdefault((job.contender, job.setting), {})
        by_task.setdefault(job.task, []).append(runs[job.run.key]["cost"])
    theirs = np.array([plan.battery.results[task, REFERENCE].tuned.costs for task in plan.tasks])
    rows = [["start", "change", "all", *plan.tasks]]
    for start, name, _ in variants():
        own = np.array([costs[start, name][task] for task in plan.tasks])
        ratios, mean, low, high = ratio(own, theirs)
        cells = [f"{mean:.3f} [{low:.3f}, {high:.3f}]", *(f"{one:.2f}" for one in ratios)]
        rows.append(["" if any(row[0] == start for row in rows) else start, name, *cells])
    return "\n\n".join(
        [
            "<!-- SPDX-License-Identifier: MIT -->\n# The advice, tried",
            f"`python -m benchmarks.battery.advice --data DIR` made this table: {len(runs)} runs "
            f"of one thread, {hours(runs):.1f} hours of a processor core, at commit "
            f"{', '.join(all_commits(heads))}.",
            "Cost / that of tuned AdamW: the geometric mean over the tasks with its 95 % interval "
            f"over {len(plan.seeds)} paired seeds, and by task.",
            markdown(rows),
        ]
    )


def main() -> None:
    """Carries out what is missing and writes the page."""
    parser = argparse.ArgumentParser(description="Try the guide's advice on the battery's tasks.")
    parser.add_argument("--data", type=Path, help="CIFAR-10 in ImageFolder layout: train, test")
    parser.add_argument("--results", type=Path, default=RESULTS / "advice", help="directory")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    arguments = parser.parse_args()
    plan = Advice(tuple(TASKS), battery=load(Plan(), RESULTS))
    run(plan, arguments.results, Source(arguments.data, Path("build/battery/data")), arguments.jobs)
    file = arguments.results / "README.md"
    file.write_text(page(plan, arguments.results) + "\n", encoding="utf-8")
    print(f"The page is {file}.")


if __name__ == "__main__":
    main()
