# SPDX-License-Identifier: MIT
"""The tasks by name."""

from collections.abc import Mapping
from typing import Any

from benchmarks.paper.task import Source, Task


def task_class(name: str) -> type[Task]:
    """The class of a task. Each is imported when needed: they need different packages."""
    if name == "digits":
        from benchmarks.paper.digits import Digits

        return Digits
    if name == "images":
        from benchmarks.paper.images import Images

        return Images
    if name == "characters":
        from benchmarks.paper.characters import Characters

        return Characters
    raise ValueError(f"there is no task {name!r}")


def make_task(settings: Mapping[str, Any], final: bool, source: Source) -> Task:
    """The task that a run describes: its name, and the keyword arguments of the class."""
    arguments = dict(settings)
    return task_class(arguments.pop("name"))(final, source, **arguments)
