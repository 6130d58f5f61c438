# SPDX-License-Identifier: MIT
"""torch.distributed.checkpoint: what one sharding saves, another and one process go on from."""

import math
import warnings

import pytest
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

from helpers import bits
from lpsgd import LPSGD, LPSGDM, CosineAnnealingP
from ranks import on_ranks, whole_bits

KINDS = {
    "LPSGD": (LPSGD, torch.float32, {}),
    "LPSGDM": (LPSGDM, torch.float32, {}),
    "low precision": (
        LPSGDM,
        torch.bfloat16,
        {"momentum_dtype": torch.float32, "stochastic_rounding": True},
    ),
    "one byte": (
        LPSGDM,
        torch.float32,
        {"momentum_dtype": torch.float8_e5m2, "momentum_exponent": 12, "seed": 3},
    ),
}


def shard(model):
    return fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))


def parallelize(model):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})


def alone(model):
    return model


def make(kind, shard_as, seed=0, **values):
    """A model with optimizer and schedule; a checkpoint replaces what another `seed` and `values`
    make of it."""
    cls, dtype, fixed = KINDS[kind]
    torch.manual_seed(seed)
    layers = torch.nn.Linear(7, 8), torch.nn.Tanh(), torch.nn.Linear(8, 5)
    model = shard_as(torch.nn.Sequential(*layers).to(dtype))
    groups = [{"params": model[0].parameters(), "p": 4.0}, {"params": model[2].parameters()}]
    optimizer = cls(groups, **{"lr": 0.1, "weight_decay": 0.1, **fixed, **values})
    return model, optimizer, CosineAnnealingP(optimizer, total_iters=8)


def train(model, optimizer, schedule, steps):
    """The same gradients in every process, whatever part of them it needs."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for param in model.parameters():
            grad = torch.randn(param.shape, generator=generator).to(param.dtype)
            if isinstance(param, DTensor):
                grad = distribute_tensor(grad, param.device_mesh, param.placements)
            param.grad = grad
        optimizer.step()
        schedule.step()
    optimizer.zero_grad()


def assert_as_one_process(kind, model, optimizer, steps):
    """The bits and values of a process that was not interrupted."""

    twin, twin_optimizer, twin_schedule = make(kind, alone)
    train(twin, twin_optimizer, twin_schedule, range(steps))
    for param, expected in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(whole_bits(param), bits(expected)), kind
        for name, value in twin_optimizer.state[expected].items():
            assert torch.equal(whole_bits(optimizer.state[param][name]), bits(value)), (kind, name)
    for group, expected in zip(optimizer.param_groups, twin_optimizer.param_groups, strict=True):
        for name in expected.keys() - {"params"}:
            assert group[name] == expected[name], (kind, name)


def kinds_and_options(folder):
    for kind in KINDS:
        for flat in (False, True):
            options = StateDictOptions(flatten_optimizer_state_dict=flat)
            yield kind, options, f"{folder}/{kind}, {flat}"


def save_to(path, model, optimizer, options):
    weights, state = get_state_dict(model, optimizer, options=options)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=path)


def load_from(path, model, optimizer, options):
    weights, state = get_state_dict(model, optimizer, options=options)
    dcp.load({"model": weights, "optimizer": state}, checkpoint_id=path)
    set_state_dict(
        model, optimizer, model_state_dict=weights, optim_state_dict=state, options=options
    )


def save(folder):
    for kind, options, path in kinds_and_options(folder):
        model, optimizer, schedule = make(kind, shard)
        train(model, optimizer, schedule, range(3))
        save_to(path, model, optimizer, options)


def load(folder):
    for kind, options, path in kinds_and_options(folder):
        for shard_as in (shard, parallelize, alone):
            model, optimizer, schedule = make(kind, shard_as, seed=1, lr=1.0, p=7.0)
            load_from(path, model, optimizer, options)
            assert_as_one_process(kind, model, optimizer, 3)
            train(model, optimizer, schedule, range(3, 6))
            assert_as_one_process(kind, model, optimizer, 6)


def carry_on(folder, done):
    """Trains for two steps, from a checkpoint to the next."""
    options, done = StateDictOptions(), int(done)
    model, optimizer, schedule = make("one byte", shard, lr=0.1 if done == 0 else 1.0)
    if done:
        load_from(f"{folder}/{done}", model, optimizer, options)
    train(model, optimizer, schedule, range(done, done + 2))
    assert_as_one_process("one byte", model, optimizer, done + 2)
    save_to(f"{folder}/{done + 2}", model, optimizer, options)


def test_bytes_go_on_from_2_ranks_to_4_and_to_1(tmp_path):
    for done, ranks in ((0, 2), (2, 4), (4, 1)):
        on_ranks(ranks, carry_on, tmp_path, done)


def test_checkpoint_of_4_ranks_goes_on_in_2_with_the_same_bits(tmp_path):
    on_ranks(4, save, tmp_path)
    on_ranks(2, load, tmp_path)


def exchange_full_state_dicts(kind):
    states = []
    for shard_as, options in (
        (shard, StateDictOptions(full_state_dict=True, cpu_offload=True)),
        (alone, StateDictOptions()),
    ):
        model, optimizer, schedule = make(kind, shard_as)
        train(model, optimizer, schedule, range(3))
        states.append(get_state_dict(model, optimizer, options=options))
    (weights, state), (_, expected) = states
    if dist.get_rank() == 0:
        assert str(state) == str(expected)  # the same keys, values and tensors

    # From rank 0, which alone has it, to all.
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    model, optimizer, schedule = make(kind, shard, seed=1, lr=1.0, p=7.0)
    set_model_state_dict(model, weights, options=options)
    set_optimizer_state_dict(model, optimizer, state, options=options)
    train(model, optimizer, schedule, range(3, 6))
    assert_as_one_process(kind, model, optimizer, 6)


@pytest.mark.parametrize("kind", ["LPSGDM", "low precision"])
def test_full_state_dict_is_that_of_one_process(kind):
    on_ranks(2, exchange_full_state_dicts, kind)


def gather_bytes():
    model, optimizer, schedule = make("one byte", shard)
    train(model, optimizer, schedule, range(2))
    with pytest.raises(RuntimeError, match="Invalid scalar type"):
        get_optimizer_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True))
    buffer = optimizer.state[model[0].weight]["momentum_buffer"]
    with pytest.raises(RuntimeError, match="Invalid scalar type"):
        buffer.full_tensor()
    train(model, optimizer, schedule, range(2, 4))
    assert_as_one_process("one byte", model, optimizer, 4)


def test_gloo_sends_no_bytes_and_training_goes_on():
    on_ranks(2, gather_bytes)


def go_on_from_sgd():
    for shard_as in (shard, parallelize):
        model, optimizer, schedule = make("LPSGDM", shard_as, fused=True)
        groups = [{"params": layer.parameters()} for layer in (model[0], model[2])]
        sgd = torch.optim.SGD(groups, lr=0.3, momentum=0.9, dampening=0.5, foreach=False)
        train(model, sgd, torch.optim.lr_scheduler.ConstantLR(sgd), range(2))
        state = get_optimizer_state_dict(model, sgd)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            set_optimizer_state_dict(model, optimizer, state)
        remarks = [str(one.message) for one in caught if "another optimizer's" in str(one.message)]
        assert len(remarks) == 1 and "taken, times 0.2" in remarks[0], remarks
        for param in model.parameters():
            expected = sgd.state[param]["momentum_buffer"] * ((1.0 - 0.9) / (1.0 - 0.5))
            buffer = optimizer.state[param]["momentum_buffer"]
            assert torch.equal(buffer.full_tensor(), expected.full_tensor())
        group = optimizer.param_groups[0]
        assert (group["lr"], group["weight_decay"]) == (0.1, 0.1) and group["p"] > 2.0
        train(model, optimizer, schedule, range(2, 4))


def test_lpsgdm_goes_on_from_sgds_distributed_checkpoint():
    on_ranks(2, go_on_from_sgd)


def save_often():
    # For what has no state yet, PyTorch takes a step with lr = 0 and gradients of zeros.
    odd = torch.tensor([-0.0, 0.0, 1e-45, -1e-38, 1.0, math.inf, math.nan, -3.0])
    for kind in KINDS:
        model, _, _ = make(kind, alone)
        with torch.no_grad():
            model[0].bias.copy_(odd)
        before = [bits(param).clone() for param in model.parameters()]
        model = shard(model)
        optimizer = KINDS[kind][0](model.parameters(), lr=0.1, weight_decay=0.5, **KINDS[kind][2])
        CosineAnnealingP(optimizer, total_iters=8, every_step=True)
        for _ in range(3):
            get_optimizer_state_dict(model, optimizer)
        for param, expected in zip(model.parameters(), before, strict=True):
            assert torch.equal(bits(param.full_tensor()), expected)
        (group,) = optimizer.param_groups
        assert (group["lr"], group["p"], group["p_last_epoch"]) == (0.1, 6.0, 0), kind
        assert group.get("rounding_step", 0) == 0, kind


def test_saving_changes_no_parameter_and_moves_no_clock():
    on_ranks(2, save_often)


def warm_up_from_0():
    model, _, _ = make("low precision", shard)
    optimizer = LPSGDM(model.parameters(), lr=0.0, stochastic_rounding=True)
    CosineAnnealingP(optimizer, total_iters=8, every_step=True)
    for param in model.parameters():  # of which only rank 0 has anything but zeros
        param.grad = torch.full_like(param, float(dist.get_rank() == 0))
    optimizer.step()
    (group,) = optimizer.param_groups
    assert (group["p_last_epoch"], group["rounding_step"]) == (1, 1)


def test_ranks_agree_on_what_a_step_with_lr_0_counts():
    on_ranks(2, warm_up_from_0)
