# SPDX-License-Identifier: MIT
"""libFuzzer on the C library's list driver: tests/csrc/fuzz_step.c."""

import subprocess

import pytest

from fuzzing import SECONDS, report
from helpers import ROOT, tool


@pytest.mark.parametrize("runs", [2000, pytest.param(8000, marks=pytest.mark.full)])
def test_a_step_of_any_list_is_the_plain_loop_or_a_refusal(tmp_path, runs):
    empty = "#include <stdint.h>\n#include <stddef.h>\nint LLVMFuzzerTestOneInput(const uint8_t *,"
    empty += " size_t);\nint LLVMFuzzerTestOneInput(const uint8_t *d, size_t n)"
    empty += " { return d && n > 9 && 0; }\n"
    command = [tool("clang"), "-fsanitize=fuzzer,address", "-xc", "-", "-o", tmp_path / "empty"]
    if subprocess.run(command, input=empty, text=True, capture_output=True).returncode:
        pytest.skip("clang has no libFuzzer (Debian: libclang-rt-dev)")
    # For so few runs, to compile takes longest: three times as long with the undefined behaviour.
    few = [f"FUZZ_RUNS={runs}", "FUZZ_SANITIZERS=address", "FUZZ=../../build/fuzz-few"]
    length = few if SECONDS is None else [f"FUZZ_SECONDS={int(SECONDS)}"]
    result = subprocess.run(
        ["make", "-s", "-C", ROOT / "tests" / "csrc", "check-fuzz", "CC=clang", *length],
        capture_output=True,
        text=True,
        timeout=900 + (SECONDS or 0),
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    report("libFuzzer: " + result.stdout)
