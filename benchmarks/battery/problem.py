# SPDX-License-Identifier: MIT
"""What a task of the battery is: data, network, batch, and the cost by which a run is judged."""

import hashlib
import math
from abc import abstractmethod
from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor, nn

from benchmarks.paper.task import Batch, Generators, Source, Task, classify
from benchmarks.paper.training import Metrics

EPOCHS = 20  # of a run at full length, whatever the data: the unit of warm-up and of horizons
HELD_OUT_BATCH = 512


class Problem(Task):
    """A task. Its subclasses, one in each file of `tasks`, say what follows.

    Attributes:
        title: of the tables.
        batch_size, steps: what an epoch is: so many steps, with examples drawn without repetition.
        cost: what is measured on held-out data after the last step, smaller is better: "error" (%),
            "perplexity" (e to the mean loss) or "rmse" (the root of the mean loss).
        chance: the cost of a network that has learned nothing. A run that diverges counts as that.
        clip_norm: the norm to which a larger gradient is scaled, for all contenders alike.
        seconds: what a run takes in one thread, about: for the progress bar.
    """

    title: ClassVar[str]
    batch_size: ClassVar[int]
    steps: ClassVar[int]
    cost: ClassVar[str]
    seconds: ClassVar[float]
    clip_norm: ClassVar[float | None] = None

    chance: float
    x: Tensor
    y: Tensor
    x_held_out: Tensor
    y_held_out: Tensor

    def __init__(self, final: bool, source: Source, shrink: int = 1) -> None:
        """With `shrink`, runs have as many times fewer steps."""
        self.load(final, source)
        self.examples = self.batch_size * max(1, self.steps // shrink)

    @abstractmethod
    def load(self, final: bool, source: Source) -> None:
        """Sets the four tensors; what is held out are the test data if `final`."""

    @abstractmethod
    def build(self) -> nn.Module:
        """The network at its start, drawn by torch's own generator."""

    def describe(self) -> str:
        return self.title

    def fingerprint(self) -> str:
        """Tells whether two machines, or two versions of a package, have made the same data."""
        digest = hashlib.sha256()
        for name, value in sorted(vars(self).items()):
            if isinstance(value, Tensor):
                digest.update(name.encode() + value.contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def make_model(self, generators: Generators) -> nn.Module:
        return self.build()

    def pool(self) -> int:
        """How many examples there are to draw from."""
        return len(self.y)

    def order(self, generators: Generators) -> Tensor:
        passes = math.ceil(self.examples / self.pool())
        parts = [torch.randperm(self.pool(), generator=generators[0]) for _ in range(passes)]
        return torch.cat(parts)[None, : self.examples]

    def batch(
        self, indices: Tensor, generators: Generators, device: torch.device, share: slice
    ) -> Batch:
        chosen = indices[0, share]
        return self.x[chosen].to(device), self.y[chosen].to(device)

    def held_out(self, device: torch.device) -> Iterator[Batch]:
        parts = (torch.split(t, HELD_OUT_BATCH) for t in (self.x_held_out, self.y_held_out))
        for x, y in zip(*parts, strict=True):
            yield x.to(device), y.to(device)

    def losses(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Batch:
        return classify(model(inputs), targets)

    def cost_of(self, metrics: Metrics) -> float:
        """The cost after a run's last epoch: at most `chance`, which also stands for what is not
        finite, and at least half a mistake, so that it has a logarithm."""
        (loss,), (accuracy,) = metrics["held_out_loss"], metrics["accuracy"]
        if not math.isfinite(loss):
            return self.chance
        value: float
        if self.cost == "error":
            value = max(100 * (1 - accuracy), 50 / len(self.y_held_out))
        elif self.cost == "perplexity":
            value = math.exp(min(loss, 100.0))
        else:
            value = math.sqrt(loss)
        return min(value, self.chance)
