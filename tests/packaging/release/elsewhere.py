# SPDX-License-Identifier: MIT
"""Builds the module for macOS and Windows by zig through setup.py, and audits what comes out.

Nothing of it is run: there is no Python of theirs here. It may need Python's limited API alone and
export its init function alone.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from abi3info import DATAS, FUNCTIONS

ROOT = Path(__file__).resolve().parents[3]
OUTPUT = ROOT / "build" / "elsewhere"
ZIG = [sys.executable, "-m", "ziglang"]
MACOS, WINDOWS = ["aarch64-macos", "x86_64-macos"], "x86_64-windows-gnu"
# What Python's headers take from the configuration that Python for Windows comes with.
PYCONFIG = """
#define MS_WINDOWS
#define MS_WIN64
#define HAVE_DECLSPEC_DLL
#define Py_ENABLE_SHARED
#define HAVE_SYS_TYPES_H 1
#define HAVE_SYS_STAT_H 1
#define SIZEOF_VOID_P 8
#define SIZEOF_SIZE_T 8
#define SIZEOF_LONG 4
#define SIZEOF_LONG_LONG 8
#define SIZEOF_INT 4
#define SIZEOF_WCHAR_T 2
"""
THE_LINKERS = {"___dso_handle", "__mh_dylib_header"}  # in every library of macOS


def run(*command, **environment) -> str:
    result = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True
    )
    if result.returncode:
        sys.exit(result.stdout + f"FAILED: {' '.join(map(str, command))}")
    return result.stdout


def windows_flags() -> tuple[str, str]:
    """Options that find headers and an import library of Python for Windows, both made here."""
    folder = OUTPUT / "python"
    shutil.copytree(sysconfig.get_path("include"), folder)
    (folder / "pyconfig.h").write_text(PYCONFIG)
    names = sorted(symbol.name for symbol in [*FUNCTIONS, *DATAS])
    definition = folder / "python3.def"
    definition.write_text("\n".join(["LIBRARY python3.dll", "EXPORTS", *names]))
    library = folder / "python3.lib"
    run(*ZIG, "dlltool", "-m", "i386:x86-64", "-d", definition, "-l", library)
    return f"-I{folder}", str(library)


def build(target: str, includes: str, link_flags: str) -> Path:
    cc = f"{' '.join(ZIG)} cc -target {target} {includes}"
    switches = {"LPSGD_CUDA": "0", "LPSGD_OPENMP": "0", "LPSGD_WERROR": "1"}
    folders = ["--build-lib", OUTPUT / target, "--build-temp", OUTPUT / "objects" / target]
    setup = [sys.executable, "setup.py", "-q", "build_ext", *folders]
    run(*setup, CC=cc, LDSHARED=f"{cc} -shared {link_flags}", **switches)
    return OUTPUT / target / "lpsgd_ext.abi3.so"


def audit(module: Path, exports: set[str]) -> None:
    run("abi3audit", "--strict", "--assume-minimum-abi3", "3.10", module)
    if exports - THE_LINKERS != {"PyInit_lpsgd_ext"}:
        sys.exit(f"FAILED: {module} exports {sorted(exports)}")
    print(f"built and audited: {module.relative_to(ROOT)}, {module.stat().st_size} bytes")


def main() -> None:
    shutil.rmtree(OUTPUT, ignore_errors=True)
    for target in MACOS:
        module = build(target, "", "-undefined dynamic_lookup")
        names = run("llvm-nm", "-gU", module).split()[2::3]
        audit(module, {name.replace("_Py", "Py", 1) for name in names})
    built = build(WINDOWS, *windows_flags())
    module = built.rename(built.with_name("lpsgd_ext.pyd"))
    lines = run("llvm-readobj", "--coff-exports", module).splitlines()
    audit(module, {line.split()[1] for line in lines if line.strip().startswith("Name:")})


if __name__ == "__main__":
    main()
