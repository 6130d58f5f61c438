# SPDX-License-Identifier: MIT
"""Steps for which memory does not suffice."""

import sys

from helpers import ROOT, run, tool


def test_a_step_that_lacks_memory_changes_nothing_and_loses_nothing(tmp_path):
    shim = tmp_path / "failing_malloc.so"
    source = ROOT / "tests/module/failing_malloc.c"
    flags = ["-std=c11", "-Wall", "-Wextra", "-Werror", "-O2", "-fPIC", "-shared"]
    run([tool("cc"), *flags, source, "-o", shim])
    counts = run(
        [sys.executable, "-W", "error", ROOT / "tests/module/failing_allocations.py"],
        LD_PRELOAD=str(shim),
        PYTHONMALLOC="malloc",
    )
    assert all(int(line.split()[0]) > 50 for line in counts.splitlines())
