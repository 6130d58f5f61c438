# SPDX-License-Identifier: MIT
"""Every block of code in docs/frameworks.md runs as it stands."""

import re

import pytest

from helpers import ROOT

PAGE = (ROOT / "docs" / "frameworks.md").read_text()


def blocks():
    """The blocks, each called by its section."""
    return [
        pytest.param(code, id=section.splitlines()[0])
        for section in PAGE.split("\n## ")
        for code in re.findall(r"^```python\n(.*?)^```", section, re.DOTALL | re.MULTILINE)
    ]


@pytest.mark.parametrize("code", blocks())
def test_block_runs(code, tmp_path, monkeypatch):
    for name in ("timm", "torchvision"):  # They exist for some versions of PyTorch only.
        if f"import {name}\n" in code:
            pytest.importorskip(name)
    monkeypatch.chdir(tmp_path)  # Some frameworks write checkpoints and logs.
    assert "\nassert " in code
    exec(compile(code, "docs/frameworks.md", "exec"), {"__name__": "__main__"})
