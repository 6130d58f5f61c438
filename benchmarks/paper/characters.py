# SPDX-License-Identifier: MIT
"""A small GPT that predicts the next character of the Python standard library's sources."""

import hashlib
import platform
import sysconfig
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.paper.task import Batch, Generators, Source, Task

VOCABULARY = "\n" + "".join(map(chr, range(32, 127)))
HELD_OUT_BATCH = 64


@cache
def text(part: str) -> Tensor:
    """The characters of a part of the modules of this Python's standard library, as numbers.

    Of ten modules in a row, one is for "validation", one for "test" and eight for "training".
    What is not in `VOCABULARY` is left out.
    """
    library = Path(sysconfig.get_paths()["stdlib"])
    parts = {0: "validation", 1: "test"}
    files = sorted(library.glob("*.py"))
    chosen = [f for i, f in enumerate(files) if parts.get(i % 10, "training") == part]
    characters = "".join(file.read_text(encoding="utf-8", errors="ignore") for file in chosen)
    number = {character: i for i, character in enumerate(VOCABULARY)}
    return torch.tensor([number[c] for c in characters if c in number], dtype=torch.uint8)


class GPT(nn.Module):
    """A decoder with learned positions and the norm before attention and feed-forward."""

    def __init__(self, vocabulary: int, context: int, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(0.02 * torch.randn(context, width))
        block = nn.TransformerEncoderLayer(
            width, heads, 4 * width, 0.0, F.gelu, batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(block, layers, enable_nested_tensor=False)
        for layer in self.blocks.layers:  # copies of one so far
            for param in layer.parameters():
                if param.dim() > 1:
                    nn.init.normal_(param, std=0.02)
        nn.init.normal_(self.tokens.weight, std=0.02)
        self.norm = nn.LayerNorm(width)
        mask = nn.Transformer.generate_square_subsequent_mask(context)
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n, context, vocabulary) of what follows each of x (n, context)."""
        hidden = self.blocks(self.tokens(x) + self.positions, mask=self.mask, is_causal=True)
        return F.linear(self.norm(hidden), self.tokens.weight)


class Characters(Task):
    """Windows of `context` characters and the GPT.

    An epoch is `examples` windows at random places; what is held out is `held_out` windows at equal
    distances.
    """

    def __init__(
        self,
        final: bool,
        source: Source,
        examples: int,
        context: int = 64,
        width: int = 128,
        layers: int = 4,
        heads: int = 4,
        held_out: int = 1024,
    ) -> None:
        self.examples, self.context = examples, context
        self.shape = (width, layers, heads)
        self.x = text("training")
        self.x_held_out = text("test" if final else "validation")
        last = len(self.x_held_out) - context - 1
        self.starts_held_out = torch.linspace(0, last, held_out).long()

    def describe(self) -> str:
        return f"Characters of Python {platform.python_version()}'s library"

    def fingerprint(self) -> str:
        parts = [text(part).numpy().tobytes() for part in ("training", "validation", "test")]
        return hashlib.sha256(b"".join(parts)).hexdigest()[:16]

    def make_model(self, generators: Generators) -> GPT:
        return GPT(len(VOCABULARY), self.context, *self.shape)

    def order(self, generators: Generators) -> Tensor:
        last = len(self.x) - self.context - 1
        return torch.randint(last + 1, (1, self.examples), generator=generators[0])

    def windows(self, characters: Tensor, starts: Tensor, device: torch.device) -> Batch:
        places = starts[:, None] + torch.arange(self.context + 1)
        window = characters[places].long().to(device)
        return window[:, :-1], window[:, 1:]

    def batch(
        self, indices: Tensor, generators: Generators, device: torch.device, share: slice
    ) -> Batch:
        return self.windows(self.x, indices[0, share], device)

    def held_out(self, device: torch.device) -> Iterator[Batch]:
        for starts in torch.split(self.starts_held_out, HELD_OUT_BATCH):
            yield self.windows(self.x_held_out, starts, device)

    def losses(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Batch:
        logits = model(inputs)
        losses = F.cross_entropy(logits.float().mT, targets, reduction="none").mean(dim=1)
        correct = (logits.argmax(dim=2) == targets).float().mean(dim=1)
        return losses[None], correct[None]
