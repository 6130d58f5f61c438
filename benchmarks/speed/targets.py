# SPDX-License-Identifier: MIT
"""What was aimed at, as data, and what was reached of it."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import NamedTuple

from benchmarks.speed.step import LISTS
from benchmarks.speed.timing import Ratio, Record, Setting

NETWORKS = ("ResNet-18", "ResNet-50", "ViT-B/16", "GPT-2")
MEMORY = "memory"  # the faster of the loop over the same memory and SGD fused
HALF = "itself in float32"
WIDE = "LPSGDM p=4 in float32"


class Target(NamedTuple):
    """At most this ratio of the median step times of `own` and each peer."""

    lists: tuple[str, ...]
    threads: tuple[int, ...]
    own: str
    at_most: dict[str, float]
    dtype: str = "float32"

    def settings(self) -> list[Setting]:
        return [Setting(name, self.dtype, n) for name in self.lists for n in self.threads]


def _peers(
    sgd: float, adamw: float, foreach: float, eager: float | None = None
) -> dict[str, float]:
    peers = {"SGD fused": sgd, "AdamW fused": adamw, "SGD foreach": foreach}
    return peers if eager is None else {**peers, "eager LPSGDM": eager}


_P2, _P4, _BYTE = "LPSGDM p=2", "LPSGDM p=4", "LPSGDM one byte"
TARGETS = [
    Target(NETWORKS, (1,), _P4, _peers(1.10, 0.85, 0.40, 0.09)),
    Target(NETWORKS, (2,), _P4, _peers(1.00, 0.70, 0.35, 0.09)),
    Target(("64k",), (1,), _P4, _peers(0.65, 0.35, 0.40, 0.12)),
    Target(("64k",), (2,), _P4, _peers(0.50, 0.35, 0.40, 0.12)),
    Target(("1000 x 64",), (1, 2), _P4, _peers(0.35, 0.15, 0.10, 0.05)),
    Target(("62 x 1",), (1, 2), _P4, _peers(0.40, 0.30, 0.15, 0.10)),
    Target(NETWORKS, (1, 2), _P2, _peers(1.00, 0.65, 0.35)),
    Target(("64k",), (1, 2), _P2, _peers(0.50, 0.65, 0.35)),
    Target(("16M", "64M"), (2,), _P4, {MEMORY: 1 / 0.85}),
    Target(("ResNet-50", "16M"), (1,), _P4, {HALF: 1.00}, "bfloat16"),
    Target(("ResNet-50", "16M"), (2,), _P4, {HALF: 0.85}, "bfloat16"),
    Target((*NETWORKS[1:], "1M", "16M", "64M"), (1,), _BYTE, {_P4: 1.10}),
    Target((*NETWORKS[1:], "1M", "16M", "64M"), (2,), _BYTE, {_P4: 1.03}),
    Target(("ResNet-50", "16M"), (1, 2), _BYTE, {WIDE: 0.90}, "bfloat16"),
]
CONTENDERS = (_P2, _P4, _BYTE, "SGD fused", "AdamW fused", "SGD foreach", "eager LPSGDM", MEMORY)


class Outcome(NamedTuple):
    """A target in one setting, and the ratio that was measured there."""

    setting: Setting
    own: str
    peer: str
    microseconds: float
    at_most: float
    ratio: Ratio

    @property
    def is_reached(self) -> bool:
        return self.ratio.median <= self.at_most

    @property
    def is_narrow(self) -> bool:
        """Whether the target lies within the uncertainty of the median."""
        return abs(self.ratio.median - self.at_most) < self.ratio.margin


def _quotient(a: Ratio, b: Ratio) -> Ratio:
    median = a.median / b.median
    margin = median * math.hypot(a.margin / a.median, b.margin / b.median)
    return Ratio(median, a.low / b.high, a.high / b.low, margin)


def outcomes(records: Iterable[Record]) -> Iterator[Outcome]:
    """Every target for which the records have the figures."""
    by_setting = {record.setting: record for record in records}
    for target in TARGETS:
        for setting in target.settings():
            record = by_setting.get(setting)
            wide = by_setting.get(replace(setting, dtype="float32"))
            for peer, at_most in target.at_most.items():
                if record is None or wide is None or target.own not in record.seconds:
                    continue  # no figures
                if peer == MEMORY:
                    ratio = record.ratio(target.own, MEMORY, "SGD fused")
                elif peer in (HALF, WIDE):
                    # The loop over the same memory takes half as long: it has half the bytes.
                    own = record.ratio(target.own, MEMORY)
                    ratio = _quotient(own, wide.ratio(_P4 if peer == WIDE else target.own, MEMORY))
                    ratio = Ratio(*(figure / 2 for figure in ratio))
                else:
                    ratio = record.ratio(target.own, peer)
                median = record.microseconds(target.own)
                yield Outcome(setting, target.own, peer, median, at_most, ratio)


def settings() -> list[Setting]:
    """Those that the targets are about, each once, those of one list together."""
    unique = dict.fromkeys(setting for target in TARGETS for setting in target.settings())
    wide = dict.fromkeys(replace(setting, dtype="float32") for setting in unique)
    names = list(LISTS)
    return sorted(wide | unique, key=lambda setting: names.index(setting.list))
