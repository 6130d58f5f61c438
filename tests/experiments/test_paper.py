# SPDX-License-Identifier: MIT
"""The programs of benchmarks/paper: what is trained is what the configuration says, and a run that
is killed ends with the same bits as one that is not."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

pytest.importorskip("sklearn")
pytest.importorskip("scipy")

from benchmarks.paper import hessian, momentum_dtype, networks, report, spectra, sweep
from benchmarks.paper.characters import Characters
from benchmarks.paper.config import CONFIGS, Run, load
from benchmarks.paper.methods import make_optimizer
from benchmarks.paper.task import Source, Task
from benchmarks.paper.tasks import make_task
from benchmarks.paper.training import Machine, Trainer, read_result
from helpers import ROOT

DIGITS = {"name": "digits"}
CHARACTERS = {"name": "characters", "examples": 24, "context": 8, "width": 8, "layers": 1}
IMAGES = {"name": "images", "data": "cifar10", "network": "resnet8-fast", "images": 30}
RUNS = {
    "digits": Run(DIGITS, "LPSGDM", 0.01, (0, 1), 3, 512, {"p": 6.0}, anneal_p=True),
    "images": Run(
        {**IMAGES, "validation": 10},
        *("SGDM", 0.1, (0,), 2, 8),
        lr_schedule="cosine",
        warmup=1,
        channels_last=True,
    ),
    "characters": Run(
        {**CHARACTERS, "heads": 2, "held_out": 16},
        *("AdamW", 0.01, (0,), 2, 8),
        every="epoch",
        lr_schedule="cosine",
        amp="bfloat16",
    ),
    "float16": Run(DIGITS, "LPSGD", 0.01, (0,), 2, 512, amp="float16"),
    "one byte": Run(DIGITS, "LPSGDM", 0.01, (0,), 2, 512, {"momentum_dtype": "float8_e5m2"}),
}


class Killed(Exception):
    pass


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three classes of ten images each, in ImageFolder layout; an image's first pixel names it."""
    root = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for part in ("train", "test"):
        for label, name in enumerate(("ant", "bee", "cat")):
            (root / part / name).mkdir(parents=True)
            for i in range(20):
                pixels = generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                pixels[0, 0] = label, i, part == "train"
                Image.fromarray(pixels).save(root / part / name / f"{i:02}.png")
    return root


@pytest.fixture
def source(folder, tmp_path):
    return Source(folder, tmp_path / "data")


def without_seconds(history):
    return [{k: v for k, v in metrics.items() if k != "seconds"} for metrics in history]


def final_parameters(directory, run):
    return torch.load(directory / f"model-{run.epochs}.pt")


def assert_same_run(directory, other, run):
    """The metrics and parameters of two directories are equal, bit for bit."""
    assert without_seconds(read_result(directory)) == without_seconds(read_result(other))
    lines = [(d / "metrics.jsonl").read_text().splitlines() for d in (directory, other)]
    a, b = (without_seconds(map(json.loads, part)) for part in lines)
    assert a == b
    ours, theirs = final_parameters(directory, run), final_parameters(other, run)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("name", RUNS)
def test_a_run_stopped_at_every_step_resumes_to_the_same_bits(name, source, tmp_path, monkeypatch):
    run = replace(RUNS[name], snapshots=(RUNS[name].epochs,))
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    machine = Machine(source, checkpoint_seconds=0.0)
    task = make_task(run.task, run.final, source)
    # So that the scale for float16 changes, up and down.
    scaler = partial(torch.amp.GradScaler, growth_interval=1)
    monkeypatch.setattr(torch.amp, "GradScaler", scaler)
    Trainer(run, task, whole, machine).train()

    original, steps = Trainer.step, 0

    def one_step_and_die(self, indices):
        nonlocal steps
        if steps:
            steps = 0
            raise Killed
        steps += 1
        return original(self, indices)

    monkeypatch.setattr(Trainer, "step", one_step_and_die)
    deaths = 0
    while read_result(parts) is None:
        try:
            Trainer(run, task, parts, machine).train()
        except Killed:
            deaths += 1
    assert deaths > run.epochs
    assert_same_run(parts, whole, run)


@pytest.mark.full
def test_a_process_killed_at_a_random_moment_resumes_to_the_same_bits(tmp_path):
    command = [sys.executable, "-m", "benchmarks.paper.train", tmp_path / "study.toml"]
    command += ["--method", "LPSGDM", "--checkpoint-seconds", "0"]
    (tmp_path / "study.toml").write_text(
        'title = "A study"\n[run]\nepochs = 12\nbatch_size = 16\nsnapshots = [12]\n'
        'task.name = "digits"\n[methods.LPSGDM]\noptimizer = "LPSGDM"\nlr = 0.01\nanneal_p = true'
    )
    environment = dict(os.environ, OMP_NUM_THREADS="1")

    def start(output):
        return subprocess.Popen(
            [*command, "--output", output],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )

    def directory(output):
        return next((output / "runs").iterdir())

    run = load(tmp_path / "study.toml").methods[0].run
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    other = start(whole)
    process = start(parts)
    while not list(parts.glob("runs/*/checkpoint.pt")):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.001)
    time.sleep(random.uniform(0.0, 0.2))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert read_result(directory(parts)) is None
    for process in (start(parts), other):
        assert process.wait(120) == 0, process.stderr.read()
        process.stderr.close()
    assert_same_run(directory(parts), directory(whole), run)


# The operations with which files are written, in order: each is a moment at which to die. Children
# of one process that has imported everything train, one after the other.
KILL_AT = """
import os, signal, sys
import benchmarks.paper.records as records
left = 10**9
def moment():
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
def around(name):
    original = getattr(os, name)
    def act(*arguments):
        moment()
        result = original(*arguments)
        moment()
        return result
    setattr(os, name, act)
original_write = records.write_whole
def write_whole(file, write):
    def write_and_cut(part):
        write(part)
        with open(part, "rb+") as stream:
            size = stream.seek(0, 2)
            whole = (stream.seek(0), stream.read())[1]
            stream.truncate(size // 2)
            stream.flush()
            moment()  # half of it is on the disk
            stream.seek(0)
            stream.write(whole)
    original_write(file, write_and_cut)
records.write_whole = write_whole
around("replace"), around("fsync")
import benchmarks.paper.train, sklearn.datasets
arguments = sys.argv
for start in arguments[2:]:
    moments, _, output = start.partition(":")
    left = int(moments)
    sys.argv = [arguments[0], arguments[1], "--method", "LPSGDM", "--checkpoint-seconds", "0"]
    sys.argv += ["--output", output]
    child = os.fork()
    if child == 0:
        benchmarks.paper.train.main()
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def test_a_process_killed_at_every_moment_of_writing_resumes_to_the_same_bits(tmp_path):
    """A start writes the log at moments 0 to 4, then checkpoints at five moments each: half is
    written, before and after the sync, before and after it takes its place."""
    study = tmp_path / "study.toml"
    study.write_text(
        'title = "A study"\n[run]\nepochs = 2\nbatch_size = 512\nsnapshots = [2]\n'
        'task.name = "digits"\n[methods.LPSGDM]\noptimizer = "LPSGDM"\nlr = 0.01\nanneal_p = true'
    )
    run = load(study).methods[0].run
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    starts = [(10**9, whole), *((moments, parts) for moments in range(4, 9)), (10**9, parts)]
    command = [sys.executable, "-c", KILL_AT, study, *(f"{n}:{output}" for n, output in starts)]
    result = subprocess.run(
        command,
        cwd=ROOT,
        env=dict(os.environ, OMP_NUM_THREADS="1"),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        timeout=300,
        text=True,
    )
    statuses = [int(line) for line in result.stdout.splitlines() if line.lstrip("-").isdigit()]
    assert statuses == [0, *[-signal.SIGKILL] * 5, 0]
    (ours,), (theirs,) = ((output / "runs").iterdir() for output in (parts, whole))
    assert_same_run(ours, theirs, run)


def test_a_checkpoint_that_is_cut_off_leaves_the_one_before(tmp_path, monkeypatch):
    run = RUNS["digits"]
    trainer = Trainer(run, None, tmp_path, Machine(stop_after=1))
    trainer.train()
    monkeypatch.setattr(os, "replace", lambda *_: 1 / 0)
    trainer.progress.epoch = 2
    with pytest.raises(ZeroDivisionError):
        trainer.save()
    monkeypatch.undo()
    again = Trainer(run, None, tmp_path)
    again.resume()
    assert again.progress.epoch == 1


def test_a_checkpoint_of_other_settings_is_refused(tmp_path):
    run = RUNS["digits"]
    Trainer(run, None, tmp_path, Machine(stop_after=1)).train()
    with pytest.raises(ValueError, match="another run"):
        Trainer(replace(run, lr=0.02), None, tmp_path).train()


def test_two_processes_train_what_one_does(tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    arguments = ["-m", "benchmarks.paper.train", "digits", "--method", "LPSGDM p=6", "--lr", "0.01"]
    arguments += ["--lr-schedule", "constant", "--epochs", "2", "--output", tmp_path / "two"]
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    subprocess.run([*torchrun, "2", *arguments], cwd=ROOT, env=environment, check=True)
    (result,) = (tmp_path / "two" / "runs").glob("*/result.json")
    *_, two = read_result(result.parent)
    run = json.loads(result.read_text())["run"]
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in run.items()}
    trainer = Trainer(Run(**fields))
    trainer.examples -= 1  # they leave out the last of an odd number
    *_, one = trainer.train()
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)
    assert two["held_out_loss"] == pytest.approx(one["held_out_loss"], rel=1e-4)


@pytest.mark.parametrize("name", ["digits", "images", "characters"])
def test_shares_of_a_batch_are_together_the_batch(name, source):
    task = make_task(RUNS[name].task, True, source)

    def batch(*shares):
        generators = [torch.Generator().manual_seed(seed) for seed in RUNS[name].seeds]
        order = task.order(generators)[:, :8]
        states = [generator.get_state() for generator in generators]
        parts = []
        for share in shares:
            for generator, state in zip(generators, states, strict=True):
                generator.set_state(state)
            parts.append(task.batch(order, generators, torch.device("cpu"), share))
        return parts

    (whole,) = batch(slice(None))
    left, right = batch(slice(0, 4), slice(4, 8))
    dim = 1 if name == "digits" else 0
    for a, b, both in zip(left, right, whole, strict=True):
        assert torch.equal(torch.cat([a, b], dim), both)


def test_images_are_read_once_and_tuning_never_sees_the_test_data(source, folder):
    tuning = make_task(RUNS["images"].task, False, source)
    final = make_task(RUNS["images"].task, True, source)
    written = {file: file.stat().st_mtime_ns for file in source.cache.iterdir()}
    assert len(written) == 2
    make_task(RUNS["images"].task, True, source)
    assert {file: file.stat().st_mtime_ns for file in source.cache.iterdir()} == written

    def names(x):
        return {tuple(pixel) for pixel in x[:, :, 0, 0].tolist()}

    train, validation = names(tuning.x[tuning.train]), names(tuning.x_held_out)
    assert len(train) == 30 and len(validation) == 10 and not train & validation
    assert all(is_train for _, _, is_train in train | validation)
    assert len(final.train) == 30
    assert not any(is_train for _, _, is_train in names(final.x_held_out))
    assert final.y.tolist() == final.x[:, 0, 0, 0].tolist()


def test_runs_on_other_data_lie_elsewhere(tmp_path):
    places = {Source(data).runs(tmp_path) for data in (None, tmp_path / "a", tmp_path / "b")}
    assert len(places) == 3 and tmp_path / "runs" in places


def test_a_crop_shifts_and_mirrors_exactly():
    images = torch.rand(2, 3, 8, 8)
    boxes = networks.centre_boxes(2, (8, 8), 8).clone()
    boxes[1, 0] += 2
    ours = networks.crop(images, boxes, torch.tensor([True, False]), 8)
    torch.testing.assert_close(ours[0], images[0].flip(-1))
    torch.testing.assert_close(ours[1, :, :, :6], images[1, :, :, 2:])
    assert ours[1, :, :, 6:].abs().max() < 1e-5


def test_the_gpt_sees_no_future():
    task = Characters(False, Source(), 1, context=8, width=8, layers=2, heads=2)
    model = task.make_model([]).eval()
    x = torch.arange(8)[None]
    changed = x.clone()
    changed[0, 5] = 50
    differs = (model(x) != model(changed)).any(dim=2)[0]
    assert differs.tolist() == [False] * 5 + [True] * 3


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.toml")), ids=lambda file: file.stem)
@pytest.mark.parametrize("small", [False, True])
def test_a_configuration_is_fair_and_makes_its_optimizers(file, small):
    pytest.importorskip("lion_pytorch")
    study = load(file, small)
    assert len({len(method.lrs) for method in study.methods}) == 1
    names = [(method.name, method.run.lr_schedule) for method in study.methods]
    assert len(set(names)) == len(names)
    assert study.reference in {None, *(name for name, _ in names)}
    for figure in study.figures.values():
        assert figure["kind"] in report.FIGURES
        assert set(figure.get("methods", ())) <= {name for name, _ in names}
    for method in study.methods:
        make_optimizer(method.run, nn.Linear(2, 2).parameters())
        assert method.run.task["name"] != "images" or method.run.task["network"] in (
            networks.NETWORKS
        )


@pytest.mark.parametrize("name", ["vgg11", "resnet18", "resnet50"])
def test_networks_for_small_images_keep_their_size_until_the_first_stage(name):
    pytest.importorskip("torchvision")
    model = networks.NETWORKS[name](10).eval()
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 10)
    sizes = []
    layer = model.features[0] if name == "vgg11" else model.layer1
    layer.register_forward_hook(lambda _, inputs, output: sizes.append(inputs[0].shape[-1]))
    model(torch.zeros(1, 3, 32, 32))
    assert sizes == [32]


@pytest.fixture
def study(tmp_path):
    (tmp_path / "study.toml").write_text(
        'title = "A study"\nreference = "LPSGDM p=2"\nseeds = [0, 1]\n'
        '[run]\nepochs = 2\nbatch_size = 256\nlr = [1e-30, 1.0]\ntask.name = "digits"\n'
        '[methods."LPSGDM p={p:g}"]\noptimizer = "LPSGDM"\nsettings.p = [2.0, inf]\n'
        '[figures.study]\nkind = "overview"\n'
    )
    return load(tmp_path / "study.toml")


def test_a_sweep_takes_the_best_lr_of_the_validation_data(study, tmp_path, monkeypatch):
    losses = {(1e-30, False): 1.0, (1.0, False): 2.0, (1e-30, True): 9.0, (1.0, True): 0.0}

    def train(self):
        loss = losses[self.run.lr, self.run.final]
        return [{"epoch": 1, "held_out_loss": [loss] * 2, "accuracy": [0.5] * 2, "loss": [1.0]}]

    monkeypatch.setattr(Trainer, "train", train)
    results = sweep.sweep(study, tmp_path, Machine(), jobs=1)
    assert [result.final.lr for result in results] == [1e-30, 1e-30]
    assert all(result.final.held_out_loss == [9.0, 9.0] for result in results)


def test_a_sweep_that_is_cut_off_goes_on_where_it_was(study, tmp_path, monkeypatch):
    whole = sweep.run_study(study, tmp_path / "whole", tmp_path / "whole", Machine(), 1)
    original, count = Trainer.train, 0

    def train(self):
        nonlocal count
        count += 1
        if count == 4:
            raise Killed
        return original(self)

    monkeypatch.setattr(Trainer, "train", train)
    with pytest.raises(Killed):
        sweep.run_study(study, tmp_path / "parts", tmp_path / "parts", Machine(), 1)
    parts = sweep.run_study(study, tmp_path / "parts", tmp_path / "parts", Machine(), 1)
    assert count == 1 + len(study.methods) * 3

    def results(file):
        record = json.loads(file.read_text())["results"]
        for result in record:
            del result["history"]["seconds"]
        return record

    assert results(parts) == results(whole)


def test_a_report_has_each_method_and_marks_what_lies_at_the_edge(study, tmp_path):
    file = sweep.run_study(study, tmp_path, tmp_path, Machine(), 1)
    text = report.table(report.read(file))
    assert text.count("| LPSGDM p=2 | ") == 1 and text.count("| LPSGDM p=∞ | ") == 1
    assert text.count("*") > 2
    page = report.section(file, tmp_path)
    assert text in page and "(study.json)" in page and "(study.png)" in page
    assert (tmp_path / "study.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("measure", ["accuracy", "loss"])
def test_a_run_whose_loss_is_not_finite_ends_early_and_never_wins(study, tmp_path, measure):
    diverging = replace(study.methods[0], lrs=(1e30, 1e-3))
    run = replace(diverging.run, epochs=5, evaluate_every=5)
    study = replace(study, methods=(replace(diverging, run=run),), measure=measure)
    (result,) = sweep.sweep(study, tmp_path, Machine(), 1)
    assert len(result.tuning[0].history) < 5
    assert result.final.lr == 1e-3


class Bowl(Task):
    """A loss with a known Hessian: half the sum of curvatures times the squares of parameters."""

    curvatures = torch.tensor([-1.0, *[0.0] * 60, 2.0, 10.0])

    def __init__(self):
        pass

    def make_model(self, generators):
        return nn.Linear(len(self.curvatures), 1, bias=False)

    def losses(self, model, inputs, targets):
        return (self.curvatures * model.weight.square()).sum(1, True).expand(
            1, len(inputs)
        ) / 2, None

    describe = batch = held_out = None


def test_the_spectrum_has_the_eigenvalues_and_their_shares():
    pytest.importorskip("curvlinops")
    torch.manual_seed(0)
    task = Bowl()
    moment = hessian.examine(task, task.make_model([]), 3, (torch.zeros(4, 1), torch.zeros(4)))
    assert (moment.epoch, round(moment.smallest, 3), round(moment.largest, 3)) == (3, -1.0, 10.0)
    grid, density = np.array(moment.grid), np.array(moment.density)
    step = grid[1] - grid[0]
    assert density.sum() * step == pytest.approx(1.0, rel=0.05)
    assert density[abs(grid) < 0.5].sum() * step > 0.8


def test_spectra_are_shown_on_common_axes():
    def moment(epoch, largest):
        grid, density = [-largest, 0.0, largest], [1e-9, 1.0, 0.1]
        extreme = {"smallest": -largest, "largest": largest, "flatness": 0.5}
        return {"epoch": epoch, "grid": grid, "density": density, **extreme}

    moments = {"SGDM": [moment(0, 2.0), moment(3, 9.0)], "AdamW": [moment(0, 2.0), moment(3, 40.0)]}
    assert "| SGDM | 2, 9 | 0.5, 0.5 |\n| AdamW | 2, 40 | 0.5, 0.5 |" in spectra.table(moments)
    figure = spectra.draw("A study", moments)
    panels, curves = (part.axes for part in figure.subfigs)
    assert len(panels) == 4 and len({axes.get_xlim() for axes in panels}) == 1
    assert [list(line.get_ydata()) for line in curves[0].lines] == [[2.0, 9.0], [2.0, 40.0]]
    report.plt.close(figure)


@pytest.mark.parametrize("p", [2.0, 3.0, 6.0, 100.0, math.inf])
def test_the_direction_is_the_steepest_of_the_ball(p):
    geometry = pytest.importorskip("lpsgd.experiments.geometry")
    gradient = torch.tensor([-0.7, 0.02], dtype=torch.float64)
    slopes = torch.tensor(geometry.ball(p)) @ gradient
    slope = geometry.direction(gradient, p) @ gradient
    assert slope <= slopes.min() + 1e-12
    assert slope >= slopes.min() - 1e-3


def test_momentum_dtypes_are_compared_seed_by_seed(tmp_path):
    (tmp_path / "study.toml").write_text(
        'title = "A study"\nmeasure = "loss"\nseeds = [0, 1, 2]\n'
        '[run]\noptimizer = "LPSGDM"\nepochs = 2\nbatch_size = 256\ntask.name = "digits"\n'
        "settings.momentum = [0.8, 0.9]\n"
        'settings.momentum_dtype = ["float32", "bfloat16", "float8_e5m2"]\n'
        '[methods."p={p:g}, β={momentum:g}, {momentum_dtype}"]\nlr = 0.003\nsettings.p = inf\n'
    )
    study = load(tmp_path / "study.toml")
    momentum_dtype.carry_out(study, tmp_path, tmp_path / "results", Machine(), 1)
    outcome = momentum_dtype.read(tmp_path / "results" / "study.json")
    assert [(s.p, s.momentum) for s in outcome.settings] == [("∞", 0.8), ("∞", 0.9)]
    for setting in outcome.settings:
        run = replace(
            study.methods[0].run, seeds=(1,), settings={"p": math.inf, "momentum": setting.momentum}
        )
        *_, last = Trainer(run).train()
        assert setting.values["float32"][1] == pytest.approx(last["held_out_loss"][0], rel=1e-3)
        assert len({tuple(values) for values in setting.values.values()}) == 3
    lines = momentum_dtype.table(outcome).splitlines()
    assert lines[-4].startswith("| ∞ | 0.9 | ") and lines[-1].startswith("| all > 2 | all | ")
    first, second, both = (mean.values["float32"] for mean in outcome.means())
    assert both == pytest.approx([(a + b) / 2 for a, b in zip(first, second, strict=True)])
    momentum_dtype.report(tmp_path / "results")
    picture = tmp_path / "results" / "momentum-dtype.png"
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_best_pivot_joins_the_best_lr_of_every_p():
    def row(p):
        lr = 1e-3 * 1e-4 ** (-1 / (p - 1))
        return report.Row("", lr, False, [], {}, [(lr, 1.0), (lr * 3, math.nan)], "", {"p": p})

    rows = [row(p) for p in (2.0, 3.0, 6.0, math.inf)]
    assert report.best_pivot(rows) == pytest.approx(1e-4)
