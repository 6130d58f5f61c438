# SPDX-License-Identifier: MIT
"""Times `step()` of LPSGD and LPSGDM beside its peers: `python -m benchmarks.speed --targets`."""

import argparse
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from tqdm import tqdm

import lpsgd_ext
from benchmarks.speed import report, targets
from benchmarks.speed.step import ALL, LISTS, Make, Record, Setting, measure


def measured(
    settings: Iterable[Setting], contenders: dict[str, Make], budget: float, retries: int
) -> Iterator[Record]:
    """The records of all settings. One that others disturbed is measured again, so many times."""
    progress = tqdm(list(settings), unit="list", leave=False)
    for setting in progress:
        progress.set_description(" ".join(report.describe(setting)))
        records = []
        for _ in range(1 + retries):
            records.append(measure(setting, contenders, budget))
            if records[-1].others < 0.05:
                break
        yield min(records, key=lambda record: record.others)


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.speed", description=__doc__.splitlines()[0])
    parser.add_argument("--targets", action="store_true", help="only what the targets are about")
    parser.add_argument("--lists", nargs="+", choices=LISTS, default=list(LISTS))
    parser.add_argument("--threads", type=int, nargs="+", help="default: 1 to all")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each setting")
    parser.add_argument("--retries", type=int, default=0, help="of settings that others disturbed")
    parser.add_argument("--output", type=Path, default=Path("build/bench"), help="directory")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    threads = args.threads or range(1, len(os.sched_getaffinity(0)) + 1)
    print(f"torch {torch.__version__}, {lpsgd_ext.cpu_capability()}, {lpsgd_ext.build_info()}\n")

    settings = [
        setting
        for setting in targets.settings()
        if setting.list in args.lists and setting.threads in threads
    ]
    contenders = {name: ALL[name] for name in targets.CONTENDERS}
    records = list(measured(settings, contenders, args.seconds, args.retries))
    outcomes = list(targets.outcomes(records))
    print(report.targets_table(outcomes))
    reached = sum(one.is_reached for one in outcomes)
    narrow = sum(one.is_narrow for one in outcomes)
    print(f"{reached} of {len(outcomes)} targets are reached; {narrow} are too close to say (~).")
    for record in records:
        if record.others >= 0.05:
            setting = ", ".join(report.describe(record.setting))
            print(f"Disturbed: {setting}: other processes used {record.others:.2f} CPUs")


if __name__ == "__main__":
    main()
