# SPDX-License-Identifier: MIT
"""A fair comparison as one command: `python -m benchmarks.paper.sweep CONFIG [--small]`.

1. Every method is trained at each lr of its grid. The grids of a study are equally long. The best
   is that of the highest mean accuracy on validation data after the last epoch (ties: of the lowest
   loss), or of the lowest loss if the study says so.
2. It is trained again there from other seeds. Only these runs see the test data.

Killed and started again, it goes on where it was. A run that another study has had is not repeated.
The result is RESULTS/CONFIG.json, of which `report` makes tables and pictures.
"""

import argparse
import math
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.paper.config import Method, Run, Study, load
from benchmarks.paper.records import dumps, rounded, write_whole
from benchmarks.paper.task import Task
from benchmarks.paper.tasks import make_task, task_class
from benchmarks.paper.train import add_machine_arguments, machine_of
from benchmarks.paper.training import Machine, Metrics, Trainer, read_result

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Trained:
    """What several runs of a method at one lr have measured; lists have an entry for each seed.

    Attributes:
        history: per epoch the metrics, of which those that are not per seed are means.
    """

    lr: float
    history: list[Metrics]

    @property
    def accuracy(self) -> list[float]:
        """After the last epoch, on the data held out."""
        return self._last("accuracy")

    @property
    def held_out_loss(self) -> list[float]:
        """After the last epoch, on the data held out."""
        return self._last("held_out_loss")

    def _last(self, name: str) -> list[float]:
        values: list[float] = self.history[-1][name]
        return values

    def score(self, measure: str) -> tuple[float, ...]:
        """Larger is better: the mean accuracy, then the mean loss; or the loss alone."""
        loss = fmean(self.held_out_loss)
        minus_loss = -loss if math.isfinite(loss) else -math.inf
        return (minus_loss,) if measure == "loss" else (fmean(self.accuracy), minus_loss)


@dataclass(frozen=True)
class Result:
    """A method's search for lr, and its final runs at the best one."""

    method: Method
    tuning: list[Trained]
    final: Trained

    @property
    def at_edge(self) -> bool:
        """Whether the best lr is the grid's first or last, so may not be the best."""
        lrs = self.method.lrs
        return len(lrs) > 1 and self.final.lr in (lrs[0], lrs[-1])


def merge(histories: Sequence[list[Metrics]]) -> list[Metrics]:
    """The histories of runs that differ in their seeds, as one. A run that ended early, because it
    diverged, stays at its last epoch."""
    if len(histories) == 1:
        return histories[0]
    merged: list[Metrics] = []
    for epoch in range(max(map(len, histories))):
        rows = [history[min(epoch, len(history) - 1)] for history in histories]
        merged.append(
            {
                name: [x for row in rows for x in row[name]]
                if isinstance(value, list)
                else fmean(row[name] for row in rows)
                for name, value in rows[0].items()
                if all(name in row for row in rows)
            }
        )
    return merged


def train_one(run: Run, runs: Path, machine: Machine) -> list[Metrics]:
    """The metrics of a run, from its file if it has been finished."""
    directory = runs / run.key
    finished = read_result(directory)
    return Trainer(run, None, directory, machine).train() if finished is None else finished


class Pool:
    """Trains runs in `jobs` processes of one thread each, with one progress bar over all epochs.

    Two such processes on two cores are faster than one process of two threads.
    """

    def __init__(self, runs: Path, machine: Machine, jobs: int, bar: Any) -> None:
        self.runs, self.machine, self.jobs, self.bar = runs, machine, jobs, bar
        self.before = 0  # epochs of the runs of earlier calls
        self.finished: set[str] = set()

    def epochs_done(self, run: Run) -> int:
        """How many epochs of a run its files know."""
        directory = self.runs / run.key
        if run.key in self.finished or (directory / "result.json").exists():
            self.finished.add(run.key)
            return run.epochs
        log = directory / "metrics.jsonl"
        return log.read_bytes().count(b"\n") if log.exists() else 0

    def show(self, runs: Sequence[Run]) -> None:
        """Moves the bar."""
        self.bar.update(self.before + sum(map(self.epochs_done, runs)) - self.bar.n)

    def map(self, runs: Sequence[Run]) -> Iterator[list[Metrics]]:
        """The metrics of each run, in order."""
        if self.jobs == 1:
            for run in runs:
                yield train_one(run, self.runs, self.machine)
                self.show(runs)
            return
        context = get_context("spawn")
        with ProcessPoolExecutor(self.jobs, context, torch.set_num_threads, (1,)) as executor:
            waiting = [executor.submit(train_one, run, self.runs, self.machine) for run in runs]
            try:
                while wait(waiting, 1.0, FIRST_EXCEPTION).not_done:
                    self.show(runs)
                    for future in waiting:
                        if future.done():
                            future.result()  # raises what it raised
                yield from (future.result() for future in waiting)
            finally:
                executor.shutdown(cancel_futures=True)

    def train(self, groups: Sequence[Sequence[Run]], what: str) -> list[Trained]:
        """Trains all runs; those of a group differ in their seeds."""
        runs = [run for group in groups for run in group]
        self.bar.set_description(what)
        self.show(runs)
        if self.before == 0:
            self.bar.initial = self.bar.n  # the remaining time is judged by what is done now
        histories = self.map(runs)
        trained = [
            Trained(group[0].lr, merge([next(histories) for _ in group])) for group in groups
        ]
        self.show(runs)
        self.before += sum(run.epochs for run in runs)
        return trained


def runs_of(method: Method, lr: float, seeds: Sequence[int], final: bool) -> list[Run]:
    """The runs of a method with these seeds: one for all if its task can do that."""
    stackable = task_class(method.run.task["name"]).stackable
    groups = [tuple(seeds)] if stackable else [(seed,) for seed in seeds]
    return [method.at(lr, group, final) for group in groups]


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread within."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def sweep(study: Study, output: Path, machine: Machine, jobs: int) -> list[Result]:
    """Carries out the study. What lies in `output` already is not trained again."""
    trials = [
        runs_of(method, lr, study.tuning_seeds, final=False)
        for method in study.methods
        for lr in method.lrs
    ]
    finals = [runs_of(method, method.lrs[0], study.seeds, final=True) for method in study.methods]
    for task in {dumps(group[0].task): group[0].task for group in finals}.values():
        make_task(task, True, machine.source)  # so that data are downloaded and decoded only once
    total = sum(run.epochs for group in trials + finals for run in group)
    with one_thread(), tqdm(total=total, unit="epoch", smoothing=0.05) as bar:
        pool = Pool(machine.source.runs(output), machine, jobs, bar)
        tuned = iter(pool.train(trials, "learning rates"))
        searches = [[next(tuned) for _ in method.lrs] for method in study.methods]
        best = [
            max(search, key=lambda trained: trained.score(study.measure)).lr for search in searches
        ]
        finals = [
            runs_of(method, lr, study.seeds, final=True)
            for method, lr in zip(study.methods, best, strict=True)
        ]
        trained = pool.train(finals, "final runs")
    return [
        Result(method, search, final)
        for method, search, final in zip(study.methods, searches, trained, strict=True)
    ]


def record(study: Study, results: Sequence[Result], task: Task) -> dict[str, Any]:
    """What is kept of a study, fit for JSON: all settings, and figures with four digits."""
    return {
        "study": study.name,
        "title": study.title,
        "data": task.describe(),
        "fingerprint": task.fingerprint(),
        "measure": study.measure,
        "reference": study.reference,
        "figures": study.figures,
        "tuning_seeds": study.tuning_seeds,
        "seeds": study.seeds,
        "torch": torch.__version__,
        "results": [
            {
                "method": result.method.name,
                "run": {**asdict(result.method.run), "lr": result.final.lr},
                "lr_at_grid_edge": result.at_edge,
                "validation": [
                    {
                        "lr": one.lr,
                        "accuracy": rounded(one.accuracy),
                        "loss": rounded(one.held_out_loss),
                    }
                    for one in result.tuning
                ],
                "test_accuracy": result.final.accuracy,
                "test_loss": rounded(result.final.held_out_loss),
                "history": columns(result.final.history),
            }
            for result in results
        ],
    }


def columns(history: Sequence[Metrics]) -> dict[str, list[Any]]:
    """A history by metric; None where an epoch lacks it."""
    names = dict.fromkeys(name for metrics in history for name in metrics)
    return {name: [rounded(metrics.get(name)) for metrics in history] for name in names}


def run_study(study: Study, output: Path, results: Path, machine: Machine, jobs: int) -> Path:
    """Carries out the study and writes its result; returns the file."""
    trained = sweep(study, output, machine, jobs)
    task = make_task(study.methods[0].run.task, True, machine.source)
    text = dumps(record(study, trained, task), indent=1)
    results.mkdir(parents=True, exist_ok=True)
    file = results / f"{study.name}.json"
    write_whole(file, lambda part: part.write_text(text, encoding="utf-8"))
    return file


def results_directory(arguments: argparse.Namespace) -> Path:
    """Where results go: unless told otherwise, those that are published beside this file."""
    small: Path = arguments.output / "small"
    return arguments.results or (small if arguments.small else RESULTS)


def main() -> None:
    """Carries out the command line's study."""
    parser = argparse.ArgumentParser(description="Compare optimizers fairly.")
    add_machine_arguments(parser)
    parser.add_argument("--small", action="store_true", help="the reduced version of the study")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="processes")
    parser.add_argument("--results", type=Path, help="directory; benchmarks/paper/results")
    arguments = parser.parse_args()
    study = load(arguments.config, arguments.small)
    results, machine = results_directory(arguments), machine_of(arguments)
    file = run_study(study, arguments.output, results, machine, arguments.jobs)
    print(f"The result is in {file}.")


if __name__ == "__main__":
    main()
