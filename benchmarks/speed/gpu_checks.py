# SPDX-License-Identifier: MIT
"""What has to hold on a GPU, as functions of a device. The CPU's kernels are the reference.

A check raises where something is wrong, `Unavailable` where the machine lacks what it needs, and
may return a remark. Those of `CHECKS` run on any device, so that tests run them on the CPU; those
of `CUDA_CHECKS` make no sense elsewhere. Random numbers are drawn on the CPU.
"""

import math
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

import lpsgd_ext
from lpsgd import LPSGD, LPSGDM

Class = type[LPSGD] | type[LPSGDM]
Check = Callable[[torch.device], str | None]

CPU = torch.device("cpu")
CLASSES: tuple[Class, ...] = (LPSGD, LPSGDM)
LR = 2.0**-6
STEPS = 3
TILE_BYTES = 16384  # LPSGD_CUDA_TILE_BYTES of csrc/lpsgd_cuda_kernel.h


class Unavailable(Exception):
    """The machine lacks what a check needs."""


class Kind(NamedTuple):
    """What a step may be asked for; each has a path of its own in the kernels."""

    dtype: torch.dtype
    momentum_dtype: torch.dtype | None = None
    stochastic_rounding: bool = False

    def values(self, cls: Class) -> dict[str, Any]:
        wide = {"momentum_dtype": self.momentum_dtype} if cls is LPSGDM else {}
        return {**wide, "stochastic_rounding": self.stochastic_rounding, "seed": 5}


KINDS = {
    "float32": Kind(torch.float32),
    "bfloat16": Kind(torch.bfloat16),
    "bfloat16, float32 momentum": Kind(torch.bfloat16, torch.float32),
    "bfloat16, stochastic rounding": Kind(torch.bfloat16, None, True),
    "bfloat16, both": Kind(torch.bfloat16, torch.float32, True),
    "float16": Kind(torch.float16),
    "float16, float32 momentum": Kind(torch.float16, torch.float32),
}

VALUES: list[dict[str, Any]] = [
    *({"p": p} for p in (2.0, 2.5, 6.0, math.inf)),
    *(
        {"p": p, "weight_decay": 0.1, "maximize": True, "eps": 0.0}
        for p in (2.0, 2.5, 6.0, math.inf)
    ),
    {"p": 6.0, "pivot": 1e-4},
    {"p": 6.0, "lr": 0.0},
]


class Sample(NamedTuple):
    """A parameter's first value and its gradients step by step, on the CPU. On a device they begin
    so many elements after an aligned address."""

    param: Tensor
    grads: list[Tensor]
    param_shift: int = 0
    grad_shift: int = 0


def randn(generator: torch.Generator, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Random numbers of many magnitudes, float16's subnormal numbers among them."""
    exponents = torch.randint(-20, 4, tuple(shape), generator=generator)
    return torch.randn(tuple(shape), generator=generator).ldexp(exponents).to(dtype)


def sample(generator: torch.Generator, shape: Sequence[int], dtype: torch.dtype) -> Sample:
    grads = [randn(generator, shape, dtype) for _ in range(STEPS)]
    return Sample(randn(generator, shape, dtype), grads)


def samples(dtype: torch.dtype) -> list[Sample]:
    """Every size and place in memory that the kernels treat in a way of its own."""
    generator = torch.Generator().manual_seed(0)
    tile = TILE_BYTES // dtype.itemsize
    sizes = [*range(1, 18), tile - 1, tile, tile + 1, 2 * tile + 3, 100_003]
    shapes: list[tuple[int, ...]] = [(), (0,), (0, 3), (5, 7), *((size,) for size in sizes)]
    plain = [sample(generator, shape, dtype) for shape in shapes]
    shifted = [
        sample(generator, (size,), dtype)._replace(param_shift=param_shift, grad_shift=grad_shift)
        for size in (1, 16, tile + 1)
        for param_shift, grad_shift in ((1, 0), (0, 1), (1, 1), (2, 3))
    ]
    image = sample(generator, (4, 3, 5, 6), dtype)
    channels_last = Sample(
        image.param.to(memory_format=torch.channels_last),
        [grad.to(memory_format=torch.channels_last) for grad in image.grads],
    )
    return [*plain, *shifted, channels_last]


def place(values: Tensor, device: torch.device, shift: int = 0) -> Tensor:
    """A copy on the device that begins `shift` elements after an aligned address."""
    if not shift:
        return values.to(device, copy=True)
    memory = torch.empty(values.numel() + shift, dtype=values.dtype, device=device)
    return memory[shift:].view(values.shape).copy_(values)


def place_params(of: Sequence[Sample], device: torch.device) -> list[Parameter]:
    return [Parameter(place(one.param, device, one.param_shift)) for one in of]


def set_grads(params: Sequence[Parameter], of: Sequence[Sample], step: int) -> None:
    for param, one in zip(params, of, strict=True):
        param.grad = place(one.grads[step], param.device, one.grad_shift)


def results(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Copies on the CPU of the parameters and of the momentum buffers."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    buffers = [value for state in optimizer.state.values() for value in state.values()]
    return [tensor.detach().to(CPU, copy=True) for tensor in (*params, *buffers)]


def train(device: torch.device, of: Sequence[Sample], cls: Class, **values: Any) -> list[Tensor]:
    """The results of some steps on the device."""
    params = place_params(of, device)
    optimizer = cls(params, **{"lr": LR, "fused": True, **values})
    for step in range(STEPS):
        set_grads(params, of, step)
        optimizer.step()
    return results(optimizer)


def bits(tensor: Tensor) -> Tensor:
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.contiguous().view(integer)


def assert_same_bits(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Equal bits everywhere, except that any NaN is as good as another."""
    for i, (a, b) in enumerate(zip(actual, expected, strict=True)):
        differ = (bits(a) != bits(b)) & ~(a.isnan() & b.isnan())
        if differ.any():
            first = tuple(differ.nonzero()[0].tolist())
            raise AssertionError(
                f"{int(differ.sum())} of {a.numel()} elements of tensor {i} ({tuple(a.shape)}) "
                f"differ, the first at {first}: {a[first].item()!r} for {b[first].item()!r}"
            )


def ulps(actual: Tensor, expected: Tensor) -> int:
    """The largest distance, in numbers of the dtype; both have the same signs."""
    return int((bits(actual).long() - bits(expected).long()).abs().max())


def assert_equals_cpu(
    device: torch.device, of: Sequence[Sample], cls: Class, **values: Any
) -> None:
    try:
        assert_same_bits(train(device, of, cls, **values), train(CPU, of, cls, **values))
    except AssertionError as error:
        raise AssertionError(f"{cls.__name__}, {values}: {error}") from None


def bits_of_the_cpu(kind: Kind, device: torch.device) -> None:
    of = samples(kind.dtype)
    for cls in CLASSES:
        for values in VALUES:
            assert_equals_cpu(device, of, cls, **kind.values(cls), **values)


def special_values(kind: Kind, device: torch.device) -> None:
    info = torch.finfo(kind.dtype)
    tiny = info.smallest_normal
    positive = [0.0, tiny * info.eps, tiny / 2, tiny, info.eps, 1.0, 3.0, info.max / 2, info.max]
    magnitudes = torch.tensor([*positive, math.inf, math.nan], dtype=torch.float64)
    special = torch.cat([magnitudes, -magnitudes]).to(kind.dtype)
    n = len(special)
    param = special.repeat_interleave(n)
    grads = [special.roll(shift).repeat(n) for shift in range(STEPS)]
    for cls in CLASSES:
        for values in VALUES:
            all_values = {**kind.values(cls), **values}
            assert_equals_cpu(device, [Sample(param, grads)], cls, **all_values)


def kernels_by_default(device: torch.device) -> None:
    """The bits are the kernels', which PyTorch's operations don't have at p = 6."""
    for cls in CLASSES:
        assert_equals_cpu(device, samples(torch.float32), cls, p=6.0, fused=None)


def more_tensors_than_a_launch_holds(device: torch.device) -> None:
    """Of which the last launch has few, and many."""
    for kind, count in product((KINDS["float32"], KINDS["bfloat16, both"]), (600, 1100)):
        generator = torch.Generator().manual_seed(1)
        of = [sample(generator, (i % 9,), kind.dtype) for i in range(count)]
        for cls in CLASSES:
            assert_equals_cpu(device, of, cls, p=4.0, **kind.values(cls))


def random_bits_of_shards(device: torch.device) -> None:
    """Also of elements beyond the 2^32nd of a parameter."""
    generator = torch.Generator().manual_seed(2)
    lists = [[randn(generator, (100,), torch.bfloat16) for _ in range(2)] for _ in range(3)]

    def step(where: torch.device) -> list[Tensor]:
        params, grads, buffers = ([place(one, where) for one in column] for column in lists)
        lpsgd_ext.lpsgdm_(
            *(params, grads, buffers),
            lr=LR,
            p=4.0,
            seed=-3,
            step=1 << 40,
            streams=[9, 9],
            offsets=[7, (1 << 32) - 50],
        )
        return [tensor.cpu() for tensor in (*params, *buffers)]

    assert_same_bits(step(device), step(CPU))


def a_large_tensor(device: torch.device, rows: int = 32771) -> str:
    """More than 2^31 elements, which repeat a row of prime length, so that an element that is
    stepped twice, or not at all, or with another's gradient, has other bits than its column."""
    columns = 65537
    one = sample(torch.Generator().manual_seed(3), (columns,), torch.bfloat16)
    needed = 5 * rows * columns * one.param.itemsize
    if device.type == "cuda" and torch.cuda.mem_get_info(device)[0] < needed:
        raise Unavailable(f"{needed / 2**30:.0f} GiB of free memory are needed")

    def repeated(row: Tensor) -> Tensor:
        return row.to(device).repeat(rows)

    param = Parameter(repeated(one.param))
    optimizer = LPSGDM([param], lr=LR, p=4.0, fused=True)
    for grad in one.grads:
        param.grad = repeated(grad)
        optimizer.step()
    large = (param.detach(), optimizer.state[param]["momentum_buffer"])
    for tensor, expected in zip(large, train(CPU, [one], LPSGDM, p=4.0), strict=True):
        row = bits(expected).to(device)
        for chunk in torch.split(bits(tensor).view(rows, columns), 2048):
            if not torch.equal(chunk, row.expand_as(chunk)):
                raise AssertionError("an element differs from those of its column")
    return f"{rows * columns} elements"


def directions(device: torch.device, cls: Class, grad: Tensor, **values: Any) -> Tensor:
    """-lr * u of one step: the parameters start from zero, and nothing else is rounded."""
    more: dict[str, Any] = {"momentum": 0.0} if cls is LPSGDM else {}
    param = Parameter(torch.zeros_like(grad, device=device))
    param.grad = place(grad, device)
    cls([param], **more, **values, fused=True).step()
    return param.detach().cpu()


def float64(device: torch.device) -> str:
    """The bits where no power is taken. The power is CUDA's pow() within 2 ulp of the exact one for
    the C library's within 1, each rounded once more in the product."""
    for cls in CLASSES:
        for p in (2.0, math.inf):
            assert_equals_cpu(device, samples(torch.float64), cls, p=p, weight_decay=0.1)
    grad = randn(torch.Generator().manual_seed(4), (100_000,), torch.float64)
    worst = max(
        ulps(directions(device, cls, grad, lr=1.0, p=p), directions(CPU, cls, grad, lr=1.0, p=p))
        for cls in CLASSES
        for p in (2.5, 6.0)
    )
    assert worst <= 4, f"{worst} ulp from the CPU"
    return f"at most {worst} ulp from the CPU"


def pivot_of_device_numbers(device: torch.device) -> str:
    """The GPU takes the power of the pivot, whose last bit may be another: 1 ulp of the step size
    at most, which are up to 2 of a product with it."""
    grad = randn(torch.Generator().manual_seed(5), (100_000,), torch.float32)
    worst = 0
    for cls in CLASSES:
        for p in (2.0, 2.5, 6.0, math.inf):
            there, here = (
                directions(where, cls, grad, lr=torch.tensor(LR, device=where), p=p, pivot=1e-4)
                for where in (device, CPU)
            )
            worst = max(worst, ulps(there, here))
    assert worst <= 2, f"{worst} ulp from the CPU"
    return f"at most {worst} ulp from the CPU"


@contextmanager
def no_synchronization(device: torch.device) -> Iterator[None]:
    """Makes PyTorch raise where the host waits for the device."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def scaled(devices: Sequence[torch.device], cls: Class, dtype: torch.dtype) -> list[Tensor]:
    """The results of steps through a GradScaler, of which the third finds an infinite gradient. The
    parameters take turns over the devices."""
    generator = torch.Generator().manual_seed(6)
    of = [sample(generator, (size,), dtype) for size in (1000, 7, 300)]
    params = [Parameter(place(one.param, devices[i % len(devices)])) for i, one in enumerate(of)]
    optimizer = cls(params, lr=LR, p=6.0, weight_decay=0.1, fused=True)
    scaler = torch.amp.GradScaler(devices[0].type, init_scale=48.0, growth_interval=2)
    for step in range(6):
        scale = scaler.scale(torch.ones((), device=devices[0])).item()
        set_grads(params, of, step % STEPS)
        for param in params:
            assert param.grad is not None
            param.grad *= scale
        infinite = step == 2
        if infinite:
            params[0].grad[7] = math.inf  # type: ignore[index]
        before = results(optimizer)
        with no_synchronization(devices[0]):
            scaler.step(optimizer)
            scaler.update()
        if infinite:
            assert_same_bits(results(optimizer), before)
    return results(optimizer)


def grad_scaler(device: torch.device) -> None:
    """Without waiting for the device, and an infinite gradient leaves every bit."""
    for cls in CLASSES:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            assert_same_bits(scaled([device], cls, dtype), scaled([CPU], cls, dtype))


def capture(step: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """What replays the step's CUDA graph; on the CPU, which has none, the step."""
    if device.type != "cuda":
        return step
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


# lr, p, grad_scale and found_inf of one replay after the other.
REPLAYS = [
    *((LR, 6.0, 1.0, 0.0), (0.1, 6.0, 3.0, 0.0), (0.1, 2.0, 3.0, 1.0), (0.3, 2.0, 1024.0, 0.0)),
    *((LR, math.inf, 1.0, 0.0), (0.0, 2.5, 1.0, 0.0), (LR, 2.5, 0.5, 0.0)),
]


def replays(device: torch.device, cls: Class, kind: Kind) -> list[Tensor]:
    """The results of every replay of one captured step, whose numbers change in place."""
    of = samples(kind.dtype)
    params = place_params(of, device)
    numbers = [torch.tensor(number, device=device) for number in REPLAYS[0]]
    lr, p, grad_scale, found_inf = numbers
    values: dict[str, Any] = {"lr": lr, "p": p, "weight_decay": 0.1, "capturable": True}
    optimizer = cls(params, **values, **kind.values(cls), fused=True)
    vars(optimizer).update(grad_scale=grad_scale, found_inf=found_inf)
    set_grads(params, of, 0)
    optimizer.step()  # makes the state
    replay = capture(optimizer.step, device)
    found = []
    for i, changed in enumerate(REPLAYS):
        for number, value in zip(numbers, changed, strict=True):
            number.fill_(value)
        for param, one in zip(params, of, strict=True):
            assert param.grad is not None
            param.grad.copy_(one.grads[i % STEPS])
        replay()
        found += results(optimizer)
    return found


def graph(device: torch.device) -> None:
    """A captured step reads lr, p, grad_scale and found_inf when it is replayed."""
    for cls in CLASSES:
        for kind in KINDS.values():
            if not kind.stochastic_rounding:  # which refuses to be captured
                assert_same_bits(replays(device, cls, kind), replays(CPU, cls, kind))


def version_counters(device: torch.device) -> None:
    """So that a backward pass through what has changed raises."""
    for cls in CLASSES:
        of = samples(torch.float32)
        params = place_params(of, device)
        optimizer = cls(params, fused=True)
        for step in range(2):
            set_grads(params, of, step)
            buffers = [value for state in optimizer.state.values() for value in state.values()]
            grads = [param.grad for param in params if param.grad is not None]
            written, read = [*params, *buffers], [tensor._version for tensor in grads]
            before = [tensor._version for tensor in written]
            optimizer.step()
            for tensor, version in zip(written, before, strict=True):
                assert tensor._version > version, "a written tensor has its old version"
            assert [tensor._version for tensor in grads] == read, "a gradient has a new version"


def pytorch_operations(device: torch.device) -> None:
    """foreach=True and False, to rounding."""
    for kind in KINDS.values():
        of = [one for one in samples(kind.dtype) if one.param.numel() < 100]
        rtol = 8 * torch.finfo(kind.dtype).eps
        for cls in CLASSES:
            for foreach in (True, False):
                values = {**kind.values(cls), "p": 6.0, "foreach": foreach, "fused": None}
                actual, expected = (train(where, of, cls, **values) for where in (device, CPU))
                for a, b in zip(actual, expected, strict=True):
                    torch.testing.assert_close(a, b, rtol=rtol, atol=1e-5)


def kernels_load(device: torch.device) -> None:
    refusal = lpsgd_ext.cuda_refusal(device.index)
    assert refusal is None, refusal


# Prints the seconds that the first call on a device takes, whose context there is already.
FIRST_CALL = """
import time, torch, lpsgd_ext
torch.cuda.synchronize({0})
begin = time.perf_counter()
refusal = lpsgd_ext.cuda_refusal({0})
print(time.perf_counter() - begin)
assert refusal is None, refusal
"""


def kernels_checked(device: torch.device) -> str:
    """What it takes to load the kernels and to compare them, in processes of their own."""
    milliseconds = []
    for wish in ("0", "1"):
        result = subprocess.run(
            [sys.executable, "-c", FIRST_CALL.format(device.index)],
            env={**os.environ, "LPSGD_CUDA_CHECK": wish},
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stderr
        milliseconds.append(float(result.stdout) * 1e3)
    without, both = milliseconds
    return f"the first call takes {both:.1f} ms, and {without:.1f} ms without the comparison"


@contextmanager
def refused(words: str) -> Iterator[None]:
    """Demands a RuntimeError with these words in a capture."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of an empty graph
        try:
            with torch.cuda.graph(torch.cuda.CUDAGraph()):
                yield
        except RuntimeError as error:
            assert words in str(error), error
        else:
            raise AssertionError("the capture was not refused")


def refused_captures(device: torch.device) -> None:
    """Those that would keep lr and p, or zero the momentum buffers at every replay."""
    for cls in CLASSES:
        of = samples(torch.float32)
        params = place_params(of, device)
        set_grads(params, of, 0)
        optimizer = cls(params, lr=LR, p=6.0, fused=True)
        optimizer.step()
        with refused("capturable is False"):
            optimizer.step()
    optimizer = LPSGDM(params, lr=torch.tensor(LR, device=device), capturable=True, fused=True)
    with refused("make a step before the capture"):
        optimizer.step()
    assert not optimizer.state


def compiled(device: torch.device) -> None:
    """In mode="reduce-overhead", which captures CUDA graphs, later values of lr and p count."""
    of = samples(torch.float32)

    def run(where: torch.device, cls: Class, mode: str | None) -> list[Tensor]:
        params = place_params(of, where)
        optimizer = cls(params, lr=LR, p=6.0, fused=True)
        step = torch.compile(optimizer.step, mode=mode) if mode else optimizer.step
        set_grads(params, of, 0)
        for i, (lr, p, *_) in enumerate(REPLAYS):
            for param, one in zip(params, of, strict=True):
                assert param.grad is not None
                param.grad.copy_(one.grads[i % STEPS])
            optimizer.param_groups[0].update(lr=lr, p=p)
            step()
        return results(optimizer)

    for cls in CLASSES:
        assert_same_bits(run(device, cls, "reduce-overhead"), run(CPU, cls, None))


def side_stream(device: torch.device) -> None:
    """A step waits for what is before it on its stream, and what comes after waits for the step."""
    for cls in CLASSES:
        of = samples(torch.float32)
        params = place_params(of, device)
        optimizer = cls(params, lr=LR, p=6.0, fused=True)
        late = [[place(grad, device) for grad in one.grads] for one in of]
        for param in params:
            param.grad = torch.full_like(param, math.nan)
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            torch.cuda._sleep(200_000_000)  # about a tenth of a second
            before = [param.detach().clone() for param in params]
            for step in range(STEPS):
                for param, grads in zip(params, late, strict=True):
                    assert param.grad is not None
                    param.grad.copy_(grads[step])
                optimizer.step()
            after = [param.detach().clone() for param in params]
        stream.synchronize()
        assert_same_bits([tensor.cpu() for tensor in before], [one.param for one in of])
        assert_same_bits([tensor.cpu() for tensor in after], train(CPU, of, cls, p=6.0)[: len(of)])


def nothing_waits(device: torch.device) -> None:
    """The host is done with a step while the device has not begun it."""
    for cls in CLASSES:
        of = samples(torch.float32)
        params = place_params(of, device)
        lr = torch.tensor(LR, device=device)
        for optimizer in (cls(params, fused=True), cls(params, lr=lr, fused=True)):
            set_grads(params, of, 0)
            optimizer.step()  # loads the kernels and makes the state
            set_grads(params, of, 1)
            torch.cuda.synchronize(device)
            torch.cuda._sleep(200_000_000)
            optimizer.step()
            done = torch.cuda.current_stream(device).query()
            torch.cuda.synchronize(device)
            assert not done, "the step waited for the device"


def captured_pytorch_operations(device: torch.device) -> None:
    """foreach=True and False read a lr on the device when they are replayed."""
    of = samples(torch.float32)

    def run(cls: Class, foreach: bool, captured: bool) -> list[Tensor]:
        params = place_params(of, device)
        lr = torch.tensor(LR, device=device)
        optimizer = cls(params, lr=lr, p=6.0, foreach=foreach, capturable=True)
        set_grads(params, of, 0)
        optimizer.step()  # makes the state
        step = capture(optimizer.step, device) if captured else optimizer.step
        for value in (LR, 0.1):
            lr.fill_(value)
            step()
        return results(optimizer)

    for cls in CLASSES:
        for foreach in (True, False):
            assert_same_bits(run(cls, foreach, True), run(cls, foreach, False))


def another_device(device: torch.device) -> torch.device:
    """Another device than this one."""
    count = torch.cuda.device_count()
    if count < 2:
        raise Unavailable("there is one CUDA device")
    return torch.device("cuda", (device.index + 1) % count)


def not_the_current_device(device: torch.device) -> None:
    other = another_device(device)
    for cls in CLASSES:
        assert_equals_cpu(other, samples(torch.float32), cls, p=6.0)
        assert_same_bits(scaled([other], cls, torch.float32), scaled([CPU], cls, torch.float32))
    assert torch.cuda.current_device() == device.index, "the step changed the current device"


def two_devices_in_one_group(device: torch.device) -> None:
    """Also where grad_scale and found_inf are on the first."""
    devices = [device, another_device(device)]
    for cls in CLASSES:
        for dtype in (torch.float32, torch.bfloat16):
            assert_same_bits(scaled(devices, cls, dtype), scaled([CPU], cls, dtype))


CHECKS: dict[str, Check] = {
    **{f"the CPU's bits: {name}": partial(bits_of_the_cpu, kind) for name, kind in KINDS.items()},
    **{f"special values: {name}": partial(special_values, kind) for name, kind in KINDS.items()},
    "fused=None takes the kernels": kernels_by_default,
    "more tensors than one launch holds": more_tensors_than_a_launch_holds,
    "random bits of shards": random_bits_of_shards,
    "more than 2^31 elements": a_large_tensor,
    "float64": float64,
    "pivot with lr on the device": pivot_of_device_numbers,
    "GradScaler without synchronisation": grad_scaler,
    "replays of a CUDA graph": graph,
    "version counters": version_counters,
    "PyTorch's operations": pytorch_operations,
}

CUDA_CHECKS: dict[str, Check] = {
    "how long loading and comparing the kernels takes": kernels_checked,
    "captures that have to be refused": refused_captures,
    "torch.compile with CUDA graphs": compiled,
    "a side stream": side_stream,
    "no step waits for the device": nothing_waits,
    "replays of PyTorch's operations": captured_pytorch_operations,
    "a device that is not the current one": not_the_current_device,
    "two devices in one group": two_devices_in_one_group,
}

# compute-sanitizer lets the host wait, is slow, and finds more without PyTorch's caching allocator,
# which captures need.
NOT_UNDER_SANITIZER = (
    "how long loading and comparing the kernels takes",
    "captures that have to be refused",
    "torch.compile with CUDA graphs",
    "more than 2^31 elements",
    "replays of a CUDA graph",
    "no step waits for the device",
    "replays of PyTorch's operations",
)


def run_checks(checks: dict[str, Check], device: torch.device) -> dict[str, str]:
    """Runs them all, prints a line for each and returns the lines without their names."""
    outcomes = {}
    for name, check in checks.items():
        try:
            remark = check(device)
            outcome = f"ok ({remark})" if remark else "ok"
        except Unavailable as reason:
            outcome = f"skipped: {reason}"
        except Exception as error:
            outcome = f"FAILED: {type(error).__name__}: {error}"
        outcomes[name] = outcome
        print(f"{name}: {outcome}")
        sys.stdout.flush()
    return outcomes
