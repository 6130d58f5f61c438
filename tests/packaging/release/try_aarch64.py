# SPDX-License-Identifier: MIT
"""Tries the aarch64 wheel in dist with PyTorch's own and Debian's Python, under qemu-user.

Besides test_installed.py it runs two files of the repository's tests of the module; names of others
may be given. The system and the environment stay in build/aarch64.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
SYSTEM, ENVIRONMENT = (ROOT / "build" / "aarch64" / name for name in ("system", "env"))
DEBIAN, PYTHON = "bookworm", "3.11"
TORCH = "2.10.0"  # later ones for aarch64 need CUDA's libraries, 3 GB of them
PACKAGES = ["filelock", "fsspec", "jinja2", "networkx", "numpy", "sympy", "typing-extensions"]
IN_SITE = ENVIRONMENT / "lib" / f"python{PYTHON}" / "site-packages"
TESTS = [
    "tests/packaging/release/test_installed.py",
    "tests/module/test_param_groups.py",
    "tests/module/test_remembered.py",
]


def run(*command, **environment):
    subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, check=True)


def make_system():
    """Debian's packages, unpacked: emulated programs look for files here first."""
    packages = SYSTEM.with_name("packages")
    options = ["--arch=arm64", "--variant=minbase", f"--include=python{PYTHON}"]
    run("debootstrap", "--download-only", *options, DEBIAN, packages)
    unfinished = SYSTEM.with_name("unfinished")
    for package in packages.glob("var/cache/apt/archives/*.deb"):
        run("dpkg", "-x", package, unfinished)
    shutil.rmtree(packages)
    unfinished.rename(SYSTEM)


def install(*what):
    run(
        *[sys.executable, "-m", "pip", "install", "--quiet", "--target", IN_SITE],
        *[f"--platform={tag}_aarch64" for tag in ("manylinux_2_28", "manylinux_2_17")],
        *["--only-binary=:all:", f"--python-version={PYTHON}", "--upgrade", *what],
    )


def make_environment():
    """A virtual environment of that Python, by hand."""
    shutil.rmtree(ENVIRONMENT, ignore_errors=True)
    (ENVIRONMENT / "bin").mkdir(parents=True)
    home = SYSTEM / "usr" / "bin"
    (ENVIRONMENT / "pyvenv.cfg").write_text(f"home = {home}\n")
    (ENVIRONMENT / "bin" / "python").symlink_to(home / f"python{PYTHON}")
    install("--no-deps", f"torch=={TORCH}")
    install(*PACKAGES, "pytest")


def main():
    if not SYSTEM.exists():
        make_system()
    if not (IN_SITE / "torch").exists():
        make_environment()
    (wheel,) = (ROOT / "dist").glob("*_aarch64.whl")
    install("--no-deps", wheel)
    run(
        *["qemu-aarch64", "-L", SYSTEM, ENVIRONMENT / "bin" / "python", "-m", "pytest", "-q"],
        *["-c", "tests/packaging/release/pytest.ini", "--import-mode=importlib"],
        *["-o", "markers=full", "-m", "not full", *(sys.argv[1:] or TESTS)],
        PYTHONPATH=os.pathsep.join(["tests", "tests/module", "tests/optimizer"]),
    )


if __name__ == "__main__":
    main()
