# SPDX-License-Identifier: MIT
"""Runs scripts and functions of test files in several processes, as torchrun starts them.

Every process runs this file as a script, which runs what it is told.
"""

import datetime
import faulthandler
import os
import runpy
import subprocess
import sys
import traceback
import warnings

import torch.distributed as dist

_PATIENCE = 60  # seconds that a rank waits for another; all of them have twice that


def torchrun(ranks, script, *arguments):
    """Runs a script in `ranks` processes; fails with what they print if one fails or hangs."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={ranks}", __file__, script, *arguments]
    result = subprocess.run(
        list(map(str, command)),
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=3 * _PATIENCE,
    )
    assert result.returncode == 0, result.stdout


def on_ranks(ranks, function, *arguments):
    """Calls a test file's function in `ranks` processes that gloo joins; arguments are strings."""
    torchrun(ranks, function.__code__.co_filename, function.__name__, *arguments)


def _run(script, name=None, *arguments):
    if name is None:
        runpy.run_path(script, run_name="__main__")
        return
    function = runpy.run_path(script)[name]
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
