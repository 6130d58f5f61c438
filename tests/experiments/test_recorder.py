# SPDX-License-Identifier: MIT
"""A Recorder's figures are those of the equations, and it leaves training as it is."""

import math

import pytest
import torch
from torch import nn

from lpsgd import LPSGD, LPSGDM, CosineAnnealingP, release_gradients
from lpsgd.experiments import Recorder
from lpsgd.experiments._recorder import Record


def params_of(*shapes, dtype=torch.float32):
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in shapes]


def step(optimizer, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
    optimizer.step()


def flat(tensors):
    return torch.cat([x.detach().double().flatten() for x in tensors])


@pytest.mark.parametrize("p", [2.0, 6.0, math.inf])
@pytest.mark.parametrize("cls", [LPSGD, LPSGDM])
def test_records_are_those_of_the_equations(cls, p):
    params = params_of((3, 4), (5,))
    optimizer = cls(params, lr=0.01, p=p, weight_decay=0.3, pivot=0.2)
    recorder = Recorder(optimizer)
    for seed in (1, 2):
        before = flat(params)
        step(optimizer, seed)
    g = flat([param.grad for param in params])
    x = g
    if cls is LPSGDM:
        x = flat([optimizer.state[param]["momentum_buffer"] for param in params])
    one_over = 0.0 if p == math.inf else 1 / (p - 1)
    u = x.abs() ** one_over * 0.2**-one_over
    *_, record = recorder.records
    change = flat(params) - before
    # All is summed in float32, and eps moves u by 1e-8 / |x| of itself.
    assert record._replace(at_zero=None, saturated=None) == Record(
        *(2, 0, 0.01, p),
        pytest.approx(u.mean().item(), rel=1e-5),
        pytest.approx(change.abs().mean().item(), rel=1e-5),
        pytest.approx(g.norm().item(), rel=1e-5),
        *(None, None),
    )
    # Undoing the weight decay from the change gives the same u: the step is the equations'.
    undone = (change + 0.01 * 0.3 * before) / -0.01
    assert undone.abs().mean().item() == pytest.approx(record.u, rel=1e-4)


@pytest.mark.parametrize(
    "make, momentum",
    [
        (lambda params: torch.optim.SGD(params, 0.1), None),
        (lambda params: torch.optim.SGD(params, 0.1, 0.9, weight_decay=0.1), "momentum_buffer"),
        (lambda params: torch.optim.AdamW(params, 0.1, weight_decay=0.2), "exp_avg"),
    ],
    ids=["SGD", "SGDM", "AdamW"],
)
def test_other_optimizers_are_recorded_as_far_as_they_have_it(make, momentum):
    params = params_of((64,))
    optimizer = make(params)
    recorder = Recorder(optimizer)
    before = flat(params)
    params[0].grad = torch.randn(64)
    params[0].grad[:16] = 0.0
    optimizer.step()
    (record,) = recorder.records
    change = flat(params) - before
    assert record.p is None and record.lr == 0.1
    assert record.delta == pytest.approx(change.abs().mean().item(), rel=1e-5)
    if momentum == "exp_avg":  # Adam's first step moves by lr whatever has a gradient
        assert record.u == pytest.approx(0.75, rel=1e-5)
    else:
        assert record.u == pytest.approx(record.delta / 0.1, rel=1e-5)
    kept = momentum and optimizer.state[params[0]][momentum]
    assert record.at_zero == (None if momentum is None else (kept == 0).double().mean().item())
    assert record.saturated == (None if momentum is None else 0.0)


def test_u_is_right_where_the_parameters_lose_the_step():
    params = params_of((1000,), dtype=torch.bfloat16)
    params[0].data.fill_(1.0)
    optimizer = LPSGDM(params, lr=1e-5, p=math.inf)
    recorder = Recorder(optimizer)
    step(optimizer)
    (record,) = recorder.records
    assert record.delta == 0.0 and record.u == pytest.approx(1.0, rel=1e-3)


def test_momentum_of_one_byte_is_reported_by_group():
    params = params_of((4,), (4,))
    groups = [{"params": params[:1]}, {"params": params[1:], "lr": 0.5}]
    optimizer = LPSGDM(groups, lr=0.1, momentum=0.5, momentum_dtype=torch.float8_e5m2)
    recorder = Recorder(optimizer)
    params[0].grad = torch.tensor([0.25, 8.0, 0.0, -0.5])
    params[1].grad = torch.tensor([0.0, 0.0, 0.0, -0.5])
    optimizer.step()
    fields = [(r.group, r.lr, r.at_zero, r.saturated) for r in recorder.records]
    assert fields == [(0, 0.1, 0.25, 0.25), (1, 0.5, 0.75, 0.0)]


def test_every_nth_step_is_recorded_with_its_own_lr_and_p():
    optimizer = LPSGDM(params_of((3,)), lr=torch.tensor(1.0), p=6.0)
    CosineAnnealingP(optimizer, 4, every_step=True)
    recorder = Recorder(optimizer, every=2, step=10)
    seen = []
    for _ in range(5):
        seen.append((optimizer.param_groups[0]["lr"].item(), optimizer.param_groups[0]["p"]))
        step(optimizer)
        optimizer.param_groups[0]["lr"].mul_(0.5)
    assert [record.step for record in recorder.records] == [12, 14]
    assert [(record.lr, record.p) for record in recorder.records] == seen[1::2]


def test_closures_are_recorded():
    (param,) = params_of((3,))
    optimizer = LPSGD([param], lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = param.square().sum()
        loss.backward()
        return loss

    recorder = Recorder(optimizer)
    optimizer.step(closure)
    assert recorder.records[0].grad_norm == pytest.approx(param.grad.norm().item())


@pytest.mark.parametrize("cls", [LPSGDM, torch.optim.SGD])
def test_gradients_are_unscaled_and_skipped_steps_do_not_count(cls):
    (param,) = params_of((3,))
    optimizer = cls([param], lr=0.1, fused=True)
    recorder = Recorder(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for factor in (math.inf, 1.0):
        optimizer.zero_grad()
        scaler.scale((param * factor).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
    (record,) = recorder.records
    assert record.step == 1 and record.grad_norm == pytest.approx(math.sqrt(3))


def test_released_gradients_have_left_but_the_momentum_is_there():
    (param,) = params_of((3,))
    optimizer = LPSGDM([param], lr=0.1)
    release_gradients(optimizer)
    recorder = Recorder(optimizer)
    param.sum().backward()
    optimizer.step()
    (record,) = recorder.records
    assert record.delta is None and record.grad_norm is None
    assert record.u == pytest.approx(0.1 ** (1 / 5), rel=1e-5)


def test_a_step_that_calls_its_bases_is_one():
    class Derived(torch.optim.SGD):
        def step(self, closure=None):
            return super().step(closure)

    optimizer = Derived(params_of((3,)), lr=0.1)
    recorder = Recorder(optimizer)
    step(optimizer)
    step(optimizer)
    assert [record.step for record in recorder.records] == [1, 2]
    assert all(record.delta > 0 for record in recorder.records)


def test_recording_changes_no_bit_and_ends_without_a_trace():
    trained = []
    for record in (False, True):
        params = params_of((7, 3), (5,))
        optimizer = LPSGDM(params, lr=0.1, momentum_dtype=torch.float8_e5m2)
        recorder = Recorder(optimizer)
        if not record:
            recorder.stop()
        for seed in range(4):
            step(optimizer, seed)
        assert len(recorder.records) == 4 * record
        with recorder:
            recorder.stop()
            recorder.start()
            recorder.start()
        assert not optimizer._optimizer_step_pre_hooks
        assert not optimizer._optimizer_step_post_hooks
        trained.append(flat(params))
    assert torch.equal(*trained)


def test_only_parameters_that_are_trained_count():
    trained, frozen = params_of((4,), (1000,))
    frozen.requires_grad_(False)
    optimizer = torch.optim.SGD([trained, frozen], lr=1.0)
    recorder = Recorder(optimizer)
    trained.grad = torch.ones(4)
    optimizer.step()
    assert recorder.records[0].delta == pytest.approx(1.0)


def test_what_has_nothing_is_refused_or_none():
    with pytest.raises(TypeError, match="list is not an Optimizer"):
        Recorder([])
    optimizer = LPSGDM(params_of((3,)))
    with pytest.raises(ValueError, match="Invalid every: 0"):
        Recorder(optimizer, every=0)
    recorder = Recorder(optimizer)
    optimizer.step()  # without gradients
    (record,) = recorder.records
    assert (record.u, record.delta, record.grad_norm, record.at_zero) == (None, 0.0, None, None)
    with pytest.raises(TypeError, match="dict has neither"):
        recorder.log({})
    assert repr(recorder) == "Recorder(LPSGDM, every=1, 1 records)"


def recorded(groups=1):
    params = params_of(*[(3,)] * groups)
    optimizer = LPSGDM([{"params": [param]} for param in params])
    recorder = Recorder(optimizer)
    step(optimizer)
    step(optimizer, 2)
    return optimizer, recorder


def test_writers_get_what_was_recorded_and_what_will_be():
    class Run:
        def __init__(self):
            self.rows = []

        def log(self, values, step):
            self.rows.append((step, values))

    class Logger(Run):
        def log_metrics(self, metrics, step):
            self.log(metrics, step)

    class Writer(Run):
        def add_scalar(self, name, value, step):
            if not self.rows or self.rows[-1][0] != step:
                self.log({}, step)
            self.rows[-1][1][name] = value

    optimizer, recorder = recorded(groups=2)
    writers = [Run(), Logger(), Writer()]
    for writer in writers:
        recorder.log(writer, "a")
    step(optimizer)
    names = ["lr", "p", "u", "delta", "grad_norm", "at_zero", "saturated"]
    for writer in writers:
        assert [row[0] for row in writer.rows] == [1, 2, 3]
        assert list(writer.rows[2][1]) == [f"a/{name}/{i}" for i in (0, 1) for name in names]
        assert writer.rows[2][1]["a/u/1"] == recorder.records[-1].u


def test_tensorboard_reads_what_was_written(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    _, recorder = recorded()
    with SummaryWriter(str(tmp_path)) as writer:
        recorder.log(writer)
    events = EventAccumulator(str(tmp_path)).Reload()
    values = [(event.step, event.value) for event in events.Scalars("lpsgd/u")]
    assert values == [(r.step, pytest.approx(r.u)) for r in recorder.records]


def test_the_frame_has_a_row_for_each_record():
    pytest.importorskip("pandas")
    _, recorder = recorded(groups=2)
    frame = recorder.to_frame()
    assert list(frame.columns) == list(Record._fields) and len(frame) == 4
    assert frame.loc[3, "u"] == recorder.records[3].u
    none = Recorder(torch.optim.SGD(params_of((3,)), lr=0.1)).to_frame()
    assert list(none.columns) == list(Record._fields) and none["p"].dtype == "float64"


def test_the_picture_has_a_line_for_each_group_and_is_replaced_when_live(monkeypatch):
    pytest.importorskip("matplotlib").use("Agg")
    display = pytest.importorskip("IPython.display")
    _, recorder = recorded(groups=2)
    figure = recorder.plot()
    assert [len(axes.lines) for axes in figure.axes] == [2, 2, 2, 2, 2, 4]
    assert list(figure.axes[2].lines[1].get_ydata()) == [r.u for r in recorder.records if r.group]

    shown = []

    class Handle:
        def update(self, picture):
            shown.append(("again", picture))

    monkeypatch.setattr(display, "display", lambda x, **_: shown.append(("new", x)) or Handle())
    recorder.plot(live=True)
    recorder.plot(live=True)
    assert [how for how, _ in shown] == ["new", "again"]
    assert all(picture.data.startswith(b"\x89PNG") for _, picture in shown)
    assert Recorder(LPSGD(params_of((3,)))).plot() is not None  # before the first step
