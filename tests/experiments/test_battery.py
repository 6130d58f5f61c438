# SPDX-License-Identifier: MIT
"""The battery: what is chosen is the best, contenders meet on equal terms, and a battery that is
killed ends with the same bits as one that is not."""

import json
import math
import sys
from dataclasses import asdict, replace

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("scipy")

from benchmarks.battery import __main__ as command
from benchmarks.battery import advice, report, runs, stability
from benchmarks.battery.contenders import CONTENDERS, MOMENTA, POINTS, REFERENCE, Contender
from benchmarks.battery.plan import SMALL, Plan, missing
from benchmarks.battery.records import RESULTS, ROOT
from benchmarks.battery.tasks import TASKS, task_class
from benchmarks.paper.config import Run
from benchmarks.paper.task import Source
from benchmarks.paper.training import Trainer
from lpsgd.experiments._style import STYLES
from tests import helpers

ADAMW, SIGN = (c for c in CONTENDERS if c.name in (REFERENCE, "p=∞ (Signum)"))
TINY = Plan(("digits", "image"), (ADAMW, SIGN), 2, (0,), 1, shrink=1000)


class Killed(Exception):
    pass


def results_of(directory):
    """The files' contents without durations."""
    records = {file.name: json.loads(file.read_text()) for file in directory.glob("*.json")}
    for record in records.values():
        for run in record["runs"].values():
            del run["seconds"]
    return records


def test_a_battery_that_is_cut_off_ends_with_the_same_bits(tmp_path, monkeypatch):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    original, count = runs.train, 0

    def train(*arguments):
        nonlocal count
        count += 1
        if count in (3, 11):
            raise Killed
        return original(*arguments)

    runs.run(TINY, whole, Source(), 1)
    monkeypatch.setattr(runs, "train", train)
    for _ in range(2):
        with pytest.raises(Killed):
            runs.run(TINY, parts, Source(), 1)
    runs.run(TINY, parts, Source(), 1)
    results = results_of(whole)
    assert results_of(parts) == results
    assert count == sum(len(record["runs"]) for record in results.values()) + 2

    text = report.write(TINY, whole).read_text()
    assert (whole / "profile.png").read_bytes().startswith(b"\x89PNG")
    assert "none is missing" in text and "Left out: signals" in text
    for contender in TINY.contenders:  # in summary, settings, choices; by task in runs and trials
        assert text.count(f"\n| {contender.name} | ") == 7
    (parts / "image.json").unlink()  # without the other half nothing is chosen for digits
    text = report.write(TINY, parts).read_text()
    assert "| tuned setting |" in text and "| untuned" not in text

    record = json.loads((whole / "digits.json").read_text())
    key = next(iter(record["runs"]))
    record["runs"][key]["loss"] *= 1 + 1e-15
    (whole / "digits.json").write_text(json.dumps(record))
    (job,) = runs.repeat(TINY, "digits", whole, Source(), 1)
    assert job.run.key == key

    record["fingerprint"] = "other data"
    (whole / "digits.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="another fingerprint"):
        runs.run(TINY, whole, Source(), 1)


@pytest.mark.full
def test_two_processes_give_the_bits_of_one(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    for directory, arguments in ((one, ("--jobs", "1")), (two, ("--jobs", "2"))):
        command = [sys.executable, "-m", "benchmarks.battery", "--small", "--tasks", "digits"]
        helpers.run([*command, *arguments, "--results", str(directory)])
    assert results_of(two) == results_of(one)


class Known(dict):
    """Results of a plan's runs, which may be said by task, contender and setting."""

    def add(self, jobs, costs):
        for job, cost in zip(jobs, costs, strict=True):
            self[job.run.key] = {"cost": cost, "loss": cost}

    def trials(self, plan, task, contender, costs):
        self.add(plan.tuning(task, contender), costs)


def test_the_setting_with_the_smallest_cost_is_chosen_and_run_on_test_data():
    plan = replace(TINY, trials=3, contenders=(ADAMW,), tasks=("digits",), seeds=(0, 1))
    known = Known()
    assert plan.tuned(known, "digits", ADAMW) is None
    known.trials(plan, "digits", ADAMW, [5.0, 3.0, 4.0])
    jobs = list(missing(known, plan.wanted(known)))
    assert [(job.setting, job.run.seeds, job.run.final) for job in jobs] == [
        (ADAMW.label(1), (0,), True),
        (ADAMW.label(1), (1,), True),
    ]
    assert not any(job.run.final for job in plan.tuning("digits", ADAMW))
    assert not {job.run.seeds for job in plan.tuning("digits", ADAMW)} & {(0,), (1,)}


def test_of_equal_costs_the_smaller_loss_is_chosen_and_none_that_is_not_finite():
    plan = replace(TINY, trials=3)
    known = Known()
    known.trials(plan, "digits", ADAMW, [2.0, 2.0, 2.0])
    for job, loss in zip(plan.tuning("digits", ADAMW), ("nan", 0.4, 0.3), strict=True):
        known[job.run.key]["loss"] = loss
    assert plan.tuned(known, "digits", ADAMW) == 2


def test_an_untuned_setting_is_chosen_on_the_other_half():
    plan = replace(TINY, tasks=("digits", "signals", "table", "image"), trials=2)
    assert plan.halves() == (("digits", "table"), ("signals", "image"))
    known = Known()
    for task in plan.halves()[0]:
        known.trials(plan, task, SIGN, [1.0, 2.0])
    known.trials(plan, "signals", SIGN, [2.0, 1.0])
    assert plan.untuned(known, "image", SIGN) == 0
    assert plan.untuned(known, "digits", SIGN) is None
    known.trials(plan, "image", SIGN, [10.0, 22.0])  # 20 and 22 in all
    assert plan.untuned(known, "digits", SIGN) == 0
    known.trials(plan, "image", SIGN, [10.0, 18.0])
    assert plan.untuned(known, "digits", SIGN) == 1


@pytest.mark.parametrize(
    ("costs", "length"),
    [
        ({20: 1.0, 14: 1.0, 10: 1.0}, 10),
        ({20: 0.9, 14: 1.0, 10: 1.1}, 14),
        ({20: 0.9, 14: 1.1}, 20),
        ({20: 1.1, 28: 1.0}, 28),
        ({20: 1.1, 28: 1.1}, math.inf),
    ],
)
def test_the_horizon_is_the_shortest_that_reaches_adamw(costs, length):
    known = Known()
    for contender in TINY.contenders:
        known.trials(TINY, "digits", contender, [1.0, 2.0])
    known.add(TINY.at_horizon("digits", ADAMW, 0, 20), [1.0])
    assert TINY.search(known, "digits", SIGN) == (None, [])  # full length is among the final runs
    known.add(TINY.at_horizon("digits", SIGN, 0, 20), [costs[20]])
    asked = [20]
    while True:
        found, jobs = TINY.search(known, "digits", SIGN)
        if not jobs:
            break
        asked += [job.run.epochs for job in jobs]
        known.add(jobs, [costs[job.run.epochs] for job in jobs])
    assert found == length and asked == list(costs)
    (job,) = TINY.at_horizon("digits", SIGN, 0, 14)
    assert (job.run.epochs, job.run.warmup) == (14, 1.4)


def test_contenders_have_equal_spaces():
    assert len({name for name in (c.name for c in CONTENDERS)}) == len(CONTENDERS) == 13
    assert STYLES.keys() >= {c.name for c in CONTENDERS}
    assert sorted(int(8 * place) for place, _, _ in POINTS) == list(range(8))
    for contender in CONTENDERS:
        runs = [contender.at(trial) for trial in range(8)]
        settings = [run["settings"] for run in runs]
        momenta = [s["betas"][0] if "betas" in s else s["momentum"] for s in settings]
        assert sorted(momenta) == sorted(2 * MOMENTA)
        lrs = [
            run["lr"] / (1 - beta) if contender.optimizer == "SGDM" else run["lr"]
            for run, beta in zip(runs, momenta, strict=True)
        ]
        assert max(lrs) / min(lrs) == pytest.approx(10 ** (2 * 7 / 8), rel=0.02)
        assert [trial for trial in range(8) if contender.at_edge(trial)] == [0, 5]
        for run in runs:
            assert run["settings"].get("weight_decay", 0) == 0


@pytest.mark.parametrize("contender", CONTENDERS, ids=lambda contender: contender.name)
def test_contenders_make_optimizers_and_meet_on_equal_terms(contender: Contender):
    pytest.importorskip(
        {"Lion": "lion_pytorch", "CautiousAdamW": "timm"}.get(contender.optimizer, "torch")
    )
    plan = replace(TINY, contenders=(contender,))
    problem = runs.problem_of("digits", True, Source(), plan.shrink)
    ours, theirs = (
        Trainer(plan.job("digits", one, 1, seed=3).run, problem) for one in (contender, ADAMW)
    )
    assert all(map(torch.equal, ours.params, theirs.params))
    assert torch.equal(problem.order(ours.generators), problem.order(theirs.generators))
    before = ours.flat_params()
    ours.step(torch.arange(32)[None])
    assert not torch.equal(before, ours.flat_params())
    group = ours.optimizer.param_groups[0]
    assert group.get("weight_decay", 0) == 0
    state = sum(
        t.numel() * t.element_size()
        for state in ours.optimizer.state.values()
        for t in state.values()
        if torch.is_tensor(t) and t.dim()
    )
    assert state == contender.bytes * len(before)


LONG = {"signals"}  # its data take seconds


@pytest.mark.parametrize(
    "task",
    [
        pytest.param(task, marks=[pytest.mark.full] if task in LONG else [])
        for task in TASKS
        if task != "cifar"
    ],
)
def test_a_task_can_be_learned_and_its_halves_of_data_are_apart(task):
    if task == "signals":
        pytest.importorskip("mnist1d")
    tuning, final = (task_class(task)(final, Source(), 50) for final in (False, True))
    assert tuning.fingerprint() != final.fingerprint()
    job = replace(TINY, shrink=50).job(task, ADAMW, 1, 0)
    (metrics,) = Trainer(job.run, final).train()[-1:]
    assert final.cost_of(metrics) < 0.99 * final.chance
    untrained = {"held_out_loss": [math.nan], "accuracy": [0.5]}
    assert final.cost_of(untrained) == final.chance
    perfect = {"held_out_loss": [1e-9], "accuracy": [1.0]}
    assert 0 < final.cost_of(perfect) < 1.1


def test_the_error_of_the_table_is_the_mean_over_classes():
    problem = runs.problem_of("table", True, Source(), 1)
    always = torch.zeros(len(problem.y_held_out), 8)
    always[:, 0] = 1.0
    _, correct = problem.losses(lambda _: always, problem.x_held_out, problem.y_held_out)
    assert correct.mean().item() == pytest.approx(1 / 8)
    assert (problem.y_held_out == 0).float().mean() > 0.5


def test_a_gradient_is_clipped_and_p_may_rise():
    settings = {"p": 3.0, "pivot": 1e-3}
    shared = {"seeds": (0,), "epochs": 2, "batch_size": 2048, "task": {"name": "digits"}}
    rising = Run(
        optimizer="LPSGDM", lr=1e-3, settings=settings, anneal_p=True, p_end=20.0, **shared
    )
    assert [metrics["p"] for metrics in Trainer(rising).train()] == [3.0, 20.0]
    clipped = Trainer(Run(optimizer="SGD", lr=1.0, clip_norm=1e-3, **shared))
    before = clipped.flat_params()
    clipped.step(torch.arange(64)[None])
    assert (clipped.flat_params() - before).norm().item() == pytest.approx(1e-3, rel=0.01)


def test_without_data_cifar_is_left_out_and_that_is_said(tmp_path, monkeypatch, capsys):
    plans = []
    monkeypatch.setattr(command, "run", lambda plan, *_: plans.append(plan))
    for arguments in ([], ["--data", str(tmp_path)], ["--small", "--tasks", "cifar", "gpt"]):
        monkeypatch.setattr("sys.argv", ["battery", "--results", str(tmp_path), *arguments])
        command.main()
    assert [("cifar" in plan.tasks, len(plan.tasks), plan.shrink) for plan in plans] == [
        (False, 7, 1),
        (True, 8, 1),
        (False, 1, SMALL.shrink),
    ]
    assert capsys.readouterr().out.count("CIFAR-10 is left out") == 2


def test_the_advice_is_tried_in_adamws_place_with_one_thing_changed():
    plan = advice.Advice(("digits",), seeds=(0,), battery=report.load(Plan(), RESULTS))
    trial = plan.battery.results["digits", REFERENCE].tuned.trial
    adamw = plan.job("digits", ADAMW, trial, seed=0).run

    def values(run):
        fields = asdict(run)
        return {**fields.pop("settings"), **fields}

    starts = {name: values(convert(adamw)) for name, convert in advice.STARTS.items()}
    starts[REFERENCE] = values(adamw)
    for job in plan.wanted({}):
        start = starts[job.contender]
        changed = {name for name, value in values(job.run).items() if start.get(name) != value}
        counts = {advice.AS_IT_IS: 0, "one byte, warm-up of 30 %": 2}
        assert len(changed) == counts.get(job.setting, 1), (job, changed)
    decayed = advice.setting(weight_decay=0.1)(adamw)
    for convert in advice.STARTS.values():
        run = convert(decayed)
        assert run.lr * run.settings["weight_decay"] == pytest.approx(adamw.lr * 0.1)
    (third,) = (run for name, run in starts.items() if "a third of" in name)
    assert third["lr"] == pytest.approx(adamw.lr / 3)


def test_the_guide_has_what_the_advice_cost():
    plan = advice.Advice(tuple(TASKS), battery=report.load(Plan(), RESULTS))
    directory = RESULTS / "advice"
    assert advice.page(plan, directory) + "\n" == (directory / "README.md").read_text()


def test_the_guide_has_what_stability_measured():
    runs = json.loads((RESULTS / "stability.json").read_text())
    assert len(runs) == len(stability.NAMES) * len(stability.CHANGES) * len(stability.SEEDS)
    assert stability.table(runs) in (ROOT / "docs/battery.md").read_text()
