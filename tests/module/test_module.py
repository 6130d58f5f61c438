# SPDX-License-Identifier: MIT
"""lpsgd_ext as a module: versions, threads, processes, environment."""

import ast
import copy
import inspect
import math
import os
import subprocess
import sys
import threading
import time

import pytest
import torch

import lpsgd
import lpsgd_ext
from helpers import DTYPES, bits

STEP = """
import hashlib, torch, lpsgd_ext
for threads in (1, 2, 3):
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    digest = hashlib.sha256()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        params, grads, buffers = (
            [(torch.randn(n, generator=generator) * 0.01).to(dtype) for n in (1, 700, 40000)]
            for _ in range(3)
        )
        for p in (2.0, 2.5, 6.0, 100.0, float("inf")):
            lpsgd_ext.lpsgdm_(params, grads, buffers, lr=1e-3, p=p, weight_decay=0.01)
            lpsgd_ext.lpsgd_(params, grads, lr=1e-3, p=p, eps=0.0)
            for other in (torch.bfloat16, torch.float8_e5m2):
                narrow = [buffer.to(other) for buffer in buffers]
                keywords = {"momentum_dtype": other, "seed": 1, "offsets": [0, 3, 70]}
                lpsgd_ext.lpsgdm_(params, grads, narrow, lr=1e-3, p=p, **keywords)
                for tensor in narrow:
                    digest.update(tensor.view(torch.uint8).numpy())
        for tensor in params + buffers:
            digest.update(tensor.view(torch.uint8).numpy())
    print(lpsgd_ext.cpu_capability(), threads, digest.hexdigest())
"""


def python(code, **environment):
    """What a fresh interpreter prints."""
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip(), result.stderr


def test_every_capability_and_thread_count_gives_the_same_bits():
    seen = {}
    for capability in ("default", "avx2", "avx512"):
        for line in python(STEP, LPSGD_CPU_CAPABILITY=capability)[0].splitlines():
            got, threads, digest = line.split()
            seen.setdefault(digest, []).append((got, threads))
    assert len(seen) == 1, seen


def test_capability_is_lowered_by_the_environment_and_says_what_it_ignores():
    query = "import torch, lpsgd_ext; print(lpsgd_ext.cpu_capability())"
    assert python(query, LPSGD_CPU_CAPABILITY="default") == ("default", "")
    best, warning = python(query, LPSGD_CPU_CAPABILITY="sse9")
    assert best == lpsgd_ext.cpu_capability()
    assert "RuntimeWarning: ignoring LPSGD_CPU_CAPABILITY=sse9" in warning


def test_module_can_be_imported_before_torch():
    assert python("import lpsgd_ext, torch; print(lpsgd_ext.rho(4))")[0].startswith("0.666")


def test_importing_lpsgd_imports_nothing_else_of_pytorch():
    """torch._dynamo would take most of a second. And lpsgd.experiments imports what it needs
    besides when it needs it."""
    code = "import torch, sys; old = set(sys.modules)\n"
    for module in ("lpsgd", "lpsgd.experiments"):
        code += f"import {module}; print({{*sys.modules}} - old)\n"
    ours, with_experiments = (
        {name.partition(".")[0] for name in ast.literal_eval(line)}
        for line in python(code)[0].splitlines()
    )
    assert ours == {"lpsgd", "lpsgd_ext"}
    assert not with_experiments & {"pandas", "matplotlib", "tqdm", "scipy", "curvlinops", "IPython"}


def test_build_info_and_version_agree():
    info = lpsgd_ext.build_info()
    assert info["version"] == lpsgd.__version__
    assert isinstance(info["openmp"], bool)
    assert bool(info["cuda"]) == info["cuda_architectures"].startswith("sm_")
    assert "GCC" in info["compiler"] or "Clang" in info["compiler"]


def test_signatures_can_be_inspected():
    signature = inspect.signature(lpsgd_ext.lpsgdm_)
    assert list(signature.parameters) == [
        *("params", "grads", "momentum_buffers", "lr", "p", "momentum", "weight_decay"),
        *("eps", "pivot", "maximize", "momentum_dtype", "momentum_exponent"),
        *("stochastic_rounding", "grad_scale", "found_inf", "seed", "step", "streams", "offsets"),
        *("scratch", "dry_run", "accumulate", "continues", "momentum_only"),
    ]
    assert signature.parameters["eps"].default == 1e-8
    for name in ("lpsgd_", "rho", "cosine_p", "cpu_capability", "build_info"):
        assert inspect.signature(getattr(lpsgd_ext, name)) is not None
        assert getattr(lpsgd_ext, name).__doc__


def test_written_tensors_bump_their_version_and_gradients_do_not():
    param, grad, buffer = torch.ones(3), torch.ones(3), torch.zeros(3)
    lpsgd_ext.lpsgdm_([param], [grad], [buffer], lr=0.1, p=4.0)
    assert (param._version > 0, grad._version, buffer._version > 0) == (True, 0, True)


def test_stale_backward_raises():
    param = torch.nn.Parameter(torch.ones(3))
    loss = (param * param).sum()
    lpsgd_ext.lpsgd_([param], [torch.ones(3)], lr=0.1, p=4.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_empty_lists_and_tensors_are_fine():
    lpsgd_ext.lpsgd_([], [], lr=0.1, p=4.0)
    lpsgd_ext.lpsgdm_((), (), (), lr=0.1, p=4.0)
    empty = torch.empty(0, 3)
    lpsgd_ext.lpsgd_([empty], [torch.empty(0, 3)], lr=0.1, p=4.0)


def test_one_element_tensor_serves_as_a_value():
    params = [torch.zeros(3), torch.zeros(3)]
    lpsgd_ext.lpsgd_(params[:1], [torch.ones(3)], lr=torch.tensor(0.5), p=torch.tensor(4))
    lpsgd_ext.lpsgd_(params[1:], [torch.ones(3)], lr=0.5, p=4)
    assert torch.equal(*params)


MOMENTUM_DTYPES = [None, torch.float32, torch.bfloat16, torch.float8_e5m2]


@pytest.mark.parametrize("momentum_dtype", MOMENTUM_DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stochastic", [None, False, True])
def test_momentum_has_the_bits_of_pytorchs_operations(dtype, momentum_dtype, stochastic):
    """p=2 and an lr that is a power of two: the parameter's too, but where float64 may be fused."""
    generator = torch.Generator().manual_seed(0)
    sizes = (1, 64, 3, 1000)
    made = [
        [torch.randn(n, generator=generator, dtype=torch.float64).to(dtype) for n in sizes]
        for _ in range(3)
    ]
    if momentum_dtype and dtype != torch.float64:
        made[2] = [buffer.to(momentum_dtype) for buffer in made[2]]
    where = {"seed": -5, "step": 2**40, "streams": [3, 1, -1, 2**65 + 7], "offsets": (0, 3, 5, 130)}
    values = {"lr": 0.5, "p": 2.0, "momentum": 0.5, "momentum_exponent": 3, "grad_scale": 4.0}
    other = copy.deepcopy(made)
    lpsgd_ext.lpsgdm_(
        *made, momentum_dtype=momentum_dtype, stochastic_rounding=stochastic, **values, **where
    )
    at_random = stochastic is not False
    lpsgd._eager.for_loop(*other, stochastic_rounding=at_random, **values, **where)
    for column in (0, 2):
        for a, b in zip(made[column], other[column], strict=True):
            assert torch.equal(bits(a), bits(b))


def test_a_momentum_dtype_may_be_named_and_bytes_have_an_exponent_of_15_by_default():
    results = []
    for keywords in (
        {"momentum_dtype": "float8_e5m2", "momentum_exponent": 15},
        {"momentum_dtype": torch.float8_e5m2},
        {"momentum_dtype": torch.float8_e5m2, "momentum_exponent": 14},
    ):
        buffer = torch.zeros(9, dtype=torch.float8_e5m2)
        lpsgd_ext.lpsgdm_(
            [torch.zeros(9)],
            [torch.linspace(0.01, 1, 9)],
            [buffer],
            lr=0.1,
            p=4.0,
            seed=1,
            **keywords,
        )
        results.append(buffer.float().tolist())
    assert results[0] == results[1] == [2 * m for m in results[2]]


def test_a_list_that_shrinks_while_it_is_read_is_refused():
    class Shrinks:
        def __index__(self):
            del streams[1:], params[1:]
            return 1

    params, streams = [torch.ones(3) for _ in "123"], [Shrinks(), 1, 2]
    lists = [params, [torch.ones(3) for _ in "123"]]
    with pytest.raises(IndexError):
        lpsgd_ext.lpsgd_(*lists, lr=0.1, p=4.0, seed=1, streams=streams)


def test_references_are_returned():
    tensors = [torch.ones(3) for _ in range(3)]
    lists = [[tensor] for tensor in tensors]
    counts = [sys.getrefcount(x) for x in (*tensors, *lists)]
    for _ in range(10):
        lpsgd_ext.lpsgdm_(*lists, lr=0.1, p=4.0)
        with pytest.raises(ValueError):
            lpsgd_ext.lpsgdm_(*lists, lr=0.1, p=1.0)
        with pytest.raises(TypeError):
            lpsgd_ext.lpsgdm_(lists[0], [None], lists[2], lr=0.1, p=4.0)
        lpsgd_ext.lpsgdm_(*lists, lr=0.1, p=4.0, momentum_dtype=torch.float32)
        with pytest.raises(TypeError):
            lpsgd_ext.lpsgdm_(*lists, lr=0.1, p=4.0, momentum_dtype=torch.bfloat16, seed=1)
    assert [sys.getrefcount(x) for x in (*tensors, *lists)] == counts


def test_gil_is_released_while_the_kernel_runs():
    # float64 in one thread takes about 10 ns an element: a tenth of a second in the kernel.
    lists = [[torch.full((10_000_000,), 0.1, dtype=torch.float64)] for _ in range(3)]
    duration = []

    def step():
        torch.set_num_threads(1)
        start = time.perf_counter()
        lpsgd_ext.lpsgdm_(*lists, lr=1e-3, p=4.0)
        duration.append(time.perf_counter() - start)

    threads = torch.get_num_threads()
    worker = threading.Thread(target=step)
    longest_wait, last = 0.0, time.perf_counter()
    worker.start()  # may return when the step is over
    while not duration:
        now = time.perf_counter()
        longest_wait, last = max(longest_wait, now - last), now
    longest_wait = max(longest_wait, time.perf_counter() - last)
    worker.join()
    torch.set_num_threads(threads)
    assert longest_wait < 0.5 * duration[0]


def test_two_threads_step_two_models_and_a_third_changes_the_lists():  # noqa: C901, its threads' too
    def lists(seed):
        generator = torch.Generator().manual_seed(seed)
        return [[torch.randn(n, generator=generator) for n in (3, 700, 40000)] for _ in range(3)]

    def run(tensors, steps=50):
        for _ in range(steps):
            lpsgd_ext.lpsgdm_(*tensors, lr=1e-3, p=4.0)

    alone = [lists(0), lists(1)]
    for tensors in alone:
        run(tensors)
    together = [lists(0), lists(1)]
    volatile = [list(tensors) for tensors in lists(2)]
    stop = threading.Event()
    failures = []

    def change():
        while not stop.is_set():
            for tensors in volatile:
                tensors.append(torch.ones(3))
                tensors.pop()

    def step_volatile():
        while not stop.is_set():
            try:
                lpsgd_ext.lpsgdm_(*volatile, lr=1e-3, p=4.0)
            except ValueError as error:
                if "same number" not in str(error):
                    failures.append(error)

    workers = [threading.Thread(target=run, args=(tensors,)) for tensors in together]
    noise = [threading.Thread(target=change), threading.Thread(target=step_volatile)]
    for thread in [*workers, *noise]:
        thread.start()
    for thread in workers:
        thread.join()
    stop.set()
    for thread in noise:
        thread.join()
    assert not failures
    for a, b in zip(alone, together, strict=True):
        for x, y in zip(a[0] + a[2], b[0] + b[2], strict=True):
            assert torch.equal(bits(x), bits(y))


def test_forked_child_steps_with_the_same_bits():
    # The tensors are made before the fork: PyTorch's own parallel operations hang after it.
    code = """
import os, signal, torch, lpsgd_ext
torch.set_num_threads(2)
parent, child = ([[torch.linspace(-1, 1, 100_000)] for _ in range(3)] for _ in range(2))
lpsgd_ext.lpsgdm_(*parent, lr=1e-3, p=4.0)
pid = os.fork()
if pid == 0:
    signal.alarm(60)
    lpsgd_ext.lpsgdm_(*child, lr=1e-3, p=4.0)
    os._exit(0 if child[0][0].tolist() == parent[0][0].tolist() else 1)
print(os.waitpid(pid, 0)[1])
"""
    assert python(code)[0] == "0"


def test_ctrl_c_is_heard_after_the_step_and_leaves_it_whole():
    code = """
import os, signal, threading, torch, lpsgd_ext
signal.signal(signal.SIGINT, signal.default_int_handler)  # shells ignore it in the background
tensors = [[torch.ones(20_000_000)] for _ in range(3)]
threading.Timer(0.01, os.kill, (os.getpid(), signal.SIGINT)).start()
steps = 0
try:
    for _ in range(100):
        lpsgd_ext.lpsgdm_(*tensors, lr=1e-3, p=4.0)
        steps += 1
except KeyboardInterrupt:
    print("interrupted", len(set(tensors[0][0].tolist())))
"""
    assert python(code)[0] == "interrupted 1"


@pytest.mark.parametrize("p", [2.0, 2.5, 3.0, 6.0, 100.0, 1e9])
def test_rho_is_eq_20(p):
    assert lpsgd_ext.rho(p) == (p - 2) / (p - 1)


def test_rho_at_infinity_is_1():
    assert lpsgd_ext.rho(math.inf) == 1.0
