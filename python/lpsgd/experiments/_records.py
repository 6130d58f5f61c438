# SPDX-License-Identifier: MIT
"""Files that are whole at every moment, and JSON for floats that JSON lacks."""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def jsonable(value: Any) -> Any:
    """The value with tuples as lists, and the floats that JSON lacks as strings, which `float`
    reads."""
    if isinstance(value, dict):
        return {key: jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def rounded(value: Any, digits: int = 4) -> Any:
    """The value with every float cut to so many significant digits: results are kept small."""
    if isinstance(value, dict):
        return {key: rounded(item, digits) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item, digits) for item in value]
    if isinstance(value, float):
        return float(f"{value:.{digits}g}")
    return value


def dumps(value: Any, indent: int | None = None) -> str:
    """`value` as strict JSON."""
    return json.dumps(jsonable(value), indent=indent, allow_nan=False, ensure_ascii=False)


def write_whole(file: Path, write: Callable[[Path], object]) -> None:
    """Replaces `file` by what `write` writes, at once: who is killed meanwhile leaves the old one.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     write_whole(Path(directory) / "a", lambda file: file.write_text("text"))
        ...     (Path(directory) / "a").read_text()
        'text'
    """
    part = file.with_name(f"{file.name}.{os.getpid()}.part")
    write(part)
    with open(part, "rb") as written:
        os.fsync(written.fileno())
    os.replace(part, file)
