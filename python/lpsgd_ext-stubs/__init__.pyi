# SPDX-License-Identifier: MIT
"""LPSGD and LPSGDM steps on PyTorch tensors, in C (arXiv:2606.02078)."""

from collections.abc import Sequence
from typing import Any, SupportsFloat, TypedDict

from torch import Tensor, dtype

class CudaError(RuntimeError):
    """The CUDA driver refused a launch after everything had been checked. Of a step of more than
    500 tensors a part may have been made.
    """

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
) -> None:
    """One LPSGD step in place (arXiv:2606.02078, eq 21 and 22), for every element::

        u = grad / (|grad| + eps)**rho * pivot**(-1 / (p - 1)),  rho = (p - 2) / (p - 1)
        param = (1 - lr * weight_decay) * param - lr * u

    Args:
        params: list or tuple of dense CPU or CUDA tensors, float32, float64, bfloat16 or float16,
            of type Tensor or Parameter exactly; no two may share memory. Updated in place, whether
            or not they require grad; autograd's version counters are incremented.
        grads: one tensor for each parameter, of its shape, dtype and strides. Not changed.
        lr: learning rate, >= 0.
        p: norm, >= 2; 2 is gradient descent, math.inf is sign descent.
        weight_decay: decoupled weight decay, >= 0.
        eps: added to `|grad|`, >= 0.
        pivot: the `|grad|` at which `|u|` is 1 for every p, > 0; 1 is the paper.
        maximize: ascend instead of descend.
        grad_scale: what the gradients have been multiplied by, > 0; None for 1.
        found_inf: other than 0, everything is checked and nothing changed; None for 0.
        seed: None rounds to nearest; an int rounds bfloat16 results up or down at random such that
            the mean is exact. The random bits depend on seed, step, stream and the element's index
            alone.
        step: the number of this step.
        streams: one int for each parameter, its number in the model; None for 0, 1, ...
        offsets: one int for each parameter, the index of its first element in the whole parameter
            that it is a shard of; None for zeros.
        scratch: a uint8 tensor of cuda_scratch_size() elements on the CUDA device of all params.
            With it, lr, p, weight_decay, grad_scale and found_inf may be one-element tensors
            there, which the GPU reads when it makes the step, unchecked; without it their values
            are waited for.
        dry_run: check everything and change nothing.

    Raises TypeError, ValueError or RuntimeError with the name of the argument and the index; then
    no tensor has changed. Several threads may call it at once on different tensors; the GIL is
    released while the kernel runs, on torch.get_num_threads() threads.
    """

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
) -> None:
    """One LPSGDM step in place (arXiv:2606.02078, eq 23 to 25), for every element::

        momentum_buffer = momentum * momentum_buffer + (1 - momentum) * grad
        u = momentum_buffer / (|momentum_buffer| + eps)**rho * pivot**(-1 / (p - 1))
        param = (1 - lr * weight_decay) * param - lr * u

    Args:
        momentum_buffers: one tensor for each parameter, of its shape, dtype and strides, zeros
            before the first step. Updated in place.
        momentum: 0 <= momentum < 1.
        momentum_dtype: the dtype of the momentum buffers of float32, bfloat16 and float16
            parameters: torch.float32, torch.bfloat16, torch.float8_e5m2 or the name of one; None
            for the parameter's, which float64 parameters always have.
        momentum_exponent: float8_e5m2 holds the momentum times 2 to the power of this; an int from
            -126 to 126.
        stochastic_rounding: whether bfloat16, of parameters and of momentum buffers, is rounded at
            random; None: if there is a seed. float8_e5m2 always is, and needs a seed.
        accumulate: how many micro-batches there are in a step, >= 1: (1 - momentum) is divided by
            it.
        continues: the momentum buffers have taken a micro-batch of this step: 1 stands for
            momentum.
        momentum_only: leave the parameters as they are, since the step goes on.
            So the momentum sums micro-batches: all but the first continue, and all but the last are
            momentum_only.

    The other arguments, the errors and what it says of threads are those of `lpsgd_`.
    """

def cuda_refusal(device: int) -> str | None:
    """None if steps can run on the CUDA device of this index, else why they cannot: the driver's
    own words, that this build has no CUDA kernels, or in what their bits differ from the CPU's.
    Loads the driver and the kernels, and compares each once, but not while PyTorch's current
    stream there is captured in a graph, nor with LPSGD_CUDA_CHECK=0 in the environment.
    """

def cuda_scratch_size() -> int:
    """The least number of elements of the argument `scratch` of `lpsgd_` and `lpsgdm_`."""

def rho(p: SupportsFloat) -> float:
    """(p - 2) / (p - 1), the exponent of the update (arXiv:2606.02078, eq 20): 0 at p = 2, 1 at
    math.inf. Raises ValueError for p < 2 or NaN.
    """

def cosine_p(
    s: SupportsFloat, total: SupportsFloat, p_max: SupportsFloat, p_min: SupportsFloat = 2.0
) -> float:
    """p of the cosine schedule at epoch or step s = 1 ... total (arXiv:2606.02078, eq 19)::

        p_min + (p_max - p_min) * (1 + cos(pi * (s - 1) / (total - 1))) / 2

    Exactly p_max at s = 1 and p_min from s = total on; total = 1 has p_max at s = 1. Fractions are
    allowed. Raises ValueError unless s >= 1, total >= 1 and 2 <= p_max, p_min, all finite.
    """

def cpu_capability() -> str:
    """The instruction set that steps run on: 'default', 'avx2' or 'avx512'. The best that the CPU
    has, lowered by the environment variable LPSGD_CPU_CAPABILITY, which is read when the module is
    imported. Every one gives the same bits (float64 aside).
    """

def build_info() -> BuildInfo:
    """How this binary was built, as a dict: 'version', 'compiler', 'openmp' (False: every step
    runs in one thread), 'cuda' (the version of CUDA that made the kernels, as '13.0'; None: CUDA
    tensors take PyTorch's operations) and 'cuda_architectures' (what they are for, as 'sm_90
    compute_90').
    """

# Internal: the classes call these, and a release may change them without notice.

def step_param_groups(
    param_groups: list[dict[str, Any]],
    state: dict[Tensor, dict[str, Any]] | None,
    observed: bool,
    /,
) -> bool:
    """The step of an optimizer, in place, for all of its groups at once.

    Args:
        param_groups: list of dicts with the keys of LPSGD or LPSGDM.
        state: dict of each parameter's state, a dict with its momentum_buffer; None for LPSGD.
        observed: step only groups with fused=True.

    Returns True if the step has been made, and False if anything about it is unusual, errors and
    the capture of a CUDA graph included: then nothing has changed. Raises CudaError as `lpsgdm_`
    does.
    """

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
) -> bool:
    """What `step_param_groups` does, for one parameter, which is to have a gradient.

    Args:
        param: the parameter; it need not be in the group.
        group: dict with the keys of LPSGD or LPSGDM.
        state, observed: as for `step_param_groups`.
        number: the parameter's among those of all groups, as `streams` of `lpsgd_`.
        accumulate, momentum_only: as for `lpsgdm_`.
        taken: how many micro-batches of this step the momentum has taken, >= 0. The step goes on
            with them and is rounded as the one that comes so many later. `rounding_step` is not
            counted.

    Returns and raises what `step_param_groups` does.
    """
