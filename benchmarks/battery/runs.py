# SPDX-License-Identifier: MIT
"""Carries out a plan's runs, in this process or in several, and keeps their results.

(It is not `__main__`, since a new process cannot find functions of a package's `__main__`.)
"""

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.battery.plan import Job, Plan, missing, seconds_of
from benchmarks.battery.problem import Problem
from benchmarks.battery.records import TaskFile, commit, entry_of
from benchmarks.battery.tasks import task_class
from benchmarks.paper.records import jsonable
from benchmarks.paper.sweep import one_thread
from benchmarks.paper.task import Source
from benchmarks.paper.training import Machine, Trainer


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
                what = f"run {len(results)}, {job.task}, {job.contender}"
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
