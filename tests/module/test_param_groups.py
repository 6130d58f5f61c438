# SPDX-License-Identifier: MIT
"""lpsgd_ext.step_param_groups: the same step as by the lists, or none at all."""

import copy
import gc
import math

import pytest
import torch
from torch.nn import Parameter

import lpsgd
import lpsgd_ext
from helpers import CLASSES, DTYPES, same_bits, set_grads
from references import references_kept

BYTE = torch.float8_e5m2
SIZES = [(7,), (), (3, 5), (0,), (1000,), (1,)]


def optimizer_of(cls, count=2, dtype=torch.float32, **keywords):
    """With `count` groups of different numbers, a step behind it, and gradients for the next."""
    generator = torch.Generator().manual_seed(0)
    groups = [
        {
            "params": [
                Parameter(torch.randn(size, generator=generator).to(dtype)) for size in SIZES
            ],
            "lr": 0.1 / (i + 1),
            "p": (3.0, 2.0, math.inf)[i % 3],
            "weight_decay": 0.1 * i,
        }
        for i in range(count)
    ]
    optimizer = cls(groups, **keywords)
    for seed in range(2):
        set_grads(params_of(optimizer), seed)
        if seed == 0:
            optimizer.step()
    return optimizer


def params_of(optimizer):
    return [param for group in optimizer.param_groups for param in group["params"]]


def step(optimizer, observed=False):
    state = optimizer.state if isinstance(optimizer, lpsgd.LPSGDM) else None
    return lpsgd_ext.step_param_groups(optimizer.param_groups, state, observed)


def step_by_lists(optimizer):
    first = 0
    for group in optimizer.param_groups:
        streams = [first + i for i, p in enumerate(group["params"]) if p.grad is not None]
        first += len(group["params"])
        params = [param for param in group["params"] if param.grad is not None]
        lists = [params, [param.grad for param in params]]
        names = ["lr", "p", "weight_decay", "eps", "pivot", "maximize"]
        if isinstance(optimizer, lpsgd.LPSGDM):
            lists.append([optimizer.state[param]["momentum_buffer"] for param in params])
            names += ["momentum", "momentum_dtype", "momentum_exponent"]
        values = {name: group[name] for name in names}
        in_bytes = values.get("momentum_dtype") in ("float8_e5m2", torch.float8_e5m2)
        if group["stochastic_rounding"] or in_bytes:
            values |= {"seed": group["seed"], "step": group["rounding_step"], "streams": streams}
            group["rounding_step"] += bool(params)
        if in_bytes:
            values["stochastic_rounding"] = group["stochastic_rounding"]
        function = lpsgd_ext.lpsgdm_ if isinstance(optimizer, lpsgd.LPSGDM) else lpsgd_ext.lpsgd_
        function(*lists, **values)


def contents(optimizer):
    params = params_of(optimizer)
    buffers = [optimizer.state[p]["momentum_buffer"] for p in params if optimizer.state.get(p)]
    return [param.detach() for param in params] + buffers


def versions(optimizer):
    return [tensor._version for tensor in contents(optimizer)]


def assert_not_stepped(optimizer, **keywords):
    before, old = copy.deepcopy(contents(optimizer)), versions(optimizer)
    values = [value for group in optimizer.param_groups for value in group.values()]
    objects = [*params_of(optimizer), *(v for v in values if gc.is_tracked(v))]
    with references_kept(objects):
        for _ in range(50):
            assert step(optimizer, **keywords) is False
    assert same_bits(contents(optimizer), before)
    assert versions(optimizer) == old


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_step_is_that_of_the_lists(cls, dtype, count):
    optimizer, other = (optimizer_of(cls, count, dtype) for _ in range(2))
    before = versions(optimizer)
    for _ in range(2):
        assert step(optimizer) is True
        step_by_lists(other)
    assert same_bits(contents(optimizer), contents(other))
    assert versions(optimizer) == versions(other)
    assert all(new > old for new, old in zip(versions(optimizer), before, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_momentum_is_a_groups_own(dtype):
    optimizer, other = (
        optimizer_of(lpsgd.LPSGDM, 2, dtype, momentum_dtype=torch.float32) for _ in range(2)
    )
    for one in (optimizer, other):
        params = [Parameter(torch.ones(9, dtype=dtype))]
        one.add_param_group({"params": params, "momentum_dtype": None})
        set_grads(params)
        one.state[params[0]]["momentum_buffer"] = torch.zeros(9, dtype=dtype)
    assert step(optimizer) is True
    step_by_lists(other)
    assert same_bits(contents(optimizer), contents(other))


ROUNDINGS = [
    (lpsgd.LPSGD, torch.bfloat16, {"stochastic_rounding": True}),
    (lpsgd.LPSGDM, torch.bfloat16, {"stochastic_rounding": True}),
    (lpsgd.LPSGDM, torch.float32, {"momentum_dtype": torch.bfloat16}),
    (lpsgd.LPSGDM, torch.float32, {"momentum_dtype": torch.bfloat16, "stochastic_rounding": True}),
    (lpsgd.LPSGDM, torch.float32, {"momentum_dtype": BYTE, "momentum_exponent": 9}),
    (lpsgd.LPSGDM, torch.bfloat16, {"momentum_dtype": BYTE}),
    (lpsgd.LPSGDM, torch.bfloat16, {"momentum_dtype": BYTE, "stochastic_rounding": True}),
    (lpsgd.LPSGDM, torch.float16, {"momentum_dtype": BYTE}),
    (lpsgd.LPSGDM, torch.float64, {"momentum_dtype": BYTE}),
]


def clock(optimizer):
    return [group.get("rounding_step") for group in optimizer.param_groups]


@pytest.mark.parametrize("cls, dtype, values", ROUNDINGS, ids=str)
@pytest.mark.parametrize("missing", [[], [1, 7], [0, 1, 2, 3, 4, 5], [6, 8, 10, 11, 7, 9, 15]])
def test_a_step_that_is_rounded_is_that_of_the_lists(cls, dtype, values, missing):
    """Its random bits go by the numbers of the parameters, and each group's steps are counted."""
    optimizer, other = (optimizer_of(cls, 3, dtype, seed=-9, **values) for _ in range(2))
    for one in (optimizer, other):
        for i in missing:
            params_of(one)[i].grad = None
    before = clock(optimizer)
    for _ in range(2):
        assert step(optimizer) is True
        step_by_lists(other)
    assert same_bits(contents(optimizer), contents(other))
    assert clock(optimizer) == clock(other)
    at_random = "stochastic_rounding" in values or values["momentum_dtype"] is BYTE
    idle = missing[:6] == [0, 1, 2, 3, 4, 5]
    assert (clock(optimizer) != before) == at_random
    assert before == [1 if at_random else None] * 3
    assert not idle or clock(optimizer)[0] == before[0]


def test_only_groups_that_are_rounded_are_counted():
    optimizer, other = (optimizer_of(lpsgd.LPSGDM, 3, torch.bfloat16) for _ in range(2))
    for one in (optimizer, other):
        one.param_groups[1].update(
            stochastic_rounding=True, rounding_step=2**63 - 2, seed=2**70 + 1
        )
        one.param_groups[2].update(momentum_dtype=BYTE, momentum_exponent=-2, rounding_step=-3)
        for param in one.param_groups[2]["params"]:
            buffer = one.state[param]["momentum_buffer"]
            one.state[param]["momentum_buffer"] = buffer.to(BYTE)
    assert step(optimizer) is True
    step_by_lists(other)
    assert same_bits(contents(optimizer), contents(other))
    assert clock(optimizer) == clock(other) == [None, 2**63 - 1, -2]
    assert_not_stepped(optimizer)  # no C integer has the next number


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, BYTE])
def test_momentum_dtype_may_be_written_as_a_dtype_or_any_string_that_names_it(dtype):
    name = "".join(list(str(dtype).removeprefix("torch.")))  # another object than C's
    made = []
    for written in (dtype, name):
        optimizer = optimizer_of(lpsgd.LPSGDM, momentum_dtype=dtype)
        for group in optimizer.param_groups:
            group["momentum_dtype"] = written
        assert step(optimizer) is True
        made.append(contents(optimizer))
    assert same_bits(*made)


@pytest.mark.parametrize("count", [1, 3])
def test_steps_that_may_be_idle_are_left(count):
    """With lr = 0 in each group it takes a look at the gradients to tell whether they count."""
    optimizer = optimizer_of(lpsgd.LPSGDM, count, momentum_dtype=BYTE)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    assert_not_stepped(optimizer)
    optimizer.param_groups[-1]["lr"] = 1e-300
    assert step(optimizer) is True
    assert clock(optimizer) == [2] * count


def test_a_refused_step_is_not_counted():
    optimizer = optimizer_of(lpsgd.LPSGDM, 2, momentum_dtype=BYTE)
    optimizer.state[params_of(optimizer)[-1]]["momentum_buffer"] = torch.zeros(1)
    assert_not_stepped(optimizer)
    assert clock(optimizer) == [1, 1]


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("missing", [[0], [3, 4], [11], range(12), [0, 2, 4, 6, 8, 10]])
def test_parameters_without_a_gradient_are_left_out(cls, missing):
    optimizer, other = (optimizer_of(cls) for _ in range(2))
    for one in (optimizer, other):
        for i in missing:
            params_of(one)[i].grad = None
    assert step(optimizer) is True
    step_by_lists(other)
    assert same_bits(contents(optimizer), contents(other))


def test_the_order_of_the_states_does_not_matter():
    optimizer, other = (optimizer_of(lpsgd.LPSGDM) for _ in range(2))
    for i in (0, 5, 3):  # to the end
        param = params_of(optimizer)[i]
        optimizer.state[param] = optimizer.state.pop(param)
    assert step(optimizer) is True
    step_by_lists(other)
    assert same_bits(contents(optimizer), contents(other))


def tensor_lr(optimizer):
    optimizer.param_groups[1]["lr"] = torch.tensor(0.1)


def numpy_p(optimizer):
    optimizer.param_groups[1]["p"] = torch.ones(1).numpy()[0]


def missing_eps(optimizer):
    del optimizer.param_groups[1]["eps"]


def huge_lr(optimizer):
    optimizer.param_groups[1]["lr"] = 10**400


def negative_lr(optimizer):
    optimizer.param_groups[1]["lr"] = -0.1


def another_value(name, value):
    def change(optimizer):
        optimizer.param_groups[1][name] = value

    change.__name__ = f"{name}={value}"
    return change


def subclass(optimizer):
    class Subclass(Parameter):
        pass

    param = Subclass(torch.ones(3))
    param.grad = torch.ones(3)
    optimizer.param_groups[1]["params"][-1] = param


def sparse_gradient(optimizer):
    params_of(optimizer)[-2].grad = torch.ones(1000).to_sparse()


def strided_parameter(optimizer):
    param = params_of(optimizer)[-2]
    param.data = torch.ones(2000)[::2]


def shared_memory(optimizer):
    params = params_of(optimizer)
    params[6].data = params[0].data


def params_in_a_tuple(optimizer):
    optimizer.param_groups[1]["params"] = tuple(optimizer.param_groups[1]["params"])


def no_params(optimizer):
    del optimizer.param_groups[1]["params"]


CHANGES = [
    *(tensor_lr, numpy_p, missing_eps, huge_lr, negative_lr, subclass, sparse_gradient),
    *(strided_parameter, shared_memory, params_in_a_tuple, no_params),
    *(another_value(name, True) for name in ("capturable", "differentiable", "foreach")),
    *(another_value(name, True) for name in ("stochastic_rounding", "maximize_")),
    *(another_value(name, False) for name in ("fused", "foreach")),
    *(another_value(name, None) for name in ("maximize", "lr", "differentiable")),
]


def without(name):
    def change(optimizer):
        del optimizer.param_groups[1][name]

    change.__name__ = f"no {name}"
    return change


ROUNDING_CHANGES = [
    *(without(name) for name in ("rounding_step", "seed", "momentum_exponent")),
    *(another_value("momentum_dtype", value) for value in ("float16", "", 8, torch.float16)),
    *(another_value("momentum_dtype", value) for value in (None, "float32", torch.bfloat16)),
    *(another_value("momentum_exponent", value) for value in (127, -127, 2**32, 2**70, 1.0, True)),
    *(another_value("rounding_step", value) for value in (2**63 - 1, 2**64, -(2**64), 1.0, False)),
    *(another_value("seed", value) for value in (1.0, True, None)),
    *(another_value("stochastic_rounding", value) for value in (1, None)),
    *(another_value(name, True) for name in ("capturable", "differentiable")),
]


@pytest.mark.parametrize("change", ROUNDING_CHANGES, ids=lambda change: change.__name__)
def test_what_is_unusual_about_rounding_leaves_every_group(change):
    optimizer = optimizer_of(lpsgd.LPSGDM, momentum_dtype=BYTE)
    change(optimizer)
    before = clock(optimizer)
    assert_not_stepped(optimizer)
    assert clock(optimizer) == before


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_is_unusual_in_the_last_group_leaves_every_group(cls, change):
    optimizer = optimizer_of(cls)
    change(optimizer)
    if change.__name__ == "maximize_=True":  # a key of somebody else's
        assert step(optimizer) is True
    elif change is no_params:
        assert step(optimizer) is False
    else:
        assert_not_stepped(optimizer)


def lost_state(state, param):
    del state[param]


def empty_state(state, param):
    state[param] = {}


def state_of_another_type(state, param):
    state[param] = [state[param]["momentum_buffer"]]


def buffer_of_another_size(state, param):
    state[param] = {"momentum_buffer": torch.zeros(3, 4)}


def buffer_of_no_tensor(state, param):
    state[param] = {"momentum_buffer": 3}


@pytest.mark.parametrize(
    "change",
    [lost_state, empty_state, state_of_another_type, buffer_of_another_size, buffer_of_no_tensor],
)
def test_a_state_that_is_unusual_leaves_every_group(change):
    optimizer = optimizer_of(lpsgd.LPSGDM)
    param = params_of(optimizer)[8]
    change(optimizer.state, param)
    before = [p.detach().clone() for p in params_of(optimizer)]
    assert step(optimizer) is False
    assert same_bits([p.detach() for p in params_of(optimizer)], before)


@pytest.mark.parametrize("cls", CLASSES)
def test_an_observed_step_is_made_with_fused_alone(cls):
    assert_not_stepped(optimizer_of(cls), observed=True)
    assert step(optimizer_of(cls, fused=True), observed=True) is True


@pytest.mark.parametrize("cls", CLASSES)
def test_many_groups_are_one_step(cls):
    optimizer, other = (optimizer_of(cls, count=300) for _ in range(2))
    optimizer.step()  # of more kinds of tensors than one call takes
    step_by_lists(other)
    assert same_bits(contents(optimizer), contents(other))


@pytest.mark.parametrize("arguments", [((), None, False), ([], 3, False), ([], None)])
def test_wrong_arguments_are_type_errors(arguments):
    with pytest.raises(TypeError):
        lpsgd_ext.step_param_groups(*arguments)


@pytest.mark.parametrize("groups", [[3], [None, {}], [{"params": []}, []]])
def test_wrong_groups_are_unusual(groups):
    assert lpsgd_ext.step_param_groups(groups, None, False) is False


# One parameter: lpsgd_ext.step_param.


def step_param(optimizer, param, number, *part, observed=False):
    """The parameter of this number among those of all groups."""
    for group in optimizer.param_groups:
        if any(one is param for one in group["params"]):
            state = optimizer.state if isinstance(optimizer, lpsgd.LPSGDM) else None
            return lpsgd_ext.step_param(param, group, state, observed, number, *part)
    raise AssertionError("it is in no group")


@pytest.mark.parametrize(
    "cls, dtype, keywords", [(cls, dtype, {}) for cls in CLASSES for dtype in DTYPES] + ROUNDINGS
)
def test_one_parameter_after_the_other_is_a_step(cls, dtype, keywords):
    optimizer, other = (optimizer_of(cls, 2, dtype, **keywords) for _ in range(2))
    before = copy.deepcopy([{**group, "params": None} for group in optimizer.param_groups])
    step_by_lists(other)
    numbered = list(enumerate(params_of(optimizer)))
    for number, param in reversed(numbered):  # in whatever order
        assert step_param(optimizer, param, number) is True
    assert same_bits(contents(optimizer), contents(other))
    assert versions(optimizer) == versions(other)
    assert [{**group, "params": None} for group in optimizer.param_groups] == before


@pytest.mark.parametrize(
    "dtype, keywords",
    [(dtype, {}) for dtype in DTYPES] + [(torch.float32, {"momentum_dtype": BYTE})],
)
@pytest.mark.parametrize("taken, momentum_only", [(0, True), (1, True), (2, False), (0, False)])
def test_one_parameter_is_stepped_as_by_the_lists(dtype, keywords, taken, momentum_only):
    optimizer, other = (optimizer_of(lpsgd.LPSGDM, 1, dtype, **keywords) for _ in range(2))
    (group,) = other.param_groups
    names = ("lr", "p", "weight_decay", "eps", "pivot", "momentum", "momentum_dtype")
    values = {name: group[name] for name in names}
    if keywords:
        values |= {"seed": group["seed"], "step": group["rounding_step"] + taken}
    for number, param in enumerate(params_of(optimizer)):
        assert step_param(optimizer, param, number, 3, taken, momentum_only) is True
    lists = [params_of(other), [param.grad for param in params_of(other)]]
    lists.append([other.state[param]["momentum_buffer"] for param in params_of(other)])
    lpsgd_ext.lpsgdm_(
        *lists, **values, accumulate=3, continues=taken > 0, momentum_only=momentum_only
    )
    assert same_bits(contents(optimizer), contents(other))


def test_one_parameter_that_is_unusual_is_not_stepped():
    optimizer = optimizer_of(lpsgd.LPSGDM, 1)
    param = params_of(optimizer)[0]
    (group,) = optimizer.param_groups
    before = copy.deepcopy(contents(optimizer))

    def refuses(param=param, group=group, state=optimizer.state, observed=False, part=(0,)):
        with references_kept([param, group]):
            for _ in range(50):
                assert lpsgd_ext.step_param(param, group, state, observed, *part) is False

    refuses(observed=True)
    refuses(state={})
    refuses(param=torch.nn.UninitializedParameter())
    refuses(param=None)
    refuses(group={**group, "lr": -1.0})
    refuses(group={**group, "lr": torch.tensor(0.1)})
    refuses(group={})
    refuses(part=(0, 0))
    refuses(part=(0, 1, -1))
    for part in ((0, 2), (0, 1, 1), (0, 1, 0, True)):
        refuses(state=None, part=part)  # LPSGD has no momentum to take it
    grad, param.grad = param.grad, None
    refuses()
    param.grad = grad
    assert same_bits(contents(optimizer), before)
    with pytest.raises(TypeError, match="argument 'state' must be dict"):
        lpsgd_ext.step_param(param, group, [], False, 0)
    with pytest.raises(TypeError):
        lpsgd_ext.step_param(param, [], optimizer.state, False, 0)
