# SPDX-License-Identifier: MIT
import pytest
import torch

collect_ignore = ["failing_allocations.py"]  # a program


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
