# SPDX-License-Identifier: MIT
"""torch.compile: one custom op per group, the eager bits, no recompilation when lr or p change."""

import copy

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import lpsgd
from helpers import CLASSES, bits, parameters, same_bits, set_grads, steps

BACKENDS = ["eager", "aot_eager", "inductor"]


# Inductor of PyTorch 2.13 itself warns.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")


@pytest.fixture(autouse=True)
def fresh_dynamo():
    """No graphs of earlier tests; backward() may be traced."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        yield
    torch._dynamo.reset()


def model_and_copy():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))
    return model, copy.deepcopy(model)


def optimizer_of(cls, model, **how):
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 0.02}]
    return cls(groups, lr=0.1, p=6.0, weight_decay=0.1, **how)


def same(model, other):
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    return all(torch.equal(bits(a), bits(b)) for a, b in pairs)


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("how", [{}, {"foreach": False}, {"stochastic_rounding": True}])
def test_a_compiled_step_has_the_eager_bits_and_is_compiled_once(cls, backend, how):
    dtype = torch.bfloat16 if "stochastic_rounding" in how else torch.float32
    model, other = (m.to(dtype) for m in model_and_copy())
    optimizer, eager = optimizer_of(cls, model, **how), optimizer_of(cls, other, **how)
    counter = CompileCounterWithBackend(backend)
    step = torch.compile(optimizer.step, backend=counter, fullgraph=True)
    for i in range(6):
        for a, b in zip(model.parameters(), other.parameters(), strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        versions = [param._version for param in model.parameters()]
        step()
        eager.step()
        assert same(model, other), i
        assert all(p._version > v for p, v in zip(model.parameters(), versions, strict=True))
        for group in (*optimizer.param_groups, *eager.param_groups):
            group["lr"] *= 0.9
            group["p"] -= 0.5
    # LPSGDM once more than LPSGD: without and with state.
    assert counter.frame_count == (2 if cls is lpsgd.LPSGDM else 1)
    if cls is lpsgd.LPSGDM:
        for a, b in zip(model.parameters(), other.parameters(), strict=True):
            buffer = optimizer.state[a]["momentum_buffer"]
            assert torch.equal(bits(buffer), bits(eager.state[b]["momentum_buffer"]))


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_training_step_has_the_eager_bits(cls, backend):
    model, other = model_and_copy()
    optimizer, eager = optimizer_of(cls, model), optimizer_of(cls, other)
    counter = CompileCounterWithBackend(backend)

    def train(model, optimizer, x):
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        return loss.detach()

    compiled = torch.compile(train, backend=counter, fullgraph=True)
    for i in range(4):
        x = torch.randn(16, 4)
        loss, expected = compiled(model, optimizer, x), train(other, eager, x)
        assert torch.equal(loss, expected) and same(model, other), i
        for one in (optimizer, eager):
            one.zero_grad()
            for group in one.param_groups:
                group["lr"] *= 0.9
    assert counter.frame_count <= 2


@pytest.mark.parametrize("cls", CLASSES)
def test_a_parameter_without_gradient_is_left_alone(cls):
    model, _ = model_and_copy()
    optimizer = optimizer_of(cls, model)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    model[0].weight.grad = None
    before = model[0].weight.detach().clone()
    torch.compile(optimizer.step, backend="aot_eager", fullgraph=True)()
    assert torch.equal(model[0].weight, before) and model[0].weight not in optimizer.state


@pytest.mark.parametrize("left", [{}, {"z": torch.ones(4)}, {"momentum_buffer": None}])
def test_a_compiled_step_makes_the_momentum_buffer_that_a_state_lacks(left):
    params, others = parameters(), parameters()
    optimizer = lpsgd.LPSGDM(params)
    optimizer.state[params[1]].update(left)
    set_grads(params)
    torch.compile(optimizer.step, backend="aot_eager", fullgraph=True)()
    steps(lpsgd.LPSGDM(others), others, [1])
    assert same_bits(params, others)


@pytest.mark.parametrize("cls", CLASSES)
def test_a_compiled_step_looks_at_found_inf_when_it_runs(cls):
    model, other = model_and_copy()
    optimizer = optimizer_of(cls, model, fused=True)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    step = torch.compile(optimizer.step, backend="aot_eager", fullgraph=True)
    optimizer.found_inf = torch.ones(())
    step()
    assert same(model, other)
    optimizer.found_inf = torch.zeros(())
    step()
    assert not same(model, other)


@pytest.mark.parametrize("cls", CLASSES)
def test_two_optimizers_can_be_compiled(cls):
    pairs = [model_and_copy() for _ in range(2)]
    optimizers = [optimizer_of(cls, model) for model, _ in pairs]
    eager = [optimizer_of(cls, other, maximize=i > 0) for i, (_, other) in enumerate(pairs)]
    for group in optimizers[1].param_groups:
        group["maximize"] = True
    for (model, other), optimizer, one in zip(pairs, optimizers, eager, strict=True):
        for param in (*model.parameters(), *other.parameters()):
            param.grad = torch.ones_like(param)
        torch.compile(optimizer.step, backend="eager", fullgraph=True)()
        one.step()
        assert same(model, other)


@pytest.mark.parametrize(
    "cls, capturable", [*((cls, False) for cls in CLASSES), (lpsgd.LPSGDM, True)]
)
def test_inductor_keeps_a_step_out_of_its_cuda_graphs_unless_it_is_capturable(
    cls, capturable, monkeypatch
):
    """Inductor asks this function where it does not cut a graph in parts, which goes by the same
    tags."""
    from torch._inductor import compile_fx  # not before it is needed

    name = "get_first_incompatible_cudagraph_node"
    found = []

    def ask(graph):
        found.append(original(graph))
        return found[-1]

    original = getattr(compile_fx, name)
    monkeypatch.setattr(compile_fx, name, ask)
    param = torch.nn.Parameter(torch.ones(4))
    param.grad = torch.ones(4)
    optimizer = cls([param], lr=0.1, capturable=capturable, fused=True)
    if capturable:
        optimizer.step()  # makes the state
    options = {"triton.cudagraphs": True, "graph_partition": False, "fx_graph_cache": False}
    torch.compile(optimizer.step, fullgraph=True, options=options)()
    first = "new_buffer" if cls is lpsgd.LPSGDM else "step_"
    targets = [node and str(node.target) for node in found]
    assert targets == [None if capturable else f"lpsgd.{first}.default"]


@pytest.mark.parametrize("cls", CLASSES)
def test_inductor_steps_the_parameters_themselves(cls):
    """Not copies, whose way back to parameters off an aligned address it loses with CUDA graphs."""
    param = torch.nn.Parameter(torch.ones(40)[1:21])
    param.grad = torch.ones(20)
    optimizer = cls([param], lr=0.1, p=2.0, **({"momentum": 0.0} if cls is lpsgd.LPSGDM else {}))
    step = torch.compile(optimizer.step, fullgraph=True, mode="reduce-overhead")
    for _ in range(3):
        step()
    torch.testing.assert_close(param.detach(), torch.full((20,), 0.7))


def test_the_tag_is_on_every_operation_but_that_of_a_capturable_step():
    tagged = {
        name: torch.Tag.cudagraph_unsafe in getattr(torch.ops.lpsgd, name).default.tags
        for name in ("step_", "new_buffer", "capturable_step_")
    }
    assert tagged == {"step_": True, "new_buffer": True, "capturable_step_": False}


@pytest.mark.parametrize("cls", CLASSES)
def test_opcheck_finds_nothing(cls):
    param, grad = torch.randn(5), torch.randn(5)
    optimizer = cls([param])
    buffers = [torch.zeros(5)] if cls is lpsgd.LPSGDM else []
    arguments = ([param], [grad], buffers, [0], optimizer._number, 0, True)
    results = torch.library.opcheck(torch.ops.lpsgd.step_.default, arguments)
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_step_raises_the_eager_error(cls, backend):
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = cls([param])
    param.grad = torch.ones(3)
    step = torch.compile(optimizer.step, backend=backend, fullgraph=True)
    step()
    before = param.detach().clone()
    optimizer.param_groups[0]["p"] = 1.0
    with pytest.raises(ValueError, match=r"Invalid p value: 1\.0"):
        step()
    assert torch.is_grad_enabled()
    assert torch.equal(param, before)
