# SPDX-License-Identifier: MIT
import pytest
import torch

collect_ignore = ["failing_allocations.py"]  # a program


@pytest.fixture
def two_threads():
    """Two threads within, the former number afterwards."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)
