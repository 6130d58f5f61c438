# SPDX-License-Identifier: MIT
"""torchao's CPUOffloadOptimizer, which keeps the state of LPSGDM on the CPU.

It refuses to run without a GPU. Here its own code runs with the CPU as that GPU: what it copies
between the two stays where it is, and what it waits for is done.
"""

import contextlib
import copy

import pytest
import torch

from helpers import CLASSES, assert_same_bits
from lpsgd import LPSGDM, CosineAnnealingP
from ranks import on_ranks, run_section

cpu_offload = pytest.importorskip("torchao.optim.cpu_offload")


class Stream:
    """A stream, or an event in it, of which everything is done."""

    def wait_stream(self, stream): ...

    def record_event(self):
        return self

    def synchronize(self): ...


@pytest.fixture(autouse=True)
def device():
    with pytest.MonkeyPatch.context() as monkeypatch:
        replace_device(monkeypatch)
        yield


def replace_device(monkeypatch):
    monkeypatch.setattr(cpu_offload, "get_available_devices", lambda: ["cpu", "xpu"])
    monkeypatch.setattr(torch.xpu, "Stream", Stream)
    monkeypatch.setattr(torch.xpu, "current_stream", Stream)
    monkeypatch.setattr(torch.xpu, "stream", contextlib.nullcontext)
    unpinned = torch.empty_like
    monkeypatch.setattr(
        torch, "empty_like", lambda x, pin_memory=False, **options: unpinned(x, **options)
    )


def make_model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(7, 8), torch.nn.Tanh(), torch.nn.Linear(8, 5))


def train(models, optimizers, steps):
    for step in steps:
        x = torch.randn(4, 7, generator=torch.Generator().manual_seed(step))
        for model, optimizer in zip(models, optimizers, strict=True):
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert_same_bits(*models)


# Weights of 56 and 40 elements are offloaded, the biases and all stay on the device.
@pytest.mark.parametrize("minimal_size", [0, 30, 1000])
@pytest.mark.parametrize("cls", CLASSES)
def test_offloaded_states_give_the_bits_of_the_plain_optimizer(cls, minimal_size):
    model, twin = make_model(), make_model()
    values = {"lr": 0.1, "p": 4.0, "weight_decay": 0.1}
    optimizer = cpu_offload.CPUOffloadOptimizer(
        model.parameters(), cls, minimal_size=minimal_size, **values
    )
    train((model, twin), (optimizer, cls(twin.parameters(), **values)), range(3))


def test_schedule_of_p_reaches_every_offloaded_parameter():
    model, twin = make_model(), make_model()
    optimizers = (
        cpu_offload.CPUOffloadOptimizer(model.parameters(), LPSGDM, minimal_size=30, lr=0.1, p=6.0),
        LPSGDM(twin.parameters(), lr=0.1, p=6.0),
    )
    schedules = [CosineAnnealingP(optimizer, total_iters=4) for optimizer in optimizers]
    for step in range(4):
        train((model, twin), optimizers, [step])
        for schedule in schedules:
            schedule.step()
    assert {group["p"] for group in optimizers[0].param_groups} == {2.0}


def test_offloaded_state_goes_on_from_its_state_dict():
    model, twin = make_model(), make_model()
    optimizers = [
        cpu_offload.CPUOffloadOptimizer(m.parameters(), LPSGDM, minimal_size=30, lr=0.1)
        for m in (model, twin)
    ]
    train((model, twin), optimizers, range(3))
    resumed = copy.deepcopy(model)
    optimizer = cpu_offload.CPUOffloadOptimizer(
        resumed.parameters(), LPSGDM, minimal_size=30, lr=1.0
    )
    optimizer.load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    train((resumed, twin), (optimizer, optimizers[1]), range(3, 6))


def run_documented():
    replace_device(pytest.MonkeyPatch())
    run_section("torchao")


def test_section_runs():
    on_ranks(1, run_documented)
