# SPDX-License-Identifier: MIT
import os

if "PYTEST_XDIST_WORKER" in os.environ:  # workers run beside each other, with one thread each
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

import lpsgd

FALLBACK = lpsgd.build_info()["fallback"]
collect_ignore = ["module/failing_allocations.py", "mutants"]  # programs
_left = pytest.StashKey[int]()


@pytest.hookimpl(tryfirst=True)  # before marks are looked at
def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.suffix == ".ipynb" and item.path.stem != "quickstart":
            item.add_marker(pytest.mark.full)


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call():
    """Skips tests of fused=True where there is no C (`make test-pure`)."""
    try:
        return (yield)
    except RuntimeError as error:
        if FALLBACK and str(error).endswith(FALLBACK):
            pytest.skip("fused=True needs C")
        raise


def pytest_deselected(items):
    stash = items[0].config.stash
    stash[_left] = stash.get(_left, 0) + len(items)


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left"] = session.config.stash.get(_left, 0)


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_testnodedown(node):
    node.config.stash[_left] = getattr(node, "workeroutput", {}).get("left", 0)


def pytest_terminal_summary(terminalreporter, config):
    left = config.stash.get(_left, 0)
    if left and config.getoption("markexpr") == "not full" and not config.getoption("keyword"):
        terminalreporter.write_line(f"{left} further cases are left to `make test-all`")


def with_threads(number):
    threads = torch.get_num_threads()
    torch.set_num_threads(number)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def one_thread():
    """One thread within, the former number afterwards."""
    yield from with_threads(1)


@pytest.fixture
def two_threads():
    """Two threads within, the former number afterwards."""
    yield from with_threads(2)
