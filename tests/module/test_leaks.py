# SPDX-License-Identifier: MIT
"""Memory and references after many steps: 20 000, or LPSGD_LEAK_STEPS (`make leaks`), of those that
C makes at once, and a tenth of that of the others."""

import os
import sys
from pathlib import Path

from helpers import run

PROGRAM = """
import gc, os, sys, torch, lpsgd
from references import count_references
torch.set_num_threads(1)

class Run:
    def __init__(self, cls, how, copies_grads, divisor):
        self.params = [torch.nn.Parameter(torch.ones(n)) for n in (1, 7, 64)]
        for param in self.params:
            param.grad = torch.ones_like(param)
        groups = [{"params": self.params[:1]}, {"params": self.params[1:]}]
        self.optimizer = cls(groups, lr=1e-6, **how)
        self.copies_grads = copies_grads
        self.steps = int(os.environ.get("LPSGD_LEAK_STEPS", 20_000)) // divisor

    def step(self, count):
        for _ in range(count):
            self.optimizer.step()
            if self.copies_grads:
                for param in self.params:
                    param.grad = param.grad.clone()

def resident():
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

def measure():
    references = count_references()
    blocks, bytes = sys.getallocatedblocks(), resident()
    return references, len(gc.get_objects()), blocks, bytes

runs = [
    Run(cls, *kind)
    for cls in (lpsgd.LPSGD, lpsgd.LPSGDM)
    for kind in (
        ({}, False, 1),
        ({"p": 2.0}, True, 1),
        ({"p": torch.tensor(4.0)}, False, 10),
        ({"foreach": True}, False, 10),
        ({"stochastic_rounding": True, "seed": 1 << 40}, False, 1),
    )
]
runs.append(Run(lpsgd.LPSGDM, {"momentum_dtype": torch.float8_e5m2}, False, 1))
for run in runs:
    run.step(run.steps // 10)
measure()  # the list of all objects takes memory, once
before = measure()
for run in runs:
    run.step(run.steps)
growth = [b - a for a, b in zip(before, measure())]
steps = min(run.steps for run in runs)
print(*(run.steps for run in runs), "steps; references, objects, blocks, bytes:", *growth)
# Caches fill and the heap has gaps: what does not grow with the steps of any run.
assert all(abs(one) < steps // 10 + 500 for one in growth[:3])
assert growth[3] < 40 * steps + (6 << 20)
"""


def test_many_steps_leave_memory_and_references_as_they_were():
    path = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    run([sys.executable, "-c", PROGRAM], PYTHONPATH=os.pathsep.join(path))
