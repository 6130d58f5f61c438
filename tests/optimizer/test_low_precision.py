# SPDX-License-Identifier: MIT
"""momentum_dtype=torch.float32 and stochastic_rounding=True: bfloat16 that really trains."""

import copy
import io
import math

import pytest
import torch
from torch.nn import Parameter

import lpsgd
import lpsgd_ext
from helpers import CLASSES, bits
from lpsgd import _reference

HALF = [torch.bfloat16, torch.float16]
HOW = [{}, {"foreach": True}, {"foreach": False}]


def randn(*shape, seed=0, dtype=torch.bfloat16):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def run(cls, params, steps, **values):
    """Steps with seeded gradients of the parameters' dtype; returns the optimizer."""
    optimizer = cls(params, **{"lr": 1e-3, "p": 4.0, **values})
    for step in steps:
        for i, param in enumerate(params):
            param.grad = randn(*param.shape, seed=100 * step + i, dtype=param.dtype)
        optimizer.step()
    return optimizer


def same(params, others):
    return all(torch.equal(bits(a), bits(b)) for a, b in zip(params, others, strict=True))


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("how", HOW)
def test_float32_momentum_has_the_bits_of_float32_arithmetic(dtype, how):
    param = Parameter(randn(1000, dtype=dtype))
    optimizer = run(lpsgd.LPSGDM, [param], range(3), momentum_dtype=torch.float32, **how)
    buffer = optimizer.state[param]["momentum_buffer"]
    assert buffer.dtype == torch.float32
    expected = torch.zeros(1000)
    for step in range(3):
        grad = randn(1000, seed=100 * step, dtype=dtype).float()
        expected = (expected * 0.9).add(grad, alpha=1.0 - 0.9)
    torch.testing.assert_close(buffer, expected, rtol=3e-7, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_momentum_dtype_concerns_half_types_alone(dtype):
    param = Parameter(randn(5, dtype=dtype))
    optimizer = run(lpsgd.LPSGDM, [param], range(1), momentum_dtype=torch.float32)
    assert optimizer.state[param]["momentum_buffer"].dtype == dtype


@pytest.mark.parametrize("dtype", HALF)
def test_a_buffer_of_the_wrong_dtype_is_refused(dtype):
    wrongs = [(None, torch.float32), (torch.float32, dtype), (torch.float8_e5m2, torch.float32)]
    wrongs += [(torch.float32, torch.float8_e5m2), (torch.bfloat16, torch.float32)]
    for momentum_dtype, wrong in wrongs:
        params = [Parameter(randn(5, dtype=dtype)) for _ in range(2)]
        optimizer = lpsgd.LPSGDM(params, momentum_dtype=momentum_dtype)
        optimizer.state[params[1]]["momentum_buffer"] = torch.zeros(5, dtype=wrong)
        before = copy.deepcopy(params)
        for param in params:
            param.grad = torch.ones_like(param)
        with pytest.raises((TypeError, RuntimeError), match=r"dtype|float32"):
            optimizer.step()
        assert same(params, before)


@pytest.mark.parametrize("value", [torch.float8_e4m3fn, torch.float64, "float16", 8])
def test_other_momentum_dtypes_are_refused(value):
    with pytest.raises(ValueError, match="Invalid momentum_dtype"):
        lpsgd.LPSGDM([Parameter(randn(5))], momentum_dtype=value)


@pytest.mark.parametrize("seed", [1.5, None, "1"])
def test_a_seed_that_is_no_int_is_refused(seed):
    with pytest.raises(TypeError, match="seed must be an int"):
        lpsgd.LPSGD([Parameter(randn(5))], seed=seed)


@pytest.mark.parametrize("saved_with, loaded_with", [(torch.float32, None), (None, torch.float32)])
@pytest.mark.parametrize("dtype", HALF)
def test_checkpoint_keeps_the_bits_of_float32_momentum(dtype, saved_with, loaded_with):
    """Also where the optimizer that loads was made without momentum_dtype: the group says it."""
    params = [Parameter(randn(50, dtype=dtype)), Parameter(randn(7, dtype=dtype))]
    optimizer = run(lpsgd.LPSGDM, params, range(3), momentum_dtype=saved_with)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    others = copy.deepcopy(params)
    loaded = lpsgd.LPSGDM(others, momentum_dtype=loaded_with)
    seen = []
    loaded.register_load_state_dict_post_hook(
        lambda optimizer: seen.extend(s["momentum_buffer"] for s in optimizer.state.values())
    )
    loaded.load_state_dict(torch.load(file, weights_only=True))
    expected = [state["momentum_buffer"] for state in optimizer.state.values()]
    assert same(seen, expected)
    for one, group in ((optimizer, params), (loaded, others)):
        for param in group:
            param.grad = torch.ones_like(param)
        one.step()
    assert same(params, others)


def test_a_bfloat16_checkpoint_goes_on_with_float32_momentum():
    params = [Parameter(randn(50))]
    saved = run(lpsgd.LPSGDM, params, range(2)).state_dict()
    del saved["param_groups"][0]["momentum_dtype"]
    optimizer = lpsgd.LPSGDM(params, momentum_dtype=torch.float32)
    optimizer.load_state_dict(saved)
    buffer = optimizer.state[params[0]]["momentum_buffer"]
    assert buffer.dtype == torch.float32
    assert torch.equal(buffer, saved["state"][0]["momentum_buffer"].float())
    params[0].grad = torch.ones_like(params[0])
    optimizer.step()


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("shape", [(1,), (37,), (8, 129), (3, 4, 5, 6), ()])
@pytest.mark.parametrize("momentum_dtype", [None, torch.float32])
@pytest.mark.parametrize("seed", [5, -5])
def test_c_and_eager_draw_the_same_random_bits(cls, shape, momentum_dtype, seed):
    """p = 2 without momentum rounds the same float32 numbers in both, so the bits agree."""
    values = {"p": 2.0, "lr": 2.0**-6, "stochastic_rounding": True, "seed": seed}
    if cls is lpsgd.LPSGDM:
        values |= {"momentum": 0.5, "momentum_dtype": momentum_dtype}
    params, others = (
        [Parameter(randn(*shape)) for _ in "12"],
        [Parameter(randn(*shape)) for _ in "12"],
    )
    run(cls, params, range(3), fused=True, **values)
    run(cls, others, range(3), foreach=False, **values)
    assert same(params, others)
    unrounded = [Parameter(randn(*shape)) for _ in "12"]
    run(cls, unrounded, range(3), **values | {"stochastic_rounding": False})
    assert params[0].numel() < 10 or not same(params, unrounded)


def test_eager_numbers_elements_as_they_lie_in_memory():
    param = randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    flat = randn(120)
    drawn = _reference.random_bits(param, 1, 2, 3, 4)
    expected = _reference.random_bits(flat, 1, 2, 3, 4)
    assert torch.equal(drawn.permute(0, 2, 3, 1).flatten(), expected)
    assert torch.equal(_reference.random_bits(flat[7:], 1, 2, 3, 11), expected[7:])
    assert expected.min() >= 0 and expected.max() < 1 << 32


@pytest.mark.parametrize("cls", CLASSES)
def test_the_mean_is_exact_where_rounding_to_nearest_stalls(cls):
    """An update of 1/8 of a unit in the last place: all elements stay, or one in eight moves."""
    unit, numel, steps = 2.0**-7, 1 << 14, 16
    values = {"lr": unit / 8, "p": 2.0} | ({"momentum": 0.0} if cls is lpsgd.LPSGDM else {})
    moved = []
    for stochastic in (False, True):
        param = Parameter(torch.full((numel,), 1.5, dtype=torch.bfloat16))
        optimizer = cls([param], stochastic_rounding=stochastic, **values)
        for _ in range(steps):
            param.grad = torch.ones_like(param)
            optimizer.step()
        moved.append((1.5 - param.detach().double()).mean().item() / unit)
    assert moved[0] == 0.0
    deviation = math.sqrt(steps * (1 / 8) * (7 / 8) / numel)
    assert abs(moved[1] - steps / 8) < 5 * deviation


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("how", HOW)
def test_a_run_goes_on_from_a_checkpoint_with_the_same_random_bits(cls, how):
    values = {"stochastic_rounding": True, "seed": 3, **how}
    whole = [Parameter(randn(300)), Parameter(randn(4, 5))]
    run(cls, whole, range(6), **values)
    params = [Parameter(randn(300)), Parameter(randn(4, 5))]
    saved = run(cls, params, range(3), **values).state_dict()
    assert saved["param_groups"][0]["rounding_step"] == 3
    optimizer = cls(params, lr=9.0)
    optimizer.load_state_dict(saved)
    for step in range(3, 6):
        for i, param in enumerate(params):
            param.grad = randn(*param.shape, seed=100 * step + i)
        optimizer.step()
    assert same(params, whole)


@pytest.mark.parametrize("cls", CLASSES)
def test_seeds_steps_and_parameters_draw_different_bits(cls):
    def rounded(**values):
        params = [Parameter(torch.full((1000,), 1.5, dtype=torch.bfloat16)) for _ in range(2)]
        optimizer = cls(params, lr=1e-3, p=2.0, stochastic_rounding=True, **values)
        results = []
        for _ in range(2):
            for param in params:
                param.data.fill_(1.5)
                param.grad = torch.full_like(param, 3.0)
                optimizer.state.clear()
            optimizer.step()
            results += [param.detach().clone() for param in params]
        return results

    results = rounded(seed=0) + rounded(seed=1) + rounded(seed=-1)
    for i, a in enumerate(results):
        assert not any(torch.equal(a, b) for b in results[:i])
    assert all(map(torch.equal, rounded(seed=1), rounded(seed=1)))


@pytest.mark.parametrize("cls", CLASSES)
def test_bits_belong_to_the_parameter_whoever_else_has_a_gradient(cls):
    def second(first_has_gradient):
        params = [Parameter(randn(30)), Parameter(randn(30))]
        optimizer = cls([{"params": params[:1]}, {"params": params[1:]}], stochastic_rounding=True)
        for param in params[0 if first_has_gradient else 1 :]:
            param.grad = torch.ones_like(param)
        optimizer.step()
        return params[1]

    assert torch.equal(second(True), second(False))


@pytest.mark.parametrize("cls", CLASSES)
def test_other_dtypes_are_rounded_to_nearest(cls):
    for dtype in (torch.float16, torch.float32, torch.float64):
        params, others = [Parameter(randn(99, dtype=dtype))], [Parameter(randn(99, dtype=dtype))]
        run(cls, params, range(2), stochastic_rounding=True)
        run(cls, others, range(2))
        assert same(params, others)


def test_refused_arguments_of_the_c_functions_change_nothing():
    param, grad = randn(4), randn(4, seed=1)
    before = param.clone()
    for arguments in (
        {"seed": 1.0},
        {"seed": 1, "step": "2"},
        {"seed": 1, "streams": [1, 2]},
        {"seed": 1, "streams": 1},
        {"seed": 1, "offsets": ["a"]},
        {"seed": 1, "offsets": []},
    ):
        with pytest.raises(TypeError, match=r"argument '(seed|step|streams|offsets)' must"):
            lpsgd_ext.lpsgd_([param], [grad], lr=0.1, p=2.0, **arguments)
        assert torch.equal(bits(param), bits(before))


def test_any_cutting_into_shards_draws_the_bits_of_the_whole():
    whole, shards, grad = randn(1000), randn(1000), randn(1000, seed=1)
    common = {"lr": 1e-3, "p": 3.0, "seed": 7, "step": 1 << 63}
    lpsgd_ext.lpsgd_([whole], [grad], **common, streams=[9])
    pieces = [shards[:1], shards[1:600], shards[600:]]
    grads = [grad[:1], grad[1:600], grad[600:]]
    lpsgd_ext.lpsgd_(pieces, grads, **common, streams=[9, 9, 9], offsets=[0, 1, 600])
    assert torch.equal(bits(whole), bits(shards))


@pytest.mark.parametrize("cls", CLASSES)
def test_stochastic_bfloat16_tracks_float32_where_plain_bfloat16_stalls(cls):
    """Least squares with a small lr, the loss evaluated in float32."""
    x, target = randn(256, 16, dtype=torch.float32), randn(16, seed=1, dtype=torch.float32)
    y = x @ target

    def final_loss(dtype, **values):
        weight = Parameter(torch.ones(16, dtype=dtype))
        optimizer = cls([weight], lr=1e-3, p=6.0, **values)
        for _ in range(3000):
            w = weight.detach().float().requires_grad_()
            (x @ w - y).square().mean().backward()
            weight.grad = w.grad.to(dtype)
            optimizer.step()
        return (x @ weight.detach().float() - y).square().mean().item()

    start = (x.sum(1) - y).square().mean().item()
    low = {"momentum_dtype": torch.float32} if cls is lpsgd.LPSGDM else {}
    exact = final_loss(torch.float32)
    stalled = final_loss(torch.bfloat16)
    tracked = final_loss(torch.bfloat16, stochastic_rounding=True, **low)
    assert exact < 0.001 * start
    assert tracked < 0.01 * start
    assert stalled > 10 * tracked
