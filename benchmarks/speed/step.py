# SPDX-License-Identifier: MIT
"""What is stepped and who steps: lists of parameters, and the contenders."""

from collections.abc import Callable
from functools import partial
from math import inf
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import SGD, AdamW, Optimizer

import lpsgd_ext
from benchmarks.lion import lion
from benchmarks.speed.bound import MemoryBound
from lpsgd import LPSGD, LPSGDM, _eager

Shapes = list[tuple[int, ...]]


class Steps(Protocol):
    """What is timed."""

    def step(self) -> object: ...


Make = Callable[[list[Parameter]], Steps]
MakeOptimizer = Callable[[list[Parameter]], Optimizer]


def resnet(blocks: tuple[int, ...], bottleneck: bool) -> Shapes:
    """The parameters of torchvision's ResNet for 1000 classes, without building the network."""
    shapes: Shapes = [(64, 3, 7, 7), (64,), (64,)]
    width_in = 64
    for stage, count in enumerate(blocks):
        width = 64 << stage
        width_out = width * 4 if bottleneck else width
        for block in range(count):
            sizes = (
                [(width, width_in, 1), (width, width, 3), (width_out, width, 1)]
                if bottleneck
                else [(width, width_in, 3), (width, width, 3)]
            )
            if block == 0 and width_in != width_out:
                sizes.append((width_out, width_in, 1))
            for out, channels, kernel in sizes:
                shapes += [(out, channels, kernel, kernel), (out,), (out,)]
            width_in = width_out
    return [*shapes, (1000, width_in), (1000,)]


def transformer(layers: int, width: int) -> Shapes:
    """The parameters of a transformer's blocks and of the normalisation after them."""
    norm: Shapes = [(width,), (width,)]
    sizes = [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)]
    attention_in, attention_out, up, down = ([size, size[:1]] for size in sizes)
    block = [*norm, *attention_in, *attention_out, *norm, *up, *down]
    return [*block * layers, *norm]


LISTS: dict[str, Shapes] = {
    "ResNet-18": resnet((2, 2, 2, 2), bottleneck=False),
    "ResNet-50": resnet((3, 4, 6, 3), bottleneck=True),
    "ViT-B/16": [
        *((1, 1, 768), (1, 197, 768), (768, 3, 16, 16), (768,)),
        *transformer(12, 768),
        *((1000, 768), (1000,)),
    ],
    "GPT-2": [(50257, 768), (1024, 768), *transformer(12, 768)],
    "1000 x 64": [(64,)] * 1000,
    "62 x 1": [(1,)] * 62,
    "4k": [(1 << 12,)],
    "64k": [(1 << 16,)],
    "1M": [(1 << 20,)],
    "16M": [(1 << 24,)],
    "64M": [(1 << 26,)],
}


def shapes_of(name: str) -> Shapes:
    """A list by its name, or so many tensors of so many elements: "1000 x 64"."""
    if name in LISTS:
        return LISTS[name]
    count, size = map(int, name.split(" x "))
    return [(size,)] * count


class CompiledEager:
    """The eager LPSGDM's operations as one graph of torch.compile. (`LPSGDM.step` itself calls the
    C kernel when it is compiled.)"""

    def __init__(self, params: list[Parameter]) -> None:
        torch.compiler.reset()  # otherwise lists that were compiled before count against its limit
        self.params = params
        self.buffers = [torch.zeros_like(param) for param in params]
        self.update = torch.compile(self._update, fullgraph=True, dynamic=False)

    @staticmethod
    def _update(params: list[Any], grads: list[Any], buffers: list[Tensor]) -> None:
        torch._foreach_lerp_(buffers, grads, 0.1)
        directions = _eager._directions(buffers, rho=2 / 3, eps=1e-8)  # p = 4
        torch._foreach_mul_(params, 1 - 1e-3 * 1e-2)
        torch._foreach_add_(params, directions, alpha=-1e-3)

    @torch.no_grad()
    def step(self) -> None:
        self.update(self.params, [param.grad for param in self.params], self.buffers)


class NativeStep:
    """The call of C that LPSGDM's step makes, without what Python does around it."""

    def __init__(self, params: list[Parameter]) -> None:
        optimizer = LPSGDM(params, lr=1e-3, p=4.0, weight_decay=1e-2, fused=True)
        groups, state = optimizer.param_groups, optimizer.state
        self.step = partial(lpsgd_ext.step_param_groups, groups, state, False)
        optimizer.step()  # makes the state


class NativeCall:
    """The same with lists of tensors at hand. A dry run checks them and writes nothing."""

    def __init__(self, params: list[Parameter], dry_run: bool = False) -> None:
        self.step = partial(
            lpsgd_ext.lpsgdm_,
            [param.detach() for param in params],
            [param.grad for param in params if param.grad is not None],
            [torch.zeros_like(param) for param in params],
            lr=1e-3,
            p=4.0,
            weight_decay=1e-2,
            dry_run=dry_run,
        )


CONTENDERS: dict[str, MakeOptimizer] = {
    **{
        f"LPSGDM p={p:g}": partial(LPSGDM, lr=1e-3, p=p, weight_decay=1e-2, fused=True)
        for p in (2.0, 4.0, inf)
    },
    "LPSGDM one byte": partial(
        LPSGDM, lr=1e-3, p=4.0, weight_decay=1e-2, momentum_dtype=torch.float8_e5m2, fused=True
    ),
    "SGD fused": partial(SGD, lr=1e-3, momentum=0.9, weight_decay=1e-2, fused=True),
    "SGD foreach": partial(SGD, lr=1e-3, momentum=0.9, weight_decay=1e-2, foreach=True),
    "SGD": partial(SGD, lr=1e-3, momentum=0.9, weight_decay=1e-2),
    "AdamW fused": partial(AdamW, lr=1e-3, fused=True),
    "AdamW foreach": partial(AdamW, lr=1e-3, foreach=True),
    "Lion": partial(lion, lr=1e-4, weight_decay=1e-2),
    "eager LPSGDM": partial(LPSGDM, lr=1e-3, p=4.0, weight_decay=1e-2, foreach=True),
    "eager LPSGDM for-loop": partial(LPSGDM, lr=1e-3, p=4.0, weight_decay=1e-2, foreach=False),
}
WITHOUT_MOMENTUM: dict[str, MakeOptimizer] = {
    **{
        f"LPSGD p={p:g}": partial(LPSGD, lr=1e-3, p=p, weight_decay=1e-2, fused=True)
        for p in (2.0, 4.0, inf)
    },
    "plain SGD fused": partial(SGD, lr=1e-3, weight_decay=1e-2, fused=True),
    "plain SGD foreach": partial(SGD, lr=1e-3, weight_decay=1e-2, foreach=True),
    "plain SGD": partial(SGD, lr=1e-3, weight_decay=1e-2),
    "eager LPSGD": partial(LPSGD, lr=1e-3, p=4.0, weight_decay=1e-2, foreach=True),
}
OTHERS: dict[str, Make] = {
    "eager LPSGDM compiled": CompiledEager,
    "memory": MemoryBound,
    "memory, no momentum": partial(MemoryBound, momentum=False),
    "C step": NativeStep,
    "C step of lists": NativeCall,
    "C checks of lists": partial(NativeCall, dry_run=True),
}
ALL: dict[str, Make] = {**CONTENDERS, **WITHOUT_MOMENTUM, **OTHERS}
