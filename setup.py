# SPDX-License-Identifier: MIT
"""Builds lpsgd_ext. PyTorch is needed neither to build nor to link it.

Environment variables:
    CC: the compiler (gcc and clang are tested).
    LPSGD_CUDA: 0 builds without CUDA kernels, 1 fails where they cannot be built; by default a
        build without nvcc says so and goes on. NVCC: the path of nvcc, else that in PATH.
    LPSGD_OPENMP: 0 builds without OpenMP, 1 fails where OpenMP is missing; by default a build
        without OpenMP says so and goes on.
    LPSGD_WERROR: 1 makes warnings errors.
    LPSGD_SANITIZE: 1 builds with the address and undefined-behaviour sanitizers.
"""

import os
import re
import shutil
import tempfile
from glob import glob
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, LinkError

# The arithmetic's contract of bits rests on these (csrc/lpsgd_element.h).
ARITHMETIC_FLAGS = ["-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
WARNING_FLAGS = ["-Wall", "-Wextra", "-Wpedantic", "-Wconversion", "-Wshadow"]
SANITIZE_FLAGS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
# Machine code for these; PTX of the first serves every GPU between and after them.
CUDA_ARCHITECTURES = [75, 80, 86, 89, 90, 100, 120]
CUDA_FLAGS = [
    *("-fatbin", "-std=c++17", "-O3", "-fmad=false", "-Icsrc"),
    *("--compress-mode=size", "--threads=0"),
    *(f"-gencode=arch=compute_{n},code=sm_{n}" for n in CUDA_ARCHITECTURES),
    f"-gencode=arch=compute_{CUDA_ARCHITECTURES[0]},code=compute_{CUDA_ARCHITECTURES[0]}",
]
OPENMP_PROBE = (
    "#include <omp.h>\nint probe(void);\nint probe(void) { return omp_get_max_threads(); }\n"
)


class BuildExt(build_ext):
    """Chooses the compiler's flags when the compiler is known."""

    def build_extensions(self) -> None:
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
        image = self.cuda_image()
        if image:
            compile_flags.append(f'-DLPSGD_CUDA_IMAGE="{image}"')
        for extension in self.extensions:
            extension.extra_compile_args = compile_flags
            extension.extra_link_args = link_flags
        super().build_extensions()

    def cuda_image(self) -> Path | None:
        """The fat binary of the CUDA kernels, made here; None for a build without them."""
        wish = os.environ.get("LPSGD_CUDA")
        nvcc = os.environ.get("NVCC") or shutil.which("nvcc")
        if wish == "0":
            return None
        if not nvcc:
            if wish == "1":
                raise CompileError("LPSGD_CUDA=1, but there is no nvcc")
            self.announce("There is no nvcc: lpsgd_ext will have no CUDA kernels", level=3)
            return None
        image = Path(self.build_temp, "lpsgd_cuda.fatbin").absolute()
        image.parent.mkdir(parents=True, exist_ok=True)
        self.spawn([nvcc, *CUDA_FLAGS, "csrc/lpsgd_cuda.cu", "-o", str(image)])
        return image

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
                self.announce("OpenMP does not work: lpsgd_ext will run in one thread", level=3)
                return False
        return True


def version() -> str:
    """LPSGD_VERSION of lpsgd.h, the one place that says it."""
    header = Path(__file__).with_name("csrc") / "lpsgd.h"
    found = re.search(r'LPSGD_VERSION "(.+)"', header.read_text())
    assert found, "lpsgd.h defines no LPSGD_VERSION"
    return found.group(1)


setup(
    version=version(),
    ext_modules=[
        Extension(
            "lpsgd_ext",
            sources=sorted(glob("csrc/*.c") + glob("lpsgd_ext/*.c")),
            depends=[*glob("csrc/*.h"), *glob("csrc/*.cu"), *glob("lpsgd_ext/*.h"), "setup.py"],
            include_dirs=["csrc"],
            define_macros=[("Py_LIMITED_API", "0x030a0000")],
            libraries=["m", "pthread", "dl"],
            py_limited_api=True,
        )
    ],
    cmdclass={"build_ext": BuildExt},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
