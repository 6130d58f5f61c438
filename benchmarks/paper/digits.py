# SPDX-License-Identifier: MIT
"""scikit-learn's 1797 handwritten digits and a network that SGD has trouble with.

It is a multilayer perceptron with six hidden layers of 64 units, ReLU, no normalisation and
PyTorch's default initialisation. Signals shrink on their way through such a network, so the
gradients of its layers differ by orders of magnitude at the start: the anisotropy that Xu & Yang
(arXiv:2606.02078) motivate LPSGD with.

The images are split once into 60 % training, 20 % validation and 20 % test data. Final runs train
on training and validation data.
"""

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.paper.task import Batch, Generators, Source, Task

LAYERS = (64, 64, 64, 64, 64, 64, 64, 10)


def split_digits(final: bool, split_seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns training images and labels, then held-out ones: test data if final, else validation.

    Images are rows of 64 pixels in [0, 1].
    """
    images, labels = load_digits(return_X_y=True)

    def split(indices: Any, held_out: float) -> Any:
        return train_test_split(
            indices, test_size=held_out, stratify=labels[indices], random_state=split_seed
        )

    train, held_out = split(range(len(labels)), 0.2)
    if not final:
        train, held_out = split(train, 0.25)
    x, y = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
    return x[train], y[train], x[held_out], y[held_out]


class Stack(nn.Module):
    """One network per generator, stacked along the first dimension of every parameter.

    All optimizers here work element by element, so a stack is as independent as separate networks
    would be. It is only faster.
    """

    def __init__(self, generators: Generators) -> None:
        """Draws weights (seeds, in, out) and biases (seeds, 1, out) as `torch.nn.Linear` does."""
        super().__init__()
        self.layers = nn.ParameterList()
        for fan_in, fan_out in pairwise(LAYERS):
            bound = 1 / math.sqrt(fan_in)
            for rows in (fan_in, 1):
                draws = torch.stack([torch.rand(rows, fan_out, generator=g) for g in generators])
                self.layers.append(nn.Parameter((2 * draws - 1) * bound))

    def forward(self, x: Tensor) -> Tensor:
        """Logits (seeds, n, 10) of images (seeds, n, 64)."""
        params = list(self.layers)
        for weight, bias in zip(params[:-2:2], params[1:-2:2], strict=True):
            x = torch.baddbmm(bias, x, weight).relu()
        return torch.baddbmm(params[-1], x, params[-2])


class Digits(Task):
    """The data and the stack."""

    stackable = True

    def __init__(self, final: bool, source: Source) -> None:
        self.x, self.y, self.x_held_out, self.y_held_out = split_digits(final)
        self.examples = len(self.y)

    def describe(self) -> str:
        return "Handwritten digits"

    def make_model(self, generators: Generators) -> Stack:
        return Stack(generators)

    def batch(
        self, indices: Tensor, generators: Generators, device: torch.device, share: slice
    ) -> Batch:
        indices = indices[:, share]
        return self.x[indices].to(device), self.y[indices].to(device)

    def held_out(self, device: torch.device) -> Iterator[Batch]:
        yield self.x_held_out[None].to(device), self.y_held_out[None].to(device)

    def losses(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Batch:
        seeds = next(model.parameters()).shape[0]
        inputs, targets = inputs.expand(seeds, -1, -1), targets.expand(seeds, -1)
        logits = model(inputs)
        losses = F.cross_entropy(logits.mT, targets, reduction="none")
        return losses, logits.argmax(dim=2) == targets
