# SPDX-License-Identifier: MIT
"""torch.distributed.checkpoint: what one sharding saves, another and one process go on from."""

import math

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from helpers import CLASSES, bits
from lpsgd import LPSGDM, CosineAnnealingP
from ranks import on_ranks


def make_model(seed=0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(7, 8), torch.nn.Tanh(), torch.nn.Linear(8, 5))


def shard(model):
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return model


def parallelize(model):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})


def make_optimizer(model, cls=LPSGDM, **values):
    groups = [{"params": model[0].parameters(), "p": 4.0}, {"params": model[2].parameters()}]
    optimizer = cls(groups, **{"lr": 0.1, "weight_decay": 0.1, **values})
    return optimizer, CosineAnnealingP(optimizer, total_iters=8)


def train(model, optimizer, schedule, steps):
    """The same gradients in every process, whatever part of them it needs."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for param in model.parameters():
            grad = torch.randn(param.shape, generator=generator)
            if isinstance(param, DTensor):
                grad = distribute_tensor(grad, param.device_mesh, param.placements)
            param.grad = grad
        optimizer.step()
        schedule.step()
    optimizer.zero_grad()


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def assert_as_one_process(model, optimizer, steps):
    """The bits and values of a process that was not interrupted."""
    twin = make_model()
    twin_optimizer, twin_schedule = make_optimizer(twin, type(optimizer))
    train(twin, twin_optimizer, twin_schedule, range(steps))
    for param, expected in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(bits(whole(param)), bits(expected))
        for name, value in twin_optimizer.state[expected].items():
            assert torch.equal(bits(whole(optimizer.state[param][name])), bits(value)), name
    for group, expected in zip(optimizer.param_groups, twin_optimizer.param_groups, strict=True):
        for name in expected.keys() - {"params"}:
            assert group[name] == expected[name], name


def kinds(folder):
    for cls in CLASSES:
        for flat in (False, True):
            options = StateDictOptions(flatten_optimizer_state_dict=flat)
            yield cls, options, f"{folder}/{cls.__name__}-{flat}"


def save(folder):
    for cls, options, path in kinds(folder):
        model = shard(make_model())
        optimizer, schedule = make_optimizer(model, cls)
        train(model, optimizer, schedule, range(3))
        weights, state = get_state_dict(model, optimizer, options=options)
        dcp.save({"model": weights, "optimizer": state, "schedule": schedule}, checkpoint_id=path)


def load(folder):
    for cls, options, path in kinds(folder):
        for shard_as in (shard, parallelize, lambda model: model):
            model = shard_as(make_model(seed=1))
            optimizer, schedule = make_optimizer(model, cls, lr=1.0, p=7.0)
            weights, state = get_state_dict(model, optimizer, options=options)
            saved = {"model": weights, "optimizer": state, "schedule": schedule}
            dcp.load(saved, checkpoint_id=path)
            set_state_dict(
                model, optimizer, model_state_dict=weights, optim_state_dict=state, options=options
            )
            assert_as_one_process(model, optimizer, 3)
            train(model, optimizer, schedule, range(3, 6))
            assert_as_one_process(model, optimizer, 6)


def test_checkpoint_of_4_ranks_goes_on_in_2_with_the_same_bits(tmp_path):
    on_ranks(4, save, tmp_path)
    on_ranks(2, load, tmp_path)


def exchange_full_state_dicts():
    states = []
    for model, options in (
        (shard(make_model()), StateDictOptions(full_state_dict=True, cpu_offload=True)),
        (make_model(), StateDictOptions()),
    ):
        optimizer, schedule = make_optimizer(model)
        train(model, optimizer, schedule, range(3))
        states.append(get_state_dict(model, optimizer, options=options))
    (weights, state), (_, expected) = states
    if dist.get_rank() == 0:
        assert str(state) == str(expected)  # the same keys, values and tensors

    # From rank 0, which alone has it, to all.
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    model = shard(make_model(seed=1))
    optimizer, schedule = make_optimizer(model, lr=1.0, p=7.0)
    set_model_state_dict(model, weights, options=options)
    set_optimizer_state_dict(model, optimizer, state, options=options)
    schedule.load_state_dict({**schedule.state_dict(), "last_epoch": 3})
    train(model, optimizer, schedule, range(3, 6))
    assert_as_one_process(model, optimizer, 6)


def test_full_state_dict_is_that_of_one_process():
    on_ranks(2, exchange_full_state_dicts)


def initialize_states():
    odd = torch.tensor([-0.0, 0.0, 1e-45, -1e-38, 1.0, math.inf, math.nan, -3.0])
    for cls in CLASSES:
        for p in (2.0, 4.0, math.inf):
            model = make_model()
            with torch.no_grad():
                model[0].bias.copy_(odd)
            before = [bits(param).clone() for param in model.parameters()]
            model = shard(model)
            optimizer = cls(model.parameters(), lr=0.1, p=p, weight_decay=0.5)
            get_optimizer_state_dict(model, optimizer)
            for param, expected in zip(model.parameters(), before, strict=True):
                assert torch.equal(bits(param.full_tensor()), expected)
                assert optimizer.param_groups[0]["lr"] == 0.1
                for buffer in optimizer.state[param].values():
                    assert not bits(buffer.full_tensor()).any()


def test_initializing_the_state_changes_no_parameter():
    # PyTorch takes a step with lr = 0 and gradients of zeros.
    on_ranks(2, initialize_states)
