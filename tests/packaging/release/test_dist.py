# SPDX-License-Identifier: MIT
"""What the files in dist must be before anybody gets them; a part of `make wheel`."""

import io
import re
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest
from elftools.elf.elffile import ELFFile

ROOT = Path(__file__).resolve().parents[3]
VERSION = re.search(r'LPSGD_VERSION "(.+)"', (ROOT / "csrc" / "lpsgd.h").read_text())[1]


def git(*arguments):
    return subprocess.check_output(["git", *arguments], cwd=ROOT, text=True).split()


@pytest.fixture(scope="module", params=["x86_64", "aarch64"])
def wheel(request):
    (path,) = (ROOT / "dist").glob(f"*_{request.param}.whl")
    return path


@pytest.fixture(scope="module")
def contents(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist() if name[-1] != "/"}


@pytest.fixture(scope="module")
def module(contents):
    return ELFFile(io.BytesIO(contents["lpsgd_ext.abi3.so"]))


@pytest.fixture(scope="module")
def symbols(module):
    """Name, whether it is defined here, binding, and the version that it is wanted in or None."""
    table = module.get_section_by_name(".dynsym")
    wanted = {
        version["vna_other"]: version.name
        for _, versions in module.get_section_by_name(".gnu.version_r").iter_versions()
        for version in versions
    }
    versions = module.get_section_by_name(".gnu.version")
    return [
        (
            symbol.name,
            symbol["st_shndx"] != "SHN_UNDEF",
            symbol["st_info"]["bind"],
            wanted.get(versions.get_symbol(i)["ndx"]),
        )
        for i, symbol in enumerate(table.iter_symbols())
        if symbol.name
    ]


def test_names_tell_the_version_and_the_tags(wheel):
    machine = "(x86_64|aarch64)"
    tags = rf"cp310-abi3-manylinux2014_{machine}\.manylinux_2_17_{machine}\.whl"
    assert re.fullmatch(rf"lpsgd-{re.escape(VERSION)}-{tags}", wheel.name)
    assert [path.name for path in wheel.parent.glob("*.tar.gz")] == [f"lpsgd-{VERSION}.tar.gz"]


def test_nothing_else_was_released_under_this_version():
    tags = git("tag", "--list", f"v{VERSION}")
    assert not tags or f"v{VERSION}" in git("tag", "--points-at", "HEAD")


def test_the_sources_are_those_of_the_commit():
    assert not git("status", "--porcelain"), "the commit's time would date other sources"


def test_the_wheel_has_the_package_and_bundles_nothing(contents):
    sources = git("ls-files", "python")
    assert len(sources) > 5
    expected = {source.removeprefix("python/") for source in sources} | {"lpsgd_ext.abi3.so"}
    metadata = f"lpsgd-{VERSION}.dist-info/"
    assert {name for name in contents if not name.startswith(metadata)} == expected
    assert "License-Expression: MIT" in contents[f"{metadata}METADATA"].decode().splitlines()


def test_metadata_ask_for_what_is_supported(contents):
    lines = contents[f"lpsgd-{VERSION}.dist-info/METADATA"].decode().splitlines()
    assert f"Version: {VERSION}" in lines
    assert "Requires-Python: >=3.10" in lines
    assert "Requires-Dist: torch>=2.10" in lines


def test_the_sdist_has_files_of_the_commit_alone(wheel):
    with tarfile.open(wheel.with_name(f"lpsgd-{VERSION}.tar.gz")) as archive:
        files = {member.name.partition("/")[2] for member in archive if member.isfile()}
    generated = {name for name in files if ".egg-info/" in name} | {"PKG-INFO", "setup.cfg"}
    assert files - generated <= set(git("ls-files"))
    assert {"CHANGELOG.md", *git("ls-files", "csrc", "lpsgd_ext", "python")} <= files


def test_the_module_exports_its_init_function_alone(symbols):
    assert [name for name, defined, _, _ in symbols if defined] == ["PyInit_lpsgd_ext"]


def test_the_module_needs_python_glibc_and_openmp_alone(symbols):
    for name, defined, binding, version in symbols:
        if not defined and binding != "STB_WEAK":
            python = re.fullmatch(r"_?Py_?[A-Z].*", name) and version is None
            assert python or re.match(r"(GLIBC|GOMP|OMP)_\d", version or ""), (name, version)


def test_the_module_links_what_the_system_or_pytorch_has(module):
    tags = list(module.get_section_by_name(".dynamic").iter_tags())
    libraries = {tag.needed for tag in tags if tag["d_tag"] == "DT_NEEDED"}
    system = {"libc.so.6", "libm.so.6", "libpthread.so.0", "libdl.so.2"}
    loaders = {"ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1"}
    assert "libgomp.so.1" in libraries
    assert libraries - {"libgomp.so.1"} <= system | loaders
    assert not {tag["d_tag"] for tag in tags} & {"DT_RPATH", "DT_RUNPATH", "DT_TEXTREL"}


def test_the_tag_promises_no_older_glibc_than_the_module_needs(wheel, symbols):
    promised = tuple(map(int, re.search(r"manylinux_(\d+)_(\d+)", wheel.name).groups()))
    for name, _, _, version in symbols:
        if version and version.startswith("GLIBC_"):
            needed = tuple(map(int, version.removeprefix("GLIBC_").split(".")))[:2]
            assert needed <= promised, (name, version)


def test_the_module_is_of_the_machine_that_its_name_says(wheel, module):
    machine = {"x64": "x86_64", "AArch64": "aarch64"}[module.get_machine_arch()]
    assert wheel.name.endswith(f"_{machine}.whl")


def test_no_path_of_the_machine_is_left(contents):
    for name, content in contents.items():
        for path in (ROOT, Path.home(), Path("/tmp")):
            assert f"{path}/".encode() not in content, (name, path)
