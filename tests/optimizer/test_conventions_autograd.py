# SPDX-License-Identifier: MIT
"""Steps that autograd, torch.func, forward-mode AD, tracing and inference mode look at."""

import math

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch.autograd import gradcheck, gradgradcheck
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import Parameter
from torch.optim import SGD

import lpsgd
from conventions import IMPLEMENTATIONS, implementations
from helpers import CLASSES, parameters, same_bits, steps

# PyTorch's own, when forward-mode AD and tracing are used for the first time.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")


# differentiable=True


def values(n=3, seed=0):
    """Numbers away from 0, where the update has a kink."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.rand(n, generator=generator, dtype=torch.float64) + 0.5
    return sizes * torch.tensor([1.0, -1.0, 1.0], dtype=torch.float64)[:n]


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("p", [2.0, 3.0, 6.0, math.inf])
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("steps_made", [1, 3])
def test_first_and_second_derivatives_are_right(cls, p, maximize, steps_made):
    """By the parameter, the gradient, the momentum_buffer, lr and weight decay."""

    def run(param, grad, buffer, lr, weight_decay):
        param = param.clone()
        values = {"lr": lr, "p": p, "weight_decay": weight_decay, "eps": 0.1, "pivot": 0.5}
        optimizer = cls([param], **values, maximize=maximize, differentiable=True)
        if cls is lpsgd.LPSGDM:
            optimizer.state[param]["momentum_buffer"] = buffer.clone()
        for factor in range(1, steps_made + 1):
            param.grad = factor * grad
            optimizer.step()
        return param, *(state["momentum_buffer"] for state in optimizer.state.values())

    inputs = [values(seed=0), values(seed=1), values(seed=2)]
    inputs += [torch.tensor(0.1).double(), torch.tensor([0.3]).double()]
    for tensor in inputs:
        tensor.requires_grad_()
    inputs[2].requires_grad_(cls is lpsgd.LPSGDM)
    assert gradcheck(run, inputs)
    assert gradgradcheck(run, inputs)


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("p", [2.0, 6.0])
def test_the_loss_after_training_is_differentiated_by_lr_and_weight_decay(cls, p):
    """Against central differences of the same training with numbers."""

    x, weight = values(seed=1), values()

    def loss_of(param):  # does not keep param for backward: the step changes it in place
        return ((param * x).sum() - 2.0).square()

    def train(lr, weight_decay):
        param = weight.clone().requires_grad_().clone()
        given = {"lr": lr, "weight_decay": weight_decay, "differentiable": True}
        optimizer = cls([param], p=p, eps=0.1, **given)
        for _ in range(3):
            (param.grad,) = torch.autograd.grad(loss_of(param), param, create_graph=True)
            optimizer.step()
        return loss_of(param)

    lr = torch.tensor(0.05, dtype=torch.float64, requires_grad=True)
    decay = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    by_lr, by_decay = torch.autograd.grad(train(lr, decay), (lr, decay))
    h = 1e-6
    difference = (train(0.05 + h, 0.3) - train(0.05 - h, 0.3)) / (2 * h)
    assert by_lr.item() == pytest.approx(difference.item(), rel=1e-6)
    difference = (train(0.05, 0.3 + h) - train(0.05, 0.3 - h)) / (2 * h)
    assert by_decay.item() == pytest.approx(difference.item(), rel=1e-6)


@pytest.mark.parametrize("cls", CLASSES)
def test_a_differentiable_step_has_the_values_of_an_ordinary_one(cls):
    params = [p.requires_grad_(False) for p in parameters((3,), (2, 2))]
    others = parameters((3,), (2, 2))
    steps(cls(params, lr=0.1, weight_decay=0.1, differentiable=True), params, range(3))
    steps(cls(others, lr=0.1, weight_decay=0.1, foreach=False), others, range(3))
    assert same_bits(params, others)


@pytest.mark.parametrize("make", [lambda *a, **k: SGD(*a, momentum=0.9, **k), *CLASSES])
def test_a_differentiable_step_refuses_a_leaf_and_ours_writes_nothing(make):
    leaf = Parameter(torch.ones(3))
    other = torch.ones(3, requires_grad=True).clone()
    optimizer = make([other, leaf], lr=0.1, differentiable=True)
    other.grad, leaf.grad = torch.ones(3), torch.ones(3)
    with pytest.raises(RuntimeError, match="a leaf Variable that requires grad is being used"):
        optimizer.step()
    if make in CLASSES:
        assert torch.equal(other, torch.ones(3)) and not optimizer.state


@implementations
@pytest.mark.parametrize("cls", CLASSES)
def test_an_ordinary_step_records_no_graph(cls, how):
    params = parameters()
    lr = torch.tensor(0.1, requires_grad=True)
    optimizer = cls(params, lr=lr, **how)
    for param in params:
        param.grad = torch.ones_like(param, requires_grad=True)
    optimizer.step()
    tensors = [*params, *(b for state in optimizer.state.values() for b in state.values())]
    assert all(tensor.grad_fn is None for tensor in tensors)
    assert not any(b.requires_grad for state in optimizer.state.values() for b in state.values())


# Inference mode, functional transforms and tracing, beside torch.optim.SGD


def ours(cls):
    return lambda params, **how: cls(params, lr=0.1, p=2.0, weight_decay=0.0, **how)


def sgd(cls):
    """torch.optim.SGD as it makes the steps of `ours`: with momentum from a zero buffer."""
    momentum = 0.9 if cls is lpsgd.LPSGDM else 0.0

    def make(params, **how):
        optimizer = SGD(params, lr=0.1, momentum=momentum, dampening=momentum, **how)
        for param in params if momentum else ():
            optimizer.state[param]["momentum_buffer"] = torch.zeros_like(param)
        return optimizer

    return make


def outcome(place, make, **how):
    """What it returns, or what kind of exception it raises."""
    try:
        return place(make, **how)
    except RuntimeError:
        return RuntimeError
    except ValueError:
        return ValueError


def step_inside_inference_mode(make, **how):
    param = Parameter(torch.ones(3))
    param.grad = torch.arange(3.0)
    optimizer = make([param], **how)
    with torch.inference_mode():
        optimizer.step()
    return param.detach(), param.is_inference(), param._version


def step_of_inference_tensors(make, **how):
    with torch.inference_mode():
        param = torch.ones(3)
        param.grad = torch.arange(3.0)
        optimizer = make([param], **how)
        optimizer.step()
    return param.clone()


def step_of_inference_tensors_outside(make, **how):
    with torch.inference_mode():
        param = torch.ones(3)
        param.grad = torch.arange(3.0)
        optimizer = make([param], **how)
    optimizer.step()
    return param.clone()


def step_with_inference_gradient(make, **how):
    param = Parameter(torch.ones(3))
    with torch.inference_mode():
        grad = torch.arange(3.0)
    param.grad = grad
    make([param], **how).step()
    return param.detach()


def stepped(make, how):
    def step(x, grad):
        param = x.clone()
        param.grad = grad
        make([param], **how).step()
        return param

    return step


def step_inside_vmap(make, **how):
    return torch.vmap(stepped(make, how))(torch.ones(3, 2), torch.arange(6.0).view(3, 2))


def step_of_a_shared_parameter_inside_vmap(make, **how):
    param = torch.ones(2)

    def step(grad):
        param.grad = grad
        make([param], **how).step()
        return param + grad

    return torch.vmap(step)(torch.arange(6.0).view(3, 2))


def step_inside_grad(make, **how):
    def loss(x, grad):
        return stepped(make, how)(x, grad).square().sum()

    return torch.func.grad(loss, argnums=(0, 1))(torch.ones(2), torch.arange(2.0))


def differentiable_step_inside_grad(make, **how):
    return step_inside_grad(make, **{**how, "foreach": False, "fused": False}, differentiable=True)


def step_inside_jvp(make, **how):
    ones, grad = torch.ones(2), torch.arange(2.0)
    return torch.func.jvp(stepped(make, how), (ones, grad), (ones, grad))


def step_inside_functionalize(make, **how):
    return torch.func.functionalize(stepped(make, how))(torch.ones(2), torch.arange(2.0))


def step_of_dual_tensors(make, **how):
    with forward_ad.dual_level():
        param = forward_ad.make_dual(torch.ones(2), torch.ones(2))
        param.grad = forward_ad.make_dual(torch.ones(2), torch.arange(2.0))
        make([param], **how).step()
        return forward_ad.unpack_dual(param)


def step_that_is_traced(make, **how):
    graph = make_fx(stepped(make, how))(torch.ones(2), torch.ones(2))
    return graph(torch.zeros(2), torch.arange(2.0))


PLACES = [
    step_inside_inference_mode,
    step_of_inference_tensors,
    step_of_inference_tensors_outside,
    step_with_inference_gradient,
    step_inside_vmap,
    step_of_a_shared_parameter_inside_vmap,
    step_inside_grad,
    differentiable_step_inside_grad,
    step_inside_jvp,
    step_inside_functionalize,
    step_of_dual_tensors,
    step_that_is_traced,
]


@implementations
@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("place", PLACES)
def test_the_outcome_is_that_of_sgd(place, cls, how):
    """For `fused=True` it may also be a refusal, or a step in C that forward-mode AD and tracers do
    not see: it demands C."""
    fused = how == IMPLEMENTATIONS["fused"]
    if fused and place in (step_of_dual_tensors, step_that_is_traced):
        outcome(place, ours(cls), **how)
        return
    foreach = how == IMPLEMENTATIONS["foreach"]
    expected = outcome(place, sgd(cls), foreach=foreach)
    actual = outcome(place, ours(cls), **how)
    if isinstance(actual, type):
        assert actual is expected or (fused and actual is RuntimeError)
    else:
        torch.testing.assert_close(actual, expected)
