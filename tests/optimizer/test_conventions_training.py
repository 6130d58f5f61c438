# SPDX-License-Identifier: MIT
"""Training with every configuration, implementation and scheduler, as PyTorch tests its own."""

import copy
import math
import types

import pytest
import torch
from torch.nn import Parameter
from torch.optim import SGD, lr_scheduler

import lpsgd
from conventions import OPTIMIZERS, configurations, implementations
from helpers import CLASSES, DTYPES, parameters, set_grads

SCHEDULERS = OPTIMIZERS[0].schedulers
all_schedulers = pytest.mark.parametrize("schedulers", SCHEDULERS)


def schedule(schedulers, loss):
    for one in schedulers:
        one.step(*[loss] if isinstance(one, lr_scheduler.ReduceLROnPlateau) else [])


class Regression:
    """A weight and a bias with a convex loss; `strided` puts gaps into their memory."""

    def __init__(self, strided=False, dtype=torch.float32):
        self.weight, self.bias, self.x = (
            param.detach().to(dtype) for param in parameters((10, 5), (10,), (5,))
        )
        if strided:
            self.weight, self.bias = (
                torch.stack([tensor, tensor], dim=-1)[..., 0] for tensor in (self.weight, self.bias)
            )
        self.weight.requires_grad_()
        self.bias.requires_grad_()
        self.params = [self.weight, self.bias]

    def loss(self):
        return (self.weight.mv(self.x) + self.bias).square().sum()

    def train(self, optimizer, schedulers=(), steps=20):
        """Returns the losses before and after."""
        schedulers = [make(optimizer) for make in schedulers]
        first = self.loss().item()

        def closure():
            optimizer.zero_grad()
            loss = self.loss()
            loss.backward()
            return loss

        for _ in range(steps):
            schedule(schedulers, optimizer.step(closure).detach())
        return first, self.loss().item()


def assert_right_direction(losses, optimizer):
    before, after = losses
    assert after > before if optimizer.param_groups[0]["maximize"] else after < before


@configurations()
def test_the_loss_goes_in_the_right_direction(make):
    model = Regression()
    optimizer = make(model.params)
    assert_right_direction(model.train(optimizer), optimizer)


@configurations("foreach", "forloop", "default")
def test_the_loss_of_tensors_with_gaps_goes_in_the_right_direction(make):
    model = Regression(strided=True)
    optimizer = make(model.params)
    assert_right_direction(model.train(optimizer), optimizer)


@configurations("forloop")
@all_schedulers
def test_the_loss_goes_in_the_right_direction_with_every_scheduler(make, schedulers):
    model = Regression()
    optimizer = make(model.params)
    assert_right_direction(model.train(optimizer, SCHEDULERS[schedulers]), optimizer)


@implementations
@pytest.mark.parametrize("cls", CLASSES)
@all_schedulers
def test_every_group_goes_in_the_right_direction_with_every_scheduler(cls, how, schedulers):
    model = Regression()
    optimizer = cls([{"params": model.weight}, {"params": model.bias, "lr": 0.01}], **how)
    assert_right_direction(model.train(optimizer, SCHEDULERS[schedulers]), optimizer)


@configurations()
def test_weight_and_bias_may_have_their_own_values(make):
    model = Regression()
    groups = [{"params": model.weight}, {"params": model.bias, "weight_decay": 0.0}]
    optimizer = make(groups)
    assert_right_direction(model.train(optimizer), optimizer)


@configurations()
def test_the_lr_of_a_group_is_its_own(make):
    model = Regression()
    still = Parameter(torch.ones(3))
    still.grad = torch.ones(3)
    values = {"lr": 1e-3, **copy.deepcopy(make.kwargs)}
    optimizer = make.cls([{"params": model.params, **values}, {"params": still}], lr=1e-28)
    assert_right_direction(model.train(optimizer), optimizer)
    still.grad = torch.ones(3)
    optimizer.step()
    assert torch.equal(still, torch.ones(3)) and still._version > 0


@implementations
@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("p", [2.0, 6.0, math.inf])
@pytest.mark.parametrize("groups", [1, 2])
def test_training_with_a_decaying_lr_ends_at_the_minimum(cls, how, p, groups):
    model = Regression(dtype=torch.float64)
    params = [{"params": param} for param in model.params] if groups == 2 else model.params
    optimizer = cls(params, lr=0.05, p=p, **how)
    decay = [lambda optimizer: lr_scheduler.ExponentialLR(optimizer, 0.98)]
    before, after = model.train(optimizer, decay, steps=300)
    assert after < 1e-4 * before


# Schedulers of lr


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("tensor", [False, True])
@all_schedulers
def test_schedulers_move_lr_as_they_move_sgds(cls, tensor, schedulers):
    def lrs(make):
        lr = torch.tensor(0.1) if tensor else 0.1
        first, second = parameters()
        optimizer = make([{"params": first}, {"params": second, "lr": 0.5}], lr=lr)
        made = [one(optimizer) for one in SCHEDULERS[schedulers]]
        seen = []
        for _ in range(25):
            optimizer.step()
            schedule(made, torch.tensor(1.0))
            seen.append([float(group["lr"]) for group in optimizer.param_groups])
        assert not tensor or optimizer.param_groups[0]["lr"] is lr
        return seen

    assert lrs(cls) == lrs(SGD)


@pytest.mark.parametrize("cls", CLASSES)
def test_schedulers_that_cycle_momentum_move_lpsgdms_and_refuse_lpsgd(cls):
    optimizer = cls(parameters(), lr=0.1)
    if cls is lpsgd.LPSGD:
        with pytest.raises(ValueError, match="optimizer must support momentum"):
            lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=9)
        return
    sgd = SGD(parameters(), lr=0.1, momentum=0.9)
    for make in (
        lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=9),
        lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=3),
    ):
        schedulers = [make(optimizer), make(sgd)]
        for _ in range(8):
            ours, theirs = optimizer.param_groups[0], sgd.param_groups[0]
            assert (ours["lr"], ours["momentum"]) == (theirs["lr"], theirs["momentum"])
            optimizer.step()
            sgd.step()
            for scheduler in schedulers:
                scheduler.step()


@pytest.mark.parametrize("cls", CLASSES)
def test_a_scheduler_warns_of_the_wrong_order_alone(cls):
    optimizer = cls(parameters())
    scheduler = lr_scheduler.StepLR(optimizer, 3)
    for _ in range(3):  # a warning would be an error
        optimizer.step()
        scheduler.step()

    optimizer = cls(parameters())
    scheduler = lr_scheduler.StepLR(optimizer, 3)
    with pytest.warns(UserWarning, match="how-to-adjust-learning-rate"):
        scheduler.step()

    optimizer = cls(parameters())
    scheduler = lr_scheduler.StepLR(optimizer, 3)
    step = optimizer.step
    optimizer.step = types.MethodType(lambda self, *args: step(*args), optimizer)
    optimizer.step()
    with pytest.warns(UserWarning, match=r"`optimizer.step\(\)` has been overridden"):
        scheduler.step()


# The implementations agree


def assert_agree(actual, expected):
    """Within the roundings of one step: C's power has up to 4 ulp, PyTorch's 2."""
    if expected.element_size() == 1:  # neighbours, where m differs by its last bit
        actual, expected = (tensor.view(torch.uint8).int() for tensor in (actual, expected))
        assert torch.all((actual - expected).abs() <= 1)
        return
    eps = torch.finfo(expected.dtype).eps
    units = 1 if expected.element_size() == 2 else 8
    torch.testing.assert_close(actual, expected, rtol=units * eps, atol=units * eps)


@configurations("fused", "foreach", "default")
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_step_agrees_with_the_for_loop(make, dtype):
    """Also when all gradients are missing, or those of one layer, or when a dimension is 0."""
    shapes = (3, 2), (3,), (1, 3), (1,), (), (0,)
    params, others = (parameters(*shapes, dtype=dtype) for _ in range(2))
    loop, other = make(params, fused=False, foreach=False), make(others)
    missing = {2: range(6), 3: (2, 3), 4: (2, 3)}
    for i in range(7):
        set_grads(params, i)
        for j in missing.get(i, ()):
            params[j].grad = None
        # Both start from the same tensors, so that a difference is that of this step.
        for a, b in zip(params, others, strict=True):
            b.data.copy_(a.detach())
            b.grad = a.grad
        for a, b in zip(loop.state.values(), other.state.values(), strict=True):
            b["momentum_buffer"].copy_(a["momentum_buffer"])
        loop.step()
        other.step()
        for a, b in zip(params, others, strict=True):
            assert_agree(b, a)
        for a, b in zip(loop.state.values(), other.state.values(), strict=True):
            assert_agree(b["momentum_buffer"], a["momentum_buffer"])


@configurations("foreach", "default")
def test_a_list_of_many_kinds_agrees_with_the_for_loop(make):
    shapes = (3,), (), (17, 5), (0,), (600,), (2, 3, 4)
    dtypes = [*DTYPES, torch.float32]

    def kinds():
        return [param for dtype in dtypes for param in parameters(*shapes, dtype=dtype)]

    params, others = kinds(), kinds()
    loop, other = make(params, fused=False, foreach=False), make(others)
    set_grads(params)
    set_grads(others)
    loop.step()
    other.step()
    for a, b in zip(params, others, strict=True):
        assert_agree(b, a)
