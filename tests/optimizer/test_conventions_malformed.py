# SPDX-License-Identifier: MIT
"""A malformed momentum_buffer is refused wherever it stands, before anything is written."""

import pytest
import torch
from torch.nn import Parameter

import lpsgd
from conventions import IMPLEMENTATIONS

SHAPE = (3, 4)
POSITIONS = range(4)  # the first and the last parameter of the first and the second group


class OfParameters(torch.Tensor):
    """The subclass of the parameters that C leaves to PyTorch's operations."""


class Foreign(torch.Tensor):
    """A subclass that knows nothing of the other."""


def zeros(**how):
    return torch.zeros(SHAPE, **how)


def resized(nbytes):
    tensor = zeros()
    tensor.untyped_storage().resize_(nbytes)
    return tensor


def made_in_inference_mode():
    with torch.inference_mode():
        return zeros()


def plain(tensor):
    return tensor.detach().as_subclass(torch.Tensor)


# What takes the place of a buffer. Neither C nor PyTorch's operations can step with these;
MALFORMED = {
    "another shape": lambda: torch.zeros(5),
    "fewer dimensions": lambda: torch.zeros(12),
    "a shape that broadcasts": lambda: torch.zeros(4),
    "a scalar": lambda: torch.zeros(()),
    "float64": lambda: zeros(dtype=torch.float64),
    "bfloat16": lambda: zeros(dtype=torch.bfloat16),
    "complex": lambda: zeros(dtype=torch.complex64),
    "integers": lambda: zeros(dtype=torch.int32),
    "sparse": lambda: zeros().to_sparse(),
    "compressed": lambda: zeros().to_sparse_csr(),
    "meta": lambda: zeros(device="meta"),
    "shrunk storage": lambda: resized(8),
    "a storage that lacks an element": lambda: resized(44),
    "freed storage": lambda: resized(0),
    "expanded": lambda: torch.zeros(1, 4).expand(SHAPE),
    "a foreign subclass": lambda: zeros().as_subclass(Foreign),
    "a number": lambda: 0.5,
    "a list": lambda: [0.5] * 12,
    "an inference tensor": made_in_inference_mode,
}
# only C cannot step with these;
UNUSUAL = {
    "other strides": lambda: torch.zeros(SHAPE[::-1]).t(),
    "gaps": lambda: torch.zeros(3, 8)[:, ::2],
    "negative bit": lambda: torch._neg_view(zeros()),
}
# and these, which take the parameters and the position, are written twice in one step.
SHARED = {
    "its parameter's memory": lambda params, i: params[i].detach(),
    "its gradient's memory": lambda params, i: params[i].grad,
    "another parameter's memory": lambda params, i: params[i - 2].detach(),
    "another gradient's memory": lambda params, i: params[i - 2].grad,
}

# Parameters that C takes, and those that go to PyTorch's operations, in one step.
LISTS = {
    "native": [False] * 4,
    "eager": [True] * 4,
    "native first": [False, True, False, True],
    "eager first": [True, False, True, False],
}


def build(is_eager, how, groups=2):
    params = [
        torch.ones(SHAPE).as_subclass(OfParameters).requires_grad_()
        if eager
        else Parameter(torch.ones(SHAPE))
        for eager in is_eager
    ]
    each = len(params) // groups
    parts = [{"params": params[i : i + each]} for i in range(0, len(params), each)]
    optimizer = lpsgd.LPSGDM(parts, lr=0.1, p=4.0, weight_decay=0.1, **how)
    for param in params:
        param.grad = torch.full(SHAPE, 0.5)
    optimizer.step()
    return params, optimizer


def readable(value):
    """Whether the buffer is one that a step could have changed, and can be read."""
    return (
        type(value) in (torch.Tensor, OfParameters)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and value.untyped_storage().nbytes() >= value.nbytes
    )


def snapshot(params, optimizer):
    """Everything that a refused step must leave as it is."""
    facts = [list(optimizer.state)]
    for param in params:
        state = optimizer.state[param]
        facts += [plain(param).tolist(), param._version, plain(param.grad).tolist(), list(state)]
        facts += [
            (id(value), readable(value) and plain(value).tolist()) for value in state.values()
        ]
    return facts


@pytest.mark.parametrize(
    "mixture, implementation",
    [(m, i) for m in LISTS for i in IMPLEMENTATIONS if i != "fused" or m == "native"],
)
@pytest.mark.parametrize("what", MALFORMED)
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")
def test_it_is_refused_and_nothing_written(what, mixture, implementation):
    for position in POSITIONS:
        params, optimizer = build(LISTS[mixture], IMPLEMENTATIONS[implementation])
        optimizer.state[params[position]]["momentum_buffer"] = MALFORMED[what]()
        before = snapshot(params, optimizer)
        with pytest.raises((TypeError, ValueError, RuntimeError)):
            optimizer.step()
        assert snapshot(params, optimizer) == before, position


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("what", UNUSUAL)
def test_fused_refuses_what_only_c_cannot_step_and_the_others_step_it(what, implementation):
    for position in POSITIONS:
        params, optimizer = build(LISTS["native"], IMPLEMENTATIONS[implementation])
        optimizer.state[params[position]]["momentum_buffer"] = UNUSUAL[what]()
        before = snapshot(params, optimizer)
        if implementation == "fused":
            with pytest.raises((ValueError, RuntimeError), match=r"momentum_buffers\["):
                optimizer.step()
            assert snapshot(params, optimizer) == before, position
        else:
            optimizer.step()
            expected, usual = build(LISTS["native"], IMPLEMENTATIONS[implementation])
            usual.state[expected[position]]["momentum_buffer"] = zeros()
            usual.step()
            for param, other in zip(params, expected, strict=True):
                torch.testing.assert_close(param, other)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "what, groups",
    [(what, n) for what in SHARED for n in (1, 2) if n == 1 or not what.startswith("another")],
)
def test_fused_refuses_memory_that_is_used_twice_and_the_others_step_one_by_one(
    what, groups, implementation
):
    for position in POSITIONS:
        params, optimizer = build(LISTS["native"], IMPLEMENTATIONS[implementation], groups)
        optimizer.state[params[position]]["momentum_buffer"] = SHARED[what](params, position)
        before = snapshot(params, optimizer)
        if implementation == "fused":
            with pytest.raises(ValueError, match="share memory"):
                optimizer.step()
            assert snapshot(params, optimizer) == before, position
        else:
            optimizer.step()
            expected, one_by_one = build(LISTS["native"], {"foreach": False}, groups)
            shared = SHARED[what](expected, position)
            one_by_one.state[expected[position]]["momentum_buffer"] = shared
            one_by_one.step()
            for param, other in zip(params, expected, strict=True):
                torch.testing.assert_close(param, other, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_state_that_is_no_dict_is_refused_and_no_buffer_made(implementation):
    for wrong in (None, 0.5, [1.0], torch.zeros(SHAPE)):
        params, _ = build(LISTS["native"], {})
        optimizer = lpsgd.LPSGDM(params, **IMPLEMENTATIONS[implementation])
        optimizer.state[params[2]] = wrong
        before = [plain(param).tolist() for param in params]
        with pytest.raises(TypeError, match="state must be a dict"):
            optimizer.step()
        assert [plain(param).tolist() for param in params] == before
        assert list(optimizer.state) == [params[2]] and optimizer.state[params[2]] is wrong


@pytest.mark.parametrize("rounds", [False, True])
def test_a_parameter_of_integers_is_refused_and_no_state_made(rounds):
    params = [Parameter(torch.ones(SHAPE)), torch.ones(SHAPE, dtype=torch.int32)]
    optimizer = lpsgd.LPSGDM(params, lr=0.1, foreach=False, stochastic_rounding=rounds)
    for param in params:
        param.grad = torch.ones_like(param)
    with pytest.raises(RuntimeError, match=r"cannot step parameters of torch\.int32"):
        optimizer.step()
    assert not optimizer.state and "rounding_step" not in optimizer.param_groups[0]
    assert all(bool((param == 1).all()) for param in params)


@pytest.mark.parametrize("implementation", ["foreach", "forloop"])
def test_a_number_of_steps_that_is_none_is_refused_before_the_step(implementation):
    params, optimizer = build([False] * 4, {"stochastic_rounding": True})
    for group in optimizer.param_groups:
        group.update(IMPLEMENTATIONS[implementation], rounding_step="one")
    before = snapshot(params, optimizer)
    with pytest.raises(TypeError, match="rounding_step must be an int, not str"):
        optimizer.step()
    assert snapshot(params, optimizer) == before


@pytest.mark.parametrize("beyond", [{"lr": 1e300}, {"eps": 1e300}, {"pivot": 1e-320, "p": 2.0}])
@pytest.mark.parametrize("rounds", [False, True])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_what_float32_cannot_hold_is_infinite(implementation, beyond, rounds):
    param = Parameter(torch.ones(2))
    how = {"lr": 0.1, "weight_decay": 0.1, "stochastic_rounding": rounds, **beyond}
    optimizer = lpsgd.LPSGDM([param], **how, **IMPLEMENTATIONS[implementation])
    param.grad = torch.tensor([1.0, -1.0])
    optimizer.step()
    expected = [0.99, 0.99] if "eps" in beyond else [-torch.inf, torch.inf]
    if "lr" in beyond:  # the decay's -inf less the update's inf, and more
        expected = [-torch.inf, torch.nan]
    torch.testing.assert_close(param.detach(), torch.tensor(expected), equal_nan=True)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_refused_first_step_leaves_states_as_they_were(implementation):
    params, _ = build(LISTS["native"], {})
    optimizer = lpsgd.LPSGDM(params, **IMPLEMENTATIONS[implementation])
    states = [{}, {"momentum_buffer": None}, {"other": 1}]
    for param, state in zip(params, states, strict=False):
        optimizer.state[param] = {**state}
    optimizer.param_groups[0]["lr"] = -1.0
    with pytest.raises(ValueError, match="Invalid learning rate"):
        optimizer.step()
    assert [optimizer.state.get(param) for param in params] == [
        *states,
        *[None] * (len(params) - 3),
    ]


@pytest.mark.parametrize("cls", [lpsgd.LPSGD, lpsgd.LPSGDM])
def test_random_bits_are_refused_in_a_graph_that_would_repeat_them(cls):
    with pytest.raises(RuntimeError, match="`stochastic_rounding` does not support `capturable`"):
        cls([Parameter(torch.ones(1))], stochastic_rounding=True, capturable=True)
