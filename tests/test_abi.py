# SPDX-License-Identifier: MIT
"""dlpack_abi.h against the installed PyTorch's own ATen/dlpack.h."""

import os
import subprocess
from pathlib import Path

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
    source = tmp_path / "abi.c"
    source.write_text("\n".join(lines) + "\n")
    include = Path(torch.__file__).parent / "include"
    subprocess.run(
        [
            *(os.environ.get("CC") or tool("cc"), "-std=c11", "-fsyntax-only"),
            *("-isystem", include, "-I", ROOT / "lpsgd_ext", source),
        ],
        check=True,
    )
