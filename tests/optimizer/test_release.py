# SPDX-License-Identifier: MIT
"""Gradients released in backward: the steps of an ordinary loop, with no gradient left over."""

import copy
import gc
import itertools
import weakref

import pytest
import torch
from torch.nn import Parameter
from torch.optim import lr_scheduler
from torch.utils.checkpoint import checkpoint

from helpers import CLASSES, assert_same_bits, same_bits, sgd_with_dampening
from lpsgd import LPSGD, LPSGDM, CosineAnnealingP, LambdaP, release_gradients

BYTE = torch.float8_e5m2
ROUTES = {
    "C": {},
    "one by one": {"foreach": False},
    "foreach": {"foreach": True},
    "bytes": {"momentum_dtype": BYTE, "seed": 3},
    "bytes one by one": {"momentum_dtype": BYTE, "foreach": False},
}
routes = pytest.mark.parametrize("how", ROUTES.values(), ids=ROUTES)


def network(dtype=torch.float32):
    torch.manual_seed(0)
    layers = [torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 16), torch.nn.Tanh()]
    return torch.nn.Sequential(*layers, torch.nn.Linear(16, 4)).to(dtype)


def micro_batches(count, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(5, 8, generator=generator).to(dtype) for _ in range(count)]


def loss_of(model, x):
    return (model(x) - x[:, :4]).square().mean()


def train(model, optimizer, accumulate=1, steps=4, divided=True, schedules=()):
    """The ordinary loop, which serves released gradients as well."""
    data = iter(micro_batches(steps * accumulate, next(model.parameters()).dtype))
    for _ in range(steps):
        for x in itertools.islice(data, accumulate):
            (loss_of(model, x) / (accumulate if divided else 1)).backward()
        optimizer.step()
        optimizer.zero_grad()
        for schedule in schedules:
            schedule.step()
    return model


def buffers_of(optimizer):
    groups = optimizer.param_groups
    return [optimizer.state[p]["momentum_buffer"] for group in groups for p in group["params"]]


def grads_of(model):
    return [param.grad for param in model.parameters()]


def moved(model):
    """Which of its parameters are not those of the beginning."""
    pairs = zip(model.parameters(), network().parameters(), strict=True)
    return [not torch.equal(a, b) for a, b in pairs]


def released(make, accumulate=1, mean=True, dtype=torch.float32, **keywords):
    model = network(dtype)
    optimizer = make(model.parameters())
    release_gradients(optimizer, accumulate, mean=mean)
    return train(model, optimizer, accumulate, divided=not mean, **keywords), optimizer


def both(cls, **keywords):
    """An ordinary model and a released one, with their optimizers."""
    for release in (False, True):
        model = network()
        optimizer = cls(model.parameters(), lr=0.02, **keywords)
        if release:
            release_gradients(optimizer)
        yield model, optimizer


# The same bits.


@routes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_released_gradients_make_the_bits_of_the_ordinary_step(dtype, how):
    if dtype == torch.float64:
        how = {**how, "momentum_dtype": None}
    how = {**how, "stochastic_rounding": dtype == torch.bfloat16 and how.get("foreach") is not True}

    def make(params):
        return LPSGDM(params, lr=0.02, p=4.0, weight_decay=0.1, **how)

    expected = network(dtype)
    ordinary = make(expected.parameters())
    train(expected, ordinary)
    model, optimizer = released(make, dtype=dtype)
    assert_same_bits(model, expected)
    assert same_bits(buffers_of(optimizer), buffers_of(ordinary))
    steps = [one.param_groups[0].get("rounding_step") for one in (optimizer, ordinary)]
    assert steps[0] == steps[1]
    assert grads_of(model) == [None] * 6


def test_released_lpsgd_makes_the_bits_of_the_ordinary_step():
    model, _ = released(lambda params: LPSGD(params, lr=0.02))
    expected = network()
    assert_same_bits(model, train(expected, LPSGD(expected.parameters(), lr=0.02)))


def test_complex_parameters_are_released():
    params = [Parameter(torch.ones(3, dtype=torch.complex64)) for _ in range(2)]
    optimizers = [LPSGDM([param], lr=0.1) for param in params]
    release_gradients(optimizers[1])
    for _ in range(3):
        for param, optimizer in zip(params, optimizers, strict=True):
            optimizer.zero_grad()
            (param * (2 + 1j)).abs().square().sum().backward()
            optimizer.step()
    assert torch.equal(*params)


def test_never_more_than_one_gradient_is_alive():
    model = network()
    optimizer = LPSGDM(model.parameters())
    alive = []
    release_gradients(optimizer)
    for param in model.parameters():
        param.register_hook(lambda _: alive.append(sum(g is not None for g in grads_of(model))))
    train(model, optimizer)
    assert max(alive) == 0


# Accumulation.


@routes
@pytest.mark.parametrize("mean", [True, False])
@pytest.mark.parametrize("accumulate", [1, 2, 7])
def test_accumulation_in_the_momentum_is_that_in_the_gradient(accumulate, mean, how):
    """Within some roundings of float32, and of one byte for each micro-batch, which at p = 2 move a
    parameter in proportion: by a small part of the step."""
    in_bytes = how.get("momentum_dtype") == BYTE
    lr = 2.0**-10 if in_bytes else 0.02

    def make(params):
        return LPSGDM(params, lr=lr, p=2.0 if in_bytes else 4.0, weight_decay=0.1, **how)

    expected = network()
    ordinary = make(expected.parameters())
    train(expected, ordinary, accumulate)
    model, optimizer = released(make, accumulate, mean)
    for a, b in zip(buffers_of(optimizer), buffers_of(ordinary), strict=True):
        difference = float((a.float() - b.float()).norm() / b.float().norm())
        assert difference < (0.6 if in_bytes else 1e-5)
    rows = zip(*(one.parameters() for one in (model, expected, network())), strict=True)
    for a, b, start in rows:
        a, b, start = a.detach(), b.detach(), start.detach()
        assert float((a - b).norm() / (b - start).norm()) < (0.2 if in_bytes else 2e-4)
    if in_bytes:
        assert optimizer.param_groups[0]["rounding_step"] == 4 * accumulate


def test_loss_divided_without_mean_false_is_a_smaller_gradient():
    """What the keyword is for: at p = 2 the step is proportional to the gradient."""
    distances = []
    for mean in (True, False):
        model = network()
        optimizer = LPSGDM(model.parameters(), lr=1e-4, p=2.0)
        release_gradients(optimizer, 4, mean=mean)
        train(model, optimizer, 4, steps=1)
        pairs = zip(model.parameters(), network().parameters(), strict=True)
        distances.append(sum(float((a - b).detach().norm()) for a, b in pairs))
    assert distances[1] / distances[0] == pytest.approx(4.0, rel=0.02)


def test_momentum_0_accumulates_for_lpsgd():
    model, _ = released(lambda params: LPSGDM(params, lr=0.02, momentum=0.0), 3)
    expected = network()
    train(expected, LPSGD(expected.parameters(), lr=0.02), 3)
    for a, b in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(a, b)


@routes
def test_a_parameter_without_a_gradient_in_the_last_micro_batches_moves_in_step(how):
    model = network()
    optimizer = LPSGDM(model.parameters(), lr=0.02, p=2.0, **how)
    release_gradients(optimizer, 3)
    x = micro_batches(1)[0]
    loss_of(model, x).backward()
    assert_same_bits(model, network())
    (loss_of(model, x) + model[0].weight.sum()).backward()
    before = copy.deepcopy(buffers_of(optimizer))
    model[4].bias.sum().backward()
    assert not torch.equal(model[4].bias, network()[4].bias)
    assert torch.equal(model[0].weight, network()[0].weight)
    optimizer.step()
    assert all(moved(model))
    assert same_bits(buffers_of(optimizer)[:-1], before[:-1])
    assert grads_of(model) == [None] * 6


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_parameter_without_any_gradient_stays(accumulate):
    model = network()
    optimizer = LPSGDM(model.parameters(), lr=0.02, weight_decay=0.1)
    release_gradients(optimizer, accumulate)
    for _ in range(accumulate):
        model[0].weight.sum().backward()
    optimizer.step()
    assert not torch.equal(model[0].weight, network()[0].weight)
    assert torch.equal(model[4].weight, network()[4].weight)
    assert len(optimizer.state) == 1


# Loops.


def run_with(release, cls, schedules_of, accumulate=1, **keywords):
    model = network()
    groups = [
        {"params": list(model[0].parameters()), "lr": 0.05},
        {"params": list(model[2:].parameters()), "p": 3.0},
    ]
    optimizer = cls(groups, lr=0.02, **keywords)
    if release:
        release_gradients(optimizer, accumulate)
    train(model, optimizer, accumulate, 6, not release, schedules_of(optimizer))
    return model, optimizer


def by_itself(optimizer):
    CosineAnnealingP(optimizer, 5, every_step=True)
    return []


SCHEDULES = {
    "cosine": lambda o: [CosineAnnealingP(o, 5)],
    "every step": by_itself,
    "lambda": lambda o: [LambdaP(o, lambda k: 6.0 - k % 2)],
    "lr": lambda o: [lr_scheduler.StepLR(o, 2), lr_scheduler.ExponentialLR(o, 0.9)],
    "warm-up from 0": lambda o: [lr_scheduler.LambdaLR(o, lambda k: k / 3), *by_itself(o)],
}


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_move_as_in_the_ordinary_loop(cls, name):
    expected, ordinary = run_with(False, cls, SCHEDULES[name])
    model, optimizer = run_with(True, cls, SCHEDULES[name])
    assert_same_bits(model, expected)
    for a, b in zip(optimizer.param_groups, ordinary.param_groups, strict=True):
        assert {k: v for k, v in a.items() if k != "params"} == {
            k: v for k, v in b.items() if k != "params"
        }


def test_groups_round_by_their_own_numbers():
    keywords = {"momentum_dtype": BYTE}
    expected, _ = run_with(False, LPSGDM, SCHEDULES["cosine"], **keywords)
    model, optimizer = run_with(True, LPSGDM, SCHEDULES["cosine"], **keywords)
    assert_same_bits(model, expected)
    assert [group["rounding_step"] for group in optimizer.param_groups] == [6, 6]


def test_tied_parameters_get_their_whole_gradient():
    models = []
    for model, optimizer in both(LPSGDM):
        model[2].weight = Parameter(model[2].weight.detach())
        tied = torch.nn.Sequential(*model[:4], model[2], model[3], model[4])
        models.append(train(tied, optimizer))
    assert_same_bits(*models)


@pytest.mark.parametrize("thaw", [True, False])
def test_frozen_parameters_may_be_thawed_and_frozen(thaw):
    models = []
    for release in (False, True):
        model = network()
        model[0].requires_grad_(not thaw)
        optimizer = LPSGDM(model.parameters(), lr=0.02)
        if release:
            release_gradients(optimizer)
        assert model[0].weight.requires_grad is not thaw
        train(model, optimizer, steps=2)
        model[0].requires_grad_(thaw)
        models.append(train(model, optimizer, steps=2))
    assert_same_bits(*models)


def test_groups_added_later_are_released():
    models = []
    for model, _ in both(LPSGDM):
        optimizer = LPSGDM(model[0].parameters(), lr=0.02)
        for param in model.parameters():
            param._post_accumulate_grad_hooks = None
        if models:
            release_gradients(optimizer)
        optimizer.add_param_group({"params": list(model[2:].parameters())})
        models.append(train(model, optimizer))
        assert not models[1:] or grads_of(model) == [None] * 6
    assert_same_bits(*models)


def test_non_reentrant_checkpoints_are_served():
    def forward(model, x):
        return model[4](checkpoint(model[:4], x, use_reentrant=False))

    models = []
    for model, optimizer in both(LPSGDM):
        for x in micro_batches(4):
            forward(model, x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        models.append(model)
    assert_same_bits(*models)


def test_a_parameter_of_two_reentrant_checkpoints_is_refused():
    model = network()
    optimizer = LPSGDM(model.parameters())
    release_gradients(optimizer)
    x = torch.randn(5, 16, requires_grad=True)
    for _ in range(2):
        x = checkpoint(model[2], x, use_reentrant=True)
    with pytest.raises(RuntimeError, match="another gradient after the 1 "):
        x.sum().backward()


@pytest.mark.full
@pytest.mark.filterwarnings("ignore")
def test_compiled_models_are_served():
    models = []
    for model, optimizer in both(LPSGDM):
        train(torch.compile(model, backend="aot_eager"), optimizer, steps=2)
        models.append(model)
        assert grads_of(model) == [None] * 6
    assert_same_bits(*models)


def test_a_checkpoint_goes_on_with_its_bits():
    def make(params):
        return LPSGDM(params, lr=0.02, momentum_dtype=BYTE)

    expected, ordinary = released(make, steps=3)
    train(expected, ordinary, steps=3)
    model, optimizer = released(make, steps=3)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(model, optimizer, steps=1)
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    assert_same_bits(train(model, optimizer, steps=3), expected)


def test_a_checkpoint_that_is_loaded_in_mid_step_ends_the_step():
    models = []
    for interrupted in (False, True):
        model, optimizer = released(LPSGDM, accumulate=2, steps=1)
        saved = copy.deepcopy(optimizer.state_dict())
        if interrupted:
            loss_of(model, micro_batches(1)[0]).backward()
            optimizer.load_state_dict(saved)
            optimizer.step()
        models.append(train(model, optimizer, accumulate=2))
    assert_same_bits(*models)


def test_gradients_set_by_hand_are_stepped_as_usual():
    models = []
    for model, optimizer in both(LPSGDM):
        for param in model.parameters():
            param.grad = torch.ones_like(param)
        optimizer.step()
        models.append(model)
    assert_same_bits(*models)


def test_remove_gives_the_gradients_back():
    model = network()
    optimizer = LPSGDM(model.parameters())
    handle = release_gradients(optimizer)
    loss_of(model, micro_batches(1)[0]).backward()
    with pytest.raises(RuntimeError, match=r"before the optimizer\.step"):
        handle.remove()
    optimizer.step()
    handle.remove()
    handle.remove()
    loss_of(model, micro_batches(1)[0]).backward()
    assert None not in grads_of(model)
    before = copy.deepcopy(model)
    optimizer.step(lambda: 1.0)
    assert not torch.equal(before[0].weight, model[0].weight)
    assert not hasattr(optimizer, "_step_supports_amp_scaling")
    optimizer.zero_grad()
    release_gradients(optimizer, 2)


def test_copies_of_an_optimizer_are_ordinary():
    model = network()
    optimizer = LPSGDM(model.parameters())
    release_gradients(optimizer)
    train(model, optimizer)
    model, optimizer = copy.deepcopy((model, optimizer))
    loss_of(model, micro_batches(1)[0]).backward()
    assert None not in grads_of(model)


def test_nothing_keeps_the_optimizer_alive():
    gc.disable()
    try:
        model = network()
        optimizer = LPSGDM(model.parameters())
        release_gradients(optimizer)
        train(model, optimizer)
        gone = weakref.ref(optimizer)
        del optimizer
        assert gone() is None
        with pytest.raises(ReferenceError, match="an optimizer that is gone"):
            loss_of(model, micro_batches(1)[0]).backward()
    finally:
        gc.enable()


# Interruptions.


class Interrupts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise KeyboardInterrupt


@pytest.mark.parametrize("end", ["step", "zero_grad"])
def test_an_interrupted_backward_has_stepped_what_it_came_to(end):
    model = network()
    optimizer = LPSGDM(model.parameters(), lr=0.02, momentum_dtype=BYTE)
    release_gradients(optimizer)
    x = micro_batches(1)[0]
    with pytest.raises(KeyboardInterrupt):
        model[2:](Interrupts.apply(model[:2](x))).square().mean().backward()
    assert moved(model) == [False] * 2 + [True] * 4
    assert grads_of(model) == [None] * 6
    with pytest.raises(RuntimeError, match=r"optimizer\.step\(\) has to come first"):
        loss_of(model, x).backward()
    assert grads_of(model) == [None] * 6
    before = copy.deepcopy(model)
    getattr(optimizer, end)()
    assert_same_bits(model, before)
    assert optimizer.param_groups[0]["rounding_step"] == 1
    train(model, optimizer)
    assert optimizer.param_groups[0]["rounding_step"] == 5


# Refusals.


def test_more_backwards_than_accumulate_are_refused():
    model = network()
    optimizer = LPSGDM(model.parameters())
    release_gradients(optimizer, 2)
    for x in micro_batches(2):
        loss_of(model, x).backward()
    before = copy.deepcopy(model)
    with pytest.raises(RuntimeError, match="another gradient after the 2 "):
        loss_of(model, x).backward()
    assert_same_bits(model, before)


REFUSALS = [
    (LPSGDM, {"differentiable": True}, {}, RuntimeError, "differentiable=True"),
    (LPSGDM, {"capturable": True}, {}, RuntimeError, "capturable=True"),
    (LPSGD, {}, {"accumulate": 2}, ValueError, "LPSGD has no momentum"),
    (LPSGDM, {}, {"accumulate": 0}, ValueError, "Invalid accumulate: 0"),
    (LPSGDM, {}, {"accumulate": 1.5}, ValueError, "Invalid accumulate"),
    (LPSGDM, {}, {"accumulate": "2"}, TypeError, "accumulate must be an int"),
    (torch.optim.SGD, {}, {}, TypeError, "only LPSGD and LPSGDM"),
]


@pytest.mark.parametrize("cls, keywords, arguments, exception, message", REFUSALS)
def test_what_cannot_be_combined_is_refused_at_once(cls, keywords, arguments, exception, message):
    model = network()
    optimizer = cls(model.parameters(), **keywords)
    with pytest.raises(exception, match=message):
        release_gradients(optimizer, **arguments)
    loss_of(model, micro_batches(1)[0]).backward()
    assert None not in grads_of(model)


def test_other_hooks_and_gradients_are_refused_at_once():
    model = network()
    optimizer = LPSGDM(model.parameters())
    loss_of(model, micro_batches(1)[0]).backward()
    with pytest.raises(RuntimeError, match="has a gradient already"):
        release_gradients(optimizer)
    optimizer.zero_grad()
    hook = model[4].bias.register_post_accumulate_grad_hook(lambda param: None)
    with pytest.raises(RuntimeError, match="has a post-accumulate-grad hook already"):
        release_gradients(optimizer)
    hook.remove()
    release_gradients(optimizer)
    with pytest.raises(RuntimeError, match="released already"):
        release_gradients(optimizer)


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
def test_a_parameter_that_is_listed_twice_is_refused_at_once():
    param = Parameter(torch.ones(2))
    with pytest.raises(RuntimeError, match="listed twice"):
        release_gradients(LPSGDM([param, param]))
    assert not param._post_accumulate_grad_hooks


def test_closures_are_refused():
    model = network()
    optimizer = LPSGDM(model.parameters())
    release_gradients(optimizer)
    with pytest.raises(RuntimeError, match="takes no closure"):
        optimizer.step(lambda: pytest.fail("called"))


@pytest.mark.parametrize("fused", [None, True])
def test_grad_scalers_are_refused(fused):
    model = network()
    optimizer = LPSGDM(model.parameters(), fused=fused)
    release_gradients(optimizer)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(loss_of(model, micro_batches(1)[0])).backward()
    with pytest.raises((RuntimeError, AssertionError), match="GradScaler cannot be used"):
        scaler.step(optimizer)
    assert not hasattr(optimizer, "grad_scale")


# Trainers that step by hand.


@routes
def test_step_parameter_makes_the_bits_of_the_step(how):
    """As trainers with a fused backward pass call it, with or without a step() afterwards."""
    models = []
    for by_hand, ends in ((False, True), (True, True), (True, False)):
        model = network()
        optimizer = LPSGDM(
            [
                {"params": list(model[0].parameters()), "lr": 0.05},
                {"params": list(model[2:].parameters())},
            ],
            **how,
        )
        assert optimizer.supports_fused_back_pass()

        def hook(param, group, index, optimizer=optimizer):
            optimizer.step_parameter(param, group, index)
            param.grad = None

        for group in optimizer.param_groups * by_hand:
            for i, param in enumerate(group["params"]):
                param.register_post_accumulate_grad_hook(
                    lambda param, group=group, i=i, hook=hook: hook(param, group, i)
                )
        for x in micro_batches(4):
            loss_of(model, x).backward()
            if ends:
                optimizer.step()
                optimizer.zero_grad()
        models.append(model)
    assert_same_bits(models[0], models[1])
    assert_same_bits(models[0], models[2])


def test_step_parameter_checks_its_arguments():
    model = network()
    optimizer = LPSGDM(model.parameters())
    (group,) = optimizer.param_groups
    optimizer.step_parameter(model[0].weight, group, 0)  # no gradient
    assert not optimizer.state
    for param, given, index in (
        (model[0].weight, group, 1),
        (model[0].weight, group, -6),
        (model[0].weight, {**group}, 0),
        (Parameter(torch.zeros(1)), group, 0),
        (model[0].weight, group, 6),
    ):
        with pytest.raises(ValueError, match="a parameter, its group and its index"):
            optimizer.step_parameter(param, given, index)
    release_gradients(optimizer)
    with pytest.raises(RuntimeError, match="with released gradients"):
        optimizer.step_parameter(model[0].weight, group, 0)


def test_p2_is_sgd_bitwise():
    expected = network()
    train(expected, sgd_with_dampening(expected.parameters(), lr=0.02))
    model, _ = released(lambda params: LPSGDM(params, lr=0.02, p=2.0, momentum=0.9))
    assert_same_bits(model, expected)
