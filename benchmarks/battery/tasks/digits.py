# SPDX-License-Identifier: MIT
"""scikit-learn's handwritten digits and a deep perceptron without normalisation."""

from torch import nn

from benchmarks.battery.problem import Problem
from benchmarks.paper.digits import split_digits
from benchmarks.paper.task import Source

WIDTH, HIDDEN = 128, 6


class Digits(Problem):
    """Six hidden layers: the gradients of the layers differ by orders of magnitude at the start."""

    title = "digits, MLP without normalisation"
    batch_size, steps, seconds = 32, 100, 6.0
    cost, chance = "error", 90.0

    def load(self, final: bool, source: Source) -> None:
        self.x, self.y, self.x_held_out, self.y_held_out = split_digits(final)

    def build(self) -> nn.Module:
        layers: list[nn.Module] = [nn.Linear(64, WIDTH), nn.ReLU()]
        for _ in range(HIDDEN - 1):
            layers += [nn.Linear(WIDTH, WIDTH), nn.ReLU()]
        return nn.Sequential(*layers, nn.Linear(WIDTH, 10))
