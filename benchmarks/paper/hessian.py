# SPDX-License-Identifier: MIT
"""Does the loss flatten while p falls? `python -m benchmarks.paper.hessian CONFIG`.

Takes the parameters that the final runs of a study kept (`snapshots` in its configuration; run
`sweep` first) and finds, for each method and epoch, on one batch of training data,

- the spectral density of the Hessian, by Lanczos quadrature (Papyan 2020, in curvlinops), and its
  smallest and largest eigenvalue;
- how anisotropic the gradient is: its flatness (see `lpsgd.experiments.flatness`).

Writes hessian/CONFIG.json and .png beside the study's result.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.paper.config import Run, load
from benchmarks.paper.records import dumps, rounded, write_whole
from benchmarks.paper.report import Report, hessian_table, read, save
from benchmarks.paper.sweep import results_directory, runs_of
from benchmarks.paper.task import EVERYTHING, Batch, Task
from benchmarks.paper.tasks import make_task
from benchmarks.paper.train import add_machine_arguments, machine_of
from benchmarks.paper.training import Machine
from lpsgd.experiments import Spectrum, spectrum
from lpsgd.experiments._style import style

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


def draw(report: Report, moments: Mapping[str, Sequence[Moment]]) -> Figure:
    """Densities at the epochs, one row for each method; below what changes over the epochs."""
    figure = plt.figure(figsize=(8, 3 + 1.5 * len(moments)), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(1.5 * len(moments), 3))  # type: ignore[misc]
    epochs = [moment.epoch for moment in next(iter(moments.values()))]
    panels = above.subplots(len(moments), len(epochs), squeeze=False, sharex="col", sharey=True)
    for line, (name, at) in zip(panels, moments.items(), strict=True):
        for axes, moment in zip(line, at, strict=True):
            density = np.maximum(moment.density, 1e-6)
            axes.fill_between(moment.grid, density, 1e-6, color=style(name)[0], alpha=0.7)
            axes.set(yscale="log", ylim=(1e-5, None))
            axes.tick_params(labelsize=7)
        line[0].set_ylabel(name, color=style(name)[0], fontweight="bold", fontsize=9)
    for axes, epoch in zip(panels[0], epochs, strict=True):
        axes.set_title(f"epoch {epoch}", fontsize=10)
    above.supxlabel("eigenvalue of the Hessian", fontsize=9)
    left, middle, right = below.subplots(1, 3)
    for name, at in moments.items():
        color, dashes = style(name)
        look = {"color": color, "linestyle": dashes, "linewidth": 1.8}
        left.plot(epochs, [moment.largest for moment in at], marker=".", **look)
        middle.plot(epochs, [moment.flatness for moment in at], marker=".", **look)
        (row,) = report.only([name]).rows
        if name.startswith("LP") and np.isfinite(row.per_epoch("p")).all():
            right.plot(np.arange(1, len(row.per_epoch("p")) + 1), row.per_epoch("p"), **look)
    left.set(yscale="log", xlabel="epoch", title="largest eigenvalue")
    middle.set(yscale="log", xlabel="epoch", title="flatness of the gradient")
    right.set(xlabel="epoch", title="p")
    for axes in (left, middle, right):
        axes.grid(alpha=0.3)
        axes.title.set_fontsize(10)
    figure.suptitle(f"{report.heading}:\nspectral density of the Hessian")
    return figure


def main() -> None:
    """Examines the command line's study."""
    parser = argparse.ArgumentParser(description="Hessian and gradient over training.")
    add_machine_arguments(parser)
    parser.add_argument("--small", action="store_true", help="the reduced version of the study")
    parser.add_argument("--results", type=Path, help="directory of the study's result")
    arguments = parser.parse_args()
    matplotlib.use("Agg")
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
    save(draw(report, moments), file.with_suffix(".png"))
    print(hessian_table(record))


if __name__ == "__main__":
    main()
