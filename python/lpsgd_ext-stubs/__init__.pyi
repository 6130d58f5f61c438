# SPDX-License-Identifier: MIT
from collections.abc import Sequence
from typing import Any, SupportsFloat, TypedDict

from torch import Tensor, dtype

class CudaError(RuntimeError): ...

class BuildInfo(TypedDict):
    version: str
    compiler: str
    openmp: bool
    cuda: str | None
    cuda_architectures: str

def lpsgd_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    *,
    lr: SupportsFloat,
    p: SupportsFloat,
    weight_decay: SupportsFloat = 0.0,
    eps: SupportsFloat = 1e-8,
    pivot: SupportsFloat = 1.0,
    maximize: bool = False,
    grad_scale: SupportsFloat | None = None,
    found_inf: SupportsFloat | None = None,
    seed: int | None = None,
    step: int = 0,
    streams: Sequence[int] | None = None,
    offsets: Sequence[int] | None = None,
    scratch: Tensor | None = None,
    dry_run: bool = False,
) -> None: ...
def lpsgdm_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    *,
    lr: SupportsFloat,
    p: SupportsFloat,
    momentum: SupportsFloat = 0.9,
    weight_decay: SupportsFloat = 0.0,
    eps: SupportsFloat = 1e-8,
    pivot: SupportsFloat = 1.0,
    maximize: bool = False,
    momentum_dtype: dtype | str | None = None,
    momentum_exponent: int = 15,
    stochastic_rounding: bool | None = None,
    grad_scale: SupportsFloat | None = None,
    found_inf: SupportsFloat | None = None,
    seed: int | None = None,
    step: int = 0,
    streams: Sequence[int] | None = None,
    offsets: Sequence[int] | None = None,
    scratch: Tensor | None = None,
    dry_run: bool = False,
    accumulate: int = 1,
    continues: bool = False,
    momentum_only: bool = False,
) -> None: ...
def cuda_refusal(device: int) -> str | None: ...
def cuda_scratch_size() -> int: ...
def rho(p: SupportsFloat) -> float: ...
def step_param_groups(
    param_groups: list[dict[str, Any]],
    state: dict[Tensor, dict[str, Any]] | None,
    observed: bool,
    /,
) -> bool: ...
def step_param(
    param: Tensor,
    group: dict[str, Any],
    state: dict[Tensor, dict[str, Any]] | None,
    observed: bool,
    number: int,
    accumulate: int = 1,
    taken: int = 0,
    momentum_only: bool = False,
    /,
) -> bool: ...
def cosine_p(
    s: SupportsFloat, total: SupportsFloat, p_max: SupportsFloat, p_min: SupportsFloat = 2.0
) -> float: ...
def cpu_capability() -> str: ...
def build_info() -> BuildInfo: ...
