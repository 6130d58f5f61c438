# SPDX-License-Identifier: MIT
"""Builds lpsgd_ext. PyTorch is needed neither to build nor to link it.

Without it, lpsgd works in PyTorch's operations. That is what is installed where there is no C
compiler at all, and where lpsgd_ext has never run. A compiler that fails is an error.

Environment variables:
    LPSGD_NATIVE: 0 builds no lpsgd_ext, 1 fails where there can be none. (While Python runs, 0
        leaves it alone, and 1 fails where there is none.)
    CC: the compiler (gcc and clang are tested).
    LPSGD_CUDA: 0 builds without CUDA kernels, 1 fails where they cannot be built; by default a
        build without an nvcc that can says why and goes on. It must be of CUDA 12.8 or later.
    NVCC, CUDA_HOME, CUDA_PATH: nvcc, or the folder whose bin has it; otherwise it is that in PATH.
    TORCH_CUDA_ARCH_LIST: other GPUs than CUDA_ARCHITECTURES, as for PyTorch's extensions.
    MAX_JOBS: how many architectures are compiled at once, by default one for every CPU.
    LPSGD_OPENMP: 0 builds without OpenMP, 1 fails where OpenMP is missing; by default a build
        without OpenMP says so and goes on.
    LPSGD_WERROR: 1 makes warnings errors.
    SOURCE_DATE_EPOCH: when archives say their files were written, in seconds since 1970; with it
        the same sources give the same bytes.
    LPSGD_SANITIZE: 1 builds with the address and undefined-behaviour sanitizers.
"""

import gzip
import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
from glob import glob
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.sdist import sdist
from setuptools.errors import CompileError, ExecError, LinkError

# The arithmetic's contract of bits rests on these (csrc/lpsgd_element.h).
ARITHMETIC_FLAGS = ["-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
WARNING_FLAGS = ["-Wall", "-Wextra", "-Wpedantic", "-Wconversion", "-Wshadow"]
SANITIZE_FLAGS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
CUDA_FLAGS = ["-fatbin", "-std=c++17", "-O3", "-fmad=false", "-Icsrc", "--compress-mode=size"]
# Machine code for these; PTX of the first serves every GPU between and after them.
CUDA_ARCHITECTURES = "7.5+PTX;8.0;8.6;8.9;9.0;10.0;12.0"
LEAST_CUDA = (12, 8)  # the first that knows --compress-mode and compute capability 10.0 and 12.0
NEEDS = (
    "lpsgd_ext needs a C compiler and Python's headers: apt install gcc python3-dev (Debian, "
    "Ubuntu), dnf install gcc python3-devel (Fedora), conda install c-compiler"
)
OPENMP_PROBE = (
    "#include <omp.h>\nint probe(void);\nint probe(void) { return omp_get_max_threads(); }\n"
)


def cuda_targets(architectures: str) -> list[str]:
    """nvcc's names of what a list in TORCH_CUDA_ARCH_LIST's format asks for."""
    targets = []
    for name in re.split("[; ]+", architectures.strip("; ")):
        capability = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", name)
        if not capability:
            raise CompileError(f"TORCH_CUDA_ARCH_LIST: {name!r} is no compute capability")
        number = "".join(capability.groups()[:3])
        targets += [f"sm_{number}", *([f"compute_{number}"] if capability[4] else [])]
    return targets


def cuda_flags(targets: list[str]) -> list[str]:
    numbered = [(target, target.partition("_")[2]) for target in targets]
    return CUDA_FLAGS + [f"-gencode=arch=compute_{n},code={target}" for target, n in numbered]


def find_nvcc() -> str | None:
    if "NVCC" in os.environ:
        return os.environ["NVCC"]
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return shutil.which("nvcc", path=home and str(Path(home, "bin")))


class BuildExt(build_ext):
    """Chooses the compiler's flags when the compiler is known."""

    def build_extensions(self) -> None:
        self.force = True  # no time stamp tells that flags have changed
        compile_flags = ["-std=c11", "-D_DEFAULT_SOURCE", "-fvisibility=hidden", "-g0"]
        compile_flags += ARITHMETIC_FLAGS + WARNING_FLAGS
        link_flags: list[str] = []
        if os.environ.get("LPSGD_WERROR") == "1":
            compile_flags.append("-Werror")
        if os.environ.get("LPSGD_SANITIZE") == "1":
            compile_flags += [*SANITIZE_FLAGS, "-g"]
            link_flags += SANITIZE_FLAGS
        if self.openmp_works():
            compile_flags.append("-fopenmp")
            link_flags.append("-fopenmp")
        cuda_macros = self.cuda_macros()
        compile_flags += cuda_macros
        for extension in self.extensions:
            extension.libraries += ["dl"] if cuda_macros else []  # finds the driver
            extension.extra_compile_args = compile_flags
            extension.extra_link_args = link_flags
        try:
            super().build_extensions()
        except CompileError as error:
            raise CompileError(f"{error}. {NEEDS}") from None

    def cuda_macros(self) -> list[str]:
        """Tells the C code of the CUDA kernels, if there are any."""
        wish = os.environ.get("LPSGD_CUDA")
        if wish == "0":
            return []
        try:
            return self.build_cuda()
        except (CompileError, ExecError, OSError, subprocess.SubprocessError) as error:
            if wish == "1":
                raise
            self.warn(f"lpsgd_ext will have no CUDA kernels: {error}")
            return []

    def build_cuda(self) -> list[str]:
        """Makes the fat binary of the CUDA kernels."""
        nvcc = find_nvcc()
        if not nvcc:
            raise CompileError("there is no nvcc")
        answer = subprocess.run([nvcc, "--version"], check=True, capture_output=True, text=True)
        release = re.search(r"release (\d+)\.(\d+)", answer.stdout)
        version = (int(release[1]), int(release[2])) if release else (0, 0)
        if version < LEAST_CUDA:
            raise CompileError(
                f"{nvcc} is of CUDA {version[0]}.{version[1]}, and "
                f"{LEAST_CUDA[0]}.{LEAST_CUDA[1]} or later is needed"
            )
        targets = cuda_targets(os.environ.get("TORCH_CUDA_ARCH_LIST") or CUDA_ARCHITECTURES)
        image = Path(self.build_temp, "lpsgd_cuda.fatbin").absolute()
        image.parent.mkdir(parents=True, exist_ok=True)
        jobs = f"--threads={os.environ.get('MAX_JOBS', 0)}"
        self.spawn([nvcc, *cuda_flags(targets), jobs, "csrc/lpsgd_cuda.cu", "-o", str(image)])
        driver = "12.4" if version[0] < 13 else f"{version[0]}.0"  # as in csrc/lpsgd_cuda.c
        self.announce(
            f"lpsgd_ext has CUDA kernels for {' '.join(targets)}; on a GPU it will need an NVIDIA "
            f"driver of CUDA {driver} or later (nvidia-smi shows it)",
            level=logging.INFO,
        )
        return [
            f'-DLPSGD_CUDA_IMAGE="{image}"',
            f"-DLPSGD_CUDA_VERSION={version[0] * 1000 + version[1] * 10}",
            f'-DLPSGD_CUDA_ARCHITECTURES="{" ".join(targets)}"',
        ]

    def openmp_works(self) -> bool:
        wish = os.environ.get("LPSGD_OPENMP")
        if wish == "0":
            return False
        with tempfile.TemporaryDirectory() as directory:
            source = Path(directory, "probe.c")
            source.write_text(OPENMP_PROBE)
            try:
                objects = self.compiler.compile(
                    [str(source)], output_dir="/", extra_postargs=["-fopenmp"]
                )
                self.compiler.link_shared_object(
                    objects, str(Path(directory, "probe.so")), extra_postargs=["-fopenmp"]
                )
            except (CompileError, LinkError):
                if wish == "1":
                    raise
                self.warn("OpenMP does not work: lpsgd_ext will run in one thread")
                return False
        return True


class Sdist(sdist):
    """An archive that tells nothing of who packed it, nor, with SOURCE_DATE_EPOCH, of when; the
    wheel that is built from it takes its files' modes over."""

    def make_archive(self, base_name, format, root_dir=None, base_dir=None, owner=None, group=None):
        assert format == "gztar", "the one that a package index takes"
        packed = int(os.environ.get("SOURCE_DATE_EPOCH", time.time()))

        def anonymous(info: tarfile.TarInfo) -> tarfile.TarInfo:
            info.mtime, info.uid, info.gid, info.uname, info.gname = packed, 0, 0, "", ""
            info.mode = 0o755 if info.isdir() else 0o644
            return info

        path = f"{base_name}.tar.gz"
        with (
            gzip.GzipFile(path, "wb", mtime=packed) as file,
            tarfile.open(fileobj=file, mode="w") as archive,
        ):
            archive.add(base_dir, filter=anonymous)
        return path


def version() -> str:
    """LPSGD_VERSION of lpsgd.h, the one place that says it."""
    header = Path(__file__).with_name("csrc") / "lpsgd.h"
    found = re.search(r'LPSGD_VERSION "(.+)"', header.read_text())
    assert found, "lpsgd.h defines no LPSGD_VERSION"
    return found.group(1)


def find_compiler() -> bool:
    """Whether there is a C compiler: that of CC, Python's own, or another, which becomes CC's."""
    if "CC" in os.environ:
        return True  # and if it fails, that is not what was wished for
    own, *_ = shlex.split(sysconfig.get_config_var("CC") or "") or ["cc"]
    found = next(filter(shutil.which, (own, "cc", "gcc", "clang")), None)
    if found and found != own:
        os.environ["CC"] = found
    return found is not None


def why_not() -> str | None:
    """Why no lpsgd_ext is built; None: it is."""
    if os.environ.get("LPSGD_NATIVE") == "0":
        return "LPSGD_NATIVE=0"
    demanded = "1" in (os.environ.get(f"LPSGD_{name}") for name in ("NATIVE", "OPENMP", "CUDA"))
    why = None
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        why = "it relies on the GIL and has no build for free-threaded Pythons (3.13t, 3.14t)"
        if demanded:
            sys.exit(f"lpsgd_ext cannot be built: {why}")
    elif sys.platform != "linux":
        why = f"it has never run on {sys.platform}; LPSGD_NATIVE=1 tries to build it"
    elif not find_compiler():
        why = f"there is no C compiler. {NEEDS}"
    return None if demanded else why


LPSGD_EXT = Extension(
    "lpsgd_ext",
    sources=sorted(glob("csrc/*.c") + glob("lpsgd_ext/*.c")),
    depends=[*glob("csrc/*.h"), *glob("csrc/*.cu"), *glob("lpsgd_ext/*.h"), "setup.py"],
    include_dirs=["csrc"],
    define_macros=[("Py_LIMITED_API", "0x030a0000")],
    libraries=["m", "pthread"],
    py_limited_api=True,
)
WHY_NOT = why_not()
if WHY_NOT:
    print(f"lpsgd will work in PyTorch's operations, without lpsgd_ext: {WHY_NOT}", file=sys.stderr)
setup(
    version=version(),
    ext_modules=[] if WHY_NOT else [LPSGD_EXT],
    cmdclass={"build_ext": BuildExt, "sdist": Sdist},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
