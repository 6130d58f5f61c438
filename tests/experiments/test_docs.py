# SPDX-License-Identifier: MIT
"""docs/experiments.md: its blocks run as they stand. tests/frameworks has the lr range tests."""

import ast
import json
import random
import re
import sys

import pytest
import torch

import lpsgd
from helpers import ROOT, blocks_of, run_block

PAGE = "experiments.md"
SECTIONS = blocks_of(PAGE)
(RECIPE,) = SECTIONS.pop("In your own tests")
SECTIONS.pop("Find a learning rate")
BLOCKS = [pytest.param(code, id=heading) for heading, blocks in SECTIONS.items() for code in blocks]


@pytest.mark.parametrize("code", BLOCKS)
def test_block_runs(code, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib").use("Agg")
    for name in ("curvlinops", "pandas", "scipy", "tensorboard"):
        pytest.importorskip(name)
    monkeypatch.setenv("TQDM_DISABLE", "1")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    run_block(code, PAGE)


def outcome(folder, *options):
    """Of the recipe in a folder of its own, as pytest's exit code."""
    sys.modules.pop("test_optimizers", None)  # of another folder
    (folder / "test_optimizers.py").write_text(RECIPE)
    (folder / "pytest.ini").write_text("[pytest]")
    options += ("-q", "-n0", "-p", "no:cacheprovider", "--import-mode=importlib")
    return pytest.main([*options, f"--rootdir={folder}", f"-c{folder}/pytest.ini", str(folder)])


def test_the_recipe_passes(tmp_path):
    assert outcome(tmp_path) == pytest.ExitCode.OK


class Lazy(lpsgd.LPSGDM):
    """Takes a hundredth of the steps, but at p = 2."""

    def __init__(self, params, lr, p):
        super().__init__(params, lr=lr / 100, p=p)


class Inexact(lpsgd.LPSGDM):
    def __init__(self, params, lr, **settings):
        super().__init__(params, lr=lr * 1.01, **settings)


class Random(lpsgd.LPSGDM):
    def __init__(self, params, lr, **settings):
        super().__init__(params, lr=lr * (1 + 1e-3 * random.random()), **settings)


@pytest.mark.parametrize(
    "broken, seen_by",
    [
        (Lazy, "trains_as_well"),
        pytest.param(Inexact, "is_sgd", marks=pytest.mark.full),
        pytest.param(Random, "same_from_the_same_seed", marks=pytest.mark.full),
    ],
)
def test_the_recipe_sees_an_optimizer_that_is_broken(broken, seen_by, tmp_path, monkeypatch):
    def make(params, p, momentum=0.9, **settings):
        cls = broken if broken is not Lazy or p > 2.0 else lpsgd._optimizer.LPSGDM
        return cls(params, p=p, **settings)

    monkeypatch.setattr(lpsgd, "LPSGDM", make)
    assert outcome(tmp_path, "-k", seen_by) == pytest.ExitCode.TESTS_FAILED


NOTEBOOKS = sorted((ROOT / "benchmarks" / "notebooks").glob("*.ipynb"))
# The names by which pip knows what the notebooks import, and what lpsgd[experiments] brings.
PACKAGES = {"sklearn": "scikit-learn", "ipywidgets": "ipywidgets"}
BROUGHT = {"lpsgd", "matplotlib", "torch"}


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.stem)
def test_a_notebook_needs_no_clone_and_says_what_to_install(notebook):
    cells = json.loads(notebook.read_text())["cells"]
    text = "".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    tree = ast.parse("\n".join(re.sub(r"(?m)^%.*$", "", one) for one in code))
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    for node in ast.walk(tree):
        imported |= {name.name for name in node.names} if isinstance(node, ast.Import) else set()
    packages = {name.split(".")[0] for name in imported} - BROUGHT - sys.stdlib_module_names
    assert 'pip install "lpsgd[experiments]"' in text
    assert all(PACKAGES[name] in text for name in packages)
