# SPDX-License-Identifier: MIT
"""Every block of Python in README and on the site runs as it stands. pytest itself runs those with
prompts; tests/distributed, tests/experiments and tests/frameworks run those of the pages of these
names."""

import ast
import re

import pytest

import lpsgd_ext
from helpers import ROOT

README = ROOT / "README.md"
ELSEWHERE = ("distributed.md", "experiments.md", "frameworks.md")


def blocks():
    for page in (README, *sorted((ROOT / "docs").glob("*.md"))):
        if page.name not in ELSEWHERE:
            found = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
            for code in found:
                if not code.startswith(">>>"):
                    yield pytest.param(code, id=f"{page.name}: {code.count(chr(10))} lines")


@pytest.mark.parametrize("code", list(blocks()))
def test_block_runs(code):
    exec(compile(code, "a block of code", "exec"), {"__name__": "__main__"})


def test_readme_is_short():
    assert len(README.read_text().splitlines()) <= 120


def test_stub_says_what_the_module_says():
    stub = ast.parse((ROOT / "python" / "lpsgd_ext-stubs" / "__init__.pyi").read_text())
    for node in stub.body:
        if isinstance(node, ast.FunctionDef):
            said = getattr(lpsgd_ext, node.name).__doc__
            assert ast.get_docstring(node).split() == said.split(), node.name
