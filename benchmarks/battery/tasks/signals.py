# SPDX-License-Identifier: MIT
"""MNIST-1D (arXiv:2011.14439): signals of 40 values in ten classes, made by a procedure."""

from functools import cache

import torch
from torch import nn

from benchmarks.battery.problem import Problem
from benchmarks.paper.task import Batch, Source

TRAINING, HELD_OUT = 4000, 2000
WIDTH = 32


@cache
def signals() -> Batch:
    """All signals and their classes, which takes seconds."""
    from mnist1d.data import get_dataset_args, make_dataset

    arguments = get_dataset_args()
    arguments.num_samples, arguments.train_split = TRAINING + 2 * HELD_OUT, 1.0
    data = make_dataset(arguments)
    return torch.tensor(data["x"], dtype=torch.float32)[:, None], torch.tensor(data["y"])


class Signals(Problem):
    """4000 signals to train on, as in the paper, and its small convolutional network."""

    title = "1-D signals, CNN"
    batch_size, steps, seconds = 64, 120, 6.0
    cost, chance = "error", 90.0

    def load(self, final: bool, source: Source) -> None:
        x, y = signals()
        start = TRAINING + HELD_OUT * final
        self.x, self.y = x[:TRAINING], y[:TRAINING]
        self.x_held_out, self.y_held_out = (t[start : start + HELD_OUT] for t in (x, y))

    def build(self) -> nn.Module:
        return nn.Sequential(
            *(nn.Conv1d(1, WIDTH, 5, stride=2, padding=1), nn.ReLU()),
            *(nn.Conv1d(WIDTH, WIDTH, 3, stride=2, padding=1), nn.ReLU()),
            *(nn.Conv1d(WIDTH, WIDTH, 3, stride=2, padding=1), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(5 * WIDTH, 10)),
        )
