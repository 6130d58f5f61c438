# SPDX-License-Identifier: MIT
"""What is run, as data: a study is a TOML file of `configs`, which expands into runs.

A study names what all its methods share (`[run]`, `[run.task]`), its seeds, and its methods:

    title = "..."
    seeds = [0, 1, 2]            # of the final runs, which see the test data
    tuning_seeds = [100]         # of the search for lr, on validation data
    [run]
    epochs = 30
    ...                          # the fields of `Run`
    [methods."LPSGDM {p:g}→2"]   # one method for each p of the list below
    optimizer = "LPSGDM"
    anneal_p = true
    settings.p = [3.0, 6.0]
    lr = [0.001, 0.01]           # the grid
    [small]                      # what differs in the reduced version

A list among a method's settings, or as its lr_schedule, stands for one method each. A method may
override what `[run]` says.
"""

import hashlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.paper.records import dumps

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

CONFIGS = Path(__file__).parent / "configs"


@dataclass(frozen=True)
class Run:
    """One training: all that decides its numbers.

    Attributes:
        task: its `name` (see `tasks.make_task`) and settings.
        optimizer: a name of `methods.OPTIMIZERS`; `settings` are its keyword arguments without lr.
        seeds: one network for each, trained side by side; only some tasks take more than one.
        anneal_p: whether p goes from that of the settings to `p_end` (equation 19).
        lr_schedule: "constant" or "cosine" (to 0), both after `warmup` epochs of linear increase.
        clip_norm: the norm to which a larger gradient of all parameters together is scaled.
        every: whether lr and p change with every "step" or "epoch".
        final: whether the data held out are the test data; otherwise validation data.
        evaluate_every: the epochs from one evaluation on held-out data to the next; the last epoch
            always has one.
        amp: "none", "bfloat16" or "float16", the dtype of autocast.
        snapshots: the numbers of epochs after which the parameters are kept.
    """

    task: Mapping[str, Any]
    optimizer: str
    lr: float
    seeds: tuple[int, ...]
    epochs: int
    batch_size: int
    settings: Mapping[str, Any] = field(default_factory=dict)
    anneal_p: bool = False
    p_end: float = 2.0
    lr_schedule: str = "constant"
    warmup: float = 0
    clip_norm: float | None = None
    every: str = "step"
    final: bool = True
    evaluate_every: int = 1
    amp: str = "none"
    channels_last: bool = False
    snapshots: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name, allowed in (
            ("lr_schedule", ("constant", "cosine")),
            ("every", ("step", "epoch")),
            ("amp", ("none", "bfloat16", "float16")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, not {getattr(self, name)!r}")

    @property
    def key(self) -> str:
        """A name for this run, the same in every study that has it."""
        return hashlib.sha256(dumps(asdict(self)).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Method:
    """An optimizer with all its settings except lr, for which it has a grid.

    Attributes:
        run: the run at the first lr of the grid; its seeds are those of the final runs.
    """

    name: str
    lrs: tuple[float, ...]
    run: Run

    def at(self, lr: float, seeds: Sequence[int], final: bool) -> Run:
        """The run with this lr and these seeds."""
        return replace(self.run, lr=lr, seeds=tuple(seeds), final=final)


@dataclass(frozen=True)
class Study:
    """A comparison of methods.

    Attributes:
        measure: what decides about lr and is reported: "accuracy" or "loss" on held-out data.
        reference: the method that the others are tested against, if one is named.
        figures: what `report` draws, by the name of the picture: its `kind`, and the `methods` and
            the `lr_schedule` in it unless they are all.
    """

    name: str
    title: str
    methods: tuple[Method, ...]
    seeds: tuple[int, ...]
    tuning_seeds: tuple[int, ...]
    measure: str
    reference: str | None
    figures: Mapping[str, Mapping[str, Any]]


def _merge(table: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(table)
    for key, value in changes.items():
        old = merged.get(key)
        both = isinstance(old, dict) and isinstance(value, Mapping)
        merged[key] = _merge(old, value) if both and isinstance(old, dict) else value
    return merged


def _middle(values: Sequence[float], count: int | None) -> tuple[float, ...]:
    if count is None or count >= len(values):
        return tuple(values)
    start = (len(values) - count) // 2
    return tuple(values[start : start + count])


def _expand(
    name: str, table: dict[str, Any], seeds: tuple[int, ...], lr_trials: int | None
) -> Iterator[Method]:
    """The methods that a table stands for: the product of its lists, except lr's."""
    table = dict(table)
    lr = table.pop("lr")
    lrs = _middle(lr if isinstance(lr, list) else [lr], lr_trials)
    settings = {"lr_schedule": table.pop("lr_schedule", "constant"), **table.pop("settings", {})}
    choices = [value if isinstance(value, list) else [value] for value in settings.values()]
    table["snapshots"] = tuple(table.get("snapshots", ()))
    for values in product(*choices):
        chosen = dict(zip(settings, values, strict=True))
        label = name.format_map(chosen).replace("inf", "∞")
        lr_schedule = chosen.pop("lr_schedule")
        run = Run(lr=lrs[0], seeds=seeds, lr_schedule=lr_schedule, settings=chosen, **table)
        yield Method(label, lrs, run)


def load(file: Path, small: bool = False) -> Study:
    """The study of a TOML file, or its reduced version.

    In `[small]`, `lr_trials` keeps that many values in the middle of every grid, and a method is
    left out by `skip = true`.
    """
    with open(file, "rb") as stream:
        table = tomllib.load(stream)
    changes = table.pop("small", {})
    if small:
        table = _merge(table, changes)
    seeds = tuple(table.get("seeds", (0,)))
    methods = tuple(
        method
        for name, own in table["methods"].items()
        if not own.pop("skip", False)
        for method in _expand(name, _merge(table["run"], own), seeds, table.get("lr_trials"))
    )
    return Study(
        file.stem,
        table["title"],
        methods,
        seeds,
        tuple(table.get("tuning_seeds", (100,))),
        table.get("measure", "accuracy"),
        table.get("reference"),
        table.get("figures", {}),
    )


def find(name: str) -> Path:
    """The file of a study that is given by its path or by its name in `configs`."""
    file = Path(name)
    return file if file.suffix == ".toml" else CONFIGS / f"{name}.toml"
