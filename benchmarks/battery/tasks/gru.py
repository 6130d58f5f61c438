# SPDX-License-Identifier: MIT
"""A recurrent network on the same characters, with clipping."""

from torch import Tensor, nn

from benchmarks.battery.tasks.gpt import CharacterGPT
from benchmarks.paper.characters import VOCABULARY

WIDTH = 96


class Recurrent(nn.Module):
    """An embedding, a GRU and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(len(VOCABULARY), WIDTH)
        self.gru = nn.GRU(WIDTH, WIDTH, batch_first=True)
        self.last = nn.Linear(WIDTH, len(VOCABULARY))

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n, context, vocabulary) of what follows each of x (n, context)."""
        hidden, _ = self.gru(self.tokens(x))
        logits: Tensor = self.last(hidden)
        return logits


class CharacterGRU(CharacterGPT):
    """The windows of the GPT."""

    title = "characters, GRU with clipping"
    batch_size, steps, seconds = 16, 45, 15.0
    clip_norm = 1.0

    def build(self) -> nn.Module:
        return Recurrent()
