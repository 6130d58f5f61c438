# SPDX-License-Identifier: MIT
"""Runs the tests of csrc alone, which are C programs (tests/csrc)."""

import os
import subprocess

import pytest

from helpers import ROOT, tool

NEEDS = {
    "check": ["cc", "pkg-config"],
    "golden-native": ["cc", "pkg-config"],
    "check-guard-pages": ["cc", "pkg-config"],
    "check-sanitize": ["gcc"],
    "check-example": ["cc", "pkg-config"],
    "check-old-cpu": ["gcc", "qemu-x86_64"],
    "check-aarch64": ["aarch64-linux-gnu-gcc", "qemu-aarch64"],
    "check-s390x": ["s390x-linux-gnu-gcc", "qemu-s390x"],
}


def make(target, *variables):
    command = ["make", "--no-print-directory", "-C", ROOT / "tests" / "csrc", target, *variables]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MAKE")}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)
    print(result.stdout)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]


def has_cmocka():
    code = "#include <stdarg.h>\n#include <stddef.h>\n#include <setjmp.h>\n#include <stdint.h>\n"
    compiler = subprocess.run(
        [os.environ.get("CC", "cc"), "-fsyntax-only", "-xc", "-"],
        input=code + "#include <cmocka.h>\n",
        text=True,
        capture_output=True,
    )
    return compiler.returncode == 0


LONG = ("check-guard-pages", "check-sanitize", "check-old-cpu")  # of other targets, too


VARIABLES = {
    "check": ["CAPABILITIES=avx2 avx512"],  # the baseline's own few functions are seen by golden
    # `make golden` has every level, and this one compiles sooner; and the cuttings.
    "check-aarch64": ["CFLAGS=-O1", "WHOLE=whole"],
    "check-s390x": ["CFLAGS=-O1", "WHOLE=whole"],
    "check-sanitize": ["CC=gcc"],  # Debian's clang comes without the sanitizers' runtime
}


@pytest.mark.parametrize(
    "target",
    [pytest.param(name, marks=[pytest.mark.full] * (name in LONG)) for name in NEEDS],
)
def test_c(target):
    for name in NEEDS[target]:
        tool(name)
    if target in ("check", "check-guard-pages", "check-sanitize") and not has_cmocka():
        pytest.skip("cmocka is not installed")
    make(target, *VARIABLES.get(target, []))


@pytest.mark.full
def test_c_for_the_baseline():
    if not has_cmocka():
        pytest.skip("cmocka is not installed")
    make("check", "CAPABILITIES=default")


@pytest.mark.parametrize("target", ["golden-native", pytest.param("check", marks=pytest.mark.full)])
def test_c_with_clang(target):
    if not has_cmocka():
        pytest.skip("cmocka is not installed")
    make(target, f"CC={tool('clang')}")
