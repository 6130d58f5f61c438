# SPDX-License-Identifier: MIT
"""Damaged checkpoints, in a process of their own: see mutate_checkpoints.py."""

import subprocess
import sys

import pytest

from fuzzing import SECONDS, report
from helpers import ROOT


@pytest.mark.parametrize("mutations", [1000, pytest.param(3000, marks=pytest.mark.full)])
def test_a_damaged_checkpoint_works_or_is_refused_and_nothing_changed(tmp_path, mutations):
    progress = tmp_path / "progress"
    extent = ["--count", str(mutations)] if SECONDS is None else ["--seconds", str(SECONDS)]
    result = subprocess.run(
        [sys.executable, "-m", "fuzz.mutate_checkpoints", *extent, "--progress", progress],
        cwd=ROOT / "tests",
        capture_output=True,
        text=True,
        timeout=600 + (SECONDS or 0),
    )
    at = f"at mutation {progress.read_text()}" if progress.exists() else "before the first one"
    assert result.returncode == 0, f"exit {result.returncode} {at}\n{result.stderr[-6000:]}"
    report(result.stdout)
