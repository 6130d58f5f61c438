# SPDX-License-Identifier: MIT
"""Tries the wheel in dist: python tests/packaging/release/try_wheel.py PYTHON:TORCH ...

For each pair, as 3.10:2.10.0, makes an environment with that Python and PyTorch, installs the
wheel, runs test_installed.py and removes the environment again. Prints a table at the end, and
fails if anything failed or nothing ran.
"""

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
NO_PYTHON = "no such Python"


def find_python(version: str) -> str | None:
    """A Python in PATH or of pyenv, whose commands in PATH work only for the versions chosen."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"), "versions")
    name = f"python{version}"
    for python in [shutil.which(name), *sorted(pyenv.glob(f"{version}.*/bin/{name}"))]:
        works = python and subprocess.run([python, "-c", "import ensurepip"], capture_output=True)
        if works and works.returncode == 0:
            return str(python)
    return None


def try_wheel(wheel: Path, version: str, torch: str) -> str:
    """How it went, in words."""
    python = find_python(version)
    if python is None:
        return NO_PYTHON
    with tempfile.TemporaryDirectory(prefix="lpsgd-wheel-") as folder:
        in_venv = str(Path(folder, "bin", "python"))
        pip = [in_venv, "-m", "pip", "install", "--quiet", "--no-cache-dir"]
        pytest = ["-m", "pytest", "-q", "-c", HERE / "pytest.ini"]
        for step, command in {
            "FAILED to make an environment": [python, "-m", "venv", folder],
            "FAILED to install": [*pip, wheel, f"torch=={torch}", "pytest"],
            "FAILED": [in_venv, *pytest, HERE / "test_installed.py"],
        }.items():
            if subprocess.run(command, cwd=folder).returncode:
                return step
        return "passed"


def version_of(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(".")))


def table(results: dict[str, str]) -> str:
    """A row for each Python, a column for each PyTorch; "-" where a pair was not asked for."""
    pythons, torches = (
        sorted(set(versions), key=version_of)
        for versions in zip(*(pair.split(":") for pair in results), strict=True)
    )
    rows = [["Python", *(f"PyTorch {torch}" for torch in torches)], ["---"] * (len(torches) + 1)]
    for python in pythons:
        rows.append([python, *(results.get(f"{python}:{torch}", "-") for torch in torches)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> int:
    (wheel,) = (HERE.parents[2] / "dist").glob(f"*_{platform.machine()}.whl")
    results = {}
    for pair in sys.argv[1:]:
        print(f"== Python {pair.replace(':', ', PyTorch ')}", flush=True)
        results[pair] = try_wheel(wheel, *pair.split(":"))
        print(results[pair], flush=True)
    print(wheel.name, table(results), sep="\n\n")
    return {*results.values()} - {NO_PYTHON} != {"passed"}


if __name__ == "__main__":
    sys.exit(main())
