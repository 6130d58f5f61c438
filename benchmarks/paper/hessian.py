# SPDX-License-Identifier: MIT
"""Does the loss flatten while p falls? `python -m benchmarks.paper.hessian CONFIG`.

Takes the parameters that the final runs of a study kept (`snapshots` in its configuration; run
`sweep` first) and finds, for each method and epoch, on one batch of training data,

- the spectral density of the Hessian, by Lanczos quadrature (Papyan 2020, in curvlinops), and its
  smallest and largest eigenvalue;
- how anisotropic the gradient is: its flatness (see `lpsgd.experiments.flatness`).

Writes hessian/CONFIG.json beside the study's result; `report` draws it.
"""

import argparse
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.paper import spectra
from benchmarks.paper.config import Run, load
from benchmarks.paper.records import dumps, rounded, write_whole
from benchmarks.paper.report import read
from benchmarks.paper.sweep import results_directory, runs_of
from benchmarks.paper.task import EVERYTHING, Batch, Task
from benchmarks.paper.tasks import make_task
from benchmarks.paper.train import add_machine_arguments, machine_of
from benchmarks.paper.training import Machine
from lpsgd.experiments import Spectrum, spectrum

EXAMPLES = 256


@dataclass(frozen=True)
class Moment(Spectrum):
    """A network after so many epochs."""

    epoch: int


def examine(task: Task, model: nn.Module, epoch: int, batch: Batch) -> Moment:
    """The Hessian and the gradient of the sum over seeds of their mean losses on a batch: networks
    of several seeds are one, whose Hessian has a block for each."""

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        losses, _ = task.losses(model, *batch)
        return losses.mean(dim=1).sum()

    found = spectrum(model, loss, batch)
    return Moment(**vars(found), epoch=epoch)


def examine_run(run: Run, directory: Path, machine: Machine) -> list[Moment]:
    """The moments that a run has kept, on the first training examples of an epoch."""
    task = make_task(run.task, run.final, machine.source)
    device = torch.device(machine.device)
    generators = [torch.Generator().manual_seed(seed) for seed in run.seeds]
    batch = task.batch(task.order(generators)[:, :EXAMPLES], generators, device, EVERYTHING)
    moments = []
    for epoch in tqdm(run.snapshots, f"{run.optimizer}, seed {run.seeds[0]}", mininterval=1.0):
        state = torch.load(directory / f"model-{epoch}.pt", map_location=device)
        model = task.make_model(generators).to(device)
        model.load_state_dict(state)
        torch.manual_seed(0)  # of the Lanczos vectors
        moments.append(examine(task, model, epoch, batch))
    return moments


def main() -> None:
    """Examines the command line's study."""
    parser = argparse.ArgumentParser(description="Hessian and gradient over training.")
    add_machine_arguments(parser)
    parser.add_argument("--small", action="store_true", help="the reduced version of the study")
    parser.add_argument("--results", type=Path, help="directory of the study's result")
    arguments = parser.parse_args()
    study = load(arguments.config, arguments.small)
    results = results_directory(arguments)
    machine = machine_of(arguments)
    runs = machine.source.runs(arguments.output)
    report = read(results / f"{study.name}.json")
    moments = {}
    for method, row in zip(study.methods, report.rows, strict=True):
        run = runs_of(method, row.lr, study.seeds, final=True)[0]
        moments[row.name] = examine_run(run, runs / run.key, machine)
    record = {name: [rounded(asdict(moment)) for moment in at] for name, at in moments.items()}
    file = results / "hessian" / f"{study.name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, lambda part: part.write_text(dumps(record), encoding="utf-8"))
    print(spectra.table(record))


if __name__ == "__main__":
    main()
