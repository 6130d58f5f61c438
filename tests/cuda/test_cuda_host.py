# SPDX-License-Identifier: MIT
"""CUDA steps without a GPU: the module built with the stand-in for nvcc, on the driver's double.

The tests of `host` run in one process of their own, whose libcuda.so.1 is the double.
"""

import os
import sys

import pytest

from helpers import ROOT, quick_compiler, run, tool

NO_DRIVER = """
import lpsgd, lpsgd_ext, torch
assert lpsgd_ext.build_info()["cuda"]
param = torch.nn.Parameter(torch.ones(3))
param.grad = torch.ones(3)
lpsgd.LPSGDM([param]).step()
with open("/proc/self/maps") as maps:  # PyTorch's CUDA builds look for the driver themselves
    assert torch.version.cuda or "libcuda.so" not in maps.read()
refusals = {lpsgd_ext.cuda_refusal(0) for _ in range(2)}
print(*refusals, sep="\\n")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Has the module in `lib` and the double in `double`."""
    folder = tmp_path_factory.mktemp("cuda_host")
    compiler = os.environ.get("CC") or tool("cc")
    make = [tool("make"), "-sC", "tests/csrc", "double", f"BUILD={folder}", f"CC={compiler}"]
    run(make, MAKEFLAGS="")
    build = ["build_ext", "--build-lib", folder / "lib", "--build-temp", folder / "temp"]
    stand_in = str(ROOT / "tests" / "csrc" / "nvcc_double.sh")
    options = {"NVCC": stand_in, "LPSGD_CUDA": "1", "LPSGD_WERROR": "1"}
    run([sys.executable, "setup.py", "-q", *build], CC=quick_compiler(folder), **options)
    return folder


def environment(folder, driver):
    path = [str(folder / "lib"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"PYTHONPATH": os.pathsep.join(path), "LD_LIBRARY_PATH": str(driver)}


def test_cuda_host(folder):
    run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests/cuda/host"],
        **environment(folder, folder / "double"),
    )


def refusal_of(folder, driver):
    """The one refusal of a process that has done everything else without the driver."""
    (refusal,) = run([sys.executable, "-c", NO_DRIVER], **environment(folder, driver)).splitlines()
    return refusal


def test_only_a_cuda_step_looks_for_the_driver_and_says_why_it_cannot_be_used(folder, tmp_path):
    (tmp_path / "libcuda.so.1").write_text("no driver")
    refusal = refusal_of(folder, tmp_path)
    assert refusal.startswith("the NVIDIA driver cannot be used: ")
    assert str(tmp_path / "libcuda.so.1") in refusal


def test_a_driver_without_a_function_is_refused_by_its_name(folder, tmp_path):
    double = (folder / "double" / "libcuda.so.1").read_bytes()
    renamed = double.replace(b"\0cuLibraryGetKernel\0", b"\0cuLibraryGetNothin\0")
    (tmp_path / "libcuda.so.1").write_bytes(renamed)
    refusal = refusal_of(folder, tmp_path)
    assert refusal == "the NVIDIA driver is too old: it has no cuLibraryGetKernel"
