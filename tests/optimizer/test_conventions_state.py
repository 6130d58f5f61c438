# SPDX-License-Identifier: MIT
"""state_dict, load_state_dict, copies and hooks, as torch.optim.SGD's users know them."""

import copy
import io
import pickle
from collections import defaultdict

import pytest
import torch
from torch.nn import Parameter
from torch.optim import SGD
from torch.optim._stateless import swap_in_optimizer_params_and_state
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

import lpsgd
from conventions import Configuration, configurations
from helpers import CLASSES, parameters, same_bits, set_grads, steps

ALL = [lambda *a, **k: SGD(*a, **{"momentum": 0.9, **k}), lpsgd.LPSGD, lpsgd.LPSGDM]


def named(params, is_named):
    return [(f"name{i}", param) for i, param in enumerate(params)] if is_named else params


def copies(params):
    return [Parameter(param.detach().clone()) for param in params]


def saved(state):
    """What comes back from a file, read as safely as torch can."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def plain(state_dict):
    """A state_dict in a form that == compares, without the names of parameters."""
    groups = [
        {k: v for k, v in g.items() if k != "param_names"} for g in state_dict["param_groups"]
    ]
    state = {
        key: {k: (v.dtype, v.tolist()) for k, v in value.items()}
        for key, value in state_dict["state"].items()
    }
    return groups, state


# state_dict and load_state_dict


@configurations()
@pytest.mark.parametrize("from_named", [False, True])
@pytest.mark.parametrize("to_named", [False, True])
def test_a_loaded_state_goes_on_with_the_same_bits(make, from_named, to_named):
    params = parameters(dtype=torch.bfloat16)
    optimizer = make(named(params, from_named))
    steps(optimizer, params, range(3))
    others = copies(params)
    resumed = make(named(others, to_named))
    state_dict = saved(optimizer.state_dict())
    before = copy.deepcopy(state_dict)
    resumed.load_state_dict(state_dict)
    assert plain(state_dict) == plain(before) == plain(optimizer.state_dict())
    for seed in range(3, 6):
        steps(optimizer, params, [seed])
        steps(resumed, others, [seed])
        assert same_bits(params, others)
    assert plain(resumed.state_dict()) == plain(optimizer.state_dict())
    names = resumed.state_dict()["param_groups"][0].get("param_names")
    assert names == (["name0", "name1"] if from_named or to_named else None)
    # A parameter that is in two groups has one number.
    resumed.param_groups.extend(resumed.param_groups)
    assert resumed.state_dict()["param_groups"][-1] == resumed.state_dict()["param_groups"][0]


@configurations()
def test_a_state_dict_without_a_newer_key_loads_and_steps(make):
    params = parameters()
    optimizer = make(params)
    steps(optimizer, params, range(2))
    state_dict = optimizer.state_dict()
    newer = set(state_dict["param_groups"][0]) - {"params"}
    for names in [*([name] for name in newer), newer]:
        old = copy.deepcopy(state_dict)
        for name in names:
            del old["param_groups"][0][name]
        resumed = make(params)
        resumed.load_state_dict(old)
        assert set(resumed.param_groups[0]) >= set(make(params).param_groups[0]), names
        steps(resumed, params, [3])


@pytest.mark.parametrize("cls", CLASSES)
def test_a_missing_key_takes_the_value_of_the_constructor(cls):
    optimizer = cls(parameters(), p=3.0, pivot=0.5)
    old = optimizer.state_dict()
    del old["param_groups"][0]["p"], old["param_groups"][0]["pivot"]
    resumed = cls(parameters(), p=5.0, pivot=0.25)
    resumed.load_state_dict(old)
    group = resumed.param_groups[0]
    assert (group["p"], group["pivot"]) == (5.0, 0.25)


@pytest.mark.parametrize("cls", CLASSES)
def test_an_optimizer_pickled_without_a_newer_key_steps(cls):
    params = parameters()
    for key in cls(params).defaults:
        state = copy.deepcopy(cls(params).__getstate__())
        del state["defaults"][key], state["param_groups"][0][key]
        old = cls.__new__(cls)
        old.__setstate__(state)
        assert old.param_groups[0][key] == cls(params).defaults[key]
        steps(old, old.param_groups[0]["params"], [0])


@pytest.mark.parametrize("cls", CLASSES)
def test_keys_that_nobody_knows_survive(cls):
    params = parameters()
    optimizer = cls(params)
    steps(optimizer, params, range(2))
    optimizer.param_groups[0]["note"] = "group"
    optimizer.state[params[0]]["note"] = 7
    optimizer.state["note"] = "optimizer"
    resumed = cls(params)
    resumed.load_state_dict(saved(optimizer.state_dict()))
    steps(resumed, params, [3])
    assert resumed.param_groups[0]["note"] == "group"
    assert resumed.state["note"] == "optimizer"
    assert resumed.state[params[0]]["note"] == 7


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_state_is_cast_to_the_parameters_dtype_and_device(dtype, device):
    params = parameters()
    optimizer = lpsgd.LPSGDM(params)
    steps(optimizer, params, range(2))
    others = [Parameter(torch.zeros_like(p, dtype=dtype, device=device)) for p in params]
    resumed = lpsgd.LPSGDM(others)
    resumed.load_state_dict(optimizer.state_dict())
    for param in others:
        buffer = resumed.state[param]["momentum_buffer"]
        assert (buffer.device.type, buffer.dtype) == (device, dtype)
        param.grad = torch.zeros_like(param)
    resumed.step()


def aliasing(make):
    """What shares memory or objects with what, and what loading leaves as it was."""
    params = parameters()
    optimizer = make(params, lr=torch.tensor(0.1))
    steps(optimizer, params, [0])
    state = optimizer.state[params[0]]
    state["nested"] = {"list": [torch.ones(1)]}
    state.setdefault("momentum_buffer", torch.zeros_like(params[0]))
    if params[1] in optimizer.state:
        del optimizer.state[params[1]]
    state_dict = optimizer.state_dict()
    group, packed = optimizer.param_groups[0], state_dict["param_groups"][0]
    facts = {
        "state_dict: the state": state_dict["state"] is optimizer.state,
        "state_dict: a parameter's": state_dict["state"][0] is state,
        "state_dict: the group": packed is group,
        "state_dict: a tensor lr": packed["lr"] is group["lr"],
    }
    resumed = make(parameters(), lr=0.1)
    former = resumed.param_groups[0]
    former_params = former["params"]
    resumed.load_state_dict(state_dict)
    loaded = resumed.state[former_params[0]]
    buffer = loaded["momentum_buffer"]
    return facts | {
        "load: a parameter's state": loaded is state,
        "load: its buffer": buffer is state["momentum_buffer"],
        "load: a nested dict": loaded["nested"] is state["nested"],
        "load: a nested list": loaded["nested"]["list"] is state["nested"]["list"],
        "load: a nested tensor": loaded["nested"]["list"][0] is state["nested"]["list"][0],
        "load: the group": resumed.param_groups[0] is former,
        "load: the list of parameters": resumed.param_groups[0]["params"] is former_params,
        "load: a tensor lr": resumed.param_groups[0]["lr"] is packed["lr"],
        "load: the parameters without state": list(resumed.state) == former_params[:1],
        "load: the type of the state": type(resumed.state) is defaultdict,
    }


@pytest.mark.parametrize("cls", CLASSES)
def test_state_dicts_alias_what_sgds_alias(cls):
    assert aliasing(cls) == aliasing(ALL[0])


@configurations()
def test_the_state_has_no_empty_dicts_and_no_none(make):
    params = parameters((2,), (3,), (4,))
    optimizer = make(params)
    set_grads(params)
    params[1].grad = None
    for _ in range(2):
        optimizer.step()
        stepped = {params[0], params[2]} if make.cls is lpsgd.LPSGDM else set()
        assert set(optimizer.state) == stepped
        for state in optimizer.state.values():
            assert list(state) == ["momentum_buffer"]
            assert isinstance(state["momentum_buffer"], torch.Tensor)
    assert type(optimizer.state) is defaultdict


# torch.optim.SGD's checkpoints


def load_into_sgd(sgd, state_dict):
    """The way of docs/python.md."""
    for group, own in zip(state_dict["param_groups"], sgd.param_groups, strict=True):
        group.update(lr=own["lr"], weight_decay=own["weight_decay"])
    sgd.load_state_dict(state_dict)


@pytest.mark.parametrize("is_named", [False, True])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("how", [{"foreach": False}, {"fused": True}])
@pytest.mark.parametrize("dampening", [0.0, 0.5, 0.9])
def test_training_goes_from_sgd_to_us_and_back_with_sgds_numbers(
    is_named, momentum, dampening, how
):
    """p = 2 is SGD, with an lr for averages of gradients; the fused SGD rounds in another order."""
    params = parameters()
    whole, others, last = (copies(params) for _ in range(3))
    values = {"lr": 0.1, "momentum": momentum, "dampening": dampening}
    lr = 0.1 * (1.0 - dampening) / (1.0 - momentum) if momentum else 0.1
    uninterrupted = SGD(whole, **values, foreach=False)
    steps(uninterrupted, whole, range(9))

    sgd = SGD(named(params, is_named), **values, **how)
    steps(sgd, params, range(3))
    for other, param in zip(others, params, strict=True):
        other.data.copy_(param.detach())
    ours = (lpsgd.LPSGDM if momentum else lpsgd.LPSGD)(others, lr=lr, p=2.0)
    with pytest.warns(UserWarning, match="the groups keep this optimizer's values"):
        ours.load_state_dict(saved(sgd.state_dict()))
    steps(ours, others, range(3, 6))

    for param, other in zip(last, others, strict=True):
        param.data.copy_(other.detach())
    again = SGD(last, lr=lr)
    load_into_sgd(again, saved(ours.state_dict()))
    steps(again, last, range(6, 9))
    for param, expected in zip(last, whole, strict=True):
        torch.testing.assert_close(param, expected, rtol=1e-6, atol=1e-7)
    names = again.param_groups[0].get("param_names")
    assert names == (["name0", "name1"] if is_named else None)


def test_a_buffer_that_sgd_has_not_made_yet_is_made():
    """Older versions of torch.optim.SGD save None for a parameter that has not been stepped."""
    params = parameters()
    optimizer = lpsgd.LPSGDM(params)
    state_dict = optimizer.state_dict()
    state_dict["state"] = {0: {"momentum_buffer": None}, 1: {"momentum_buffer": None}}
    optimizer.load_state_dict(state_dict)
    steps(optimizer, params, [1])
    fresh = parameters()
    steps(lpsgd.LPSGDM(fresh), fresh, [1])
    assert same_bits(params, fresh)


def test_a_state_dict_has_the_dampening_of_the_momentum_of_now():
    optimizer = lpsgd.LPSGDM(parameters(), momentum=0.9)
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.param_groups[0]["momentum"] = 0.5
    assert optimizer.state_dict()["param_groups"][0]["dampening"] == 0.5


def test_a_state_that_is_not_a_momentum_is_refused_and_nothing_loaded():
    params = parameters()
    adam, ours = torch.optim.AdamW(params), lpsgd.LPSGDM(params)
    steps(adam, params, [0])
    steps(ours, params, [0])
    before = plain(copy.deepcopy(ours.state_dict()))
    with pytest.raises(ValueError, match="exp_avg_sq in the state of parameter 0: it is no"):
        ours.load_state_dict(adam.state_dict())
    assert plain(ours.state_dict()) == before


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("groups", [[], [[0]], [[0, 1, 2]], [[0, 1], [2]]])
def test_a_state_dict_of_other_groups_is_refused_as_sgd_refuses_it(cls, groups):
    def refusal(make):
        params = parameters()
        optimizer = make(params)
        steps(optimizer, params, [0])
        before = plain(copy.deepcopy(optimizer.state_dict()))
        groups_of = [{"params": numbers} for numbers in groups]
        with pytest.raises(ValueError) as info:
            optimizer.load_state_dict({"state": {}, "param_groups": groups_of})
        assert plain(optimizer.state_dict()) == before
        return str(info.value)

    assert refusal(cls) == refusal(ALL[0])


@pytest.mark.xfail(raises=RuntimeError, strict=True, reason="SGD's keys are not in our groups")
def test_other_parameters_and_state_can_be_swapped_in_for_a_step():
    params, others = parameters(), parameters()
    optimizer = lpsgd.LPSGDM(params)
    steps(optimizer, params, range(2))
    before, state_dict = copies(params), copy.deepcopy(optimizer.state_dict())
    given = {"first": others[0], "second": others[1]}
    with swap_in_optimizer_params_and_state(optimizer, given, state_dict):
        steps(optimizer, others, [3])
    assert same_bits(params, before)
    expected = parameters()
    alone = lpsgd.LPSGDM(expected)
    alone.load_state_dict(optimizer.state_dict())
    steps(alone, expected, [3])
    assert same_bits(others, expected)


# Copies


@configurations()
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))]
)
def test_a_copy_has_every_public_attribute_and_its_own_life(make, copied):
    params = parameters()
    optimizer = make(params)
    steps(optimizer, params, range(2))
    other = copied(optimizer)
    public = {name for name in vars(optimizer) if not name.startswith("_")}
    assert {name for name in vars(other) if not name.startswith("_")} == public
    assert plain(other.state_dict()) == plain(optimizer.state_dict())
    others = other.param_groups[0]["params"]
    expected = copies(params)
    steps(other, others, [2])
    assert same_bits(params, expected)
    steps(optimizer, params, [2])
    assert same_bits(params, others)
    assert plain(other.state_dict()) == plain(optimizer.state_dict())


# Hooks


@configurations()
def test_step_hooks_run_in_torchs_order_and_can_be_removed(make):
    params = parameters()
    optimizer = make(params)
    set_grads(params)
    ran = []

    def hook(name):
        def run(optimizer_, args, kwargs):
            assert optimizer_ is optimizer
            ran.append(name)

        return run

    handles = [
        register_optimizer_step_pre_hook(hook("global pre")),
        register_optimizer_step_post_hook(hook("global post")),
        optimizer.register_step_pre_hook(hook("pre 1")),
        optimizer.register_step_pre_hook(hook("pre 2")),
        optimizer.register_step_post_hook(hook("post 1")),
        optimizer.register_step_post_hook(hook("post 2")),
    ]
    order = ["global pre", "pre 1", "pre 2", "closure", "post 1", "post 2", "global post"]
    try:
        optimizer.step(lambda: ran.append("closure"))
        assert ran == order
        optimizer.step(closure=lambda: ran.append("closure"))
        assert ran == order * 2
    finally:
        for handle in handles:
            handle.remove()
    optimizer.step()
    assert ran == order * 2


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize(
    "register", [register_optimizer_step_pre_hook, register_optimizer_step_post_hook]
)
def test_a_hook_of_all_optimizers_runs_alone(cls, register):
    optimizer, ran = cls(parameters()), []
    handle = register(lambda optimizer, args, kwargs: ran.append(optimizer))
    try:
        optimizer.step()
    finally:
        handle.remove()
    assert ran == [optimizer]


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("bases_are_used", [False, True])
def test_hooks_run_once_where_a_class_calls_the_step_of_its_base(cls, bases_are_used):
    class Middle(cls):
        def step(self, closure=None):
            ran.append("middle")
            return super().step(closure)

    class Outer(Middle):
        def step(self, closure=None):
            return super().step(closure) or super().step(closure)

    for base in (cls, Middle) if bases_are_used else ():
        base(parameters())
    optimizer, ran = Outer(parameters()), []
    optimizer.register_step_pre_hook(lambda *_: ran.append("pre"))
    optimizer.register_step_post_hook(lambda *_: ran.append("post"))
    handle = register_optimizer_step_post_hook(lambda *_: ran.append("global post"))
    try:
        with pytest.raises(ZeroDivisionError):
            optimizer.step(lambda: 1 / 0)
        assert ran == ["pre", "middle"]
        ran.clear()
        optimizer.step()
        assert ran == ["pre", "middle", "middle", "post", "global post"]
    finally:
        handle.remove()


@pytest.mark.parametrize("cls", CLASSES)
def test_a_step_pre_hook_can_replace_the_closure(cls):
    optimizer = cls(parameters())
    optimizer.register_step_pre_hook(lambda self, args, kwargs: ((self, lambda: 2.0), {}))
    assert optimizer.step(lambda: 1.0) == 2.0
    optimizer.register_step_pre_hook(lambda self, args, kwargs: 3)
    with pytest.raises(RuntimeError, match="must return None or a tuple of"):
        optimizer.step()


@pytest.mark.parametrize("make", ALL)
def test_state_dict_hooks_run_in_torchs_order(make):
    optimizer = make(parameters())
    ran = []

    def pre(name):
        def run(optimizer_):
            assert optimizer_ is optimizer
            ran.append(name)
            optimizer_.state["pre"] = name

        return run

    def post(name):
        def run(optimizer_, state_dict):
            assert optimizer_ is optimizer and state_dict["state"]["pre"] == "pre 2"
            ran.append(name)
            return {**state_dict, "post": name}

        return run

    optimizer.register_state_dict_pre_hook(pre("pre 1"))
    optimizer.register_state_dict_pre_hook(pre("pre 2"))
    optimizer.register_state_dict_pre_hook(pre("pre 0"), prepend=True)
    optimizer.register_state_dict_post_hook(post("post 1"))
    optimizer.register_state_dict_post_hook(post("post 2"))
    handle = optimizer.register_state_dict_post_hook(post("post 0"), prepend=True)
    assert optimizer.state_dict()["post"] == "post 2"
    assert ran == ["pre 0", "pre 1", "pre 2", "post 0", "post 1", "post 2"]
    handle.remove()
    optimizer.state_dict()
    assert ran[6:] == ["pre 0", "pre 1", "pre 2", "post 1", "post 2"]


@pytest.mark.parametrize("make", ALL)
def test_a_state_dict_post_hook_may_return_something_else(make):
    optimizer = make(parameters())
    optimizer.register_state_dict_post_hook(lambda _, state_dict: {"mine": state_dict})
    assert list(optimizer.state_dict()) == ["mine"]


@pytest.mark.parametrize("make", ALL)
def test_load_state_dict_hooks_run_in_torchs_order(make):
    params = parameters()
    optimizer = make(params)
    steps(optimizer, params, [0])
    ran = []

    def pre(lr):
        def run(optimizer_, state_dict):
            assert optimizer_ is optimizer
            ran.append(f"pre {lr}")
            state_dict = copy.deepcopy(state_dict)
            state_dict["param_groups"][0]["lr"] = lr
            return state_dict

        return run

    def post(name):
        def run(optimizer_):
            assert optimizer_ is optimizer and optimizer.param_groups[0]["lr"] == 0.3
            ran.append(name)

        return run

    optimizer.register_load_state_dict_pre_hook(pre(0.2))
    handle = optimizer.register_load_state_dict_pre_hook(pre(0.3))
    optimizer.register_load_state_dict_pre_hook(pre(0.1), prepend=True)
    optimizer.register_load_state_dict_post_hook(post("post 1"))
    optimizer.register_load_state_dict_post_hook(post("post 0"), prepend=True)
    state_dict = optimizer.state_dict()
    before = copy.deepcopy(state_dict)
    optimizer.load_state_dict(state_dict)
    assert ran == ["pre 0.1", "pre 0.2", "pre 0.3", "post 0", "post 1"]
    assert plain(state_dict) == plain(before)
    assert len(optimizer._optimizer_load_state_dict_pre_hooks) == 3
    handle.remove()
    with pytest.raises(AssertionError):
        optimizer.load_state_dict(state_dict)


def test_a_load_state_dict_pre_hook_can_bring_the_state_that_is_loaded():
    params = parameters(dtype=torch.bfloat16)
    optimizer = Configuration(lpsgd.LPSGDM, {"momentum_dtype": torch.float32})(params)
    steps(optimizer, params, [0])
    theirs = optimizer.state_dict()
    resumed = lpsgd.LPSGDM(copies(params), momentum_dtype=torch.float32)
    resumed.register_load_state_dict_pre_hook(lambda _, state_dict: state_dict["mine"])
    resumed.load_state_dict({"mine": theirs})
    assert plain(resumed.state_dict()) == plain(theirs)
