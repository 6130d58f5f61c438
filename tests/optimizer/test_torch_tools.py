# SPDX-License-Identifier: MIT
"""LPSGD and LPSGDM in the place of torch.optim.SGD, with the tools that PyTorch has around it."""

import warnings

import pytest
import torch
from torch.nn.utils import clip_grad_norm_, clip_grad_value_, parametrizations, parametrize
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn

import lpsgd
import lpsgd_ext
from helpers import CLASSES, assert_same_bits, needs_fma, sgd_with_dampening

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", r"`torch\.jit\.\w+` is deprecated", DeprecationWarning)
    from torch.distributed.optim import _apply_optimizer_in_backward

STEPS = 8
LR = 0.02


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3),
        torch.nn.BatchNorm2d(8),
        torch.nn.ReLU(),
        torch.nn.Flatten(),
        torch.nn.Linear(288, 10),
    )


def batches(count=STEPS, size=4):
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(size, 3, 8, 8, generator=generator),
            torch.randint(10, (size,), generator=generator),
        )
        for _ in range(count)
    ]


def backward(model, batch):
    x, y = batch
    torch.nn.functional.cross_entropy(model(x), y).backward()


def train(optimizer_of, model=None, before_step=lambda model: None):
    """The plain loop, with what a tool does between backward() and step()."""
    model = model or network()
    optimizer = optimizer_of(model.parameters())
    for batch in batches():
        optimizer.zero_grad()
        backward(model, batch)
        before_step(model)
        optimizer.step()
    return model


def with_averages(optimizer_of):
    model = network()
    optimizer = optimizer_of(model.parameters())
    swa, ema = AveragedModel(model), AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    schedule = SWALR(optimizer, swa_lr=LR / 4, anneal_epochs=4)
    for batch in batches():
        optimizer.zero_grad()
        backward(model, batch)
        optimizer.step()
        schedule.step()
        swa.update_parameters(model)
        ema.update_parameters(model)
    update_bn(batches(), swa)
    return torch.nn.ModuleList([model, swa, ema])


def with_norms_clipped(optimizer_of):
    return train(optimizer_of, before_step=lambda m: clip_grad_norm_(m.parameters(), 0.1))


def with_values_clipped(optimizer_of):
    return train(optimizer_of, before_step=lambda m: clip_grad_value_(m.parameters(), 0.01))


def with_accumulated_gradients(optimizer_of):
    model = network()
    optimizer = optimizer_of(model.parameters())
    for i, batch in enumerate(batches()):
        backward(model, batch)
        if i % 4 == 3:
            optimizer.step()
            optimizer.zero_grad()
    return model


def with_functional_gradients(optimizer_of):
    model = network().eval()  # Batch normalization in training writes buffers, which grad forbids.
    optimizer = optimizer_of(model.parameters())

    def loss(params, x, y):
        return torch.nn.functional.cross_entropy(torch.func.functional_call(model, params, (x,)), y)

    for x, y in batches():
        grads = torch.func.grad(loss)(dict(model.named_parameters()), x, y)
        for name, param in model.named_parameters():
            param.grad = grads[name]
        optimizer.step()
    return model


def with_weight_norm(optimizer_of):
    model = network()
    parametrizations.weight_norm(model[0])
    parametrizations.weight_norm(model[4])
    return train(optimizer_of, model)


def with_orthogonal_weights(optimizer_of):
    model = network()
    parametrizations.orthogonal(model[0])
    parametrizations.orthogonal(model[4], orthogonal_map="cayley")
    return train(optimizer_of, model)


class Symmetric(torch.nn.Module):
    def forward(self, x):
        return x.triu() + x.triu(1).transpose(-1, -2)


def with_an_own_parametrization(optimizer_of):
    model = network()
    parametrize.register_parametrization(model[0], "weight", Symmetric())
    return train(optimizer_of, model)


def with_the_step_in_backward(optimizer_of):
    model = network()
    _apply_optimizer_in_backward(optimizer_of, model.parameters(), {})
    for batch in batches():
        backward(model, batch)
    return model


def with_scaled_float16_losses(optimizer_of):
    model = network()
    optimizer = optimizer_of(model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=2)
    for x, y in batches():
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            loss = torch.nn.functional.cross_entropy(model(x), y)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        clip_grad_norm_(model.parameters(), 0.1)
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() < 2.0**20  # Some steps were skipped,
    assert not torch.equal(model[0].weight, network()[0].weight)  # and some were not.
    return model


TOOLS = [
    with_averages,
    with_norms_clipped,
    with_values_clipped,
    with_accumulated_gradients,
    with_functional_gradients,
    with_weight_norm,
    with_orthogonal_weights,
    with_an_own_parametrization,
    with_the_step_in_backward,
    with_scaled_float16_losses,
]


@needs_fma
@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("fused", [None, True])
def test_p2_is_sgd_bitwise(fused, cls, tool):
    def ours(params):
        return cls(params, lr=LR, p=2.0, fused=fused)

    def theirs(params):
        if cls is lpsgd.LPSGDM:
            return sgd_with_dampening(params, lr=LR)
        return torch.optim.SGD(params, lr=LR, foreach=False)

    model, reference = tool(ours), tool(theirs)
    assert_same_bits(model, reference)
    for a, b in zip(model.buffers(), reference.buffers(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("cls", CLASSES)
def test_micro_batches_give_the_bits_of_their_summed_gradient(cls):
    def with_summed_gradients(optimizer_of):
        model = network()
        params = list(model.parameters())
        optimizer = optimizer_of(params)
        for i in range(0, STEPS, 4):
            sums = [torch.zeros_like(param) for param in params]
            for x, y in batches()[i : i + 4]:
                loss = torch.nn.functional.cross_entropy(model(x), y)
                torch._foreach_add_(sums, torch.autograd.grad(loss, params))
            for param, total in zip(params, sums, strict=True):
                param.grad = total
            optimizer.step()
        return model

    assert_same_bits(with_accumulated_gradients(cls), with_summed_gradients(cls))


@pytest.mark.parametrize("cls", CLASSES)
def test_the_step_in_backward_has_the_bits_of_the_step_after_it(cls):
    assert_same_bits(with_the_step_in_backward(cls), train(cls))


@pytest.mark.parametrize("cls", CLASSES)
def test_functional_gradients_give_the_bits_of_backward(cls):
    assert_same_bits(with_functional_gradients(cls), train(cls, network().eval()))


@pytest.mark.parametrize("cls", CLASSES)
def test_clipped_gradients_are_what_is_stepped(cls):
    def clip_norm(model):
        grads = [param.grad for param in model.parameters()]
        norm = torch.linalg.vector_norm(torch.stack([grad.norm() for grad in grads]))
        torch._foreach_mul_(grads, (0.1 / (norm + 1e-6)).clamp(max=1.0))

    def clip_values(model):
        for param in model.parameters():
            param.grad = param.grad.clamp(-0.01, 0.01)

    assert_same_bits(with_norms_clipped(cls), train(cls, before_step=clip_norm))
    assert_same_bits(with_values_clipped(cls), train(cls, before_step=clip_values))


@pytest.mark.parametrize("cls", CLASSES)
def test_averages_are_those_of_the_weights_after_every_step(cls):
    seen = []

    def optimizer_of(params):
        params = list(params)
        optimizer = cls(params, lr=LR)
        optimizer.register_step_post_hook(
            lambda *_: seen.append([param.detach().clone() for param in params])
        )
        return optimizer

    _, swa, ema = with_averages(optimizer_of)
    histories = zip(*seen, strict=True)
    averages = zip(swa.parameters(), ema.parameters(), strict=True)
    for weights, (mean, moving) in zip(histories, averages, strict=True):
        torch.testing.assert_close(mean.detach(), torch.stack(weights).mean(0))
        expected, *later = weights
        for weight in later:
            expected = expected.lerp(weight, 0.1)
        torch.testing.assert_close(moving.detach(), expected)


def test_swalr_moves_lr_beside_the_schedule_of_p():
    ours = lpsgd.LPSGDM(network().parameters(), lr=0.1, p=6.0)
    sgd = torch.optim.SGD(network().parameters(), lr=0.1)
    schedule = lpsgd.CosineAnnealingP(ours, total_iters=6)
    averaging = [SWALR(optimizer, swa_lr=0.01, anneal_epochs=4) for optimizer in (ours, sgd)]
    for s in range(1, 8):
        assert ours.param_groups[0]["p"] == lpsgd_ext.cosine_p(s, 6, 6.0)
        assert ours.param_groups[0]["lr"] == sgd.param_groups[0]["lr"]
        for optimizer in (ours, sgd):
            optimizer.step()
        for each in (schedule, *averaging):
            each.step()


@pytest.mark.parametrize("cls", CLASSES)
def test_orthogonal_weights_stay_orthogonal(cls):
    weight = with_orthogonal_weights(cls)[4].weight
    assert not torch.equal(weight, network()[4].weight)
    torch.testing.assert_close(weight @ weight.T, torch.eye(10))


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("fused", [None, True])
def test_a_step_that_the_scaler_skips_changes_nothing(fused, cls):
    model, unscaled = network(), network()
    optimizer, reference = cls(model.parameters(), fused=fused), cls(unscaled.parameters())
    schedule = lpsgd.CosineAnnealingP(optimizer, total_iters=9, every_step=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    (x, y), *_ = batches()
    scaler.scale(torch.nn.functional.cross_entropy(model(x), y)).backward()
    model[4].bias.grad[3] = torch.inf
    scaler.step(optimizer)
    scaler.update()
    assert_same_bits(model, network())
    assert not optimizer.state
    assert schedule.get_last_p() == [6.0]
    assert scaler.get_scale() == 512.0

    model.load_state_dict(network().state_dict())  # The running averages of the forward pass.
    optimizer.zero_grad()
    scaler.scale(torch.nn.functional.cross_entropy(model(x), y)).backward()
    scaler.step(optimizer)
    backward(unscaled, (x, y))
    reference.step()
    assert_same_bits(model, unscaled)  # A power of two scales without rounding.
    assert schedule.get_last_p() < [6.0]
