# SPDX-License-Identifier: MIT
"""The tasks by name, each in a file of its own."""

from importlib import import_module

from benchmarks.battery.problem import Problem

# The classes; each is imported when needed, as they need different packages. A half of the tasks is
# every other one, so that both halves have networks and data of all kinds.
TASKS = {
    "digits": "Digits",
    "signals": "Signals",
    "table": "Table",
    "image": "Image",
    "gpt": "CharacterGPT",
    "gru": "CharacterGRU",
    "zipf": "Zipf",
    "cifar": "Cifar",
}


def task_class(name: str) -> type[Problem]:
    """The class of a task."""
    found: type[Problem] = getattr(import_module(f"{__name__}.{name}"), TASKS[name])
    return found
