# SPDX-License-Identifier: MIT
"""lpsgd_ext on tensors in device memory, which the host cannot touch."""

import math
import os
import re
import threading

import pytest
import torch

import cuda_double
import lpsgd_ext
from cuda_double import cuda, host, opened
from helpers import DTYPES, bits

HYPER = {"lr": 0.0078125, "p": 5.0, "weight_decay": 0.125}
NUMBERS = {**HYPER, "grad_scale": 1024.0}
LOADING = [
    *("cuInit", "cuDriverGetVersion", "cuThreadExchangeStreamCaptureMode", "cuDeviceGet"),
    *("cuDevicePrimaryCtxRetain", "cuLibraryLoadData", "cuLibraryGetKernel", "cuCtxPushCurrent_v2"),
    *("cuKernelGetFunction", "cuFuncLoad", "cuStreamIsCapturing", "cuCtxPopCurrent_v2"),
]


def some_lists(sizes=(5000, 1, 37), dtype=torch.float32, seed=0):
    """Parameters, gradients and momentum buffers."""
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randn(n, generator=generator).to(dtype) for n in sizes] for _ in range(3)]


def to_devices(lists, devices=(0,)):
    """The lists on the devices in turn; None is the CPU."""

    def on(i, tensor):
        device = devices[i % len(devices)]
        return tensor.clone() if device is None else cuda(tensor, device)

    return [[on(i, tensor) for i, tensor in enumerate(column)] for column in lists]


def seen(lists):
    """What the lists hold, for the host."""
    return [[host(t) if cuda_double.device_of(t) >= 0 else t for t in column] for column in lists]


def stepped(lists, momentum=True, **arguments):
    """The lists after a step on the CPU."""
    lists = to_devices(lists, [None])
    step(lpsgd_ext, lists, momentum, **arguments)
    return lists


def step(module, lists, momentum=True, **arguments):
    arguments = {**HYPER, **arguments}
    if momentum:
        module.lpsgdm_(*lists, **arguments)
    else:
        module.lpsgd_(*lists[:2], **arguments)


def versions(lists):
    return [[tensor._version for tensor in column] for column in lists]


def assert_same(lists, others):
    for column, other in zip(seen(lists), seen(others), strict=True):
        for a, b in zip(column, other, strict=True):
            assert torch.equal(bits(a), bits(b))


def scratch_for(module, device=0, dtype=torch.uint8, more=0):
    return cuda(torch.zeros(module.cuda_scratch_size() + more, dtype=dtype), device)


@pytest.mark.parametrize("momentum", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_tensors_on_several_devices_have_the_cpus_bits(module, dtype, momentum):
    start = some_lists((5000, 1, 37, 3, 2000, 64, 7, 8, 9), dtype)
    lists = to_devices(start, (2, None, 0, 1))
    before = versions(lists)
    step(module, lists, momentum)
    assert_same(lists, stepped(start, momentum))
    written = (True, False, momentum)
    for column, old, bumped in zip(versions(lists), before, written, strict=True):
        assert all((new > was) == bumped for new, was in zip(column, old, strict=True))


@pytest.mark.parametrize("momentum_dtype", [torch.float32, torch.bfloat16, torch.float8_e5m2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stochastic", [None, False])
def test_momentum_of_every_dtype_and_its_rounding_have_the_cpus_bits(
    module, dtype, momentum_dtype, stochastic
):
    start = some_lists(dtype=dtype)
    start[2] = [tensor.to(momentum_dtype) for tensor in start[2]]
    lists = to_devices(start)
    arguments = {"momentum_dtype": momentum_dtype, "momentum_exponent": 11}
    arguments |= {"stochastic_rounding": stochastic, "seed": 3, "step": 7, "streams": [4, 0, 2]}
    arguments["offsets"] = [0, 2**40, 1]
    step(module, lists, **arguments)
    assert_same(lists, stepped(start, **arguments))


def test_every_group_runs_on_its_devices_current_stream(module):
    lists = to_devices(some_lists(), (2, 0, 1))
    cuda_double.driver.exchange_set_stream(2, 3)
    cuda_double.driver.exchange_set_stream(0, 1)
    step(module, lists)
    cuda_double.forget()
    step(module, lists)
    blocks = "grid {} 1 1 block 256 1 1 shared 0"
    assert cuda_double.log() == [
        "cuCtxPushCurrent_v2 2",
        "cuLaunchKernel lpsgd_cuda_float32_few device 2 stream 3 " + blocks.format(2),
        "cuCtxPopCurrent_v2 2",
        "cuCtxPushCurrent_v2 0",
        "cuLaunchKernel lpsgd_cuda_float32_few device 0 stream 1 " + blocks.format(1),
        "cuCtxPopCurrent_v2 0",
        "cuCtxPushCurrent_v2 1",
        "cuLaunchKernel lpsgd_cuda_float32_few device 1 stream 0 " + blocks.format(1),
        "cuCtxPopCurrent_v2 1",
    ]


@pytest.mark.parametrize("call", [None, "cuLaunchKernel"])
def test_the_current_device_stays_current(module, call):
    driver = cuda_double.driver
    context = cuda_double.ctypes.c_void_p()
    lists = to_devices(some_lists(), (1,))
    step(module, lists)
    assert driver.double_current() == -1
    assert driver.cuDevicePrimaryCtxRetain(cuda_double.ctypes.byref(context), 1002) == 0
    assert driver.cuCtxPushCurrent_v2(context) == 0
    if call:
        cuda_double.fail(call)
        with pytest.raises(module.CudaError):
            step(module, lists)
    else:
        step(module, lists)
    assert driver.double_current() == 2


def test_a_dry_run_and_found_inf_change_nothing(module):
    start = some_lists()
    lists = to_devices(start)
    before = versions(lists)
    step(module, lists, dry_run=True)
    step(module, lists, found_inf=1.0)
    assert cuda_double.count("cuLibraryLoadData") == 1
    assert cuda_double.count("cuLaunchKernel") == 0
    assert_same(lists, start)
    assert versions(lists) == before


# Errors.


@pytest.mark.parametrize("error", [2, 719, 12345])
@pytest.mark.parametrize(
    "call, nth",
    [*((call, 1) for call in LOADING), ("cuCtxPushCurrent_v2", 2), ("cuLaunchKernel", 1)],
)
def test_an_error_has_the_drivers_words_and_nothing_is_written(module, call, nth, error):
    words = {
        2: r"CUDA_ERROR_OUT_OF_MEMORY \(2\): out of memory",
        719: r"CUDA_ERROR_LAUNCH_FAILED \(719\): unspecified launch failure",
        12345: r"unknown error \(12345\): the driver has no text for it",
    }[error]
    start = some_lists()
    lists = to_devices(start, (1, None))
    before = versions(lists)
    loading = nth == 1 and call in LOADING
    cuda_double.fail(call, nth, error)
    with pytest.raises(RuntimeError, match=rf"^lpsgdm_\(\): {call}: {words}$") as raised:
        step(module, lists)
    # A launch is made, or refused, after autograd has been told of it.
    assert raised.type is (RuntimeError if loading else module.CudaError)
    assert (versions(lists) == before) == loading
    assert_same(lists, start)
    step(module, lists)
    assert_same(lists, stepped(start))


@pytest.mark.parametrize("call", LOADING)
def test_cuda_refusal_has_the_drivers_words(module, call):
    cuda_double.fail(call, error=2)
    words = f"{call}: CUDA_ERROR_OUT_OF_MEMORY (2): out of memory"
    assert module.cuda_refusal(1) == words
    assert module.cuda_refusal(1) is None


@pytest.mark.parametrize("device", [-1, 64, 2**40, -(2**40)])
def test_cuda_refusal_names_a_device_that_cannot_be(module, device):
    assert module.cuda_refusal(device).startswith("there is no CUDA device ")


def test_a_device_that_the_driver_does_not_have_is_refused(module):
    start = some_lists()
    lists = to_devices(start, (0, 3))
    before = versions(lists)
    with pytest.raises(RuntimeError, match="cuDeviceGet: CUDA_ERROR_INVALID_DEVICE"):
        step(module, lists)
    assert cuda_double.count("cuLaunchKernel") == 0
    assert versions(lists) == before


def test_a_driver_that_is_too_old_is_refused_until_it_is_not(module):
    start = some_lists()
    lists = to_devices(start)
    cuda_double.driver.double_version(12090)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"too old: it is of CUDA 12\.9"):
            step(module, lists)
    cuda_double.driver.double_version(13010)
    step(module, lists)
    assert_same(lists, stepped(start))


def test_a_refused_launch_leaves_the_earlier_ones(module):
    start = some_lists([2] * 1200)
    lists = to_devices(start)
    before = versions(lists)
    cuda_double.fail("cuLaunchKernel", nth=2)
    with pytest.raises(module.CudaError, match="cuLaunchKernel: CUDA_ERROR_LAUNCH_FAILED"):
        step(module, lists)
    assert cuda_double.count("cuLaunchKernel") == 2
    assert_same([column[:500] for column in lists], stepped([column[:500] for column in start]))
    assert_same([column[500:] for column in lists], [column[500:] for column in start])
    assert all(new > was for new, was in zip(versions(lists)[0], before[0], strict=True))


def test_a_refused_launch_on_a_second_device_leaves_the_cpus_tensors(module):
    start = some_lists()
    lists = to_devices(start, (None, 0, 1))
    cuda_double.fail("cuLaunchKernel", nth=2)
    with pytest.raises(module.CudaError):
        step(module, lists)
    columns = zip(start, stepped(start), strict=True)
    assert_same(lists, [[old[0], new[1], old[2]] for old, new in columns])


def test_an_unknown_stream_is_an_error(module):
    start = some_lists()
    lists = to_devices(start)
    before = versions(lists)
    cuda_double.driver.exchange_fail(1)
    with pytest.raises(RuntimeError, match="does not tell its current stream"):
        step(module, lists)
    assert_same(lists, start)
    assert versions(lists) == before


@pytest.mark.parametrize("which, name", [(1, "grads"), (2, "momentum_buffers")])
@pytest.mark.parametrize("device", [1, None])
def test_tensors_of_another_device_are_refused_before_the_driver_is_asked(
    module, which, name, device
):
    start = some_lists()
    lists = to_devices(start)
    (lists[which],) = to_devices([start[which]], (0, 0, device))
    with pytest.raises(ValueError, match=rf"{name}\[2\] differs from the parameter in device"):
        step(module, lists)
    assert cuda_double.log() == []


# The check of the kernels.


@pytest.mark.parametrize("wish", [None, "0", "1"])
def test_kernels_are_checked_before_the_first_step_unless_the_environment_says_no(
    module, wish, monkeypatch
):
    if wish is None:
        monkeypatch.delenv("LPSGD_CUDA_CHECK")
    else:
        monkeypatch.setenv("LPSGD_CUDA_CHECK", wish)
    start = some_lists()
    lists = to_devices(start)
    before = versions(lists)
    cuda_double.sabotage("lpsgd_cuda_float16_wide")
    if wish == "0":
        step(module, lists)
        assert_same(lists, stepped(start))
        return
    words = r"its kernels differ from the CPU's: after a step of lpsgd_cuda_float16_wide \(p = 2"
    report = r".* Please report this: Double 0, driver of CUDA 13\.0, lpsgd "
    for _ in range(2):
        with pytest.raises(RuntimeError, match=rf"^lpsgdm_\(\): {words}{report}"):
            step(module, lists)
    assert re.match(words, module.cuda_refusal(0))
    assert_same(lists, start)
    assert versions(lists) == before


# Numbers in device memory.


@pytest.mark.parametrize("momentum", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NUMBERS)
def test_the_gpu_reads_a_number_on_it(module, name, dtype, momentum):
    start = some_lists()
    lists = to_devices(start)
    number = cuda(torch.tensor(NUMBERS[name], dtype=dtype))
    arguments = {**NUMBERS, name: number, "scratch": scratch_for(module)}
    step(module, lists, momentum, **arguments)
    assert_same(lists, stepped(start, momentum, **NUMBERS))
    assert cuda_double.count("cuLaunchKernel lpsgd_cuda_fold_scalars") == 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, math.inf, math.nan])
def test_the_gpu_reads_found_inf_on_it(module, dtype, value):
    start = some_lists()
    lists = to_devices(start)
    found_inf = cuda(torch.tensor([value], dtype=dtype))
    step(module, lists, found_inf=found_inf, scratch=scratch_for(module))
    assert_same(lists, stepped(start) if value == 0.0 else start)


def test_the_gpu_writes_within_the_scratch_that_is_asked_for(module):
    size = module.cuda_scratch_size()
    memory = cuda(torch.full((size + 64,), 255, dtype=torch.uint8))
    step(module, to_devices(some_lists()), lr=cuda(torch.tensor(0.1)), scratch=memory[:size])
    assert (host(memory)[size:] == 255).all()


def test_all_numbers_at_once_and_values_of_every_other_kind_beside(module):
    start = some_lists()
    lists = to_devices(start, (1,))
    scratch = scratch_for(module, 1, more=5)
    numbers = {name: cuda(torch.tensor([[value]]), 1) for name, value in NUMBERS.items()}
    step(module, lists, **numbers, scratch=scratch, found_inf=cuda(torch.zeros(()), 1))
    expected = stepped(start, **NUMBERS)
    assert_same(lists, expected)
    beside = {"lr": numbers["lr"], "p": torch.tensor(5), "weight_decay": 0.125, "grad_scale": 1024}
    step(module, lists, **beside, scratch=scratch, found_inf=0)
    assert_same(lists, stepped(expected, **NUMBERS))


WAITED_FOR = {
    "another device": lambda lr: cuda(torch.tensor(lr), 1),
    "negative bit": lambda lr: torch._neg_view(cuda(torch.tensor(-lr))),
    "integer": lambda lr: cuda(torch.tensor(int(lr))),
}


@pytest.mark.parametrize("kind", WAITED_FOR)
def test_numbers_that_the_gpu_cannot_read_are_waited_for(module, kind):
    start = some_lists()
    lists = to_devices(start)
    with opened():
        step(module, lists, lr=WAITED_FOR[kind](2.0), scratch=scratch_for(module))
    assert cuda_double.count("cuLaunchKernel lpsgd_cuda_fold_scalars") == 0
    assert_same(lists, stepped(start, lr=2.0))


WRONG_SCRATCH = {
    "too small": lambda module: scratch_for(module, more=-1),
    "another dtype": lambda module: scratch_for(module, dtype=torch.int8),
    "floats": lambda module: scratch_for(module, dtype=torch.float32),
    "on the CPU": lambda module: host(scratch_for(module)),
    "not aligned": lambda module: scratch_for(module, more=4)[4:],
    "not dense": lambda module: scratch_for(module, more=module.cuda_scratch_size())[::2],
    "empty": lambda module: scratch_for(module)[:0],
    "no tensor": lambda module: module.cuda_scratch_size(),
}


@pytest.mark.parametrize("kind", WRONG_SCRATCH)
def test_wrong_scratch_is_refused(module, kind):
    start = some_lists()
    lists = to_devices(start)
    scratch = WRONG_SCRATCH[kind](module)
    with pytest.raises(TypeError if kind == "no tensor" else ValueError, match="scratch"):
        step(module, lists, lr=cuda(torch.tensor(0.1)), scratch=scratch)
    assert cuda_double.log() == []
    assert_same(lists, start)


@pytest.mark.parametrize("devices", [(1,), (0, 1), (0, None), (None,)])
def test_scratch_serves_parameters_on_its_device_alone(module, devices):
    start = some_lists()
    lists = to_devices(start, devices)
    with pytest.raises(ValueError, match="with scratch, all params must be on its device"):
        step(module, lists, scratch=scratch_for(module))
    assert cuda_double.count("cuLaunchKernel") == 0
    assert_same(lists, start)


# Threads and processes.


def test_many_threads_step_at_once_on_their_own_streams(module):
    start = [some_lists(seed=i) for i in range(8)]
    lists = [to_devices(start[i], (i % 3,)) for i in range(8)]
    barrier = threading.Barrier(8)
    failures = []

    def work(i):
        try:
            cuda_double.driver.exchange_set_stream(i % 3, i % 4)
            barrier.wait()
            for _ in range(20):
                step(module, lists[i])
        except BaseException as error:
            failures.append(error)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures
    for i in range(8):
        expected = start[i]
        for _ in range(20):
            expected = stepped(expected)
        assert_same(lists[i], expected)
        kernel = f"lpsgd_cuda_float32_few device {i % 3} stream {i % 4}"
        assert cuda_double.count(f"cuLaunchKernel {kernel}")
    assert cuda_double.count("cuInit") == cuda_double.count("cuLibraryLoadData") == 1
    assert cuda_double.count("cuDevicePrimaryCtxRetain") == 3


def test_a_process_that_has_made_no_cuda_step_may_fork(module):
    start = some_lists()
    in_child, in_parent = to_devices(start), to_devices(start)
    step(module, to_devices(start, [None]))
    assert cuda_double.log() == []
    child = os.fork()
    if child == 0:
        status = 1
        try:
            step(module, in_child)
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    step(module, in_parent)
    for lists in (in_child, in_parent):
        assert_same(lists, stepped(start))
