# SPDX-License-Identifier: MIT
"""The figures as tables and pictures."""

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.speed import targets
from benchmarks.speed.footprint import Memory, State
from benchmarks.speed.step import LISTS
from benchmarks.speed.timing import DISTURBED, Record, Setting
from benchmarks.speed.training import Times
from lpsgd.experiments._style import style

OURS = "LPSGDM p=4"
BYTE = "LPSGDM one byte"
PEERS = ("SGD fused", "SGD foreach", "SGD", "AdamW fused", "AdamW foreach", "Lion")
EAGER = ("eager LPSGDM", "eager LPSGDM for-loop", "eager LPSGDM compiled")
WITHOUT_MOMENTUM = ("plain SGD fused", "plain SGD foreach", "plain SGD", "eager LPSGD")
SETTING = [field.name for field in fields(Setting)]


@dataclass(frozen=True)
class Results:
    """All that was measured."""

    machine: dict[str, Any]
    records: list[Record]
    training: list[Times]
    memory: list[Memory]
    package: dict[str, Any]
    states: list[State]

    @classmethod
    def from_json(cls, plain: dict[str, Any]) -> "Results":
        """What `asdict` made of one."""
        return cls(
            plain["machine"],
            [Record(Setting(**one.pop("setting")), **one) for one in plain["records"]],
            [Times(**one) for one in plain["training"]],
            [Memory(**one) for one in plain["memory"]],
            plain["package"],
            [State(**one) for one in plain["states"]],
        )


def describe(setting: Setting) -> list[str]:
    return [str(value) for value in asdict(setting).values()]


def table(title: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """In Markdown, aligned for those who read it as it is."""
    lines = [head, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    padded = (map(str.ljust, line, widths) for line in lines)
    text = "\n".join(f"| {' | '.join(line)} |" for line in padded)
    return f"{title}\n\n{text}\n" if len(lines) > 2 else ""


def targets_table(records: Iterable[Record]) -> str:
    """A row for each setting and optimizer, a column for each peer."""
    outcomes = list(targets.outcomes(records))
    peers = list(dict.fromkeys(one.peer for one in outcomes))

    def cell(one: targets.Outcome) -> str:
        ratio = f"{one.ratio.median:.2f} ± {one.ratio.margin:.2f}"
        narrow = " ~" if one.is_narrow else ""
        return (ratio if one.is_reached else f"**{ratio}**") + f"{narrow} / {one.at_most:.2f}"

    rows = []
    for (own, setting), group in groupby(outcomes, lambda one: (one.own, one.setting)):
        same = list(group)
        cells = {one.peer: cell(one) for one in same}
        figures = [cells.get(peer, "") for peer in peers]
        rows.append([own, *describe(setting), f"{same[0].microseconds:.0f}", *figures])
    reached = sum(one.is_reached for one in outcomes)
    narrow = sum(one.is_narrow for one in outcomes)
    title = (
        f"**Targets**: {reached} of {len(outcomes)} are reached; **bold** ones are missed. "
        f"{narrow} (~) are closer than the uncertainty of the median (± half its 95 % interval)."
    )
    return table(title, ["", *SETTING, "µs", *peers], rows)


def ratio_table(
    title: str, records: Iterable[Record], peers: Sequence[str], own: str = OURS
) -> str:
    """Ratios of a contender's time to that of its peers, with their quartiles."""

    def cell(record: Record, peer: str) -> str:
        if peer not in record.seconds:
            return ""
        ratio = record.ratio(own, peer)
        return f"{ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f})"

    rows = [
        [
            *describe(record.setting),
            f"{record.microseconds(own):.0f}",
            *(cell(record, peer) for peer in peers),
        ]
        for record in records
        if own in record.seconds
    ]
    used = [i for i in range(5 + len(peers)) if any(row[i] for row in rows)]
    head = [*SETTING, f"{own}, µs", *peers]
    return table(title, [head[i] for i in used], [[row[i] for i in used] for row in rows])


def bound_table(records: Iterable[Record]) -> str:
    """The share of the speed that the fastest loop over the same memory reaches."""
    rows = []
    for record in records:
        for own, accesses, bound in (
            (OURS, 5, ("memory", "SGD fused")),
            ("LPSGD p=4", 3, ("memory, no momentum", "plain SGD fused")),
        ):
            setting = record.setting
            if setting.elements >= 10**6 and {own, *bound} <= record.seconds.keys():
                size = setting.elements * accesses * getattr(torch, setting.dtype).itemsize
                ratio = record.ratio(own, *bound)
                quartiles = f"({100 / ratio.high:.0f} to {100 / ratio.low:.0f})"
                speed = f"{size / record.microseconds(own) * 1e-3:.1f}"
                row = [own, *describe(setting), speed, f"{100 / ratio.median:.0f} % {quartiles}"]
                rows.append(row)
    head = ["", *SETTING, "GB/s", "of the bound"]
    return table("**The bound of memory**: the faster of a plain loop and SGD fused", head, rows)


def parts_table(records: Iterable[Record]) -> str:
    """What a step consists of, as differences of times of one round."""
    parts = {
        "step()": (OURS, None),
        "Python": (OURS, "C step"),
        "gathering in C": ("C step", "C step of lists"),
        "checks in C": ("C checks of lists", None),
        "kernel": ("C step of lists", "C checks of lists"),
    }

    def cell(record: Record, whole: str, rest: str | None) -> str:
        times = record.seconds[whole]
        others = record.seconds[rest] if rest else [0.0] * len(times)
        return f"{statistics.median(a - b for a, b in zip(times, others, strict=True)) * 1e6:.1f}"

    return table(
        f"**step() of {OURS} in µs**, by part",
        [*SETTING, *parts],
        [
            [*describe(record.setting), *(cell(record, *part) for part in parts.values())]
            for record in records
            if "C step" in record.seconds
        ],
    )


def training_table(training: Iterable[Times]) -> str:
    rows = [
        [
            one.task,
            str(one.threads),
            one.optimizer,
            *(f"{value:.2f}" for value in one.milliseconds()),
            f"{100 * one.share():.1f} %",
        ]
        for one in training
    ]
    head = ["network", "threads", "optimizer", "forward + backward, ms", "step(), ms", "its share"]
    return table("**Whole training steps**", head, rows)


def memory_table(memory: Iterable[Memory]) -> str:
    rows = [
        [
            one.list,
            one.optimizer,
            f"{one.parameters / 2**20:.1f}",
            f"{one.temporaries / 2**20:.1f}",
            f"{one.temporaries / one.parameters:.2f}",
        ]
        for one in memory
    ]
    return table(
        "**Peak memory of a step** above the level before it (the kernel's VmHWM)",
        ["list", "optimizer", "parameters, MiB", "temporaries, MiB", "of the parameters"],
        rows,
    )


def states_table(states: Iterable[State]) -> str:
    rows = [
        [one.dtype, one.optimizer, f"{one.state:.2f}", f"{one.peak:.2f}"]
        if not one.error
        else [one.dtype, one.optimizer, one.error, ""]
        for one in states
    ]
    return table(
        "**Bytes a parameter**: the state's tensors, and the peak of training (VmHWM)",
        ["parameters", "optimizer", "state", "parameters, gradients, state and temporaries"],
        rows,
    )


def write(results: Results) -> str:
    """All tables."""
    plain = {one.setting: one for one in results.records if one.setting.list in LISTS}
    wide = [one for one in plain.values() if one.setting.dtype == "float32"]
    fresh = [one for one in wide if one.setting.caches == "fresh"]
    others = [one for one in plain.values() if one.setting.dtype != "float32"]
    huge = [one for one in results.records if one.setting.elements >= 10**9]
    disturbed = "; ".join(
        f"{', '.join(describe(one.setting))}: {one.others:.2f}"
        for one in results.records
        if one.others >= DISTURBED
    )
    sections = [
        ", ".join(f"{name}: {value}" for name, value in results.machine.items()) + "\n",
        targets_table(results.records),
        ratio_table(f"**{OURS}'s time / peer's time**, median (quartiles)", fresh, PEERS),
        ratio_table(f"**{OURS} / eager**: PyTorch's operations", fresh, EAGER),
        ratio_table(f"**Other p**: {OURS} / another", fresh, ("LPSGDM p=2", "LPSGDM p=inf")),
        ratio_table(f"**Momentum in one byte** / {OURS}, peers", fresh, (OURS, *PEERS), BYTE),
        ratio_table("**Without momentum**", fresh, WITHOUT_MOMENTUM, "LPSGD p=4"),
        ratio_table("**Other dtypes**", others, (*PEERS, "eager LPSGDM")),
        ratio_table("**Other caches**", [one for one in wide if one not in fresh], PEERS),
        ratio_table("**Huge**", huge, PEERS),
        bound_table(plain.values()),
        parts_table(results.records),
        training_table(results.training),
        memory_table(results.memory),
        states_table(results.states),
        *(f"**{name}**: {value}\n" for name, value in results.package.items()),
        f"Other processes used more than {DISTURBED} CPUs during: {disturbed}.\n" * bool(disturbed),
    ]
    return "\n".join(filter(None, sections))


# Who is drawn: four in the bars, and the bound and ours beside them in the lines.
HATCHES = {"-": None, "--": "///", ":": "..."}
BARS = ("SGD fused", "AdamW fused", "SGD foreach", "eager LPSGDM")
LINES = (OURS, *BARS, "memory")


def _select(records: Iterable[Record], **values: object) -> list[Record]:
    """The records whose setting has these values."""
    return [
        one
        for one in records
        if all(getattr(one.setting, name) == value for name, value in values.items())
    ]


def _by_threads(records: Sequence[Record]) -> list[tuple[int, list[Record]]]:
    """Those with the fewest threads, and those with the most if that is another number."""
    numbers = {one.setting.threads for one in records}
    return [(n, _select(records, threads=n)) for n in sorted({min(numbers), max(numbers)})]


def _threads(number: int) -> str:
    return f"{number} thread{'s' * (number > 1)}"


def draw_bars(records: Sequence[Record]) -> Figure:
    """Peers' times in each list, as multiples of LPSGDM's."""
    panels = _by_threads(records)
    names = [name for name in BARS if any(name in one.seconds for one in records)]
    width = 0.8 / len(names)
    figure = Figure(figsize=(8, 2.8 * len(panels)), layout="constrained")
    subplots = figure.subplots(len(panels), sharex=True, sharey=True, squeeze=False)[:, 0]
    for axes, (threads, same) in zip(subplots, panels, strict=True):
        for i, name in enumerate(names):
            at = [j for j, record in enumerate(same) if name in record.seconds]
            color, line = style(name)
            axes.bar(
                [j + (i - len(names) / 2) * width for j in at],
                [same[j].ratio(name, OURS).median - 1 for j in at],
                width=width,
                bottom=1,
                align="edge",
                label=name,
                facecolor=color,
                edgecolor="white",
                linewidth=0,
                hatch=HATCHES[line],
            )
        axes.axhline(1, color="black", linewidth=1)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_xticks(range(len(same)), [record.setting.list for record in same], fontsize=9)
        axes.set_ylabel(f"time / that of {OURS}")
        axes.set_title(_threads(threads), loc="left")
        axes.grid(axis="y", alpha=0.3)
    figure.legend(*subplots[0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    return figure


def _draw_lines(
    axes: Axes,
    records: Sequence[Record],
    x: Callable[[Setting], int],
    y: Callable[[Record, str], float],
) -> None:
    """A line for every contender that all records have."""
    ordered = sorted(records, key=lambda one: x(one.setting))
    for name in LINES:
        if all(name in one.seconds for one in ordered):
            color, line = style(name)
            axes.plot(
                [x(one.setting) for one in ordered],
                [y(one, name) for one in ordered],
                marker=".",
                linestyle=line,
                color=color,
                label=name,
            )
    axes.grid(alpha=0.3)


def _draw_scale(
    records: Sequence[Record],
    x: tuple[str, Callable[[Setting], int]],
    y: tuple[str, Callable[[Record, str], float]],
) -> Figure:
    """How the time of a list's part depends on the size of the list."""
    panels = _by_threads(records)
    figure = Figure(figsize=(5.5 * len(panels), 4.5), layout="constrained")
    subplots = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (threads, same) in zip(subplots, panels, strict=True):
        _draw_lines(axes, same, x[1], y[1])
        axes.set(xscale="log", yscale="log", xlabel=f"{x[0]}, {_threads(threads)}")
    subplots[0].set_ylabel(y[0])
    figure.legend(
        *subplots[0].get_legend_handles_labels(), loc="outside upper center", ncols=6, fontsize=9
    )
    return figure


def draw_sizes(records: Sequence[Record], caches: dict[str, int]) -> Figure:
    """Time per element over the elements of one tensor."""

    def nanoseconds(record: Record, name: str) -> float:
        return record.microseconds(name) * 1e3 / record.setting.elements

    figure = _draw_scale(
        records,
        ("elements", lambda setting: setting.elements),
        ("ns per element", nanoseconds),
    )
    for axes in figure.axes:
        top = axes.get_xaxis_transform()
        for name, size in caches.items():
            elements = size / 12  # of a parameter, its gradient and its momentum, each 4 bytes
            axes.axvline(elements, color="0.7", linewidth=1, zorder=0)
            axes.text(elements, 0.98, f"{name} ", transform=top, ha="right", va="top")
    return figure


def draw_tensors(records: Sequence[Record]) -> Figure:
    """Time per tensor over the number of tensors, each of 64 elements."""

    def microseconds(record: Record, name: str) -> float:
        return record.microseconds(name) / (record.setting.elements // 64)

    return _draw_scale(
        records,
        ("tensors of 64 elements", lambda setting: setting.elements // 64),
        ("µs per tensor", microseconds),
    )


def draw_threads(records: Sequence[Record]) -> Figure:
    """How many times faster some threads are than one."""
    lists = list(dict.fromkeys(one.setting.list for one in records))
    lists = [name for name in lists if len(_select(records, list=name)) > 1] or lists
    figure = Figure(figsize=(3.7 * len(lists), 4), layout="constrained")
    subplots = figure.subplots(1, len(lists), sharey=True, squeeze=False)[0]
    for axes, name in zip(subplots, lists, strict=True):
        same = _select(records, list=name)
        first = min(same, key=lambda one: one.setting.threads)

        def speedup(record: Record, contender: str, first: Record = first) -> float:
            return first.microseconds(contender) / record.microseconds(contender)

        numbers = sorted({one.setting.threads for one in same})
        axes.plot(numbers, [n / numbers[0] for n in numbers], ":", color="0.5", label="ideal")
        _draw_lines(axes, same, lambda setting: setting.threads, speedup)
        axes.set_xticks(numbers)
        axes.set_xlabel(f"threads, {name}")
    subplots[0].set_ylabel(f"speed / that of {_threads(min(one.setting.threads for one in same))}")
    figure.legend(
        *subplots[0].get_legend_handles_labels(), loc="outside upper center", ncols=7, fontsize=9
    )
    return figure


def draw(results: Results, directory: Path) -> None:
    """Writes the pictures for which there are figures."""
    float32 = _select(results.records, dtype="float32")
    fresh = _select(float32, caches="fresh")
    warm = _select(float32, caches="warm")
    shown = {OURS, "LPSGDM p=2", "SGD fused", "AdamW fused", "memory"}
    threads = [
        replace(one, seconds={name: one.seconds[name] for name in shown & one.seconds.keys()})
        for one in fresh
        if one.setting.list in ("64k", "ResNet-50", "64M")
    ]
    pictures: dict[str, tuple[Callable[[Sequence[Record]], Figure], list[Record]]] = {
        "bars": (draw_bars, [one for one in fresh if one.setting.list in LISTS]),
        "sizes": (
            partial(draw_sizes, caches=results.machine["caches"]),
            [one for one in warm if one.setting.list.startswith("1 x ")],
        ),
        "tensors": (draw_tensors, [one for one in fresh if one.setting.list.endswith(" x 64")]),
        "threads": (draw_threads, threads),
    }
    for name, (function, records) in pictures.items():
        if len(records) > 1:
            function(records).savefig(directory / f"speed_{name}.png", dpi=80)
