# SPDX-License-Identifier: MIT
"""The demo and the benchmark run, and say what they should."""

import json
import math
import subprocess
import sys

import pytest

from helpers import ROOT


def run(*arguments):
    result = subprocess.run(
        [sys.executable, "-m", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_quick_demo_trains_every_optimizer_and_draws(tmp_path):
    output = run("benchmarks.paper.demo", "--quick", "--jobs", "1", "--output", tmp_path)
    for name in ("SGD", "SGDM", "AdamW", "LPSGD 6→2", "LPSGDM 6→2"):
        assert output.count(f"\n{name} ") == 2, name
    for picture in ("quadratics.png", "digits.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    results = json.loads((tmp_path / "digits.json").read_text())["results"]
    for result in results:
        losses = result["final"]["epoch_losses"]
        assert all(math.isfinite(loss) for epoch in losses for loss in epoch)
        if result["final"]["trial"]["method"] == "LPSGDM 6→2":
            assert losses[1][0] < losses[0][0]


def test_lpsgd_has_no_floor_on_either_quadratic():
    pytest.importorskip("matplotlib")
    code = (
        "import sys; sys.path.insert(0, '.')\n"
        "from benchmarks.paper.quadratics import run\n"
        "import json; print(json.dumps(run()[1]))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name, losses in json.loads(result.stdout).items():
        assert losses["LPSGD"] < 1e-15 < losses["sign descent"], name


def test_benchmark_prints_a_row_for_each_list(tmp_path):
    path = tmp_path / "step.json"
    output = run(
        "benchmarks.speed.step", *("--threads", "1", "--lists", "64k", "1000 x 64"),
        *("--rounds", "1", "--json", path),
    )  # fmt: skip
    assert output.count("\n| 64k | 1 |") == 1 and output.count("\n| 1000 x 64 | 1 |") == 1
    assert all(seconds > 0 for record in json.loads(path.read_text())
               for times in record["seconds"].values() for seconds in times)  # fmt: skip
