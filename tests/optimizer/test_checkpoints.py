# SPDX-License-Identifier: MIT
"""Checkpoints that are not quite the optimizer's own, and models that change between two steps."""

import copy
import warnings

import pytest
import torch
from torch import optim
from torch.nn import Parameter

import lpsgd
from conventions import IMPLEMENTATIONS, implementations
from helpers import CLASSES, IN_C, parameters, same_bits, set_grads, steps

classes = pytest.mark.parametrize("cls", CLASSES)


def copies(params):
    return [Parameter(param.detach().clone()) for param in params]


def with_momentum(cls, **more):
    return {"momentum": 0.9, **more} if cls is lpsgd.LPSGDM else more


# States that lack a momentum_buffer


@classes
@implementations
@pytest.mark.parametrize("left", [{}, {"z": torch.ones(4)}, {"momentum_buffer": None}])
@pytest.mark.parametrize("stepped", [0, 2])
def test_a_state_that_was_looked_at_or_is_another_tools_loads_and_steps(cls, how, left, stepped):
    params = parameters((2, 3), (4,))
    optimizer, first = cls(params, **how), params[:1]
    for seed in range(stepped):
        set_grads(first, seed)
        optimizer.step()
    optimizer.state[params[1]].update(left)
    resumed = cls(copies(params), **how)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    others = resumed.param_groups[0]["params"]
    optimizer.state[params[1]].clear()
    for one, group in ((optimizer, params), (resumed, others)):
        steps(one, group, range(2, 5))
    assert same_bits(params, others)
    if "z" in left:
        assert torch.equal(resumed.state[others[1]]["z"], left["z"])
    in_c = IN_C and how in (IMPLEMENTATIONS["default"], IMPLEMENTATIONS["fused"])
    assert resumed._usual_step() == in_c


WITHOUT_BUFFER = [
    *(optim.ASGD, optim.Adadelta, optim.Adafactor, optim.Adagrad, optim.Adam, optim.AdamW),
    *(optim.Adamax, optim.NAdam, optim.RAdam, optim.RMSprop, optim.Rprop),
]
WITH_BUFFER = [optim.Muon, lambda params: optim.RMSprop(params, momentum=0.9)]


@classes
@pytest.mark.parametrize(
    "other, groups",
    [(one, "ours") for one in WITHOUT_BUFFER]
    + [(one, "its own") for one in WITHOUT_BUFFER + WITH_BUFFER],
)
def test_another_optimizers_checkpoint_is_refused_in_true_words(cls, other, groups):
    params = parameters((2, 3), (4, 4))
    foreign, optimizer = other(params), cls(params)
    steps(foreign, params, [0])
    steps(optimizer, params, [0])
    checkpoint = foreign.state_dict()
    if groups == "ours":
        checkpoint["param_groups"] = optimizer.state_dict()["param_groups"]
    before = str(optimizer.state_dict())
    keys = ", ".join(checkpoint["state"][0])
    with pytest.raises(
        ValueError, match=f"^loaded state dict has {keys} in the state of parameter"
    ):
        optimizer.load_state_dict(checkpoint)
    assert str(optimizer.state_dict()) == before


def test_a_class_like_sgd_whose_states_have_no_momentum_buffer_is_refused():
    params = parameters()
    sgd = optim.SGD(params, momentum=0.9)
    sgd.state[params[0]]["velocity"] = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="has velocity in the state of parameter 0"):
        lpsgd.LPSGDM(params).load_state_dict(sgd.state_dict())
    sgd.param_groups[0]["momentum"] = 0.0  # then it has nothing that could be missing
    with pytest.warns(UserWarning, match="the groups keep"):
        lpsgd.LPSGDM(params).load_state_dict(sgd.state_dict())


# torch.optim.SGD's


def loaded_with_remarks(optimizer, checkpoint):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.load_state_dict(checkpoint)
    texts = [str(warning.message) for warning in caught]
    assert len(texts) <= 1
    return texts[0].removeprefix("loading another optimizer's checkpoint: ") if texts else ""


KEPT = (
    "the groups keep this optimizer's values, as the checkpoint has no p, and its lr and "
    "weight_decay mean something else"
)


@classes
def test_groups_keep_their_values_whatever_sgds_are(cls):
    params = parameters((2, 3), (4,))
    old = [{"params": params[:1]}, {"params": params[1:], "lr": 7.0}]
    sgd = optim.SGD(old, lr=0.1, momentum=0.5, weight_decay=0.3, nesterov=True)
    steps(sgd, params, range(2))
    own = [{"params": params[:1], "p": 3.0}, {"params": params[1:], "lr": torch.tensor(0.25)}]
    optimizer = cls(own, lr=0.01, weight_decay=0.1, maximize=True, **with_momentum(cls))
    schedule = lpsgd.CosineAnnealingP(optimizer, total_iters=5)
    set_grads(params)
    optimizer.step()
    schedule.step()
    before = copy.deepcopy(optimizer.param_groups)
    checkpoint = sgd.state_dict()
    given = copy.deepcopy(checkpoint)
    remarks = loaded_with_remarks(optimizer, checkpoint)
    assert str(checkpoint) == str(given)
    for group, expected in zip(optimizer.param_groups, before, strict=True):
        assert group.keys() == expected.keys()
        for name in group.keys() - {"params"}:
            assert group[name] == expected[name], name
    buffers = "dropped" if cls is lpsgd.LPSGD else "taken, times -0.5, as averages of gradients"
    assert remarks == f"{KEPT}; nesterov is dropped; the momentum buffers are {buffers}"
    assert (cls is lpsgd.LPSGD) == (not any(optimizer.state.values()))


@pytest.mark.parametrize("values", [{"momentum": 0.0}, {"momentum": 0.9, "dampening": 1.0}])
def test_buffers_of_sgd_that_hold_no_gradients_are_not_taken(values):
    params = parameters()
    sgd = optim.SGD(params, lr=0.1, **values)
    steps(sgd, params, range(2))
    optimizer = lpsgd.LPSGDM(params)
    remarks = loaded_with_remarks(optimizer, sgd.state_dict())
    dropped = "; the momentum buffers are dropped" if values["momentum"] else ""
    assert remarks == KEPT + dropped
    assert not any(optimizer.state.values())


@pytest.mark.parametrize("momentum_dtype", [None, torch.float32])
def test_low_precision_buffers_of_sgd_are_rounded_once(momentum_dtype):
    params = parameters(dtype=torch.bfloat16)
    sgd = optim.SGD(params, lr=0.1, momentum=0.9)
    steps(sgd, params, range(3))
    optimizer = lpsgd.LPSGDM(params, momentum_dtype=momentum_dtype)
    assert "times 0.1" in loaded_with_remarks(optimizer, sgd.state_dict())
    for param in params:
        exact = sgd.state[param]["momentum_buffer"].float() * (1.0 - 0.9)
        expected = exact.to(momentum_dtype or torch.bfloat16)
        assert torch.equal(optimizer.state[param]["momentum_buffer"], expected)


@classes
def test_where_warnings_are_errors_nothing_is_loaded(cls):
    params = parameters()
    sgd, optimizer = optim.SGD(params, lr=0.1, momentum=0.9), cls(params)
    steps(sgd, params, [0])
    steps(optimizer, params, [0])
    before = str(optimizer.state_dict())
    with pytest.raises(UserWarning, match="loading another optimizer's checkpoint"):
        optimizer.load_state_dict(sgd.state_dict())
    assert str(optimizer.state_dict()) == before
    optimizer.load_state_dict(optimizer.state_dict())  # nothing is left of the other


# The other class's


def test_lpsgdm_goes_on_from_lpsgd_with_its_own_momentum():
    params, others = parameters(), parameters()
    first = lpsgd.LPSGD(params, lr=0.5, p=3.0, weight_decay=0.1)
    steps(first, params, range(2))
    second = lpsgd.LPSGDM(params, momentum=0.8, momentum_dtype=torch.float32)
    remarks = loaded_with_remarks(second, first.state_dict())
    assert remarks == "the groups keep this optimizer's momentum, as LPSGD has none"
    values = {"lr": 0.5, "p": 3.0, "weight_decay": 0.1}
    assert second.param_groups[0].items() >= {**values, "momentum": 0.8}.items()
    steps(lpsgd.LPSGD(others, **values), others, range(2))
    for optimizer, group in (
        (second, params),
        (lpsgd.LPSGDM(others, momentum=0.8, **values), others),
    ):
        steps(optimizer, group, range(2, 4))
    assert same_bits(params, others)
    assert not loaded_with_remarks(lpsgd.LPSGDM(parameters(), momentum=0.0), first.state_dict())


def test_lpsgd_drops_what_it_does_not_use_of_lpsgdm():
    params = parameters()
    first = lpsgd.LPSGDM(params, lr=0.5, p=3.0, momentum_dtype=torch.float32)
    steps(first, params, range(2))
    second = lpsgd.LPSGD(params)
    assert loaded_with_remarks(second, first.state_dict()) == "the momentum buffers are dropped"
    assert second.param_groups[0].items() >= {"lr": 0.5, "p": 3.0}.items()
    assert not any(second.state.values())
    again = lpsgd.LPSGDM(params, momentum=0.8)
    assert "keep this optimizer's momentum" in loaded_with_remarks(again, second.state_dict())
    assert again.param_groups[0]["momentum"] == 0.8


# Models that change between two steps


CHANGES = [
    (torch.float32, torch.float64),
    (torch.float32, torch.float16),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.float16),
]


@pytest.mark.parametrize(
    "old, new, how",
    [(*change, how) for change in CHANGES for how in IMPLEMENTATIONS]
    + [(torch.complex64, torch.complex128, how) for how in IMPLEMENTATIONS if how != "fused"],
)
@pytest.mark.parametrize("momentum_dtype", [None, torch.float32])
def test_after_a_change_of_dtype_the_error_names_the_way_out(old, new, momentum_dtype, how):
    params = parameters(dtype=old)
    optimizer = lpsgd.LPSGDM(params, 0.5, momentum_dtype=momentum_dtype, **IMPLEMENTATIONS[how])
    steps(optimizer, params, range(2))
    for param in params:  # as Module.to does it
        param.data = param.data.to(new)
        param.grad.data = param.grad.data.to(new)
    state = optimizer.state[params[0]]
    wide = momentum_dtype is not None and new.itemsize == 2
    expected = torch.float32 if wide else new
    before = copies(params)
    if state["momentum_buffer"].dtype != expected:
        message = rf"momentum_buffer must be {expected}, but is .*; optimizer\.load_state_dict\("
        with pytest.raises(RuntimeError, match=message):
            optimizer.step()
        assert torch.equal(params[0], before[0])
    saved = state["momentum_buffer"]
    optimizer.load_state_dict(optimizer.state_dict())
    assert torch.equal(optimizer.state[params[0]]["momentum_buffer"], saved.to(expected))
    steps(optimizer, params, [3])
    assert not torch.equal(params[0], before[0])


@implementations
def test_a_buffer_on_another_device_or_of_another_shape_names_the_way_out(how):
    params = parameters((4,), (2, 3))
    optimizer = lpsgd.LPSGDM(params, **how)
    steps(optimizer, params, [0])
    buffer = optimizer.state[params[1]]["momentum_buffer"]
    for wrong, way_out in (
        (torch.zeros(2, 3, device="meta"), r"cpu and meta!; optimizer\.load_state_dict\("),
        (torch.zeros(3, 2), r"has \(3, 2\); optimizer\.state\.pop\(param\)"),
    ):
        optimizer.state[params[1]]["momentum_buffer"] = wrong
        with pytest.raises(RuntimeError, match=way_out):
            optimizer.step()
        optimizer.state[params[1]]["momentum_buffer"] = buffer
    optimizer.state.pop(params[1])
    steps(optimizer, params, [1])


FORMATS = torch.contiguous_format, torch.channels_last


@pytest.mark.parametrize("saved, loaded", [FORMATS, FORMATS[::-1]])
@pytest.mark.parametrize("momentum_dtype", [None, torch.float32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("how", ["a new model", "the same model", "SGD"])
def test_loaded_buffers_take_the_strides_of_their_parameters(
    saved, loaded, momentum_dtype, dtype, how
):
    """So that C goes on with the usual step, and nothing else is different."""

    def model(memory_format):
        torch.manual_seed(0)
        layers = torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Conv2d(4, 2, 2)
        return torch.nn.Sequential(*layers).to(dtype, memory_format=memory_format)

    first = model(saved)
    params = list(first.parameters())
    make = optim.SGD if how == "SGD" else lpsgd.LPSGDM
    more = {"momentum": 0.9} if how == "SGD" else {"momentum_dtype": momentum_dtype}
    optimizer = make(params, **more)
    first(torch.ones(2, 3, 8, 8, dtype=dtype)).square().mean().backward()
    optimizer.step()
    second = first if how == "the same model" else model(loaded)
    others = list(second.to(memory_format=loaded).parameters())
    resumed = optimizer
    if how != "the same model":
        resumed = lpsgd.LPSGDM(others, momentum_dtype=momentum_dtype)
    checkpoint = optimizer.state_dict()
    values = [optimizer.state[param]["momentum_buffer"].clone() for param in params]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if how == "SGD" else "error")
        resumed.load_state_dict(checkpoint)
    for value, param in zip(values, others, strict=True):
        buffer = resumed.state[param]["momentum_buffer"]
        assert buffer.stride() == param.stride()
        if how != "SGD":
            assert torch.equal(buffer, value)
    second(torch.ones(2, 3, 8, 8, dtype=dtype)).square().mean().backward()
    assert resumed._usual_step() == IN_C


def test_loaded_buffers_are_aligned():
    params = parameters((4,))
    optimizer = lpsgd.LPSGDM(params)
    steps(optimizer, params, [0])
    checkpoint = optimizer.state_dict()
    odd = torch.frombuffer(bytearray(32), dtype=torch.float32, count=4, offset=2)
    odd.copy_(checkpoint["state"][0]["momentum_buffer"])
    checkpoint["state"][0]["momentum_buffer"] = odd
    optimizer.load_state_dict(checkpoint)
    assert torch.equal(optimizer.state[params[0]]["momentum_buffer"], odd)
    assert optimizer._usual_step() == IN_C
