# SPDX-License-Identifier: MIT
"""The schedules of p: eq 19, and the habits of torch's schedulers."""

import collections
import copy
import gc
import importlib
import io
import math
import pickle
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.nn import Parameter
from torch.optim import lr_scheduler
from torch.optim.swa_utils import SWALR

import lpsgd
import lpsgd_ext
from helpers import bits


def eq_19(s, total, p_max, p_min=2.0):
    return p_min + (p_max - p_min) * (1 + math.cos(math.pi * (s - 1) / (total - 1))) / 2


def optimizer(*ps):
    return lpsgd.LPSGDM([{"params": [Parameter(torch.zeros(1))], "p": p} for p in ps])


def cosine(groups, **keywords):
    return lpsgd.CosineAnnealingP(groups, 10, 2.5, **keywords)


def steps_of_p(k):
    return 2.0 + 6.0 / (k + 1)


def function(groups, **keywords):
    return lpsgd.LambdaP(groups, steps_of_p, **keywords)


SCHEDULES = [cosine, function]


def ps(groups):
    return [group["p"] for group in groups.param_groups]


def advance(groups, schedule, steps=1):
    """Steps as a training loop does; returns the p that the steps were made with."""
    seen = []
    for _ in range(steps):
        seen.append(ps(groups))
        groups.step()
        if not schedule.every_step:
            schedule.step()
    return seen


def saved(state):
    """What comes back from a file, read as safely as torch can."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


class Training:
    """A model, its optimizer and a schedule of p; every step's gradients are its own."""

    def __init__(self, late_group=False):
        generator = torch.Generator().manual_seed(0)
        self.params = [Parameter(torch.randn(3, generator=generator)) for _ in range(2)]
        self.late_group = {"params": [Parameter(torch.randn(3, generator=generator))], "p": 9.0}
        groups = [
            {"params": [param], "p": p} for param, p in zip(self.params, (6.0, 8.0), strict=True)
        ]
        self.optimizer = lpsgd.LPSGDM(groups, lr=0.1)
        if late_group:
            self.add_group()

    def add_group(self):
        self.optimizer.add_param_group(self.late_group)
        self.params += self.late_group["params"]

    def build(self, make, every_step):
        self.schedule = make(self.optimizer, every_step=every_step)

    def run(self, steps):
        """Trains through these steps, returns the p and bits of each."""
        seen = []
        for k in steps:
            generator = torch.Generator().manual_seed(k)
            for param in self.params:
                param.grad = torch.randn(3, generator=generator)
            seen += advance(self.optimizer, self.schedule)
            seen.append([bits(param).tolist() for param in self.params])
        return seen


@pytest.mark.parametrize("total", [2, 3, 10, 200, 12345])
@pytest.mark.parametrize("p_max, p_min", [(6.0, 2.0), (9.0, 2.5), (100.0, 2.0), (2.0, 2.0)])
def test_cosine_is_eq_19(total, p_max, p_min):
    values = [lpsgd_ext.cosine_p(s, total, p_max, p_min) for s in range(1, total + 1)]
    exact = [eq_19(s, total, p_max, p_min) for s in range(1, total + 1)]
    assert values == pytest.approx(exact, rel=4e-16 * p_max, abs=0)
    assert values == sorted(values, reverse=True)
    assert (values[0], values[-1]) == (p_max, p_min)


def test_middle_is_exact():
    assert lpsgd_ext.cosine_p(3, 5, 6.0) == 4.0


def test_one_iteration_has_p_max_and_later_ones_p_min():
    assert lpsgd_ext.cosine_p(1, 1, 6.0) == 6.0
    assert lpsgd_ext.cosine_p(2, 1, 6.0) == 2.0


def test_after_the_last_it_stays_at_p_min():
    assert lpsgd_ext.cosine_p(1e300, 10, 6.0) == 2.0


@pytest.mark.parametrize("every_step", [False, True])
def test_after_k_steps_p_is_eq_19_at_k_plus_1_in_every_group(every_step):
    groups = optimizer(6.0, 9.0)
    schedule = lpsgd.CosineAnnealingP(groups, total_iters=10, p_min=2.5, every_step=every_step)
    for k in range(15):
        s = min(k + 1, 10)
        expected = [lpsgd_ext.cosine_p(s, 10, p_max, 2.5) for p_max in (6.0, 9.0)]
        assert (schedule.last_epoch, schedule.get_last_p(), ps(groups)) == (k, expected, expected)
        advance(groups, schedule)


def derived(base):
    """A class as one writes it, to do something before or after the step."""

    class Derived(base):
        def step(self, closure=None):
            return super().step(closure)

    return Derived


def derived_at_run_time(base):
    """As Horovod's DistributedOptimizer is made."""

    def step(self, closure=None):
        return super(cls, self).step(closure)

    cls = type(base.__name__, (base,), {"step": step})
    return cls


@pytest.mark.parametrize("base", [lpsgd.LPSGD, torch.optim.SGD])
@pytest.mark.parametrize("derive", [derived, derived_at_run_time])
@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("used_before", [False, True])
def test_a_step_of_a_derived_class_is_one_step(base, derive, depth, used_before):
    param = Parameter(torch.ones(1))
    for _ in range(depth):
        base = derive(base)
        if used_before:
            base([param], lr=0.1).step()  # torch.optim wraps the step of this class then
    groups = base([{"params": [param], "p": 6.0}], lr=0.1)
    schedule = cosine(groups, every_step=True)
    for k in range(4):
        assert schedule.last_epoch == k
        param.grad = torch.ones(1)
        groups.step(lambda: 1.0)


def test_a_closure_that_steps_another_optimizer_makes_a_step_of_each():
    cls = derived(lpsgd.LPSGD)
    outer, inner = (cls([{"params": [Parameter(torch.ones(1))], "p": 6.0}]) for _ in range(2))
    schedules = [cosine(groups, every_step=True) for groups in (outer, inner)]
    outer.step(inner.step)
    assert [schedule.last_epoch for schedule in schedules] == [1, 1]


class WithoutConstructor(torch.optim.Optimizer):
    """As timm's Lookahead: an optimizer around another that skips Optimizer's constructor."""

    def __init__(self, base):
        self.base = base
        self.defaults, self.state = base.defaults, base.state
        self.param_groups = base.param_groups
        self._optimizer_step_pre_hooks = collections.OrderedDict()
        self._optimizer_step_post_hooks = collections.OrderedDict()

    def step(self):
        self.base.step()


def test_a_wrapper_without_optimizers_constructor_drives_p_from_its_first_step_on():
    wrapper = WithoutConstructor(optimizer(8.0))
    cosine(wrapper, every_step=True)
    wrapper.param_groups[0]["params"][0].grad = torch.ones(1)
    wrapper.step()
    assert wrapper.param_groups[0]["p"] == pytest.approx(eq_19(2, 10, 8.0, 2.5))


@pytest.mark.parametrize("every_step", [False, True])
def test_after_k_steps_p_is_the_function_of_k(every_step):
    groups = optimizer(6.0, 9.0)
    schedule = lpsgd.LambdaP(
        groups, [steps_of_p, lambda k: math.inf if k < 3 else 2], every_step=every_step
    )
    expected = [[8.0, math.inf], [5.0, math.inf], [4.0, math.inf], [3.5, 2.0], [3.2, 2.0]]
    assert advance(groups, schedule, 5) == expected


# Resuming


def load_then_build(training, make, every_step, state):
    training.optimizer.load_state_dict(state["optimizer"])
    training.build(make, every_step)


def build_then_load(training, make, every_step, state):
    training.build(make, every_step)
    training.optimizer.load_state_dict(state["optimizer"])


def build_then_load_both(training, make, every_step, state):
    build_then_load(training, make, every_step, state)
    training.schedule.load_state_dict(state["schedule"])


def build_then_load_the_schedule_first(training, make, every_step, state):
    training.build(make, every_step)
    training.schedule.load_state_dict(state["schedule"])
    training.optimizer.load_state_dict(state["optimizer"])


def load_build_load(training, make, every_step, state):
    load_then_build(training, make, every_step, state)
    training.schedule.load_state_dict(state["schedule"])


RESUME = [
    load_then_build,
    build_then_load,
    build_then_load_both,
    build_then_load_the_schedule_first,
    load_build_load,
]


@pytest.mark.parametrize("resume", RESUME)
@pytest.mark.parametrize("every_step", [False, True])
@pytest.mark.parametrize("make", SCHEDULES)
@settings(max_examples=20, deadline=None)
@given(before=st.integers(0, 11), after_resuming=st.integers(0, 3))
def test_resumed_training_has_the_bits_of_an_uninterrupted_one(
    make, every_step, resume, before, after_resuming
):
    whole = Training()
    whole.build(make, every_step)
    expected = whole.run(range(14))

    training = Training()
    training.build(make, every_step)
    seen = training.run(range(before))
    # It's interrupted twice, so that a state saved by a resumed training is tried too.
    for stop in (before + after_resuming, 14):
        state = saved(
            {
                "params": [param.detach() for param in training.params],
                "optimizer": training.optimizer.state_dict(),
                "schedule": training.schedule.state_dict(),
            }
        )
        training = Training()
        with torch.no_grad():
            torch._foreach_copy_(training.params, state["params"])
        resume(training, make, every_step, state)
        seen += training.run(range(before, stop))
        before = stop
    assert seen == expected


@pytest.mark.parametrize("resume", RESUME)
@pytest.mark.parametrize("every_step", [False, True])
@pytest.mark.parametrize("make", SCHEDULES)
@pytest.mark.parametrize("stop", [3, 4])
def test_resumed_training_has_the_bits_also_with_a_group_added_late(make, every_step, resume, stop):
    whole = Training()
    whole.build(make, every_step)
    whole.run(range(3))
    whole.add_group()
    whole.run(range(3, stop))
    state = copy.deepcopy(
        {
            "params": [param.detach() for param in whole.params],
            "optimizer": whole.optimizer.state_dict(),
            "schedule": whole.schedule.state_dict(),
        }
    )
    resumed = Training(late_group=True)
    with torch.no_grad():
        torch._foreach_copy_(resumed.params, state["params"])
    resume(resumed, make, every_step, state)
    assert resumed.run(range(stop, 14)) == whole.run(range(stop, 14))


def test_a_schedule_takes_its_arguments_from_its_state_dict():
    first = lpsgd.CosineAnnealingP(optimizer(6.0), total_iters=10, p_min=3.0)
    advance(first.optimizer, first, 4)
    second = lpsgd.CosineAnnealingP(optimizer(6.0), total_iters=99)
    state = saved(first.state_dict())
    second.load_state_dict(state)
    assert second.state_dict() == first.state_dict() == state
    assert advance(second.optimizer, second, 8) == advance(first.optimizer, first, 8)


@pytest.mark.parametrize("make", SCHEDULES)
@pytest.mark.parametrize("every_step", [False, True])
def test_a_state_dict_does_not_say_who_moves_the_clock(make, every_step):
    first = make(optimizer(6.0), every_step=every_step)
    advance(first.optimizer, first, 4)
    second = make(optimizer(6.0), every_step=not every_step)
    advance(second.optimizer, second, 4)
    assert second.state_dict() == first.state_dict()
    advance(second.optimizer, second, 2)
    second.load_state_dict(first.state_dict())
    assert advance(second.optimizer, second, 8) == advance(first.optimizer, first, 8)


@pytest.mark.parametrize("make", SCHEDULES)
def test_last_epoch_is_the_epoch_that_is_over(make):
    first = make(optimizer(6.0, 9.0))
    advance(first.optimizer, first, 4)
    groups = optimizer(3.0, 4.0)
    for group, initial_p in zip(groups.param_groups, (6.0, 9.0), strict=True):
        group["initial_p"] = initial_p
    second = make(groups, last_epoch=3)
    assert second.last_epoch == first.last_epoch == 4
    assert advance(groups, second, 8) == advance(first.optimizer, first, 8)


@pytest.mark.parametrize("make", SCHEDULES)
def test_last_epoch_without_initial_p_is_refused(make):
    groups = optimizer(6.0, 9.0)
    groups.param_groups[0]["initial_p"] = 6.0
    message = (
        r"param 'initial_p' is not specified in param_groups\[1\] "
        "when resuming scheduler with last_epoch >= 0"
    )
    with pytest.raises(KeyError, match=message):
        make(groups, last_epoch=0)
    assert "p_last_epoch" not in groups.param_groups[0]


@pytest.mark.filterwarnings("ignore:This is step")  # total may be a tenth of k
@settings(deadline=None)
@given(
    p_max=st.floats(2.0, 1e300),
    p_min=st.floats(2.0, 1e3),
    total=st.integers(1, 1000),
    k=st.integers(0, 1100),
)
def test_the_group_alone_says_what_p_is(p_max, p_min, total, k):
    groups = optimizer(2.0)
    groups.param_groups[0].update(initial_p=p_max, p_last_epoch=k)
    schedule = lpsgd.CosineAnnealingP(groups, total, p_min)
    assert advance(groups, schedule, 2) == [
        [lpsgd_ext.cosine_p(s, total, p_max, p_min)] for s in (k + 1, k + 2)
    ]


def test_a_state_without_a_clock_starts_the_schedule():
    groups = optimizer(6.0)
    fresh = copy.deepcopy(groups.state_dict())
    schedule = cosine(groups)
    first = advance(groups, schedule, 5)
    groups.load_state_dict(fresh)
    assert advance(groups, schedule, 5) == first


def test_step_goes_to_an_epoch_with_torchs_deprecation_warning():
    groups = optimizer(6.0)
    schedule = lpsgd.CosineAnnealingP(groups, total_iters=3)
    groups.step()
    for epoch, p in ((1, 4.0), (0, 6.0), (5, 2.0)):
        with pytest.warns(UserWarning, match="epoch parameter in `scheduler.step"):
            schedule.step(epoch)
        assert (schedule.last_epoch, ps(groups)) == (epoch, [p])


# Groups


@pytest.mark.parametrize("every_step", [False, True])
def test_a_group_added_late_joins_the_common_clock_at_the_next_step(every_step):
    groups = optimizer(6.0)
    schedule = lpsgd.CosineAnnealingP(groups, total_iters=5, every_step=every_step)
    advance(groups, schedule)
    groups.add_param_group({"params": [Parameter(torch.zeros(1))], "p": 8.0})
    advance(groups, schedule)
    assert schedule.get_last_p() == [4.0, 5.0]
    assert groups.param_groups[1]["initial_p"] == 8.0
    assert advance(groups, schedule, 3)[2] == [2.0, 2.0]


def test_a_group_added_late_takes_the_last_function():
    for functions, late in ((steps_of_p, 5.0), ([lambda k: 9.0, lambda k: 7.0], 7.0)):
        groups = optimizer(6.0, 6.0)
        schedule = lpsgd.LambdaP(groups, functions)
        groups.add_param_group({"params": [Parameter(torch.zeros(1))], "p": 8.0})
        advance(groups, schedule)
        assert ps(groups)[2] == late


@pytest.mark.parametrize("make", SCHEDULES)
@pytest.mark.parametrize("every_step", [False, True])
def test_a_tensor_p_is_filled_in_place(make, every_step):
    tensor = torch.tensor(6.0, dtype=torch.float64)
    groups, numbers = optimizer(tensor, 6.0), optimizer(6.0, 6.0)
    schedule, expected = make(groups, every_step=every_step), make(numbers, every_step=every_step)
    for _ in range(12):
        assert groups.param_groups[0]["p"] is tensor
        assert [tensor.item(), ps(groups)[1]] == ps(numbers)
        advance(groups, schedule)
        advance(numbers, expected)
    schedule.get_last_p()[0].zero_()
    assert tensor >= 2.0


# Arguments


@pytest.mark.parametrize(
    "name, value",
    [
        ("total_iters", 0),
        ("total_iters", math.nan),
        ("p_min", 1.0),
        ("p_min", math.inf),
        ("last_epoch", -2),
    ],
)
def test_arguments_out_of_range_are_refused(name, value):
    groups = optimizer(6.0)
    with pytest.raises(ValueError, match=f"Invalid {name}: {value}"):
        lpsgd.CosineAnnealingP(groups, **{"total_iters": 5, name: value})
    assert "initial_p" not in groups.param_groups[0]


def test_infinite_p_has_no_cosine():
    with pytest.raises(ValueError, match="p = inf"):
        lpsgd.CosineAnnealingP(optimizer(math.inf), total_iters=5)
    groups = optimizer(6.0)
    schedule = cosine(groups)
    groups.add_param_group({"params": [Parameter(torch.zeros(1))], "p": math.inf})
    groups.step()
    with pytest.raises(ValueError, match=r"param_groups\[1\] has p = inf"):
        schedule.step()
    assert (schedule.last_epoch, ps(groups)) == (0, [6.0, math.inf])


def test_a_group_that_cannot_join_stops_the_step_before_it_is_made():
    groups = optimizer(6.0)
    cosine(groups, every_step=True)
    groups.add_param_group({"params": [Parameter(torch.zeros(1))], "p": math.inf})
    param = groups.param_groups[0]["params"][0]
    param.grad = torch.ones(1)
    with pytest.raises(ValueError, match=r"param_groups\[1\] has p = inf"):
        groups.step()
    assert (param, ps(groups)) == (0.0, [6.0, math.inf])
    groups.param_groups[1]["p"] = 8.0
    groups.step()
    assert ps(groups) == pytest.approx([eq_19(2, 10, p, 2.5) for p in (6.0, 8.0)])


@pytest.mark.parametrize("make", SCHEDULES)
def test_foreign_optimizers_are_refused(make):
    with pytest.raises(ValueError, match="has no p"):
        make(torch.optim.SGD([Parameter(torch.zeros(1))], lr=0.1))
    with pytest.raises(TypeError, match="NoneType is not an Optimizer"):
        make(None)


@pytest.mark.parametrize("invalid", [1.5, -math.inf, math.nan])
def test_an_invalid_p_of_a_function_leaves_the_groups_as_they_are(invalid):
    groups = optimizer(6.0, 9.0)
    with pytest.raises(ValueError, match=f"Invalid p value: {invalid}"):
        lpsgd.LambdaP(groups, [steps_of_p, lambda k: invalid])
    assert ps(groups) == [6.0, 9.0] and "initial_p" not in groups.param_groups[0]
    schedule = lpsgd.LambdaP(groups, [steps_of_p, lambda k: 9.0 if k < 2 else invalid])
    advance(groups, schedule)
    before = copy.deepcopy(groups.state_dict())
    groups.step()
    with pytest.raises(ValueError, match=f"Invalid p value: {invalid}"):
        schedule.step()
    assert groups.state_dict() == before


@pytest.mark.parametrize("name", ["total_iters", "last_epoch"])
@pytest.mark.parametrize(
    "error, value", [(ValueError, 2.5), (ValueError, math.inf), (TypeError, "10")]
)
def test_a_number_of_steps_is_an_int(name, error, value):
    groups = optimizer(6.0)
    message = (
        f"Invalid {name}: {value}" if error is ValueError else f"{name} must be an int, not str"
    )
    with pytest.raises(error, match=message):
        lpsgd.CosineAnnealingP(groups, **{"total_iters": 5, name: value})
    assert "initial_p" not in groups.param_groups[0]


@pytest.mark.parametrize("ten", [10.0, np.int64(10), np.float32(10), torch.tensor(10)])
def test_what_is_an_int_in_another_type_is_taken(ten):
    schedule = lpsgd.CosineAnnealingP(optimizer(6.0), ten)
    schedule.last_epoch = ten
    for value in (schedule.total_iters, schedule.optimizer.param_groups[0]["p_last_epoch"]):
        assert (type(value), value) == (int, 10)


def test_arguments_of_torchs_schedulers_are_refused_with_their_name_here():
    for make, name, here in (
        (lpsgd.CosineAnnealingP, "T_max", "total_iters"),
        (lpsgd.CosineAnnealingP, "eta_min", "p_min"),
        (lpsgd.LambdaP, "lr_lambda", "p_lambda"),
    ):
        message = (
            rf"{make.__name__}.__init__\(\) got an unexpected keyword argument '{name}'.*{here}"
        )
        with pytest.raises(TypeError, match=message):
            make(optimizer(6.0), 5, **{name: 5})
    with pytest.raises(TypeError, match="p_lambda must be a function, not float"):
        lpsgd.LambdaP(optimizer(6.0), 3.0)


def test_a_schedule_shows_its_arguments_and_where_it_is():
    schedule = lpsgd.CosineAnnealingP(optimizer(6.0), total_iters=3, every_step=True)
    schedule.optimizer.step()
    shown = "CosineAnnealingP(total_iters=3, p_min=2.0, every_step=True"
    assert repr(schedule) == f"{shown}, last_epoch=1, p=[4.0])"
    assert f"{shown})" in str(schedule.optimizer._optimizer_step_post_hooks)
    assert repr(function(optimizer(6.0))) == (
        f"LambdaP(p_lambdas=[{steps_of_p!r}], every_step=False, last_epoch=0, p=[8.0])"
    )


@pytest.mark.parametrize("every_step", [False, True])
def test_a_schedule_that_goes_on_far_beyond_its_end_says_so_once(every_step):
    groups = optimizer(6.0)
    schedule = lpsgd.CosineAnnealingP(groups, total_iters=2, every_step=every_step)
    advance(groups, schedule, 20)
    with pytest.warns(
        UserWarning, match=r"step 21 .* total_iters=2: .* batches, not epochs"
    ) as caught:
        advance(groups, schedule)
    assert caught[0].filename == __file__
    advance(groups, schedule, 20)
    resumed = lpsgd.CosineAnnealingP(groups, total_iters=2, every_step=every_step)
    advance(groups, resumed, 20)


def test_there_is_one_function_for_each_group():
    for functions in ([steps_of_p], [steps_of_p] * 3):
        with pytest.raises(ValueError, match=f"Expected 2 p_lambdas, but got {len(functions)}"):
            lpsgd.LambdaP(optimizer(6.0, 6.0), functions)


class Halving:
    def __init__(self, start):
        self.start = start

    def __call__(self, k):
        return 2.0 + self.start / 2**k


def test_a_state_dict_has_the_attributes_of_callables_but_no_functions():
    groups = optimizer(6.0, 6.0, 6.0)
    schedule = lpsgd.LambdaP(groups, [steps_of_p, Halving(8.0), float(4).__add__])
    advance(groups, schedule, 2)
    state = saved(schedule.state_dict())
    assert state["p_lambdas"] == [None, {"start": 8.0}, {}]
    resumed = lpsgd.LambdaP(optimizer(6.0, 6.0, 6.0), [steps_of_p, Halving(1), float(4).__add__])
    resumed.load_state_dict(state)
    assert state["p_lambdas"] == [None, {"start": 8.0}, {}]
    assert advance(resumed.optimizer, resumed, 3) == advance(groups, schedule, 3)


# A schedule that drives itself


@pytest.mark.parametrize("make", SCHEDULES)
def test_what_drives_itself_must_not_be_stepped(make):
    groups = optimizer(6.0)
    schedule = make(groups, every_step=True)
    groups.step()
    with pytest.raises(RuntimeError, match="must not be called with every_step=True"):
        schedule.step()
    assert schedule.last_epoch == 1


@pytest.mark.parametrize("make", SCHEDULES)
def test_what_drives_itself_need_not_be_kept(make):
    kept, dropped = optimizer(6.0), optimizer(6.0)
    schedule = make(kept, every_step=True)
    make(dropped, every_step=True)
    assert advance(kept, schedule, 12) == advance(dropped, schedule, 12)


def test_a_closure_makes_one_step():
    param = Parameter(torch.ones(1))
    groups = lpsgd.LPSGD([param])
    schedule = lpsgd.CosineAnnealingP(groups, 5, every_step=True)

    def closure():
        param.grad = torch.ones(1)
        return 1.0

    groups.step(closure)
    assert schedule.last_epoch == 1


@pytest.mark.parametrize("cls", [lpsgd.LPSGD, derived(lpsgd.LPSGD)])
def test_a_step_that_fails_does_not_count(cls):
    param = Parameter(torch.ones(1))
    groups = cls([param])
    schedule = lpsgd.CosineAnnealingP(groups, 5, every_step=True)
    groups.param_groups[0]["lr"] = -1.0
    param.grad = torch.ones(1)
    with pytest.raises(ValueError, match="learning rate"):
        groups.step()
    assert schedule.last_epoch == 0
    groups.param_groups[0]["lr"] = 0.1
    groups.step()
    assert schedule.last_epoch == 1


@pytest.mark.parametrize("make", SCHEDULES)
def test_the_schedule_made_last_drives_alone(make):
    groups = optimizer(6.0)
    schedules = [make(groups, every_step=True) for _ in range(3)]  # all are alive
    advance(groups, schedules[-1], 3)
    assert schedules[-1].last_epoch == 3
    by_hand = make(groups)
    groups.step()
    assert by_hand.last_epoch == 3
    by_hand.step()
    assert by_hand.last_epoch == 4
    make(groups, every_step=True)
    groups.step()
    assert by_hand.last_epoch == 5


def test_attributes_can_be_changed_on_the_way():
    groups = optimizer(6.0)
    schedule = lpsgd.CosineAnnealingP(groups, 99, every_step=True)
    schedule.total_iters = 3
    groups.step()
    assert ps(groups) == [4.0]


@pytest.mark.parametrize("make", SCHEDULES)
@pytest.mark.parametrize("every_step", [False, True])
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["copy", "pickle"]
)
@pytest.mark.parametrize("before", [0, 3])
def test_a_copy_goes_on_by_itself(make, every_step, copied, before):
    groups = optimizer(6.0, 9.0)
    schedule = make(groups, every_step=every_step)
    advance(groups, schedule, before)
    twin, twin_schedule = copied((groups, schedule))
    assert twin_schedule.optimizer is twin
    assert twin_schedule.state_dict() == schedule.state_dict()
    assert advance(twin, twin_schedule, 9) == advance(groups, schedule, 9)
    assert copied(schedule).last_epoch == twin_schedule.last_epoch == before + 9
    assert schedule.last_epoch == before + 9


def through_a_file(copied):
    file = io.BytesIO()
    torch.save(copied, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = [copy.deepcopy, lambda copied: pickle.loads(pickle.dumps(copied)), through_a_file]


@pytest.mark.parametrize("make", SCHEDULES)
@pytest.mark.parametrize("copied", COPIES, ids=["copy", "pickle", "file"])
def test_a_copy_of_the_optimizer_alone_keeps_what_drives_it(make, copied):
    model = torch.nn.Linear(2, 1)
    groups = lpsgd.LPSGDM(model.parameters())
    schedule = make(groups, every_step=True)
    advance(groups, schedule, 3)
    twin_model, twin = copied((model, groups))
    assert twin.param_groups[0]["params"][0] is twin_model.weight
    again = copied(twin)
    expected = advance(groups, schedule, 9)
    for one in (twin, again):
        assert advance(one, schedule, 9) == expected
    assert schedule.last_epoch == 12
    schedule = make(twin, every_step=True)
    twin.step()
    assert schedule.last_epoch == 13


def test_a_copy_of_a_schedule_that_was_replaced_does_not_take_over():
    groups = optimizer(6.0)
    former = function(groups)
    schedule = cosine(groups, every_step=True)
    twin, twin_former = copy.deepcopy((groups, former))
    assert advance(twin, schedule, 3) == advance(groups, schedule, 3)
    assert twin_former.optimizer is twin


def test_functions_that_cannot_be_pickled_are_copied_and_concern_what_drives_itself_alone():
    for every_step in (False, True):
        groups = optimizer(6.0)
        schedule = lpsgd.LambdaP(groups, lambda k: 2.0 + 4.0 / (k + 1), every_step=every_step)
        twin, twin_schedule = copy.deepcopy((groups, schedule))
        assert advance(twin, twin_schedule, 3) == advance(groups, schedule, 3)
        if every_step:
            with pytest.raises((AttributeError, pickle.PicklingError), match="lambda"):
                pickle.dumps(groups)
        else:
            pickle.dumps(groups)


@pytest.mark.parametrize("make", SCHEDULES)
@pytest.mark.parametrize("every_step", [False, True])
def test_a_new_optimizer_of_the_groups_of_one_goes_on_with_its_schedule(make, every_step, no_gc):
    alone, groups = optimizer(6.0), optimizer(6.0)
    expected, schedule = make(alone, every_step=every_step), make(groups, every_step=every_step)
    new = derived_at_run_time(lpsgd.LPSGDM)(groups.param_groups)
    assert advance(new, schedule, 4) == advance(alone, expected, 4)
    if every_step:
        former = weakref.ref(groups)
        del groups, schedule
        assert former() is None
        assert advance(new, expected, 4) == advance(alone, expected, 4)


def test_after_a_reload_the_schedule_made_last_still_drives_alone():
    module = importlib.import_module("lpsgd._schedule")
    before = {**vars(module)}
    groups = optimizer(6.0)
    cosine(groups, every_step=True)
    try:
        schedule = importlib.reload(module).CosineAnnealingP(groups, 10, every_step=True)
        advance(groups, schedule, 3)
    finally:
        vars(module).update(before)
    assert schedule.last_epoch == 3
    schedule = cosine(groups, every_step=True)
    groups.step()
    assert schedule.last_epoch == 4


@pytest.mark.parametrize("fused", [None, False, True])
def test_the_steps_that_gradscaler_skips_do_not_count(fused):
    param = Parameter(torch.ones(1))
    groups = lpsgd.LPSGD([param], fused=fused)
    schedule = lpsgd.CosineAnnealingP(groups, 10, every_step=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    counts = []
    for factor in (1.0, math.inf, 1.0, math.nan, 1.0):
        groups.zero_grad()
        scaler.scale(param.sum() * factor).backward()
        scaler.step(groups)
        scaler.update()
        counts.append(schedule.last_epoch)
    assert counts == [1, 1, 2, 2, 3]


@pytest.mark.parametrize("tensor", [torch.ones(()), torch.zeros(())])
def test_the_steps_that_a_fused_optimizer_skips_do_not_count(tensor):
    groups = optimizer(6.0)
    schedule = lpsgd.CosineAnnealingP(groups, 10, every_step=True)
    groups.found_inf = tensor  # as GradScaler does around the step
    groups.step()
    del groups.found_inf
    assert schedule.last_epoch == (0 if tensor else 1)
    groups.step()
    assert schedule.last_epoch == (1 if tensor else 2)


class Wrapper(torch.optim.Optimizer):
    """An optimizer around another, without its constructor, as Accelerate's is."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    @property
    def param_groups(self):
        return self.optimizer.param_groups

    def step(self, closure=None):
        self.optimizer.step(closure)


@pytest.mark.parametrize("make", SCHEDULES)
@pytest.mark.parametrize("every_step", [False, True])
def test_a_wrapped_optimizer_is_scheduled_as_the_one_within(make, every_step):
    groups, wrapped = optimizer(6.0), Wrapper(Wrapper(optimizer(6.0)))
    schedule, other = make(groups, every_step=every_step), make(wrapped, every_step=every_step)
    assert advance(wrapped, other, 12) == advance(groups, schedule, 12)


# Order of calls


@pytest.mark.parametrize("make", SCHEDULES)
@pytest.mark.parametrize("with_lr", [False, True])
def test_a_step_before_the_optimizers_warns_once(make, with_lr):
    groups = optimizer(6.0)
    if with_lr:
        lr_scheduler.ConstantLR(groups)
    schedule = make(groups)
    name = type(schedule).__name__
    warning = rf"Detected call of `{name}.step\(\)` before `optimizer.step\(\)`.*how-to-adjust"
    with pytest.warns(UserWarning, match=warning) as caught:
        schedule.step()
    assert caught[0].filename == __file__
    schedule.step()


@pytest.mark.parametrize("make", SCHEDULES)
def test_a_step_before_the_optimizers_warns_after_resuming(make):
    groups = optimizer(6.0)
    groups.param_groups[0].update(initial_p=6.0)
    schedule = make(groups, last_epoch=10)
    with pytest.warns(UserWarning, match="before `optimizer.step"):
        schedule.step()


@pytest.mark.parametrize("make", SCHEDULES)
@pytest.mark.parametrize("first", [True, False])
def test_the_right_order_does_not_warn(make, first):
    groups = optimizer(6.0)
    if first:
        schedule = make(groups)
        lr = lr_scheduler.StepLR(groups, 3)
    else:
        lr = lr_scheduler.StepLR(groups, 3)
        schedule = make(groups)
    for _ in range(5):
        groups.step()
        schedule.step()
        lr.step()


# Lifetime


@pytest.fixture
def no_gc():
    optimizer(6.0).step()  # PyTorch imports the rest of itself, which leaves cycles.
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("make", SCHEDULES)
@pytest.mark.parametrize("every_step", [False, True])
def test_there_are_no_cyclic_references(make, every_step, no_gc):
    groups = optimizer(6.0)
    schedule = make(groups, every_step=every_step)
    advance(groups, schedule, 2)
    of_groups, of_schedule = weakref.ref(groups), weakref.ref(schedule)
    del schedule
    assert of_schedule() is None
    del groups
    assert of_groups() is None


def test_a_schedule_keeps_its_optimizer(no_gc):
    for every_step in (False, True):
        schedule = lpsgd.CosineAnnealingP(optimizer(6.0), 3, every_step=every_step)
        advance(schedule.optimizer, schedule)
        assert schedule.get_last_p() == [4.0]


# Beside schedulers of lr


def warm_up_and_cosine(groups):
    warm_up = lr_scheduler.LinearLR(groups, 0.1, total_iters=3)
    return lr_scheduler.SequentialLR(
        groups, [warm_up, lr_scheduler.CosineAnnealingLR(groups, 9)], milestones=[3]
    )


def chained(groups):
    constant = lr_scheduler.ConstantLR(groups, 0.5, total_iters=4)
    return lr_scheduler.ChainedScheduler([constant, lr_scheduler.ExponentialLR(groups, 0.9)])


LR_SCHEDULERS = {
    "lambda": lambda groups: lr_scheduler.LambdaLR(groups, lambda k: 1 / (k + 1)),
    "multiplicative": lambda groups: lr_scheduler.MultiplicativeLR(groups, lambda k: 0.9),
    "step": lambda groups: lr_scheduler.StepLR(groups, 3),
    "multistep": lambda groups: lr_scheduler.MultiStepLR(groups, [2, 5]),
    "constant": lr_scheduler.ConstantLR,
    "linear": lr_scheduler.LinearLR,
    "exponential": lambda groups: lr_scheduler.ExponentialLR(groups, 0.9),
    "polynomial": lambda groups: lr_scheduler.PolynomialLR(groups, 9, 2.0),
    "cosine": lambda groups: lr_scheduler.CosineAnnealingLR(groups, 9),
    "restarts": lambda groups: lr_scheduler.CosineAnnealingWarmRestarts(groups, 4),
    "cyclic": lambda groups: lr_scheduler.CyclicLR(groups, 0.01, 0.1, 3),
    "onecycle": lambda groups: lr_scheduler.OneCycleLR(groups, 0.2, total_steps=13),
    "plateau": lambda groups: lr_scheduler.ReduceLROnPlateau(groups, patience=2),
    "sequential": warm_up_and_cosine,
    "chained": chained,
    "swa": lambda groups: SWALR(groups, 0.5, anneal_epochs=4),
}


def step_lr(lr):
    lr.step(*[1.0] if isinstance(lr, lr_scheduler.ReduceLROnPlateau) else [])


def lr_and_momentum(groups):
    return [(float(group["lr"]), group.get("momentum")) for group in groups.param_groups]


@pytest.mark.parametrize("name", LR_SCHEDULERS)
@pytest.mark.parametrize("every_step", [False, True])
@pytest.mark.parametrize("tensor_lr", [False, True])
@pytest.mark.parametrize("p_first", [False, True])
def test_lr_and_p_go_as_they_go_alone(name, every_step, tensor_lr, p_first):
    def lr_and_momentum(groups):
        return [(float(group["lr"]), group["momentum"]) for group in groups.param_groups]

    lr = torch.tensor(0.1) if tensor_lr else 0.1
    sgd = torch.optim.SGD([Parameter(torch.zeros(1))], copy.deepcopy(lr), momentum=0.9)
    sgd_lr = LR_SCHEDULERS[name](sgd)
    alone = optimizer(6.0)
    alone_p = cosine(alone, every_step=every_step)

    both = lpsgd.LPSGDM([Parameter(torch.zeros(1))], lr, 6.0)
    if p_first:
        both_p, both_lr = cosine(both, every_step=every_step), LR_SCHEDULERS[name](both)
    else:
        both_lr, both_p = LR_SCHEDULERS[name](both), cosine(both, every_step=every_step)
    for _ in range(12):
        assert lr_and_momentum(both) == lr_and_momentum(sgd)
        assert both_p.get_last_lr() == both_lr.get_last_lr() == sgd_lr.get_last_lr()
        assert advance(both, both_p) == advance(alone, alone_p)
        step_lr(both_lr)
        sgd.step()
        step_lr(sgd_lr)


@pytest.mark.parametrize("name", LR_SCHEDULERS)
def test_lr_schedulers_resume_beside_a_schedule_of_p(name):
    def build():
        groups = optimizer(6.0, 8.0)
        return groups, cosine(groups), LR_SCHEDULERS[name](groups)

    def train(groups, schedule, lr, steps):
        seen = []
        for _ in range(steps):
            seen.append(lr.get_last_lr())
            seen += advance(groups, schedule)
            step_lr(lr)
        return seen

    whole = build()
    train(*whole, 5)
    resumed = build()
    for one, other in zip(resumed, whole, strict=True):
        one.load_state_dict(copy.deepcopy(other.state_dict()))
    assert train(*resumed, 7) == train(*whole, 7)


@pytest.mark.parametrize("make", SCHEDULES)
def test_frameworks_take_it_for_a_scheduler_of_lr_that_leaves_lr_alone(make):
    lr = torch.tensor(0.1)
    groups = lpsgd.LPSGD([Parameter(torch.zeros(1))], lr)
    schedule = make(groups)
    assert isinstance(schedule, lr_scheduler.LRScheduler)
    advance(groups, schedule, 3)
    assert groups.param_groups[0]["lr"] is lr
    assert "initial_lr" not in groups.param_groups[0]
    for last_lr in (schedule.get_last_lr(), schedule.get_lr()):
        assert last_lr == [0.1]
        last_lr[0].zero_()
    assert lr == 0.1


# The attributes of LRScheduler that scripts and packages read and set


@pytest.mark.parametrize("make", SCHEDULES)
@pytest.mark.parametrize("every_step", [False, True])
def test_last_epoch_can_be_set_and_the_next_step_goes_on_from_there(make, every_step):
    expected = make(optimizer(6.0, 9.0))
    expected_p = advance(expected.optimizer, expected, 6)[5]
    groups = optimizer(6.0)
    schedule = make(groups, every_step=every_step)
    groups.add_param_group({"params": [Parameter(torch.zeros(1))], "p": 9.0})
    before = [copy.deepcopy({**group, "params": []}) for group in groups.param_groups]
    for error, value in ((ValueError, -2), (ValueError, 1.5), (TypeError, "4"), (TypeError, None)):
        with pytest.raises(error, match="last_epoch"):
            schedule.last_epoch = value
    assert [{**group, "params": []} for group in groups.param_groups] == before
    p = ps(groups)
    schedule.last_epoch = 4
    assert (schedule.last_epoch, ps(groups)) == (4, p)
    advance(groups, schedule)
    assert (schedule.last_epoch, ps(groups)) == (5, expected_p)


@pytest.mark.parametrize("make", SCHEDULES)
def test_last_epoch_minus_1_starts_afresh_with_the_next_step(make):
    groups = optimizer(6.0, 9.0)
    schedule = make(groups)
    first = ps(groups)
    for restart in (schedule.step, schedule._initial_step):
        advance(groups, schedule, 3)
        schedule.last_epoch = -1
        assert make(groups).last_epoch == -1  # as after resuming there
        assert ps(groups) == first
        groups.param_groups[0]["p"] = 3.0
        restart()
        assert (schedule.last_epoch, ps(groups)) == (0, first)
    assert schedule._step_count == 1


@pytest.mark.parametrize("make", SCHEDULES)
def test_base_lrs_and_what_lr_was_last_are_there_and_can_be_set(make):
    groups = optimizer(6.0, 9.0)
    groups.param_groups[1]["initial_lr"] = torch.tensor(0.5)  # a warm-up has been made before
    schedule = make(groups)
    assert schedule.base_lrs == [1e-3, 0.5]
    schedule.base_lrs[1].zero_()
    assert groups.param_groups[1]["initial_lr"] == 0.5
    schedule.base_lrs = [0.25, 0.5]
    resumed = make(optimizer(6.0, 9.0))
    resumed.load_state_dict(saved(schedule.state_dict()))
    assert resumed.base_lrs == [0.25, 0.5]
    schedule._last_lr = [1.0, 1.0]
    assert schedule._last_lr == schedule.get_last_lr() == [1e-3, 1e-3]


@pytest.mark.parametrize("make", SCHEDULES)
def test_p_moves_where_last_epoch_and_get_lr_make_the_step(make):
    """As in Ignite's LRScheduler, which is called before every step of the optimizer."""
    groups, alone = optimizer(6.0), optimizer(6.0)
    schedule, expected = make(groups), make(alone)
    for _ in range(5):
        assert schedule.get_lr() == [1e-3] and schedule._get_lr_called_within_step is False
        schedule._get_lr_called_within_step = True
        assert schedule.get_lr() == [1e-3]
        schedule._get_lr_called_within_step = False
        schedule.last_epoch += 1
        assert advance(groups, Stepped) == advance(alone, expected)


class Stepped:
    """In the place of a schedule that something else steps."""

    every_step = True


@pytest.mark.parametrize("make", SCHEDULES)
def test_it_can_be_one_of_a_sequence(make):
    groups, sgd = optimizer(6.0), torch.optim.SGD([Parameter(torch.zeros(1))])
    warm_up, only = (lr_scheduler.LinearLR(one, 0.1, total_iters=2) for one in (groups, sgd))
    schedule = make(groups)
    sequence = lr_scheduler.SequentialLR(groups, [warm_up, schedule], [3])
    seen = []
    for _ in range(8):
        assert sequence.get_last_lr() == only.get_last_lr()
        seen += advance(groups, Stepped)
        sequence.step()
        sgd.step()
        only.step()
    alone = optimizer(6.0)
    expected = advance(alone, make(alone), 5)
    assert seen == [expected[0]] * 3 + expected


@pytest.mark.parametrize("make", SCHEDULES)
def test_it_can_be_chained_but_a_sequence_has_one(make):
    groups, alone = optimizer(6.0), optimizer(6.0)
    schedule = make(groups)
    both = lr_scheduler.ChainedScheduler([lr_scheduler.ExponentialLR(groups, 0.5), schedule])
    groups.step()
    both.step()
    advance(alone, make(alone))
    assert (ps(groups), both.get_last_lr()) == (ps(alone), [5e-4])
    lr_scheduler.ExponentialLR(alone, 0.5)  # for initial_lr
    former = make(alone)
    former.last_epoch = 0
    with pytest.raises(ValueError, match="Invalid last_epoch: -2"):
        lr_scheduler.SequentialLR(alone, [former, make(alone)], [3])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # PyTorch 2.13 about its own imports
@pytest.mark.parametrize("make", SCHEDULES)
@pytest.mark.parametrize("within", ["optimizer.step", "both", "every_step", "derived"])
def test_a_compiled_step_has_its_p_and_is_compiled_once(make, within):
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    param, alone = Parameter(torch.ones(1)), optimizer(6.0)
    param.grad = torch.ones(1)
    groups = (derived(lpsgd.LPSGDM) if within == "derived" else lpsgd.LPSGDM)([param], p=6.0)
    every_step = within in ("every_step", "derived")
    schedule, expected = make(groups, every_step=every_step), make(alone, every_step=every_step)

    def step():
        groups.step()
        if within == "both":
            schedule.step()

    torch.compiler.reset()
    compiled_step = torch.compile(step, backend=backend)
    counts = []
    for _ in range(12):
        compiled_step()
        if within == "optimizer.step":
            schedule.step()
        advance(alone, expected)
        assert ps(groups) == ps(alone)
        counts.append(len(compiled))
    assert 0 < counts[2] == counts[-1]
    groups.param_groups[0]["lr"] = -1.0
    with pytest.raises(ValueError, match="learning rate"):
        compiled_step()
    groups.param_groups[0]["lr"] = 0.1
    compiled_step()
    assert schedule.last_epoch == 13 - (within == "optimizer.step")


@pytest.mark.parametrize("every_step", [False, True])
def test_it_resumes_from_a_distributed_checkpoint(every_step):
    def build():
        model = torch.nn.Linear(3, 2)
        groups = [{"params": [model.weight], "p": 6.0}, {"params": [model.bias], "p": 8.0}]
        groups = lpsgd.LPSGDM(groups)
        return model, groups, cosine(groups, every_step=every_step)

    model, groups, schedule = build()
    model(torch.ones(3)).sum().backward()
    advance(groups, schedule, 4)
    model_state, optimizer_state = get_state_dict(model, groups)
    resumed_model, resumed, resumed_schedule = build()
    set_state_dict(
        resumed_model,
        resumed,
        model_state_dict=model_state,
        optim_state_dict=copy.deepcopy(optimizer_state),
    )
    assert advance(resumed, resumed_schedule, 9) == advance(groups, schedule, 9)


def test_a_schedule_that_cannot_load_or_step_stays_as_it_was():
    optimizer = lpsgd.LPSGD([torch.nn.Parameter(torch.zeros(1))])
    schedule = lpsgd.CosineAnnealingP(optimizer, 9)
    optimizer.step()
    before = schedule.state_dict()
    with pytest.raises(ValueError, match="Invalid p_min"):
        schedule.load_state_dict({**before, "p_min": 1.0})
    assert schedule.state_dict() == before
    schedule.load_state_dict({**before, "_step_count": None})
    group = {**optimizer.param_groups[0]}
    with pytest.raises(TypeError):
        schedule.step()
    assert optimizer.param_groups[0] == group
