# SPDX-License-Identifier: MIT
"""Engines that leave plain tensors as parameters: DDP, ZeRO, FSDP1 and pipelines.

In every rank a twin of the model plays the one process: it is given the gradients that the engine
makes, and must get the same bits.
"""

import copy
import math
import warnings

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.nn.parallel import DistributedDataParallel

from helpers import CLASSES, assert_same_bits, bits
from lpsgd import LPSGDM, CosineAnnealingP
from ranks import on_ranks

with warnings.catch_warnings():  # PyTorch's own: this import uses torch.jit.script
    warnings.simplefilter("ignore", DeprecationWarning)
    from torch.distributed.optim import ZeroRedundancyOptimizer

OPTIMIZERS = [
    (cls, {"lr": 0.1, "p": p, "fused": True}) for cls in CLASSES for p in (2, 4, math.inf)
]


def make_model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(7, 8), torch.nn.Tanh(), torch.nn.Linear(8, 5))


def batch(step):
    """Another one in every rank."""
    seed = step * dist.get_world_size() + dist.get_rank()
    return torch.randn(4, 7, generator=torch.Generator().manual_seed(seed))


def train(model, optimizer, twin, twin_optimizer, steps=range(3)):
    """Trains both on the model's gradients, which are whole in every rank, with a schedule of p."""
    schedules = [CosineAnnealingP(x, total_iters=5) for x in (optimizer, twin_optimizer)]
    for step in steps:
        model(batch(step)).square().mean().backward()
        for param, twin_param in zip(model.parameters(), twin.parameters(), strict=True):
            twin_param.grad = param.grad.clone()
        optimizer.step()
        twin_optimizer.step()
        optimizer.zero_grad()
        for schedule in schedules:
            schedule.step()
        assert_same_bits(model, twin)


def train_ddp():
    for cls in CLASSES:
        for as_view in (False, True):
            twin = make_model()
            model = DistributedDataParallel(make_model(), gradient_as_bucket_view=as_view)
            optimizer, twin_optimizer = (
                cls(m.parameters(), lr=0.1, p=6.0, fused=True) for m in (model, twin)
            )
            train(model, optimizer, twin, twin_optimizer)


def test_ddp_gives_the_bits_of_one_process():
    on_ranks(2, train_ddp)


def groups(model):
    return [
        {"params": list(model[0].parameters()), "p": 4.0},
        {"params": list(model[2].parameters())},
    ]


def train_zero():
    for as_view in (False, True):
        model, twin = make_model(), make_model()
        values = {"lr": 0.1, "p": 6.0, "weight_decay": 0.1, "fused": True}
        optimizer = ZeroRedundancyOptimizer(
            groups(model), LPSGDM, parameters_as_bucket_view=as_view, **values
        )
        twin_optimizer = LPSGDM(groups(twin), **values)
        engine = DistributedDataParallel(model)
        train(engine, optimizer, twin, twin_optimizer)

        optimizer.consolidate_state_dict(to=0)
        saved = [optimizer.state_dict() if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(saved)
        expected = twin_optimizer.state_dict()
        assert saved[0]["state"].keys() == expected["state"].keys()
        for index, state in expected["state"].items():
            buffer = saved[0]["state"][index]["momentum_buffer"]
            assert torch.equal(bits(buffer), bits(state["momentum_buffer"]))
        for group, twin_group in zip(
            saved[0]["param_groups"], expected["param_groups"], strict=True
        ):
            assert group.items() <= twin_group.items()

        # A run of ZeRO and one without it go on from what ZeRO saved.
        resumed = ZeroRedundancyOptimizer(groups(model), LPSGDM, lr=1.0)
        resumed.load_state_dict(copy.deepcopy(saved[0]))
        twin_resumed = LPSGDM(groups(twin), lr=1.0)
        twin_resumed.load_state_dict(saved[0])
        train(engine, resumed, twin, twin_resumed, steps=range(3, 6))
        assert [group["p"] for group in resumed.param_groups] == [2.0, 2.0]


@pytest.mark.parametrize("ranks", [2, 4])
def test_zero_gives_the_bits_and_the_state_dict_of_one_process(ranks):
    on_ranks(ranks, train_zero)


def train_fsdp1():
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for use_orig_params in (True, False):
        for cls, values in OPTIMIZERS:
            twin = make_model()
            model = FullyShardedDataParallel(
                make_model(),
                device_mesh=mesh,
                device_id=torch.device("cpu"),
                use_orig_params=use_orig_params,
            )
            optimizer = cls(model.parameters(), **values)
            twin_optimizer = cls(twin.parameters(), **values)
            for step in range(3):
                # The same batch in every rank, whose average over 2 ranks is exact.
                x = torch.randn(4, 7, generator=torch.Generator().manual_seed(step))
                for each in (model, twin):
                    each(x).square().mean().backward()
                optimizer.step()
                twin_optimizer.step()
                optimizer.zero_grad()
                twin_optimizer.zero_grad()
                with FullyShardedDataParallel.summon_full_params(model):
                    assert_same_bits(model, twin)


def test_fsdp1_gives_the_bits_of_one_process():
    on_ranks(2, train_fsdp1)


def train_pipeline():
    rank = dist.get_rank()
    for cls, values in OPTIMIZERS:
        model, twin = make_model(), make_model()
        part = (model[:2], model[2:])[rank]
        stage = PipelineStage(part, rank, 2, torch.device("cpu"))
        schedule = ScheduleGPipe(stage, 2, loss_fn=lambda y, target: (y - target).square().mean())
        optimizer = cls(part.parameters(), **values)
        twin_optimizer = cls(twin.parameters(), **values)
        for step in range(3):
            # The same batch in both ranks, whose two halves' gradients have an exact average.
            x, target = torch.randn((2, 4, 7), generator=torch.Generator().manual_seed(step))
            target = target[:, :5]
            if rank == 0:
                schedule.step(x)
            else:
                schedule.step(target=target)
            for half, half_target in zip(x.chunk(2), target.chunk(2), strict=True):
                (twin(half) - half_target).square().mean().backward()
            for param in twin.parameters():
                param.grad /= 2
            optimizer.step()
            twin_optimizer.step()
            optimizer.zero_grad()
            twin_optimizer.zero_grad()
            assert_same_bits(part, (twin[:2], twin[2:])[rank])


def test_pipeline_gives_the_bits_of_one_process():
    on_ranks(2, train_pipeline)
