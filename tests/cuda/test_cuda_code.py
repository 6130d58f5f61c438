# SPDX-License-Identifier: MIT
"""What nvcc makes of the CUDA kernels, read as PTX and as machine code; no GPU is needed."""

import os
import re
import shutil
from functools import cache
from pathlib import Path

import pytest

import lpsgd_ext
from benchmarks.speed import roofline
from benchmarks.speed.roofline import KERNELS
from helpers import ROOT, tool

FEW = {kernel: f"{kernel}_few" for kernel in KERNELS}  # the same for few tensors
ALL = {*KERNELS, *FEW.values(), "lpsgd_cuda_fold_scalars"}


def flags_of_the_build():
    names = roofline.of_the_build()
    targets = names["cuda_targets"](names["CUDA_ARCHITECTURES"])
    numbers = [int(target.removeprefix("sm_")) for target in targets if target.startswith("sm_")]
    ptx = [f"compute_{number}" for number in numbers]
    return targets, numbers, names["cuda_flags"](targets), names["cuda_flags"](ptx)


def targets_of_the_module():
    """What nvcc compiled its kernels for: nothing, if it has none or those of the stand-in."""
    stand_in = b"lpsgd_cuda.cu: the CUDA kernels." in Path(lpsgd_ext.__file__).read_bytes()
    return [] if stand_in else lpsgd_ext.build_info()["cuda_architectures"].split()


TARGETS, ARCHITECTURES, FLAGS, PTX_FLAGS = flags_of_the_build()
NEWEST = ARCHITECTURES[-1]

# What is compiled once more for each.
architectures = pytest.mark.parametrize(
    "n", [pytest.param(n, marks=[pytest.mark.full] * (n != NEWEST)) for n in ARCHITECTURES]
)


@pytest.fixture(scope="module")
def compile_kernels(tmp_path_factory):
    if "NVCC" not in os.environ:
        tool("nvcc")

    def compile_with(flags, **what):
        path = tmp_path_factory.mktemp("cuda") / "kernels.fatbin"
        roofline.compile_kernels(flags, path, **what)
        return path

    return compile_with


@pytest.fixture(scope="module")
def disassemble():
    try:
        roofline.cuobjdump("--version")
    except FileNotFoundError as missing:
        pytest.skip(str(missing))
    return lambda image, *what: roofline.cuobjdump(*what, image)


@pytest.fixture(scope="module")
def image(compile_kernels):
    """The installed module, where it has what the build makes now: compiling takes a minute."""
    return lpsgd_ext.__file__ if targets_of_the_module() == TARGETS else compile_kernels(FLAGS)


def opcodes(instructions):
    """The opcodes of each kernel in their order, by architecture."""
    return {
        n: {name: [one.opcode for one in code] for name, code in functions.items()}
        for n, functions in instructions.items()
    }


def opcodes_of_ptx(text):
    """The same of PTX. pow() is a function apart there, and left out."""
    code = {}
    for part in re.split(r"(?m)^\.target sm_", text)[1:]:
        functions = re.split(r"(?m)^(?:\.visible )?(?=\.entry |\.func )", part)
        code[int(functions[0].split()[0].rstrip(","))] = {
            re.search(r"lpsgd_\w+(?=\()", function)[0]: re.findall(
                r"(?m)^\s*(?:@!?%p\d+\s+)?([a-z][a-z0-9_.]*)\s", function
            )
            for function in functions
            if function.startswith(".entry")
        }
    return code


@pytest.fixture(scope="module")
def instructions(image, disassemble, request):
    """Of each architecture; in a short run of the first, the roofline's and the newest."""
    short = request.config.getoption("markexpr") == "not full"
    numbers = sorted({ARCHITECTURES[0], 90, NEWEST}) if short else ARCHITECTURES
    code = (disassemble(image, "-sass", f"--gpu-architecture=sm_{n}") for n in numbers)
    return {n: roofline.machine_code(text)[n] for n, text in zip(numbers, code, strict=True)}


@pytest.fixture(scope="module")
def machine_code(instructions):
    return opcodes(instructions)


@pytest.fixture(scope="module")
def ptx_text(compile_kernels, disassemble):
    """A function of the architecture, as the next: each is compiled where a test asks for it."""
    return cache(lambda n: disassemble(compile_kernels(only(n, PTX_FLAGS)), "-ptx"))


@pytest.fixture(scope="module")
def ptx(ptx_text):
    return cache(lambda n: opcodes_of_ptx(ptx_text(n))[n])


def only(n, flags):
    """The flags without those for other architectures."""
    return [flag for flag in flags if "-gencode" not in flag or f"compute_{n}," in flag]


@pytest.fixture(scope="module")
def marked_source(tmp_path_factory):
    """A copy of the source whose fused operations round to zero, which tells them from those that
    nvcc makes of a product and a sum."""
    root = tmp_path_factory.mktemp("marked")
    shutil.copytree(ROOT / "csrc", root / "csrc")
    header = root / "csrc" / "lpsgd_element.h"
    text = header.read_text()
    for fused, marked in (
        (" fmaf(a, b, c)", " __fmaf_rz(a, b, c)"),
        (" fma(a, b, c)", " __fma_rz(a, b, c)"),
    ):
        assert text.count(fused) == 1
        text = text.replace(fused, marked)
    header.write_text(text)
    return root


@pytest.fixture(scope="module")
def resources(image, disassemble):
    """Each part of the fat binary: kind (ptx or elf), architecture, text."""
    parts = re.split(r"(?m)^Fatbin (?=ptx|elf)", disassemble(image, "--dump-resource-usage"))[1:]
    return [(part[:3], int(re.search(r"arch = sm_(\d+)", part)[1]), part) for part in parts]


def test_tools_find_the_kernels_in_the_module(disassemble):
    targets = targets_of_the_module()
    if not targets:
        pytest.skip("the module has no kernels by nvcc")
    elf, ptx = (
        re.findall(r"\.(sm_\w+)\.", disassemble(lpsgd_ext.__file__, f"--list-{kind}"))
        for kind in ("elf", "ptx")
    )
    assert elf == [target for target in targets if target.startswith("sm_")]
    assert ptx == [target.replace("compute", "sm") for target in targets if target not in elf]


def test_image_holds_every_architecture_and_is_compressed(resources, machine_code):
    assert sorted(n for kind, n, _ in resources if kind == "elf") == sorted(ARCHITECTURES)
    assert [n for kind, n, _ in resources if kind == "ptx"] == [ARCHITECTURES[0]]
    for _, _, part in resources:
        assert re.search(r"(?m)^compressed$", part), part[:200]
    for code in machine_code.values():
        assert set(code) == ALL


def test_neither_stack_nor_local_memory(resources, machine_code):
    """No spilled register; and a launch's tensors are found in the kernel's arguments, uncopied."""
    usage = {
        (n, *found)
        for _, n, part in resources
        for found in re.findall(r"Function (\w+):\s+REG:\d+ STACK:(\d+) .* LOCAL:(\d+)", part)
    }
    assert usage == {(n, name, "0", "0") for n in ARCHITECTURES for name in ALL}
    for code in machine_code.values():
        assert not [op for name in ALL for op in code[name] if re.match(r"(LDL|STL)\b", op)]


def test_shared_memory_holds_the_tables_alone(resources):
    """60 floats, where the power is not CUDA's; from sm_90 on with 1 KiB of the driver's."""
    for kind, _, part in resources:
        shared = dict(re.findall(r"Function (\w+):\s+REG.* SHARED:(\d+)", part))
        assert kind == "ptx" or set(shared) == ALL
        for name, size in shared.items():
            without = "float64" in name or "fold" in name
            assert int(size) == 0 if without else int(size) % 1024 == 240


def test_registers_leave_room_for_1024_threads(resources):
    """With 64 registers a multiprocessor holds 1024 threads. More do not fit on sm_75. Elsewhere
    their vectors are 48 KiB of loads in flight; an H100 needs about 15 KiB for its bandwidth and a
    B200 about 26 KiB (reads are 60 % of 3.35 and 8 TB/s, at 0.8 us and 132 and 148
    multiprocessors)."""
    for kind, n, part in resources:
        registers = dict(re.findall(r"Function (\w+):\s+REG:(\d+)", part))
        print(n, registers)
        assert kind == "ptx" or set(registers) == ALL
        assert all(int(count) <= 64 for count in registers.values())


@pytest.mark.parametrize("kernel", KERNELS)
def test_vectors_are_loaded_whole_before_they_are_stored_whole(machine_code, kernel):
    param, momentum_buffer = KERNELS[kernel]
    vectors = momentum_buffer // param
    narrow = {0.5: ".64", 0.25: ""}.get(momentum_buffer / param)  # a whole momentum vector
    for n, code in machine_code.items():
        if narrow is not None:
            assert any(re.fullmatch(rf"STG\.E{narrow}(\.SYS)?", op) for op in code[kernel]), n
        stores = [i for i, op in enumerate(code[kernel]) if op.startswith("STG.E.128")]
        loads = [i for i, op in enumerate(code[kernel]) if op.startswith("LDG.E.128")]
        assert len(stores) >= 1 + vectors, (n, "stores")
        assert len([i for i in loads if i < stores[0]]) >= 2 + vectors, (n, "loads")


@architectures
@pytest.mark.parametrize("kernel", KERNELS)
def test_vectors_are_whole_in_ptx(ptx, kernel, n):
    param, momentum_buffer = KERNELS[kernel]
    vectors = momentum_buffer // param
    whole = [op for op in ptx(n)[kernel] if re.search(r"global.*\.(v4\..32|v2\..64)$", op)]
    assert len([op for op in whole if op.startswith("st")]) >= 1 + vectors
    assert len([op for op in whole if op.startswith("ld")]) >= 2 + vectors


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_kernel_for_few_tensors_is_the_same_code(machine_code, kernel):
    """What is true of the one is true of the other, and so are the roofline's counts."""
    for n, code in machine_code.items():
        assert code[kernel] == code[FEW[kernel]], n


def test_arguments_for_few_tensors_take_no_more_than_4_kib(resources):
    """In a kernel's constant memory, which has up to 1 KiB of the driver's before them."""
    for kind, n, part in resources:
        taken = dict(re.findall(r"Function (\w+):\s+REG.* CONSTANT\[0\]:(\d+)", part))
        for kernel in KERNELS if kind == "elf" else ():
            assert int(taken[FEW[kernel]]) <= 5120 < int(taken[kernel]), n


def test_what_is_not_of_one_tensor_lies_at_the_beginning_of_constant_memory(instructions):
    """Its addresses are known, and within the 32 KiB that every instruction reaches."""
    for functions in instructions.values():
        for kernel in ALL:
            operands = " ".join(one.operands for one in functions[kernel])
            addresses = re.findall(r"c\[0x0\]\[0x(\w+)\]", operands)
            assert addresses
            assert max(int(address, 16) for address in addresses) < 0x8000


def blocks_of(code):
    """The instructions from one of control to the next."""
    control = {"BRA", "EXIT", "BSSY", "BSYNC", "BAR", "CALL", "RET", "BRX"}
    blocks = [[]]
    for one in code:
        blocks[-1].append(one)
        if one.name in control:
            blocks.append([])
    return blocks


@pytest.mark.parametrize("kernel", KERNELS)
def test_scalars_are_arguments_or_loaded_at_once(instructions, kernel):
    """No generic load has to find out which, and those of device memory are issued together with
    that of what found_inf came to, the last of lpsgd_cuda_scalars: after the barrier a block waits
    for them once."""
    for n, functions in instructions.items():
        code = functions[kernel]
        assert not {"LD", "ST"} & {one.name for one in code}, n
        loads = [[one for one in block if one.name == "LDG"] for block in blocks_of(code)]
        first = next(block for block in loads if len(block) > 1)
        assert any(re.search(r"\+0x170\]", one.operands) for one in first), n
        assert len(first) >= 8, n
        assert all(roofline.bytes_of(one, "LDG") <= 8 for one in first), n


@pytest.mark.parametrize("kernel", [kernel for kernel in KERNELS if "float64" not in kernel])
def test_tables_are_read_from_a_copy_that_the_block_makes_once(instructions, kernel):
    """One word by each thread, from the arguments or from device memory, ahead of the only barrier.
    From there on it is only read, by indices of a thread: uniform numbers do not come from it."""
    for n, functions in instructions.items():
        code = functions[kernel]
        (barrier,) = (i for i, one in enumerate(code) if one.name == "BAR")
        names = [one.name for one in code]
        assert names[:barrier].count("STS") == names.count("STS") == 1, n
        assert names[:barrier].count("LDG") == 1 and "LDC" in names[:barrier], n
        assert "LDS" not in names[:barrier] and "LDS" in names[barrier:], n
        reads = [one for one in code if one.name == "LDS"]
        assert {one.opcode for one in reads} <= {"LDS", "LDS.U"}, n  # a word each
        assert all(re.search(r"\[R\d", one.operands) for one in reads), (n, "not uniform")
        # A table is of 32 words or fewer, so that each of them is in a bank of its own.
        offsets = (re.search(r"(?:\+0x(\w+))?\]", one.operands)[1] for one in reads)
        assert {int(at or "0", 16) for at in offsets} == {0, 0x80, 0xA0, 0xC0, 0xE0}, n


def fused_to_nearest(code):
    return [op for op in code if re.match(r"(fma|mad)\.rn\.", op)]


@architectures
def test_nothing_is_contracted_that_the_source_does_not_fuse(
    ptx, marked_source, compile_kernels, disassemble, n
):
    flags = only(n, PTX_FLAGS)
    contracting = [flag.replace("-fmad=false", "-fmad=true") for flag in flags]
    assert contracting != flags
    marked, contracted = (
        opcodes_of_ptx(disassemble(compile_kernels(these, root=marked_source), "-ptx"))[n]
        for these in (flags, contracting)
    )
    for kernel in ALL:
        assert not fused_to_nearest(marked[kernel]), kernel
        of_the_source = [op for op in marked[kernel] if op.startswith("fma.rz.")]
        assert len(fused_to_nearest(ptx(n)[kernel])) == len(of_the_source), kernel
    # float64 alone has a product and a sum to contract (x * pow(...) + 0.0).
    assert fused_to_nearest(contracted["lpsgd_cuda_float64"])


@architectures
def test_ptx_rounds_every_operation_to_nearest(ptx, n):
    """Explicitly, nothing is approximate, and no subnormal is flushed to zero."""
    assert set(ptx(n)) == ALL
    for kernel in ALL:
        for op in ptx(n)[kernel]:
            if re.search(r"\.f(32|64)$", op) and re.match(r"add|sub|mul|mad|fma|div|rcp|sqrt", op):
                assert re.fullmatch(r"(add|sub|mul|fma|div|rcp)\.rn\.f(32|64)", op), (kernel, op)
            assert not re.search(r"\.(approx|full|ftz)\b", op), (kernel, op)
    for kernel, (param, _) in KERNELS.items():
        assert f"div.rn.f{64 if param == 8 else 32}" in ptx(n)[kernel]


@architectures
def test_the_assembler_contracts_nothing(
    ptx_text, machine_code, compile_kernels, disassemble, tmp_path, n
):
    """Allowed to contract, which is its default, it makes the same code of each PTX: it leaves
    alone what is rounded explicitly. So does then a driver that compiles the PTX."""
    (text,) = re.split(r"(?m)^(?=\.version )", ptx_text(n))[1:]
    source = tmp_path / "kernels.ptx"
    source.write_text(text.split("\nFatbin")[0])
    flags = ["-fatbin", f"-gencode=arch=compute_{n},code=sm_{n}"]
    allowed = disassemble(compile_kernels(flags, source=source), "-sass")
    assert opcodes(roofline.machine_code(allowed)) == {n: machine_code[n]}
