# SPDX-License-Identifier: MIT
import cuda_double  # isort: skip  (before lpsgd_ext)

import pytest

from lpsgd import _base, _optimizer, _parts, _unusual

collect_ignore = ["cuda_double.py"]  # as a module with doctests it would be imported a second time


@pytest.fixture
def module(tmp_path, monkeypatch):
    """lpsgd_ext as in a new process with three devices, also for the classes. Without the check of
    the kernels, whose launches would be among those that tests count."""
    monkeypatch.setenv("LPSGD_CUDA_CHECK", "0")
    cuda_double.reset(devices=3)
    module = cuda_double.fresh_module(tmp_path)
    for part in (_base, _optimizer, _parts, _unusual):
        monkeypatch.setattr(part, "lpsgd_ext", module)
    _unusual._warn_once.cache_clear()
    return module


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_makereport():
    cuda_double.driver.double_open(1)  # a report may print tensors
