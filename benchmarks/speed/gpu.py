# SPDX-License-Identifier: MIT
"""Checks LPSGD and LPSGDM on a GPU against the CPU, then measures them beside PyTorch's optimizers.

The checks are those of `gpu_checks`. Two times are measured for every candidate, round by round in
turn. The device's is that between two CUDA events around a step that was queued while the device
was kept busy, so that nothing in it waits for the host; the cache is overwritten before. The
bandwidth is that of the bytes that the algorithm has to move, as a fraction of what a copy of as
many bytes reaches in the same round. The host's time is how long the call of `step()` takes.

    python -m benchmarks.speed.gpu --output build/gpu

The exit status is 1 if a check failed and 2 without a GPU.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from math import inf
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn import Parameter
from torch.optim import AdamW, Optimizer
from tqdm import tqdm

import lpsgd_ext
from benchmarks.speed import step
from benchmarks.speed.gpu_checks import (
    CHECKS,
    CUDA_CHECKS,
    NOT_UNDER_SANITIZER,
    kernels_load,
    run_checks,
)
from lpsgd import LPSGD, LPSGDM

Call = Callable[[], object]
Stopwatch = Callable[[Call], tuple[float, float]]  # seconds of the host and of the device


LISTS: dict[str, step.Shapes] = {
    **{name: step.LISTS[name] for name in ("ResNet-18", "ResNet-50", "ViT-B/16", "GPT-2")},
    **{name: step.LISTS[name] for name in ("1000 x 64", "64k", "1M", "16M")},
    "256M": [(1 << 28,)],
}
QUICK_LISTS = ("ResNet-50", "1000 x 64", "16M")
DTYPES = (torch.float32, torch.bfloat16)


class Candidate(NamedTuple):
    """An optimizer, and how often a step has to read or write an element of a list of its."""

    accesses: int  # of the parameter, its gradient and what the state holds
    make: Callable[[list[Parameter]], Optimizer]


CANDIDATES = {
    **{
        f"LPSGD p={p:g}": Candidate(3, partial(LPSGD, p=p, weight_decay=1e-2, fused=True))
        for p in (2.0, 4.0, inf)
    },
    **{
        f"LPSGDM p={p:g}": Candidate(5, partial(LPSGDM, p=p, weight_decay=1e-2, fused=True))
        for p in (2.0, 4.0, inf)
    },
    "SGD fused": Candidate(5, step.CONTENDERS["SGD fused"]),
    "SGD foreach": Candidate(5, step.CONTENDERS["SGD foreach"]),
    "AdamW fused": Candidate(7, step.CONTENDERS["AdamW fused"]),
    "AdamW foreach": Candidate(7, partial(AdamW, lr=1e-3, foreach=True)),
    "eager LPSGDM": Candidate(5, step.CONTENDERS["eager LPSGDM"]),
}


class CudaStopwatch:
    """Times calls that queue work on the current stream. `late` counts the device's times that hold
    some waiting for the host."""

    def __init__(self, device: torch.device) -> None:
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        self.flush = torch.empty(4 * cache, dtype=torch.uint8, device=device)
        self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.late = 0
        self.cycles_per_second = 1e9
        for _ in range(2):  # the first is a warm-up
            cycles = 10_000_000
            self.start.record()
            torch.cuda._sleep(cycles)
            self.end.record()
            torch.cuda.synchronize()
            self.cycles_per_second = cycles / (self.start.elapsed_time(self.end) * 1e-3)

    def __call__(self, call: Call) -> tuple[float, float]:
        torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        host = time.perf_counter() - begin
        busy = 2 * host + 1e-4
        for _ in range(3):  # a host that was slow this time gets another try
            self.flush.zero_()
            torch.cuda._sleep(int(busy * self.cycles_per_second))
            self.start.record()
            call()
            self.end.record()
            in_time = not self.start.query()
            torch.cuda.synchronize()
            if in_time:
                break
            busy *= 2
        else:
            self.late += 1
        return host, self.start.elapsed_time(self.end) * 1e-3


def make_copy(size: int, device: torch.device) -> Call:
    """A copy that reads half of so many bytes and writes the other half."""
    source, target = (torch.ones(size // 2, dtype=torch.uint8, device=device) for _ in range(2))
    return partial(target.copy_, source)


def measure(
    shapes: step.Shapes,
    dtype: torch.dtype,
    rounds: int,
    device: torch.device,
    stopwatch: Stopwatch,
) -> dict[str, dict[str, Any]]:
    """For each candidate, and for copies of as many bytes: bytes, and seconds round by round."""
    torch.manual_seed(0)
    params = [Parameter(torch.randn(shape, dtype=dtype, device=device)) for shape in shapes]
    grads = [torch.randn_like(param) * 1e-2 for param in params]
    elements = sum(param.numel() for param in params)
    calls: dict[str, Call] = {}
    measured: dict[str, dict[str, Any]] = {}
    for name, candidate in CANDIDATES.items():
        size = elements * dtype.itemsize * candidate.accesses
        copy = f"copy of {candidate.accesses}"
        calls[copy] = calls.get(copy) or make_copy(size, device)
        calls[name] = candidate.make(params).step
        for which in (copy, name):
            measured[which] = {"bytes": size, "copy": copy, "host": [], "device": []}
    for round_ in range(rounds + 2):
        for name, call in calls.items():
            for param, grad in zip(params, grads, strict=True):
                param.grad = grad.detach()  # a new tensor, as a backward pass makes one
            host, on_device = stopwatch(call)
            if round_ >= 2:
                measured[name]["host"].append(host)
                measured[name]["device"].append(on_device)
    for own in measured.values():
        pairs = zip(measured[own["copy"]]["device"], own["device"], strict=True)
        own["fraction_of_copy"] = statistics.median(copy / seconds for copy, seconds in pairs)
    return measured


def table(records: list[dict[str, Any]], title: str, cell: Callable[[dict[str, Any]], str]) -> str:
    """A row for each record, a column for each candidate."""
    lines = [f"{title}\n", f"| list | dtype | copy, GB/s | {' | '.join(CANDIDATES)} |"]
    lines.append("|---" * (3 + len(CANDIDATES)) + "|")
    for record in records:
        measured = record["measured"]
        copy = measured["copy of 5"]
        bandwidth = copy["bytes"] / statistics.median(copy["device"]) * 1e-9
        cells = " | ".join(cell(measured[name]) for name in CANDIDATES)
        lines.append(f"| {record['list']} | {record['dtype']} | {bandwidth:.0f} | {cells} |")
    return "\n".join(lines) + "\n"


def tables(records: list[dict[str, Any]]) -> str:
    def on_device(one: dict[str, Any]) -> str:
        return f"{statistics.median(one['device']) * 1e6:.1f} ({one['fraction_of_copy']:.2f})"

    def on_host(one: dict[str, Any]) -> str:
        return f"{statistics.median(one['host']) * 1e6:.0f}"

    times = "Device time of a step in µs (bandwidth as a fraction of a copy's):"
    return "\n".join(
        [table(records, times, on_device), table(records, "Host time of a step in µs:", on_host)]
    )


def describe(device: torch.device) -> dict[str, Any]:
    """What a reader of the figures has to know of the machine."""
    properties = torch.cuda.get_device_properties(device)
    described: dict[str, Any] = {
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "lpsgd": lpsgd_ext.build_info(),
    }
    if shutil.which("nvidia-smi"):
        query = ["driver_version", "power.limit", "clocks.max.sm", "clocks.max.mem"]
        command = ["nvidia-smi", f"--query-gpu={','.join(query)}", "--format=csv,noheader"]
        answer = subprocess.run(
            [*command, "-i", f"GPU-{properties.uuid}"], capture_output=True, text=True
        )
        if answer.returncode == 0:
            described |= zip(query, answer.stdout.strip().split(", "), strict=True)
    return described


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("build/gpu"), help="directory")
    parser.add_argument(
        "--sanitizer", action="store_true", help="only the checks that suit compute-sanitizer"
    )
    parser.add_argument("--quick", action="store_true", help="fewer lists and rounds")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print(f"There is no GPU that PyTorch {torch.__version__} can use.", file=sys.stderr)
        sys.exit(2)
    device = torch.device("cuda", torch.cuda.current_device())
    report = describe(device)
    print(", ".join(f"{name}: {value}" for name, value in report.items()), end="\n\n")

    def save() -> None:
        (args.output / "gpu.json").write_text(json.dumps(report, indent=1))

    args.output.mkdir(parents=True, exist_ok=True)
    checks = {"the kernels load": kernels_load, **CHECKS, **CUDA_CHECKS}
    if args.sanitizer:
        for name in NOT_UNDER_SANITIZER:
            del checks[name]
    report["checks"] = run_checks(checks, device)
    save()
    if not args.sanitizer and report["checks"]["the kernels load"] == "ok":
        report["measurements"] = []
        stopwatch = CudaStopwatch(device)
        lists = QUICK_LISTS if args.quick else tuple(LISTS)
        for name, dtype in tqdm(list(product(lists, DTYPES)), unit="list", leave=False):
            record: dict[str, Any] = {"list": name, "dtype": str(dtype).removeprefix("torch.")}
            try:
                rounds = 5 if args.quick else 30
                record["measured"] = measure(LISTS[name], dtype, rounds, device, stopwatch)
                report["measurements"].append(record)
            except torch.OutOfMemoryError:
                print(f"{name}, {record['dtype']}: not enough memory")
            torch.cuda.empty_cache()
            report["late"] = stopwatch.late
            save()
        if stopwatch.late:
            print(f"\n{stopwatch.late} of the device's times hold some waiting for the host.")
        print(f"\n{tables(report['measurements'])}")
    sys.exit(any(outcome.startswith("FAILED") for outcome in report["checks"].values()))


if __name__ == "__main__":
    main()
