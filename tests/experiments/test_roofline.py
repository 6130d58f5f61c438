# SPDX-License-Identifier: MIT
"""What benchmarks/speed/roofline.py reads out of the machine code, against what the source has."""

import re
from itertools import pairwise, product

import pytest

from benchmarks.speed import roofline
from benchmarks.speed.roofline import KERNELS, PIPES, RULES

# Instructions of memory, of control and of a whole warp, which have no pipe in the table.
OTHERS = r"LDG|STG|LDC|U\w+|S2U?R|R2UR|VOTEU|BRA|BRXU|BSSY|BSYNC|CALL|RET"
BY_KERNEL_AND_RULE = pytest.mark.parametrize(("name", "p"), list(product(KERNELS, RULES)))


@pytest.fixture(scope="module")
def kernels():
    try:
        return dict(zip(KERNELS, roofline.our_kernels(), strict=True))
    except FileNotFoundError as missing:
        pytest.skip(str(missing))


def count(way, pattern):
    return sum(bool(re.match(pattern, one.opcode)) for one in way)


@BY_KERNEL_AND_RULE
def test_a_round_is_one_vector_loaded_and_stored(kernels, name, p):
    loop = kernels[name].loop(RULES[p])
    param, momentum_buffer = KERNELS[name]
    elements = kernels[name].elements(loop)
    assert elements == 16 // param
    moved = [sum(roofline.bytes_of(one, kind) for one in loop) for kind in ("LDG", "STG")]
    assert moved == [
        elements * (2 * param + momentum_buffer),
        elements * (param + momentum_buffer),
    ]
    assert sum(moved) == elements * kernels[name].bytes()


@BY_KERNEL_AND_RULE
def test_a_way_has_the_fused_operations_of_its_rule(kernels, name, p):
    """Momentum and update; the polynomial, of degree 5, and what is around it, or those that nvcc
    divides by. The power looks up four entries of tables. float64's is CUDA's."""
    loop = kernels[name].loop(RULES[p])
    fused = count(loop, "[FD]FMA") / kernels[name].elements(loop)
    reciprocals = count(loop, "MUFU") / kernels[name].elements(loop)
    if name != "lpsgd_cuda_float64":
        assert fused == 2 + {"2": 0, "between": 5 + 4, "∞": 5}[p]
        assert reciprocals == (p == "∞")
        assert count(loop, "LDS") / kernels[name].elements(loop) == 4 * (p == "between")
    else:
        assert (fused == 2) if p == "2" else (fused > 2)
        assert reciprocals == (p != "2")


@BY_KERNEL_AND_RULE
def test_a_way_follows_the_branches(kernels, name, p):
    loop = kernels[name].loop(RULES[p])
    for one, following in pairwise(loop):
        onward = one.goes_on and one.name != "CALL" and following.address == one.address + 16
        jump = following.address == one.target or one.name in ("BRXU", "RET")
        assert onward or jump, (str(one), str(following))
    assert loop[-1].target == loop[0].address


@pytest.mark.parametrize("p", RULES)
def test_a_way_has_no_random_numbers(kernels, p):
    """Stochastic rounding is not the usual way. The number is a factor of lpsgd_random."""
    kernel = kernels["lpsgd_cuda_bfloat16"]
    factor = f"{0xED5AD4BB - (1 << 32):#x}"
    assert sum(factor in one.operands for one in kernel.code) >= 8
    assert not [one for one in kernel.loop(RULES[p]) if factor in one.operands]


@BY_KERNEL_AND_RULE
def test_every_instruction_is_known(kernels, name, p):
    with_pipe = set().union(*(names for _, names in PIPES.values()))
    names = {one.name for one in kernels[name].loop(RULES[p])}
    assert not {one for one in names - with_pipe if not re.fullmatch(OTHERS, one)}


@pytest.mark.parametrize("name", KERNELS)
def test_a_power_takes_longest_and_p2_shortest(kernels, name):
    predictions = [roofline.predict(kernels[name], RULES[p]) for p in ("2", "∞", "between")]
    for less, more in pairwise(predictions):
        assert 0 < less.inside < more.inside
        assert less.limits["issue"] > more.limits["issue"]
        assert less.limits["latency"] > more.limits["latency"]
    size = kernels[name].bytes()
    assert 0 < predictions[2].fraction(size)[0] <= predictions[0].fraction(size)[0] <= 1


def test_table_has_every_kernel_and_rule(kernels):
    text = roofline.tables([(kernel, RULES) for kernel in kernels.values()])
    rows = [line.split(" | ") for line in text.splitlines() if "(" in line]
    assert [(row[0], row[1]) for row in rows] == [
        (f"| {name.removeprefix('lpsgd_cuda_')}", p) for name, p in product(KERNELS, RULES)
    ]
