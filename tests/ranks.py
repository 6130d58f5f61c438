# SPDX-License-Identifier: MIT
"""Runs functions of test files in several processes, as torchrun starts them.

Every process runs this file as a script.
"""

import datetime
import faulthandler
import os
import re
import runpy
import subprocess
import sys
import traceback
import warnings
from unittest import mock

import torch.distributed as dist

from helpers import ROOT

_PATIENCE = 60  # seconds that a rank waits for another; all of them have twice that


def on_ranks(ranks, function, *arguments):
    """Calls a test file's function in `ranks` processes that gloo joins, with strings as arguments;
    fails with all that they print if one fails or hangs."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={ranks}", __file__]
    command += [function.__code__.co_filename, function.__name__, *arguments]
    result = subprocess.run(
        list(map(str, command)),
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=3 * _PATIENCE,
    )
    assert result.returncode == 0, result.stdout


def run_section(heading):
    """Runs the code of a section of docs/distributed.md, after what stands before all of them."""
    start, *sections = (ROOT / "docs" / "distributed.md").read_text().split("\n## ")
    (section,) = (each for each in sections if each.startswith(f"{heading}\n"))
    start, code = (
        "".join(re.findall(r"^```python\n(.*?)^```", x, re.S | re.M)) for x in (start, section)
    )
    assert re.search("^ *assert ", code, re.MULTILINE)
    with mock.patch.object(dist, "init_process_group"):  # the ranks are joined already
        exec(compile(f"{start}\n{code}", f"docs/distributed.md: {heading}", "exec"), {})


def _run(path, name, *arguments):
    function = runpy.run_path(path)[name]
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=_PATIENCE))
    warnings.simplefilter("error")
    function(*arguments)
    dist.barrier()  # gloo aborts a rank whose peers leave while it still talks to them


if __name__ == "__main__":
    faulthandler.dump_traceback_later(2 * _PATIENCE, exit=True)
    try:
        _run(*sys.argv[1:])
        status = 0
    except Exception:
        # In one piece, for the ranks share one output.
        sys.stdout.write(f"rank {os.environ['RANK']}: {traceback.format_exc()}")
        status = 1
    # Not sys.exit: gloo's threads want the interpreter that would be finalized, and abort.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
