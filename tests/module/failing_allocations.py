# SPDX-License-Identifier: MIT
"""Makes each step with every one of its allocations failing in turn, those of Python's objects, of
PyTorch and of C: it raises and nothing has changed, or the whole step is made. Nothing is lost.

Run by test_allocation_failures.py with tests/module/failing_malloc.c as LD_PRELOAD and
PYTHONMALLOC=malloc. Prints a line for each call: how many times an allocation failed, and its name.

Not among them: several groups that C does not take all at once, since one has a Tensor lr for
example, and which are stepped one after the other; and PyTorch's own operations.
"""

import ctypes
import itertools
import sys

import torch
from torch.nn import Parameter

import lpsgd
import lpsgd_ext

SIZES = (5, 64, 300)
MANY = SIZES * 7  # CPython keeps tuples of fewer than 20 items, and allocates none anew
ROUNDS = 8

shim = ctypes.CDLL(None)
shim.fail_after.argtypes = [ctypes.c_long, ctypes.c_long]
shim.fail_after.restype = None
shim.failures_left.restype = shim.live_allocations.restype = ctypes.c_long


class Lists:
    """The lists of a call of lpsgd_ext, which `call` makes."""

    def __init__(self, call, count=3, remembered=True, sizes=SIZES):
        self.lists = [[torch.linspace(-1, 1, n) for n in sizes] for _ in range(count)]
        self.function = call
        if remembered:
            self()

    def __call__(self):
        self.function(*self.lists)

    def objects(self):
        return [*self.lists, *(tensor for tensors in self.lists for tensor in tensors)]

    def contents(self):
        return [tensor.clone() for tensors in self.lists for tensor in tensors]


class Step:
    """A step of an optimizer with `groups` groups, the first one or a later one."""

    def __init__(self, cls, groups=1, first=False, dtype=torch.float32, **keywords):
        params = [
            [Parameter(torch.linspace(-1, 1, n).to(dtype)) for n in SIZES] for _ in range(groups)
        ]
        for param in itertools.chain(*params):
            param.grad = torch.linspace(2, -3, param.numel()).to(dtype)
        self.optimizer = cls([{"params": part} for part in params], lr=0.1, **keywords)
        self.params = list(itertools.chain(*params))
        if not first:
            self()

    def __call__(self):
        self.optimizer.step()

    def objects(self):
        return [*self.params, *(param.grad for param in self.params)]

    def contents(self):
        state = self.optimizer.state
        buffers = [tensor.clone() for one in state.values() for tensor in one.values()]
        counts = [group.get("rounding_step", 0) for group in self.optimizer.param_groups]
        params = [param.detach().clone() for param in self.params]
        return [*params, *buffers, len(state), *counts]


def lpsgdm(*lists, **keywords):
    lpsgd_ext.lpsgdm_(*lists, lr=0.1, p=4.0, **keywords)


def rounded(*lists):
    lpsgdm(*lists, seed=1 << 40, step=1 << 40, streams=[1 << 40, 1, 2], offsets=(0, 1 << 50, 0))


def param_groups(params, grads):
    numbers = {"lr": 0.1, "p": 4.0, "weight_decay": 0.0, "eps": 1e-8, "pivot": 1.0}
    numbers |= dict.fromkeys(("maximize", "differentiable", "capturable"), False)
    numbers |= {"stochastic_rounding": True, "fused": None, "foreach": None}
    numbers |= {"seed": 1 << 40, "rounding_step": 1 << 40}
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    if not lpsgd_ext.step_param_groups([{"params": params, **numbers}], None, False):
        raise MemoryError  # of PyTorch's: for all that this function tells, the step was unusual


HALF = {"dtype": torch.bfloat16, "stochastic_rounding": True}
CALLS = {
    "lpsgd_": lambda: Lists(lambda *lists: lpsgd_ext.lpsgd_(*lists, lr=0.1, p=4.0), 2),
    "lpsgdm_": lambda: Lists(lpsgdm),
    "lpsgdm_, first": lambda: Lists(lpsgdm, remembered=False),
    "lpsgdm_, rounded": lambda: Lists(rounded),
    "lpsgdm_, many": lambda: Lists(lpsgdm, sizes=MANY),
    "step_param_groups": lambda: Lists(param_groups, 2),
    "step_param_groups, many": lambda: Lists(param_groups, 2, sizes=MANY),
    "LPSGD": lambda: Step(lpsgd.LPSGD),
    "LPSGDM": lambda: Step(lpsgd.LPSGDM),
    "LPSGDM, first": lambda: Step(lpsgd.LPSGDM, first=True),
    "LPSGDM, 3 groups": lambda: Step(lpsgd.LPSGDM, 3),
    "LPSGDM, 3 groups, first": lambda: Step(lpsgd.LPSGDM, 3, first=True),
    "LPSGDM, fused, first": lambda: Step(lpsgd.LPSGDM, 2, first=True, fused=True),
    "LPSGDM, rounded": lambda: Step(lpsgd.LPSGDM, **HALF),
    "LPSGDM, 3 groups, rounded": lambda: Step(lpsgd.LPSGDM, 3, **HALF),
    "LPSGDM, one byte": lambda: Step(lpsgd.LPSGDM, 2, momentum_dtype=torch.float8_e5m2),
    "LPSGDM, Tensor p": lambda: Step(lpsgd.LPSGDM, p=torch.tensor(4.0)),
}


def same(contents, others):
    """Whether the tensors and numbers are equal, one by one."""
    return len(contents) == len(others) and all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
        for a, b in zip(contents, others, strict=True)
    )


def is_of_memory(error):
    """Whether the error says that memory is lacking; PyTorch has its own words for it."""
    words = ("alloc", "increment_version expect")
    return isinstance(error, MemoryError) or any(word in str(error) for word in words)


def fail(name, make, count):
    """Lets `count` allocations fail, from each in turn; returns how many times one did."""
    call = make()
    call()
    stepped = call.contents()
    for skipped in itertools.count():
        call, error = make(), None
        objects, before = call.objects(), call.contents()
        references = list(map(sys.getrefcount, objects))
        shim.fail_after(skipped, count)
        try:
            call()
        except BaseException as caught:
            error = caught
        left, where = shim.failures_left(), (name, skipped, count)
        assert error is None or is_of_memory(error), (where, error)
        if error is not None:
            error = None
            # (CPython 3.11 loses the frame of a generator that lacks memory to be closed.)
            if isinstance(call, Lists):
                assert list(map(sys.getrefcount, objects)) == references, where
        after = call.contents()
        assert same(after, stepped) or same(after, before), where
        if left == count:
            assert same(after, stepped), where
            return skipped


torch.set_num_threads(1)
for name, make in CALLS.items():
    # What an optimizer's Python code needs to put things right must be there.
    in_c = isinstance(make(), Lists)
    counts = (1, 2, 5) if in_c else (1,)
    total, leaks = 0, []
    # A leak loses one each round, forever. (PyTorch keeps some of what optimizers are made of.)
    while not leaks or (in_c and leaks[-1] >= ROUNDS):
        live = shim.live_allocations()
        total += sum(fail(name, make, count) for count in counts for _ in range(ROUNDS))
        leaks.append(shim.live_allocations() - live)
        assert len(leaks) < 5, f"{name} loses allocations in {ROUNDS} rounds: {leaks}"
    print(f"{total:8} {name}")
