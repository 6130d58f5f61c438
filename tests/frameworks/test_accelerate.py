# SPDX-License-Identifier: MIT
"""Hugging Face Accelerate's loop against a plain one."""

import accelerate
import pytest
import torch
from torch.optim.lr_scheduler import LinearLR
from torch.utils.data import DataLoader, TensorDataset

import lpsgd
from helpers import CLASSES, assert_same_bits

BATCHES = 12


@pytest.fixture(autouse=True)
def fresh_state():
    """Accelerate keeps its state in the class, which would outlive the test."""
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))


def loader():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4 * BATCHES, 8, generator=generator)
    return DataLoader(TensorDataset(x, x.prod(1, keepdim=True)), batch_size=4)


class Training:
    """A model with its optimizer and schedules, made anew and prepared."""

    def __init__(self, cls, total_iters, every_step, accumulate=1, **options):
        self.accelerator = accelerate.Accelerator(
            cpu=True, gradient_accumulation_steps=accumulate, **options
        )
        model = network()
        optimizer = cls(model.parameters(), lr=0.01, p=6.0)
        warmup = LinearLR(optimizer, 0.1, total_iters=3)
        schedule = lpsgd.CosineAnnealingP(optimizer, total_iters, every_step=every_step)
        schedules = [warmup] if every_step else [warmup, schedule]
        self.model, self.optimizer, self.loader, *self.schedules = self.accelerator.prepare(
            model, optimizer, loader(), *schedules
        )

    def run(self, first=0, last=BATCHES, clip=None):
        batches = accelerate.skip_first_batches(self.loader, first)
        for i, (x, y) in enumerate(batches, first):
            if i == last:
                break
            with self.accelerator.accumulate(self.model):
                self.accelerator.backward(torch.nn.functional.mse_loss(self.model(x), y))
                if clip is not None and self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.model.parameters(), clip)
                self.optimizer.step()
                for schedule in self.schedules:
                    schedule.step()
                self.optimizer.zero_grad()
        return self


def plain_loop(cls, total_iters, *, clip=None, accumulate=1, autocast=False):
    model = network()
    optimizer = cls(model.parameters(), lr=0.01, p=6.0)
    warmup = LinearLR(optimizer, 0.1, total_iters=3)
    schedule = lpsgd.CosineAnnealingP(optimizer, total_iters)
    for i, (x, y) in enumerate(loader()):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            prediction = model(x)
        loss = torch.nn.functional.mse_loss(prediction.float(), y)
        (loss / accumulate).backward()
        if (i + 1) % accumulate:
            continue
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        warmup.step()
        schedule.step()
    assert optimizer.param_groups[0]["p"] == 2.0
    return model


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("every_step", [False, True])
def test_a_prepared_loop_has_the_bits_of_a_plain_one(cls, every_step):
    assert_same_bits(Training(cls, 10, every_step).run().model, plain_loop(cls, 10))


@pytest.mark.parametrize("every_step", [False, True])
def test_clipping_and_accumulation_have_the_bits_of_a_plain_loop(every_step):
    training = Training(lpsgd.LPSGDM, 4, every_step, accumulate=3).run(clip=0.1)
    assert_same_bits(training.model, plain_loop(lpsgd.LPSGDM, 4, clip=0.1, accumulate=3))


def test_mixed_precision_has_the_bits_of_a_plain_loop_with_autocast():
    training = Training(lpsgd.LPSGDM, 10, False, mixed_precision="bf16").run()
    assert_same_bits(training.model, plain_loop(lpsgd.LPSGDM, 10, autocast=True))


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("every_step", [False, True])
def test_it_resumes_in_the_middle_of_the_schedule(cls, every_step, tmp_path):
    whole = Training(cls, 20, every_step).run()
    Training(cls, 20, every_step).run(last=5).accelerator.save_state(tmp_path)
    resumed = Training(cls, 20, every_step)
    resumed.accelerator.load_state(tmp_path)
    resumed.run(first=5)
    assert_same_bits(whole.model, resumed.model)
    p, resumed_p = (each.optimizer.param_groups[0]["p"] for each in (whole, resumed))
    assert 2.0 < p == resumed_p < 6.0
