# SPDX-License-Identifier: MIT
"""SGD, SGDM, AdamW, LPSGD and LPSGDM on scikit-learn's handwritten digits.

The network is a multilayer perceptron with six hidden layers of 64 units, ReLU, no normalisation
and PyTorch's default initialisation. Signals shrink on their way through such a network, so the
gradients of its layers differ by orders of magnitude at the start: the anisotropy that Xu & Yang
(arXiv:2606.02078) motivate LPSGD with.

How a figure comes about:

1. The 1797 images are split once into 60 % training, 20 % validation and 20 % test data.
2. Every optimizer goes through the same grid of learning rates, trained on the training part and
   judged by its mean accuracy on the validation part after the last epoch (ties: by the loss).
3. The chosen learning rate is run again from other seeds on training + validation data. Only these
   runs look at the test data, and only after their last epoch.

This is done twice: with a constant learning rate and with one that follows a cosine to zero. Both
schedules, of the learning rate and of p, step once per epoch.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing import get_context
from statistics import fmean
from typing import Any

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils import parameters_to_vector
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR
from tqdm import tqdm

from lpsgd import LPSGD, LPSGDM, CosineAnnealingP

LAYERS = (64, 64, 64, 64, 64, 64, 64, 10)
LR_SCHEDULES = ("constant", "cosine")


@dataclass(frozen=True)
class Method:
    """An optimizer with every setting except the learning rate; `anneal_p` adds equation 19."""

    name: str
    make: Callable[[list[Tensor], float], Optimizer]
    anneal_p: bool = False


METHODS = {
    method.name: method
    for method in (
        Method("SGD", lambda params, lr: SGD(params, lr, fused=True)),
        Method("SGDM", lambda params, lr: SGD(params, lr, momentum=0.9, fused=True)),
        Method("AdamW", lambda params, lr: AdamW(params, lr, weight_decay=0.0, fused=True)),
        Method("LPSGD 6→2", lambda params, lr: LPSGD(params, lr, p=6.0), anneal_p=True),
        Method("LPSGDM 6→2", lambda params, lr: LPSGDM(params, lr, p=6.0), anneal_p=True),
        Method("LPSGDM p=6", lambda params, lr: LPSGDM(params, lr, p=6.0)),
        Method("LPSGDM p=∞", lambda params, lr: LPSGDM(params, lr, p=math.inf)),
    )
}


@dataclass(frozen=True)
class Settings:
    """What a study runs; the same for every method. The defaults are those of `make demo`."""

    epochs: int = 20
    batch_size: int = 64
    lr_grid: tuple[float, ...] = (
        *(2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2),
        *(5e-2, 1e-1, 2e-1, 5e-1, 1.0, 2.0),
    )
    tuning_seeds: tuple[int, ...] = (100, 101, 102, 103, 104)
    seeds: tuple[int, ...] = tuple(range(10))
    split_seed: int = 0


QUICK = Settings(epochs=2, lr_grid=(0.002, 0.01, 0.05), tuning_seeds=(100,), seeds=(0,))


@dataclass(frozen=True)
class Trial:
    """One method at one learning rate, trained from several seeds side by side."""

    method: str
    lr_schedule: str
    lr: float
    final: bool
    settings: Settings


@dataclass(frozen=True)
class Run:
    """What a trial measured.

    Attributes:
        epoch_losses: per epoch and seed, the mean training loss of the batches of that epoch.
        p: per epoch, the p of the steps of that epoch (2 for torch's optimizers without a p).
        step_sizes: per epoch, the mean of |Δθ| over parameters and seeds in its last step.
        train_loss, held_out_loss, held_out_accuracy: per seed, after the last epoch.
        seconds: the training alone, all seeds together, in one thread.
    """

    trial: Trial
    epoch_losses: list[list[float]]
    p: list[float]
    step_sizes: list[float]
    train_loss: list[float]
    held_out_loss: list[float]
    held_out_accuracy: list[float]
    seconds: float


@dataclass(frozen=True)
class Result:
    """The search for a method's learning rate, and the final runs at the best one."""

    tuning: list[Run]
    final: Run

    @property
    def at_edge(self) -> bool:
        """Whether the best learning rate is the grid's first or last, so may not be the best."""
        grid = self.final.trial.settings.lr_grid
        return self.final.trial.lr in (grid[0], grid[-1])


@dataclass(frozen=True)
class Study:
    """All results, one per learning-rate schedule and method, and the seconds they took."""

    results: list[Result]
    seconds: float


def split_digits(settings: Settings, final: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns training images and labels, then held-out ones: test data if final, else validation.

    Images are rows of 64 pixels in [0, 1].
    """
    images, labels = load_digits(return_X_y=True)

    def split(indices: Any, held_out: float) -> Any:
        return train_test_split(
            indices,
            test_size=held_out,
            stratify=labels[indices],
            random_state=settings.split_seed,
        )

    train, held_out = split(range(len(labels)), 0.2)
    if not final:
        train, held_out = split(train, 0.25)
    x, y = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
    return x[train], y[train], x[held_out], y[held_out]


def initial_parameters(generators: Sequence[torch.Generator]) -> list[Tensor]:
    """Weights (seeds, in, out) and biases (seeds, 1, out), drawn as in `torch.nn.Linear`."""
    params = []
    for fan_in, fan_out in pairwise(LAYERS):
        bound = 1 / math.sqrt(fan_in)
        for rows in (fan_in, 1):
            draws = torch.stack([torch.rand(rows, fan_out, generator=g) for g in generators])
            params.append(((2 * draws - 1) * bound).requires_grad_())
    return params


def forward(params: Sequence[Tensor], x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropies (seeds, batch) and logits (seeds, batch, 10) of images (seeds, batch, 64)."""
    for weight, bias in zip(params[:-2:2], params[1:-2:2], strict=True):
        x = torch.baddbmm(bias, x, weight).relu()
    logits = torch.baddbmm(params[-1], x, params[-2])
    return F.cross_entropy(logits.mT, y, reduction="none"), logits


@torch.no_grad()
def evaluate(params: Sequence[Tensor], x: Tensor, y: Tensor) -> tuple[list[float], list[float]]:
    """Mean loss and accuracy of every seed's network on the images (n, 64)."""
    seeds = len(params[0])
    x, y = x.expand(seeds, -1, -1), y.expand(seeds, -1)
    losses, logits = forward(params, x, y)
    accuracy = (logits.argmax(dim=2) == y).double().mean(dim=1)
    return losses.mean(dim=1).tolist(), accuracy.tolist()


def train(trial: Trial) -> Run:
    """Trains one network per seed, all of them at once, and evaluates each on the held-out data.

    The networks are stacked along the first dimension of every parameter. Each has its own batches,
    and all optimizers here work element by element, so a stack is as independent as separate
    networks would be. It is only faster.
    """
    settings, method = trial.settings, METHODS[trial.method]
    x_train, y_train, x_held_out, y_held_out = split_digits(settings, trial.final)
    seeds = settings.seeds if trial.final else settings.tuning_seeds
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    params = initial_parameters(generators)

    optimizer = method.make(params, trial.lr)
    schedules: list[CosineAnnealingP | CosineAnnealingLR] = []
    if method.anneal_p:
        schedules.append(CosineAnnealingP(optimizer, settings.epochs))
    if trial.lr_schedule == "cosine":
        schedules.append(CosineAnnealingLR(optimizer, settings.epochs))

    def step(batch: Tensor) -> Tensor:
        losses, _ = forward(params, x_train[batch], y_train[batch])
        optimizer.zero_grad()
        torch.autograd.backward(losses.mean(dim=1).sum())
        optimizer.step()
        return losses.detach().sum(dim=1)

    epoch_losses, p, step_sizes = [], [], []
    start = time.perf_counter()
    for _ in range(settings.epochs):
        order = torch.stack([torch.randperm(len(y_train), generator=g) for g in generators])
        sums = torch.zeros(len(seeds))
        *batches, last = torch.split(order, settings.batch_size, dim=1)
        for batch in batches:
            sums += step(batch)
        before = parameters_to_vector(params).detach()
        sums += step(last)
        after = parameters_to_vector(params).detach()
        epoch_losses.append((sums / len(y_train)).tolist())
        step_sizes.append((after - before).abs().mean().item())
        p.append(float(optimizer.param_groups[0].get("p", 2.0)))
        for schedule in schedules:
            schedule.step()
    seconds = time.perf_counter() - start

    train_loss, _ = evaluate(params, x_train, y_train)
    held_out_loss, held_out_accuracy = evaluate(params, x_held_out, y_held_out)
    return Run(
        trial,
        epoch_losses,
        p,
        step_sizes,
        train_loss,
        held_out_loss,
        held_out_accuracy,
        seconds,
    )


@contextmanager
def mapper(jobs: int) -> Iterator[Callable[[Iterable[Trial]], Iterable[Run]]]:
    """A map of `train` over trials that keeps their order, on `jobs` processes of one thread each.

    These networks are too small for a second thread to help, but there are many of them.
    """
    if jobs == 1:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield lambda trials: map(train, trials)
        finally:
            torch.set_num_threads(threads)
    else:
        with ProcessPoolExecutor(jobs, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
            yield lambda trials: pool.map(train, trials)


def validation_score(run: Run) -> tuple[float, float]:
    """Larger is better: the mean accuracy, then the mean loss."""
    loss = fmean(run.held_out_loss)
    return fmean(run.held_out_accuracy), -loss if math.isfinite(loss) else -math.inf


def study(settings: Settings, jobs: int) -> Study:
    """Tunes and runs every method under every learning-rate schedule, with a progress bar."""
    searches = [
        [Trial(method, schedule, lr, False, settings) for lr in settings.lr_grid]
        for schedule in LR_SCHEDULES
        for method in METHODS
    ]
    start = time.perf_counter()
    with (
        mapper(jobs) as train_all,
        tqdm(total=len(searches) * (len(settings.lr_grid) + 1), unit="run") as progress,
    ):

        def run_all(trials: list[Trial], description: str) -> list[Run]:
            progress.set_description(description)
            runs = []
            for run in train_all(trials):
                runs.append(run)
                progress.update()
            return runs

        runs = iter(run_all([trial for search in searches for trial in search], "learning rates"))
        tunings = [[next(runs) for _ in search] for search in searches]
        best = [max(tuning, key=validation_score).trial for tuning in tunings]
        finals = run_all(
            [Trial(t.method, t.lr_schedule, t.lr, True, settings) for t in best], "final runs"
        )
    results = [Result(tuning, final) for tuning, final in zip(tunings, finals, strict=True)]
    return Study(results, time.perf_counter() - start)
