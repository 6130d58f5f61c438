# SPDX-License-Identifier: MIT
"""CIFAR-10 and a small ResNet."""

from torch import nn

from benchmarks.battery.problem import Problem
from benchmarks.paper.images import Images
from benchmarks.paper.networks import NETWORKS
from benchmarks.paper.task import Source


class Cifar(Images, Problem):
    """10,000 of its images, shifted and mirrored; every fourth of the test images."""

    title = "CIFAR-10, ResNet-8"
    batch_size, steps, seconds = 64, 22, 16.0
    cost, chance = "error", 90.0

    def __init__(self, final: bool, source: Source, shrink: int = 1) -> None:
        Problem.__init__(self, final, source, shrink)

    def load(self, final: bool, source: Source) -> None:
        Images.__init__(self, final, source, "cifar10", "resnet8-fast", images=10000)
        every = 4 if final else 2
        self.x_held_out, self.y_held_out = self.x_held_out[::every], self.y_held_out[::every]

    def build(self) -> nn.Module:
        return NETWORKS["resnet8-fast"](10)

    def pool(self) -> int:
        return len(self.train)

    make_model = Problem.make_model
    order = Problem.order
