# SPDX-License-Identifier: MIT
"""The code of docs/distributed.md runs as it stands. tests/frameworks has its last sections."""

import warnings

import pytest

from ranks import on_ranks, run_section


def run_sections(*headings):
    # PyTorch's own, about torch.distributed.optim and about a layer that is parallel and sharded.
    warnings.filterwarnings("ignore", r"`torch.jit.\w+` is deprecated")
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")
    for heading in headings:
        run_section(heading)


@pytest.mark.parametrize(
    "ranks, headings",
    [
        (2, ["DDP", "FSDP2", "Tensor parallel", "ZeRO", "Checkpoints", "Pipelines"]),
        (4, ["FSDP2 with tensor parallel"]),
    ],
)
def test_sections_run(ranks, headings):
    on_ranks(ranks, run_sections, *headings)
