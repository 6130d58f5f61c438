# SPDX-License-Identifier: MIT
"""Steps among signals, forks, threads, interpreters that end and others that begin."""

import sys
import threading

import pytest
import torch
from torch.nn import Parameter

import lpsgd
from helpers import CLASSES, needs_c, run, same_bits

# What all programs start with. `pair` makes an optimizer whose step is worth two threads.
START = """
import os, signal, sys, threading, torch, lpsgd
torch.set_num_threads(2)
def pair(cls=lpsgd.LPSGDM, n=200_000):
    param = torch.nn.Parameter(torch.linspace(-1, 1, n))
    param.grad = torch.linspace(2, -3, n)
    return param, cls([param], lr=0.1)
def same(a, b):
    return a.detach().numpy().tobytes() == b.detach().numpy().tobytes()
"""


def program(code, **environment):
    """What a fresh interpreter prints, as words."""
    return run([sys.executable, "-W", "error", "-c", START + code], **environment).split()


@needs_c
@pytest.mark.parametrize("cls", ["LPSGDM", pytest.param("LPSGD", marks=pytest.mark.full)])
def test_ctrl_c_and_sigterm_come_after_a_step_and_leave_every_group_whole(cls):
    """Two groups step once for each step of the other: they are equal, however far they got."""
    code = f"""
class Terminated(BaseException):
    pass
def terminate(*_):
    raise Terminated
signal.signal(signal.SIGINT, signal.default_int_handler)  # shells ignore it in the background
signal.signal(signal.SIGTERM, terminate)
params = [torch.nn.Parameter(torch.ones(3_000_000)) for _ in range(2)]
for param in params:
    param.grad = torch.ones(3_000_000)
optimizer = lpsgd.{cls}([{{"params": [param]}} for param in params], lr=1e-3)
for i in range(20):
    number = (signal.SIGINT, signal.SIGTERM)[i % 2]
    try:
        threading.Timer(0.002 * i + 0.001, os.kill, (os.getpid(), number)).start()
        while True:
            optimizer.step()
    except (KeyboardInterrupt, Terminated) as error:
        name = type(error).__name__
    print(name, same(*params), len(set(params[0].tolist()[::1000])))
    optimizer.step()
"""
    expected = ["KeyboardInterrupt", "True", "1", "Terminated", "True", "1"] * 10
    assert program(code) == expected


FORKS = """
def step(made):
    param, optimizer = made
    optimizer.step()
    return param
x = torch.ones(1_000_000)
def stepped():
    made = pair()
    step(made)
    return made
first, second, third, fourth = (stepped() for _ in range(4))
expected = step(stepped())
for act in {before}:
    step(first) if act == "step" else x.sum()
pid = os.fork()
if pid == 0:
    signal.alarm(60)
    alike = same(step(second), expected)
    pid = os.fork()  # a grandchild
    if pid == 0:
        signal.alarm(60)
        os._exit(not same(step(third), expected))
    os._exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) or not alike)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
x.sum()
print(same(step(fourth), expected))
"""


@needs_c
@pytest.mark.parametrize(
    "before",
    [
        ["step", "sum", "step"],
        *(
            pytest.param(acts, marks=pytest.mark.full)
            for acts in ([], ["step"], ["sum"], ["step", "sum"], ["sum", "step"])
        ),
    ],
)
def test_children_and_grandchildren_step_whatever_ran_before_the_fork(before):
    # All tensors are made before the fork: PyTorch's own parallel operations hang after it, those
    # that make a momentum_buffer too.
    assert program(FORKS.format(before=before)) == ["0", "True"]


@pytest.mark.parametrize("start", ["fork", pytest.param("spawn", marks=pytest.mark.full)])
def test_multiprocessing_and_loader_workers_live_beside_steps(start, tmp_path):
    (tmp_path / "main.py").write_text(
        START
        + """
import torch.multiprocessing
class Steps(torch.utils.data.Dataset):
    def __len__(self):
        return 8
    def __getitem__(self, i):
        torch.set_num_threads(1)
        return one_step(i).detach()
def one_step(i):
    param = torch.nn.Parameter(torch.full((8,), float(i)))
    param.grad = torch.ones(8)
    lpsgd.LPSGD([param], lr=1.0).step()
    return param
def work(i, queue):
    queue.put(one_step(i).tolist())
if __name__ == "__main__":
    context = torch.multiprocessing.get_context(sys.argv[1])
    param, optimizer = pair()
    optimizer.step()
    loader = torch.utils.data.DataLoader(Steps(), num_workers=1, multiprocessing_context=context)
    for batch in loader:
        optimizer.step()
        print(batch[0, 0].item())
    queue = context.Queue()
    processes = [context.Process(target=work, args=(i, queue)) for i in range(1)]
    for process in processes:
        process.start()
    print(*sorted(queue.get(timeout=60)[0] for _ in processes))
    for process in processes:
        process.join()
"""
    )
    words = run([sys.executable, tmp_path / "main.py", start]).split()
    assert words == [f"{i - 1.0}" for i in [*range(8), 0]]


def test_64_threads_that_step_their_own_optimizers_have_the_bits_of_serial_runs():
    def make(i):
        params = [Parameter(torch.linspace(-i, i, n)) for n in (3, 40_000)]
        for param in params:
            param.grad = torch.linspace(-2, 3, param.numel())
        return params, CLASSES[i % 2](params, lr=0.1)

    def step(optimizer):
        for _ in range(10):
            optimizer.step()

    serial, parallel = ([make(i) for i in range(64)] for _ in range(2))
    for _, optimizer in serial:
        step(optimizer)
    threads = [threading.Thread(target=step, args=(optimizer,)) for _, optimizer in parallel]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for (params, _), (others, _) in zip(parallel, serial, strict=True):
        assert same_bits(params, others)


def test_64_threads_may_step_one_optimizer():
    """Nothing crashes; where two threads meet in an element, a step of it may be lost."""
    param = Parameter(torch.zeros(1000))
    param.grad = torch.ones(1000)
    optimizer = lpsgd.LPSGD([param], lr=1.0, p=torch.inf, eps=0.0)
    errors = []

    def step():
        try:
            for _ in range(20):
                optimizer.step()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=step) for _ in range(64)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert torch.equal(param, param.round())
    assert param.min() >= -64 * 20 and param.max() <= -20


@needs_c
@pytest.mark.parametrize(
    "daemon",
    [
        "threading.Thread(target=forever, daemon=True).start()",
        pytest.param("", marks=pytest.mark.full),
    ],
)
def test_an_interpreter_ends_with_live_optimizers_and_steps_under_way(daemon):
    code = f"""
param, optimizer = pair()
optimizer.cycle = optimizer
def forever():
    while True:
        optimizer.step()
optimizer.step()
{daemon}
class AtTheEnd:
    def __del__(self):
        one.step()
_, one = pair()
sys.modules["kept"] = AtTheEnd()
import time; time.sleep(0.05)
print("done")
"""
    assert program(code) == ["done"]


SUBINTERPRETER = """
try:
    import _interpreters as interpreters
    run = interpreters.exec
except ImportError:
    import _xxsubinterpreters as interpreters
    run = interpreters.run_string
code = '''
import sys
sys.path[:0] = {path}
try:
    import lpsgd_ext
except ImportError as error:
    print("refused:", "sub-interpreter" in str(error))
'''
for _ in range(3):
    one = interpreters.create()
    run(one, code)
    interpreters.destroy(one)
param, optimizer = pair()
optimizer.step()
print("stepped")
"""


def test_a_subinterpreter_is_refused_by_an_import_error():
    code = SUBINTERPRETER.format(path=[path for path in sys.path if path])
    assert program(code) == ["refused:", "True"] * 3 + ["stepped"]
