# SPDX-License-Identifier: MIT
"""DeepSpeed's ZeRO with LPSGD and LPSGDM as client optimizers, on the CPU.

In every rank a twin of the model plays the one process. Both train on the same batches, whose
gradients' average over 2 ranks is exact, and must get the same bits.
"""

import importlib.util
import math
import os
import sys
import warnings
from pathlib import Path

import pytest
import torch

from helpers import CLASSES, bits
from lpsgd import LPSGDM, CosineAnnealingP
from ranks import on_ranks, run_section

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"
)

CONFIGS = {
    "no ZeRO": {"zero_optimization": {"stage": 0}},
    "ZeRO 1": {"zero_optimization": {"stage": 1}},
    "ZeRO 2": {"zero_optimization": {"stage": 2}},
    "ZeRO 3": {"zero_optimization": {"stage": 3}},
    "ZeRO 2, offload": {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
    "ZeRO 3, bfloat16": {"zero_optimization": {"stage": 3}, "bf16": {"enabled": True}},
}


def make_model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(7, 8), torch.nn.Tanh(), torch.nn.Linear(8, 5))


def prepare():
    """What DeepSpeed needs in this process before it is imported."""
    warnings.simplefilter("default")  # its own and those of what it calls
    os.environ["DS_ACCELERATOR"] = "cpu"
    # It builds a communication library by ninja, which pip installs beside Python.
    os.environ["PATH"] += f"{os.pathsep}{Path(sys.executable).parent}"


def make_engine(config, optimizer, model, schedule=None):
    import deepspeed

    engine, _, _, _ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        lr_scheduler=schedule,
        config={
            "train_micro_batch_size_per_gpu": 4,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            **CONFIGS[config],
        },
    )
    return engine


def train(engine, twin, twin_optimizer, steps):
    from deepspeed.utils import safe_get_full_fp32_param

    dtype = next(engine.module.parameters()).dtype
    for step in steps:
        x = torch.randn(4, 7, generator=torch.Generator().manual_seed(step))
        engine.backward(engine(x.to(dtype)).float().square().mean())
        engine.step()
        lower = make_model().to(dtype)  # mixed precision has float32 weights to step
        lower.load_state_dict(twin.state_dict())
        lower(x.to(dtype)).float().square().mean().backward()
        for param, low in zip(twin.parameters(), lower.parameters(), strict=True):
            param.grad = low.grad.float()
        twin_optimizer.step()
        for param, expected in zip(engine.module.parameters(), twin.parameters(), strict=True):
            whole = safe_get_full_fp32_param(param)
            whole = param if whole is None else whole
            assert torch.equal(bits(whole), bits(expected)), (step, whole, expected)


def train_engines():
    prepare()
    for config in CONFIGS:
        for cls in CLASSES:
            for p in (2.0, 4.0, math.inf):
                model, twin = make_model(), make_model()
                if "bf16" in CONFIGS[config]:  # its float32 weights are made from these
                    twin = twin.bfloat16().float()
                optimizer, twin_optimizer = (
                    cls(m.parameters(), lr=0.1, p=p, weight_decay=0.1) for m in (model, twin)
                )
                engine = make_engine(config, optimizer, model)
                try:
                    train(engine, twin, twin_optimizer, range(3))
                except AssertionError as error:
                    raise AssertionError(f"{config}, {cls.__name__}, p = {p}") from error


def test_every_stage_gives_the_bits_of_one_process():
    on_ranks(2, train_engines)


def resume(folder):
    prepare()
    for stage in ("ZeRO 1", "ZeRO 3"):
        twin = make_model()
        twin_optimizer = LPSGDM(twin.parameters(), lr=0.1, p=6.0)
        twin_schedule = CosineAnnealingP(twin_optimizer, total_iters=6)
        for steps in (range(3), range(3, 6)):
            model = make_model()
            engine = make_engine(
                stage,
                LPSGDM(model.parameters(), lr=0.1, p=6.0),
                model,
                lambda optimizer: CosineAnnealingP(optimizer, total_iters=6),
            )
            if steps[0]:
                engine.load_checkpoint(f"{folder}/{stage}")
            for step in steps:
                train(engine, twin, twin_optimizer, [step])
                twin_schedule.step()
                assert engine.lr_scheduler.get_last_p() == twin_schedule.get_last_p()
            engine.save_checkpoint(f"{folder}/{stage}")
        assert engine.optimizer.param_groups[0]["p"] == 2.0


def test_schedule_of_p_runs_in_the_engine_and_goes_on_from_its_checkpoint(tmp_path):
    on_ranks(2, resume, tmp_path)


def run_documented():
    prepare()
    run_section("DeepSpeed")


def test_section_runs():
    on_ranks(2, run_documented)
