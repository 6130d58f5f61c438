# SPDX-License-Identifier: MIT
"""Engines that leave plain tensors as parameters: DDP, ZeRO, FSDP1 and pipelines.

In every rank a twin of the model plays the one process: it is given the gradients that the engine
makes, and must get the same bits.
"""

import copy
import itertools
import math
import warnings

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.nn.parallel import DistributedDataParallel

from helpers import CLASSES, assert_same_bits, bits
from lpsgd import LPSGD, LPSGDM, CosineAnnealingP, release_gradients
from ranks import on_ranks

with warnings.catch_warnings():  # PyTorch's own: this import uses torch.jit.script
    warnings.simplefilter("ignore", DeprecationWarning)
    from torch.distributed.optim import ZeroRedundancyOptimizer

BYTES = {"momentum_dtype": torch.float8_e5m2, "momentum_exponent": 12, "seed": 5}
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
    for cls, values in ((LPSGD, {}), (LPSGDM, {}), (LPSGDM, BYTES)):
        for as_view in (False, True):
            twin = make_model()
            model = DistributedDataParallel(make_model(), gradient_as_bucket_view=as_view)
            optimizer, twin_optimizer = (
                cls(m.parameters(), lr=0.1, p=6.0, fused=True, **values) for m in (model, twin)
            )
            train(model, optimizer, twin, twin_optimizer)


def test_ddp_gives_the_bits_of_one_process():
    on_ranks(2, train_ddp)


def train_ddp_released():
    """Its gradients are the means of the processes', of which the twin takes the sum."""
    for as_view, values, accumulate in itertools.product((False, True), ({}, BYTES), (1, 3)):
        twin, module = make_model(), make_model()
        optimizer, twin_optimizer = (
            LPSGDM(m.parameters(), lr=0.1, p=6.0, **values) for m in (module, twin)
        )
        release_gradients(optimizer, accumulate)
        release_gradients(twin_optimizer, accumulate)
        model = DistributedDataParallel(module, gradient_as_bucket_view=as_view)
        for step in range(3):
            for i in range(accumulate):
                x = batch(accumulate * step + i)
                model(x).square().mean().backward()
                assert all(param.grad is None for param in module.parameters())
                gathered = [torch.empty_like(x) for _ in range(dist.get_world_size())]
                dist.all_gather(gathered, x)
                sum(twin(one).square().mean() / 2 for one in gathered).backward()
            for one in (optimizer, twin_optimizer):
                one.step()
                one.zero_grad()
            for a, b in zip(module.parameters(), twin.parameters(), strict=True):
                tolerance = 0.2 if values else 1e-4  # a last bit of g may turn one of m in a byte
                torch.testing.assert_close(a, b, rtol=0, atol=tolerance)
        with model.no_sync(), pytest.raises(RuntimeError, match="no_sync"):
            model(batch(0)).square().mean().backward()
        whole = torch.cat([param.detach().view(-1) for param in module.parameters()])
        others = [torch.empty_like(whole) for _ in range(dist.get_world_size())]
        dist.all_gather(others, whole)
        assert torch.equal(*others)


def test_ddp_releases_gradients_when_they_are_reduced():
    on_ranks(2, train_ddp_released)


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


def buffers(optimizer):
    params = [param for group in optimizer.param_groups for param in group["params"]]
    states = [optimizer.state[param] for param in params if param in optimizer.state]
    return [state["momentum_buffer"] for state in states]


def same_bytes(optimizer, others):
    """Whether the buffers are of one byte and have the bits of the others' together."""
    made, expected = buffers(optimizer), [b for other in others for b in buffers(other)]
    assert {buffer.dtype for buffer in made} == {torch.float8_e5m2}
    return all(torch.equal(bits(a), bits(b)) for a, b in zip(made, expected, strict=True))


def train_zero_in_bytes(file):
    """The twin is stepped by one optimizer for each rank, which numbers parameters as that does."""
    model, twin = make_model(), make_model()
    optimizer = ZeroRedundancyOptimizer(model.parameters(), LPSGDM, lr=0.1, fused=True, **BYTES)
    numbers = {param: i for i, param in enumerate(model.parameters())}
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, [numbers[p] for p in optimizer.optim.param_groups[0]["params"]])
    params = list(twin.parameters())
    twin_optimizers = [LPSGDM([params[i] for i in part], lr=0.1, **BYTES) for part in parts]
    engine = DistributedDataParallel(model)
    for step in range(6):
        if step == 3:  # all goes on from what rank 0 has collected
            optimizer.consolidate_state_dict(to=0)
            if dist.get_rank() == 0:  # by a file, for pickle restores no float8
                torch.save(optimizer.state_dict(), file)
            dist.barrier()
            optimizer = ZeroRedundancyOptimizer(model.parameters(), LPSGDM, lr=1.0)
            optimizer.load_state_dict(torch.load(file, weights_only=True))
        engine(batch(step)).square().mean().backward()
        for param, twin_param in zip(model.parameters(), params, strict=True):
            twin_param.grad = param.grad.clone()
        optimizer.step()
        for one in twin_optimizers:
            one.step()
        optimizer.zero_grad()
        assert_same_bits(model, twin)
        assert same_bytes(optimizer.optim, [twin_optimizers[dist.get_rank()]])


@pytest.mark.parametrize("ranks", [2, 3])
def test_zero_keeps_bytes(ranks, tmp_path):
    on_ranks(ranks, train_zero_in_bytes, tmp_path / "state")


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
            with pytest.raises(RuntimeError, match="use fully_shard"):
                release_gradients(optimizer)
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


def train_fsdp1_in_bytes():
    """Every rank counts from its own first element on: the twins are the rank's own tensors."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for use_orig_params in (True, False):
        model = FullyShardedDataParallel(
            make_model(),
            device_mesh=mesh,
            device_id=torch.device("cpu"),
            use_orig_params=use_orig_params,
        )
        values = {"lr": 0.1, "p": 2.0, **BYTES}
        optimizer = LPSGDM(model.parameters(), fused=True, **values)
        twins = [torch.nn.Parameter(param.detach().clone()) for param in model.parameters()]
        twin_optimizer = LPSGDM(twins, **values)
        for step in range(3):
            model(batch(step)).square().mean().backward()
            for param, twin in zip(model.parameters(), twins, strict=True):
                twin.grad = None if param.grad is None else param.grad.clone()
            optimizer.step()
            twin_optimizer.step()
            optimizer.zero_grad()
            for param, twin in zip(model.parameters(), twins, strict=True):
                assert torch.equal(bits(param), bits(twin))
            assert same_bytes(optimizer, [twin_optimizer])
        warnings.simplefilter("ignore")  # PyTorch's, of what it calls itself
        for full in (True, False):
            with pytest.raises(RuntimeError, match="Invalid scalar type"):  # gloo's
                get_optimizer_state_dict(
                    model, optimizer, options=StateDictOptions(full_state_dict=full)
                )


def test_fsdp1_keeps_bytes_that_gloo_does_not_send():
    on_ranks(2, train_fsdp1_in_bytes)


def train_pipeline():
    rank = dist.get_rank()
    for cls, values in [*OPTIMIZERS, (LPSGDM, {"lr": 0.1, **BYTES})]:
        model, twin = make_model(), make_model()
        part = (model[:2], model[2:])[rank]
        stage = PipelineStage(part, rank, 2, torch.device("cpu"))
        schedule = ScheduleGPipe(stage, 2, loss_fn=lambda y, target: (y - target).square().mean())
        optimizer = cls(part.parameters(), **values)
        # Random bits go by the numbers that each rank gives its parameters.
        twin_optimizers = [cls(half.parameters(), **values) for half in (twin[:2], twin[2:])]
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
            for one in (optimizer, *twin_optimizers):
                one.step()
                one.zero_grad()
            assert_same_bits(part, (twin[:2], twin[2:])[rank])


def test_pipeline_gives_the_bits_of_one_process():
    on_ranks(2, train_pipeline)
