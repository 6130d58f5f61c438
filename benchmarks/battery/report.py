# SPDX-License-Identifier: MIT
"""The battery's page: `python -m benchmarks.battery.report` writes README.md and profile.png beside
the results, from them alone."""

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, geometric_mean
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.battery.contenders import REFERENCE, Contender, table
from benchmarks.battery.plan import HORIZONS, SMALL, Plan, found
from benchmarks.battery.problem import EPOCHS
from benchmarks.battery.records import RESULTS, all_commits, all_runs, hours, read
from benchmarks.paper.report import save
from lpsgd.experiments._style import style
from lpsgd.experiments.statistics import Floats, bootstrap, holm, paired_test

SIGNIFICANT = 0.05
TRACKS = ("tuned", "untuned")
UNITS = {"error": "error (%)", "perplexity": "perplexity", "rmse": "root mean square error"}
LENGTHS = ", ".join(f"{epochs / EPOCHS:g}" for epochs in HORIZONS)
METHOD = f"""
- **A run** lasts {EPOCHS} epochs of a task's fixed number of steps. The lr rises for a tenth of
  them and then falls to 0 along a cosine (p 6→2 may keep it constant instead). Nobody has weight
  decay. The same seed means the same initial weights and the same batches for all contenders.
- **Tuned**: each contender's eight settings (below) are tried with one seed on validation data.
  The best one runs with five other seeds, and only these runs see the test data.
- **Untuned**: one setting is chosen on four tasks, by the geometric mean of their validation
  costs, and judged with the same five seeds on the other four; both ways round.
- **Costs**: error in % (of the table: the mean of the classes' errors; at least half a mistake),
  perplexity, or root mean square error. A run that diverges, or ends worse than a network that
  has learned nothing, counts as such a network.
- **Intervals** (95 %) are the percentiles of all {5**5} resamples of the five seeds; with so few
  they are a little too narrow. **P** is of the paired t-test, corrected after Holm for the number
  of tasks.
- **Steps to AdamW's cost**: at which of the lengths {LENGTHS} (of full
  length; a ratio of about √2, each with a schedule of its own) the tuned setting first has a mean
  cost of at most AdamW's at full length, over three seeds. The lr is not tuned anew.
""".strip()


@dataclass(frozen=True)
class Track:
    """A contender's final runs on one task, at the setting chosen in one way; None: not done."""

    trial: int | None
    costs: list[float] | None

    @property
    def mean(self) -> float:
        return fmean(self.costs) if self.costs else math.nan


@dataclass(frozen=True)
class Result:
    """What a contender did on a task: `trials` has a cost for each setting, `length` is the share
    of full length at which AdamW's cost was reached; None: not done."""

    tuned: Track
    untuned: Track
    trials: list[float] | None
    length: float | None


@dataclass(frozen=True)
class Report:
    """All results: `results` by the names of task and contender, and the files' heads."""

    plan: Plan
    heads: dict[str, dict[str, Any]]
    results: dict[tuple[str, str], Result]
    runs: int
    missing: int
    hours: float

    @property
    def names(self) -> list[str]:
        return [contender.name for contender in self.plan.contenders]

    def complete(self, track: str) -> list[str]:
        """The tasks on which all contenders' final runs of a track are done."""
        return [task for task in self.heads if self.costs(track, task) is not None]

    def tracks(self, task: str | None = None) -> list[str]:
        """Those that are complete on a task, or on any."""
        done = {track: self.complete(track) for track in TRACKS}
        return [track for track in TRACKS if (task in done[track] if task else done[track])]

    def costs(self, track: str, task: str) -> dict[str, list[float]] | None:
        """All contenders' final costs on a task."""
        costs = {}
        for name in self.names:
            one: Track = getattr(self.results[task, name], track)
            if one.costs is None:
                return None
            costs[name] = one.costs
        return costs


def load(plan: Plan, directory: Path) -> Report:
    """What the directory's files say about the plan, as far as it has been carried out."""
    files = {task: directory / f"{task}.json" for task in plan.tasks}
    heads = {task: read(file) for task, file in files.items() if file.exists()}
    plan = Plan(
        *(tuple(heads), plan.contenders, plan.trials, plan.seeds, plan.horizon_seeds, plan.shrink)
    )
    runs = all_runs(heads)

    def track(choose: Callable[..., int | None], task: str, contender: Contender) -> Track:
        trial = choose(runs, task, contender)
        if trial is None:
            return Track(None, None)
        done = found(runs, plan.final(task, contender, trial))
        return Track(trial, None if done is None else [run["cost"] for run in done])

    results = {}
    for task in heads:
        for contender in plan.contenders:
            trials = found(runs, plan.tuning(task, contender))
            epochs, _ = plan.search(runs, task, contender)
            results[task, contender.name] = Result(
                track(plan.tuned, task, contender),
                track(plan.untuned, task, contender),
                None if trials is None else [trial["cost"] for trial in trials],
                None if epochs is None else epochs / EPOCHS,
            )
    wanted = {job.run.key for job in plan.wanted(runs)}
    return Report(plan, heads, results, len(runs), len(wanted - set(runs)), hours(runs))


@dataclass(frozen=True)
class Comparison:
    """A contender beside AdamW: `ratios` of mean costs by task, their geometric mean with its
    interval, and P by task."""

    ratios: dict[str, float]
    mean: float
    low: float
    high: float
    p: dict[str, float]

    def count(self, better: bool) -> int:
        """The tasks on which the cost is significantly smaller, or larger."""
        return sum(
            (self.ratios[task] < 1) == better for task, p in self.p.items() if p < SIGNIFICANT
        )


def ratio(ours: Floats, theirs: Floats) -> tuple[Floats, float, float, float]:
    """The quotients of the tasks' mean costs, their geometric mean and its interval.

    Args:
        ours, theirs: costs (tasks, seeds).
    """

    def ratios(chosen: Any) -> Floats:
        quotients: Floats = ours[:, chosen].mean(axis=1) / theirs[:, chosen].mean(axis=1)
        return quotients

    def mean(chosen: Any) -> float:
        return float(np.exp(np.log(ratios(chosen)).mean()))

    every = slice(None)
    return ratios(every), mean(every), *bootstrap(ours.shape[1], mean)


def compare(report: Report, track: str, name: str) -> Comparison:
    """A contender beside AdamW on the tasks that are complete, of which there are some."""
    tasks = report.complete(track)
    costs = [report.costs(track, task) or {} for task in tasks]
    ours = np.array([cost[name] for cost in costs])
    theirs = np.array([cost[REFERENCE] for cost in costs])
    ratios, mean, low, high = ratio(ours, theirs)
    ps = holm([paired_test(a, b) for a, b in zip(ours.tolist(), theirs.tolist(), strict=True)])
    by_task = dict(zip(tasks, ratios.tolist(), strict=True))
    return Comparison(by_task, mean, low, high, dict(zip(tasks, ps, strict=True)))


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table, of which the first row is the head."""
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def summary(report: Report) -> str:
    """Who is ahead, in sentences and in one table."""
    lines = []
    rows = [["contender", "bytes of state"]]
    for track in report.tracks():
        rows[0] += [f"{track}: cost / AdamW's", "better, worse"]
        ahead: list[str] = []
        level: list[str] = []
        behind: list[str] = []
        for name in report.names:
            one = compare(report, track, name)
            if name != REFERENCE:
                (ahead if one.high < 1 else behind if one.low > 1 else level).append(name)
        words = {"ahead of AdamW": ahead, "level with it": level, "behind it": behind}
        said = [f"{word}: {', '.join(names) or 'none'}" for word, names in words.items()]
        count = len(report.complete(track))
        lines.append(
            f"**{track.capitalize()}**, by the geometric mean of the costs on {count} "
            f"{'tasks' if count > 1 else 'task'} and its interval: {'; '.join(said)}."
        )
    rows[0] += ["steps to AdamW's cost", "at an edge"]
    for contender in report.plan.contenders:
        row = [contender.name, str(contender.bytes)]
        for track in report.tracks():
            one = compare(report, track, contender.name)
            if contender.name == REFERENCE:
                row += ["1", ""]
            else:
                row += [
                    f"{one.mean:.3f} [{one.low:.3f}, {one.high:.3f}]",
                    f"{one.count(True)}, {one.count(False)}",
                ]
        own = [report.results[task, contender.name] for task in report.heads]
        lengths = [result.length for result in own if result.length is not None]
        row.append(length_text(float(np.median(lengths))) if lengths else "")
        chosen = [result.tuned.trial for result in own if result.tuned.trial is not None]
        row.append(f"{sum(map(contender.at_edge, chosen))} of {len(chosen)}")
        rows.append(row)
    lines += [
        markdown(rows),
        "Cost / AdamW's: the geometric mean over the tasks of the quotients of mean costs, [95 % "
        "interval over seeds: other tasks would give other means]; AdamW chose its setting in the "
        "same way. Better, worse: on how many tasks "
        f"significantly (P < {SIGNIFICANT}). Steps: the median over tasks of the lengths at which "
        "AdamW's cost was reached. At an edge: tuned settings with the smallest or largest lr of "
        "the space, so that others might have been better.",
    ]
    return "\n\n".join(lines)


def choices(report: Report) -> str:
    """Which momentum and lr were chosen, on the tasks that are complete on the tuned track."""
    tasks = report.complete("tuned")
    numbers = range(report.plan.trials)
    momenta = sorted({one.betas(i)[0] for one in report.plan.contenders for i in numbers})
    listed = ", ".join(f"{momentum:g}" for momentum in momenta)
    rows = [["contender", f"tasks with a momentum (β₁) of {listed}", "lr / AdamW's"]]

    def chosen(contender: Contender) -> list[int]:
        return [report.results[task, contender.name].tuned.trial or 0 for task in tasks]

    reference = next(one for one in report.plan.contenders if one.name == REFERENCE)
    theirs = [reference.at(trial)["lr"] for trial in chosen(reference)]
    for contender in report.plan.contenders:
        trials = chosen(contender)
        betas = [contender.betas(trial)[0] for trial in trials]
        ratios = [contender.at(i)["lr"] / lr for i, lr in zip(trials, theirs, strict=True)]
        mean, low, high = geometric_mean(ratios), min(ratios), max(ratios)
        counts = ", ".join(str(betas.count(momentum)) for momentum in momenta)
        rows.append([contender.name, counts, f"{mean:.2g} ({low:.2g} to {high:.2g})"])
    return "\n\n".join(
        [
            "## What was chosen",
            "On how many tasks each momentum, and how large the lr beside AdamW's: geometric mean "
            "and range over the tasks. A momentum was tried with two lr, so that the choice of one "
            "is also a choice of the other.",
            markdown(rows),
        ]
    )


def length_text(length: float) -> str:
    """A share of full length; the longest was tried in vain if it is infinite."""
    return f"{length:g}" if math.isfinite(length) else f"> {HORIZONS[-1] / EPOCHS:g}"


def number(cost: float) -> str:
    """A cost with three digits behind the point, or as many in all."""
    return f"{cost:.3g}" if cost < 1 or cost >= 100 else f"{cost:.3f}"


def difference(ours: Track, theirs: Track) -> str:
    """The mean paired difference with its interval."""
    if ours.costs is None or theirs.costs is None:
        return ""
    gaps = np.array(ours.costs) - np.array(theirs.costs)
    low, high = bootstrap(len(gaps), lambda chosen: float(gaps[chosen].mean()))
    mean, low, high = (round(gap, 9) + 0.0 for gap in (float(gaps.mean()), low, high))
    return f"{mean:+.3g} [{low:+.3g}, {high:+.3g}]"


def task_tables(report: Report, task: str) -> str:
    """A task's final runs and its trials."""
    head = report.heads[task]
    rows = [["contender"]]
    for name in report.tracks(task):
        rows[0] += [f"{name} setting", UNITS[head["cost"]], "less AdamW's"]
        rows[0] += ["P", "steps to AdamW's cost"] if name == "tuned" else []
    trials = [["contender", *(str(i + 1) for i in range(report.plan.trials))]]
    reference = report.results[task, REFERENCE]
    for contender in report.plan.contenders:
        result = report.results[task, contender.name]
        row = [contender.name]
        for name in report.tracks(task):
            track: Track = getattr(result, name)
            edge = "*" if track.trial is not None and contender.at_edge(track.trial) else ""
            is_reference = contender.name == REFERENCE
            row += [
                "" if track.trial is None else contender.label(track.trial) + edge,
                "" if track.costs is None else number(track.mean),
                "" if is_reference else difference(track, getattr(reference, name)),
            ]
            if name == "tuned":
                p = compare(report, name, contender.name).p[task]
                row += [
                    "" if is_reference else f"{p:.2g}",
                    "" if result.length is None else length_text(result.length),
                ]
        rows.append(row)
        if result.trials is not None:
            trials.append([contender.name, *map(number, result.trials)])
    text = [f"## {head['title']}"]
    if report.tracks(task):
        text.append(markdown(rows))
    if len(trials) > 1:
        chance = number(head["chance"])
        text += [
            "Its trials, on validation data, by the number of the setting (a network that has "
            f"learned nothing: {chance}):",
            markdown(trials),
        ]
    return "\n\n".join(text)


def look(name: str) -> dict[str, Any]:
    """How a contender's line is drawn."""
    color, line = style(name)
    return {"color": color, "linestyle": line, "linewidth": 1.6, "label": name}


def draw_profile(axes: Axes, report: Report, track: str) -> None:
    """For each contender the share of its final runs whose cost is at most x times that of the best
    contender, in the mean, of that task."""
    ratios: dict[str, list[float]] = {name: [] for name in report.names}
    for task in report.complete(track):
        costs = report.costs(track, task) or {}
        best = min(map(fmean, costs.values()))
        for name, own in costs.items():
            ratios[name] += [cost / best for cost in own]
    for name, values in ratios.items():
        shares = np.arange(len(values) + 1) / max(len(values), 1)
        axes.step([0.5, *sorted(values)], shares, where="post", **look(name))
    axes.set(xlim=(0.9, 2), ylim=(0, 1), xscale="log", title=track)
    ticks = (0.9, 1, 1.2, 1.5, 2)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set(xlabel="cost / best mean cost of the task", ylabel="share of runs")
    axes.grid(alpha=0.3)


def draw_lengths(axes: Axes, report: Report) -> None:
    """For each contender the share of tasks on which it had reached AdamW's cost at each length."""
    lengths = np.array(HORIZONS) / EPOCHS
    for i, name in enumerate(report.names):
        own = [report.results[task, name].length for task in report.heads]
        done = [length for length in own if length is not None]
        shares = [sum(length <= at for length in done) / max(len(done), 1) for at in lengths]
        shift = 0.004 * (i - len(report.names) / 2)  # so that equal ones can be seen
        axes.plot(lengths, np.array(shares) + shift, marker=".", **look(name))
    axes.set(xscale="log", ylim=(-0.05, 1.05), title="steps to tuned AdamW's cost")
    axes.set_xticks(lengths, [f"{length:g}" for length in lengths])
    axes.minorticks_off()
    axes.set(xlabel="length of the run / full length", ylabel="share of tasks")
    axes.grid(alpha=0.3)


def draw(report: Report) -> Figure:
    """The profiles of the tracks and of the steps to AdamW's cost; higher is better."""
    tracks = report.tracks()
    rows, columns = (2, 2) if len(tracks) == 2 else (1, len(tracks) + 2)
    size = (4 * columns, 3.75 * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained")
    *profiles, lengths, legend = axes.flat
    for track, profile in zip(tracks, profiles, strict=True):
        draw_profile(profile, report, track)
    draw_lengths(lengths, report)
    legend.axis("off")
    handles, labels = lengths.get_legend_handles_labels()
    legend.legend(handles, labels, loc="center")
    return figure


def page(report: Report, small: bool) -> str:
    """The page in Markdown."""
    torches = sorted({head["torch"] for head in report.heads.values()})
    command = f"make battery{'-small' if small else ' DATA=DIR'}"
    state = f"{report.missing} known ones are missing" if report.missing else "none is missing"
    note = (
        f"This is the small one: {report.plan.trials} settings, {len(report.plan.seeds)} seeds and "
        f"1 / {report.plan.shrink} of the steps. It shows that the program works, no more."
    )
    lacking = [task for task in SMALL.tasks if task not in report.heads]
    parts = [
        "<!-- SPDX-License-Identifier: MIT -->\n# The battery",
        f"`{command}` made this page: {len(report.plan.contenders)} contenders on "
        f"{len(report.heads)} small tasks, {report.runs} runs of one thread, {report.hours:.1f} "
        f"hours of a processor core in all; {state}. Code and search space are of commit "
        f"{', '.join(all_commits(report.heads))}; PyTorch {', '.join(torches)}."
        + (f" Left out: {', '.join(lacking)}." if lacking else ""),
        *([note] if small else []),
        summary(report),
        "![Performance profiles, and steps to AdamW's cost](profile.png)",
        "Above: the share of a contender's final runs, over tasks and seeds, whose cost is at most "
        "x times the mean cost of the task's best contender. Higher is better.",
        "## How it is done",
        METHOD,
        "The settings that are tried: lr, then momentum or β₁ and β₂. They are numbers 1 to 8 of "
        "the trials below; * marks one with the smallest or largest lr.",
        table(report.plan.contenders),
        *([choices(report)] if report.complete("tuned") else []),
        *(task_tables(report, task) for task in report.heads),
    ]
    return "\n\n".join(parts)


def write(plan: Plan, directory: Path, small: bool = False) -> Path:
    """Writes the page and its picture; returns the page's file."""
    report = load(plan, directory)
    if not report.heads:
        raise FileNotFoundError(f"{directory} has no results")
    save(draw(report), directory / "profile.png")
    file = directory / "README.md"
    file.write_text(page(report, small) + "\n", encoding="utf-8")
    return file


def main() -> None:
    """Reports the command line's results."""
    parser = argparse.ArgumentParser(description="Make the battery's page, with its picture.")
    parser.add_argument("--results", type=Path, help="directory of the results")
    parser.add_argument("--small", action="store_true", help="of the small battery")
    arguments = parser.parse_args()
    matplotlib.use("Agg")
    default = Path("build/battery/small") if arguments.small else RESULTS
    plan = SMALL if arguments.small else Plan()
    print(f"The page is {write(plan, arguments.results or default, arguments.small)}.")


if __name__ == "__main__":
    main()
