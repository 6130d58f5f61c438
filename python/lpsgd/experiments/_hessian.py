# SPDX-License-Identifier: MIT
"""The curvature of a loss, and how evenly its gradient is spread."""

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm

JIT_WARNING = r"`torch\.jit\.\w+` is deprecated"  # of different categories
POINTS = 128
WIDTH, MARGIN = 3.0, 0.05  # of the bumps, and around them: Papyan's


@dataclass(frozen=True)
class Spectrum:
    """What `spectrum` finds.

    Attributes:
        grid, density: eigenvalues from the smallest to the largest, and their spectral density.
        smallest, largest: eigenvalue.
        flatness: of the gradient.
    """

    grid: list[float]
    density: list[float]
    smallest: float
    largest: float
    flatness: float


def flatness(gradient: Tensor) -> float:
    """How equally a gradient (any shape) is spread over its n coordinates: ‖g‖₁² / (n ‖g‖₂²), which
    is 1 if all are equally large, 2/π if they are normally distributed, and 1/n if one has it all.

    Example:
        >>> flatness(torch.tensor([1.0, -1.0])), flatness(torch.tensor([0.0, 5.0]))
        (1.0, 0.5)
    """
    ratio = gradient.abs().mean().square() / gradient.square().mean()
    return ratio.item()


class _Loss(nn.Module):
    """The loss of a model on a fixed batch, in the form that curvlinops wants."""

    def __init__(self, model: nn.Module, loss: Callable[[nn.Module, Any], Tensor], batch: Any):
        super().__init__()
        self.model, self.loss, self.batch = model, loss, batch

    def forward(self, _: Tensor) -> Tensor:
        return self.loss(self.model, self.batch).mean()[None]


class _Itself(nn.Module):
    reduction = "mean"  # over the batches, of which there is one

    def forward(self, loss: Tensor, _: Tensor) -> Tensor:
        return loss.sum()


def spectrum(
    model: nn.Module, loss: Callable[[nn.Module, Any], Tensor], batch: Any, *, vectors: int = 48
) -> Spectrum:
    """The eigenvalues of the Hessian of a batch's mean loss with respect to all parameters that
    require gradients, and the flatness of its gradient.

    The density is found by Lanczos quadrature (Papyan 2020, in curvlinops), which takes `vectors`
    products with the Hessian, each as long as two gradients. The outermost eigenvalues are the
    first to be exact. It draws its vectors by torch's random generator.

    Dropout is left out, and batch normalisation takes its statistics from the batch. The model
    stays as it is.

    Args:
        model: any network.
        loss: a function of the network and the batch, as for `compare`; two derivatives must exist.
        batch: what `loss` takes.
        vectors: at most as many as there are parameters.

    Example:
        >>> model = nn.Linear(60, 1, bias=False)
        >>> batch = torch.eye(60)[:1]  # one direction alone is curved
        >>> found = spectrum(model, lambda model, x: model(x).square().sum(), batch)
        >>> abs(round(found.smallest, 3)), round(found.largest, 3)
        (0.0, 2.0)
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", JIT_WARNING)  # in what it imports
        from curvlinops import HessianLinearOperator
        from curvlinops.papyan2020traces.spectrum import (
            fast_lanczos,
            lanczos_approximate_spectrum_from_iter,
        )

    model = copy.deepcopy(model).eval()
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.running_mean = module.running_var = module.num_batches_tracked = None
    params = [param for param in model.parameters() if param.requires_grad]
    count = sum(param.numel() for param in params)
    # The fused attention has no second derivative. PyTorch's forward mode uses torch.jit.
    with sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
        warnings.filterwarnings("ignore", JIT_WARNING)
        gradient = torch.autograd.grad(loss(model, batch).mean(), params)
        one = torch.zeros(1, device=params[0].device)
        hessian = HessianLinearOperator(
            _Loss(model, loss, batch), _Itself(), params, [(one, one)], check_deterministic=False
        )
        lanczos = fast_lanczos(hessian, min(vectors, count))
        smallest, largest = lanczos[0].min().item(), lanczos[0].max().item()
        grid, density = lanczos_approximate_spectrum_from_iter(
            lanczos, (smallest, largest), POINTS, WIDTH, MARGIN
        )
    flat = torch.cat([part.flatten() for part in gradient])
    return Spectrum(grid.tolist(), density.tolist(), smallest, largest, flatness(flat))
