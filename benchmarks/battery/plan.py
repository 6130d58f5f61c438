# SPDX-License-Identifier: MIT
"""Which runs the battery consists of, and what is decided by those that are done.

Every function of a plan looks at the results so far and nothing else, so that a battery which is
killed goes on where it was, and the report sees what the runs saw.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, NamedTuple

from benchmarks.battery.contenders import CONTENDERS, REFERENCE, TRIALS, Contender
from benchmarks.battery.problem import EPOCHS
from benchmarks.battery.tasks import TASKS, task_class
from benchmarks.paper.config import Run

TUNING_SEED = 100
HORIZONS = (10, 14, 20, 28)  # epochs: a ratio of √2, about


class Job(NamedTuple):
    """A run of the battery, and what tables call its contender and setting."""

    task: str
    contender: str
    setting: str
    run: Run


Results = Mapping[str, Mapping[str, Any]]  # what is known of a run, by its key


@dataclass(frozen=True)
class Plan:
    """The battery at full size, or smaller.

    Attributes:
        seeds: of the final runs of both tracks; the tuned one's horizons see the first of them.
        shrink: how many times fewer steps a run has.
    """

    tasks: tuple[str, ...] = tuple(TASKS)
    contenders: tuple[Contender, ...] = CONTENDERS
    trials: int = TRIALS
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    horizon_seeds: int = 3
    shrink: int = 1

    def job(
        self,
        task: str,
        contender: Contender,
        trial: int,
        seed: int,
        final: bool = True,
        epochs: int = EPOCHS,
    ) -> Job:
        """One run. It knows of its data what decides about them: the task and `shrink`."""
        problem = task_class(task)
        fields: dict[str, Any] = {
            "task": {"name": f"battery-{task}", "shrink": self.shrink, "steps": problem.steps},
            "seeds": (seed,),
            "epochs": epochs,
            "batch_size": problem.batch_size,
            "warmup": epochs / 10,
            "clip_norm": problem.clip_norm,
            "final": final,
            "evaluate_every": epochs,
        }
        run = Run(**fields, **contender.at(trial))
        return Job(task, contender.name, contender.label(trial), run)

    def halves(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The tasks of the untuned track: a setting chosen on one half is judged on the other."""
        names = tuple(TASKS)
        return (
            tuple(task for task in self.tasks if names.index(task) % 2 == 0),
            tuple(task for task in self.tasks if names.index(task) % 2 == 1),
        )

    def tuning(self, task: str, contender: Contender) -> list[Job]:
        """The trials of a contender: one for each setting, on validation data."""
        return [
            self.job(task, contender, trial, TUNING_SEED, final=False)
            for trial in range(self.trials)
        ]

    def final(self, task: str, contender: Contender, trial: int) -> list[Job]:
        """A setting's runs on the test data."""
        return [self.job(task, contender, trial, seed) for seed in self.seeds]

    def tuned(self, results: Results, task: str, contender: Contender) -> int | None:
        """The setting with the smallest cost on validation data, or of those the smallest loss;
        None while a trial is missing."""
        trials = found(results, self.tuning(task, contender))
        if trials is None:
            return None
        scores = [(trial["cost"], float(trial["loss"])) for trial in trials]
        finite = [(cost, loss if math.isfinite(loss) else math.inf) for cost, loss in scores]
        return finite.index(min(finite))

    def untuned(self, results: Results, task: str, contender: Contender) -> int | None:
        """The setting for a task that was chosen on the tasks of the other half: that with the
        smallest geometric mean of costs on validation data. (Units drop out of a comparison.)"""
        (others,) = (half for half in self.halves() if task not in half)
        means = [0.0] * self.trials
        for other in others:
            trials = found(results, self.tuning(other, contender))
            if trials is None:
                return None
            for i, trial in enumerate(trials):
                means[i] += math.log(trial["cost"])
        return means.index(min(means)) if others else None

    def at_horizon(self, task: str, contender: Contender, trial: int, epochs: int) -> list[Job]:
        """A setting's runs whose schedules end after so many epochs."""
        seeds = self.seeds[: self.horizon_seeds]
        return [self.job(task, contender, trial, seed, epochs=epochs) for seed in seeds]

    def search(
        self, results: Results, task: str, contender: Contender
    ) -> tuple[float | None, list[Job]]:
        """The shortest horizon at which a contender's mean cost is at most that of AdamW at full
        length (infinite if it is none of them), and the runs that are needed to say more: None
        while there are such.

        The horizons are looked at from full length on, shorter ones while the target is reached,
        or else longer ones.
        """
        reference = next(c for c in self.contenders if c.name == REFERENCE)
        target = self._mean_at(results, task, reference, EPOCHS)
        full = self._mean_at(results, task, contender, EPOCHS)
        if target is None or full is None:
            return None, []
        start = HORIZONS.index(EPOCHS)
        shorter, longer = HORIZONS[:start][::-1], HORIZONS[start + 1 :]
        best = EPOCHS if full <= target else math.inf
        for epochs in shorter if full <= target else longer:
            mean = self._mean_at(results, task, contender, epochs)
            if mean is None:
                trial = self.tuned(results, task, contender)
                assert trial is not None
                return None, self.at_horizon(task, contender, trial, epochs)
            if mean <= target:
                best = epochs
            if (mean <= target) != (full <= target):
                break
        return best, []

    def _mean_at(
        self, results: Results, task: str, contender: Contender, epochs: int
    ) -> float | None:
        trial = self.tuned(results, task, contender)
        if trial is None:
            return None
        runs = found(results, self.at_horizon(task, contender, trial, epochs))
        return None if runs is None else fmean(run["cost"] for run in runs)

    def wanted(self, results: Results) -> list[Job]:
        """The runs that are known to be needed, what matters most first: trials, final runs, those
        of the untuned track, horizons. More follow when these are done."""
        pairs = [(task, contender) for task in self.tasks for contender in self.contenders]
        jobs: list[Job] = []
        for pair in pairs:
            jobs += self.tuning(*pair)
        for choose in (self.tuned, self.untuned):
            for pair in pairs:
                trial = choose(results, *pair)
                if trial is not None:
                    jobs += self.final(*pair, trial)
        for pair in pairs:
            jobs += self.search(results, *pair)[1]
        return list({job.run.key: job for job in jobs}.values())

    def seconds(self) -> float:
        """What all runs take in one thread, about: most chosen settings are different on the two
        tracks, and of the horizons that a contender is tried at there are one or two."""
        each = self.trials + 1.8 * len(self.seeds) + 1.2 * self.horizon_seeds
        return (
            sum(task_class(task).seconds for task in self.tasks)
            * len(self.contenders)
            * each
            / self.shrink
        )


SMALL = Plan(trials=2, seeds=(0, 1), horizon_seeds=1, shrink=16)


def found(results: Results, jobs: Iterable[Job]) -> list[Mapping[str, Any]] | None:
    """What is known of these runs; None if one is missing."""
    entries = [results.get(job.run.key) for job in jobs]
    return None if None in entries else [entry for entry in entries if entry is not None]


def seconds_of(job: Job, shrink: int) -> float:
    """What a run takes in one thread, about."""
    return task_class(job.task).seconds * job.run.epochs / EPOCHS / shrink


def missing(results: Results, jobs: Sequence[Job]) -> Iterator[Job]:
    """Those that are not done."""
    return (job for job in jobs if job.run.key not in results)
