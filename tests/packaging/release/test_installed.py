# SPDX-License-Identifier: MIT
"""What an installed wheel must do in any environment that has PyTorch and pytest, nothing else."""

import hashlib
import io
import math
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

import lpsgd
import lpsgd_ext

CLASSES = [lpsgd.LPSGD, lpsgd.LPSGDM]
# Of the bits that CPU, number of threads, PyTorch and Python must not change.
CHECKSUM = "914140db4800ec7e"


def values(seed, dtype, shape=(37, 29)):
    """Numbers of many magnitudes without a random generator, which a release may change."""
    i = torch.arange(math.prod(shape)) + 100003 * seed
    mantissas = (i * 2654435761 >> 8) % 65536 - 32768
    return torch.ldexp(mantissas.double(), -16 - i % 12).to(dtype).reshape(shape)


def stepped(cls, dtype, p, steps=3, **kwargs):
    """A parameter and its optimizer after some steps with given gradients."""
    param = torch.nn.Parameter(values(0, dtype))
    optimizer = cls([param], lr=0.01, p=p, weight_decay=0.1, **kwargs)
    step(optimizer, param, range(1, steps + 1))
    return param, optimizer


def step(optimizer, param, seeds):
    for seed in seeds:
        param.grad = values(seed, param.dtype)
        optimizer.step()


def test_the_installed_package_is_what_is_tested():
    folder = Path(sysconfig.get_path("platlib"))
    assert folder in Path(lpsgd.__file__).parents
    assert Path(lpsgd_ext.__file__).parent == folder
    assert lpsgd.build_info()["fallback"] is None


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a build may have no OpenMP")
def test_openmp_is_pytorchs():
    assert lpsgd_ext.build_info()["openmp"]
    maps = Path("/proc/self/maps").read_text().splitlines()
    runtimes = {line.split()[-1] for line in maps if "libgomp" in line}
    assert len(runtimes) == 1
    assert Path(torch.__file__).parents[1] in Path(runtimes.pop()).parents


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere there are no kernels")
def test_kernels_are_for_drivers_of_cuda_12_and_later():
    """A driver takes kernels of its own major version and of earlier ones."""
    assert lpsgd_ext.build_info()["cuda"] == "12.9"
    assert {"sm_75", "sm_120"} < set(lpsgd_ext.build_info()["cuda_architectures"].split())


def test_the_module_reads_tensors_without_the_classes():
    """By PyTorch's exchange table: dtypes, shapes, strides, offsets and refusals."""
    whole = torch.zeros(4, 6)
    for param in (whole[1:3], torch.zeros(5, 3, dtype=torch.float64).t(), torch.zeros(())):
        grad = torch.ones_like(param)
        lpsgd_ext.lpsgd_([param], [grad], lr=0.5, p=2.0)
        assert torch.equal(param, torch.full_like(param, -0.5))
    assert whole.count_nonzero() == 12
    with pytest.raises(ValueError, match=r"params\[0\]"):
        lpsgd_ext.lpsgd_([whole[:, ::2]], [whole[:, ::2]], lr=0.5, p=2.0)


@pytest.mark.parametrize("p", [2.0, 3.3, 6.0, math.inf])
@pytest.mark.parametrize("cls", CLASSES)
def test_a_step_in_c_is_pytorchs_operations_to_rounding(cls, p):
    in_c, _ = stepped(cls, torch.float32, p, fused=True)
    eager, _ = stepped(cls, torch.float32, p, foreach=False)
    torch.testing.assert_close(in_c, eager, rtol=1e-5, atol=1e-7)
    assert not torch.equal(in_c, values(0, torch.float32))


def test_bits_are_those_of_every_machine():
    checksum = hashlib.sha256()
    for cls in CLASSES:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for p in (2.0, 3.3, 6.0, math.inf):
                param, optimizer = stepped(cls, dtype, p, fused=True)
                for tensor in (param.detach(), *optimizer.state[param].values()):
                    checksum.update(bytes(tensor.view(torch.uint8).flatten().tolist()))
    assert checksum.hexdigest()[:16] == CHECKSUM


@pytest.mark.parametrize("cls", CLASSES)
def test_a_schedule_takes_p_from_6_to_2(cls):
    param, optimizer = stepped(cls, torch.float32, 6.0)
    schedule = lpsgd.CosineAnnealingP(optimizer, total_iters=4)
    ps = [optimizer.param_groups[0]["p"]]
    for seed in range(4):
        step(optimizer, param, [seed])
        schedule.step()
        ps.append(optimizer.param_groups[0]["p"])
    assert ps[0] == 6 and ps[-1] == 2 and ps == sorted(ps, reverse=True)


@pytest.mark.parametrize("cls", CLASSES)
def test_a_checkpoint_goes_on_with_the_bits_of_an_uninterrupted_run(cls):
    whole, _ = stepped(cls, torch.float32, 6.0, steps=5)
    param, optimizer = stepped(cls, torch.float32, 6.0)
    file = io.BytesIO()
    torch.save({"param": param, "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    checkpoint = torch.load(file)
    again, optimizer = stepped(cls, torch.float32, 3.0, steps=0)
    with torch.no_grad():
        again.copy_(checkpoint["param"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    step(optimizer, again, (4, 5))
    assert torch.equal(again, whole)
