# SPDX-License-Identifier: MIT
"""Hugging Face's Trainer against plain loops."""

import pytest
import torch
import transformers

import lpsgd
from helpers import CLASSES, assert_same_bits

EPOCHS = 2
BATCHES = 12
WARMUP = 3


def network():
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=32,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = transformers.BertForSequenceClassification(config)
    # Otherwise Trainer leaves it to the model to divide by the number of micro-batches.
    model.accepts_loss_kwargs = False
    return model


def dataset():
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 32, (4 * BATCHES, 10), generator=generator)
    return [{"input_ids": row, "labels": int(row[0] > row[1])} for row in ids]


class ScheduledTrainer(transformers.Trainer):
    """A Trainer that makes its optimizer itself, and the schedule of p with it."""

    def create_optimizer(self, *args):
        optimizer = super().create_optimizer(*args)
        lpsgd.CosineAnnealingP(optimizer, self.total_iters, every_step=True)
        return optimizer


def trainer_of(cls, total_iters, directory, drive, **options):
    """Three ways to give Trainer the optimizer and its schedule of p."""
    model = network()
    common = {
        "model": model,
        "args": transformers.TrainingArguments(
            output_dir=directory,
            num_train_epochs=EPOCHS,
            per_device_train_batch_size=4,
            train_sampling_strategy="sequential",
            warmup_steps=WARMUP,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            **{"save_strategy": "no", **options},
        ),
        "train_dataset": dataset(),
    }
    if drive == "trainer makes it":
        optimizer = (cls, {"lr": 0.01, "p": 6.0})
        trainer = ScheduledTrainer(**common, optimizer_cls_and_kwargs=optimizer)
        trainer.total_iters = total_iters
        return trainer
    optimizer = cls(model.parameters(), lr=0.01, p=6.0)
    every_step = drive == "itself"
    schedule = lpsgd.CosineAnnealingP(optimizer, total_iters, every_step=every_step)
    return transformers.Trainer(**common, optimizers=(optimizer, None if every_step else schedule))


def plain_loop(cls, total_iters, drive, *, accumulate=1, clip=1.0, autocast=False):
    model = network().train()
    optimizer = cls(model.parameters(), lr=0.01, p=6.0)
    schedules = [lpsgd.CosineAnnealingP(optimizer, total_iters)]
    if drive != "trainer steps it":  # Then there is room for Trainer's own schedule of lr.
        steps = EPOCHS * BATCHES // accumulate
        schedules.append(transformers.get_scheduler("linear", optimizer, WARMUP, steps))
    for _ in range(EPOCHS):
        for i, rows in enumerate(torch.utils.data.DataLoader(dataset(), batch_size=4)):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                loss = model(**rows).loss
            (loss / accumulate).backward()
            if (i + 1) % accumulate:
                continue
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
            for schedule in schedules:
                schedule.step()
    return model


DRIVES = ["trainer steps it", "itself", "trainer makes it"]


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("drive", DRIVES)
def test_trainer_has_the_bits_of_a_plain_loop(cls, drive, tmp_path):
    trainer = trainer_of(cls, 20, tmp_path, drive)
    trainer.train()
    assert trainer.optimizer.param_groups[0]["p"] == 2.0
    assert_same_bits(trainer.model, plain_loop(cls, 20, drive))


@pytest.mark.parametrize("drive", DRIVES)
def test_clipping_and_accumulation_have_the_bits_of_a_plain_loop(drive, tmp_path):
    options = {"max_grad_norm": 0.1, "gradient_accumulation_steps": 3}
    trainer = trainer_of(lpsgd.LPSGDM, 7, tmp_path, drive, **options)
    trainer.train()
    assert trainer.optimizer.param_groups[0]["p"] == 2.0
    assert_same_bits(trainer.model, plain_loop(lpsgd.LPSGDM, 7, drive, accumulate=3, clip=0.1))


def test_mixed_precision_has_the_bits_of_a_plain_loop_with_autocast(tmp_path):
    trainer = trainer_of(lpsgd.LPSGDM, 20, tmp_path, "itself", bf16=True)
    trainer.train()
    assert_same_bits(trainer.model, plain_loop(lpsgd.LPSGDM, 20, "itself", autocast=True))


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("drive", DRIVES)
def test_it_resumes_in_the_middle_of_the_schedule(cls, drive, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 10}
    whole, resumed = (trainer_of(cls, 30, tmp_path, drive, **saving) for _ in range(2))
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
    assert_same_bits(whole.model, resumed.model)
    p, resumed_p = (each.optimizer.param_groups[0]["p"] for each in (whole, resumed))
    assert 2.0 < p == resumed_p < 6.0
