# SPDX-License-Identifier: MIT
"""Constructors and parameter groups, as torch.optim.SGD's users know them."""

import inspect
import itertools
import math

import pytest
import torch
from torch.nn import Parameter
from torch.optim import SGD

import lpsgd
from conventions import OPTIMIZERS, configurations, implementations
from helpers import CLASSES, DTYPES, parameters, same_bits, set_grads, steps
from lpsgd import LPSGD

ERRORS = [
    pytest.param(info.optim_cls, *error, id=f"{info.optim_cls.__name__}-{error[0]}")
    for info in OPTIMIZERS
    for error in info.error_inputs
]


def raised(function, *args, **kwargs):
    """What it raises, warnings included."""
    with pytest.raises(Exception) as info:
        function(*args, **kwargs)
    return type(info.value), str(info.value)


@pytest.mark.parametrize("cls", CLASSES)
def test_arguments_stand_where_sgd_has_them(cls):
    ours, theirs = (inspect.signature(c).parameters for c in (cls, SGD))
    assert list(ours)[:2] == list(theirs)[:2] == ["params", "lr"]
    for name in ("lr", "weight_decay", "maximize", "foreach", "differentiable", "fused"):
        assert ours[name].default == theirs[name].default
        assert ours[name].kind == theirs[name].kind
    assert cls(parameters(), 0.5).param_groups[0]["lr"] == 0.5
    assert cls(lr=0.5, params=parameters()).param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize("cls", CLASSES)
def test_arguments_of_other_optimizers_are_refused_with_what_is_here_instead(cls):
    class Derived(cls):
        def __init__(self, params, **others):
            super().__init__(params, **others)

    hints = {"nesterov": "no Nesterov", "dampening": "dampening=momentum", "betas": "has momentum"}
    if cls is LPSGD:
        hints["momentum"] = "LPSGDM has it"
    for name, hint in hints.items():
        message = (
            rf"{cls.__name__}.__init__\(\) got an unexpected keyword argument '{name}' .*{hint}"
        )
        for one in (cls, Derived):
            with pytest.raises(TypeError, match=message):
                one(parameters(), **{name: 0.9})
    with pytest.raises(TypeError, match=r"got an unexpected keyword argument 'betta'$"):
        cls(parameters(), betta=0.9)
    with pytest.raises(ValueError, match=r"Invalid p value: 0\.9 .*momentum is passed by name"):
        cls(parameters(), 0.1, 0.9)
    with pytest.raises(ValueError, match=r"Invalid p value: 1\.0$"):
        cls(parameters(), 0.1, 1.0)


@pytest.mark.parametrize("cls", CLASSES)
def test_every_way_to_ask_for_the_signature_answers(cls):
    names = list(inspect.signature(cls).parameters)
    specification = inspect.getfullargspec(cls.__init__)
    assert names[:3] == ["params", "lr", "p"] and names[-1] == "seed"
    assert specification.args[1:] + specification.kwonlyargs == names


def test_the_package_shows_its_public_names_alone():
    assert dir(lpsgd) == sorted(lpsgd.__all__)


@pytest.mark.parametrize("cls", CLASSES)
def test_there_is_no_public_name_that_sgd_and_trainers_lack(cls):
    def public(thing):
        return {name for name in dir(thing) if not name.startswith("_")}

    params = parameters()
    ours, theirs = cls(params), SGD(params)
    steps(ours, params, range(2))
    ours.load_state_dict(ours.state_dict())
    by_hand = {"step_parameter", "supports_fused_back_pass"}  # of trainers that step in backward
    assert public(cls) <= public(SGD) | by_hand
    assert public(ours) <= public(theirs) | by_hand


@configurations()
def test_its_text_names_every_value_of_every_group(make):
    first, second = parameters()
    optimizer = make([{"params": first}, {"params": second, "lr": 0.125, "note": "mine"}])
    text = repr(optimizer)
    assert text.startswith(f"{make.cls.__name__} (\nParameter Group 0\n")
    groups = text.split("Parameter Group ")[1:]
    for group, lines in zip(optimizer.param_groups, groups, strict=True):
        shown = {line.strip() for line in lines.splitlines()}
        assert {f"{k}: {v}" for k, v in group.items() if k != "params"} <= shown


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("kind", ["list", "tuple", "generator", "named", "groups", "named groups"])
def test_every_way_to_give_parameters_steps_all_of_them(cls, kind):
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))
    layers = list(model)
    given = {
        "list": lambda: list(model.parameters()),
        "tuple": lambda: tuple(model.parameters()),
        "generator": lambda: model.parameters(),
        "named": lambda: model.named_parameters(),
        "groups": lambda: [{"params": layer.parameters()} for layer in layers],
        "named groups": lambda: [{"params": layer.named_parameters()} for layer in layers],
    }[kind]()
    optimizer = cls(given, lr=0.1)
    params = list(model.parameters())
    set_grads(params)
    before = [param.detach().clone() for param in params]
    optimizer.step()
    for param, old in zip(params, before, strict=True):
        assert not torch.equal(param, old)
    groups = optimizer.param_groups
    names = [name for group in groups for name in group.get("param_names", [])]
    if kind == "named":
        assert names == [name for name, _ in model.named_parameters()]
    else:
        assert names == (["weight", "bias"] * 2 if kind == "named groups" else [])
    for group, packed in zip(groups, optimizer.state_dict()["param_groups"], strict=True):
        assert packed.get("param_names") == group.get("param_names")


@pytest.mark.parametrize("cls", CLASSES)
def test_a_group_keeps_its_own_values_and_keys_that_nobody_knows(cls):
    first, second = parameters()
    optimizer = cls([{"params": first, "lr": 0.5, "note": "mine"}, {"params": [second]}], lr=0.1)
    ours, other = optimizer.param_groups
    assert (ours["lr"], ours["note"], other["lr"], "note" in other) == (0.5, "mine", 0.1, False)
    assert set(ours) - set(other) == {"note"}
    steps(optimizer, (first, second), range(2))
    assert optimizer.state_dict()["param_groups"][0]["note"] == "mine"


def wrong_params():
    """What is no list of parameters; `p` and `q` are two good ones."""
    p, q = parameters((1,), (1,))
    return {
        "a tensor": p,
        "none": [],
        "a number": 3,
        "numbers": [1.0],
        "None": [None],
        "a string": "weight",
        "not a leaf": [p * 2],
        "a set in a group": [{"params": {p}}],
        "a group without params": [{"lr": 0.1}],
        "twice in a group": [p, p],
        "in two groups": [{"params": p}, {"params": p}],
        "one without a name": [("p", p), q],
        "a group without names": [{"params": [("p", p)]}, {"params": [q]}],
        "a group of unique names": [{"params": [p]}, {"params": [("q", q)]}],
        "an empty dict": {},
    }


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("wrong", wrong_params())
def test_wrong_params_are_refused_as_sgd_refuses_them(cls, wrong):
    params = wrong_params()[wrong]
    assert raised(cls, params) == raised(SGD, params)


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("wrong", ["a tensor", "none", "a number", "not a leaf"])
def test_lr_is_checked_before_the_parameters(cls, wrong):
    params = wrong_params()[wrong]
    expected = raised(SGD, params, lr=-1.0)
    assert raised(cls, params, lr=-1.0) == expected
    assert expected[0] is ValueError and "Invalid learning rate: -1.0" in expected[1]


@pytest.mark.parametrize("cls, kwargs, error, text", ERRORS)
def test_a_value_is_refused_as_an_argument_and_in_a_group(cls, kwargs, error, text):
    for construct in (
        lambda: cls(parameters(), **kwargs),
        lambda: cls([{"params": parameters(), **kwargs}]),
        lambda: cls(parameters()).add_param_group({"params": parameters(), **kwargs}),
    ):
        with pytest.raises(error, match=text):
            construct()


# Flags that contradict each other need be found only when a group is made, as in SGD.
NUMBERS = [
    error
    for error in ERRORS
    if {"lr", "p", "momentum", "weight_decay", "eps", "pivot"} & set(error.values[1])
]


@implementations
@pytest.mark.parametrize("cls, kwargs, error, text", NUMBERS)
def test_a_number_put_into_a_group_later_is_refused_by_the_step(cls, kwargs, error, text, how):
    params = parameters()
    optimizer = cls(params, **how)
    set_grads(params)
    optimizer.param_groups[0].update(kwargs)
    with pytest.raises(error, match=text):
        optimizer.step()
    assert same_bits(params, parameters()) and not optimizer.state


WRONG_GROUPS = {
    "no dict": lambda p: [p],
    "no params": lambda p: {},
    "a set": lambda p: {"params": {p}},
    "not a leaf": lambda p: {"params": [p * 2]},
    "a number": lambda p: {"params": [3.0]},
    "names": lambda p: {"params": [("p", p)]},
}


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("wrong", WRONG_GROUPS)
def test_a_wrong_group_is_refused_as_sgd_refuses_it_and_not_added(cls, wrong):
    params, new = parameters(), parameters((2,))[0]
    optimizer, sgd = cls(params), SGD(params)
    expected = raised(sgd.add_param_group, WRONG_GROUPS[wrong](new))
    assert raised(optimizer.add_param_group, WRONG_GROUPS[wrong](new)) == expected
    known = {"params": params[0]}
    assert raised(optimizer.add_param_group, known) == raised(sgd.add_param_group, known)
    assert len(optimizer.param_groups) == 1
    steps(optimizer, params, range(2))


@configurations()
def test_every_value_of_a_group_is_read_at_every_step(make):
    """Each value is changed in turn; the result is that of an optimizer made with it."""
    changes = {
        "lr": [0.25, torch.tensor(0.25)],
        "p": [2.5, math.inf],
        "momentum": [0.25],
        "weight_decay": [0.75],
        "eps": [0.5],
        "pivot": [0.01],
        "maximize": [True],
        "seed": [11],
        "stochastic_rounding": [True],
    }
    for name, values in changes.items():
        if name not in make([Parameter(torch.ones(1))]).param_groups[0]:
            continue
        for value in values:
            params, others = (parameters(dtype=torch.bfloat16) for _ in range(2))
            changed, made = make(params), make(others, **{name: value})
            changed.param_groups[0][name] = value
            steps(changed, params, range(2))
            steps(made, others, range(2))
            assert same_bits(params, others), (name, value)


@implementations
@pytest.mark.parametrize("cls", CLASSES)
def test_a_group_can_be_added_and_removed_between_steps(cls, how):
    def fresh():
        return parameters((3,), (2, 2), seed=5)

    params, alone = fresh(), fresh()
    optimizer = cls(params[:1], lr=0.1, **how)
    first, second = cls(alone[:1], lr=0.1, **how), cls(alone[1:], lr=0.2, p=3.0, **how)
    steps(optimizer, params[:1], [1])
    steps(first, alone[:1], [1])
    optimizer.add_param_group({"params": params[1:], "lr": 0.2, "p": 3.0})
    for seed in (2, 3):
        set_grads(params, seed)
        set_grads(alone, seed)
        for one in (optimizer, first, second):
            one.step()
    assert same_bits(params, alone)
    del optimizer.param_groups[0]
    set_grads(params, 4)
    set_grads(alone, 4)
    optimizer.step()
    second.step()
    assert same_bits(params, alone)


@configurations()
def test_a_tensor_lr_steps_as_its_number_and_may_change_in_place(make):
    for dtype, shape in itertools.product(DTYPES, [(), (1,), (1, 1)]):
        params, others = parameters(), parameters()
        lr = torch.full(shape, 0.3, dtype=dtype)
        tensor, number = make(params, lr=lr), make(others, lr=lr.item())
        for seed in range(3):
            steps(tensor, params, [seed])
            steps(number, others, [seed])
            assert same_bits(params, others), (dtype, shape)
            lr.mul_(0.7)
            number.param_groups[0]["lr"] = lr.item()
        assert tensor.param_groups[0]["lr"] is lr


@pytest.mark.parametrize("cls", CLASSES)
def test_a_tensor_lr_of_a_group_steps_as_its_number(cls):
    params, others = parameters(), parameters()
    tensor = cls([{"params": params[0], "lr": torch.tensor(0.5)}, {"params": params[1]}], lr=0.25)
    number = cls([{"params": others[0], "lr": 0.5}, {"params": others[1]}], lr=0.25)
    steps(tensor, params, range(3))
    steps(number, others, range(3))
    assert same_bits(params, others)


@implementations
@pytest.mark.parametrize("cls", CLASSES)
def test_capturable_is_refused_on_the_cpu_as_adam_refuses_it(cls, how):
    def step(make):
        params = parameters()
        optimizer = make(params, capturable=True, **how)
        set_grads(params)
        try:
            optimizer.step()
        except AssertionError as error:
            assert "must be on supported devices" in str(error)
            assert same_bits(params, parameters())
            return "refused"
        return "stepped"

    assert step(cls) == step(torch.optim.Adam)
