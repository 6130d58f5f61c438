# SPDX-License-Identifier: MIT
"""A fair comparison of optimizers on anybody's network and data."""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler
from torch.utils._pytree import tree_map_only

from .._optimizer import LPSGDM
from .._schedule import CosineAnnealingP
from .._values import check_integer
from ._recorder import Recorder
from ._records import dumps, write_whole

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

    from ._pictures import Row

Measure = Callable[[nn.Module, Any], Tensor]
_FACTOR = math.sqrt(10.0)  # from one lr of a grid to the next
_EQUAL_STARTS = 1e-3  # relative: what GPUs sum in another order, or another version of PyTorch


def cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    """The losses of a classifier, for batches of inputs and classes."""
    inputs, targets = batch
    return nn.functional.cross_entropy(model(inputs), targets, reduction="none")


def accuracy(model: nn.Module, batch: Any) -> Tensor:
    """Whether each is classified right, in %, for batches of inputs and classes."""
    inputs, targets = batch
    right: Tensor = model(inputs).argmax(dim=1) == targets
    return 100.0 * right.float()


@dataclass(frozen=True)
class Method:
    """An optimizer with all its settings.

    Args:
        optimizer: its class, or a function that is called like one.
        lr: the middle of the grid of learning rates.
        settings: the other keyword arguments.
        p_end: where p goes along a cosine, step by step; None leaves p as it is.
        lr_schedule: "cosine" (to 0, step by step), "constant", or a function that takes the
            optimizer and the number of all steps and returns a scheduler, which steps after each.
    """

    optimizer: Callable[..., Optimizer]
    lr: float
    settings: Mapping[str, Any] = field(default_factory=dict)
    p_end: float | None = None
    lr_schedule: str | Callable[[Optimizer, int], LRScheduler] = "cosine"

    def __post_init__(self) -> None:
        if not 0.0 < self.lr < math.inf:
            raise ValueError(f"Invalid learning rate: {self.lr}")
        if isinstance(self.lr_schedule, str) and self.lr_schedule not in ("cosine", "constant"):
            raise ValueError(f"Invalid lr_schedule: {self.lr_schedule!r}")

    def schedulers(self, optimizer: Optimizer, steps: int) -> list[LRScheduler]:
        """What to step after each of so many steps."""
        made: list[LRScheduler] = []
        if self.p_end is not None:
            made.append(CosineAnnealingP(optimizer, steps, self.p_end))
        if not isinstance(self.lr_schedule, str):
            made.append(self.lr_schedule(optimizer, steps))
        elif self.lr_schedule == "cosine":
            made.append(CosineAnnealingLR(optimizer, steps))
        return made

    @property
    def key(self) -> str:
        """All settings but lr in words, by which a file knows what has been trained."""
        names = [
            one
            if isinstance(one, str)
            else f"{one.__module__}.{one.__qualname__}"
            if hasattr(one, "__qualname__")
            else repr(one)
            for one in (self.optimizer, self.lr_schedule)
        ]
        settings = ", ".join(f"{name}={value!r}" for name, value in self.settings.items())
        to = "" if self.p_end is None else f", p to {self.p_end:g}"
        return f"{names[0]}({settings}){to}, {names[1]} lr"


METHODS: Mapping[str, Method] = {
    "AdamW": Method(AdamW, 0.003, {"weight_decay": 0.0}),
    "SGDM": Method(SGD, 0.1, {"momentum": 0.9}),
    "LPSGDM p=6": Method(LPSGDM, 0.005, {"p": 6.0}),
    "LPSGDM p=∞": Method(LPSGDM, 0.001, {"p": math.inf}),
    "LPSGDM 6→2": Method(LPSGDM, 0.01, {"p": 6.0}, p_end=2.0, lr_schedule="constant"),
}


@dataclass(frozen=True)
class Comparison:
    """What `compare` found. A notebook shows its table.

    Attributes:
        rows: for each method its `name`, the best `lr`, whether that lies `at_edge` of all that
            were tried, the `values` of the final runs, one for each seed, and `validation`, pairs
            of each lr and the mean value there.
        label: what the values are.
        mode: "min" where smaller is better, or "max".
        reference: the method that the others are tested against.
        held_out: the data that the values are of, "test" or "validation".
    """

    rows: "list[Row]"
    methods: Mapping[str, Method]
    label: str
    mode: str
    reference: str
    seeds: tuple[int, ...]
    held_out: str

    @property
    def _digits(self) -> int:
        finite = [abs(x) for row in self.rows for x in row.values if math.isfinite(x)]
        return 1 if finite and min(finite) >= 10.0 else 3

    def table(self) -> str:
        """In Markdown: for each method the best lr and how many were tried, mean ± standard
        deviation over the seeds, and the mean difference to the reference's same seeds with its
        95 % interval (Student's t), in bold where 0 lies outside. P is the paired t-test's,
        corrected after Holm for the number of methods."""
        from ._pictures import spread
        from .statistics import difference, holm, paired_test

        (reference,) = (row for row in self.rows if row.name == self.reference)
        judged = [
            row
            for row in self.rows
            if row is not reference and all(map(math.isfinite, row.values + reference.values))
        ]
        tested = judged if len(self.seeds) > 1 else []
        found = holm([paired_test(row.values, reference.values) for row in tested])
        ps = dict(zip((row.name for row in tested), found, strict=True))
        head = f"{self.held_out} {self.label}, {len(self.seeds)} seeds"
        lines = [
            f"| method | lr schedule | best lr (of) | {head} | minus {self.reference} | P |",
            "|---|---|---|---|---|---|",
        ]
        for row in self.rows:
            schedule = self.methods[row.name].lr_schedule
            edge = "*" if row.at_edge else ""
            minus, p = "", ""
            if row.name in ps:
                minus = difference(row.values, reference.values).text(self._digits)
                p = f"{ps[row.name]:.2g}"
            cells = [
                row.name,
                schedule if isinstance(schedule, str) else getattr(schedule, "__name__", "own"),
                f"{row.lr:.3g}{edge} ({len(row.validation)})",
                spread(row.values, self._digits),
                minus,
                p,
            ]
            lines.append("| " + " | ".join(cells) + " |")
        if any(row.at_edge for row in self.rows):
            lines += ["", "\\* the first or last that was tried, so perhaps not the best."]
        if self.held_out == "validation":
            lines += ["", "These data have chosen lr, which flatters all methods: give test data."]
        return "\n".join(lines)

    _repr_markdown_ = table

    def to_frame(self) -> "pandas.DataFrame":
        """A pandas.DataFrame of the final runs: method, lr, seed and value."""
        import pandas

        rows = [
            (row.name, row.lr, seed, value)
            for row in self.rows
            for seed, value in zip(self.seeds, row.values, strict=True)
        ]
        return pandas.DataFrame(rows, columns=["method", "lr", "seed", "value"])

    def plot(self) -> "Figure":
        """Draws the search for lr, the training losses, the final values and the size of the steps;
        the names beside the values are the legend of all four.

        Returns:
            a matplotlib.figure.Figure, which a notebook shows if it is a cell's last value.
        """
        import matplotlib.pyplot as plt

        from ._pictures import draw_curves, draw_values
        from ._style import styles

        looks = styles(row.name for row in self.rows)
        figure, ((search, losses), (values, steps)) = plt.subplots(
            2, 2, figsize=(9, 6), layout="constrained"
        )
        for row in self.rows:
            color, line = looks[row.name]
            lrs, found = zip(*row.validation, strict=True)
            search.plot(lrs, found, line, color=color)
            best = [row.lr], [found[lrs.index(row.lr)]]
            search.plot(*best, "o", color=color)
        loss_like = self.mode == "min" and all(
            y > 0 for row in self.rows for _, y in row.validation
        )
        search.set(
            xscale="log",
            yscale="log" if loss_like else "linear",
            xlabel="lr (dot: chosen)",
            ylabel=f"validation {self.label}",
        )
        search.grid(alpha=0.3)
        draw_curves(losses, self.rows, "loss")
        losses.set(yscale="log", ylabel="training loss")
        draw_values(values, self.rows, f"{self.held_out} {self.label}", self._digits)
        values.invert_yaxis()
        draw_curves(steps, self.rows, "delta")
        steps.set(yscale="log", ylabel="mean |Δθ| of the epoch's last step")
        plt.close(figure)  # it is shown by who gets it, not by pyplot a second time
        return figure


def compare(
    model: Callable[[], nn.Module],
    data: Sequence[Iterable[Any]],
    methods: Mapping[str, Method] = METHODS,
    *,
    epochs: int,
    loss: Measure = cross_entropy,
    metric: Measure | None = None,
    mode: str | None = None,
    lr_trials: int = 3,
    extend: int = 4,
    seeds: Sequence[int] = (0, 1, 2),
    tuning_seeds: Sequence[int] = (100,),
    reference: str | None = None,
    device: str | torch.device = "cpu",
    file: str | Path | None = None,
    progress: bool = True,
) -> Comparison:
    r"""Trains a network with several optimizers, each with its best lr, and tests the differences.

    Each method is trained with `tuning_seeds` at `lr_trials` learning rates, by factors of √10
    around its own. While the best on validation data is the first or the last, the next one beyond
    is tried, up to `extend` times. At the best it is trained again with other `seeds`, and only
    these runs see the test data. The same seed means the same initial weights and the same order
    of the data for all methods.

    Args:
        model: makes the network with new weights, by torch's random generator.
        data: batches for training, for validation and for the test, each a DataLoader or anything
            else to go through again and again; that for training has a length. Without test data
            the final values are of the validation data.
        methods: by name; `METHODS` unless told otherwise.
        epochs: how often a run goes through the training data.
        loss: a function of the network and a batch, which returns the batch's loss, or one for each
            example. Batches are what `data` give; the default takes pairs of inputs and classes.
        metric: a function of the same kind that decides about lr and is reported; the loss if it is
            None. Values of examples are averaged over all, values of batches over batches.
        mode: "min" or "max", whether a small or a large metric is better. To be given with it.
        lr_trials: the number of learning rates at first.
        extend: how many more at most, when the best is the first or the last.
        seeds: of the final runs.
        tuning_seeds: of the search. Others than `seeds`, so that nobody is judged where it was
            chosen.
        reference: the name of the method that the others are tested against; the first one if it is
            None.
        device: where to train; tensors of a batch are moved there, in lists, tuples and dicts too.
        file: a JSON file, where each run is kept as soon as it is over. Called again with the same
            file, `compare` goes on where it was. A run is known by all its settings; functions are
            known by their names, so change the name with what they do.
        progress: whether to show a bar, in a notebook or in a terminal.

    Raises:
        ValueError, TypeError: for arguments out of range, for a file of another comparison (other
            losses before training, other length), and where runs of the same seed do not begin
            alike, because the network or the data are random in a way that torch.manual_seed does
            not reach.

    Example:
        >>> x = torch.linspace(-1.0, 1.0, 64)[:, None]
        >>> batches = [(x, (x[:, 0] > 0).long())]
        >>> sgd = Method(torch.optim.SGD, 1.0)
        >>> found = compare(
        ...     lambda: nn.Linear(1, 2), (batches, batches), {"SGD": sgd}, epochs=5,
        ...     metric=accuracy, mode="max", extend=0, progress=False,
        ... )
        >>> [row.name for row in found.rows], found.rows[0].values
        (['SGD'], [100.0, 100.0, 100.0])
    """
    from tqdm.auto import tqdm

    from ._pictures import Row

    if (metric is None) != (mode is None) or mode not in (None, "min", "max"):
        raise ValueError("mode must be 'min' or 'max' where metric is given, and only there")
    if not methods or (reference is not None and reference not in methods):
        raise ValueError(f"reference must be one of {list(methods)}, not {reference!r}")
    if len(data) not in (2, 3):
        raise ValueError(f"data must be for training, validation and test, not {len(data)}")
    for name, given in (("seeds", seeds), ("tuning_seeds", tuning_seeds)):
        if not given or len({*given}) < len(given):
            raise ValueError(f"{name} must be different numbers, at least one")
    epochs = check_integer("epochs", epochs, 1)
    lr_trials = check_integer("lr_trials", lr_trials, 1)
    extend = check_integer("extend", extend, 0)
    mode = mode or "min"
    runs = _Runs(model, data, epochs, loss, metric or loss, torch.device(device), file)
    quiet = {} if progress else {"disable": True}  # so that TQDM_DISABLE counts
    part = "test" if len(data) == 3 else "validation"
    rows = []
    total = len(methods) * (lr_trials * len(tuning_seeds) + len(seeds)) * epochs
    with (
        torch.random.fork_rng(),
        tqdm(total=total, unit="epoch", mininterval=1.0, **quiet) as bar,
    ):
        runs.begin(tuning_seeds[0], bar)
        for name, method in methods.items():

            def result(k: int, method: Method = method) -> tuple[float, tuple[float, float]]:
                """The value of the k-th lr, and its rank: larger is better."""
                lr = _lr(method, k)
                found = [runs.of(method, lr, seed, "validation") for seed in tuning_seeds]
                value, end = (fmean(float(one[x]) for one in found) for x in ("value", "loss"))
                sign = 1.0 if mode == "max" else -1.0
                return value, (sign * value, -end) if math.isfinite(value) else (-math.inf, 0.0)

            bar.set_description(f"lr of {name}")
            first = -(lr_trials // 2)
            found = {k: result(k) for k in range(first, first + lr_trials)}
            for _ in range(extend):
                best = max(found, key=lambda k: found[k][1])
                beyond = {min(found): min(found) - 1, max(found): max(found) + 1}.get(best)
                if beyond is None:
                    break
                bar.total += len(tuning_seeds) * epochs
                found[beyond] = result(beyond)
            best = max(found, key=lambda k: found[k][1])
            bar.set_description(name)
            final = [runs.of(method, _lr(method, best), seed, part) for seed in seeds]
            rows.append(
                Row(
                    name,
                    _lr(method, best),
                    len(found) > 1 and best in (min(found), max(found)),
                    [float(one["value"]) for one in final],
                    _merged([one["history"] for one in final]),
                    sorted((_lr(method, k), value) for k, (value, _) in found.items()),
                )
            )
    label = (metric or loss).__name__.replace("_", " ")
    chosen = reference or next(iter(methods))
    return Comparison(rows, methods, label, mode, chosen, tuple(seeds), part)


def _lr(method: Method, k: int) -> float:
    return method.lr * _FACTOR**k


def _merged(histories: list[dict[str, list[Any]]]) -> dict[str, list[list[Any]]]:
    """The histories of runs by epoch. One that ended early, because it diverged, is NaN from then
    on."""
    length = max(len(column) for history in histories for column in history.values())
    return {
        name: [
            [float(h[name][epoch]) if epoch < len(h[name]) else math.nan for h in histories]
            for epoch in range(length)
        ]
        for name in histories[0]
    }


class _Runs:
    """Trains runs, or takes them from the file."""

    def __init__(
        self,
        model: Callable[[], nn.Module],
        data: Sequence[Iterable[Any]],
        epochs: int,
        loss: Measure,
        metric: Measure,
        device: torch.device,
        file: str | Path | None,
    ) -> None:
        self.model, self.epochs, self.loss, self.metric = model, epochs, loss, metric
        self.train, self.validation, *rest = data
        self.test = rest[0] if rest else self.validation
        self.steps: int = len(self.train)  # type: ignore[arg-type]  # what has no length raises
        self.device = device
        self.file = None if file is None else Path(file)
        self.runs: dict[str, Any] = {}
        self.start: dict[str, Any] = {}
        self.losses: dict[int, float] = {}  # the first one of each seed
        self.bar: Any = None

    def begin(self, seed: int, bar: Any) -> None:
        """Reads the file, if there is one, and checks that it is of this comparison."""
        self.bar = bar
        network = self._network(seed)
        self.start = {"epochs": self.epochs, "steps": self.steps}
        for name, batches in (("validation", self.validation), ("test", self.test)):
            values = [self._mean(network, measure, batches) for measure in (self.loss, self.metric)]
            self.start |= {f"{name} loss": values[0], f"{name} value": values[1]}
        with torch.no_grad():
            first = next(iter(self._batches(seed, 0)))
            self.start["training loss"] = self.loss(network, first).mean().item()
        if self.file is None or not self.file.exists():
            return
        record = json.loads(self.file.read_text(encoding="utf-8"))
        theirs = record["start"]
        for name, value in self.start.items():
            if not math.isclose(float(theirs[name]), value, rel_tol=_EQUAL_STARTS):
                raise ValueError(
                    f"{self.file} is of another comparison: {name} at the start: {theirs[name]} "
                    f"there, {value} here"
                )
        self.runs = record["runs"]

    def of(self, method: Method, lr: float, seed: int, part: str) -> dict[str, Any]:
        """A run's value and loss on held-out data, and its history."""
        key = f"{method.key}, lr {lr:.6g}, seed {seed}, {part}"
        if key in self.runs:
            self.bar.update(self.epochs)
        else:
            self.runs[key] = self._train(method, lr, seed, part)
            self._keep()
        run: dict[str, Any] = self.runs[key]
        first = self.losses.setdefault(seed, float(run["start"]))
        if not math.isclose(first, float(run["start"]), rel_tol=_EQUAL_STARTS):
            raise ValueError(
                f"runs of seed {seed} do not begin alike: their first losses are {first} and "
                f"{run['start']}. Let all that is random in the network and the data be torch's."
            )
        return run

    def _keep(self) -> None:
        if self.file is not None:
            text = dumps({"start": self.start, "runs": self.runs}, indent=1)
            write_whole(self.file, lambda part: part.write_text(text, encoding="utf-8"))

    def _network(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return self.model().to(self.device)

    def _batches(self, seed: int, epoch: int) -> Iterator[Any]:
        """Those of an epoch: their order, and all else that is random, depends on these alone."""
        number = 1_000_003 * seed + epoch + 1
        torch.manual_seed(number)
        generator = getattr(self.train, "generator", None)
        if isinstance(generator, torch.Generator):
            generator.manual_seed(number)
        for batch in self.train:
            yield self._moved(batch)

    def _moved(self, batch: Any) -> Any:
        return tree_map_only(Tensor, lambda x: x.to(self.device), batch)

    def _train(self, method: Method, lr: float, seed: int, part: str) -> dict[str, Any]:
        network = self._network(seed)
        optimizer = method.optimizer(network.parameters(), lr=lr, **method.settings)
        schedulers = method.schedulers(optimizer, self.epochs * self.steps)
        recorder = Recorder(optimizer, every=self.steps)  # the last one of each epoch
        history: dict[str, list[Any]] = {"loss": [], "delta": []}
        start = math.nan
        for epoch in range(self.epochs):
            total = torch.zeros((), device=self.device)
            for i, batch in enumerate(self._batches(seed, epoch)):
                optimizer.zero_grad()
                loss = self.loss(network, batch).mean()
                torch.autograd.backward(loss)
                optimizer.step()
                for scheduler in schedulers:
                    scheduler.step()
                total += loss.detach()
                if epoch == i == 0:
                    start = loss.item()
            mean = total.item() / self.steps
            history["loss"].append(mean)
            history["delta"].append(recorder.records[-1].delta)
            if not math.isfinite(mean):
                self.bar.update(self.epochs - epoch)
                break
            self.bar.update()
        batches = self.test if part == "test" else self.validation
        finite = math.isfinite(mean)
        return {
            "value": self._mean(network, self.metric, batches) if finite else math.nan,
            "loss": self._mean(network, self.loss, batches) if finite else math.nan,
            "start": start,
            "history": history,
        }

    @torch.no_grad()
    def _mean(self, network: nn.Module, measure: Measure, batches: Iterable[Any]) -> float:
        network.eval()
        total, count = 0.0, 0
        for batch in batches:
            values = measure(network, self._moved(batch))
            total += float(values.sum())
            count += values.numel()
        network.train()
        return total / count
