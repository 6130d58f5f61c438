# SPDX-License-Identifier: MIT
"""Parameters that share memory or lie at an odd address: every way to step gives one answer."""

import pytest
import torch
from torch.nn import Parameter
from torch.optim import SGD

import lpsgd
import lpsgd_ext
from conventions import IMPLEMENTATIONS
from helpers import CLASSES, needs_c, parameters, same_bits
from helpers import set_grads as set_contiguous_grads

SHAPES = (4, 4), (3,), (2, 5)
EXPECTED = {"foreach": False}  # PyTorch's operations, parameter by parameter

# The last parameter, whose memory is that of the first.
TIED = {
    "one Parameter": lambda a: a,
    "transposed": lambda a: Parameter(a.detach().t()),
    "data": lambda a: Parameter(a.detach()),
    "a slice": lambda a: Parameter(a.detach()[1:3]),
    "every other column": lambda a: Parameter(a.detach()[:, 1::2]),
}
tied = pytest.mark.parametrize("tie", TIED)
classes = pytest.mark.parametrize("cls", CLASSES)

# torch.optim says so when it is given a list with one Parameter twice.
pytestmark = pytest.mark.filterwarnings(
    "ignore:optimizer contains a parameter group with duplicate parameters"
)


def tied_parameters(tie, dtype=torch.float32):
    first, *others = parameters(*SHAPES, dtype=dtype)
    return [first, *others, TIED[tie](first)]


def set_grads(params, seed=1):
    """Gradients with the parameters' strides, as autograd makes them."""
    set_contiguous_grads(params, seed)
    for param in params:
        param.grad = torch.empty_like(param, requires_grad=False).copy_(param.grad)


def run(cls, params, groups=None, compiled=False, **how):
    """Three steps, also with a Tensor lr, which leaves the usual step."""
    optimizer = cls(groups or params, lr=0.1, p=4.0, weight_decay=0.1, **how)
    step = torch.compile(optimizer.step, backend="aot_eager") if compiled else optimizer.step
    for seed in range(3):
        set_grads(params, seed)
        if seed == 2:
            optimizer.param_groups[0]["lr"] = torch.tensor(0.1)
        step()
    return optimizer


def buffers(optimizer, params):
    return [optimizer.state[param].get("momentum_buffer", param) for param in params]


def assert_same_training(params, optimizer, expected, other):
    """The tied ones have the same bits. The others may have been stepped in C."""
    for i in (0, -1):
        assert same_bits([params[i]], [expected[i]])
        assert same_bits(buffers(optimizer, [params[i]]), buffers(other, [expected[i]]))
    for param, one in zip(params, expected, strict=True):
        torch.testing.assert_close(param, one)


@tied
@classes
@pytest.mark.parametrize("how", [{}, {"foreach": True}, {"maximize": True}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
def test_tied_parameters_are_stepped_one_after_the_other(tie, cls, how, dtype):
    params, expected = tied_parameters(tie, dtype), tied_parameters(tie, dtype)
    optimizer = run(cls, params, **how)
    assert_same_training(params, optimizer, expected, run(cls, expected, **{**how, **EXPECTED}))


@tied
@classes
@pytest.mark.parametrize("how", [{}, EXPECTED])
def test_tied_parameters_are_rounded_at_random_one_after_the_other(tie, cls, how):
    rounding = {"stochastic_rounding": True, "momentum_dtype": torch.float32}
    if cls is lpsgd.LPSGD:
        del rounding["momentum_dtype"]
    params, alone = (tied_parameters(tie, torch.bfloat16) for _ in range(2))
    optimizer = run(cls, params, **how, **rounding)
    # The last parameter's random bits are those of its number.
    other = cls([*alone[:-1]], lr=0.1, p=4.0, weight_decay=0.1, **EXPECTED, **rounding)
    other.param_groups[0]["params"].append(alone[-1])
    for seed in range(3):
        set_grads(alone, seed)
        other.step()
    assert_same_training(params, optimizer, alone, other)
    assert optimizer.param_groups[0]["rounding_step"] == 3


@classes
@pytest.mark.parametrize("how", IMPLEMENTATIONS)
@pytest.mark.parametrize("tie", ["transposed", "data", "a slice"])
def test_tied_parameters_of_two_groups_are_stepped_one_after_the_other(tie, cls, how):
    params, expected = tied_parameters(tie), tied_parameters(tie)
    groups = [{"params": params[:2]}, {"params": params[2:]}]
    run(cls, params, groups, **IMPLEMENTATIONS[how])
    run(cls, expected, **EXPECTED)
    for param, other in zip(params, expected, strict=True):
        torch.testing.assert_close(param, other)


@tied
@classes
def test_tied_parameters_are_stepped_one_after_the_other_in_a_compiled_step(tie, cls):
    torch._dynamo.reset()
    params, expected = tied_parameters(tie), tied_parameters(tie)
    optimizer = run(cls, params, compiled=True)
    assert_same_training(params, optimizer, expected, run(cls, expected, **EXPECTED))


@classes
@pytest.mark.parametrize("how", [{}, {"foreach": True}, EXPECTED])
def test_a_parameter_that_is_listed_twice_is_stepped_as_torch_steps_it(cls, how):
    params, others = tied_parameters("one Parameter"), tied_parameters("one Parameter")
    ours = cls(params, lr=0.1, p=2.0, **how)
    momentum = ours.defaults.get("momentum", 0.0)
    sgd = SGD(others, lr=0.1, momentum=momentum, dampening=momentum, foreach=False)
    for other in others:
        sgd.state[other]["momentum_buffer"] = torch.zeros_like(other)
    for optimizer, group in ((ours, params), (sgd, others)):
        for seed in range(4):
            set_grads(group, seed)
            optimizer.step()
    assert same_bits(params, others)
    if momentum:
        assert same_bits(buffers(ours, params), buffers(sgd, others))


@pytest.mark.parametrize("how", [{}, {"foreach": True}, {"compiled": True}])
def test_a_gradient_may_be_another_parameters_memory(how):
    def train(compiled=False, **how):
        params = parameters((4,), (4,), (5,))
        optimizer = lpsgd.LPSGDM(params, lr=0.1, p=4.0, **how)
        set_grads(params)
        params[1].grad = params[0].detach()
        step = torch.compile(optimizer.step, backend="aot_eager") if compiled else optimizer.step
        step()
        return params, optimizer

    torch._dynamo.reset()
    params, optimizer = train(**how)
    expected, other = train(**EXPECTED)
    assert same_bits(params[:2], expected[:2])
    assert same_bits(buffers(optimizer, params[:2]), buffers(other, expected[:2]))


@needs_c
@classes
def test_parameters_that_share_nothing_are_stepped_in_c_beside_those_that_do(cls, monkeypatch):
    params = tied_parameters("one Parameter")
    name = "lpsgd_" if cls is lpsgd.LPSGD else "lpsgdm_"
    native, stepped = getattr(lpsgd_ext, name), []

    def watched(lists, *more, **values):
        native(lists, *more, **values)
        if not values["dry_run"]:
            stepped.extend(lists)

    class Module:
        def __getattr__(self, attribute):
            return getattr(lpsgd_ext, attribute)

    module = Module()
    setattr(module, name, lambda *a, dry_run=False, **k: watched(*a, dry_run=dry_run, **k))
    monkeypatch.setattr("lpsgd._optimizer.lpsgd_ext", module)
    optimizer = cls(params)
    set_grads(params)
    optimizer.step()
    assert [id(param) for param in stepped] == [id(param) for param in params[1:3]]


@classes
@pytest.mark.parametrize("named", [False, True])
def test_fused_names_the_parameter_that_is_listed_twice(cls, named):
    params = tied_parameters("one Parameter")
    others = [param.detach().clone() for param in params]
    names = ["encoder.weight", "bias", "other", "decoder.weight"]
    optimizer = cls(list(zip(names, params, strict=True)) if named else params, fused=True)
    set_grads(params)
    params[1].grad = None  # the place in the group is told, not that among the gradients
    message = r"encoder\.weight and decoder\.weight" if named else r"params\[0\] and params\[3\]"
    with pytest.raises(ValueError, match=f"listed twice in its group: {message} are one"):
        optimizer.step()
    assert same_bits(params, others) and not optimizer.state


@classes
@pytest.mark.parametrize("tie", ["transposed", "data", "a slice"])
def test_fused_refuses_parameters_that_share_memory(tie, cls):
    params = tied_parameters(tie)
    others = [param.detach().clone() for param in params]
    optimizer = cls(params, fused=True)
    set_grads(params)
    with pytest.raises(ValueError, match=r"params\[0\] and params\[3\] share memory"):
        optimizer.step()
    assert same_bits(params, others) and not optimizer.state


@pytest.mark.parametrize("how", IMPLEMENTATIONS)
@pytest.mark.parametrize("shift", [1, 4])
def test_a_buffer_that_overlaps_with_its_gradient_in_part_is_refused_beforehand(shift, how):
    params = tied_parameters("one Parameter")[:3]
    optimizer = lpsgd.LPSGDM(params, **IMPLEMENTATIONS[how])
    set_grads(params)
    optimizer.step()
    memory = torch.arange(40.0)
    params[2].grad = memory[:10].view(2, 5)
    optimizer.state[params[2]]["momentum_buffer"] = memory[shift : shift + 10].view(2, 5)
    before = [param.detach().clone() for param in params]
    with pytest.raises((RuntimeError, ValueError), match=r"single memory location|share memory"):
        optimizer.step()
    assert same_bits(params, before) and torch.equal(memory, torch.arange(40.0))


@tied
@pytest.mark.parametrize("how", [{}, {"foreach": True}, EXPECTED])
def test_a_step_of_tied_parameters_that_raises_has_changed_nothing(tie, how):
    params = tied_parameters(tie)
    optimizer = lpsgd.LPSGDM(params, **how)
    set_grads(params)
    optimizer.step()
    optimizer.state[params[2]]["momentum_buffer"] = torch.zeros(7)
    before = [t.detach().clone() for t in (*params, *buffers(optimizer, params))]
    with pytest.raises(RuntimeError, match="must have the parameter's shape"):
        optimizer.step()
    assert same_bits([*params, *buffers(optimizer, params)], before)


# Odd addresses, such as those of weights in a file of several dtypes


def at_odd_address(tensor):
    """A copy that begins one byte behind a multiple of its element size."""
    memory = bytearray(16 + tensor.nbytes)
    offset = -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % 16 + 1
    if offset + tensor.nbytes > len(memory):
        offset -= 8
    odd = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=offset)
    odd = odd.view(tensor.shape).copy_(tensor)
    assert odd.data_ptr() % tensor.element_size()
    return odd


def lay_at_odd_addresses(optimizer, params, what):
    for param in params[1:]:
        if what == "parameter":
            param.data = at_odd_address(param.detach())
        elif what == "gradient":
            param.grad = at_odd_address(param.grad)
        else:
            state = optimizer.state[param]
            state["momentum_buffer"] = at_odd_address(state["momentum_buffer"])


@pytest.mark.parametrize("what", ["parameter", "gradient", "momentum buffer"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("how", IMPLEMENTATIONS)
def test_fused_refuses_an_odd_address_and_the_others_step_it(what, dtype, how):
    def train(is_odd, **how):
        params = parameters(*SHAPES, dtype=dtype)
        optimizer = lpsgd.LPSGDM(params, lr=0.1, p=4.0, **how)
        for seed in range(3):
            set_grads(params, seed)
            if seed and is_odd:
                lay_at_odd_addresses(optimizer, params, what)
            optimizer.step()
        return params

    if how == "fused":
        with pytest.raises(ValueError, match=r"\[1\] is not aligned to its element size"):
            train(True, fused=True)
    else:
        odd, expected = train(True, **IMPLEMENTATIONS[how]), train(False, **EXPECTED)
        for param, other in zip(odd, expected, strict=True):  # some steps are made in C
            torch.testing.assert_close(param, other, rtol=1e-6, atol=0.0)
