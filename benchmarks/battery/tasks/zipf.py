# SPDX-License-Identifier: MIT
"""A made language whose words are as unevenly frequent as in texts, and a small transformer.

That classes are rare is where sign descent is said to gain (Kunstner et al., arXiv:2402.19449).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.battery.problem import Problem
from benchmarks.paper.characters import GPT
from benchmarks.paper.task import Batch, Source

WORDS, CONTEXT, WIDTH, LAYERS, HEADS = 1024, 24, 64, 2, 4
TRAINING, HELD_OUT = 40000, 512


def sentences(count: int, seed: int) -> Tensor:
    """Words (count, CONTEXT + 1), of which the k-th has a frequency like 1 / k.

    Half of the words depend on the word before: they are its successor in a fixed order. A quarter
    repeats what came two words earlier. The rest is drawn.
    """
    generator = torch.Generator().manual_seed(seed)
    frequencies = 1 / torch.arange(1, WORDS + 1)
    drawn = torch.multinomial(frequencies, count * (CONTEXT + 1), True, generator=generator)
    drawn = drawn.reshape(count, CONTEXT + 1)
    kind = torch.rand(count, CONTEXT + 1, generator=generator)
    # Neighbours in frequency change places, so that successors are about as frequent.
    successor = (
        torch.arange(WORDS).float()
        + 20 * torch.rand(WORDS, generator=torch.Generator().manual_seed(0))
    ).argsort()
    text = drawn.clone()
    for i in range(2, CONTEXT + 1):
        text[:, i] = torch.where(kind[:, i] < 0.25, text[:, i - 2], text[:, i])
        text[:, i] = torch.where(kind[:, i] > 0.5, successor[text[:, i - 1]], text[:, i])
    return text


class Zipf(Problem):
    """Sentences that are nowhere repeated within a run."""

    title = "Zipf's words, transformer"
    batch_size, steps, seconds = 24, 45, 15.0
    cost, chance = "perplexity", float(WORDS)

    def load(self, final: bool, source: Source) -> None:
        train, held_out = sentences(TRAINING, 1), sentences(HELD_OUT, 3 if final else 2)
        self.x, self.y = train[:, :-1], train[:, 1:]
        self.x_held_out, self.y_held_out = held_out[:, :-1], held_out[:, 1:]

    def build(self) -> nn.Module:
        return GPT(WORDS, CONTEXT, WIDTH, LAYERS, HEADS)

    def losses(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Batch:
        logits = model(inputs)
        losses = F.cross_entropy(logits.mT, targets, reduction="none").mean(dim=1)
        return losses[None], (logits.argmax(dim=2) == targets).float().mean(dim=1)[None]
