# SPDX-License-Identifier: MIT
"""Tries the wheel in dist: python tests/packaging/release/try_wheel.py PYTHON:TORCH ...

For each pair, as 3.10:2.10.0, makes an environment with that Python and PyTorch, installs the
wheel, runs test_installed.py and removes the environment again. Says at the end what ran, what did
not for want of a Python, and fails if anything failed or nothing ran.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
NO_PYTHON = "not run: there is no such Python"


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
        found = "import sys, torch; print('passed:', sys.version.split()[0], torch.__version__)"
        return subprocess.check_output([in_venv, "-c", found], text=True).strip()


def main() -> int:
    (wheel,) = (HERE.parents[2] / "dist").glob("*.whl")
    results = {}
    for pair in sys.argv[1:]:
        print(f"== Python {pair.replace(':', ', PyTorch ')}", flush=True)
        results[pair] = try_wheel(wheel, *pair.split(":"))
        print(results[pair], flush=True)
    print(wheel.name, *(f"{pair}: {result}" for pair, result in results.items()), sep="\n")
    ran = [result for result in results.values() if result != NO_PYTHON]
    return not (ran and all(result.startswith("passed") for result in ran))


if __name__ == "__main__":
    sys.exit(main())
