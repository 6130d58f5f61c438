# SPDX-License-Identifier: MIT
"""A table whose classes are rare, made by scikit-learn, and a residual perceptron."""

import numpy as np
import torch
from sklearn.datasets import make_classification
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from benchmarks.battery.problem import Problem
from benchmarks.paper.task import Batch, Source, classify

CLASSES, COLUMNS, TRAINING, HELD_OUT = 8, 32, 12000, 6000
WIDTH, BLOCKS = 64, 3


class Residual(nn.Module):
    """x plus a perceptron of its norm."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(
            *(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.ReLU()),
            nn.Linear(2 * WIDTH, WIDTH),
        )

    def forward(self, x: Tensor) -> Tensor:
        inner: Tensor = self.inner(x)
        return x + inner


class Table(Problem):
    """The k-th class is 1 / k² as frequent as the first; the error is the mean of the classes'.

    Half of the columns are skewed, as sums of money are.
    """

    title = "table with rare classes, residual MLP"
    batch_size, steps, seconds = 64, 120, 6.0
    cost, chance = "error", 100 * (1 - 1 / CLASSES)

    def load(self, final: bool, source: Source) -> None:
        shares = 1 / np.arange(1, CLASSES + 1) ** 2
        columns, classes = make_classification(
            TRAINING + 2 * HELD_OUT,
            COLUMNS,
            n_informative=16,
            n_redundant=8,
            n_classes=CLASSES,
            n_clusters_per_class=3,
            weights=list(shares / shares.sum()),
            class_sep=1.5,
            flip_y=0.0,
            random_state=0,
        )
        columns[:, ::2] = np.sinh(columns[:, ::2])
        scaled = StandardScaler().fit(columns[:TRAINING]).transform(columns)
        x, y = torch.tensor(scaled, dtype=torch.float32), torch.tensor(classes)
        start = TRAINING + HELD_OUT * final
        self.x, self.y = x[:TRAINING], y[:TRAINING]
        self.x_held_out, self.y_held_out = (t[start : start + HELD_OUT] for t in (x, y))
        counts = self.y_held_out.bincount(minlength=CLASSES)
        self.weights = HELD_OUT / (CLASSES * counts)

    def build(self) -> nn.Module:
        blocks = [Residual() for _ in range(BLOCKS)]
        return nn.Sequential(
            nn.Linear(COLUMNS, WIDTH), *blocks, nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CLASSES)
        )

    def losses(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Batch:
        """The mean of "correct" over the held-out data is the mean of the classes' accuracies."""
        losses, correct = classify(model(inputs), targets)
        return losses, correct * self.weights[targets]
