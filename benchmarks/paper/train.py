# SPDX-License-Identifier: MIT
"""Trains one network with one optimizer: `python -m benchmarks.paper.train CONFIG --method NAME`.

CONFIG is a TOML file, or the name of one in benchmarks/paper/configs, for instance

    python -m benchmarks.paper.train paper-cifar10-resnet18 --method LPSGDM --device cuda

Killed and started again, it goes on from its last checkpoint and ends with the same bits. Several
GPUs: `torchrun --nproc-per-node 8 -m benchmarks.paper.train ...`.
"""

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks.paper.config import Run, find, load
from benchmarks.paper.task import Source
from benchmarks.paper.tasks import make_task
from benchmarks.paper.training import Machine, Trainer


def add_machine_arguments(parser: argparse.ArgumentParser, configs: str | None = None) -> None:
    """The arguments that the programs which train have in common. `configs` is how many studies
    there may be (argparse's nargs)."""
    parser.add_argument(
        "config", type=find, nargs=configs, help="a study's file, or its name in configs/"
    )
    parser.add_argument("--data", type=Path, help="directory in ImageFolder layout: train, test")
    parser.add_argument("--output", type=Path, default=Path("build/paper"), help="for all files")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ...")
    parser.add_argument("--checkpoint-seconds", type=float, default=60.0)


def machine_of(arguments: argparse.Namespace) -> Machine:
    """What `add_machine_arguments` has read."""
    source = Source(arguments.data, arguments.output / "data")
    return Machine(source, arguments.device, arguments.checkpoint_seconds)


def prepare(run: Run, machine: Machine) -> None:
    """Downloads and decodes the data, in the first process only; the others wait."""
    if not dist.is_initialized():
        return
    if dist.get_rank() == 0:
        make_task(run.task, run.final, machine.source)
    dist.barrier()


def main() -> None:
    """Trains with the command line's settings."""
    parser = argparse.ArgumentParser(description="Train one network with one optimizer.")
    add_machine_arguments(parser)
    parser.add_argument("--method", help="name of a method of the config, which lists them if not")
    parser.add_argument("--lr", type=float, help="instead of the first of the method's grid")
    parser.add_argument("--lr-schedule", help="which, for a method that has several")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, help="instead of the config's")
    parser.add_argument("--stop-after", type=int, help="leave the run unfinished after this epoch")
    parser.add_argument("--amp", choices=("none", "bfloat16", "float16"))
    parser.add_argument("--tensorboard", action="store_true")
    arguments = parser.parse_args()

    study = load(arguments.config)
    methods = {
        method.name: method
        for method in study.methods
        if arguments.lr_schedule in (None, method.run.lr_schedule)
    }
    if arguments.method not in methods:
        parser.error(f"--method must be one of {', '.join(map(repr, methods))}")
    method = methods[arguments.method]
    run = method.at(arguments.lr or method.lrs[0], (arguments.seed,), final=True)
    run = replace(run, epochs=arguments.epochs or run.epochs, amp=arguments.amp or run.amp)

    machine = replace(
        machine_of(arguments),
        progress=True,
        stop_after=arguments.stop_after,
        tensorboard=arguments.tensorboard,
    )
    distributed = "WORLD_SIZE" in os.environ
    if distributed:
        if machine.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group()
    try:
        directory = machine.source.runs(arguments.output) / run.key
        prepare(run, machine)
        history = Trainer(run, directory=directory, machine=machine).train()
        if not distributed or dist.get_rank() == 0:
            last = history[-1]
            print(
                f"{method.name}, seed {arguments.seed}, epoch {last['epoch']}: "
                f"loss {last['loss'][0]:.4f}, accuracy {100 * last['accuracy'][0]:.2f} %, "
                f"{last['seconds']:.0f} s. Metrics are in {directory}."
            )
        if distributed:
            dist.barrier()  # none leaves while another still waits for it
    finally:
        if distributed:
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
    if "WORLD_SIZE" in os.environ:
        # DistributedDataParallel keeps Gloo's threads alive after the group. One that lets go of a
        # tensor after the interpreter's end would abort the process, so it ends at once.
        sys.stdout.flush()
        os._exit(0)
