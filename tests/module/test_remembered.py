# SPDX-License-Identifier: MIT
"""lpsgd_ext remembers what it checked in earlier calls: nothing that changed since gets past it."""

import random

import pytest
import torch

import lpsgd_ext
from helpers import bits


def lists(n=3, size=4):
    return [[torch.linspace(-1, 1, size) for _ in range(n)] for _ in range(3)]


def step(tensors):
    lpsgd_ext.lpsgdm_(*tensors, lr=0.1, p=4.0)


def shrink(tensors, which):
    tensors[which][1].untyped_storage().resize_(4)


def free(tensors, which):
    tensors[which][1].untyped_storage().resize_(0)


def negate(tensors, which):
    tensors[which][1] = torch._neg_view(tensors[which][1])


def make_complex(tensors, which):
    tensors[which][1] = torch.zeros(4, dtype=torch.complex64)


def set_other_data(tensors, which):
    tensors[which][1].data = torch.zeros(5)


def overlap_the_first(tensors, which):
    tensors[which][1] = tensors[0][0].view(-1)


def take_the_memory_of_the_first(tensors, which):
    tensors[which][1].set_(tensors[0][0])


CHANGES = [
    *(shrink, free, negate, make_complex, set_other_data),
    *(overlap_the_first, take_the_memory_of_the_first),
]


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("change", CHANGES)
def test_change_after_a_good_call_is_refused_and_the_next_good_call_works(change, which):
    tensors = lists()
    for _ in range(2):
        step(tensors)
    intact = list(tensors[which])
    if change in (shrink, free, set_other_data, take_the_memory_of_the_first):
        tensors[which][1] = intact[1].clone()
        step(tensors)
    change(tensors, which)
    before = [t.clone() for t in (tensors[0][0], tensors[2][2])]
    for _ in range(2):
        with pytest.raises((TypeError, ValueError, RuntimeError)):
            step(tensors)
    assert torch.equal(tensors[0][0], before[0]) and torch.equal(tensors[2][2], before[1])
    tensors[which][1] = intact[1]
    step(tensors)
    assert not torch.equal(tensors[0][0], before[0])


@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_storage_that_shrank_and_moved_back_is_refused(which):
    tensors = lists(size=1024)
    step(tensors)
    tensor = tensors[which][1]
    storage, address = tensor.untyped_storage(), tensor.data_ptr()
    for size in random.Random(0).choices(range(64, 4096), k=10_000):
        storage.resize_(size)
        if tensor.data_ptr() == address:
            break
    else:
        pytest.skip("this allocator does not give the same memory again")
    with pytest.raises(RuntimeError, match="reaches beyond its storage"):
        step(tensors)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_memory_that_is_read_as_negative_later_is_refused(which):
    values = torch.linspace(-1, 1, 8)
    tensors = lists(size=4)
    tensors[which][1] = values.as_strided((4,), (1,), 1)
    step(tensors)
    negated = torch.view_as_complex(values.view(4, 2)).conj().imag.as_strided((4,), (1,))
    tensors[which][1].data = negated  # an imaginary part has gaps, until it is viewed like this
    assert negated.data_ptr() == values[1:].data_ptr() and tensors[which][1].is_neg()
    with pytest.raises(RuntimeError, match="negative bit"):
        step(tensors)


@pytest.mark.parametrize("which", [0, 2])
def test_inference_tensor_that_passed_in_inference_mode_is_refused_outside(which):
    tensors = lists()
    with torch.inference_mode():
        tensors[which][1] = tensors[which][1].clone()
        step(tensors)
    with pytest.raises(RuntimeError, match=r"\[1\] is an inference tensor"):
        step(tensors)


def test_more_lists_than_are_remembered_keep_their_own_bits():
    many = [lists(n) for n in range(1, 13)]
    alone = [[[t.clone() for t in ts] for ts in tensors] for tensors in many]
    for _ in range(3):
        for tensors in many:
            step(tensors)
    for tensors in alone:
        for _ in range(3):
            step(tensors)
    for a, b in zip(many, alone, strict=True):
        for x, y in zip(a[0] + a[2], b[0] + b[2], strict=True):
            assert torch.equal(bits(x), bits(y))


def test_the_same_parameters_in_another_order_and_with_other_partners():
    tensors = lists()
    step(tensors)
    expected = [t.clone() for t in tensors[0]], [t.clone() for t in tensors[2]]
    order = [0, 2, 1]
    step([[ts[i] for i in order] for ts in tensors])
    step([*expected[:1], tensors[1], expected[1]])
    for x, y in zip(tensors[0], expected[0], strict=True):
        assert torch.equal(bits(x), bits(y))


def test_gradients_made_anew_and_moved_parameters_step_like_a_first_call():
    kept, fresh = lists(), lists()
    for i in range(5):
        grads = [torch.full((4,), float(i + j)) for j in range(3)]
        kept[1] = grads
        if i == 3:
            kept[0][1].data = kept[0][1].clone()
        step(kept)
        copies = [[t.clone() for t in ts] for ts in (fresh[0], grads, fresh[2])]
        step(copies)
        fresh = copies
    for x, y in zip(kept[0] + kept[2], fresh[0] + fresh[2], strict=True):
        assert torch.equal(bits(x), bits(y))


def test_the_same_memory_with_a_wider_dtype_is_checked_for_alignment():
    param = torch.frombuffer(bytearray(66), dtype=torch.float16, offset=2)
    lpsgd_ext.lpsgd_([param], [torch.ones(32, dtype=torch.float16)], lr=0.1, p=4.0)
    param.data = param.view(torch.float32)
    with pytest.raises(ValueError, match=r"params\[0\] is not aligned"):
        lpsgd_ext.lpsgd_([param], [torch.ones(16)], lr=0.1, p=4.0)
