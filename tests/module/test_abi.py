# SPDX-License-Identifier: MIT
"""Declarations of our own against PyTorch's ATen/dlpack.h and CUDA's cuda.h."""

import os
import subprocess
from pathlib import Path

import pytest
import torch

from helpers import ROOT, tool

PAIRS = {
    "DLTensor": (
        "lpsgd_dl_tensor",
        ["data", "device", "ndim", "dtype", "shape", "strides", "byte_offset"],
    ),
    "DLDevice": ("lpsgd_dl_device", ["device_type", "device_id"]),
    "DLDataType": ("lpsgd_dl_dtype", ["code", "bits", "lanes"]),
    "DLPackExchangeAPI": (
        "lpsgd_dl_api",
        [
            *("header", "managed_tensor_allocator", "managed_tensor_from_py_object_no_sync"),
            *("managed_tensor_to_py_object_no_sync", "dltensor_from_py_object_no_sync"),
            "current_work_stream",
        ],
    ),
}
ENUMS = {
    "DLPACK_MAJOR_VERSION": "LPSGD_DL_MAJOR",
    "kDLCPU": "LPSGD_DL_CPU",
    "kDLCUDA": "LPSGD_DL_CUDA",
    "kDLUInt": "LPSGD_DL_UINT",
    "kDLFloat": "LPSGD_DL_FLOAT",
    "kDLBfloat": "LPSGD_DL_BFLOAT",
}


def test_declarations_agree_with_the_installed_pytorch(tmp_path):
    lines = ["#include <stddef.h>", "#include <ATen/dlpack.h>", '#include "dlpack_abi.h"']
    equal = '_Static_assert({0} == {1}, "{0}");'
    for theirs, (ours, fields) in PAIRS.items():
        lines.append(equal.format(f"sizeof({theirs})", f"sizeof({ours})"))
        for field in fields:
            lines.append(equal.format(f"offsetof({theirs}, {field})", f"offsetof({ours}, {field})"))
            sizes = [f"sizeof((({name} *)0)->{field})" for name in (theirs, ours)]
            lines.append(equal.format(*sizes))
    for field in ("prev_api", "version.minor"):
        ours = field.replace("version.", "")
        lines.append(
            equal.format(
                f"offsetof(DLPackExchangeAPIHeader, {field})", f"offsetof(lpsgd_dl_header, {ours})"
            )
        )
    lines += [equal.format(theirs, ours) for theirs, ours in ENUMS.items()]
    compile_lines(lines, tmp_path, Path(torch.__file__).parent / "include", "lpsgd_ext")


def compile_lines(lines, folder, theirs, ours):
    source = folder / "abi.c"
    source.write_text("\n".join(lines) + "\n")
    subprocess.run(
        [
            *(os.environ.get("CC") or tool("cc"), "-std=c11", "-fsyntax-only"),
            *("-isystem", theirs, "-I", ROOT / ours, source),
        ],
        check=True,
    )


def folder_of_cuda_h():
    """PyTorch's CUDA builds come with one."""
    folders = [*Path(torch.__file__).parents[1].glob("nvidia/*/include")]
    folders.append(Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "include"))
    for folder in folders:
        if (folder / "cuda.h").exists():
            return folder
    pytest.skip("there is no cuda.h")


def test_declarations_agree_with_the_installed_cuda(tmp_path):
    lines = ["#include <cuda.h>", '#include "lpsgd_cuda_driver.h"']
    # A second declaration of a function is an error unless it is the same.
    lines.append("#define DECLARE(name, parameters) CUresult name parameters;")
    lines.append("LPSGD_CUDA_DRIVER(DECLARE)")
    for name in ("CUresult", "CUdevice", "CUjit_option", "CUlibraryOption"):
        lines.append(f'_Static_assert(sizeof({name}) == sizeof(int), "{name}");')
    compile_lines(lines, tmp_path, folder_of_cuda_h(), "csrc")
