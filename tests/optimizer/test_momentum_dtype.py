# SPDX-License-Identifier: MIT
"""Momentum in one byte (float8_e5m2), and in any dtype beside any parameter's."""

import copy
import io
import math
import pickle
import struct
from functools import partial

import pytest
import torch
from torch.nn import Parameter

import lpsgd
import lpsgd_ext
from helpers import bits, parameters, same_bits, set_grads, steps
from lpsgd import _eager, _reference

BYTE = torch.float8_e5m2
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
MASK = (1 << 64) - 1
WAYS_TO_STEP = [{"foreach": True}, {"foreach": False}, {}, {"fused": True}]
how = pytest.mark.parametrize("how", WAYS_TO_STEP, ids=str)


def raw(buffer):
    return buffer.view(torch.uint8).flatten().tolist()


def buffers(optimizer):
    return [state["momentum_buffer"] for state in optimizer.state.values()]


def of(byte):
    """The float32 number of a byte."""
    return struct.unpack("<e", bytes([0, byte]))[0]


# What the rounding is, one element at a time.


def mix(x):
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ x >> 27) * 0x94D049BB133111EB & MASK
    return x ^ x >> 31


def key(of, number):
    return mix(of + 0x9E3779B97F4A7C15 * (number + 1) & MASK)


def reference_byte(seed, step, stream, i):
    """The random byte of an element."""
    k = key(key(key(mix(seed & MASK), step), 0x6D6F6D656E74), stream)
    index = 16 * (i >> 6) + (i & 15)
    x = (index ^ k) & 0xFFFFFFFF
    x = (x ^ x >> 17) * 0xED5AD4BB & 0xFFFFFFFF
    x ^= (k >> 32) + (index >> 32) * 0x9E3779B9 & 0xFFFFFFFF
    x = (x ^ x >> 11) * 0xAC4C1B51 & 0xFFFFFFFF
    x = (x ^ x >> 15) * 0x31848BAB & 0xFFFFFFFF
    x ^= x >> 14
    return x >> 8 * (i >> 4 & 3) & 0xFF


def reference_rounding(m, exponent, byte):
    """The byte that holds m (a Python float that is a float32)."""
    sign = 0x80 if math.copysign(1.0, m) < 0 else 0
    if math.isnan(m):
        return sign | 0x7E
    scaled = min(abs(m) * 2.0**exponent, 57344.0)
    (half,) = struct.unpack("<H", struct.pack("<e", scaled))  # nearest, ties to even
    return sign | min(half, 0x7B00) + byte >> 8


def stored(values, exponent, byte):
    to = torch.empty(len(values), dtype=BYTE)
    _eager._store_byte(to, torch.tensor(values), exponent, torch.full((len(values),), byte))
    return raw(to)


NUMBERS = [0.0, -0.0, 1.0, -1.0, 1.25, 1.2499999, 1.75, -1.7500001, 2.0, 3.5e4, 57344.0, 57345.0]
NUMBERS += [61439.0, 65504.0, 65520.0, 1e9, -3.4e38, math.inf, -math.inf, math.nan, -math.nan]
NUMBERS += [2.0**-14, 2.0**-16, -(2.0**-16), 1.5 * 2.0**-17, 2.0**-24, 2.0**-25, 1.1 * 2.0**-25]
NUMBERS += [2.0**-126, 1e-40, -1e-45, 0.06, 1e-5, 6.1e-5, math.pi, 2047.4, 2049.0]


@pytest.mark.parametrize("exponent", [0, 15, -15, 1, 24, 100, 126, -126])
def test_rounding_is_that_of_the_reference(exponent):
    numbers = torch.tensor(NUMBERS).tolist()  # float32
    for byte in (0, 1, 127, 128, 254, 255):
        expected = [reference_rounding(m, exponent, byte) for m in numbers]
        assert stored(numbers, exponent, byte) == expected


def test_every_float16_is_rounded_as_by_the_reference():
    """With every second random byte; what a byte can hold is kept."""
    halves = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
    to, i = torch.empty(1 << 16, dtype=BYTE), torch.arange(1 << 16)
    random = (i * 2 + (i >> 7)) & 0xFF
    _eager._store_byte(to, halves, 0, random)
    magnitude = i & 0x7FFF
    expected = torch.where(
        magnitude > 0x7C00, 0x7E, (magnitude.clamp_max(0x7B00) + random).bitwise_right_shift(8)
    )
    assert torch.equal(to.view(torch.uint8), (expected | i >> 8 & 0x80).to(torch.uint8))
    finite = torch.tensor([b for b in range(256) if b & 0x7F < 0x7C], dtype=torch.uint8)
    for exponent in (-100, 0, 15, 126):
        again = torch.empty(len(finite), dtype=BYTE)
        m = _eager.decoded(finite.view(BYTE), exponent)
        _eager._store_byte(again, m, exponent, torch.full((len(finite),), 255))
        assert raw(again) == finite.tolist()
        assert m.tolist() == [of(b) * 2.0**-exponent for b in finite.tolist()]


@pytest.mark.parametrize(
    "seed, step, stream, offset", [(0, 0, 0, 0), (-7, 5, 3, 11), (9, 1, 2, 63)]
)
def test_random_bytes_are_those_of_the_reference(seed, step, stream, offset):
    drawn = _reference.random_bytes(torch.empty(200), seed, step, stream, offset)
    expected = [reference_byte(seed, step, stream, i) for i in range(offset, offset + 200)]
    assert drawn.tolist() == expected
    far = (1 << 38) - 20  # where an index of the hash passes 32 bits
    drawn = _reference.random_bytes(torch.empty(40), seed, step, stream, far)
    assert drawn.tolist() == [reference_byte(seed, step, stream, i) for i in range(far, far + 40)]


def test_random_bytes_are_numbered_as_elements_lie_in_memory():
    param = torch.empty(2, 3, 4, 5).to(memory_format=torch.channels_last)
    drawn = _reference.random_bytes(param, 1, 2, 3, 4)
    assert torch.equal(
        drawn.permute(0, 2, 3, 1).flatten(), _reference.random_bytes(torch.empty(120), 1, 2, 3, 4)
    )


@pytest.mark.parametrize("n", [1 << 18, pytest.param(1 << 24, marks=pytest.mark.full)])
def test_random_bytes_are_balanced_and_uncorrelated(n):
    """Over neighbours, bytes of one hash, steps, streams, seeds and the bits that round parameters.
    `-s` shows the figures of docs/memory.md: counts as chi-squared, whose mean is 255 and deviation
    22.6, and correlations in their standard deviations."""
    x = torch.empty(n)
    drawn = _reference.random_bytes(x, 1, 2, 3, 0)
    counts = drawn.bincount(minlength=256).double()
    chi_squared = ((counts - n / 256) ** 2 / (n / 256)).sum().item()
    print(f"\n{n} bytes: chi-squared {chi_squared:.0f}")
    assert abs(chi_squared - 255) < 5 * math.sqrt(2 * 255)
    others = {
        "the next step": lambda: _reference.random_bytes(x, 1, 3, 3, 0),
        "the next parameter": lambda: _reference.random_bytes(x, 1, 2, 4, 0),
        "the next seed": lambda: _reference.random_bytes(x, 2, 2, 3, 0),
        "the lowest bits for the parameter": lambda: _reference.random_bits(x, 1, 2, 3, 0) & 0xFF,
        "the highest": lambda: _reference.random_bits(x, 1, 2, 3, 0) >> 24,
        **{
            f"the element {by} before": lambda by=by: drawn.roll(by)
            for by in (1, 2, 15, 16, 17, 32, 48, 64)
        },
    }
    variance = (256**2 - 1) / 12
    centred = drawn.float() - 127.5
    for name, other in others.items():
        mean = (centred * (other().float() - 127.5)).mean(dtype=torch.float64).item()
        deviations = mean / variance * math.sqrt(n)
        print(f"{name}: {deviations:+.2f}")
        assert abs(deviations) < 5


@pytest.mark.parametrize("m", [1.1, 0.37, -3e-5, 5e-10, 1.74])
def test_the_mean_of_many_roundings_is_that_of_float16(m):
    n, exponent = 1 << 20, 15
    param = Parameter(torch.zeros(n))
    optimizer = lpsgd.LPSGDM([param], lr=0.0, momentum=0.0, momentum_dtype=BYTE, foreach=False)
    param.grad = torch.full((n,), m)
    optimizer.step()
    held = _eager.decoded(buffers(optimizer)[0], exponent).double()
    exact = (torch.tensor(m) * 2.0**exponent).half().double().item() / 2.0**exponent
    deviation = held.std().item() / math.sqrt(n)
    assert deviation > 0.0
    assert abs(held.mean().item() - exact) < 5 * deviation
    assert held.unique().numel() == 2


# Steps


@how
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("exponent", [15, -3])
def test_a_step_keeps_what_the_reference_says(dtype, how, exponent):
    """momentum=0.5 and gradients of few bits: float32 holds every m exactly."""
    params = parameters((37,), (3, 70), dtype=dtype)
    others = copy.deepcopy(params)
    values = {"lr": 0.0, "momentum": 0.5, "momentum_dtype": BYTE, "momentum_exponent": exponent}
    optimizer = lpsgd.LPSGDM(params, seed=4, **values, **how)
    expected = [[0] * param.numel() for param in params]
    for step in range(3):
        for param in params:
            param.grad = torch.randn(param.shape).to(torch.bfloat16).to(dtype)
        optimizer.step()
        for stream, (param, held) in enumerate(zip(params, expected, strict=True)):
            for i, g in enumerate(param.grad.float().flatten().tolist()):
                m = 0.5 * of(held[i]) * 2.0**-exponent + 0.5 * g
                byte = reference_byte(4, step, stream, i)
                held[i] = reference_rounding(m, exponent, byte)
        assert [raw(buffer) for buffer in buffers(optimizer)] == expected
    assert same_bits(params, others)  # as lr is 0
    assert optimizer.param_groups[0]["rounding_step"] == 3


@how
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_parameter_moves_by_the_momentum_before_it_is_rounded(dtype, how):
    """The first step is that of float32 momentum; stochastic_rounding keeps its own bits."""
    for stochastic in (False, True):
        stepped = []
        for momentum_dtype in (torch.float32, BYTE):
            params = parameters((50,), (6, 7), dtype=dtype)
            optimizer = lpsgd.LPSGDM(
                params, 0.1, momentum_dtype=momentum_dtype, stochastic_rounding=stochastic, **how
            )
            steps(optimizer, params, [0])
            stepped.append(params)
        assert same_bits(*stepped)


@how
def test_bfloat16_momentum_of_other_parameters(how):
    """The bits of a bfloat16 parameter's momentum, by nearest rounding and stochastically."""
    for stochastic in (False, True):
        held = []
        for dtype in DTYPES:
            params = parameters((50,), (6, 7), dtype=torch.bfloat16)
            params = [Parameter(param.detach().to(dtype)) for param in params]
            optimizer = lpsgd.LPSGDM(
                params,
                momentum=0.5,
                momentum_dtype=torch.bfloat16,
                stochastic_rounding=stochastic,
                **how,
            )
            for _ in range(3):
                for param in params:
                    grad = torch.linspace(-2, 2, param.numel()).to(torch.bfloat16)
                    param.grad = grad.view(param.shape).to(dtype)
                optimizer.step()
            held.append(buffers(optimizer))
        assert all(buffer.dtype == torch.bfloat16 for group in held for buffer in group)
        assert same_bits(held[0], held[1])
        assert same_bits(held[0], held[2])


@pytest.mark.parametrize("momentum_dtype", [torch.bfloat16, BYTE])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64])
def test_other_parameters_keep_momentum_of_their_own_dtype(momentum_dtype, dtype):
    stepped = []
    for more in ({}, {"momentum_dtype": momentum_dtype}):
        params = parameters((5,), dtype=dtype)
        optimizer = lpsgd.LPSGDM(params, **more)
        steps(optimizer, params, range(2))
        assert buffers(optimizer)[0].dtype == dtype
        stepped += [params]
    assert torch.equal(*(params[0] for params in stepped))


@pytest.mark.parametrize(
    "step", [_eager.for_loop, partial(lpsgd_ext.lpsgdm_, momentum_dtype=BYTE)], ids=["eager", "C"]
)
def test_pieces_draw_the_bits_of_the_whole(step):
    whole, grad = torch.randn(1000), torch.randn(1000)
    common = {"lr": 0.1, "p": 2.0, "momentum_exponent": 9, "seed": 7, "step": 5}
    held, held_in_pieces = (torch.zeros(1000, dtype=BYTE) for _ in "12")
    pieces = torch.split(whole.clone(), [1, 599, 400])
    step([whole], [grad], [held], streams=[9], **common)
    step(
        list(pieces),
        list(torch.split(grad, [1, 599, 400])),
        list(torch.split(held_in_pieces, [1, 599, 400])),
        streams=[9] * 3,
        offsets=[0, 1, 600],
        **common,
    )
    assert torch.equal(whole, torch.cat(pieces))
    assert raw(held) == raw(held_in_pieces)


@how
@pytest.mark.parametrize("stochastic", [False, True])
def test_seeds_steps_and_parameters_draw_different_bytes(how, stochastic):
    def held(seed):
        params = [Parameter(torch.zeros(500)) for _ in "12"]
        more = {"stochastic_rounding": stochastic, **how}
        optimizer = lpsgd.LPSGDM(params, momentum=0.0, momentum_dtype=BYTE, seed=seed, **more)
        seen = []
        for _ in range(2):
            for param in params:
                param.grad = torch.full((500,), 1.1)
            optimizer.step()
            seen += [tuple(raw(buffer)) for buffer in buffers(optimizer)]
        return seen

    assert len({*held(0), *held(1)}) == 8
    assert held(1) == held(1)


@how
def test_saturated_and_damaged_momentum_goes_on(how):
    grad = torch.tensor([1e30, -math.inf, math.nan, 1e-30, 0.0, 1.0])
    param = Parameter(torch.zeros(6))
    optimizer = lpsgd.LPSGDM([param], momentum=0.5, momentum_dtype=BYTE, **how)
    param.grad = grad
    optimizer.step()
    held = raw(buffers(optimizer)[0])
    assert held[0] == 0x7B and held[1] == 0xFB and held[2] & 0x7F == 0x7E and held[3:5] == [0, 0]
    param.grad = torch.zeros(6)
    for _ in range(200):
        optimizer.step()
    held = _eager.decoded(buffers(optimizer)[0], 15)
    assert held[:2].tolist() == [0.0, 0.0] and held[2].isnan()  # they decay


# Arguments


@pytest.mark.parametrize(
    "values, error, text",
    [
        ({"momentum_exponent": 127}, ValueError, "Invalid momentum_exponent: 127"),
        ({"momentum_exponent": -127}, ValueError, "Invalid momentum_exponent: -127"),
        ({"momentum_exponent": 15.0}, TypeError, "momentum_exponent must be an int, not float"),
        ({"momentum_exponent": True}, TypeError, "momentum_exponent must be an int, not bool"),
        ({"momentum_exponent": None}, TypeError, "momentum_exponent must be an int, not NoneType"),
        ({"capturable": True}, RuntimeError, "float8_e5m2` does not support `capturable`"),
        ({"differentiable": True}, RuntimeError, "float8_e5m2` does not support `differentiable`"),
    ],
)
def test_values_that_do_not_fit_are_refused(values, error, text):
    params = parameters()
    with pytest.raises(error, match=text):
        lpsgd.LPSGDM(params, momentum_dtype=BYTE, **values)
    optimizer = lpsgd.LPSGDM(params[:1], momentum_dtype=BYTE)
    steps(optimizer, params[:1], [0])
    before = copy.deepcopy(params), raw(buffers(optimizer)[0])
    with pytest.raises(error, match=text):
        optimizer.add_param_group({"params": params[1:], **values})
    optimizer.param_groups[0].update(values)
    set_grads(params)
    with pytest.raises(error, match=text):
        optimizer.step()
    assert same_bits(params, before[0])
    assert raw(buffers(optimizer)[0]) == before[1]
    assert optimizer.param_groups[0]["rounding_step"] == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, BYTE])
def test_a_group_names_its_dtype(dtype):
    """torch.distributed.checkpoint refuses a dtype; by hand either may be written."""
    optimizer = lpsgd.LPSGDM(parameters((3,)), momentum_dtype=dtype)
    name = str(dtype).removeprefix("torch.")
    assert optimizer.param_groups[0]["momentum_dtype"] == name
    optimizer.add_param_group({"params": parameters((4,)), "momentum_dtype": name})
    for group in optimizer.param_groups:
        group["momentum_dtype"] = dtype
        steps(optimizer, group["params"], [0])
    assert {buffer.dtype for buffer in buffers(optimizer)} == {dtype}


# Checkpoints


def reloaded(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


WAYS = {
    "state_dict": lambda o, params: load(o, params, copy.deepcopy(o.state_dict())),
    "file": lambda o, params: load(o, params, reloaded(o.state_dict())),
    "deepcopy": lambda o, params: copy.deepcopy((o, params)),
    "pickle": lambda o, params: pickle.loads(pickle.dumps((o, params))),
}


def load(optimizer, params, state_dict):
    params = copy.deepcopy(params)
    resumed = lpsgd.LPSGDM(params, lr=9.0)  # its groups say the rest
    resumed.load_state_dict(state_dict)
    return resumed, params


@how
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_resumed_goes_on_with_the_same_bits(way, dtype, how):
    params = parameters((70,), (4, 5), dtype=dtype)
    values = {"momentum_dtype": BYTE, "momentum_exponent": 12, "seed": 3}
    optimizer = lpsgd.LPSGDM(params, 0.1, **values, **how)
    steps(optimizer, params, range(3))
    resumed, others = WAYS[way](optimizer, params)
    assert [buffer.dtype for buffer in buffers(resumed)] == [BYTE, BYTE]
    assert resumed.param_groups[0]["momentum_exponent"] == 12
    for one, group in ((optimizer, params), (resumed, others)):
        steps(one, group, range(3, 6))
    assert same_bits(params, others)
    assert same_bits(buffers(optimizer), buffers(resumed))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("old", [None, torch.float32, torch.bfloat16, BYTE])
@pytest.mark.parametrize("new", [None, torch.float32, torch.bfloat16, BYTE])
@pytest.mark.parametrize("where", ["in place", "in the checkpoint"])
def test_buffers_follow_the_dtype_of_their_group(dtype, old, new, where):
    """Exactly where that can be, else the nearest number."""
    params = parameters((70,), dtype=dtype)
    optimizer = lpsgd.LPSGDM(params, momentum_dtype=old, momentum_exponent=13)
    steps(optimizer, params, range(2))
    before = buffers(optimizer)[0]
    m = _eager.decoded(before, 13) if before.dtype == BYTE else before.float()
    loading, state_dict = optimizer, optimizer.state_dict()
    name = str(new).removeprefix("torch.") if new else None
    if where == "in place":
        optimizer.param_groups[0]["momentum_dtype"] = new
        state_dict = optimizer.state_dict()
    else:
        loading = lpsgd.LPSGDM(copy.deepcopy(params))
        state_dict["param_groups"][0]["momentum_dtype"] = name
    loading.load_state_dict(state_dict)
    (buffer,) = buffers(loading)
    expected_dtype = new or dtype
    assert buffer.dtype == expected_dtype
    if expected_dtype == BYTE:
        bound = torch.full((70,), 57344.0)
        expected = (m * 2.0**13).clamp(-bound, bound).to(BYTE)
        assert raw(buffer) == raw(expected)
    else:
        assert torch.equal(bits(buffer), bits(m.to(expected_dtype)))
    loading_params = loading.param_groups[0]["params"]
    steps(loading, loading_params, [2])


def test_loading_into_one_byte_rounds_to_nearest_and_saturates():
    param = Parameter(torch.zeros(5))
    optimizer = lpsgd.LPSGDM([param], momentum_dtype=torch.float32)
    m = torch.tensor([1.1, -1.9, math.inf, 2.0**-33, math.nan])
    optimizer.state[param]["momentum_buffer"] = m
    optimizer.param_groups[0]["momentum_dtype"] = "float8_e5m2"
    optimizer.load_state_dict(optimizer.state_dict())
    held = _eager.decoded(buffers(optimizer)[0], 15)
    assert held[:4].tolist() == [1.0, -1.75, 1.75, 0.0] and held[4].isnan()


def test_a_checkpoint_of_sgd_is_taken_into_one_byte():
    params = parameters((70,))
    sgd = torch.optim.SGD(params, lr=0.1, momentum=0.9)
    steps(sgd, params, range(2))
    optimizer = lpsgd.LPSGDM(params, momentum_dtype=BYTE, momentum_exponent=10)
    with pytest.warns(UserWarning, match="times 0.1"):
        optimizer.load_state_dict(sgd.state_dict())
    m = sgd.state[params[0]]["momentum_buffer"] * (1.0 - 0.9)
    assert raw(buffers(optimizer)[0]) == raw((m * 2.0**10).to(BYTE))
    steps(optimizer, params, [2])


def test_sgd_takes_one_byte_through_float32():
    params = parameters((70,))
    optimizer = lpsgd.LPSGDM(params, momentum_dtype=BYTE)
    steps(optimizer, params, range(2))
    m = _eager.decoded(buffers(optimizer)[0], 15)
    optimizer.param_groups[0]["momentum_dtype"] = "float32"
    optimizer.load_state_dict(optimizer.state_dict())
    sgd = torch.optim.SGD(params, lr=0.1, momentum=0.9)
    sgd.load_state_dict(optimizer.state_dict())
    assert torch.equal(sgd.state[params[0]]["momentum_buffer"], m)


def test_between_lpsgd_and_lpsgdm():
    params = parameters((70,))
    optimizer = lpsgd.LPSGDM(params, momentum_dtype=BYTE, momentum_exponent=12)
    steps(optimizer, params, range(2))
    other = lpsgd.LPSGD(params)
    with pytest.warns(UserWarning, match="the momentum buffers are dropped"):
        other.load_state_dict(optimizer.state_dict())
    assert not {"momentum_dtype", "momentum_exponent"} & other.param_groups[0].keys()
    group = {"params": params, "momentum_dtype": BYTE, "momentum_exponent": 11}
    again = lpsgd.LPSGDM([group])
    with pytest.warns(UserWarning, match="keep this optimizer's momentum"):
        again.load_state_dict(other.state_dict())
    assert again.param_groups[0]["momentum_dtype"] == "float8_e5m2"
    assert again.param_groups[0]["momentum_exponent"] == 11


def broken(name, value):
    def damage(state_dict):
        state_dict["param_groups"][0][name] = value

    return damage


def broken_buffer(make):
    def damage(state_dict):
        state = state_dict["state"][0]
        state["momentum_buffer"] = make(state["momentum_buffer"].float())

    return damage


@pytest.mark.parametrize(
    "damage, error",
    [
        (broken("momentum_exponent", 127), ValueError),
        (broken("momentum_exponent", 15.0), TypeError),
        (broken("momentum_exponent", True), TypeError),
        (broken("momentum_dtype", "float8_e4m3fn"), ValueError),
        (broken("momentum_dtype", torch.int8), ValueError),
        (broken_buffer(lambda m: m.to(torch.float8_e4m3fn)), ValueError),
        (broken_buffer(lambda m: m.to(torch.uint8)), ValueError),
    ],
)
def test_a_damaged_checkpoint_is_refused_and_nothing_changes(damage, error):
    params = parameters((70,))
    optimizer = lpsgd.LPSGDM(params, momentum_dtype=BYTE)
    steps(optimizer, params, range(2))
    state_dict = copy.deepcopy(optimizer.state_dict())
    damage(state_dict)
    before = str(optimizer.state_dict())
    with pytest.raises(error):
        optimizer.load_state_dict(state_dict)
    assert str(optimizer.state_dict()) == before


@how
@pytest.mark.parametrize(
    "wrong",
    [
        torch.zeros(70),
        torch.zeros(70, dtype=torch.uint8),
        torch.zeros(70, dtype=torch.float8_e4m3fn),
        torch.zeros(71, dtype=BYTE),
        torch.zeros(1, dtype=BYTE).expand(70),
        torch.zeros(70, dtype=BYTE, device="meta"),
        0.5,
    ],
    ids=str,
)
def test_a_malformed_buffer_is_refused_before_anything_is_written(wrong, how):
    params = parameters((5,), (70,))
    optimizer = lpsgd.LPSGDM(params, momentum_dtype=BYTE, **how)
    steps(optimizer, params, [0])
    optimizer.state[params[1]]["momentum_buffer"] = wrong
    before = copy.deepcopy(params), raw(buffers(optimizer)[0])
    set_grads(params)
    with pytest.raises((RuntimeError, TypeError, ValueError)):
        optimizer.step()
    assert same_bits(params, before[0])
    assert raw(buffers(optimizer)[0]) == before[1]
    assert optimizer.param_groups[0]["rounding_step"] == 1


def test_a_buffer_of_other_strides_is_stepped_by_its_elements():
    params, others = parameters((6, 7)), parameters((6, 7))
    optimizer, twin = (lpsgd.LPSGDM(group, momentum_dtype=BYTE) for group in (params, others))
    for one, group in ((optimizer, params), (twin, others)):
        steps(one, group, [0])
    state = optimizer.state[params[0]]
    state["momentum_buffer"] = state["momentum_buffer"].t().contiguous().t()
    for one, group in ((optimizer, params), (twin, others)):
        steps(one, group, [1])
    assert raw(buffers(optimizer)[0].contiguous()) == raw(buffers(twin)[0])


# torch.compile, suggest_pivot, momentum_report


def test_a_compiled_step_has_the_same_bits():
    made = []
    for compiled in (False, True):
        params = parameters((70,), (4, 5))
        optimizer = lpsgd.LPSGDM(params, 0.1, momentum_dtype=BYTE)
        step = optimizer.step
        if compiled:
            step = torch.compile(step, backend="aot_eager", fullgraph=True)
        for seed in range(3):
            set_grads(params, seed)
            step()
        made.append([*params, *buffers(optimizer)])
        assert optimizer.param_groups[0]["rounding_step"] == 3
    assert same_bits(*made)


def test_suggest_pivot_reads_what_one_byte_holds():
    params = parameters((5000,))
    pivots = []
    for momentum_dtype in (None, BYTE):
        optimizer = lpsgd.LPSGDM(
            params, 0.0, momentum=0.0, momentum_dtype=momentum_dtype, momentum_exponent=12
        )
        steps(optimizer, params, [0])
        pivots.append(lpsgd.suggest_pivot(optimizer))
    assert pivots[1] == pytest.approx(pivots[0], rel=0.02)


@pytest.mark.parametrize("momentum_dtype", [None, torch.float32, torch.bfloat16, BYTE])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64, torch.complex64])
def test_report_of_every_dtype(dtype, momentum_dtype):
    values = {"momentum": 0.0, "momentum_dtype": momentum_dtype, "momentum_exponent": 14}
    params = parameters((4,), (4,), (2,), dtype=dtype)
    optimizer = lpsgd.LPSGDM([{"params": params[:2]}, {"params": params[2:]}], **values)
    for param, grad in zip(
        params[:2], ([0.5, 0.0, 0.0, -1.75], [0.25, 0.0, 0.0, 0.0]), strict=True
    ):
        param.grad = torch.tensor(grad).to(dtype)
    optimizer.step()
    first, second = lpsgd.momentum_report(optimizer)
    parts = 2 if dtype.is_complex else 1
    zeros = 5 if not dtype.is_complex else 5 + 8
    assert first == (8 * parts, 0.0, zeros / (8 * parts), 1.75, 14)
    assert second == (0, 0.0, 0.0, 0.0, None)


@pytest.mark.parametrize("most", [1.75, 1.76, 1.0, 2.0**-40, 3e-5, 1e30])
def test_the_exponent_of_the_report_leaves_one_octave(most):
    param = Parameter(torch.zeros(3))
    optimizer = lpsgd.LPSGDM([param], momentum_dtype=torch.float32)
    optimizer.state[param]["momentum_buffer"] = torch.tensor([most, 0.0, -most / 3])
    (report,) = lpsgd.momentum_report(optimizer)
    assert 2.0 * report.largest * 2.0**report.exponent <= 57344.0
    assert 4.0 * report.largest * 2.0**report.exponent > 57344.0


def test_report_sees_saturation():
    param = Parameter(torch.zeros(8))
    optimizer = lpsgd.LPSGDM([param], momentum=0.0, momentum_dtype=BYTE, momentum_exponent=20)
    param.grad = torch.tensor([1.0, -1.0, 0.05, 0.0, 0.01, math.inf, math.nan, 1e-3])
    optimizer.step()
    (report,) = lpsgd.momentum_report(optimizer)
    assert report == (8, 3 / 8, 1 / 8, 57344.0 / 2**20, 19)
    (worst,) = lpsgd.momentum_report(
        lpsgd.LPSGDM([Parameter(torch.ones(1))], momentum_dtype=torch.float32)
    )
    assert worst.exponent is None
    with pytest.raises(TypeError, match="needs an LPSGDM, not LPSGD"):
        lpsgd.momentum_report(lpsgd.LPSGD([param]))
    with pytest.raises(TypeError, match="needs an LPSGDM, not SGD"):
        lpsgd.momentum_report(torch.optim.SGD([param], momentum=0.9))


# Training


@how
def test_small_gradients_and_large_momentum_are_not_lost(how):
    """What rounding to nearest would freeze: from momentum=0.95 on, momentum * m rounds to m."""
    n = 1 << 14
    param = Parameter(torch.zeros(n))
    optimizer = lpsgd.LPSGDM([param], momentum=0.98, momentum_dtype=BYTE, **how)
    for _ in range(100):
        param.grad = torch.full((n,), 1e-3)
        optimizer.step()
    held = _eager.decoded(buffers(optimizer)[0], 15).double()
    exact = 1e-3 * (1 - 0.98**100)
    assert held.mean().item() == pytest.approx(exact, rel=0.02)


@pytest.mark.parametrize("momentum, noise", [(0.8, 0.12), (0.9, 0.175), (0.98, 0.4)])
@pytest.mark.parametrize("kind", ["constant", "random"])
def test_the_noise_of_rounding_is_as_documented(kind, momentum, noise):
    """The error of the buffer, as a fraction of m, both as root mean squares. Where gradients are
    constant, m rests at two numbers of the buffer, whatever momentum is; where they are nothing but
    noise, each rounding adds .09 of m and momentum keeps what is left of the former ones."""
    n = 1 << 10
    sizes, generator = torch.logspace(-3, -2, n), torch.Generator().manual_seed(0)
    param, exact = Parameter(torch.zeros(n)), torch.zeros(n)
    optimizer = lpsgd.LPSGDM([param], lr=0.0, momentum=momentum, momentum_dtype=BYTE)
    for _ in range(4 * round(1 / (1 - momentum)) + 20):
        noise_now = torch.randn(n, generator=generator)
        param.grad = sizes if kind == "constant" else sizes * noise_now
        optimizer.step()
        exact = momentum * exact + (1 - momentum) * param.grad
    error = (_eager.decoded(buffers(optimizer)[0], 15) - exact) / sizes
    found = (error.norm() / (exact / sizes).norm()).item()
    print(f"\n{kind} gradients, momentum {momentum}: {found:.3f}")
    assert found == pytest.approx(0.08 if kind == "constant" else noise, rel=0.15)
