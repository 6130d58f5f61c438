# SPDX-License-Identifier: MIT
"""The one place that decides whether C or PyTorch's operations make steps: `lpsgd_ext` is that
module here, or `_reference` where it is not there.

The environment variable LPSGD_NATIVE: 0 leaves lpsgd_ext alone, 1 demands it.
"""

import os
import sys
from typing import Any

# torch comes before lpsgd_ext, so that both share PyTorch's OpenMP runtime.
import torch  # noqa: F401  # isort: skip

BY_CHOICE = os.environ.get("LPSGD_NATIVE") == "0"
FALLBACK: str | None = None  # why PyTorch's operations make every step


def _why(error: ImportError) -> str:
    import sysconfig  # for this alone

    if BY_CHOICE:
        return "LPSGD_NATIVE=0 is in the environment"
    if not isinstance(error, ModuleNotFoundError):
        return f"lpsgd_ext cannot be loaded: {error}"
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        return "lpsgd_ext relies on the GIL, which this Python is built without"
    if sys.platform != "linux":
        return f"lpsgd_ext is not built on {sys.platform}, where it has never run"
    return (
        "lpsgd was installed without lpsgd_ext, where there was no C compiler or with "
        "LPSGD_NATIVE=0; with one, pip install --force-reinstall --no-cache-dir --no-deps lpsgd "
        "builds it"
    )


try:
    if BY_CHOICE:
        raise ImportError
    import lpsgd_ext as lpsgd_ext
except ImportError as error:
    if os.environ.get("LPSGD_NATIVE") == "1":
        raise
    FALLBACK = _why(error)
    from . import _reference as lpsgd_ext  # type: ignore[no-redef]


def build_info() -> dict[str, Any]:
    """How the part in C was built, as `lpsgd_ext.build_info` says, and, as 'fallback', why there is
    none and PyTorch's operations make every step; None: C makes them wherever it can."""
    return {**lpsgd_ext.build_info(), "fallback": FALLBACK}
