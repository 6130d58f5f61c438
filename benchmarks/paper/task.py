# SPDX-License-Identifier: MIT
"""What is trained: a network with its data. The loop of `training` knows no more than `Task`."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Batch = tuple[Tensor, Tensor]
Generators = Sequence[torch.Generator]
EVERYTHING = slice(None)


@dataclass(frozen=True)
class Source:
    """Where data lie on this machine: `data` is the directory that the user named, if any; `cache`
    is for what is downloaded or decoded."""

    data: Path | None = None
    cache: Path = Path("build/paper/data")

    def runs(self, output: Path) -> Path:
        """Where the files of runs on these data lie: not beside those of another directory."""
        if self.data is None:
            return output / "runs"
        path = str(self.data.resolve())
        return output / f"runs-{hashlib.sha256(path.encode()).hexdigest()[:8]}"


class Task(ABC):
    """A network with training data, of which an epoch has `examples`, and data held out.

    Networks of several seeds may be trained side by side. Then indices, losses and so on have one
    row for each; a task that can't do that has `stackable = False` and gets one generator.
    """

    stackable = False
    examples: int

    @abstractmethod
    def __init__(self, final: bool, source: Source, **settings: Any) -> None:
        """Reads the data; what is held out are the test data if `final`, else validation data."""

    @abstractmethod
    def describe(self) -> str:
        """Says which data these are, for titles."""

    def fingerprint(self) -> str:
        """Tells data of the same description apart, where they may differ between machines."""
        return ""

    @abstractmethod
    def make_model(self, generators: Generators) -> nn.Module:
        """The network at its start. torch's own generator has the first one's seed."""

    def order(self, generators: Generators) -> Tensor:
        """The indices (seeds, examples) of an epoch's examples."""
        return torch.stack([torch.randperm(self.examples, generator=g) for g in generators])

    @abstractmethod
    def batch(
        self, indices: Tensor, generators: Generators, device: torch.device, share: slice
    ) -> Batch:
        """Inputs and targets of the examples (seeds, n), of which a process takes its `share`.

        What is random depends on all examples, so that the shares of several processes are
        together what a single process gets.
        """

    @abstractmethod
    def held_out(self, device: torch.device) -> Iterator[Batch]:
        """Batches of the data held out."""

    @abstractmethod
    def losses(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Batch:
        """Every example's loss and whether it is predicted right, both (seeds, n)."""


def classify(logits: Tensor, targets: Tensor) -> Batch:
    """`Task.losses` of a single network's logits (n, classes)."""
    losses = F.cross_entropy(logits.float(), targets, reduction="none")
    return losses[None], (logits.argmax(dim=1) == targets)[None]
