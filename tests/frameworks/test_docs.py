# SPDX-License-Identifier: MIT
"""Every block of code in docs/frameworks.md runs as it stands, and the lr range tests of
docs/experiments.md."""

import pytest

from helpers import blocks_of, run_block

PAGES = {
    "frameworks.md": blocks_of("frameworks.md"),
    "experiments.md": {"lr": blocks_of("experiments.md")["Find a learning rate"]},
}
BLOCKS = [
    pytest.param(page, code, id=heading)
    for page, sections in PAGES.items()
    for heading, blocks in sections.items()
    for code in blocks
]


@pytest.mark.parametrize("page, code", BLOCKS)
def test_block_runs(page, code, tmp_path, monkeypatch):
    # torchvision, and what needs it, exist for some versions of PyTorch only; fastai is large.
    for name in ("timm", "torchvision", "fastai.basics"):
        if f"import {name}\n" in code or f"from {name} " in code:
            pytest.importorskip(name)
    monkeypatch.chdir(tmp_path)  # Some frameworks write checkpoints and logs.
    run_block(code, page)
