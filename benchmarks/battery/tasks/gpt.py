# SPDX-License-Identifier: MIT
"""A small GPT on the characters of Python's standard library, as in the study `characters`."""

from torch import nn

from benchmarks.battery.problem import Problem
from benchmarks.paper.characters import GPT, VOCABULARY, Characters
from benchmarks.paper.task import Source

CONTEXT, WIDTH, LAYERS, HEADS = 48, 64, 2, 4


class CharacterGPT(Characters, Problem):
    """Windows of characters, the next of which is predicted everywhere."""

    title = "characters, GPT"
    batch_size, steps, seconds = 16, 45, 15.0
    cost, chance = "perplexity", float(len(VOCABULARY))

    def __init__(self, final: bool, source: Source, shrink: int = 1) -> None:
        Problem.__init__(self, final, source, shrink)

    def load(self, final: bool, source: Source) -> None:
        Characters.__init__(self, final, source, 0, CONTEXT, held_out=512)

    def build(self) -> nn.Module:
        return GPT(len(VOCABULARY), CONTEXT, WIDTH, LAYERS, HEADS)

    def describe(self) -> str:
        return self.title

    fingerprint = Problem.fingerprint
    make_model = Problem.make_model  # type: ignore[assignment]  # not only a GPT
