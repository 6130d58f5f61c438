# SPDX-License-Identifier: MIT
"""What optimizers keep alive, and steps in threads and forked processes."""

import copy
import gc
import subprocess
import sys
import threading
import weakref

import pytest
import torch
import torch._dynamo  # otherwise imported by the first load_state_dict, whose frame it keeps
from torch.nn import Parameter
from torch.optim import lr_scheduler

from conventions import IMPLEMENTATIONS, implementations
from helpers import CLASSES, bits, needs_c, parameters, same_bits, set_grads, steps


@pytest.fixture
def no_gc():
    """Only reference counts free memory within; what was there before is not looked at."""
    gc.freeze()
    gc.disable()
    yield
    gc.enable()
    gc.unfreeze()


def natives():
    return parameters()


def eagers():
    """What C refuses and PyTorch's operations step."""
    return [Parameter(torch.ones(4, 6)[:, ::2]), Parameter(torch.ones(3, dtype=torch.complex64))]


KINDS = [
    pytest.param(make, how, id=f"{make.__name__}-{name}")
    for make in (natives, eagers)
    for name, how in IMPLEMENTATIONS.items()
    if make is natives or name != "fused"
]


@pytest.mark.usefixtures("no_gc")
@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("make, how", KINDS)
def test_nothing_is_kept_alive_by_a_cycle(cls, make, how):
    params = make()
    optimizer = cls(params, **how)
    lr_scheduler.LambdaLR(optimizer, lambda epoch: 1.0)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    optimizer.step(lambda: None)
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step()
    grads = [weakref.ref(param.grad) for param in params]
    optimizer.zero_grad()
    assert all(ref() is None for ref in grads)
    buffers = [buffer for state in optimizer.state.values() for buffer in state.values()]
    refs = [weakref.ref(thing) for thing in (optimizer, *params, *buffers)]
    del optimizer, params, param, buffers
    assert all(ref() is None for ref in refs)


@pytest.mark.usefixtures("no_gc")
@implementations
@pytest.mark.parametrize("cls", CLASSES)
def test_a_refused_step_keeps_nothing_alive(cls, how):
    params = parameters()
    optimizer = cls(params, **how)
    set_grads(params)
    params[1].grad = params[1].grad.to_sparse()
    for _ in range(2):
        try:
            optimizer.step()
        except RuntimeError:
            continue
        pytest.fail("the step was not refused")
    refs = [weakref.ref(thing) for thing in (optimizer, *params, params[0].grad)]
    del optimizer, params
    assert all(ref() is None for ref in refs)


@pytest.mark.usefixtures("no_gc")
@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("make, how", KINDS)
def test_steps_leave_no_objects_behind(cls, make, how):
    params = make()
    optimizer = cls(params, **how)
    for param in params:
        param.grad = torch.ones_like(param)

    def objects_after(count):
        for _ in range(count):
            optimizer.step()
        return len(gc.get_objects())

    before = objects_after(20)
    assert objects_after(200) < before + 20  # threads of earlier tests may make a few meanwhile


@pytest.mark.usefixtures("no_gc")
@pytest.mark.parametrize("cls", CLASSES)
def test_optimizers_come_and_go(cls):
    def objects_after(count):
        for _ in range(count):
            params = parameters()
            optimizer = copy.deepcopy(cls(params))
            optimizer.load_state_dict(optimizer.state_dict())
            steps(optimizer, optimizer.param_groups[0]["params"], range(2))
        del params, optimizer
        gc.collect()  # deepcopy makes cycles of its own
        return len(gc.get_objects())

    before = objects_after(20)
    assert objects_after(50) < before + 20


def large(seed):
    """Enough elements for more threads than one."""
    return parameters((200, 200), (7,), (50_000,), seed=seed)


@implementations
@pytest.mark.parametrize("cls", CLASSES)
def test_two_threads_that_step_two_optimizers_have_the_bits_of_serial_runs(cls, how):
    serial, parallel = ([large(seed) for seed in (0, 1)] for _ in range(2))

    def run(params):
        steps(cls(params, lr=0.1, weight_decay=0.1, **how), params, range(3))

    for params in serial:
        run(params)
    threads = [threading.Thread(target=run, args=(params,)) for params in parallel]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for params, others in zip(parallel, serial, strict=True):
        assert same_bits(params, others)


@pytest.fixture
def threads():
    """Sets the number of PyTorch's threads; the former number afterwards."""
    former = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(former)


@needs_c
@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("how", [{}, {"fused": True}, {"stochastic_rounding": True}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_two_and_three_threads_give_the_same_bits(cls, how, dtype, threads):
    results = []
    for count in (1, 2, 3):
        threads(count)
        params = [Parameter(param.detach().to(dtype)) for param in large(0)]
        optimizer = cls(params, lr=0.1, weight_decay=0.1, **how)
        steps(optimizer, params, range(3))
        buffers = [buffer for state in optimizer.state.values() for buffer in state.values()]
        results.append([bits(tensor) for tensor in params + buffers])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@needs_c
def test_a_forked_child_steps_with_the_bits_of_its_parent():
    # The tensors are made before the fork: PyTorch's own parallel operations hang after it.
    code = """
import os, signal, torch, lpsgd
torch.set_num_threads(2)
def make(cls):
    param = torch.nn.Parameter(torch.linspace(-1, 1, 200_000))
    param.grad = torch.linspace(2, -3, 200_000)
    optimizer = cls([param], lr=0.1)
    optimizer.step()
    return param, optimizer
for cls in (lpsgd.LPSGD, lpsgd.LPSGDM):
    (parent, first), (child, second) = make(cls), make(cls)
    first.step()
    pid = os.fork()
    if pid == 0:
        signal.alarm(60)
        second.step()
        os._exit(0 if child.tolist() == parent.tolist() else 1)
    print(os.waitpid(pid, 0)[1])
    first.step()
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120
    )
    assert (result.returncode, result.stdout.split()) == (0, ["0", "0"]), result.stderr
