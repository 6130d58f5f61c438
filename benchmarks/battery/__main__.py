# SPDX-License-Identifier: MIT
"""The battery: `python -m benchmarks.battery [--small] --data DIR`; DIR is CIFAR-10 in
ImageFolder's layout.

Runs are carried out in two processes of one thread each. What is done is kept in
`benchmarks/battery/results`, a file for each task; started again, it goes on from there. `python -m
benchmarks.battery.report` makes the page of it.
"""

import argparse
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.battery.contenders import CONTENDERS
from benchmarks.battery.plan import Job, Plan, missing, seconds_of
from benchmarks.battery.problem import Problem
from benchmarks.battery.records import TaskFile, commit, entry_of
from benchmarks.battery.tasks import TASKS, task_class
from benchmarks.paper.records import jsonable
from benchmarks.paper.sweep import one_thread
from benchmarks.paper.task import Source
from benchmarks.paper.training import Machine, Trainer

RESULTS = Path(__file__).parent / "results"
SMALL = Plan(trials=2, seeds=(0, 1), horizon_seeds=1, shrink=16)


@lru_cache(maxsize=4)
def problem_of(task: str, final: bool, source: Source, shrink: int) -> Problem:
    """A task, whose data are made once for many runs."""
    return task_class(task)(final, source, shrink)


def train(job: Job, source: Source, shrink: int) -> dict[str, Any]:
    """Carries out a run; returns what is kept of it."""
    problem = problem_of(job.task, job.run.final, source, shrink)
    start = time.process_time()
    history = Trainer(job.run, problem, machine=Machine(source)).train()
    return entry_of(problem, history, time.process_time() - start)


def carry_out(
    jobs: Sequence[Job], source: Source, shrink: int, processes: int
) -> Iterator[tuple[Job, dict[str, Any]]]:
    """The runs and what is kept of them, as they come."""
    if processes == 1:
        with one_thread():
            for job in jobs:
                yield job, train(job, source, shrink)
        return
    context = get_context("spawn")
    with ProcessPoolExecutor(processes, context, torch.set_num_threads, (1,)) as executor:
        futures = {executor.submit(train, job, source, shrink): job for job in jobs}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            executor.shutdown(cancel_futures=True)


def read_files(
    plan: Plan, directory: Path, source: Source
) -> tuple[dict[str, TaskFile], dict[str, dict[str, Any]]]:
    """The directory's files by task, and what is known of all runs."""
    files = {
        task: TaskFile(
            directory / f"{task}.json", task, problem_of(task, True, source, plan.shrink)
        )
        for task in plan.tasks
    }
    return files, {key: entry for file in files.values() for key, entry in file.runs.items()}


def run(plan: Plan, directory: Path, source: Source, processes: int) -> None:
    """Carries out all of the plan that is not in the directory's files yet."""
    now = commit()
    files, results = read_files(plan, directory, source)
    wanted = plan.wanted(results)
    done = sum(seconds_of(job, plan.shrink) for job in wanted if job.run.key in results)
    total = max(plan.seconds(), done)
    form = "{percentage:3.0f} %|{bar}| {elapsed}, {remaining} left: {desc}"
    with tqdm(total=total, initial=done, bar_format=form, smoothing=0.0) as bar:
        while jobs := list(missing(results, wanted)):
            for job, entry in carry_out(jobs, source, plan.shrink, processes):
                files[job.task].add(job, entry, now)
                results[job.run.key] = files[job.task].runs[job.run.key]
                what = f"run {len(results)}, {job.task}, {job.contender.name}"
                bar.set_description_str(what, refresh=False)
                bar.update(seconds_of(job, plan.shrink))
            wanted = plan.wanted(results)
        bar.total = bar.n  # horizons that did not need to be tried


def repeat(plan: Plan, task: str, directory: Path, source: Source, processes: int) -> list[Job]:
    """Carries out a task's known runs once more, changes nothing, and returns those that did not
    end with the same bits."""
    _, results = read_files(plan, directory, source)
    jobs = [job for job in plan.wanted(results) if job.task == task and job.run.key in results]
    different = []
    with tqdm(total=len(jobs), unit="run", smoothing=0.0) as bar:
        for job, entry in carry_out(jobs, source, plan.shrink, processes):
            old = results[job.run.key]
            measured = [name for name in entry if name != "seconds"]
            if jsonable([entry[name] for name in measured]) != [old[name] for name in measured]:
                different.append(job)
            bar.update()
    return different


def main() -> None:
    """Carries out the command line's battery."""
    parser = argparse.ArgumentParser(description="Compare optimizers on eight tasks.")
    parser.add_argument("--small", action="store_true", help="in minutes: to see that it works")
    parser.add_argument("--data", type=Path, help="CIFAR-10 in ImageFolder layout: train, test")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, help="some of the tasks alone")
    parser.add_argument(
        "--again", choices=TASKS, help="carry out a task's runs once more and compare the bits"
    )
    parser.add_argument("--results", type=Path, help="directory of the results")
    parser.add_argument("--output", type=Path, default=Path("build/battery"), help="other files")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="processes")
    arguments = parser.parse_args()
    tasks = tuple(arguments.tasks or TASKS)
    if arguments.data is None and "cifar" in tasks:
        tasks = tuple(task for task in tasks if task != "cifar")
        print("CIFAR-10 is left out: --data (make: DATA) does not say where it is.")
    default = SMALL if arguments.small else Plan()
    plan = Plan(
        *(tasks, CONTENDERS, default.trials, default.seeds),
        *(default.horizon_seeds, default.shrink),
    )
    results = arguments.results or (arguments.output / "small" if arguments.small else RESULTS)
    source = Source(arguments.data, arguments.output / "data")
    if arguments.again is None:
        run(plan, results, source, arguments.jobs)
        print(f"The results are in {results}.")
        return
    different = repeat(plan, arguments.again, results, source, arguments.jobs)
    for job in different:
        print(f"Not the same: {job.contender.name}, {job.contender.label(job.trial)}: {job.run}")
    if different:
        raise SystemExit(1)
    print(f"All of {arguments.again}'s runs have ended with the same bits.")


if __name__ == "__main__":
    main()
