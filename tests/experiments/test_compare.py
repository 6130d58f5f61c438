# SPDX-License-Identifier: MIT
"""`compare` is fair: the best lr of each method, equal starts and batches, and test data that only
the final runs see."""

import itertools
import json
import math
import random

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LinearLR
from torch.utils.data import DataLoader, TensorDataset

pytest.importorskip("scipy")

from lpsgd import LPSGD, LPSGDM
from lpsgd.experiments import METHODS, Comparison, Method, _compare, accuracy, compare

SGD = Method(torch.optim.SGD, 1.0)
SIGN = Method(LPSGDM, 0.01, {"p": math.inf})
QUIET = {"progress": False, "epochs": 2}


def batches(count=2, size=8, part=0):
    generator = torch.Generator().manual_seed(part)
    x = torch.randn(count, size, 3, generator=generator)
    return [(one, (one[:, 0] > 0).long()) for one in x]


def model():
    return nn.Linear(3, 2)


def found_by(value_of, monkeypatch, **settings):
    """compare() where a run's value is a function of its lr."""

    def of(self, method, lr, seed, part):
        return {"value": value_of(lr), "loss": 0.0, "history": {"loss": [1.0], "delta": [1.0]}}

    monkeypatch.setattr(_compare._Runs, "of", of)
    data = batches(), batches(), batches()
    return compare(model, data, {"SGD": SGD}, **QUIET, **settings)


@pytest.mark.parametrize("best, tried", [(1.0, 3), (0.1, 5), (0.01, 7), (100.0, 7), (1e4, 7)])
@pytest.mark.parametrize("mode", ["min", "max"])
def test_the_grid_grows_until_the_best_lr_is_inside(best, tried, mode, monkeypatch):
    sign = 1 if mode == "min" else -1
    row = found_by(
        lambda lr: sign * math.log(lr / best) ** 2, monkeypatch, metric=accuracy, mode=mode
    ).rows[0]
    assert len(row.validation) == tried
    assert row.at_edge == (best == 1e4)
    if not row.at_edge:
        assert row.lr == pytest.approx(best)
    lrs = [lr for lr, _ in row.validation]
    assert all(b / a == pytest.approx(10**0.5) for a, b in itertools.pairwise(lrs))


def test_an_lr_that_diverges_never_wins(monkeypatch):
    row = found_by(lambda lr: math.nan if lr > 0.9 else 1.0, monkeypatch, extend=0).rows[0]
    assert row.lr < 0.9 and row.at_edge
    row = found_by(lambda lr: math.nan, monkeypatch, extend=1).rows[0]
    assert math.isnan(row.values[0])


@pytest.mark.parametrize("generator", [None, torch.Generator()])
def test_a_seed_means_the_same_weights_and_batches_for_all(generator):
    x = torch.arange(12.0)[:, None].repeat(1, 3)
    loader = DataLoader(
        TensorDataset(x, torch.zeros(12).long()), 4, shuffle=True, generator=generator
    )
    seen = []

    def noticed(model, batch):
        if torch.is_grad_enabled():
            seen.append((model.weight.sum().item(), batch[0][:, 0].tolist()))
        return _compare.cross_entropy(model, batch)

    held_out = batches()
    methods = {"a": Method(LPSGD, 0.01), "b": SGD}
    compare(
        *(lambda: nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 2))[1], (loader, held_out), methods),
        **QUIET,
        loss=noticed,
        lr_trials=1,
        extend=0,
        seeds=(0, 1),
    )
    runs = [seen[i : i + 6] for i in range(0, len(seen), 6)]  # 2 epochs of 3 steps
    orders = [[order for _, order in run] for run in runs]
    assert len(runs) == 6 and orders[:3] == orders[3:]
    assert [run[0] for run in runs[:3]] == [run[0] for run in runs[3:]]
    assert len({str(order) for order in orders[:3]}) == 3
    assert orders[0][:3] != orders[0][3:]  # every epoch has its own


def test_runs_that_do_not_begin_alike_are_refused():
    def own_random():
        network = model()
        nn.init.constant_(network.weight[0], random.random())
        return network

    with pytest.raises(ValueError, match="runs of seed 100 do not begin alike"):
        compare(own_random, (batches(), batches()), {"SGD": SGD}, **QUIET)


def test_only_final_runs_see_the_test_data():
    data = [[(x, y + 2 * part) for x, y in batches()] for part in range(3)]

    def loss(model, batch):
        return model(batch[0]).square().mean()

    def part(model, batch):
        return (batch[1] // 2).float()

    found = compare(model, data, {"SGD": SGD}, **QUIET, loss=loss, metric=part, mode="min")
    assert found.rows[0].values == [2.0] * 3
    assert {value for _, value in found.rows[0].validation} == {1.0}
    assert found.label == "part" and found.held_out == "test"
    found = compare(model, data[:2], {"SGD": SGD}, **QUIET, loss=loss)
    assert "test data" in found.table() and found.held_out == "validation"


class Killed(Exception):
    pass


def test_a_comparison_that_is_cut_off_goes_on_where_it_was(tmp_path, monkeypatch):
    methods = {"SGD": SGD, "sign": SIGN}
    data = batches(), batches(part=1), batches(part=2)
    whole = compare(model, data, methods, **QUIET, file=tmp_path / "whole.json")
    original, count = _compare._Runs._train, 0

    def train(self, *arguments):
        nonlocal count
        count += 1
        if count in (3, 9):
            raise Killed
        return original(self, *arguments)

    monkeypatch.setattr(_compare._Runs, "_train", train)
    file = tmp_path / "parts.json"
    for _ in range(2):
        with pytest.raises(Killed):
            compare(model, data, methods, **QUIET, file=file)
    parts = compare(model, data, methods, **QUIET, file=str(file))
    assert json.loads(file.read_text()) == json.loads((tmp_path / "whole.json").read_text())
    assert parts == whole
    assert count == 2 + len(json.loads(file.read_text())["runs"])

    before = count
    compare(model, data, {"SGD": SGD}, **QUIET, file=file)
    assert count == before
    other = Method(torch.optim.SGD, 1.0, {"momentum": 0.5})
    compare(model, data, {"SGD": other}, **QUIET, file=file)  # by its settings, not its name
    assert count > before
    for changed in (
        {"data": (batches(), batches(part=3), batches(part=2))},
        {"data": (batches(), batches(part=1), batches(part=3))},
        {"data": (batches(part=3), batches(part=1), batches(part=2))},
        {"epochs": 3},
        {"model": lambda: nn.Sequential(nn.Linear(3, 2), nn.ReLU())},
        {"metric": accuracy, "mode": "max"},
    ):
        arguments = {"model": model, "data": data, "methods": methods, **QUIET, **changed}
        with pytest.raises(ValueError, match="is of another comparison"):
            compare(**arguments, file=file)


def test_any_module_loss_and_schedule_will_do():
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 1)

        def forward(self, *, x):
            return self.layer(x)

    def warmup(optimizer, steps):
        assert steps == 80
        return LinearLR(optimizer, 0.1, total_iters=steps // 10)

    def squares(model, batch):
        return (model(x=batch["x"]) - batch["y"]).square()

    data = [[{"x": x, "y": x @ torch.ones(3, 1)} for x, _ in batches()]] * 2
    methods = {
        "own": Method(torch.optim.Adam, 0.1, lr_schedule=warmup),
        "LPSGDM 6→2": Method(LPSGDM, 0.1, {"p": 6.0}, p_end=2.0, lr_schedule="constant"),
    }
    few = {"lr_trials": 1, "extend": 0, "seeds": (0, 1), "progress": False}
    found = compare(Network, data, methods, epochs=40, loss=squares, **few)
    assert all(max(row.values) < 0.3 for row in found.rows)
    assert "| own | warmup |" in found.table()
    first, *_, last = found.rows[1].per_epoch("delta").mean(axis=1)
    assert last < first / 10  # p has come to 2


def test_the_table_tests_against_the_reference_and_marks_edges(monkeypatch):
    pictures = pytest.importorskip("lpsgd.experiments._pictures")
    history = {"loss": [[1.0] * 3, [0.5] * 3], "delta": [[1.0] * 3, [0.5] * 3]}
    rows = [
        pictures.Row(name, 0.1, edge, values, history, [(0.1, 1.0)])
        for name, edge, values in (
            ("AdamW", False, [50.0, 51.0, 52.0]),
            ("SGDM", True, [52.0, 53.0, 54.5]),
            ("LPSGDM p=6", False, [math.nan] * 3),
        )
    ]
    methods = {row.name: METHODS[row.name] for row in rows}
    found = Comparison(rows, methods, "accuracy", "max", "AdamW", (0, 1, 2), "test")
    lines = found.table().splitlines()
    assert lines[2:5] == [
        "| AdamW | cosine | 0.1 (1) | 51.0 ± 1.0 |  |  |",
        "| SGDM | cosine | 0.1* (1) | 53.2 ± 1.3 | **+2.2 ± 0.7** | 0.0059 |",
        "| LPSGDM p=6 | cosine | 0.1 (1) | nan ± nan |  |  |",
    ]
    assert lines[-1].startswith("\\* the first or last")
    assert found._repr_markdown_() == found.table()
    pytest.importorskip("matplotlib").use("Agg")
    search, losses, values, steps = found.plot().axes
    assert [len(axes.lines) for axes in (search, losses, values, steps)] == [6, 3, 6, 3]
    assert [text.get_text() for text in values.get_yticklabels()] == list(methods)
    pytest.importorskip("pandas")
    frame = found.to_frame()
    assert frame[frame.method == "SGDM"].value.tolist() == [52.0, 53.0, 54.5]


def test_the_callers_random_numbers_stay(monkeypatch):
    state = torch.get_rng_state()
    compare(model, (batches(), batches()), {"SGD": SGD}, **QUIET, seeds=(0,))
    assert torch.equal(state, torch.get_rng_state())


def test_the_methods_train():
    data = batches(4), batches()
    found = compare(model, data, METHODS, progress=False, epochs=20, lr_trials=1, seeds=(0,))
    assert [row.name for row in found.rows] == list(METHODS)
    assert all(row.values[0] < 0.5 for row in found.rows)  # at the start about log 2


@pytest.mark.parametrize(
    "changed, error, match",
    [
        ({"metric": accuracy}, ValueError, "mode must be"),
        ({"mode": "max"}, ValueError, "mode must be"),
        ({"metric": accuracy, "mode": "best"}, ValueError, "mode must be"),
        ({"reference": "Adam"}, ValueError, "reference must be one of"),
        ({"methods": {}}, ValueError, "reference must be one of"),
        ({"data": (batches(),)}, ValueError, "data must be"),
        ({"data": (iter(batches()), batches())}, TypeError, "no len"),
        ({"seeds": (1, 1)}, ValueError, "seeds must be different"),
        ({"tuning_seeds": ()}, ValueError, "tuning_seeds must be"),
        ({"epochs": 0}, ValueError, "Invalid epochs: 0"),
        ({"lr_trials": 0}, ValueError, "Invalid lr_trials: 0"),
    ],
)
def test_refusals(changed, error, match):
    arguments = {"model": model, "data": (batches(), batches()), "methods": {"SGD": SGD}, **QUIET}
    with pytest.raises(error, match=match):
        compare(**{**arguments, **changed})


def test_methods_are_checked():
    with pytest.raises(ValueError, match="Invalid learning rate: 0"):
        Method(LPSGD, 0.0)
    with pytest.raises(ValueError, match="Invalid lr_schedule: 'linear'"):
        Method(LPSGD, 0.1, lr_schedule="linear")
