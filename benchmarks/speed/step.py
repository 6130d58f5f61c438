# SPDX-License-Identifier: MIT
"""Times `step()` of LPSGDM against PyTorch's optimizers, as a user calls it.

All contenders run in one process, in turn, round by round; the figure is the median over the
rounds of the ratio of their times. Every contender steps parameters of its own, with gradients
that are rewritten before each step, which also evicts the caches as a backward pass does.

    python -m benchmarks.speed.step --threads 1 2
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn import Parameter
from torch.optim import SGD, AdamW, Optimizer

import lpsgd
import lpsgd_ext

Shapes = list[tuple[int, ...]]


def resnet(blocks: tuple[int, ...], bottleneck: bool) -> Shapes:
    """The parameters of torchvision's ResNet for 1000 classes, without building the network."""
    shapes: Shapes = [(64, 3, 7, 7), (64,), (64,)]
    width_in = 64
    for stage, count in enumerate(blocks):
        width = 64 << stage
        width_out = width * 4 if bottleneck else width
        for block in range(count):
            sizes = (
                [(width, width_in, 1), (width, width, 3), (width_out, width, 1)]
                if bottleneck
                else [(width, width_in, 3), (width, width, 3)]
            )
            if block == 0 and width_in != width_out:
                sizes.append((width_out, width_in, 1))
            for out, channels, kernel in sizes:
                shapes += [(out, channels, kernel, kernel), (out,), (out,)]
            width_in = width_out
    return [*shapes, (1000, width_in), (1000,)]


LISTS: dict[str, Shapes] = {
    "ResNet-18": resnet((2, 2, 2, 2), bottleneck=False),
    "ResNet-50": resnet((3, 4, 6, 3), bottleneck=True),
    "1000 x 64": [(64,)] * 1000,
    "64k": [(65536,)],
}

CONTENDERS: dict[str, Callable[[list[Parameter]], Optimizer]] = {
    "LPSGDM": lambda params: lpsgd.LPSGDM(params, lr=1e-3, p=4.0, weight_decay=1e-2, fused=True),
    "SGD fused": lambda params: SGD(params, 1e-3, 0.9, weight_decay=1e-2, fused=True),
    "SGD foreach": lambda params: SGD(params, 1e-3, 0.9, weight_decay=1e-2, foreach=True),
    "AdamW fused": lambda params: AdamW(params, 1e-3, fused=True),
    "eager LPSGDM": lambda params: lpsgd.LPSGDM(
        params, lr=1e-3, p=4.0, weight_decay=1e-2, foreach=True
    ),
}


def measure(shapes: Shapes, rounds: int) -> dict[str, list[float]]:
    """Seconds of every contender's step, round by round."""
    generator = torch.Generator().manual_seed(0)
    optimizers = {}
    for name, make in CONTENDERS.items():
        params = [Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
        for param in params:
            param.grad = torch.empty_like(param)
        optimizers[name] = make(params)
    seconds: dict[str, list[float]] = {name: [] for name in optimizers}
    fresh = [torch.randn(shape, generator=generator) * 1e-2 for shape in shapes]
    for round_ in range(rounds + 2):
        for name, optimizer in optimizers.items():
            for param, grad in zip(optimizer.param_groups[0]["params"], fresh, strict=True):
                param.grad = grad.clone()
            start = time.perf_counter()
            optimizer.step()
            elapsed = time.perf_counter() - start
            if round_ >= 2:
                seconds[name].append(elapsed)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--lists", nargs="+", choices=LISTS, default=list(LISTS))
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--json", type=Path, help="write every measurement to this file")
    args = parser.parse_args()

    peers = [name for name in CONTENDERS if name != "LPSGDM"]
    print(f"torch {torch.__version__}, {lpsgd_ext.cpu_capability()}, LPSGDM's time / peer's time")
    print(f"| list | threads | LPSGDM, µs | {' | '.join(peers)} |")
    print("|---" * (3 + len(peers)) + "|")
    records = []
    for threads in args.threads:
        torch.set_num_threads(threads)
        for name in args.lists:
            seconds = measure(LISTS[name], args.rounds)
            own = seconds["LPSGDM"]
            ratios = {
                peer: statistics.median(a / b for a, b in zip(own, seconds[peer], strict=True))
                for peer in peers
            }
            microseconds = statistics.median(own) * 1e6
            figures = " | ".join(f"{ratios[peer]:.2f}" for peer in peers)
            print(f"| {name} | {threads} | {microseconds:.0f} | {figures} |")
            sys.stdout.flush()
            records.append({"list": name, "threads": threads, "seconds": seconds, **ratios})
    if args.json:
        args.json.write_text(json.dumps(records))


if __name__ == "__main__":
    main()
