# SPDX-License-Identifier: MIT
"""The training loop: the same for every task, with metrics and checkpoints.

A run that is killed at any moment and started again ends with the bits of one that was not. The
checkpoint holds all that a run's future depends on, and is replaced at once. What it writes into
its directory:

    metrics.jsonl      one line per epoch (see `Trainer.measure`)
    result.json        the run and all its metrics, once it is finished
    checkpoint.pt      while it is not
    model-<epoch>.pt   the parameters after the epochs of `Run.snapshots`, 0 being the start
    tensorboard/       if asked for

Under torchrun every process takes its share of each batch, and the first one writes.
"""

import json
import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import convert_conv2d_weight_memory_format
from tqdm import tqdm

from benchmarks.paper.config import Run
from benchmarks.paper.methods import make_optimizer, make_schedules, p_of
from benchmarks.paper.records import dumps, write_whole
from benchmarks.paper.task import Source, Task
from benchmarks.paper.tasks import make_task

Metrics = dict[str, Any]


@dataclass(frozen=True)
class Machine:
    """Where and how a run is carried out.

    Attributes:
        checkpoint_seconds: the time between checkpoints, which may lie within an epoch.
        stop_after: leaves the run unfinished after so many of its epochs.
    """

    source: Source = field(default_factory=Source)
    device: str = "cpu"
    checkpoint_seconds: float = 60.0
    stop_after: int | None = None
    progress: bool = False
    tensorboard: bool = False


@dataclass
class Progress:
    """How far a run is.

    Attributes:
        order: the indices (seeds, examples) of the epoch under way, if one is.
        position: how many of them are done.
        loss_sums: the sum of their losses, for each seed.
        seconds: spent in training so far.
        history: the metrics of the epochs so far.
    """

    epoch: int = 0
    order: Tensor | None = None
    position: int = 0
    loss_sums: Tensor | None = None
    seconds: float = 0.0
    history: list[Metrics] = field(default_factory=list)


def momentum_of(optimizer: torch.optim.Optimizer) -> Tensor | None:
    """All |m| in one tensor, for optimizers that keep the mean of gradients of equation 23."""
    names = {"LPSGDM": "momentum_buffer", "AdamW": "exp_avg", "Lion": "exp_avg"}
    name = names.get(type(optimizer).__name__)
    if name is None or not optimizer.state:
        return None
    buffers = [state[name].flatten() for state in optimizer.state.values()]
    one_byte = buffers[0].dtype == torch.float8_e5m2
    unit = 2.0 ** -optimizer.param_groups[0]["momentum_exponent"] if one_byte else 1.0
    return torch.cat([buffer.float() for buffer in buffers]).abs() * unit


class Trainer:
    """Trains the networks of one run.

    Args:
        run: what to train.
        task: made from the run unless given.
        directory: for the files; nothing is written without one. A checkpoint that lies there is
            gone on from.
        machine: what depends on the machine.

    Example:
        >>> run = Run({"name": "digits"}, "LPSGDM", 0.01, seeds=(0,), epochs=2, batch_size=64)
        >>> [metrics["epoch"] for metrics in Trainer(run).train()]
        [1, 2]
    """

    def __init__(
        self,
        run: Run,
        task: Task | None = None,
        directory: Path | None = None,
        machine: Machine | None = None,
    ) -> None:
        self.run, self.directory, self.machine = run, directory, machine or Machine()
        self.rank, self.world = (
            (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        )
        if run.batch_size % self.world:
            raise ValueError(f"{self.world} processes can't share a batch of {run.batch_size}")
        self.task = task or make_task(run.task, run.final, self.machine.source)
        if len(run.seeds) > 1 and not self.task.stackable:
            raise ValueError("this task trains one seed at a time")
        self.device = torch.device(self.machine.device)
        self.generators = [torch.Generator().manual_seed(seed) for seed in run.seeds]
        torch.manual_seed(run.seeds[0])
        self.module = self.task.make_model(self.generators).to(self.device)
        if run.channels_last:
            convert_conv2d_weight_memory_format(self.module, torch.channels_last)
        self.model: nn.Module = self.module
        if self.world > 1:
            self.model = DistributedDataParallel(self.module)
        self.params = list(self.module.parameters())
        self.optimizer = make_optimizer(run, self.params)
        self.examples = self.task.examples - self.task.examples % self.world
        self.schedules = make_schedules(
            run, self.optimizer, math.ceil(self.examples / run.batch_size)
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=run.amp == "float16")
        self.progress = Progress()
        self.saved = time.monotonic()

    def autocast(self) -> Any:
        if self.run.amp == "none":
            return nullcontext()
        return torch.autocast(self.device.type, getattr(torch, self.run.amp))

    def step(self, indices: Tensor) -> Tensor:
        """One step on these examples (seeds, n); returns each seed's sum of their losses."""
        part = indices.shape[1] // self.world
        share = slice(self.rank * part, (self.rank + 1) * part)
        inputs, targets = self.task.batch(indices, self.generators, self.device, share)
        with self.autocast():
            losses, _ = self.task.losses(self.model, inputs, targets)
        self.optimizer.zero_grad()
        torch.autograd.backward(self.scaler.scale(losses.mean(dim=1).sum()))
        if self.run.clip_norm is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.params, self.run.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return self.over_processes(losses.detach().sum(dim=1))

    def over_processes(self, x: Tensor) -> Tensor:
        """The sum of all processes' tensors, in place."""
        if self.world > 1:
            dist.all_reduce(x)
        return x

    @torch.no_grad()
    def flat_params(self) -> Tensor:
        """A copy of all parameters in one tensor."""
        return torch.cat([param.flatten() for param in self.params])

    def advance_schedules(self) -> None:
        for schedule in self.schedules:
            schedule.step()

    def train_epoch(self, bar: Any) -> Metrics:
        """What is left of the epoch; returns its metrics."""
        progress, per_step = self.progress, self.run.every == "step"
        if progress.order is None:
            order = self.task.order(self.generators)
            progress.order, progress.position = order[:, : self.examples], 0
            progress.loss_sums = torch.zeros(len(order), device=self.device)
        assert progress.loss_sums is not None
        self.model.train()
        before = None
        while progress.position < self.examples:
            batch = progress.order[:, progress.position :][:, : self.run.batch_size]
            last = progress.position + batch.shape[1] == self.examples
            if last:
                before = self.flat_params()
            start = time.perf_counter()
            progress.loss_sums += self.step(batch)
            if last and self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            progress.seconds += time.perf_counter() - start
            progress.position += batch.shape[1]
            if last:
                metrics = self.measure(before)
            if per_step:
                self.advance_schedules()
            bar.update()
            if not last:
                self.save_if_due()
        if not per_step:
            self.advance_schedules()
        progress.order = None
        progress.epoch += 1
        return metrics

    def measure(self, before: Tensor | None) -> Metrics:
        """The metrics of an epoch, after its last step and before the schedules move on.

        Lists have an entry for each seed.

            loss                  mean loss of the epoch's batches, while they were trained on
            held_out_loss, accuracy   on the data held out, after the epoch, if it evaluates
            lr, p, pivot          of the last step
            update                mean |Δθ| of the last step over all parameters and seeds
            u                     the same divided by lr (weight decay's share is in both)
            m_mean, m_rms         mean of |m| and root mean square over all parameters, where there
                                  is a momentum like eq 23's
            seconds               of training since the start of the run, without evaluation
        """
        progress, group = self.progress, self.optimizer.param_groups[0]
        assert before is not None and progress.loss_sums is not None
        after = self.flat_params()
        update = (after - before).abs().mean().item()
        metrics: Metrics = {
            "epoch": progress.epoch + 1,
            "loss": (progress.loss_sums / self.examples).tolist(),
            "lr": float(group["lr"]),
            "p": p_of(self.optimizer),
            "pivot": float(group.get("pivot", 1.0)),
            "update": update,
            "u": update / float(group["lr"]),
            "seconds": progress.seconds,
        }
        m = momentum_of(self.optimizer)
        if m is not None:
            metrics |= {"m_mean": m.mean().item(), "m_rms": m.square().mean().sqrt().item()}
        epoch, every = progress.epoch + 1, self.run.evaluate_every
        is_last = epoch == self.run.epochs or not any(map(math.isfinite, metrics["loss"]))
        if epoch % every == 0 or is_last:
            metrics |= self.evaluate()
        return metrics

    @torch.no_grad()
    def evaluate(self) -> Metrics:
        """Each seed's mean loss and accuracy on the data held out."""
        self.module.eval()
        sums = torch.zeros(2, len(self.run.seeds), device=self.device, dtype=torch.float64)
        count = torch.zeros(1, device=self.device)
        batches = self.task.held_out(self.device)
        for inputs, targets in islice(batches, self.rank, None, self.world):
            with self.autocast():
                losses, correct = self.task.losses(self.module, inputs, targets)
            sums += torch.stack([losses.double().sum(dim=1), correct.double().sum(dim=1)])
            count += losses.shape[1]
        self.module.train()
        loss, accuracy = (self.over_processes(sums) / self.over_processes(count)).tolist()
        return {"held_out_loss": loss, "accuracy": accuracy}

    def train(self) -> list[Metrics]:
        """Trains to the end, from the checkpoint if there is one, and returns every epoch's
        metrics. Ends early when no seed's loss is finite any more."""
        finished = None if self.directory is None else read_result(self.directory)
        if finished is not None:
            return finished
        self.resume()
        progress = self.progress
        per_epoch = math.ceil(self.examples / self.run.batch_size)
        last = min(self.run.epochs, self.machine.stop_after or self.run.epochs)
        if progress.epoch == 0 and progress.order is None:
            self.snapshot()
        with tqdm(
            desc=f"{self.run.optimizer} lr {self.run.lr:g}",
            initial=progress.epoch * per_epoch + progress.position // self.run.batch_size,
            total=last * per_epoch,
            unit="step",
            mininterval=1.0,
            disable=not (self.machine.progress and self.rank == 0),
        ) as bar:
            while progress.epoch < last and not self.diverged:
                metrics = self.train_epoch(bar)
                progress.history.append(metrics)
                self.log(metrics)
                self.snapshot()
                self.save_if_due()
                bar.set_postfix(
                    loss=f"{fmean(metrics['loss']):.3f}",
                    accuracy=f"{fmean(metrics.get('accuracy', [math.nan])):.3f}",
                )
        if progress.epoch == self.run.epochs or self.diverged:
            self.finish()
        else:
            self.save()
        return progress.history

    @property
    def diverged(self) -> bool:
        """Whether no network has had a finite loss in the last epoch."""
        history = self.progress.history
        return bool(history) and not any(map(math.isfinite, history[-1]["loss"]))

    def path(self, name: str) -> Path | None:
        """A file to write, or None if this process writes none."""
        if self.directory is None or self.rank > 0:
            return None
        self.directory.mkdir(parents=True, exist_ok=True)
        return self.directory / name

    def log(self, metrics: Metrics) -> None:
        """Appends a line to metrics.jsonl, and to TensorBoard's files."""
        if file := self.path("metrics.jsonl"):
            with open(file, "a", encoding="utf-8") as stream:
                stream.write(dumps(metrics) + "\n")
        if self.machine.tensorboard and (file := self.path("tensorboard")):
            from torch.utils.tensorboard import SummaryWriter

            epoch = metrics["epoch"]
            with SummaryWriter(str(file), purge_step=epoch) as writer:
                for name, value in metrics.items():
                    mean = fmean(value) if isinstance(value, list) else value
                    writer.add_scalar(name, mean, epoch)

    def snapshot(self) -> None:
        """Keeps the parameters if the run wants those of now."""
        epoch = self.progress.epoch
        if epoch in self.run.snapshots and (file := self.path(f"model-{epoch}.pt")):
            state = self.module.state_dict()
            write_whole(file, lambda part: torch.save(state, part))

    def save_if_due(self) -> None:
        """Replaces the checkpoint if it is old."""
        if time.monotonic() - self.saved > self.machine.checkpoint_seconds:
            self.save()

    def save(self) -> None:
        """Replaces the checkpoint."""
        self.saved = time.monotonic()
        if file := self.path("checkpoint.pt"):
            state = {
                "run": self.run.key,
                "model": self.module.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "schedules": [schedule.state_dict() for schedule in self.schedules],
                "scaler": self.scaler.state_dict(),
                "generators": [generator.get_state() for generator in self.generators],
                "progress": vars(self.progress),
            }
            write_whole(file, lambda part: torch.save(state, part))

    def resume(self) -> None:
        """Loads the checkpoint, if there is one, and cuts metrics.jsonl to what it knows."""
        file = None if self.directory is None else self.directory / "checkpoint.pt"
        if file is not None and file.exists():
            state = torch.load(file, map_location=self.device)
            if state["run"] != self.run.key:
                raise ValueError(f"{file} is another run's: its settings differ")
            self.module.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            for schedule, own in zip(self.schedules, state["schedules"], strict=True):
                schedule.load_state_dict(own)
            self.scaler.load_state_dict(state["scaler"])
            for generator, own in zip(self.generators, state["generators"], strict=True):
                generator.set_state(own.cpu())
            self.progress = Progress(**state["progress"])
            if self.progress.order is not None:
                self.progress.order = self.progress.order.cpu()
        if log := self.path("metrics.jsonl"):
            lines = "".join(dumps(metrics) + "\n" for metrics in self.progress.history)
            write_whole(log, lambda part: part.write_text(lines, encoding="utf-8"))

    def finish(self) -> None:
        """Writes the result and removes the checkpoint, which nobody needs any more."""
        if file := self.path("result.json"):
            result = dumps({"run": asdict(self.run), "history": self.progress.history})
            write_whole(file, lambda part: part.write_text(result, encoding="utf-8"))
            file.with_name("checkpoint.pt").unlink(missing_ok=True)


def read_result(directory: Path) -> list[Metrics] | None:
    """The metrics of the finished run in this directory, if there is one."""
    file = directory / "result.json"
    if not file.exists():
        return None
    history: list[Metrics] = json.loads(file.read_text(encoding="utf-8"))["history"]
    for metrics in history:
        for name, value in metrics.items():
            numbers: Sequence[Any] = value if isinstance(value, list) else [value]
            floats = [float(x) if isinstance(x, str) else x for x in numbers]
            metrics[name] = floats if isinstance(value, list) else floats[0]
    return history
