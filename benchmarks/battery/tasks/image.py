# SPDX-License-Identifier: MIT
"""A photograph as a function of the place: how precisely a network of coordinates learns it."""

import math
from itertools import pairwise

import torch
from sklearn.datasets import load_sample_image
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.battery.problem import Problem
from benchmarks.paper.task import Batch, Source

SIZE, FREQUENCIES, WIDTH = 96, 64, 64


class Image(Problem):
    """The pixels of one of the photographs that scikit-learn ships, as waves of 64 directions.

    Nothing is held out: what counts is the error that is left on the pixels themselves. Trials are
    on another photograph than the final runs.
    """

    title = "image from coordinates, MLP"
    batch_size, steps, seconds = 512, 120, 6.0
    cost = "rmse"

    def load(self, final: bool, source: Source) -> None:
        pixels = torch.tensor(load_sample_image("china.jpg" if final else "flower.jpg"))
        colours = F.adaptive_avg_pool2d(pixels.permute(2, 0, 1) / 255.0, SIZE).flatten(1).T
        self.y = self.y_held_out = (colours - colours.mean(dim=0)).contiguous()
        axis = torch.linspace(-1, 1, SIZE)
        places = torch.cartesian_prod(axis, axis)
        directions = torch.randn(2, FREQUENCIES, generator=torch.Generator().manual_seed(0))
        waves = 4 * math.pi * places @ directions
        self.x = self.x_held_out = torch.cat([waves.sin(), waves.cos()], dim=1)
        self.chance = self.y.square().mean().sqrt().item()

    def build(self) -> nn.Module:
        sizes = (2 * FREQUENCIES, WIDTH, WIDTH, WIDTH)
        layers: list[nn.Module] = []
        for fan_in, fan_out in pairwise(sizes):
            layers += [nn.Linear(fan_in, fan_out), nn.GELU()]
        return nn.Sequential(*layers, nn.Linear(WIDTH, 3))

    def losses(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Batch:
        losses = (model(inputs) - targets).square().mean(dim=1)
        return losses[None], torch.zeros_like(losses)[None]
