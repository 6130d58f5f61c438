# SPDX-License-Identifier: MIT
"""What C computes beside the steps, once more in Python: the schedule and the random bits, whose
bits are C's. And lpsgd_ext's functions as they are where there is no lpsgd_ext: those of them that
make steps refuse all.
"""

import importlib.metadata
import math
from typing import TYPE_CHECKING, Any, NoReturn, SupportsFloat

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lpsgd_ext import BuildInfo

# The schedule: csrc/lpsgd_schedule.c.


def _number(function: str, name: str, value: Any) -> float:
    try:
        return math.ldexp(value, 0)  # takes what C takes, which is no string
    except TypeError:
        raise TypeError(
            f"{function}(): argument '{name}' must be float, not {type(value)}"
        ) from None


def rho(p: SupportsFloat, /) -> float:
    """lpsgd_rho."""
    p = _number("rho", "p", p)
    if not p >= 2.0:
        raise ValueError(f"Invalid p value: {p}")
    return 1.0 if math.isinf(p) else (p - 2.0) / (p - 1.0)


def _sine_squared(z: float) -> float:
    """sin(pi z / 2)^2 for 0 <= z <= 1/2: Taylor's series."""
    angle = z * 1.5707963267948966
    square, series = angle * angle, 0.0
    for k in (-1307674368000.0, 6227020800.0, -39916800.0, 362880.0, -5040.0, 120.0, -6.0, 1.0):
        series = series * square + 1.0 / k
    return series * angle * (series * angle)


def cosine_p(
    s: SupportsFloat, total: SupportsFloat, p_max: SupportsFloat, p_min: SupportsFloat = 2.0
) -> float:
    """lpsgd_cosine_p."""
    values = []
    for name, value in {"s": s, "total": total, "p_max": p_max, "p_min": p_min}.items():
        number = _number("cosine_p", name, value)
        if not (1.0 if name in ("s", "total") else 2.0) <= number < math.inf:
            raise ValueError(f"Invalid {name}: {number}")
        values.append(number)
    now, end, first, last = values
    if now == 1.0:
        return first
    if now >= end:
        return last
    done, left = now - 1.0, end - now
    if done < left:
        weight = 1.0 - _sine_squared(done / (end - 1.0))
    else:
        weight = 0.5 if done == left else _sine_squared(left / (end - 1.0))
    p = last + (first - last) * weight
    return min(max(p, min(first, last)), max(first, last))


# The random bits: csrc/lpsgd_element.h. Integers are modulo 2^64, and tensors int64.

_LOW_32, _LOW_64 = (1 << 32) - 1, (1 << 64) - 1


def _mix(x: int) -> int:
    """lpsgd_mix."""
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & _LOW_64
    x = (x ^ x >> 27) * 0x94D049BB133111EB & _LOW_64
    return x ^ x >> 31


def _key(key: int, number: int) -> int:
    """lpsgd_key."""
    return _mix(key + 0x9E3779B97F4A7C15 * (number + 1) & _LOW_64)


def _rounding_key(seed: int, step: int) -> int:
    return _key(_mix(seed & _LOW_64), step & _LOW_64)


def _indices(param: Tensor, offset: int) -> Tensor:
    """The number of every element of `param`, from `offset` on in the order of the strides: as they
    lie in memory."""
    indices = torch.empty_like(param, dtype=torch.int64, memory_format=torch.preserve_format)
    strides = indices.stride()
    order = sorted(range(param.dim()), key=lambda d: (strides[d], param.size(d)), reverse=True)
    in_order = indices.permute(order)
    counted = torch.arange(offset, offset + param.numel(), device=param.device)
    in_order.copy_(counted.view(in_order.shape))
    return indices


def _random(key: int, index: Tensor) -> Tensor:
    """lpsgd_random for every index."""
    x = index & _LOW_32 ^ key & _LOW_32
    x = (x ^ x >> 17) * 0xED5AD4BB & _LOW_32
    x ^= (index >> 32) * 0x9E3779B9 + (key >> 32) & _LOW_32
    x = (x ^ x >> 11) * 0xAC4C1B51 & _LOW_32
    x = (x ^ x >> 15) * 0x31848BAB & _LOW_32
    return x ^ x >> 14


def random_bits(param: Tensor, seed: int, step: int, stream: int, offset: int) -> Tensor:
    """The 32 random bits by which every element of `param` is rounded to bfloat16."""
    key = _key(_rounding_key(seed, step), stream & _LOW_64)
    return _random(key, _indices(param, offset))


def random_bytes(param: Tensor, seed: int, step: int, stream: int, offset: int) -> Tensor:
    """The random byte by which every element's momentum is rounded to one byte: lpsgd_byte_key and
    lpsgd_random_byte."""
    key = _key(_key(_rounding_key(seed, step), 0x6D6F6D656E74), stream & _LOW_64)
    i = _indices(param, offset)
    bits = _random(key, (i >> 6 << 4) + (i & 15))
    return bits >> ((i >> 4 & 3) << 3) & 0xFF


# The rest of what the classes ask lpsgd_ext.


class CudaError(RuntimeError):
    """Never raised."""


def lpsgd_(*lists: Any, **values: Any) -> NoReturn:
    raise RuntimeError("there is no lpsgd_ext")


lpsgdm_ = lpsgd_


def step_param_groups(*arguments: Any) -> bool:
    return False


step_param = step_param_groups


def build_info() -> "BuildInfo":
    return {
        "version": importlib.metadata.version("lpsgd"),
        "compiler": "",
        "openmp": False,
        "cuda": None,
        "cuda_architectures": "",
    }
