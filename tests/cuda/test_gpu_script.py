# SPDX-License-Identifier: MIT
"""benchmarks/speed/gpu.py without a GPU: its checks with the CPU in the GPU's place."""

import itertools
import os
import subprocess
import sys
import time
from functools import partial

import pytest
import torch

import lpsgd_ext
from benchmarks.speed import gpu, gpu_checks
from helpers import ROOT, bits
from lpsgd import _base, _eager, _unusual

CPU = torch.device("cpu")
CHECKS = gpu_checks.CHECKS | {
    "more than 2^31 elements": partial(gpu_checks.a_large_tensor, rows=3),
}
WITHOUT_BITS = ["version counters", "PyTorch's operations"]


def sabotage(monkeypatch, module, name, replacement):
    """Every other call is one of replacement(function, ...), so that the last of several steps of
    one side is and that of the other side is not."""
    function = getattr(module, name)
    calls = itertools.count()

    def either(*args, **kwargs):
        if kwargs.get("dry_run") or next(calls) % 2:
            function(*args, **kwargs)
        else:
            replacement(function, *args, **kwargs)

    monkeypatch.setattr(module, name, either)
    monkeypatch.setattr(lpsgd_ext, "step_param_groups", lambda *_: False)  # which goes round it


def flip_a_bit(function, params, *args, **kwargs):
    function(params, *args, **kwargs)
    changed = next(param for param in params if param.numel() > 5)
    bits(changed.detach()).view(-1)[5] ^= 1 << 4


def do_nothing(function, *args, **kwargs):
    pass


@pytest.mark.parametrize("name", CHECKS)
def test_every_check_passes_where_the_kernels_are_right(name):
    CHECKS[name](CPU)


@pytest.mark.parametrize("name", [name for name in CHECKS if name not in WITHOUT_BITS])
def test_every_check_of_bits_sees_one_wrong_element(name, monkeypatch):
    for function in ("lpsgd_", "lpsgdm_"):
        sabotage(monkeypatch, lpsgd_ext, function, flip_a_bit)
    with pytest.raises(AssertionError):
        CHECKS[name](CPU)


@pytest.mark.parametrize("name", WITHOUT_BITS)
def test_the_other_checks_see_a_step_that_does_nothing(name, monkeypatch):
    for module, function in (
        *((lpsgd_ext, "lpsgd_"), (lpsgd_ext, "lpsgdm_")),
        *((_eager, "foreach"), (_eager, "for_loop")),
    ):
        sabotage(monkeypatch, module, function, do_nothing)
    with pytest.raises(AssertionError):
        CHECKS[name](CPU)


def test_the_check_of_the_default_sees_a_step_in_pytorch_operations(monkeypatch):
    answers = itertools.chain([True] * gpu_checks.STEPS, itertools.repeat(False))
    for part in (_base, _unusual):
        monkeypatch.setattr(part, "observed", lambda: next(answers))
    with pytest.raises(AssertionError):
        gpu_checks.kernels_by_default(CPU)


def test_all_checks_run_whatever_fails(capsys):
    def fail(device):
        raise RuntimeError("broken")

    def skip(device):
        raise gpu_checks.Unavailable("there is one CUDA device")

    checks = {"a": fail, "b": skip, "c": lambda device: None, "d": lambda device: "3 ulp"}
    outcomes = gpu_checks.run_checks(checks, CPU)
    assert list(outcomes.values()) == [
        "FAILED: RuntimeError: broken",
        "skipped: there is one CUDA device",
        "ok",
        "ok (3 ulp)",
    ]
    assert capsys.readouterr().out.splitlines() == [f"{a}: {b}" for a, b in outcomes.items()]


def test_names_of_checks_are_those_of_checks():
    assert {*gpu_checks.NOT_UNDER_SANITIZER} < {*gpu_checks.CHECKS, *gpu_checks.CUDA_CHECKS}


@pytest.mark.parametrize(
    "name, tensors, elements",
    [
        ("ResNet-18", 62, 11_689_512),
        ("ResNet-50", 161, 25_557_032),
        ("ViT-B/16", 152, 86_567_656),
        ("GPT-2", 148, 124_439_808),
    ],
)
def test_lists_have_the_sizes_of_their_networks(name, tensors, elements):
    shapes = gpu.LISTS[name]
    assert (len(shapes), sum(map(torch.Size.numel, map(torch.Size, shapes)))) == (tensors, elements)


@pytest.mark.parametrize("dtype", gpu.DTYPES)
def test_every_candidate_is_measured_beside_a_copy_of_as_many_bytes(dtype):
    shapes, rounds = [(300,), (4, 25)], 3

    def stopwatch(call):
        start = time.perf_counter()
        call()
        seconds = time.perf_counter() - start
        return seconds, 2 * seconds

    measured = gpu.measure(shapes, dtype, rounds, CPU, stopwatch)
    copies = {"copy of 3", "copy of 5", "copy of 7"}
    assert measured.keys() == gpu.CANDIDATES.keys() | copies
    for name, one in measured.items():
        assert len(one["host"]) == len(one["device"]) == rounds
        accesses = int(one["copy"].removeprefix("copy of "))
        assert one["bytes"] == 400 * dtype.itemsize * accesses
        assert one["fraction_of_copy"] == 1.0 if name in copies else one["fraction_of_copy"] > 0


def test_tables_have_a_row_for_each_record_and_a_column_for_each_candidate():
    times = {"copy": "copy of 5", "bytes": 5000, "host": [3e-6, 1e-6, 2e-6], "device": [5e-6] * 3}
    measured = {name: {**times, "fraction_of_copy": 0.5} for name in [*gpu.CANDIDATES, "copy of 5"]}
    text = gpu.tables([{"list": "ResNet-18", "dtype": "float32", "measured": measured}])
    n = len(gpu.CANDIDATES)
    assert f"| ResNet-18 | float32 | 1 |{' 5.0 (0.50) |' * n}\n" in text
    assert f"| ResNet-18 | float32 | 1 |{' 2 |' * n}\n" in text
    header = next(line for line in text.splitlines() if line.startswith("| list"))
    assert header.count("|") == n + 4


def test_without_a_gpu_it_says_so_and_exits_with_2(tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.speed.gpu", "--output", tmp_path / "gpu"],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.splitlines()[-1].startswith("There is no GPU that PyTorch")
    assert not (tmp_path / "gpu").exists()
