#!/bin/sh
# SPDX-License-Identifier: MIT
# build_wheel.sh MACHINE: makes the wheel for Linux on x86_64 or aarch64 from the sdist in dist.
# -s: zig compiles some of libc along, with its paths.
set -eu
machine=$1
folder=build/wheel/$machine
mkdir -p "$folder"
tar -xzf dist/*.tar.gz -C "$folder" --strip-components=1
export CC="$machine-linux-gnu-gcc"
openmp=$(dirname "$($CC -print-file-name=libgomp.so)")
export LDSHARED="python -m ziglang cc -target $machine-linux-gnu.2.17 -shared -s -L$openmp -lgomp"
export _PYTHON_HOST_PLATFORM="linux-$machine"
python -m build --no-isolation --wheel "$folder"
auditwheel repair --exclude libgomp.so.1 --wheel-dir dist "$folder"/dist/*.whl
