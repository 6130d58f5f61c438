# SPDX-License-Identifier: MIT
"""PyTorch Lightning's Trainer against plain loops."""

import lightning.pytorch as lightning
import pytest
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging
from torch.optim.lr_scheduler import LinearLR
from torch.utils.data import DataLoader, TensorDataset

import lpsgd
import lpsgd_ext
from helpers import CLASSES, assert_same_bits

EPOCHS = 4
BATCHES = 6


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))


def loader():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4 * BATCHES, 8, generator=generator)
    return DataLoader(TensorDataset(x, x.prod(1, keepdim=True)), batch_size=4)


class Module(lightning.LightningModule):
    """Trains with a warm-up of lr and a schedule of p, by one of three ways to drive the latter."""

    def __init__(self, cls, total_iters, drive="step"):
        super().__init__()
        self.network = network()
        self.cls, self.total_iters, self.drive = cls, total_iters, drive

    def training_step(self, batch, _):
        x, y = batch
        return torch.nn.functional.mse_loss(self.network(x), y)

    def configure_optimizers(self):
        optimizer = self.cls(self.parameters(), lr=0.01, p=6.0)
        warmup = LinearLR(optimizer, 0.1, total_iters=5)
        every_step = self.drive == "itself"
        schedule = lpsgd.CosineAnnealingP(optimizer, self.total_iters, every_step=every_step)
        schedulers = [{"scheduler": warmup, "interval": "step"}]
        if not every_step:
            schedulers.append({"scheduler": schedule, "interval": self.drive})
        return [optimizer], schedulers


class Manual(Module):
    """The same training by manual optimization."""

    automatic_optimization = False

    def training_step(self, batch, index):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, index))
        optimizer.step()
        for schedule in self.lr_schedulers():
            schedule.step()


def fit(module, directory, epochs=EPOCHS, ckpt_path=None, **options):
    trainer = lightning.Trainer(
        accelerator="cpu",
        default_root_dir=directory,
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(module, loader(), ckpt_path=ckpt_path)
    return trainer


def plain_loop(cls, total_iters, *, clip=None, accumulate=1, autocast=False, by="step"):
    model = network()
    optimizer = cls(model.parameters(), lr=0.01, p=6.0)
    warmup = LinearLR(optimizer, 0.1, total_iters=5)
    schedule = lpsgd.CosineAnnealingP(optimizer, total_iters)
    for _ in range(EPOCHS):
        for i, (x, y) in enumerate(loader()):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                loss = torch.nn.functional.mse_loss(model(x), y)
            (loss / accumulate).backward()
            if (i + 1) % accumulate:
                continue
            if clip is not None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
            warmup.step()
            if by == "step":
                schedule.step()
        if by == "epoch":
            schedule.step()
    assert optimizer.param_groups[0]["p"] == 2.0
    return model


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("drive", ["step", "itself"])
def test_automatic_optimization_has_the_bits_of_a_plain_loop(cls, drive, tmp_path):
    module = Module(cls, 20, drive)
    fit(module, tmp_path)
    assert_same_bits(module.network, plain_loop(cls, 20))


def test_p_by_epoch_has_the_bits_of_a_plain_loop(tmp_path):
    module = Module(lpsgd.LPSGDM, EPOCHS, "epoch")
    fit(module, tmp_path)
    assert_same_bits(module.network, plain_loop(lpsgd.LPSGDM, EPOCHS, by="epoch"))


@pytest.mark.parametrize("drive", ["step", "itself"])
def test_clipping_and_accumulation_have_the_bits_of_a_plain_loop(drive, tmp_path):
    module = Module(lpsgd.LPSGDM, 6, drive)
    fit(module, tmp_path, gradient_clip_val=0.1, accumulate_grad_batches=3)
    assert_same_bits(module.network, plain_loop(lpsgd.LPSGDM, 6, clip=0.1, accumulate=3))


def test_mixed_precision_has_the_bits_of_a_plain_loop_with_autocast(tmp_path):
    module = Module(lpsgd.LPSGDM, 20)
    fit(module, tmp_path, precision="bf16-mixed")
    assert_same_bits(module.network, plain_loop(lpsgd.LPSGDM, 20, autocast=True))


def test_manual_optimization_has_the_bits_of_a_plain_loop(tmp_path):
    module = Manual(lpsgd.LPSGDM, 20)
    fit(module, tmp_path)
    assert_same_bits(module.network, plain_loop(lpsgd.LPSGDM, 20))


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("drive", ["step", "epoch", "itself"])
def test_it_resumes_in_the_middle_of_the_schedule(cls, drive, tmp_path):
    total_iters = EPOCHS + 2 if drive == "epoch" else EPOCHS * BATCHES + 9
    whole, first, second = (Module(cls, total_iters, drive) for _ in range(3))
    uninterrupted = fit(whole, tmp_path)
    fit(first, tmp_path, epochs=EPOCHS // 2).save_checkpoint(tmp_path / "half.ckpt")
    resumed = fit(second, tmp_path, ckpt_path=tmp_path / "half.ckpt")
    assert_same_bits(whole, second)
    p, resumed_p = (each.optimizers[0].param_groups[0]["p"] for each in (uninterrupted, resumed))
    assert 2.0 < p == resumed_p < 6.0


@pytest.mark.parametrize("drive", ["itself", "epoch"])
def test_averaging_of_weights_leaves_what_drives_itself_alone(drive, tmp_path):
    """StochasticWeightAveraging puts a scheduler of its own into the place of the first one."""

    class Averaged(Module):
        def configure_optimizers(self):
            optimizers, (_, *schedules) = super().configure_optimizers()
            return optimizers, schedules

    averaging = StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=2)
    total_iters = EPOCHS * BATCHES + 1 if drive == "itself" else EPOCHS + 1
    module = Averaged(lpsgd.LPSGDM, total_iters, drive)
    trainer = fit(module, tmp_path, callbacks=[averaging])
    p = trainer.optimizers[0].param_groups[0]["p"]
    if drive == "itself":
        assert p == 2.0
    else:
        assert p == lpsgd_ext.cosine_p(1 + 1, total_iters, 6.0)  # of one epoch, then SWA's own
