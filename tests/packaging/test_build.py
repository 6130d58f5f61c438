# SPDX-License-Identifier: MIT
"""The package's builds: wheel, sdist, other compilers or none, no OpenMP."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

import lpsgd
from helpers import ROOT, quick_compiler, run, tool

NEEDS = "lpsgd_ext needs a C compiler and Python's headers: apt install gcc python3-dev (Debian, "
SOURCES = ["csrc", "lpsgd_ext", "python", "setup.py", "pyproject.toml", "README.md"]
SOURCES += ["MANIFEST.in", "CHANGELOG.md", "LICENSE"]
QUERY = """
import sys, torch
sys.path.insert(0, {path!r})
import lpsgd_ext
assert lpsgd_ext.__file__.startswith({path!r}), lpsgd_ext.__file__
param = torch.zeros(3)
lpsgd_ext.lpsgd_([param], [torch.ones(3)], lr=0.5, p=4.0)
print(param.tolist(), lpsgd_ext.build_info()["openmp"])
"""


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A copy of what the build needs, so that builds leave nothing behind."""
    monkeypatch.setenv("CC", quick_compiler(tmp_path))
    ignore = shutil.ignore_patterns("*.so", "*.egg-info", "__pycache__", "build")
    for name in SOURCES:
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, tmp_path / "source" / name, ignore=ignore)
        else:
            shutil.copy(path, tmp_path / "source" / name)
    return tmp_path / "source"


def build_module(source, query=QUERY, **environment):
    """Builds the module in place, without importing torch, and returns what a step in a fresh
    interpreter prints. CUDA kernels, which take as long as the rest, are left out by default."""
    trap = source.parent / "trap" / "torch"
    trap.mkdir(parents=True, exist_ok=True)
    (trap / "__init__.py").write_text("raise RuntimeError('the build imported torch')\n")
    run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        source,
        **{"LPSGD_WERROR": "1", "LPSGD_CUDA": "0", "PYTHONPATH": str(trap.parent), **environment},
    )
    path = str(source / "python")
    return run([sys.executable, "-c", query.format(path=path)], source).strip()


def test_wheel_is_abi3_and_the_sdist_builds_the_same(source, tmp_path):
    for output, kind in (("direct", ["--wheel"]), ("from sdist", [])):  # [] makes both
        build = [sys.executable, "-m", "build", *kind, "--outdir", tmp_path / output, "."]
        run(build, source, LPSGD_CUDA="0")
    (wheel,) = (tmp_path / "direct").iterdir()
    (again,) = (tmp_path / "from sdist").glob("*.whl")
    assert "-cp310-abi3-linux" in wheel.name and wheel.name == again.name
    assert wheel.stat().st_size < 1e6
    contents = [
        {name: archive.read(name) for name in archive.namelist() if not name.endswith("RECORD")}
        for archive in (zipfile.ZipFile(wheel), zipfile.ZipFile(again))
    ]
    assert contents[0] == contents[1]
    names = list(contents[0])
    assert "lpsgd_ext.abi3.so" in names
    assert {"lpsgd/__init__.py", "lpsgd/py.typed", "lpsgd_ext-stubs/__init__.pyi"} <= set(names)
    assert not [name for name in names if name.endswith((".c", ".h"))]


def test_cuda_is_built_for_what_the_environment_asks_and_never_left_over(source, tmp_path):
    toolkit = tmp_path / "cuda"
    (toolkit / "bin").mkdir(parents=True)
    stand_in = ROOT / "tests" / "csrc" / "nvcc_double.sh"
    nvcc = toolkit / "bin" / "nvcc"
    nvcc.write_text(f'#!/bin/sh\necho "$@" >>"{tmp_path}/calls"\nexec sh "{stand_in}" "$@"\n')
    nvcc.chmod(0o755)
    query = QUERY + 'print(lpsgd_ext.build_info()["cuda"], *lpsgd_ext.build_info().values())\n'

    def cuda_of_build(architectures, wish="1"):
        environment = {"CUDA_HOME": toolkit, "TORCH_CUDA_ARCH_LIST": architectures}
        built = build_module(source, query, LPSGD_CUDA=wish, MAX_JOBS="3", **environment)
        return built.splitlines()[1].partition(" ")[0], built.rpartition("sm_")[2]

    assert cuda_of_build("8.0; 9.0a+PTX") == ("13.0", "90a compute_90a")
    assert cuda_of_build("12.0", wish="0")[0] == "None"
    with pytest.raises(AssertionError, match="TORCH_CUDA_ARCH_LIST: 'Hopper' is no compute capab"):
        cuda_of_build("9.0;Hopper")
    calls = (tmp_path / "calls").read_text()
    assert "-gencode=arch=compute_80,code=sm_80 -gencode=arch=compute_90a,code=sm_90a" in calls
    assert "--threads=3" in calls


def build_with_scripts(source, compiler, nvcc, **environment):
    """The status and all output of a build whose compiler and nvcc are shell scripts. The compiler
    writes its options to `calls`."""
    for name, script in (("cc", f'echo "$@" >>{source}/calls\n{compiler}'), ("nvcc", nvcc)):
        (source / name).write_text(f"#!/bin/sh\n{script}\n")
        (source / name).chmod(0o755)
    build = subprocess.run(
        [sys.executable, "setup.py", "build_ext"],
        cwd=source,
        env={**os.environ, "CC": str(source / "cc"), "NVCC": str(source / "nvcc"), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return build.returncode, build.stdout


RELEASE = 'if [ "$1" = --version ]; then echo "release {}"; exit; fi; '
COMPILER = 'while [ "$1" ]; do [ "$1" = -o ] && touch "$2"; shift; done'


@pytest.mark.parametrize(
    ("nvcc", "why"),
    [
        (RELEASE.format("12.4"), "is of CUDA 12.4, and 12.8 or later is needed"),
        (RELEASE.format("13.0") + "exit 1", "exit code 1"),  # for instance without a fitting g++
        ("exit 3", "returned non-zero exit status 3"),
    ],
    ids=["too old", "broken", "without a version"],
)
def test_build_beside_an_nvcc_that_does_not_serve_has_no_kernels_and_says_why(source, nvcc, why):
    status, output = build_with_scripts(source, COMPILER, nvcc)
    assert status == 0, output
    assert re.search(f"lpsgd_ext will have no CUDA kernels: .*{why}", output), output
    assert "LPSGD_CUDA_IMAGE" not in (source / "calls").read_text()
    status, output = build_with_scripts(source, COMPILER, nvcc, LPSGD_CUDA="1")
    assert status != 0
    assert why in output


def test_build_with_a_compiler_that_has_no_openmp_says_so(source):
    no_openmp = f'case "$*" in *-fopenmp*) exit 1;; esac; {COMPILER}'
    status, output = build_with_scripts(source, no_openmp, "exit 1", LPSGD_CUDA="0")
    assert status == 0, output
    assert "OpenMP does not work: lpsgd_ext will run in one thread" in output


def test_build_says_which_driver_the_kernels_will_need(source):
    for release, driver in (("12.9", "12.4"), ("13.1", "13.0")):
        status, output = build_with_scripts(source, COMPILER, RELEASE.format(release))
        assert status == 0, output
        assert f"it will need an NVIDIA driver of CUDA {driver} or later" in output
    assert "-DLPSGD_CUDA_VERSION=13010" in (source / "calls").read_text()


def test_build_without_a_compiler_that_works_names_the_packages_to_install(source):
    status, output = build_with_scripts(source, "exit 1", "exit 1", LPSGD_CUDA="0")
    assert status != 0
    last = output.splitlines()[-1]
    assert last.startswith("error: ")
    assert "apt install gcc python3-dev" in last


def setup_of(source, stand_in):
    """The status and the messages of a setup.py to which Python seems to be another one."""
    code = (
        f"import runpy, setuptools, sys, sysconfig; {stand_in}; sys.argv = ['setup.py', '--name']"
    )
    code += "; runpy.run_path('setup.py', run_name='__main__')"
    setup = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True)
    return setup.returncode, setup.stderr


WITHOUT = "lpsgd will work in PyTorch's operations, without lpsgd_ext: "
FREE_THREADED = "sysconfig.get_config_vars()['Py_GIL_DISABLED'] = 1"
DARWIN = "sysconfig.get_config_vars(); sys.platform = 'darwin'"


@pytest.mark.parametrize(
    ("stand_in", "why"),
    [
        (FREE_THREADED, "it relies on the GIL and has no build for free-threaded Pythons"),
        (DARWIN, "it has never run on darwin"),
        ("import os; os.environ['LPSGD_NATIVE'] = '0'", "LPSGD_NATIVE=0"),
    ],
    ids=["free-threaded", "macOS", "by choice"],
)
def test_where_lpsgd_ext_cannot_be_built_lpsgd_is_installed_without_it(source, stand_in, why):
    status, message = setup_of(source, stand_in)
    assert (status, message.startswith(WITHOUT + why)) == (0, True), message


def test_lpsgd_ext_that_is_demanded_is_built_or_refused(source, monkeypatch):
    monkeypatch.setenv("LPSGD_NATIVE", "1")
    status, message = setup_of(source, FREE_THREADED)
    assert status == 1
    assert message.startswith("lpsgd_ext cannot be built: it relies on the GIL")
    assert setup_of(source, DARWIN) == (0, "")


def test_without_any_compiler_the_wheel_has_python_alone(source, tmp_path, monkeypatch):
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "cc").unlink()
    setup = [sys.executable, "setup.py", "-q", "bdist_wheel"]
    build = subprocess.run(setup, cwd=source, capture_output=True, text=True)
    assert build.returncode == 0, build.stderr
    assert f"{WITHOUT}there is no C compiler. {NEEDS}" in build.stderr
    (wheel,) = (source / "dist").iterdir()
    assert wheel.name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "lpsgd/_reference.py" in names and not [name for name in names if ".so" in name]
    build = subprocess.run(
        setup, cwd=source, env={**os.environ, "LPSGD_NATIVE": "1"}, capture_output=True, text=True
    )
    assert build.returncode == 1 and NEEDS in build.stderr.splitlines()[-1]


def test_a_compiler_that_python_does_not_know_of_is_found(source, tmp_path, monkeypatch):
    monkeypatch.delenv("CC")
    (tmp_path / "only").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "only"))
    clang = tmp_path / "only" / "clang"
    clang.write_text(
        '#!/bin/sh\nwhile [ "$1" ]; do if [ "$1" = -o ]; then : >"$2"; fi; shift; done\n'
    )
    clang.chmod(0o755)
    run([sys.executable, "setup.py", "build_ext", "--inplace"], source, LPSGD_CUDA="0")
    assert (source / "python" / "lpsgd_ext.abi3.so").read_bytes() == b""


TRAINING = """
import shutil, warnings, torch, lpsgd
assert not [name for name in ("cc", "gcc", "clang") if shutil.which(name)]
assert "there was no C compiler" in lpsgd.build_info()["fallback"]
torch.manual_seed(0)
x = torch.randn(200, 8)
y = x @ torch.randn(8, 1)
model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
optimizer = lpsgd.LPSGDM(model.parameters(), lr=0.01)
schedule = lpsgd.CosineAnnealingP(optimizer, total_iters=100)
losses = []
with warnings.catch_warnings(record=True) as seen:
    for _ in range(100):
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
print(len(seen), seen[0].message, losses[0], losses[-1], lpsgd.__file__)
assert len(seen) == 1 and losses[-1] < 0.2 * losses[0] and optimizer.param_groups[0]["p"] == 2.0
"""


@pytest.mark.full
def test_a_fresh_environment_without_a_compiler_installs_and_trains(source, tmp_path, monkeypatch):
    """It has this one's packages, but for lpsgd; pip and setuptools among them."""
    fresh = tmp_path / "fresh"
    venv.create(fresh, symlinks=True)
    python = fresh / "bin" / "python"
    in_fresh = run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"])
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        if "lpsgd" not in path.name:
            (Path(in_fresh.strip()) / path.name).symlink_to(path)
    monkeypatch.delenv("CC")
    alone = {"PATH": str(fresh / "bin"), "PYTHONPATH": ""}
    pip = [python, "-m", "pip", "install", "--no-index", "--no-deps", "--no-build-isolation"]
    run([*pip, source], tmp_path, **alone)
    assert str(fresh) in run([python, "-c", TRAINING], tmp_path, **alone)


def test_a_module_without_openmp_says_so_and_exports_its_init_function_alone(source):
    assert build_module(source, LPSGD_OPENMP="0") == "[-0.5, -0.5, -0.5] False"
    (module,) = (source / "python").glob("*.so")
    symbols = run([tool("nm"), "-D", "--defined-only", module], source).split()
    assert symbols[2::3] == ["PyInit_lpsgd_ext"]


@pytest.mark.full  # and of `make test-wheel`
def test_the_same_sources_make_the_same_bytes(source, tmp_path):
    """In another folder, for another user's umask, from files of another time."""
    again = tmp_path / "again" / "source"
    shutil.copytree(source, again, copy_function=shutil.copyfile)  # gives no time and mode on
    for path in again.rglob("*"):
        path.chmod(0o700 if path.is_dir() else 0o600)
    build = [sys.executable, "-m", "build"]
    for folder in (source, again):
        run([*build, "."], folder, SOURCE_DATE_EPOCH="1000000000", LPSGD_CUDA="0")
    (sdist,) = (again / "dist").glob("*.tar.gz")
    (wheel,) = (again / "dist").glob("*.whl")
    for path in (sdist, wheel):
        assert path.read_bytes() == (source / "dist" / path.name).read_bytes(), path.name


def test_the_changelog_begins_with_this_version():
    """A release is described before it is made (release/test_dist.py sees that it is new)."""
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == lpsgd.__version__


@pytest.mark.full  # and of `make sanitize`
def test_clang_builds_without_a_warning(source):
    assert build_module(source, CC=tool("clang")).startswith("[-0.5, -0.5, -0.5]")
