# SPDX-License-Identifier: MIT
"""The figures as tables and pictures."""

from collections.abc import Iterable
from itertools import groupby

from benchmarks.speed.step import Setting
from benchmarks.speed.targets import Outcome

SETTING = ["list", "dtype", "caches", "threads"]


def describe(setting: Setting) -> list[str]:
    dtype = str(setting.dtype).removeprefix("torch.")
    return [setting.list, dtype, setting.caches, str(setting.threads)]


def table(head: list[str], rows: Iterable[list[str]]) -> str:
    """In Markdown, aligned for those who read it as it is."""
    lines = [head, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    padded = (map(str.ljust, line, widths) for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in padded) + "\n"


def targets_table(outcomes: Iterable[Outcome]) -> str:
    """A row for each setting and optimizer, a column for each peer. A cell: the ratio, half the
    width of its confidence interval, and the target. Bold: missed."""
    outcomes = list(outcomes)
    peers = list(dict.fromkeys(one.peer for one in outcomes))

    def cell(one: Outcome) -> str:
        ratio = f"{one.ratio.median:.2f} ± {one.ratio.margin:.2f}"
        narrow = " ~" if one.is_narrow else ""
        return (ratio if one.is_reached else f"**{ratio}**") + f"{narrow} / {one.at_most:.2f}"

    rows = []
    for (own, setting), group in groupby(outcomes, lambda one: (one.own, one.setting)):
        same = list(group)
        cells = {one.peer: cell(one) for one in same}
        figures = [cells.get(peer, "") for peer in peers]
        rows.append([own, *describe(setting), f"{same[0].microseconds:.0f}", *figures])
    return table(["", *SETTING, "µs", *peers], rows)
