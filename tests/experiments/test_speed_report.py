# SPDX-License-Identifier: MIT
"""benchmarks/speed: what is stepped, what is measured of it, and what is said about it."""

import json
import math
import subprocess
import sys
from dataclasses import asdict

import pytest
import torch
from torch.testing._internal.two_tensor import TwoTensor

from benchmarks.speed import footprint, released, report, targets, training
from benchmarks.speed.step import ALL, LISTS
from benchmarks.speed.timing import Record, Setting, measure
from helpers import ROOT, bits

SECONDS = {"LPSGDM p=4": [2.0, 2.0, 8.0], "memory": [4.0, 1.0, 2.0], "SGD fused": [1.0, 2.0, 4.0]}


def run(*arguments):
    result = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_quick_run_reports_every_part_and_can_report_it_again(tmp_path):
    lists = ["64k", "1 x 10", "1 x 30", "1 x 64", "10 x 64"]
    quick = ["--quick", "--lists", *lists]
    output = run("-m", "benchmarks.speed", *quick, "--output", tmp_path / "first")
    for heading in ("Targets", "Without momentum", "Other dtypes", "step() of", "import lpsgd"):
        assert f"**{heading}" in output
    for name in ("bars", "sizes", "tensors", "threads"):
        assert (tmp_path / "first" / f"speed_{name}.png").read_bytes().startswith(b"\x89PNG")
    results = json.loads((tmp_path / "first" / "bench.json").read_text())
    assert {one["optimizer"] for one in results["training"]} == {*training.CONTENDERS}
    temporaries = {one["optimizer"]: one["temporaries"] for one in results["memory"]}
    assert temporaries["LPSGDM p=4"] < 1 << 20 < temporaries["SGD foreach"]
    state = {(one["dtype"], one["optimizer"]): one["state"] for one in results["states"]}
    assert state["bfloat16", "LPSGDM one byte"] == state["float32", "LPSGDM one byte"] == 1.0
    assert state["float32", "LPSGDM"] == 4.0 < 8.0 <= state["float32", "AdamW"]
    peak = {one["optimizer"]: one["peak"] for one in results["states"] if one["dtype"] != "float32"}
    # 1.5 of the 2 bytes, as one of four layers holds its gradients; so small a network is noisy.
    assert peak["LPSGDM one byte, released"] < peak["LPSGDM one byte"] - 0.75
    arguments = ["--from", tmp_path / "first" / "bench.json", "--output", tmp_path / "second"]
    assert run("-m", "benchmarks.speed", *arguments) == output


def test_state_is_that_of_the_tensors_inside_and_shared_ones_count_once():
    shared, own = torch.zeros(8), torch.zeros(5, dtype=torch.uint8)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1)) for _ in "12"])
    for param in optimizer.param_groups[0]["params"]:
        optimizer.state[param] = {"step": 3, "map": shared, "two": TwoTensor(own, own.clone())}
    assert footprint.state_bytes(optimizer) == 8 * 4 + 3 * 5


def test_the_smallest_way_to_train_follows_the_largest(tmp_path):
    sums = {name: way.all for name, way in released.WAYS.items()}
    assert (sums["AdamW, float32 weights"], sums[released.LARGEST]) == (16, 12)
    assert (sums["LPSGDM, one byte"], sums[released.SMALLEST]) == (5, 3)
    shape = released.Shape(context=8, width=32, layers=1, heads=2, windows=2)
    curves = {
        name: released.curve(name, shape, 40) for name in (released.LARGEST, released.SMALLEST)
    }
    large, small = curves.values()
    assert small == pytest.approx(large, abs=0.05)
    assert small[1] < small[0] - 0.2
    assert small != large
    released.draw(curves, tmp_path / "released.png")
    assert (tmp_path / "released.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.full
def test_the_footprint_of_every_way_is_measured(tmp_path):
    output = run("-m", "benchmarks.speed.released", "--quick", "--output", tmp_path)
    assert all(f"| {name} |" in output for name in released.WAYS)
    assert (tmp_path / "released.png").exists()


def test_an_optimizer_that_does_not_run_here_is_shown_in_its_own_words():
    def make(params):
        raise RuntimeError("needs a GPU")

    rows = [footprint.state_of("float32", "other", make, 4)]
    assert "RuntimeError: needs a GPU" in report.states_table(rows)


def test_micro_benchmarks_run():
    run("-m", "pytest", "benchmarks/speed/test_micro.py", "--benchmark-disable", "-k", "64")


@pytest.mark.parametrize("caches", ["fresh", "cold", "warm"])
def test_every_contender_is_timed_in_every_round(caches):
    contenders = {name: make for name, make in ALL.items() if name != "eager LPSGDM compiled"}
    record = measure(Setting("3 x 16", caches=caches), contenders, 0.0, (2, 5))
    assert record.seconds.keys() == contenders.keys()
    assert all(len(one) == 2 and min(one) > 0 for one in record.seconds.values())


@pytest.mark.full  # half a minute of compilation
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
def test_compiled_contender_makes_the_step_of_lpsgdm():
    torch.manual_seed(0)
    params = [[torch.nn.Parameter(torch.ones(5)) for _ in range(2)] for _ in range(2)]
    grads = [torch.randn(5) for _ in range(2)]
    for name, own in zip(("LPSGDM p=4", "eager LPSGDM compiled"), params, strict=True):
        optimizer = ALL[name](own)
        for _ in range(3):
            for param, grad in zip(own, grads, strict=True):
                param.grad = grad.clone()
            optimizer.step()
    for a, b in zip(*params, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("momentum", [True, False])
def test_the_bound_passes_every_word_once(threads, momentum, two_threads):
    params = [torch.nn.Parameter(torch.zeros(size)) for size in (2, 0, 64, 1000)]
    for param in params:
        param.grad = torch.rand_like(param)
    bound = ALL["memory" if momentum else "memory, no momentum"](params)
    torch.set_num_threads(threads)
    bound.step()
    for param, copy in zip(params, bound.copies, strict=True):
        assert torch.equal(bits(copy), bits(param.grad))  # 0 exclusive-or (0 + the gradient)


def test_networks_have_the_parameters_of_their_lists():
    assert [tuple(param.shape) for param in training.ResNet18().parameters()] == LISTS["ResNet-18"]
    elements = {name: sum(map(math.prod, shapes)) for name, shapes in LISTS.items()}
    assert (elements["ResNet-50"], elements["ViT-B/16"]) == (25_557_032, 86_567_656)
    assert elements["GPT-2"] == 124_439_808


def test_ratios_are_those_of_rounds():
    record = Record(Setting("64k"), SECONDS, 0.0)
    ratio = record.ratio("LPSGDM p=4", "memory")
    assert (ratio.median, ratio.low, ratio.high) == (2.0, 1.25, 3.0)
    assert record.ratio("LPSGDM p=4", "memory", "SGD fused").median == 2.0
    assert ratio.margin == pytest.approx(1.57 * 1.75 / math.sqrt(3))


def test_targets_are_judged_by_their_medians():
    fast, slow = (
        Record(Setting("64M", threads=2), {**SECONDS, "LPSGDM p=4": own}, 0.0)
        for own in ([1.1, 1.1, 2.2], [1.3, 1.3, 2.6])
    )
    assert [one.is_reached for one in targets.outcomes([fast])] == [True]
    assert [one.is_reached for one in targets.outcomes([slow])] == [False]
    assert "0 of 1 are reached" in report.targets_table([slow])


def test_half_precision_is_compared_with_float32():
    wide = Record(Setting("16M", threads=2), SECONDS, 0.0)
    times = {"LPSGDM p=4": [3.0] * 3, "LPSGDM one byte": [2.0] * 3, "memory": [1.0] * 3}
    half = Record(Setting("16M", "bfloat16", 2), times, 0.0)
    ratios = {one.peer: one.ratio.median for one in targets.outcomes([wide, half])}
    assert ratios[targets.HALF] == 0.75  # 3 times that of half the memory, against 2 times
    assert ratios[targets.WIDE] == 0.5


def test_results_survive_json():
    times = training.Times("GPT", 1, "SGD", [3.0], [1.0])
    results = report.Results({}, [Record(Setting("64k"), SECONDS, 0.0)], [times], [], {}, [])
    assert report.Results.from_json(json.loads(json.dumps(asdict(results)))) == results
    assert times.share() == 0.25
