#!/usr/bin/env python
# SPDX-License-Identifier: MIT
"""nvcc of CUDA 12, as far as setup.py calls it, made of two libraries that PyPI has: NVRTC compiles
the kernels and nvFatbin packs them. PyPI has the whole compiler of CUDA 13 alone, whose kernels no
driver of CUDA 12 takes.

    nvcc.py --version
    nvcc.py -fatbin OPTION... -gencode=arch=compute_N,code=NAME... SOURCE -o IMAGE
"""

import ctypes
import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from nvidia import cuda_nvrtc, nvfatbin

# NVRTC has no headers. What lpsgd_cuda.cu takes from them, besides what NVRTC has built in:
HEADERS = {
    b"stdint.h": b"""
        typedef signed char int8_t; typedef unsigned char uint8_t;
        typedef short int16_t; typedef unsigned short uint16_t;
        typedef int int32_t; typedef unsigned uint32_t;
        typedef long long int64_t; typedef unsigned long long uint64_t;
        typedef unsigned long long uintptr_t;
    """,
    b"math.h": b"#define NAN __int_as_float(0x7fc00000)",
    b"string.h": b"",
}


def library(package, name):
    return ctypes.CDLL(str(Path(next(iter(package.__path__)), "lib", name)))


nvrtc = library(cuda_nvrtc, "libnvrtc.so.12")
fatbin = library(nvfatbin, "libnvfatbin.so.12")


def strings(values):
    return (ctypes.c_char_p * len(values))(*values)


def check(code):
    if code:
        sys.exit(f"nvcc.py: error {code}")


def taken(get_size, get, handle):
    """What a pair of functions gives: its size, then its bytes."""
    size = ctypes.c_size_t()
    check(get_size(handle, ctypes.byref(size)))
    content = ctypes.create_string_buffer(size.value)
    check(get(handle, content))
    return content


def compile_for(target, source, options):
    """Machine code for sm_N, PTX for compute_N."""
    program = ctypes.c_void_p()
    text, name = source.read_bytes(), source.name.encode()
    headers = strings(list(HEADERS.values())), strings(list(HEADERS))
    check(nvrtc.nvrtcCreateProgram(ctypes.byref(program), text, name, len(HEADERS), *headers))
    options = [*options, f"--gpu-architecture={target}"]
    result = nvrtc.nvrtcCompileProgram(
        program, len(options), strings([option.encode() for option in options])
    )
    print(taken(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program).value.decode())
    check(result)
    if target.startswith("sm_"):
        return taken(nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN, program)
    return taken(nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX, program)


def main():
    arguments = sys.argv[1:]
    if "--version" in arguments:
        major, minor = ctypes.c_int(), ctypes.c_int()
        check(nvrtc.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
        print(f"nvcc.py of NVRTC, release {major.value}.{minor.value}")
        return
    image = Path(arguments[arguments.index("-o") + 1])
    (source,) = (Path(a) for a in arguments if a.endswith(".cu"))
    targets = [found[1] for a in arguments if (found := re.match("-gencode=.*,code=(.*)", a))]
    options = [a for a in arguments if re.match("-(std=|I|fmad=)", a)] + ["-default-device"]
    (mode,) = (a[1:] for a in arguments if a.startswith("--compress-mode="))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        codes = pool.map(lambda target: compile_for(target, source, options), targets)
    handle, packing = ctypes.c_void_p(), [b"-64", b"-cuda", b"-host=linux", mode.encode()]
    check(fatbin.nvFatbinCreate(ctypes.byref(handle), strings(packing), len(packing)))
    for target, code in zip(targets, codes, strict=True):
        number = target.partition("_")[2].encode()
        if target.startswith("sm_"):
            check(fatbin.nvFatbinAddCubin(handle, code, ctypes.c_size_t(len(code)), number, b""))
        else:
            size = ctypes.c_size_t(len(code))
            check(fatbin.nvFatbinAddPTX(handle, code, size, number, b"", b""))
    image.write_bytes(taken(fatbin.nvFatbinSize, fatbin.nvFatbinGet, handle).raw)


if __name__ == "__main__":
    main()
