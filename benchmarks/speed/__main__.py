# SPDX-License-Identifier: MIT
"""Times `step()` of LPSGD and LPSGDM beside its peers, and writes tables and pictures.

    python -m benchmarks.speed                  # everything
    python -m benchmarks.speed --parts targets  # what the targets are about: two minutes

docs/speed.md says how it is measured and how to read it.
"""

import argparse
import json
import os
import platform
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import lpsgd_ext
from benchmarks.speed import footprint, report, targets, training
from benchmarks.speed.step import ALL, CONTENDERS, LISTS, shapes_of
from benchmarks.speed.timing import DISTURBED, Record, Setting, cache_sizes, measure

Plan = dict[Setting, Sequence[str]]  # the contenders in each setting

OPTIMIZERS = ("LPSGDM p=2", "LPSGDM p=4", "SGD fused", "AdamW fused", "eager LPSGDM", "memory")
COMPILED = "eager LPSGDM compiled"
PARTS = ("C step", "C step of lists", "C checks of lists")


def plan_targets(threads: list[int]) -> Plan:
    return dict.fromkeys(targets.settings(), targets.CONTENDERS)


def plan_lists(threads: list[int]) -> Plan:
    """Everybody; torch.compile only where it takes less than ten seconds."""
    names = [name for name in ALL if name not in (COMPILED, *PARTS)]
    return {
        Setting(name, threads=n): [*names, *[COMPILED] * (len(shapes_of(name)) <= 62)]
        for name in LISTS
        for n in {*threads[:2], threads[-1]}
    }


def plan_parts(threads: list[int]) -> Plan:
    """Where the kernel is short; 161 tensors has ResNet-50."""
    lists = ("62 x 1", "161 x 1", "1000 x 64", "64k")
    return {Setting(name, caches="warm"): ("LPSGDM p=4", *PARTS) for name in lists}


def plan_dtypes(threads: list[int]) -> Plan:
    names = [name for name in (*CONTENDERS, "memory") if name != "eager LPSGDM for-loop"]
    return {
        Setting(name, dtype, threads[-1]): names
        for name in ("ResNet-50", "64k", "16M", "64M")
        for dtype in ("bfloat16", "float16", "float64")
    }


def plan_caches(threads: list[int]) -> Plan:
    return {
        Setting(name, threads=n, caches=caches): (*OPTIMIZERS, "SGD foreach")
        for name in ("ResNet-18", "1000 x 64", "62 x 1", "64k", "1M")
        for n in {threads[0], threads[-1]}
        for caches in ("cold", "warm")
    }


def plan_sizes(threads: list[int]) -> Plan:
    return {
        Setting(f"1 x {factor * 10**power}", threads=n, caches="warm"): OPTIMIZERS
        for power in range(9)
        for factor in (1, 3)
        for n in {threads[0], threads[-1]}
        if factor * 10**power <= 10**8
    }


def plan_tensors(threads: list[int]) -> Plan:
    return {
        Setting(f"{10**power} x 64", threads=n): (*OPTIMIZERS[:-1], "SGD foreach")
        for power in range(6)
        for n in {threads[0], threads[-1]}
    }


def plan_threads(threads: list[int]) -> Plan:
    return {
        Setting(name, threads=n): OPTIMIZERS
        for name in ("64k", "ResNet-50", "64M")
        for n in threads
    }


def plan_huge(threads: list[int]) -> Plan:
    """10^9 elements: 11 GB."""
    return {Setting(f"1 x {10**9}", "bfloat16", threads[-1]): ("LPSGDM p=4", "SGD fused")}


PLANS: dict[str, Callable[[list[int]], Plan]] = {
    "lists": plan_lists,
    "parts": plan_parts,
    "dtypes": plan_dtypes,
    "caches": plan_caches,
    "sizes": plan_sizes,
    "tensors": plan_tensors,
    "threads": plan_threads,
    "targets": plan_targets,
    "huge": plan_huge,
}
OTHER_PARTS = ("training", "memory", "package")


def machine() -> dict[str, Any]:
    """What a reader of the figures has to know."""
    cpu = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return {
        "cpu": cpu[1] if cpu else platform.machine(),
        "cpus": len(os.sched_getaffinity(0)),
        "caches": cache_sizes(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lpsgd": lpsgd_ext.build_info(),
        "instructions": lpsgd_ext.cpu_capability(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="benchmarks.speed",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parts = (*PLANS, *OTHER_PARTS)
    parser.add_argument(
        "--parts", nargs="+", choices=parts, help="default: all but huge", metavar="PART"
    )
    parser.add_argument("--lists", nargs="+", help='of those: names, or for example "10 x 1000"')
    parser.add_argument("--threads", type=int, nargs="+", help="default: 1, 2, 4 up to all CPUs")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each setting, at least")
    parser.add_argument("--retries", type=int, default=0, help="of settings that others disturbed")
    parser.add_argument("--quick", action="store_true", help="small lists, hardly any rounds")
    parser.add_argument("--output", type=Path, default=Path("build/bench"), help="directory")
    parser.add_argument("--from", dest="source", type=Path, help="only report this bench.json")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    if args.source:
        results = report.Results.from_json(json.loads(args.source.read_text()))
    else:
        results = measure_all(args)
        text = json.dumps(asdict(results))
        (args.output / "bench.json").write_text(text)
    text = report.write(results)
    (args.output / "bench.md").write_text(text)
    report.draw(results, args.output)
    print(text)


def measure_all(args: argparse.Namespace) -> report.Results:
    """What the command line asks for."""
    parts = args.parts or [name for name in (*PLANS, *OTHER_PARTS) if name != "huge"]
    cpus = len(os.sched_getaffinity(0))
    threads = args.threads or sorted({1 << i for i in range(cpus.bit_length())} | {cpus})
    rounds = (2, 2) if args.quick else (7, 300)
    plan: dict[Setting, dict[str, None]] = {}
    for part in parts:
        for setting, names in PLANS[part](threads).items() if part in PLANS else ():
            if (
                setting.threads in threads
                and (not args.lists or setting.list in args.lists)
                and (not args.quick or setting.elements < 10**5)
            ):
                plan.setdefault(setting, {}).update(dict.fromkeys(names))
    results = report.Results(machine(), [], [], [], {}, [])
    progress = tqdm(plan.items(), unit="setting", leave=False)
    for setting, names in progress:
        progress.set_description(" ".join(report.describe(setting)))
        makes = {name: ALL[name] for name in names if not (args.quick and name == COMPILED)}
        tries: list[Record] = []
        while not tries or (tries[-1].others >= DISTURBED and len(tries) <= args.retries):
            tries.append(measure(setting, makes, args.seconds, rounds))
        results.records.append(min(tries, key=lambda one: one.others))
    if "training" in parts:
        optimizers = {name: CONTENDERS[name] for name in training.CONTENDERS}
        for task, n in tqdm(
            [*product(training.TASKS, {threads[0], threads[0 if args.quick else -1]})], leave=False
        ):
            results.training.extend(training.train(task, optimizers, n, 1 if args.quick else 10))
    if "memory" in parts:
        results.memory.extend(footprint.memory("1M" if args.quick else "ResNet-50"))
        width = 256 if args.quick else 2048
        results.states.extend(footprint.states(width, others=not args.quick))
    if "package" in parts:
        results.package.update(footprint.package(1 if args.quick else 5))
    return results


if __name__ == "__main__":
    main()
