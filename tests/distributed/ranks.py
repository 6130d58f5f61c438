# SPDX-License-Identifier: MIT
"""Runs functions of test files in several processes, with what torchrun tells them.

They are forked from a server that has imported PyTorch once, which is most of what a rank does.
"""

import datetime
import faulthandler
import multiprocessing
import multiprocessing.connection
import os
import re
import runpy
import sys
import tempfile
import traceback
import warnings
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from helpers import ROOT, bits

_PATIENCE = 60  # seconds that a rank waits for another; all of them have twice that

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(
    [
        "lpsgd",
        "pytest",
        "torch._dynamo",
        "torch.distributed.checkpoint",
        "torch.distributed.fsdp",
        "torch.distributed.pipelining",
        "torch.distributed.tensor.parallel",
    ]
)


def on_ranks(ranks, function, *arguments):
    """Calls a test file's function in `ranks` processes that gloo joins, with strings as arguments;
    fails with all that they print if one fails or hangs."""
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    code, strings = function.__code__, list(map(str, arguments))
    with tempfile.NamedTemporaryFile("r") as output:
        processes = [
            _server.Process(
                target=_be_rank,
                args=(_environment(rank, ranks, store.port), output.name),
                kwargs={"call": (code.co_filename, code.co_name, *strings)},
            )
            for rank in range(ranks)
        ]
        with mock.patch.dict(os.environ, OMP_NUM_THREADS="1"):  # of the server, at its start
            for process in processes:
                process.start()
        statuses = _wait_for(processes)
        assert not any(statuses), f"exit statuses {statuses}\n{output.read()}"


def _environment(rank, ranks, port):
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }


def _wait_for(processes):
    """The exit statuses. The first failure ends all, as the others would wait for that rank."""
    left = list(processes)
    while left and not any(process.exitcode for process in processes):
        ended = multiprocessing.connection.wait([one.sentinel for one in left], 3 * _PATIENCE)
        left = [one for one in left if one.sentinel not in ended] if ended else []
        for process in processes:
            process.join(0)  # fills in its status
    for process in processes:
        process.kill()
        process.join()
    return [process.exitcode for process in processes]


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


def _be_rank(environment, output, call):
    descriptor = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    faulthandler.dump_traceback_later(2 * _PATIENCE, exit=True)
    os.environ.update(environment)
    try:
        _run(*call)
        status = 0
    except BaseException:
        # In one piece, for the ranks share one output.
        sys.stdout.write(f"rank {environment['RANK']}: {traceback.format_exc()}")
        status = 1
    # No return: gloo's threads want the interpreter that would be finalized, and abort.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _run(path, name, *arguments):
    function = runpy.run_path(path)[name]
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=_PATIENCE))
    warnings.simplefilter("error")
    function(*arguments)
    # gloo aborts a rank whose peers leave while it still talks to them. It is no barrier(), which
    # raises again what a test has caught, where gloo's thread has not dropped that work yet.
    dist.all_reduce(torch.zeros(1))


def whole_bits(tensor):
    """A tensor's bits, gathered of all ranks if it is a DTensor."""
    if not isinstance(tensor, DTensor):
        return bits(tensor)
    if tensor.element_size() > 1:
        return bits(tensor.full_tensor())
    shape, stride = tensor.shape, tensor.stride()  # gloo has uint8, but no float8
    shard, mesh = bits(tensor.to_local()), tensor.device_mesh
    integers = DTensor.from_local(shard, mesh, tensor.placements, shape=shape, stride=stride)
    return integers.full_tensor()
