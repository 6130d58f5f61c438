# SPDX-License-Identifier: MIT
"""DTensor parameters: the same gradients give the bits of one process, however they are sharded.

In every rank a twin of plain tensors plays the one process. fused=True demands the C kernels.
"""

import copy
import itertools
import math
import warnings

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from helpers import CLASSES, DTYPES, bits
from lpsgd import LPSGD, LPSGDM, momentum_report, release_gradients, suggest_pivot
from ranks import on_ranks, whole_bits

VALUES = {"lr": 0.1, "weight_decay": 0.1, "fused": True}
MOMENTUM_DTYPES = [None, torch.float8_e5m2]
SHAPES = [(1,), (5,), (2500,), (7, 5), (3, 4, 2), (40, 70)]


def assert_same_bits(sharded, twin, where):
    whole = whole_bits(sharded)
    assert torch.equal(whole, bits(twin)), f"{where}: {whole} instead of {bits(twin)}"


def assert_same_step(optimizer, twin_optimizer, where):
    """The bits of parameters and states are the twin's, and states are sharded as parameters."""
    groups = (optimizer.param_groups[0], twin_optimizer.param_groups[0])
    for i, (param, twin) in enumerate(zip(*(group["params"] for group in groups), strict=True)):
        assert_same_bits(param, twin, (*where, i))
        state, twin_state = optimizer.state[param], twin_optimizer.state[twin]
        assert state.keys() == twin_state.keys()
        for name, value in state.items():
            assert_same_bits(value, twin_state[name], (*where, i, name))
            assert (value.device_mesh, value.placements) == (param.device_mesh, param.placements)


def shardings():
    """All shardings on 4 ranks in a line and in a square."""
    kinds = (Shard(0), Shard(1), Replicate())
    for shape in ((4,), (2, 2)):
        mesh = init_device_mesh("cpu", shape)
        for placements in itertools.product(kinds, repeat=len(shape)):
            yield mesh, placements


def randn(shape, dtype, seed, scale=1.0):
    """The same in every rank."""
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def step_every_sharding(rounding, dtypes):
    stochastic = rounding == "stochastic"
    names = itertools.cycle(DTYPES)
    momentum_dtypes = itertools.cycle(MOMENTUM_DTYPES)
    for (mesh, placements), cls in itertools.product(shardings(), CLASSES):
        for dtype in DTYPES if dtypes == "every dtype" else [next(names)]:
            dtype = torch.bfloat16 if stochastic else dtype
            held = {"momentum_dtype": next(momentum_dtypes)} if cls is LPSGDM else {}
            step_sharding(mesh, placements, cls, dtype, stochastic_rounding=stochastic, **held)


def step_sharding(mesh, placements, cls, dtype, **values):
    shapes = [shape for shape in SHAPES if len(shape) > 1 or Shard(1) not in placements]
    twins = [torch.nn.Parameter(randn(shape, dtype, 0)) for shape in shapes]
    params = [
        torch.nn.Parameter(distribute_tensor(twin.detach(), mesh, placements)) for twin in twins
    ]
    optimizer, twin_optimizer = (cls(x, p=4.0, **values, **VALUES) for x in (params, twins))
    for step in range(2):
        for param, twin in zip(params, twins, strict=True):
            twin.grad = randn(twin.shape, dtype, 1 + step, 0.01)
            param.grad = distribute_tensor(twin.grad, mesh, placements)
        optimizer.step()
        twin_optimizer.step()
    assert_same_step(optimizer, twin_optimizer, (placements, cls.__name__, dtype))
    pivots = suggest_pivot(optimizer), suggest_pivot(twin_optimizer)
    assert pivots[0] == pytest.approx(pivots[1], rel=1e-4)
    if cls is LPSGDM:
        assert momentum_report(optimizer) == momentum_report(twin_optimizer)


@pytest.mark.parametrize(
    "rounding, dtypes",
    [
        ("nearest", "one dtype each"),
        ("stochastic", "bfloat16"),
        pytest.param("nearest", "every dtype", marks=pytest.mark.full),
    ],
)
def test_every_sharding_gives_the_bits_of_one_process(rounding, dtypes):
    on_ranks(4, step_every_sharding, rounding, dtypes)


def step_gradients_of_other_placements():
    ranks = dist.get_world_size()
    mesh = init_device_mesh("cpu", (ranks,))
    for placement in (Shard(0), Shard(1), Replicate()):
        for other in (Shard(0), Shard(1), Replicate(), Partial()):
            for cls in CLASSES:
                twin = torch.nn.Parameter(randn((7, 5), torch.float32, 0))
                twin.grad = randn((7, 5), torch.float32, 1)
                param = torch.nn.Parameter(distribute_tensor(twin.detach(), mesh, [placement]))
                if other == Partial():  # exact, for `ranks` is a power of two
                    grad = DTensor.from_local(twin.grad / ranks, mesh, [other])
                else:
                    grad = distribute_tensor(twin.grad, mesh, [other])
                param.grad = grad
                optimizer, twin_optimizer = (cls([x], p=4.0, **VALUES) for x in (param, twin))
                optimizer.step()
                twin_optimizer.step()
                assert_same_step(optimizer, twin_optimizer, (placement, other, cls.__name__))
                assert param.grad is grad and grad.placements == (other,)


def test_gradient_of_other_placements_is_redistributed():
    on_ranks(2, step_gradients_of_other_placements)


def make_twins(shard, dtype=torch.float32):
    """A model of which 5 rows on 4 ranks are 2, 2, 1 and 0, and its twin."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(7, 8), torch.nn.Tanh(), torch.nn.Linear(8, 5), torch.nn.Tanh()
    ).to(dtype)
    twin = copy.deepcopy(model)
    shard(model)
    return model, twin


def backward(model, twin, x, scale=lambda loss: loss):
    """The gradients of a model, which its twin is given."""
    scale(model(x).float().square().mean()).backward()
    for param, twin_param in zip(model.parameters(), twin.parameters(), strict=True):
        twin_param.grad = param.grad.full_tensor()


def train(shard, what, batch_seed):
    stochastic = {"p": 4.0, "stochastic_rounding": True}
    in_bytes = {"momentum_dtype": torch.float8_e5m2, "seed": 3}
    for cls, variant in (
        (LPSGD, {"p": 4.0}),
        (LPSGDM, {"p": 2.0}),
        (LPSGDM, {"p": math.inf}),
        (LPSGDM, stochastic),
        (LPSGDM, {"p": 4.0, **in_bytes}),
        (LPSGDM, {**stochastic, **in_bytes}),
    ):
        dtype = torch.bfloat16 if "stochastic_rounding" in variant else torch.float32
        model, twin = make_twins(shard, dtype)
        optimizer, twin_optimizer = (
            cls(m.parameters(), **variant, **VALUES) for m in (model, twin)
        )
        for step in range(3):
            backward(model, twin, randn((4, 7), dtype, 10 * step + batch_seed))
            optimizer.step()
            twin_optimizer.step()
            optimizer.zero_grad()
        assert_same_step(optimizer, twin_optimizer, (what, cls.__name__, variant))


def train_fsdp2():
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    policies = {
        "plain": {},
        "mixed precision": {"mp_policy": MixedPrecisionPolicy(torch.bfloat16, torch.float32)},
        "offloaded": {"offload_policy": CPUOffloadPolicy(pin_memory=False)},
    }
    for what, policy in policies.items():

        def shard(model, policy=policy):
            for layer in (model[0], model[2], model):
                fully_shard(layer, mesh=mesh, **policy)

        train(shard, what, batch_seed=dist.get_rank())


@pytest.mark.parametrize("ranks", [2, 4])
def test_fsdp2_gives_the_bits_of_one_process(ranks):
    on_ranks(ranks, train_fsdp2)


def release_with_fsdp2():
    """The reduced gradients, beside the ordinary loop; K micro-batches up to rounding."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def shard(model):
        for layer in (model[0], model[2], model):
            fully_shard(layer, mesh=mesh)

    for accumulate, values in ((1, {}), (1, {"momentum_dtype": torch.float8_e5m2}), (3, {})):
        model, ordinary = (make_twins(shard)[0] for _ in range(2))
        optimizer, other = (LPSGDM(m.parameters(), p=4.0, **values) for m in (model, ordinary))
        release_gradients(optimizer, accumulate)
        for step in range(3):
            for i in range(accumulate):
                x = randn((4, 7), torch.float32, 10 * step + i + 100 * dist.get_rank())
                model(x).square().mean().backward()
                assert all(param.grad is None for param in model.parameters())
                (ordinary(x).square().mean() / accumulate).backward()
            for one in (optimizer, other):
                one.step()
                one.zero_grad()
        for a, b in zip(model.parameters(), ordinary.parameters(), strict=True):
            if accumulate == 1:
                assert torch.equal(whole_bits(a), whole_bits(b))
            torch.testing.assert_close(a.full_tensor(), b.full_tensor())


def test_fsdp2_releases_reduced_gradients():
    on_ranks(2, release_with_fsdp2)


def scale_with_fsdp2():
    rank, last = dist.get_rank(), dist.get_world_size() - 1
    mesh = init_device_mesh("cpu", (last + 1,))
    for cls, fused in itertools.product(CLASSES, (None, True)):
        model, twin = make_twins(lambda model: fully_shard(model, mesh=mesh))
        optimizer, twin_optimizer = (
            cls(m.parameters(), lr=0.1, fused=fused) for m in (model, twin)
        )
        scaler, twin_scaler = (torch.amp.GradScaler("cpu", init_scale=8.0) for _ in range(2))
        twin_scaler.scale(torch.ones(()))
        for step in range(3):
            before = model[0].weight.full_tensor().clone()
            backward(model, twin, randn((4, 7), torch.float32, 10 * step + rank), scaler.scale)
            if step == 1:
                if rank == last:
                    model[0].weight.grad.to_local()[-1, 0] = math.inf
                twin[0].weight.grad[-1, 0] = math.inf
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            twin_scaler.step(twin_optimizer)
            twin_scaler.update()
            assert scaler.get_scale() == twin_scaler.get_scale() == (8.0 if step == 0 else 4.0)
            assert_same_step(optimizer, twin_optimizer, (cls.__name__, fused, step))
            assert torch.equal(model[0].weight.full_tensor(), before) == (step == 1)


def test_step_is_skipped_by_all_ranks_if_one_has_an_infinite_gradient():
    on_ranks(2, scale_with_fsdp2)


def compile_with_fsdp2():
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    warnings.simplefilter("default")  # torch.compile's own
    for cls in CLASSES:
        model, twin = make_twins(lambda model: fully_shard(model, mesh=mesh))
        optimizer, twin_optimizer = (cls(m.parameters(), **VALUES) for m in (model, twin))
        step = torch.compile(optimizer.step, backend="eager")
        for seed in range(3):
            backward(model, twin, randn((4, 7), torch.float32, seed))
            step()
            twin_optimizer.step()
            optimizer.zero_grad()
            assert_same_step(optimizer, twin_optimizer, (cls.__name__, seed))


def test_compiled_step_gives_the_bits_of_one_process():
    on_ranks(2, compile_with_fsdp2)


def parallelize(model, mesh):
    parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})


def train_tensor_parallel():
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    train(lambda model: parallelize(model, mesh), "tensor parallel", batch_seed=0)


def test_tensor_parallel_gives_the_bits_of_one_process():
    on_ranks(4, train_tensor_parallel)


def train_fsdp2_with_tensor_parallel():
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))

    def shard(model):
        parallelize(model, mesh["tp"])
        fully_shard(model, mesh=mesh["dp"])

    train(shard, "FSDP2 and tensor parallel", batch_seed=mesh.get_local_rank("dp"))


def test_fsdp2_with_tensor_parallel_gives_the_bits_of_one_process():
    on_ranks(4, train_fsdp2_with_tensor_parallel)


def backward_through_a_stepped_parameter():
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for cls in CLASSES:
        param = torch.nn.Parameter(distribute_tensor(torch.ones(4), mesh, [Shard(0)]))
        loss = (param * param).sum()
        param.grad = distribute_tensor(torch.ones(4), mesh, [Shard(0)])
        cls([param], **VALUES).step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_stale_backward_raises():
    on_ranks(2, backward_through_a_stepped_parameter)


def step_what_is_refused():
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def ones(placement):
        return DTensor.from_local(torch.ones(4), mesh, [placement])

    whole = torch.ones(ones(Shard(0)).shape)
    for placement, buffer, match in (
        (Partial(), None, "cannot be stepped"),
        (Shard(0), whole, "mixed torch.Tensor and DTensor"),
        (Shard(0), distribute_tensor(whole, mesh, [Replicate()]), "placements"),
        (Shard(0), ones(Replicate()), "shape"),
    ):
        params = [torch.nn.Parameter(ones(each)) for each in (Shard(0), placement)]
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer = LPSGDM(params, **VALUES)
        if buffer is not None:
            optimizer.state[params[1]]["momentum_buffer"] = buffer
        with pytest.raises(RuntimeError, match=match):
            optimizer.step()
        for param in params:
            assert torch.equal(param.to_local(), torch.ones(4))
        assert params[0] not in optimizer.state


def test_what_cannot_be_stepped_shard_by_shard_is_refused():
    on_ranks(2, step_what_is_refused)


def step_what_is_listed_twice(rounding):
    stochastic = rounding == "stochastic"
    dtype = torch.bfloat16 if stochastic else torch.float32
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for cls, shape, placement in itertools.product(
        CLASSES, [(5,), (7, 5)], [Shard(0), Replicate()]
    ):
        twin = torch.nn.Parameter(randn(shape, dtype, 0))
        param = torch.nn.Parameter(distribute_tensor(twin.detach(), mesh, [placement]))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.optim says that it is there twice
            optimizer, twin_optimizer = (
                cls([one, one], lr=0.1, p=2.0, stochastic_rounding=stochastic)
                for one in (param, twin)
            )
        for step in range(2):
            twin.grad = randn(shape, dtype, 1 + step)
            param.grad = distribute_tensor(twin.grad, mesh, [placement])
            optimizer.step()
            twin_optimizer.step()
            assert_same_step(optimizer, twin_optimizer, (cls, shape, placement, step))


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_a_parameter_that_is_listed_twice_is_stepped_as_in_one_process(rounding):
    on_ranks(2, step_what_is_listed_twice, rounding)
