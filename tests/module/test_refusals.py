# SPDX-License-Identifier: MIT
"""Every input that lpsgd_ext refuses: a clear error, and every tensor as it was."""

import math
import re
import sys

import pytest
import torch
from torch.testing._internal.two_tensor import TwoTensor

import lpsgd_ext
from helpers import bits
from references import count_references, references_kept

BYTE = torch.float8_e5m2


class Subclass(torch.Tensor):
    pass


def good(n=4, dtype=torch.float32):
    return torch.linspace(-1, 1, n).to(dtype)


def freed():
    tensor = good()
    tensor.untyped_storage().resize_(0)
    return tensor


def shrunk():
    tensor = good()
    tensor.untyped_storage().resize_(8)
    return tensor


def shrunk_before_a_view():
    tensor = good(8)[4:]
    tensor.untyped_storage().resize_(16)
    return tensor


def misaligned():
    return torch.frombuffer(bytearray(17), dtype=torch.float32, offset=1)


def fake():
    with torch._subclasses.FakeTensorMode():
        return torch.empty(4)


# What stands in for one tensor of an otherwise good call, the exception and a word of its message.
BAD_TENSORS = {
    "None": (lambda: None, TypeError, "NoneType"),
    "a number": (lambda: 1.5, TypeError, "float"),
    "a list": (lambda: [1.0], TypeError, "list"),
    "subclass": (lambda: good().as_subclass(Subclass), TypeError, "Subclass"),
    "wrapper subclass": (lambda: TwoTensor(good(), good()), TypeError, "TwoTensor"),
    "FakeTensor": (fake, TypeError, "FakeTensor"),
    "negative bit": (lambda: torch._neg_view(good()), RuntimeError, "negative bit"),
    "one element with negative bit": (
        lambda: torch.zeros(1, dtype=torch.complex64).conj().imag,
        RuntimeError,
        "negative bit",
    ),
    "complex": (lambda: good(dtype=torch.complex64), TypeError, "complex64"),
    "conjugated": (lambda: good(dtype=torch.complex64).conj(), TypeError, "complex64"),
    "integer": (lambda: torch.arange(4), TypeError, "int64"),
    "bool": (lambda: torch.ones(4, dtype=torch.bool), TypeError, "bool"),
    "float8": (lambda: torch.zeros(4, dtype=torch.float8_e4m3fn), TypeError, "float8_e4m3fn"),
    "sparse COO": (lambda: good().to_sparse(), RuntimeError, ""),
    "meta": (lambda: torch.empty(4, device="meta"), (RuntimeError, ValueError), ""),
    "nested": (lambda: torch.nested.nested_tensor([good()]), RuntimeError, ""),
    "expanded": (lambda: torch.ones(1).expand(4), ValueError, "not dense"),
    "strided": (lambda: good(8)[::2], ValueError, "not dense"),
    "freed storage": (freed, RuntimeError, "storage"),
    "shrunk storage": (shrunk, RuntimeError, "storage"),
    "view beyond a shrunk storage": (shrunk_before_a_view, RuntimeError, "storage"),
    "misaligned": (misaligned, ValueError, "not aligned"),
    "uninitialized": (torch.nn.UninitializedParameter, TypeError, "UninitializedParameter"),
}
NAMES = ["params", "grads", "momentum_buffers"]


def call(lists, **kwargs):
    kwargs = {"lr": 0.1, "p": 4.0, **kwargs}
    if len(lists) == 2:
        return lpsgd_ext.lpsgd_(*lists, **kwargs)
    return lpsgd_ext.lpsgdm_(*lists, **kwargs)


def assert_refused(lists, exception, message, **kwargs):
    """The call raises, and every ordinary tensor in the lists keeps its bits."""
    ordinary = [
        t
        for tensors in lists
        for t in tensors
        if type(t) is torch.Tensor
        and t.layout == torch.strided
        and t.device.type == "cpu"
        and not t.is_nested
        and not t.is_complex()
        and not t.is_neg()
        and t.untyped_storage().nbytes() >= t.storage_offset() * t.itemsize + t.nbytes
    ]
    before = [t.clone() for t in ordinary]
    versions = [t._version for t in ordinary]
    objects = [*lists, *(t for tensors in lists for t in tensors if t is not None)]
    with references_kept(objects):
        for _ in range(50):
            with pytest.raises(exception, match=message):
                call(lists, **kwargs)
    for tensor, old, version in zip(ordinary, before, versions, strict=True):
        if tensor.dtype.is_floating_point:
            assert torch.equal(bits(tensor), bits(old))
        assert tensor._version == version


@pytest.mark.parametrize("lists, which", [(2, 0), (2, 1), (3, 0), (3, 1), (3, 2)])
@pytest.mark.parametrize("bad", BAD_TENSORS)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_bad_tensor_is_refused_by_name_and_index(lists, which, bad):
    make, exception, word = BAD_TENSORS[bad]
    size = 1 if bad.startswith("one element") else 4
    tensors = [[good(), good(size), good()] for _ in range(lists)]
    tensors[which][1] = make()
    where = re.escape(f"{NAMES[which]}[1]")
    assert_refused(tensors, exception, f"(?s){where}.*{word}")


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_refused_calls_leave_no_objects_or_references_behind():
    refused = []
    for bad in BAD_TENSORS:
        tensors = [[good(), good(1 if bad.startswith("one element") else 4)] for _ in range(3)]
        tensors[2][1] = BAD_TENSORS[bad][0]()
        refused.append((tensors, {}))
    refused += [([[good()] for _ in range(3)], {name: value}) for name, value, _ in BAD_VALUES]
    refused += [([[good()] for _ in range(3)], {name: "1"}) for name in ("lr", "seed", "streams")]
    refused += [([[good()] for _ in range(3)], values) for values, *_ in BAD_ROUNDING]
    refused += [([[good()] for _ in range(3)], {"streams": [None]})]

    def counts(rounds):
        for tensors, values in refused * rounds:
            try:
                call(tensors, **values)
            except (TypeError, ValueError, RuntimeError):
                continue
            pytest.fail("the call was not refused")
        return count_references(), sys.getallocatedblocks()

    counts(1)
    before = counts(1)
    assert all(abs(b - a) < 100 for a, b in zip(before, counts(200), strict=True))


@pytest.mark.parametrize("which", [1, 2])
@pytest.mark.parametrize(
    "other, exception, word",
    [
        (lambda: good(5), ValueError, "shape"),
        (lambda: good().reshape(2, 2), ValueError, "shape"),
        (lambda: good(dtype=torch.float64), TypeError, "dtype"),
        (lambda: good().to(torch.int32), TypeError, "dtype"),  # as wide
    ],
)
def test_mismatch_with_the_parameter_is_refused(which, other, exception, word):
    tensors = [[good(), good()] for _ in range(3)]
    tensors[which][1] = other()
    assert_refused(tensors, exception, re.escape(NAMES[which]) + rf"\[1\].*{word}")


@pytest.mark.parametrize("momentum_dtype", [torch.float32, torch.bfloat16, BYTE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_momentum_of_another_dtype_than_was_said_is_refused(dtype, momentum_dtype):
    name = str(momentum_dtype).removeprefix("torch.")
    others = [torch.float32, torch.bfloat16, torch.float16, BYTE, torch.float8_e4m3fn, torch.uint8]
    for other in others:
        if other is momentum_dtype:
            continue
        tensors = [[good(dtype=dtype) for _ in "12"] for _ in range(3)]
        tensors[2] = [good().to(momentum_dtype), good().to(other)]
        word = name if other in (*others[:3], momentum_dtype) else str(other)
        word = word if dtype is not momentum_dtype else "differs from the parameter in dtype"
        assert_refused(
            tensors,
            TypeError,
            rf"momentum_buffers\[1\].*({word}|{other})",
            momentum_dtype=momentum_dtype,
            seed=0,
        )


def test_float64_parameters_take_no_other_momentum():
    for momentum_dtype in (torch.float32, BYTE):
        tensors = [[good(dtype=torch.float64)] for _ in range(2)] + [[good().to(momentum_dtype)]]
        message = r"momentum_buffers\[0\]"
        assert_refused(tensors, TypeError, message, momentum_dtype=momentum_dtype, seed=0)


@pytest.mark.parametrize("which", [0, 1])
def test_a_parameter_and_a_gradient_of_one_byte_are_refused(which):
    tensors = [[good()], [good()], [good().to(BYTE)]]
    tensors[which] = [good().to(BYTE)]
    message = rf"{NAMES[which]}\[0\] has dtype torch.float8_e5m2, but float32, float64, bfloat16"
    assert_refused(tensors, TypeError, message, momentum_dtype=BYTE, seed=0)


@pytest.mark.parametrize(
    "change, exception, word",
    [
        (lambda m: m[:5], ValueError, "shape"),
        (lambda m: m.t().contiguous().t(), ValueError, "strides"),
        (lambda m: m[:1].expand(6, 7), ValueError, "not dense"),
        (lambda m: torch.zeros(6, 14).to(BYTE)[:, ::2], ValueError, "not dense"),
        (lambda m: m.to("meta"), (RuntimeError, ValueError), ""),
    ],
)
def test_a_buffer_of_bytes_must_match_its_parameter(change, exception, word):
    tensors = [[good(42).view(6, 7) for _ in "12"] for _ in range(3)]
    tensors[2] = [buffer.to(BYTE) for buffer in tensors[2]]
    tensors[2][1] = change(tensors[2][1])
    message = rf"momentum_buffers\[1\].*{word}"
    assert_refused(tensors, exception, message, momentum_dtype=BYTE, seed=0)


def test_a_buffer_of_bytes_beyond_its_storage_is_refused():
    tensors = [[good(42)], [good(42)], [good(42).to(BYTE)]]
    call(tensors, momentum_dtype=BYTE, seed=0)  # remembered from now on
    tensors[2][0].untyped_storage().resize_(41)
    assert_refused(tensors, RuntimeError, "storage", momentum_dtype=BYTE, seed=0)


@pytest.mark.parametrize("side", [2, 3])  # 2 is the least for which strides mean anything
def test_other_strides_than_the_parameter_are_refused(side):
    square = good(side * side).reshape(side, side)
    assert_refused([[square.clone()], [square.clone().t()]], ValueError, r"grads\[0\].*strides")


@pytest.mark.parametrize("which", [0, 1, 2])
def test_lists_of_different_lengths_are_refused(which):
    tensors = [[good(), good()] for _ in range(3)]
    tensors[which].pop()
    assert_refused(tensors, ValueError, "same number of tensors")


@pytest.mark.parametrize("bad", [None, 3, good(), iter(()), {"a": 1}])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_other_sequences_are_refused(which, bad):
    tensors = [[good()] for _ in range(3)]
    tensors[which] = bad
    with pytest.raises(TypeError, match=f"'{NAMES[which]}' must be list or tuple"):
        call(tensors)


def overlaps():
    whole = good(12)
    shared = good()
    yield "the same parameter twice", [[shared, shared], [good(), good()], [good(), good()]]
    yield "parameters overlap", [[whole[:4], whole[3:7]], [good(), good()], [good(), good()]]
    yield "gradient is the parameter", [[shared], [shared], [good()]]
    yield "buffer is the parameter", [[shared], [good()], [shared]]
    yield "buffer is the gradient", [[good()], [shared], [shared]]
    yield (
        "a gradient reaches into another's buffer",
        [[good(), good()], [good(), whole[2:6]], [whole[4:8], good()]],
    )
    yield "nested", [[whole, good()], [good(12), good()], [good(12), whole[4:8]]]


@pytest.mark.parametrize("lists", [pytest.param(lists, id=name) for name, lists in overlaps()])
def test_overlap_with_written_memory_is_refused(lists):
    assert_refused(lists, ValueError, "share memory")


def test_bytes_may_lie_side_by_side_but_not_one_upon_another():
    """Behind the first parameter, and at any address."""
    memory = torch.zeros(64, dtype=torch.uint8)
    for first, second, allowed in (
        (16, 20, True),
        (17, 21, True),
        (15, 20, False),
        (17, 20, False),
    ):
        buffers = [memory[start : start + 4].view(BYTE) for start in (first, second)]
        tensors = [[memory[:16].view(torch.float32), good()], [good(), good()], buffers]
        if allowed:
            call(tensors, momentum_dtype=BYTE, seed=0)
        else:
            assert_refused(tensors, ValueError, "share memory", momentum_dtype=BYTE, seed=0)


def test_gradients_may_share_memory():
    grad = good()
    params = [torch.zeros(4), torch.zeros(4)]
    call([params, [grad, grad]])
    assert torch.equal(*params)


BAD_VALUES = [
    ("lr", -1.0, "Invalid learning rate: -1.0"),
    ("lr", math.nan, "Invalid learning rate: nan"),
    ("p", 1.5, "Invalid p value: 1.5"),
    ("p", math.nan, "Invalid p value: nan"),
    ("p", -math.inf, "Invalid p value: -inf"),
    ("momentum", 1.0, "Invalid momentum value: 1.0"),
    ("momentum", -0.1, "Invalid momentum value: -0.1"),
    ("momentum", math.nan, "Invalid momentum value: nan"),
    ("weight_decay", -1e-9, "Invalid weight_decay value: -1e-09"),
    ("eps", -1e-9, "Invalid epsilon value: -1e-09"),
    ("eps", math.nan, "Invalid epsilon value: nan"),
    ("pivot", 0.0, "Invalid pivot value: 0.0"),
    ("pivot", math.inf, "Invalid pivot value: inf"),
]


BAD_ROUNDING = [
    *(
        ({"momentum_dtype": value, "seed": 0}, ValueError, f"Invalid momentum_dtype: {value}")
        for value in (torch.float16, torch.float64, torch.float8_e4m3fn, torch.uint8, "float16", "")
    ),
    *(
        (
            {"momentum_dtype": value, "seed": 0},
            TypeError,
            "lpsgdm_(): argument 'momentum_dtype' must be torch.dtype",
        )
        for value in (1, True, torch.Tensor, torch.ones(1), b"float32")
    ),
    *(
        ({"momentum_exponent": value}, ValueError, f"Invalid momentum_exponent: {value}")
        for value in (127, -127, 2**31, -(2**31), 2**40, 2**64 + 15, -(10**30))
    ),
    *(
        ({"momentum_exponent": value}, TypeError, "argument 'momentum_exponent' must be int")
        for value in (15.0, True, None, "15", torch.tensor(15))
    ),
    *(
        ({"stochastic_rounding": value, "seed": 0}, TypeError, "'stochastic_rounding' must be bool")
        for value in (1, 0.0, "True", torch.tensor(True))
    ),
    ({"stochastic_rounding": True}, TypeError, "argument 'seed' must be int where something is"),
    ({"momentum_dtype": BYTE}, TypeError, "argument 'seed' must be int where something is"),
    ({"seed": 1.0}, TypeError, "argument 'seed' must be int"),
    ({"seed": 1, "step": 1.0}, TypeError, "argument 'step' must be int"),
    ({"streams": [1, 2]}, TypeError, "'streams' must be list or tuple of one int for each"),
    ({"offsets": [1.0]}, TypeError, "'offsets' must have an int for each parameter"),
]


@pytest.mark.parametrize("values, exception, message", BAD_ROUNDING, ids=str)
def test_values_of_rounding_that_no_step_can_use_are_refused(values, exception, message):
    tensors = [[good(dtype=torch.bfloat16)] for _ in range(3)]
    if values.get("momentum_dtype") is BYTE:
        tensors[2] = [good().to(BYTE)]
    assert_refused(tensors, exception, re.escape(message), **values)


@pytest.mark.parametrize("name, value, message", BAD_VALUES)
def test_value_out_of_range_is_refused(name, value, message):
    assert_refused([[good()] for _ in range(3)], ValueError, message, **{name: value})


@pytest.mark.parametrize("name", ["lr", "p", "momentum", "weight_decay", "eps", "pivot"])
@pytest.mark.parametrize("value", [None, "0.1", [0.1], 1j])
def test_value_that_is_no_number_is_refused(name, value):
    message = f"argument '{name}' must be float"
    assert_refused([[good()] for _ in range(3)], TypeError, message, **{name: value})


def test_missing_and_unknown_arguments_are_refused():
    lists = [[good()], [good()]]
    with pytest.raises(TypeError, match="missing required keyword-only argument: 'lr'"):
        lpsgd_ext.lpsgd_(*lists, p=4.0)
    with pytest.raises(TypeError, match="missing required keyword-only argument: 'p'"):
        lpsgd_ext.lpsgd_(*lists, lr=0.1)
    with pytest.raises(TypeError, match="momentum"):
        lpsgd_ext.lpsgd_(*lists, lr=0.1, p=4.0, momentum=0.9)
    with pytest.raises(TypeError, match="positional"):
        lpsgd_ext.lpsgd_(*lists, 0.1, 4.0)


def test_inside_a_transform_the_step_is_refused():
    def step(x):
        lpsgd_ext.lpsgd_([x], [good(2)], lr=0.1, p=4.0)
        return x

    with pytest.raises((RuntimeError, TypeError), match=r"params\[0\]"):
        torch.vmap(step)(torch.ones(3, 2))


def test_the_last_of_many_bad_tensors_leaves_the_first_untouched():
    params = [good() for _ in range(1000)]
    lists = [params, [good() for _ in params], [good() for _ in params]]
    lists[2][999] = good(5)
    assert_refused(lists, ValueError, r"momentum_buffers\[999\]")


@pytest.mark.parametrize(
    "arguments", [(0.5, 10, 6), (1, 0, 6), (1, 10, 1.9), (1, 10, 6, 1.0), (1, 10, math.inf)]
)
def test_schedule_out_of_range_is_refused(arguments):
    with pytest.raises(ValueError, match="Invalid"):
        lpsgd_ext.cosine_p(*arguments)


def test_rho_out_of_range_is_refused():
    for bad in (1.9, math.nan, -math.inf):
        with pytest.raises(ValueError, match="Invalid p value"):
            lpsgd_ext.rho(bad)
    with pytest.raises(TypeError, match="argument 'p'"):
        lpsgd_ext.rho("6")


@pytest.mark.parametrize("value", [0, -1])
def test_accumulate_below_1_is_refused(value):
    lists = [[good()] for _ in range(3)]
    assert_refused(lists, ValueError, f"Invalid accumulate: {value}", accumulate=value)
