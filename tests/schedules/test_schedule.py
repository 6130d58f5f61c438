# SPDX-License-Identifier: MIT
"""The schedules of p: eq 19, and the habits of torch's schedulers."""

import collections
import copy
import gc
import io
import math
import pickle
import weakref

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


def test_a_step_that_fails_does_not_count():
    param = Parameter(torch.ones(1))
    groups = lpsgd.LPSGD([param])
    schedule = lpsgd.CosineAnnealingP(groups, 5, every_step=True)
    groups.param_groups[0]["lr"] = -1.0
    param.grad = torch.ones(1)
    with pytest.raises(ValueError, match="learning rate"):
        groups.step()
    assert schedule.last_epoch == 0


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


@pytest.mark.parametrize("make", SCHEDULES)
def test_it_can_be_chained_but_not_one_of_a_sequence(make):
    groups, alone = optimizer(6.0), optimizer(6.0)
    schedule = make(groups)
    both = lr_scheduler.ChainedScheduler([lr_scheduler.ExponentialLR(groups, 0.5), schedule])
    groups.step()
    both.step()
    advance(alone, make(alone))
    assert (ps(groups), both.get_last_lr()) == (ps(alone), [5e-4])
    with pytest.raises(AttributeError, match="last_epoch"):
        lr_scheduler.SequentialLR(groups, [schedule, schedule], [3])
    assert schedule.last_epoch == 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # PyTorch 2.13 about its own imports
@pytest.mark.parametrize("make", SCHEDULES)
@pytest.mark.parametrize("within", ["optimizer.step", "both", "every_step"])
def test_a_compiled_step_has_its_p_and_is_compiled_once(make, within):
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    param, alone = Parameter(torch.ones(1)), optimizer(6.0)
    param.grad = torch.ones(1)
    groups = lpsgd.LPSGDM([param], p=6.0)
    every_step = within == "every_step"
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
