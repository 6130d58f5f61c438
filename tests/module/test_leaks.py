# SPDX-License-Identifier: MIT
"""Memory and references after many steps: 20 000, or LPSGD_LEAK_STEPS (`make leaks`), of those that
C makes at once, and a tenth of that of the others."""

import sys
from pathlib import Path

import pytest

from helpers import run

STEPS = """
import gc, os, sys, torch, lpsgd
from references import count_references
torch.set_num_threads(1)
params = [torch.nn.Parameter(torch.ones(n)) for n in (1, 7, 64)]
for param in params:
    param.grad = torch.ones_like(param)
optimizer = lpsgd.{cls}([{{"params": params[:1]}}, {{"params": params[1:]}}], lr=1e-6, {how})

def resident():
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

def measure():
    references = count_references()
    blocks, bytes = sys.getallocatedblocks(), resident()
    return references, len(gc.get_objects()), blocks, bytes

def step(count):
    for _ in range(count):
        optimizer.step()
        {more}

steps = int(os.environ.get("LPSGD_LEAK_STEPS", 20_000)) // {divisor}
step(steps // 10)
measure()  # the list of all objects takes memory, once
before = measure()
step(steps)
growth = [b - a for a, b in zip(before, measure())]
print("{cls}({how}):", steps, "steps; references, objects, blocks, bytes:", *growth)
# Caches fill and the heap has gaps: what does not grow with the steps.
assert all(abs(one) < steps // 100 + 500 for one in growth[:3])
assert growth[3] < 4 * steps + (6 << 20)
"""


@pytest.mark.parametrize(
    "how, more, divisor",
    [
        ("", "", 1),
        ("p=2.0", "for param in params: param.grad = param.grad.clone()", 1),
        ("p=torch.tensor(4.0)", "", 10),
        ("foreach=True", "", 10),
    ],
)
@pytest.mark.parametrize("cls", ["LPSGD", "LPSGDM"])
def test_many_steps_leave_memory_and_references_as_they_were(cls, how, more, divisor):
    program = STEPS.format(cls=cls, how=how, more=more, divisor=divisor)
    run([sys.executable, "-c", program], PYTHONPATH=str(Path(__file__).parent))
