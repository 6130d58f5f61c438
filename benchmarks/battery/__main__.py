# SPDX-License-Identifier: MIT
"""The battery: `python -m benchmarks.battery [--small] --data DIR`; DIR is CIFAR-10 in
ImageFolder's layout.

Runs are carried out in two processes of one thread each. What is done is kept in
`benchmarks/battery/results`, a file for each task; started again, it goes on from there. `python -m
benchmarks.battery.report` makes the page of it.
"""

import argparse
import os
from pathlib import Path

from benchmarks.battery.contenders import CONTENDERS
from benchmarks.battery.plan import SMALL, Plan
from benchmarks.battery.records import RESULTS
from benchmarks.battery.runs import repeat, run
from benchmarks.battery.tasks import TASKS
from benchmarks.paper.task import Source


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
        print(f"Not the same: {job.contender}, {job.setting}: {job.run}")
    if different:
        raise SystemExit(1)
    print(f"All of {arguments.again}'s runs have ended with the same bits.")


if __name__ == "__main__":
    main()
