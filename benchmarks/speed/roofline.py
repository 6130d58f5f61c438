# SPDX-License-Identifier: MIT
"""Predicts how near an H100's bandwidth the CUDA kernels come, from their machine code; no GPU is
needed. PyTorch's fused SGD is read in the same way, where libtorch_cuda.so is installed.

    python -m benchmarks.speed.roofline

docs/gpu.md has the method and what comes of it.
"""

import ast
import contextlib
import importlib.metadata
import importlib.util
import mmap
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]

# Each kernel with the bytes of an element of param and grad, and of momentum_buffer.
KERNELS = {
    "lpsgd_cuda_float32": (4, 4),
    "lpsgd_cuda_float64": (8, 8),
    "lpsgd_cuda_bfloat16": (2, 2),
    "lpsgd_cuda_float16": (2, 2),
    "lpsgd_cuda_bfloat16_wide": (2, 4),
    "lpsgd_cuda_float16_wide": (2, 4),
    "lpsgd_cuda_float32_half": (4, 2),
    "lpsgd_cuda_float16_half": (2, 2),
    "lpsgd_cuda_float32_byte": (4, 1),
    "lpsgd_cuda_bfloat16_byte": (2, 1),
    "lpsgd_cuda_float16_byte": (2, 1),
}


def of_the_build() -> dict[str, Any]:
    """The names in setup.py that say how nvcc is called."""
    tree = ast.parse((ROOT / "setup.py").read_text())
    wanted = ("import re", "CUDA_", "def cuda_")
    tree.body = [node for node in tree.body if ast.unparse(node).startswith(wanted)]
    names: dict[str, Any] = {}
    exec(compile(tree, "setup.py", "exec"), names)
    return names


def run(*command: str | Path, **options: Any) -> str:
    result: subprocess.CompletedProcess[str] = subprocess.run(
        command, capture_output=True, text=True, timeout=300, **options
    )
    if result.returncode:
        raise RuntimeError(f"{command[0]}: {result.stdout[-4000:]}{result.stderr[-4000:]}")
    return result.stdout


def compile_kernels(
    flags: Iterable[str],
    image: Path,
    root: Path = ROOT,
    source: str | Path = "csrc/lpsgd_cuda.cu",
) -> None:
    run(os.environ.get("NVCC") or "nvcc", *flags, source, "-o", image, cwd=root)


def cuobjdump(*arguments: str | Path) -> str:
    """Runs cuobjdump, which looks for nvdisasm in PATH: those of PyPI's packages, or the system's.
    FileNotFoundError says which of them is missing."""
    path = os.environ["PATH"]
    for package in ("nvidia-cuda-cuobjdump", "nvidia-cuda-nvdisasm"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            for file in importlib.metadata.files(package) or []:
                if file.match("bin/*"):
                    path = f"{Path(file.locate()).parent}{os.pathsep}{path}"
    for name in ("cuobjdump", "nvdisasm"):
        if shutil.which(name, path=path) is None:
            raise FileNotFoundError(f"{name} is not installed")
    command = shutil.which("cuobjdump", path=path) or ""
    return run(command, *arguments, env={**os.environ, "PATH": path})


class Instruction(NamedTuple):
    address: int
    predicate: str
    opcode: str
    operands: str

    def __str__(self) -> str:
        return f"{self.opcode} {self.operands}"

    @property
    def name(self) -> str:
        return self.opcode.partition(".")[0]

    @property
    def target(self) -> int | None:
        """Where a branch or call leads."""
        found = re.search(r"(?:^|, )0x([0-9a-f]+)$", self.operands)
        jumps = self.name in ("BRA", "CALL")
        return int(found[1], 16) if jumps and found else None

    @property
    def goes_on(self) -> bool:
        """Whether the next instruction may follow."""
        always = not self.predicate and "," not in self.operands
        return not (always and self.name in ("BRA", "BRX", "BRXU", "EXIT", "RET"))


Code = Sequence[Instruction]
NOTHING = "(?!)"  # matches nothing


def machine_code(text: str) -> dict[int, dict[str, list[Instruction]]]:
    """What `cuobjdump -sass` prints: the instructions of each kernel, by architecture."""
    code: dict[int, dict[str, list[Instruction]]] = {}
    line = r"(?m)^\s+/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*?)\s*;"
    for part in re.split(r"(?m)^\s+code for sm_", text)[1:]:
        functions = re.split(r"(?m)^\s+Function : ", part)
        architecture = int(re.findall(r"\d+", part)[0])  # of 90 and 90a: 90
        code.setdefault(architecture, {}).update(
            (
                function.split()[0],
                [
                    Instruction(int(address, 16), *rest)
                    for address, *rest in re.findall(line, function)
                ],
            )
            for function in functions[1:]
        )
    return code


def registers(text: str) -> dict[str, int]:
    """What `cuobjdump --dump-resource-usage` prints of one architecture: registers by kernel."""
    return {name: int(n) for name, n in re.findall(r"Function (\w+):\s+REG:(\d+)", text)}


def is_at(address: int, instruction: Instruction) -> bool:
    return instruction.address == address


def is_named(name: str, instruction: Instruction) -> bool:
    return instruction.name == name


def marks(way: Code, most: str) -> int:
    return sum(bool(re.search(most, str(instruction))) for instruction in way)


def find_path(
    code: Code,
    start: int,
    last: Callable[[Instruction], bool],
    most: str = NOTHING,
    avoid: str = NOTHING,
) -> list[Instruction] | None:
    """The instructions from an address on to one that is `last`, by forward branches only, callees
    included. Of all ways without an instruction that matches `avoid`, and of those with most that
    match `most`, the shortest."""
    index = {instruction.address: i for i, instruction in enumerate(code)}
    reached = {instruction.target for instruction in code}
    # A switch may lead wherever nothing else does.
    cases = [
        i for i in range(1, len(code)) if not code[i - 1].goes_on and code[i].address not in reached
    ]
    ways: dict[int, tuple[int, int, list[Instruction]]] = {}  # by their beginning, with their worth
    for i in reversed(range(index[start], len(code))):
        instruction = code[i]
        own = [instruction]
        if re.search(avoid, str(instruction)):
            continue
        after = [i + 1] if instruction.goes_on else []
        if instruction.name == "CALL" and instruction.target is not None:
            callee = find_path(code, instruction.target, partial(is_named, "RET"), most, avoid)
            if callee is None:
                continue
            own += callee
        elif instruction.target is not None:
            after.append(index[instruction.target])
        elif instruction.name in ("BRX", "BRXU"):
            after += cases
        followed = [ways[j] for j in after if j > i and j in ways]
        if last(instruction):
            followed = [(0, 0, [])]
        if followed:
            marked, shortness, rest = max(followed, key=lambda way: way[:2])
            ways[i] = (marked + marks(own, most), shortness - len(own), own + rest)
    return ways[index[start]][2] if index[start] in ways else None


def bytes_of(instruction: Instruction, kind: str) -> int:
    """What a thread loads by an LDG or stores by an STG; 0 of others."""
    if instruction.name != kind:
        return 0
    width = re.search(r"\.(?:[US]?(8|16)|(64|128))\b", instruction.opcode)
    return int(width[1] or width[2]) // 8 if width else 4


def vector_loops(code: Code) -> list[tuple[int, int]]:
    """First and last address of the innermost loops around the widest loads."""
    widest = max(bytes_of(instruction, "LDG") for instruction in code)
    loads = [one.address for one in code if bytes_of(one, "LDG") == widest]
    loops = [
        (one.target, one.address)
        for one in code
        if one.name == "BRA" and one.target is not None
        if any(one.target <= load <= one.address for load in loads)
    ]
    return [
        loop
        for loop in loops
        if not any(loop[0] <= first and last < loop[1] for first, last in loops)
    ]


class Rule(NamedTuple):
    """What tells the way of a rule through the loop from the other rules' ways."""

    most: str
    avoid: str


RULES = {
    "2": Rule(most=r"^(LDG|STG|[FD]ADD \w+, RZ, )", avoid=r"^(MUFU|CALL)"),  # x + 0
    "between": Rule(most=r"^(LDG|STG|[FD]FMA)", avoid=r"^MUFU\.RCP "),  # polynomials
    "∞": Rule(most=r"^(LDG|STG|MUFU)", avoid=r"^CALL"),  # the quotient, where nothing is subnormal
}
# With momentum and weight decay, without GradScaler's quotient.
TORCH_RULE = Rule(most=r"^(LDG|STG|[FD]FMA)", avoid=r"^(MUFU|CALL)")


class H100:
    """The SXM module. NVIDIA's data sheet has its bandwidth, and 67 TFLOP/s of float32, which stand
    for a clock of 1.98 GHz."""

    multiprocessors = 132
    clock = 1.755e9  # cautious
    bandwidth = 3.35e12
    latency = 700e-9  # of device memory, under load
    registers = 65536  # of a multiprocessor
    threads = 2048


# How many threads' instructions a multiprocessor starts in a clock, all and those of a pipe, by the
# CUDA C++ Programming Guide (throughput of native arithmetic instructions, compute capability 9.0);
# which pipe takes what, by Nsight Compute's Kernel Profiling Guide. IMAD is in two of them: only
# half of the FMA pipe has integers. Shared memory has 32 banks of a word in a clock each (the same,
# shared memory), and a table's entries are in different banks, so that no thread waits for another.
# The other instructions (of other memory, control, those of a whole warp) are held against issue
# alone.
ISSUE = 128
PIPES = {
    "FMA": (128, {"FADD", "FMUL", "FFMA", "HADD2", "HFMA2", "IMAD"}),
    "IMAD": (64, {"IMAD"}),
    "ALU": (
        64,
        {
            *("IADD3", "VIADD", "ISETP", "LEA", "LOP3", "MOV", "PLOP3", "PRMT", "SEL", "SHF"),
            *("VIADDMNMX", "FSEL", "FSETP", "F2FP", "I2FP", "CS2R", "P2R"),
        },
    ),
    "FP64": (64, {"DADD", "DMUL", "DFMA", "DSETP"}),
    "XU": (16, {"MUFU", "FCHK", "F2F", "FRND", "I2F"}),
    "shared": (32, {"LDS"}),
}
# Clocks until the next instruction can use a result; twice as many in FP64 (Jia et al., Dissecting
# the NVIDIA Volta GPU Architecture via Microbenchmarking, arXiv:1804.06826), and cautious 30 from
# shared memory, where Volta takes 19.
WAIT = 4
WAIT_LONGER = {**dict.fromkeys(PIPES["FP64"][1], 8), "LDS": 30}


class Kernel(NamedTuple):
    """A kernel that updates parameters."""

    name: str
    code: Code
    registers: int
    threads: int  # of a block
    share: int  # elements of a thread
    itemsizes: tuple[int, int]

    @property
    def resident(self) -> int:
        """Threads of a multiprocessor; registers are given out to warps by 256."""
        of_a_warp = ceil(self.registers * 32 / 256) * 256
        warps = H100.registers // 4 // of_a_warp * 4
        return min(warps * 32, H100.threads) // self.threads * self.threads

    def bytes(self, momentum: bool = True) -> int:
        """What an element moves."""
        param, momentum_buffer = self.itemsizes
        return 3 * param + 2 * momentum_buffer * momentum

    def loop(self, rule: Rule) -> list[Instruction]:
        """The main loop once, on the way of a rule."""
        ways = [
            find_path(self.code, first, partial(is_at, last), *rule)
            for first, last in vector_loops(self.code)
        ]

        def worth(way: Code) -> tuple[float, float]:
            return marks(way, rule.most) / self.elements(way), -len(way) / self.elements(way)

        return max(filter(None, ways), key=worth)

    def elements(self, loop: Code) -> int:
        param, momentum_buffer = self.itemsizes
        return sum(bytes_of(one, "LDG") for one in loop) // (2 * param + momentum_buffer)

    def around(self, loop: Code) -> int:
        """How many instructions a thread has before and after its loop, at the least."""
        before = find_path(self.code, 0, partial(is_at, loop[0].address))
        after = find_path(self.code, loop[-1].address + 16, partial(is_named, "EXIT"))
        assert before and after
        return len(before) - 1 + len(after)


class Prediction(NamedTuple):
    inside: float  # instructions for an element in the main loop
    around: float  # and around it
    limits: dict[str, float]  # elements in a second

    def fraction(self, size: int) -> tuple[float, str]:
        """Of the bandwidth, where an element moves so many bytes, and what limits it."""
        memory = H100.bandwidth / size
        slowest, name = min((limit, name) for name, limit in self.limits.items())
        return (slowest / memory, name) if slowest < memory else (1.0, "memory")


def predict(kernel: Kernel, rule: Rule) -> Prediction:
    loop = kernel.loop(rule)
    elements, around = kernel.elements(loop), kernel.around(loop)
    clocks = H100.multiprocessors * H100.clock
    inside = len(loop) / elements
    limits = {"issue": clocks * ISSUE / (inside + around / kernel.share)}
    for pipe, (rate, names) in PIPES.items():
        taken = sum(one.name in names for one in loop)
        if taken:
            limits[pipe] = clocks * rate * elements / taken
    # The worst case: a thread waits for memory in every round and once before, and for the result
    # of every instruction.
    rounds = kernel.share / elements
    waits = rounds * sum(WAIT_LONGER.get(one.name, WAIT) for one in loop) + WAIT * around
    life = (rounds + 1) * H100.latency + waits / H100.clock
    limits["latency"] = H100.multiprocessors * kernel.resident * kernel.share / life
    return Prediction(inside, around / kernel.share, limits)


def our_kernels() -> list[Kernel]:
    header = (ROOT / "csrc/lpsgd_cuda_kernel.h").read_text()
    threads, rounds = re.findall(r"LPSGD_CUDA_(?:THREADS|ROUNDS) = (\d+)", header)
    with tempfile.TemporaryDirectory() as folder:
        image = Path(folder, "kernels.fatbin")
        compile_kernels(of_the_build()["cuda_flags"](["sm_90"]), image)
        code = machine_code(cuobjdump("-sass", image))[90]
        used = registers(cuobjdump("--dump-resource-usage", image))
    kernels = []
    for name, itemsizes in KERNELS.items():
        share = int(rounds) * 16 // itemsizes[0]
        short = name.removeprefix("lpsgd_cuda_")
        kernels.append(Kernel(short, code[name], used[name], int(threads), share, itemsizes))
    return kernels


def torch_kernels() -> list[Kernel]:
    """PyTorch's fused SGD with momentum, or none where there is no libtorch_cuda.so. 512 threads
    share 65536 elements (ATen/native/cuda/MultiTensorApply.cuh)."""
    spec = importlib.util.find_spec("torch")
    library = Path((spec and spec.origin) or "").parent / "lib/libtorch_cuda.so"
    if not library.is_file():
        return []
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        names = {
            name.decode()
            for name in re.findall(rb"_ZN\w+FusedSgdMathFunctorI\w+Li3E\w+(?=\0)", text)
        }
    only = ("-arch", "sm_90", "-fun", ",".join(sorted(names)), library)
    code = machine_code(cuobjdump("-sass", *only))[90]
    used = registers(cuobjdump("--dump-resource-usage", *only))
    kernels = []
    for dtype, mangled, size in (
        ("float32", "f", 4),
        ("float64", "d", 8),
        ("bfloat16", "N3c108BFloat16E", 2),
        ("float16", "N3c104HalfE", 2),
    ):
        (name,) = (name for name in code if f"FusedSgdMathFunctorI{mangled}Li3E" in name)
        kernels.append(Kernel(f"SGD {dtype}", code[name], used[name], 512, 128, (size, size)))
    return kernels


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def limits_of(kernel: Kernel, p: str, rule: Rule) -> list[str]:
    prediction, size = predict(kernel, rule), kernel.bytes()
    limits = prediction.limits
    pipe = min(PIPES.keys() & limits.keys(), key=lambda name: limits[name])
    without = kernel.name in ("float32", "float64", "bfloat16", "float16")  # LPSGD's
    fractions = [prediction.fraction(kernel.bytes(m)) for m in (True, False)[: 1 + without]]
    return [
        *(kernel.name, p, f"{size}", f"{prediction.inside:.0f} + {prediction.around:.0f}"),
        f"{limits['issue'] * 1e-9:.0f}",
        f"{limits[pipe] * 1e-9:.0f} ({pipe})",
        f"{limits['latency'] * 1e-9:.0f}",
        f"{H100.bandwidth / size * 1e-9:.0f}",
        *(f"{fraction:.2f} ({limit})" for fraction, limit in fractions),
        *([] if without else [""]),
    ]


def occupancy_of(kernel: Kernel, rule: Rule) -> list[str]:
    param, momentum_buffer = kernel.itemsizes
    loaded = 2 * param + momentum_buffer
    in_flight = kernel.resident * kernel.elements(kernel.loop(rule)) * loaded
    reads = H100.bandwidth * loaded / kernel.bytes()
    needed = reads * H100.latency / H100.multiprocessors
    kib = (f"{number / 1024:.0f}" for number in (in_flight, needed))
    return [kernel.name, f"{kernel.registers}", f"{kernel.resident}", *kib]


def tables(kernels: Sequence[tuple[Kernel, dict[str, Rule]]]) -> str:
    """The limits of each kernel by each of its rules, and what it has in flight."""
    limits = [limits_of(kernel, *rule) for kernel, rules in kernels for rule in rules.items()]
    header = (
        *("kernel", "p", "bytes", "instructions", "issue", "busiest pipe", "latency", "memory"),
        *("fraction of the bandwidth", "without momentum"),
    )
    occupancy = [occupancy_of(kernel, next(iter(rules.values()))) for kernel, rules in kernels]
    columns = ("kernel", "registers", "threads", "loads in flight, KiB", "needed, KiB")
    return f"{markdown(header, limits)}\n{markdown(columns, occupancy)}"


def main() -> None:
    kernels = [(kernel, RULES) for kernel in our_kernels()]
    theirs = [(kernel, {"": TORCH_RULE}) for kernel in torch_kernels()]
    print(tables(kernels + theirs))
    if not theirs:
        print("PyTorch's kernels are left out: there is no libtorch_cuda.so.")


if __name__ == "__main__":
    main()
