# SPDX-License-Identifier: MIT
"""LPSGD and LPSGDM on tensors that say they are on CUDA devices: routing, fallback and errors."""

import re
import warnings

import pytest
import torch
from torch.nn import Parameter

import cuda_double
from cuda_double import cuda, host, opened
from helpers import CLASSES, same_bits
from lpsgd import LPSGDM, release_gradients

classes = pytest.mark.parametrize("cls", CLASSES)
WORDS = r"cuInit: CUDA_ERROR_NO_DEVICE \(100\): no CUDA-capable device is detected"


@pytest.fixture(autouse=True)
def presented(module, monkeypatch):
    cuda_double.present_as_cuda(monkeypatch)


def values(count, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n % 7 + 1, generator=generator) for n in range(count)]


def models(count=5, devices=(0,)):
    """Parameters on the devices in turn and the same on the CPU, with gradients."""
    grads = values(count, 1)
    there, here = [], []
    for i, value in enumerate(values(count, 0)):
        device = devices[i % len(devices)]
        there.append(Parameter(value.clone() if device is None else cuda(value, device)))
        there[i].grad = grads[i] if device is None else cuda(grads[i], device)
        here.append(Parameter(value.clone()))
        here[i].grad = grads[i]
    return there, here


def seen(tensors):
    return [host(t) if t.is_cuda else t.detach() for t in tensors]


def buffers(optimizer, params):
    return [optimizer.state[p]["momentum_buffer"] for p in params if p in optimizer.state]


def assert_same_training(optimizer, other):
    params = [p for group in optimizer.param_groups for p in group["params"]]
    others = [p for group in other.param_groups for p in group["params"]]
    assert same_bits(seen(params), seen(others))
    assert same_bits(seen(buffers(optimizer, params)), seen(buffers(other, others)))


@classes
@pytest.mark.parametrize("fused", [None, True])
def test_a_step_is_the_cpus_on_every_device(cls, fused):
    there, here = models(devices=(1, None, 2))
    optimizer, other = cls(there, lr=0.1, fused=fused), cls(here, lr=0.1)
    for _ in range(3):
        optimizer.step()
        other.step()
    assert_same_training(optimizer, other)
    assert cuda_double.count("cuLaunchKernel") == 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stochastic", [False, True])
def test_momentum_in_one_byte_is_the_cpus_on_every_device(dtype, stochastic):
    models = [], []
    for i, (value, grad) in enumerate(zip(values(5, 0), values(5, 1), strict=True)):
        for params, device in zip(models, (i % 3, None), strict=True):
            tensors = [value.to(dtype), grad.to(dtype)]
            param, grad_there = tensors if device is None else [cuda(t, device) for t in tensors]
            params.append(Parameter(param))
            params[i].grad = grad_there
    optimizer, other = (
        LPSGDM(
            params, 0.1, momentum_dtype=torch.float8_e5m2, stochastic_rounding=stochastic, seed=3
        )
        for params in models
    )
    for _ in range(3):
        optimizer.step()
        other.step()
    assert_same_training(optimizer, other)
    assert optimizer.param_groups[0]["rounding_step"] == 3
    assert cuda_double.count("cuLaunchKernel") == 9


@pytest.mark.parametrize("momentum_dtype", [torch.float32, torch.float8_e5m2])
def test_a_step_that_the_driver_refuses_is_not_counted(module, momentum_dtype):
    there, _ = models()
    optimizer = LPSGDM(there, momentum_dtype=momentum_dtype, stochastic_rounding=True)
    for _ in range(2):
        optimizer.step()
    cuda_double.fail("cuLaunchKernel")
    with pytest.raises(module.CudaError, match="cuLaunchKernel"):
        optimizer.step()
    assert optimizer.param_groups[0]["rounding_step"] == 2
    optimizer.step()
    assert optimizer.param_groups[0]["rounding_step"] == 3


# Numbers on the GPU, which a step must not wait for: the host cannot touch them here.


@classes
@pytest.mark.parametrize("capturable", [False, True])
def test_a_step_does_not_wait_for_lr_on_the_gpu(cls, capturable, monkeypatch):
    there, here = models()
    lr = cuda(torch.tensor(0.5))
    if capturable:
        monkeypatch.setattr("lpsgd._unusual._check_capturable", lambda params: None)
    optimizer, other = cls(there, lr=lr, capturable=capturable), cls(here, lr=0.5)
    optimizer.step()
    other.step()
    host(lr).fill_(0.25)
    other.param_groups[0]["lr"] = 0.25
    optimizer.step()
    other.step()
    assert_same_training(optimizer, other)
    assert cuda_double.count("cuLaunchKernel lpsgd_cuda_fold_scalars") == 2


@classes
def test_lr_of_one_gpu_serves_every_device(cls):
    there, here = models(devices=(2, None, 0))
    optimizer, other = cls(there, lr=cuda(torch.tensor(0.5))), cls(here, lr=0.5)
    optimizer.step()
    other.step()
    assert_same_training(optimizer, other)
    launches = (line for line in cuda_double.log() if "cuLaunchKernel" in line)
    folds = [line.split()[3] for line in launches if "fold_scalars device" in line]
    assert sorted(folds) == ["0", "2"]


@classes
@pytest.mark.parametrize("found_inf", [0.0, 1.0])
def test_a_step_does_not_wait_for_what_the_grad_scaler_knows(cls, found_inf):
    there, here = models()
    optimizer, other = cls(there, lr=0.1, fused=True), cls(here, lr=0.1)
    optimizer.grad_scale = cuda(torch.tensor(4.0))
    optimizer.found_inf = cuda(torch.tensor(found_inf))
    for param in here:
        param.grad = param.grad / 4.0
    optimizer.step()
    if not found_inf:
        other.step()
    assert same_bits(seen(there), seen(here))


# Memory.


@classes
def test_a_parameter_that_is_listed_twice_is_stepped_twice_and_the_others_by_the_kernels(cls):
    there, here = models(3)
    with pytest.warns(UserWarning, match="duplicate parameters"):
        optimizer = cls([*there, there[0]], lr=0.1, p=2.0)
    with pytest.warns(UserWarning, match="duplicate parameters"):
        other = cls([*here, here[0]], lr=0.1, p=2.0)
    for _ in range(2):
        with opened():  # to PyTorch's operations
            optimizer.step()
        other.step()
        assert_same_training(optimizer, other)
    assert cuda_double.count("cuLaunchKernel") == 2
    optimizer.param_groups[0]["fused"] = True
    with pytest.raises(ValueError, match=r"listed twice in its group: params\[0\] and params\[3\]"):
        optimizer.step()


@classes
def test_what_is_not_aligned_is_refused_since_no_gpu_could_read_it(cls):
    there, here = models(3)
    there[1].data = cuda_double.at(cuda(torch.zeros(9)).data_ptr() + 2, torch.float32, (8,))
    there[1].grad = cuda(torch.ones(8))
    for how in ({}, {"fused": True}):
        optimizer = cls(there, **how)
        with pytest.raises(ValueError, match=r"params\[1\] is not aligned"):
            optimizer.step()
        assert not optimizer.state
    assert same_bits(seen(there[::2]), seen(here[::2]))


# Errors.


def the_one_warning_of_same_training(optimizer, other):
    """Steps both three times, which must train alike, and returns the one warning's words."""
    with opened(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            optimizer.step()
            other.step()
    assert_same_training(optimizer, other)
    (warning,) = caught
    return str(warning.message)


@classes
def test_without_a_driver_pytorchs_operations_step_and_that_is_said_once(cls):
    there, _ = models()
    eager, _ = models()
    optimizer, other = cls(there, lr=0.1), cls(eager, lr=0.1, foreach=True)
    cuda_double.fail("cuInit", nth=0, error=100)
    warning = the_one_warning_of_same_training(optimizer, other)
    assert warning.startswith("PyTorch's operations step on cuda:0: cuInit: CUDA_ERR")
    assert cuda_double.count("cuLaunchKernel") == 0
    cuda_double.mend()
    optimizer.step()
    assert cuda_double.count("cuLaunchKernel lpsgd_cuda_float32") == 1


# The check of the kernels.


def plant_wrong_bits():
    cuda_double.sabotage("lpsgd_cuda_float32_few")
    return "its kernels differ from the CPU's: after a step of lpsgd_cuda_float32_few"


def plant_missing_machine_code():
    cuda_double.fail("cuFuncLoad", nth=0, error=209)
    return "cuFuncLoad: CUDA_ERROR_NO_BINARY_FOR_GPU (209)"


@classes
@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("plant", [plant_wrong_bits, plant_missing_machine_code])
def test_kernels_that_fail_their_check_step_nothing(cls, fused, plant, monkeypatch):
    monkeypatch.delenv("LPSGD_CUDA_CHECK")
    there, _ = models()
    eager, before = models()
    optimizer, other = cls(there, lr=0.1, fused=fused), cls(eager, lr=0.1, foreach=True)
    words = plant()
    if fused:
        with pytest.raises(RuntimeError, match=re.escape(words)):
            optimizer.step()
        assert same_bits(seen(there), seen(before))
        assert not optimizer.state
        return
    warning = the_one_warning_of_same_training(optimizer, other)
    assert warning.startswith(f"PyTorch's operations step on cuda:0: {words}")


# Captures.


@pytest.fixture
def capturing(monkeypatch):
    """What PyTorch says of its current stream, which is stream 1 of device 0."""

    class Stream:
        def is_capturing(self):
            return capturing()

    def capturing():
        return bool(state)

    state = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", capturing)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "current_stream", Stream)
    cuda_double.driver.exchange_set_stream(0, 1)

    def capture(now):
        cuda_double.capture(now)
        state[:] = [True] if now else []

    return capture


@classes
@pytest.mark.parametrize("fused", [None, True])
def test_a_capture_of_a_step_that_is_not_capturable_is_an_error(cls, fused, capturing):
    there, here = models()
    optimizer, other = cls(there, lr=0.1, fused=fused), cls(here, lr=0.1)
    optimizer.step()
    other.step()
    capturing(True)
    words = f"^Attempting CUDA graph capture .* {cls.__name__} but .* capturable is False"
    with pytest.raises(RuntimeError, match=words):
        optimizer.step()
    assert cuda_double.count("cuLaunchKernel") == 1
    capturing(False)
    optimizer.step()
    other.step()
    assert_same_training(optimizer, other)


@classes
def test_a_capturable_step_is_captured_once_its_state_is_made(cls, capturing, monkeypatch):
    monkeypatch.setattr("lpsgd._unusual._check_capturable", lambda params: None)
    there, _ = models()
    optimizer = cls(there, lr=cuda(torch.tensor(0.5)), capturable=True)
    capturing(True)
    if cls is LPSGDM:
        with pytest.raises(RuntimeError, match="every replay would set them to zero: make a step"):
            optimizer.step()
        assert not optimizer.state
        capturing(False)
        optimizer.step()
        capturing(True)
        cuda_double.forget()
    optimizer.step()
    kernels = [line.split()[1] for line in cuda_double.log() if "cuLaunchKernel" in line]
    assert kernels == ["lpsgd_cuda_fold_scalars", "lpsgd_cuda_float32_few"]


@classes
def test_fused_without_a_driver_raises_and_changes_nothing_until_there_is_one(cls):
    there, here = models()
    optimizer, other = cls(there, lr=0.1, fused=True), cls(here, lr=0.1)
    before = [param._version for param in there]
    cuda_double.fail("cuInit", nth=0, error=100)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=WORDS):
            optimizer.step()
    assert same_bits(seen(there), seen(here))
    assert [param._version for param in there] == before
    assert not optimizer.state
    cuda_double.mend()
    optimizer.step()
    other.step()
    assert_same_training(optimizer, other)


@classes
@pytest.mark.parametrize("fused", [None, True])
def test_a_refused_launch_is_raised_and_not_made_up_for(module, cls, fused):
    there, here = models(600)
    optimizer = cls(there, lr=0.1, fused=fused)
    other = cls(here[:500], lr=0.1)
    cuda_double.fail("cuLaunchKernel", nth=2)
    with pytest.raises(module.CudaError, match="cuLaunchKernel: CUDA_ERROR_LAUNCH_FAILED"):
        optimizer.step()
    other.step()
    assert cuda_double.count("cuLaunchKernel") == 2
    assert same_bits(seen(there), seen(here))


@classes
@pytest.mark.parametrize("call", ["cuCtxPushCurrent_v2", "cuLaunchKernel", "cuCtxPopCurrent_v2"])
def test_an_error_while_one_of_several_groups_steps_ends_the_step(module, cls, call):
    there, here = models(devices=(0, 1))
    optimizer = cls([{"params": there[0::2]}, {"params": there[1::2]}], lr=0.1)
    before = 2 if "Ctx" in call else 0  # whether the streams are being captured
    for device in (0, 1):
        assert module.cuda_refusal(device) is None
    cuda_double.forget()
    cuda_double.fail(call, nth=before + 2)
    with pytest.raises(module.CudaError, match=call):
        optimizer.step()
    cls([*here[0::2], *(here[1::2] if "Pop" in call else [])], lr=0.1).step()
    assert same_bits(seen(there), seen(here))
    assert cuda_double.count(call) == before + 2


@classes
def test_an_error_while_the_driver_loads_leaves_every_group(module, cls):
    there, here = models(devices=(0, 1))
    groups = [{"params": there[0::2]}, {"params": there[1::2]}]
    optimizer, other = cls(groups, lr=0.1, fused=True), cls(here, lr=0.1)
    assert module.cuda_refusal(0) is None
    cuda_double.fail("cuDevicePrimaryCtxRetain", nth=0, error=2)
    with pytest.raises(RuntimeError, match="cuDevicePrimaryCtxRetain: CUDA_ERROR_OUT_OF_MEMORY"):
        optimizer.step()
    assert same_bits(seen(there), seen(here))
    assert not optimizer.state
    cuda_double.mend()
    optimizer.step()
    other.step()
    assert same_bits(seen(there), seen(here))


@classes
def test_a_step_with_lr_on_the_gpu_works_once_the_driver_does(cls):
    there, here = models()
    optimizer = cls(there, lr=cuda(torch.tensor(0.5)), fused=True)
    cuda_double.fail("cuInit", nth=0, error=100)
    with pytest.raises(RuntimeError):
        optimizer.step()
    cuda_double.mend()
    optimizer.step()
    cls(here, lr=0.5).step()
    assert same_bits(seen(there), seen(here))


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("values", [{}, {"momentum_dtype": torch.float8_e5m2, "seed": 2}])
def test_released_gradients_make_the_cpus_bits_on_every_device(values, accumulate):
    """By the hooks alone, since nothing here has a backward."""
    optimizers = []
    for params in models(devices=(0, 2)):
        grads = [param.grad for param in params]
        optimizers.append(LPSGDM(params, **values))
        optimizers[-1].zero_grad()
        release_gradients(optimizers[-1], accumulate)
        for _ in range(2):
            for _ in range(accumulate):
                for param, grad in zip(params, grads, strict=True):
                    param.grad = grad
                    (hook,) = param._post_accumulate_grad_hooks.values()
                    hook(param)
                    assert param.grad is None
            optimizers[-1].step()
    assert_same_training(*optimizers)
