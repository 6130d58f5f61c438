# SPDX-License-Identifier: MIT
"""The demo and the benchmark run, and say what they should."""

import json
import subprocess
import sys

import pytest
import torch

from helpers import ROOT


def run(*arguments):
    result = subprocess.run(
        [sys.executable, "-m", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_quick_demo_trains_every_optimizer_and_draws(tmp_path):
    output = run("benchmarks.paper.demo", "--quick", "--output", tmp_path)
    for name in ("SGD", "SGDM", "AdamW", "LPSGD 6→2", "LPSGDM 6→2"):
        assert output.count(f"\n| {name} |") == 2, name
    for picture in ("quadratics.png", "digits-headline.png", "digits.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    results = json.loads((tmp_path / "digits.json").read_text())["results"]
    for result in results:
        if result["method"] == "LPSGDM 6→2":
            assert result["history"]["p"] == [6.0, 2.0]
            (first,), (second,) = result["history"]["loss"]
            assert second < first


def test_lpsgd_has_no_floor_on_either_quadratic(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    geometry = pytest.importorskip("lpsgd.experiments.geometry")
    for f in geometry.QUADRATICS:
        final = {name: f(path[-1]).item() for name, path in geometry.paths(f).items()}
        assert final["LPSGD"] < 1e-15 < final["sign descent"]
        assert all(torch.tensor(loss).isfinite() for loss in final.values())
