# SPDX-License-Identifier: MIT
"""The fair comparison of `sweep` for any network and any data loaders."""

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, random_split

from benchmarks.paper.config import Method, Run, Study
from benchmarks.paper.report import Report, read
from benchmarks.paper.sweep import run_study
from benchmarks.paper.task import Batch, Generators, Source, Task, classify
from benchmarks.paper.tasks import OTHER_TASKS
from benchmarks.paper.training import Machine

# The optimizer, its settings, whether p goes to 2, and where its lr is looked for.
METHODS: dict[str, tuple[str, dict[str, Any], bool, float]] = {
    "SGDM": ("SGDM", {}, False, 0.1),
    "AdamW": ("AdamW", {}, False, 0.003),
    "LPSGDM 6→2": ("LPSGDM", {"p": 6.0}, True, 0.01),
    "LPSGDM 6→2 κ=1e-4": ("LPSGDM", {"p": 6.0, "pivot": 1e-4}, True, 0.001),
    "LPSGDM p=∞": ("LPSGDM", {"p": float("inf")}, False, 0.001),
}


class LoaderTask(Task):
    """Classification of a user's data by a user's network.

    Validation data are a fifth of the training data.
    """

    make_network: Callable[[], nn.Module]
    train_loader: DataLoader[Any]
    test_loader: DataLoader[Any]

    def __init__(self, final: bool, source: Source) -> None:
        self.data: Dataset[Any] = self.train_loader.dataset
        self.others: Dataset[Any] = self.test_loader.dataset
        if not final:
            generator = torch.Generator().manual_seed(0)
            self.data, self.others = random_split(self.data, (0.8, 0.2), generator)
        self.examples = len(self.data)  # type: ignore[arg-type]  # of a dataset with a length

    def describe(self) -> str:
        return f"{self.examples} examples"

    def make_model(self, generators: Generators) -> nn.Module:
        return self.make_network()

    def batch(
        self, indices: Tensor, generators: Generators, device: torch.device, share: slice
    ) -> Batch:
        inputs, targets = self.train_loader.collate_fn(
            [self.data[i] for i in indices[0, share].tolist()]
        )
        return inputs.to(device), targets.to(device)

    def held_out(self, device: torch.device) -> Iterator[Batch]:
        loader = DataLoader(
            self.others, self.test_loader.batch_size, collate_fn=self.test_loader.collate_fn
        )
        for inputs, targets in loader:
            yield inputs.to(device), targets.to(device)

    def losses(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Batch:
        return classify(model(inputs), targets)


def compare(
    make_network: Callable[[], nn.Module],
    train_loader: DataLoader[Any],
    test_loader: DataLoader[Any],
    epochs: int,
    methods: Mapping[str, tuple[str, dict[str, Any], bool, float]] = METHODS,
    lr_schedules: Sequence[str] = ("constant", "cosine"),
    lr_trials: int = 4,
    seeds: Sequence[int] = (0, 1, 2),
    device: str = "cpu",
) -> Report:
    """Trains a network with several optimizers, each with its best lr.

    Args:
        make_network: makes a network for classification with new parameters.
        train_loader, test_loader: of pairs of inputs and classes. Only their data sets, batch size
            and collate function are used.
        lr_trials: the length of each method's grid, by factors of √10 around its usual lr.
        seeds: of the final runs. The search has one other.

    Returns:
        what `report.table` and `report.draw_overview` show.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> x = torch.randn(64, 2)
        >>> loader = DataLoader(TensorDataset(x, (x[:, 0] > 0).long()), batch_size=16)
        >>> report = compare(lambda: nn.Linear(2, 2), loader, loader, 2, lr_trials=1)
        >>> sorted({row.name for row in report.rows})  # doctest: +NORMALIZE_WHITESPACE
        ['AdamW', 'LPSGDM 6→2', 'LPSGDM 6→2 κ=1e-4', 'LPSGDM p=∞', 'SGDM']
    """
    assert train_loader.batch_size is not None
    OTHER_TASKS["own"] = type(
        "Own",
        (LoaderTask,),
        {
            "make_network": staticmethod(make_network),
            "train_loader": train_loader,
            "test_loader": test_loader,
        },
    )
    table = []
    for lr_schedule in lr_schedules:
        for name, (optimizer, settings, anneal_p, lr) in methods.items():
            lrs = tuple(lr * 10 ** ((i - lr_trials // 2) / 2) for i in range(lr_trials))
            run = Run(
                *({"name": "own"}, optimizer, lrs[0], tuple(seeds), epochs),
                batch_size=train_loader.batch_size,
                settings=settings,
                anneal_p=anneal_p,
                lr_schedule=lr_schedule,
            )
            table.append(Method(name, lrs, run))
    study = Study("own", "Your network", tuple(table), tuple(seeds), (100,), "accuracy", None, {})
    with tempfile.TemporaryDirectory() as directory:
        files = Path(directory)
        return read(run_study(study, files, files, Machine(device=device), jobs=1))
