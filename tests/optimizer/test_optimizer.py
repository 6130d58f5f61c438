# SPDX-License-Identifier: MIT
"""The classes, as users of torch.optim would expect them to behave."""

import copy
import io
import math
import pickle

import pytest
import torch
from torch.nn import Parameter

import lpsgd
from helpers import CLASSES, same_bits, set_grads

HOW = [{"fused": True}, {"foreach": True}, {"foreach": False}, {}]


def parameters(count=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [Parameter(torch.randn(4, n + 1, generator=generator)) for n in range(count)]


@pytest.mark.parametrize("cls", CLASSES)
def test_defaults(cls):
    group = cls(parameters()).param_groups[0]
    expected = {"lr": 1e-3, "p": 6.0, "weight_decay": 0.0, "eps": 1e-8, "pivot": 1.0}
    expected |= {"maximize": False, "foreach": None, "fused": None, "seed": 0}
    expected |= {"capturable": False, "differentiable": False, "stochastic_rounding": False}
    if cls is lpsgd.LPSGDM:
        expected |= {"momentum": 0.9, "momentum_dtype": None, "momentum_exponent": 15}
    assert {name: value for name, value in group.items() if name != "params"} == expected


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("how", HOW)
def test_closure_is_evaluated_with_gradients_and_its_loss_returned(cls, how):
    params = parameters(1)
    optimizer = cls(params, lr=0.1, **how)

    def closure():
        optimizer.zero_grad()
        loss = params[0].square().sum()
        loss.backward()
        return loss

    first = optimizer.step(closure)
    assert first.requires_grad and optimizer.step(closure) < first
    assert optimizer.step() is None


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("how", HOW)
def test_groups_have_their_own_values(cls, how):
    params, alone = parameters(), parameters()
    groups = [
        {"params": params[:1], "p": 2.0, "lr": 0.1},
        {"params": params[1:2], "p": math.inf, "weight_decay": 0.5},
        {"params": params[2:], "eps": 1.0, "maximize": True},
    ]
    optimizer = cls(groups, lr=0.01, p=4.0, **how)
    each = [
        cls(alone[:1], lr=0.1, p=2.0, **how),
        cls(alone[1:2], lr=0.01, p=math.inf, weight_decay=0.5, **how),
        cls(alone[2:], lr=0.01, p=4.0, eps=1.0, maximize=True, **how),
    ]
    for step in range(3):
        set_grads(params, step)
        set_grads(alone, step)
        optimizer.step()
        for one in each:
            one.step()
    assert same_bits(params, alone)


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("how", HOW)
def test_group_values_are_read_at_every_step(cls, how):
    params, others = parameters(), parameters()
    changed, fixed = cls(params, lr=0.5, p=6.0, **how), cls(others, lr=0.1, p=3.0, **how)
    changed.param_groups[0].update(lr=0.1, p=3.0)
    set_grads(params)
    set_grads(others)
    changed.step()
    fixed.step()
    assert same_bits(params, others)


@pytest.mark.parametrize("cls", CLASSES)
def test_added_group_is_stepped(cls):
    params = parameters()
    optimizer = cls(params[:1], lr=0.1)
    optimizer.add_param_group({"params": params[1:], "p": 3.0})
    set_grads(params)
    before = [param.detach().clone() for param in params]
    optimizer.step()
    assert not any(torch.equal(a, b) for a, b in zip(params, before, strict=True))


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("how", HOW)
def test_parameters_without_gradient_are_left_alone(cls, how):
    params = parameters()
    optimizer = cls(params, lr=0.1, weight_decay=0.5, **how)
    set_grads(params)
    params[1].grad = None
    before = params[1].detach().clone()
    optimizer.step()
    assert torch.equal(params[1], before) and params[1]._version == 0
    assert params[1] not in optimizer.state
    optimizer.zero_grad()
    optimizer.step()


@pytest.mark.parametrize("how", HOW)
def test_state_is_a_momentum_buffer_like_the_parameter(how):
    param = Parameter(torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last))
    optimizer = lpsgd.LPSGDM([param], **how)
    param.grad = torch.ones_like(param)
    optimizer.step()
    state = optimizer.state[param]
    assert list(state) == ["momentum_buffer"]
    assert state["momentum_buffer"].stride() == param.stride()
    torch.testing.assert_close(state["momentum_buffer"], torch.full_like(param, 0.1).detach())


def test_lpsgd_has_no_state():
    params = parameters()
    optimizer = lpsgd.LPSGD(params)
    set_grads(params)
    optimizer.step()
    assert not optimizer.state


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("how", HOW)
def test_training_goes_on_from_a_checkpoint_with_the_same_bits(cls, how):
    def run(params, optimizer, steps):
        for step in steps:
            set_grads(params, step)
            optimizer.step()

    whole = parameters()
    run(whole, cls(whole, lr=0.1, **how), range(6))

    params = parameters()
    optimizer = cls(params, lr=0.1, **how)
    run(params, optimizer, range(3))
    file = io.BytesIO()
    torch.save({"params": params, "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = cls(saved["params"], lr=99.0)
    resumed.load_state_dict(saved["optimizer"])
    run(saved["params"], resumed, range(3, 6))
    assert same_bits(saved["params"], whole)


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))]
)
def test_copies_step_on_their_own(cls, copied):
    params = parameters()
    optimizer = cls(params, lr=0.1)
    set_grads(params)
    optimizer.step()
    other = copied(optimizer)
    others = other.param_groups[0]["params"]
    for group, one in ((params, optimizer), (others, other)):
        set_grads(group, 2)
        one.step()
    assert same_bits(params, others) and params[0] is not others[0]


def test_sgd_checkpoint_loads_and_ours_loads_into_sgd():
    params = parameters()
    sgd = torch.optim.SGD(params, lr=0.1, momentum=0.9)
    set_grads(params)
    sgd.step()
    ours = lpsgd.LPSGDM(params)
    with pytest.warns(UserWarning, match=r"buffers are taken, times 0\.1, as averages"):
        ours.load_state_dict(sgd.state_dict())
    for param in params:
        expected = sgd.state[param]["momentum_buffer"] * (1.0 - 0.9)
        assert torch.equal(ours.state[param]["momentum_buffer"], expected)
    ours.step()
    sgd.load_state_dict(ours.state_dict())
    sgd.step()


@pytest.mark.parametrize("cls", CLASSES)
def test_old_checkpoint_without_newer_keys_loads(cls):
    params = parameters()
    optimizer = cls(params, lr=0.1)
    saved = optimizer.state_dict()
    for name in ("pivot", "maximize", "foreach", "fused"):
        del saved["param_groups"][0][name]
    optimizer.load_state_dict(saved)
    set_grads(params)
    optimizer.step()


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize(
    "name, value, message",
    [
        ("lr", -1.0, "Invalid learning rate: -1.0"),
        ("lr", math.nan, "Invalid learning rate: nan"),
        ("p", 1.5, "Invalid p value: 1.5"),
        ("p", math.nan, "Invalid p value: nan"),
        ("weight_decay", -1.0, "Invalid weight_decay value: -1.0"),
        ("eps", -1.0, "Invalid epsilon value: -1.0"),
        ("pivot", 0.0, "Invalid pivot value: 0.0"),
        ("pivot", math.inf, "Invalid pivot value: inf"),
    ],
)
def test_values_out_of_range_are_refused(cls, name, value, message):
    with pytest.raises(ValueError, match=message):
        cls(parameters(), **{name: value})
    with pytest.raises(ValueError, match=message):
        cls([{"params": parameters(), name: value}])
    optimizer = cls(parameters())
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": parameters(), name: value})
    for how in HOW:
        params = parameters()
        optimizer = cls(params, **how)
        optimizer.param_groups[0][name] = value
        set_grads(params)
        with pytest.raises(ValueError, match=message):
            optimizer.step()
        assert same_bits(params, parameters())


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("name", ["lr", "p", "weight_decay", "eps", "pivot"])
@pytest.mark.parametrize("value", [None, "0.1"])
def test_values_that_are_no_numbers_are_refused(cls, name, value):
    with pytest.raises(TypeError, match=f"{name} must be a number"):
        cls(parameters(), **{name: value})


@pytest.mark.parametrize("momentum", [-0.1, 1.0, math.nan])
def test_momentum_out_of_range_is_refused(momentum):
    with pytest.raises(ValueError, match="Invalid momentum value"):
        lpsgd.LPSGDM(parameters(), momentum=momentum)


@pytest.mark.parametrize("cls", CLASSES)
def test_fused_and_foreach_contradict(cls):
    with pytest.raises(RuntimeError, match="cannot be `True` together"):
        cls(parameters(), fused=True, foreach=True)


def odd_parameters():
    """Parameters with gradients that C refuses and PyTorch's operations step."""

    class Subclass(torch.Tensor):
        pass

    strided = Parameter(torch.ones(4, 6)[:, ::2])
    strided.grad = torch.full((4, 3), 0.5)
    expanded = Parameter(torch.ones(4, 3))
    expanded.grad = torch.tensor([[0.5]]).expand(4, 3)
    transposed = Parameter(torch.ones(4, 3))
    transposed.grad = torch.full((3, 4), 0.5).t()
    negated = Parameter(torch.ones(4))
    negated.grad = torch._neg_view(torch.full((4,), -0.5))
    subclass = torch.ones(4).as_subclass(Subclass).requires_grad_()
    subclass.grad = torch.full((4,), 0.5)
    complex_ = Parameter(torch.ones(4, dtype=torch.complex64))
    complex_.grad = torch.full((4,), 0.5 + 0.5j)
    plain = Parameter(torch.ones(4))
    plain.grad = torch.full((4,), 0.5)
    return {
        "strided": strided,
        "expanded gradient": expanded,
        "transposed gradient": transposed,
        "negative bit": negated,
        "subclass": subclass,
        "complex": complex_,
        "plain": plain,
    }


@pytest.mark.parametrize("cls", CLASSES)
def test_what_c_refuses_goes_to_eager_in_the_same_step(cls):
    params = odd_parameters()
    optimizer = cls(list(params.values()), lr=0.1, p=4.0)
    optimizer.step()
    reference = Parameter(torch.ones(4))
    reference.grad = torch.full((4,), 0.5)
    cls([reference], lr=0.1, p=4.0, fused=True).step()
    for name, param in params.items():
        values = torch.view_as_real(param.detach()) if param.is_complex() else param.detach()
        if name == "complex":
            values = values[..., 0]
        expected = reference.detach()[0].expand(values.shape)
        torch.testing.assert_close(values.as_subclass(torch.Tensor), expected, msg=name)


@pytest.mark.parametrize("cls", CLASSES)
def test_c_steps_what_it_can_whatever_is_beside_it(cls):
    """Seen by the last bits of powers, in which C and PyTorch's operations differ."""

    def stepped(*others, **how):
        param = Parameter(torch.ones(1000))
        param.grad = torch.linspace(0.01, 1.0, 1000)
        cls([param, *others], lr=0.1, p=6.0, **how).step()
        return [param]

    in_c = stepped(fused=True)
    assert same_bits(stepped(odd_parameters()["strided"]), in_c)
    assert not same_bits(stepped(foreach=True), in_c)


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("name", [name for name in odd_parameters() if name != "plain"])
def test_fused_demands_c(cls, name):
    param = odd_parameters()[name]
    before = param.detach().clone()
    with pytest.raises(
        (TypeError, ValueError, RuntimeError), match=r"(params|grads)\[0\]|`fused=True`"
    ):
        cls([param], fused=True).step()
    assert torch.equal(param.detach(), before)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize(
    "buffer",
    [
        torch.zeros(5),
        torch.zeros(4, dtype=torch.float64),
        torch.zeros(4).to_sparse(),
        torch.zeros(4, device="meta"),
    ],
    ids=["shape", "dtype", "sparse", "meta"],
)
def test_malformed_momentum_buffer_is_refused_and_nothing_written(how, buffer):
    params = [Parameter(torch.ones(4)), Parameter(torch.ones(4))]
    optimizer = lpsgd.LPSGDM(params, **how)
    set_grads(params)
    optimizer.state[params[1]]["momentum_buffer"] = buffer
    with pytest.raises((TypeError, ValueError, RuntimeError)):
        optimizer.step()
    assert all((param == 1).all() for param in params)


@pytest.mark.parametrize("cls", CLASSES)
def test_sparse_gradient_is_refused(cls):
    param = Parameter(torch.ones(4))
    param.grad = torch.ones(4).to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        cls([param]).step()
    assert (param == 1).all()


@pytest.mark.parametrize("cls", CLASSES)
def test_same_parameter_twice_is_refused_by_torch(cls):
    param = parameters(1)[0]
    with pytest.raises(ValueError, match="some parameters appear in more than one parameter group"):
        cls([{"params": [param]}, {"params": [param]}])


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_gradients_of_another_dtype_are_converted(cls, dtype):
    """PyTorch makes such gradients where `grad_dtype` says so."""
    param, other = Parameter(torch.ones(4, dtype=dtype)), Parameter(torch.ones(4, dtype=dtype))
    param.grad_dtype = None
    param.grad = torch.tensor([0.5, -1.0, 0.0, 2.0])
    other.grad = param.grad.to(dtype)
    for one in (param, other):
        cls([one], lr=0.1, p=3.0).step()
    torch.testing.assert_close(param, other)
