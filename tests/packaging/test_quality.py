# SPDX-License-Identifier: MIT
"""Lint, format and types."""

import subprocess
import sys

import pytest

from helpers import ROOT

PYTHON = ["setup.py", "python", "docs", "tests", "benchmarks"]


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]])
def test_ruff_finds_nothing(command):
    subprocess.run([sys.executable, "-m", "ruff", *command, *PYTHON], cwd=ROOT, check=True)


@pytest.mark.parametrize("what", ["python/lpsgd", "benchmarks"])
def test_types_are_strict(what):
    subprocess.run([sys.executable, "-m", "mypy", what], cwd=ROOT, check=True)
