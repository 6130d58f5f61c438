# SPDX-License-Identifier: MIT
"""What Python computes once more is what C computes, bit for bit; and so are the errors."""

import re

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import lpsgd_ext
from helpers import ROOT
from lpsgd import _reference
from lpsgd._values import check_ranges

numbers = st.floats() | st.integers(0, 30).map(float) | st.floats(0.5, 40.0)
many = settings(max_examples=200, deadline=None)
some = settings(max_examples=100, deadline=None)


def outcome(function, *arguments, **values):
    """The result's bits, or the error."""
    try:
        return function(*arguments, **values).hex()
    except Exception as error:
        return type(error), str(error)


@many
@given(numbers)
def test_rho_is_cs(p):
    assert outcome(_reference.rho, p) == outcome(lpsgd_ext.rho, p)


@many
@given(st.tuples(*[numbers] * 4) | st.tuples(*[st.floats(2.0, 1e3)] * 4))
@example((1.0, 1.0, 6.0, 2.0))
@example((2.0, 1.0, 6.0, 2.0))
@example((3.0, 5.0, 6.0, 2.0))
@example((2.0, 1e300, 1.7e308, 2.0))
@example((2.0, 1e9, 3.1, 85.0))  # would begin below its ends
def test_the_schedule_is_cs(values):
    assert outcome(_reference.cosine_p, *values) == outcome(lpsgd_ext.cosine_p, *values)


@many
@given(st.integers(1, 10**6), st.data())
def test_every_epoch_of_a_schedule_is_cs(total, data):
    values = data.draw(st.integers(1, total)), total, data.draw(st.floats(2.0, 100.0)), 2.5
    assert outcome(_reference.cosine_p, *values) == outcome(lpsgd_ext.cosine_p, *values)


@pytest.mark.parametrize(
    "value",
    ["6", None, 1j, [6.0], 10**400, True, np.float32(6.5), torch.tensor(6.5), torch.ones(2)],
)
def test_other_types_are_taken_or_refused_as_by_c(value):
    assert outcome(_reference.rho, value) == outcome(lpsgd_ext.rho, value)
    for values in ({"s": value}, {"p_min": value}):
        values = {"s": 3, "total": 9, "p_max": 7, **values}
        assert outcome(_reference.cosine_p, **values) == outcome(lpsgd_ext.cosine_p, **values)


RANGED = ("lr", "p", "momentum", "weight_decay", "eps", "pivot", "grad_scale")


@many
@given(st.lists(st.floats() | st.sampled_from([0.0, 0.5, 1.0, 2.0]), min_size=7, max_size=7))
def test_hyper_parameters_are_refused_as_by_c(values):
    values = dict(zip(RANGED, values, strict=True))
    refusals = []
    for check in (check_ranges, lambda values: lpsgd_ext.lpsgdm_([], [], [], **values)):
        try:
            check(values)
            refusals.append("")
        except ValueError as error:
            refusals.append(str(error).partition(" (")[0])
    assert refusals[0] == refusals[1]


wide = st.integers(-(1 << 70), 1 << 70)
places = {"seed": wide, "step": wide, "stream": wide, "offset": st.integers(0, 1 << 62)}
N = 200


def draw(function, seed, step, stream, offset):
    return function(torch.empty(N), seed, step, stream, offset).tolist()


def in_c(function, *lists, seed, step, stream, offset, **values):
    function(*lists, p=2.0, seed=seed, step=step, streams=[stream], offsets=[offset], **values)


@some
@given(st.fixed_dictionaries(places), st.integers(0, N - 1))
def test_random_bits_of_parameters_are_cs(place, i):
    """1 + k / 65536 units in the last place is rounded up if k + the bits reach 65536: so C's are
    those that are expected if they make the difference for one k, but not for the one before."""
    expected = draw(_reference.random_bits, **place)[i] & 0xFFFF
    for k in (65536 - expected, 65535 - expected):
        param, grad = torch.zeros(2, N, dtype=torch.bfloat16)
        grad.fill_(-1.0)
        if k < 65536:
            in_c(lpsgd_ext.lpsgd_, [param], [grad], lr=1.0 + k * 2.0**-23, **place)
            assert (param[i] > 1.0) == (k + expected == 65536)


@some
@given(st.fixed_dictionaries(places), st.integers(0, N - 1))
def test_random_bits_of_momentum_are_cs(place, i):
    expected = draw(_reference.random_bits, **place)[i] >> 16
    for k in (65536 - expected, 65535 - expected):
        if k < 65536:
            held = momentum_in_c(1.0 + k * 2.0**-23, torch.bfloat16, place)
            assert (held[i] > 1.0) == (k + expected == 65536)


@some
@given(st.fixed_dictionaries(places), st.integers(0, N - 1))
def test_random_bytes_are_cs(place, i):
    expected = draw(_reference.random_bytes, **place)[i]
    for k in (256 - expected, 255 - expected):
        if k < 256:
            held = momentum_in_c(1.0 + k * 2.0**-10, torch.float8_e5m2, place)
            assert (held[i] > 1.0) == (k + expected == 256)


def momentum_in_c(grad, dtype, place):
    """The buffer after a step without momentum."""
    param, buffer = torch.zeros(N), torch.zeros(N, dtype=dtype)
    values = {"lr": 0.0, "momentum": 0.0, "momentum_dtype": dtype, "momentum_exponent": 0}
    lists = [param], [torch.full((N,), grad)], [buffer]
    in_c(lpsgd_ext.lpsgdm_, *lists, **values, **place)
    return buffer.float()


def test_the_reference_has_what_the_classes_ask_lpsgd_ext():
    source = "".join(path.read_text() for path in (ROOT / "python" / "lpsgd").glob("*.py"))
    names = set(re.findall(r"\blpsgd_ext\.(\w+)\(", source)) | {"CudaError"}
    of_cuda = {"cuda_refusal", "cuda_scratch_size"}  # of tensors that lpsgd_ext may step
    assert of_cuda < names
    for name in names - of_cuda:
        assert callable(getattr(_reference, name)) and hasattr(lpsgd_ext, name), name
    assert _reference.build_info().keys() == lpsgd_ext.build_info().keys()
