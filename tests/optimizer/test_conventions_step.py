# SPDX-License-Identifier: MIT
"""What a step does to which tensors, as torch.optim.SGD's users know it."""

import itertools
import math
from typing import ClassVar

import pytest
import torch
from torch.nn import Parameter
from torch.optim import SGD
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import lpsgd
import lpsgd_ext
from conventions import IMPLEMENTATIONS, configurations, implementations
from helpers import CLASSES, DTYPES, PS, bits, needs_c, parameters, same_bits, set_grads, steps

EAGER = ("foreach", "forloop", "default")  # implementations that take what C refuses
eager = pytest.mark.parametrize(
    "how", [pytest.param(IMPLEMENTATIONS[name], id=name) for name in EAGER]
)


@pytest.fixture
def c_calls(monkeypatch):
    """The names of lpsgd_ext's functions that make a step."""
    calls = []

    def watched(name):
        function = getattr(lpsgd_ext, name)

        def call(*args, **kwargs):
            result = function(*args, **kwargs)
            if result is not False:
                calls.append(name)
            return result

        monkeypatch.setattr(lpsgd_ext, name, call)

    for name in ("lpsgd_", "lpsgdm_", "step_param_groups"):
        watched(name)
    return calls


# The closure


@configurations()
def test_the_closure_runs_once_with_gradients_and_its_result_is_returned(make):
    optimizer = make(parameters())
    seen = []

    def closure():
        seen.append(torch.is_grad_enabled())
        return loss

    for loss in (None, 2.0, torch.tensor(3.0)):
        with torch.no_grad():
            assert optimizer.step(closure) is loss
            assert not torch.is_grad_enabled()
        assert optimizer.step(closure=closure) is loss
        assert torch.is_grad_enabled()
    assert seen == [True] * 6
    assert optimizer.step() is optimizer.step(None) is optimizer.step(closure=None) is None


@configurations()
def test_what_the_closure_raises_comes_out_and_nothing_is_written(make):
    params = parameters()
    optimizer = make(params)
    set_grads(params)

    def closure():
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        optimizer.step(closure)
    assert torch.is_grad_enabled()
    assert same_bits(params, parameters()) and not optimizer.state


# What is written


def parameters_of_every_kind():
    params = [p for dtype in DTYPES for p in parameters((4, 3), (), (0,), (2, 1), dtype=dtype)]
    image = torch.ones(2, 3, 4, 5).to(memory_format=torch.channels_last)
    return [*params, Parameter(image)]


@configurations()
def test_gradients_stay_as_they_were(make):
    params = parameters_of_every_kind()
    optimizer = make(params)
    set_grads(params)
    params[-1].grad = torch.ones_like(params[-1])
    grads = [param.grad for param in params]
    before = [(g.clone(), g.stride(), g.data_ptr(), g._version) for g in grads]
    for _ in range(3):
        optimizer.step()
    for param, grad, (values, *others) in zip(params, grads, before, strict=True):
        assert param.grad is grad
        assert torch.equal(bits(grad), bits(values))
        assert [grad.stride(), grad.data_ptr(), grad._version] == others


@configurations()
def test_parameters_are_written_in_place_and_their_version_rises(make):
    def facts(p):
        return p.data_ptr(), p.stride(), p.dtype, p.requires_grad, p.is_leaf

    params = parameters_of_every_kind()
    optimizer = make(params)
    before = [(facts(param), param._version) for param in params]
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    group = optimizer.param_groups[0]["params"]
    for param, now, (same, version) in zip(params, group, before, strict=True):
        assert now is param and facts(param) == same and param._version > version


@configurations()
def test_a_backward_through_stepped_parameters_raises_torchs_error(make):
    params = parameters()
    optimizer = make(params, lr=0.1)
    losses = [(param * param).sum() for param in params]
    steps(optimizer, params, [0])
    for loss in losses:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@implementations
def test_a_backward_through_a_stepped_momentum_raises_torchs_error(how):
    param = Parameter(torch.ones(3))
    optimizer = lpsgd.LPSGDM([param], **how)
    steps(optimizer, [param], [0])
    factor = torch.ones(3, requires_grad=True)
    loss = (factor * optimizer.state[param]["momentum_buffer"]).sum()
    steps(optimizer, [param], [1])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@configurations()
def test_zero_grad_sets_gradients_to_none_or_zero(make):
    params = parameters()
    optimizer = make(params)
    set_grads(params)
    grads = [param.grad for param in params]
    optimizer.zero_grad(set_to_none=False)
    for param, grad in zip(params, grads, strict=True):
        assert param.grad is grad and not bits(grad).any()
    optimizer.zero_grad()
    assert all(param.grad is None for param in params)
    optimizer.step()
    assert same_bits(params, parameters()) and not optimizer.state


@configurations()
def test_parameters_that_need_no_gradient_may_be_in_the_list(make):
    frozen = torch.ones(3)
    params = parameters()
    optimizer = make([params[0], frozen, params[1]])
    steps(optimizer, params, range(2))
    assert torch.equal(frozen, torch.ones(3)) and frozen._version == 0
    assert frozen not in optimizer.state


def still(dtype):
    """Values that an inexact "nothing" would change: signed zeros, infinities, subnormals."""
    values = [1.0, -2.0, 0.0, -0.0, math.inf, -math.inf, 3e-41, -3e-41]
    return torch.tensor(values, dtype=torch.float64).to(dtype)


@implementations
@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stochastic_rounding", [False, True])
def test_zero_gradients_change_no_bit(cls, how, dtype, stochastic_rounding):
    for p, eps, zero, maximize in itertools.product(PS, (0.0, 1e-8), (0.0, -0.0), (False, True)):
        param = Parameter(still(dtype))
        param.grad = torch.full_like(param, zero)
        values = {"p": p, "eps": eps, "maximize": maximize}
        optimizer = cls([param], stochastic_rounding=stochastic_rounding, **values, **how)
        for _ in range(2):
            optimizer.step()
        assert same_bits([param], [still(dtype)]), (values, zero)


@configurations()
def test_lr_0_changes_no_bit_of_the_parameters(make):
    for dtype, p, lr in itertools.product(DTYPES, PS, (0.0, torch.tensor(0.0))):
        param = Parameter(still(dtype))
        steps(make([param], lr=lr, p=p, weight_decay=0.5), [param], range(2))
        assert same_bits([param], [still(dtype)]), (dtype, p, lr)


# Tensors of every kind


@configurations(*EAGER)
def test_complex_parameters_step_as_their_real_and_imaginary_parts(make):
    reals = parameters((3, 4, 2), (5, 2), (2,), (6,))
    own = {"momentum_dtype": None} if make.cls is lpsgd.LPSGDM else {}  # as complex ones have
    real = make([{"params": reals[:-1], **own}, {"params": reals[-1:]}])
    mixed_params = [Parameter(torch.view_as_complex(r.detach().clone())) for r in reals[:-1]]
    mixed_params.append(Parameter(reals[-1].detach().clone()))
    mixed = make(mixed_params)
    for seed in range(3):
        set_grads(reals, seed)
        for param, r in zip(mixed_params, reals, strict=True):
            param.grad = torch.view_as_complex(r.grad) if param.is_complex() else r.grad
        real.step()
        mixed.step()
        for param, r in zip(mixed_params, reals, strict=True):
            values = torch.view_as_real(param) if param.is_complex() else param
            torch.testing.assert_close(values, r)
    for param, r in zip(mixed_params, reals, strict=True):
        for name, buffer in mixed.state[param].items() if param in mixed.state else ():
            expected = real.state[r][name]
            assert buffer.dtype == (param.dtype if param.is_complex() else expected.dtype)
            values = torch.view_as_real(buffer) if buffer.is_complex() else buffer
            torch.testing.assert_close(values.float(), expected.float())


@eager
@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("of", ["parameter", "gradient"])
def test_a_conjugate_steps_as_the_same_values_in_memory(cls, how, of):
    """Autograd makes such gradients of complex parameters."""

    def conjugate(tensor):
        return tensor.conj().resolve_conj().conj()

    values, grad = (torch.view_as_complex(p.detach()) for p in parameters((3, 2), (3, 2)))
    params = [conjugate(values) if of == "parameter" else values.clone(), values.clone()]
    for param in params:
        optimizer = cls([param], lr=0.1, **how)
        param.grad = conjugate(grad) if of == "gradient" else grad
        for _ in range(2):
            optimizer.step()
    torch.testing.assert_close(*params)


def layouts(values):
    """The same 4 x 6 values in tensors of every layout, by name."""
    wide = torch.zeros(4, 12)
    wide[:, ::2] = values
    blocks = torch.zeros(2, 4, 6)
    blocks[1] = values
    return {
        "contiguous": values.clone(),
        "transposed": values.t().contiguous().t(),
        "strided": wide[:, ::2],
        "part of a larger one": blocks[1],
        "negative bit": torch._neg_view(-values),
        "conjugate's imaginary part": torch.complex(values, -values).conj().imag,
        "real part": torch.complex(values, values).real,
    }


@eager
@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("of", ["parameter", "gradient"])
@pytest.mark.parametrize("layout", layouts(torch.ones(4, 6)))
def test_every_layout_steps_as_the_contiguous_one(cls, how, of, layout):
    values, grad = (p.detach() for p in parameters((4, 6), (4, 6), seed=7))

    def run(p, param_layout, grad_layout):
        params = [Parameter(torch.ones(3)), layouts(values)[param_layout].requires_grad_()]
        optimizer = cls(params, lr=0.1, p=p, weight_decay=0.1, **how)
        for factor in (1, 2, 3):
            params[0].grad = torch.ones(3)
            params[1].grad = layouts(factor * grad)[grad_layout]
            optimizer.step()
        return params

    for p in (2.0, 4.0, math.inf):
        one = (layout, "contiguous") if of == "parameter" else ("contiguous", layout)
        expected = run(p, "contiguous", "contiguous")
        for tensor, other in zip(run(p, *one), expected, strict=True):
            torch.testing.assert_close(tensor, other)


@configurations(*EAGER)
def test_an_expanded_gradient_steps_as_its_copy(make):
    params, others = parameters((4, 6)), parameters((4, 6))
    optimizer, other = make(params), make(others)
    for seed in range(3):
        row = parameters((1, 6), seed=seed)[0].detach()
        params[0].grad, others[0].grad = row.expand(4, 6), row.expand(4, 6).clone()
        optimizer.step()
        other.step()
        torch.testing.assert_close(params[0], others[0])


@configurations()
def test_scalars_and_empty_tensors_step(make):
    params, alone = parameters((), (0,), (3, 0, 2), (1, 1)), parameters(())
    optimizer = make(params)
    steps(optimizer, params, range(2))
    steps(make(alone), alone, range(2))
    assert same_bits(params[:1], alone)
    if make.cls is lpsgd.LPSGDM:
        shapes = [optimizer.state[param]["momentum_buffer"].shape for param in params]
        assert shapes == [param.shape for param in params]


@eager
@pytest.mark.parametrize("cls", CLASSES)
def test_every_dtype_and_device_may_be_in_one_group(cls, how):
    dtypes = [*DTYPES, torch.complex64, torch.complex128]

    def fresh():
        values = torch.linspace(-2, 2, 6)
        params = [Parameter(values.to(dtype, copy=True)) for dtype in dtypes * 2]
        return params + [Parameter(torch.ones(3, device="meta")) for _ in range(2)]

    params, alone = fresh(), fresh()
    optimizer = cls(params, lr=0.1, p=4.0, weight_decay=0.1, **how)
    others = [cls([param], lr=0.1, p=4.0, weight_decay=0.1, **how) for param in alone]
    for seed in range(3):
        for param, other in zip(params, alone, strict=True):
            param.grad = torch.full_like(param, 0.1 + seed)
            other.grad = param.grad.clone()
        optimizer.step()
        for other in others:
            other.step()
    for param, other, old in zip(params, alone, fresh(), strict=True):
        assert param._version > 0
        if param.device.type == "cpu":
            torch.testing.assert_close(param, other)
            assert not torch.equal(param, old)


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_fused_refuses_other_devices_and_dtypes_with_torchs_error_and_recovers(cls, dtype):
    device = "cpu" if dtype.is_complex else "meta"
    model = torch.nn.Linear(2, 3, device=device, dtype=dtype)
    good = Parameter(torch.ones(2))
    optimizer = cls([good, *model.parameters()], fused=True)
    set_grads([good])
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    text = "`fused=True` requires all the params to be floating point Tensors of supported devices"
    with pytest.raises(RuntimeError, match=text):
        optimizer.step()
    assert torch.equal(good, torch.ones(2)) and not optimizer.state
    optimizer.zero_grad()
    optimizer.step()
    if device == "meta":
        model.to_empty(device="cpu")
        for param in model.parameters():
            param.grad = torch.zeros_like(param)
        optimizer.step()


@implementations
@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("position", [0, 1, 2])
def test_a_sparse_gradient_is_refused_wherever_it_is_and_nothing_written(cls, how, position):
    params = parameters((3,), (3,), (3,))
    optimizer = cls([{"params": params[:2]}, {"params": params[2:]}], **how)
    set_grads(params)
    params[position].grad = params[position].grad.to_sparse()
    with pytest.raises(RuntimeError, match=r"sparse|Sparse|LPSGD_NATIVE=0"):
        optimizer.step()
    assert same_bits(params, parameters((3,), (3,), (3,)))
    assert all(param._version == 0 for param in params) and not optimizer.state


# Who sees the step


class Counted(torch.Tensor):
    """A subclass that notes the operations that it takes part in."""

    seen: ClassVar = []

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        cls.seen.append(function.__name__)
        return super().__torch_function__(function, types, args, kwargs)


@eager
@pytest.mark.parametrize("cls", CLASSES)
def test_a_subclass_sees_the_operations_and_is_kept(cls, how):
    plain = parameters((3,))[0]
    param = plain.detach().clone().as_subclass(Counted).requires_grad_()
    ours, theirs = cls([param], lr=0.1, **how), cls([plain], lr=0.1, **how)
    for seed in range(2):
        set_grads([plain], seed)
        param.grad = plain.grad.clone()
        Counted.seen.clear()
        ours.step()
        theirs.step()
        assert {"add_", "div"} & set(Counted.seen)
    torch.testing.assert_close(param.as_subclass(torch.Tensor), plain.detach())
    if cls is lpsgd.LPSGDM:
        assert type(ours.state[param]["momentum_buffer"]) is Counted


class Dispatched(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


class Functions(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.seen.append(getattr(function, "__name__", ""))
        return function(*args, **(kwargs or {}))


@eager
@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("mode", [Dispatched, Functions])
def test_a_mode_sees_the_operations_that_write_every_parameter(cls, how, mode, c_calls):
    params = parameters((3,), (2, 2))
    optimizer = cls(params, **how)
    set_grads(params)
    with mode() as active:
        optimizer.step()
    writing = [name for name in active.seen if name in ("_foreach_add_", "add_", "_foreach_sub_")]
    assert len(writing) >= (4 if how == {"foreach": False} else 2)
    assert not c_calls


@needs_c
@pytest.mark.parametrize("cls", CLASSES)
def test_a_default_device_is_no_reason_to_leave_c(cls, c_calls):
    params = parameters()
    optimizer = cls(params)
    set_grads(params)
    torch.set_default_device("cpu")
    try:
        optimizer.step()
        with torch.device("meta"):
            optimizer.step()
    finally:
        torch.set_default_device(None)
    assert len(c_calls) == 2
    for state in optimizer.state.values():
        assert state["momentum_buffer"].device.type == "cpu"


@configurations()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_default_dtype_does_not_matter(make, dtype):
    params, others = parameters(dtype=dtype), parameters(dtype=dtype)
    steps(make(params), params, range(3))
    former = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        steps(make(others), others, range(3))
    finally:
        torch.set_default_dtype(former)
    assert same_bits(params, others)


@pytest.mark.parametrize("cls", [SGD, *CLASSES])
def test_the_profiler_shows_the_step_by_its_name(cls):
    params = parameters()
    optimizer = cls(params)
    set_grads(params)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        optimizer.step()
        optimizer.zero_grad()
    names = {event.key for event in profile.key_averages()}
    assert f"Optimizer.step#{cls.__name__}.step" in names
    assert f"Optimizer.zero_grad#{cls.__name__}.zero_grad" in names


@pytest.mark.parametrize("cls", CLASSES)
def test_the_profiler_shows_one_step_where_a_class_calls_that_of_its_base(cls):
    class Derived(cls):
        def step(self, closure=None):
            return super().step(closure)

    cls(parameters())
    optimizer = Derived(parameters())
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        optimizer.step()
    events = [event for event in profile.events() if event.name.startswith("Optimizer.step")]
    assert [event.name for event in events] == ["Optimizer.step#Derived.step"]
