# SPDX-License-Identifier: MIT
"""Steps in PyTorch's operations: without lpsgd_ext, and on devices that it knows nothing of.

`make test-pure` runs all of tests/optimizer and tests/schedules without lpsgd_ext.
"""

import importlib.util
import sys
import sysconfig

import pytest
import torch
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lpsgd
from helpers import CLASSES, IN_C, run
from lpsgd import _reference

# lpsgd_ext is there again for the tests, which compare with it.
WITHOUT = """
import sys, warnings
import pytest, torch, lpsgd_ext
warnings.simplefilter("error")
sys.modules["lpsgd_ext"] = None
import lpsgd
sys.modules["lpsgd_ext"] = lpsgd_ext

params = [torch.nn.Parameter(torch.ones(3, dtype=d)) for d in (torch.float32, torch.float64)]
for param in params:
    param.grad = torch.ones_like(param)
optimizers = [lpsgd.LPSGD(params), lpsgd.LPSGDM(params), lpsgd.LPSGDM(params, fused=True)]
with pytest.warns(UserWarning, match="PyTorch's operations step: lpsgd was installed") as seen:
    optimizers[0].step()
assert len(seen) == 1 and lpsgd.build_info()["fallback"] in str(seen[0].message)
optimizers[1].step()
assert all((param < 1.0).all() for param in params)
wording = (
    r"`fused=True` requires all the params to be floating point Tensors of supported devices: "
    r"\\[\\] but torch\\.float32 and cpu: lpsgd was installed without lpsgd_ext"
)
with pytest.raises(RuntimeError, match=wording):
    optimizers[2].step()
sys.exit(pytest.main(["-n0", "-q", "-p", "no:cacheprovider", *sys.argv[1:]]))
"""
# A few seconds of the two folders.
SOME = [f"tests/optimizer/test_{name}.py" for name in ("amp", "family", "optimizer")]
SOME += ["tests/schedules/test_schedule.py", "-k", "not test_schedule or p_is_eq_19"]


@pytest.mark.skipif(not IN_C, reason="make test-pure runs all of them")
def test_without_lpsgd_ext_one_warning_is_given_and_tests_pass():
    printed = run([sys.executable, "-c", WITHOUT, *SOME])
    assert "fused=True needs C" in printed and "passed" in printed


def decided():
    """What is decided where lpsgd is imported now."""
    spec = importlib.util.find_spec("lpsgd._native")
    native = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(native)
    return native


@pytest.fixture
def no_lpsgd_ext(monkeypatch):
    monkeypatch.setitem(sys.modules, "lpsgd_ext", None)
    monkeypatch.delenv("LPSGD_NATIVE", raising=False)


def test_lpsgd_ext_is_taken_where_it_is_there(monkeypatch):
    monkeypatch.delenv("LPSGD_NATIVE", raising=False)
    native = decided()
    assert native.build_info() == {**sys.modules["lpsgd_ext"].build_info(), "fallback": None}


def test_lpsgd_ext_that_is_not_installed_is_missing_for_a_reason(no_lpsgd_ext, monkeypatch):
    native = decided()
    assert native.lpsgd_ext is _reference
    assert native.build_info()["version"] == lpsgd.__version__
    assert "there was no C compiler or with LPSGD_NATIVE=0" in native.build_info()["fallback"]
    monkeypatch.setattr(sys, "platform", "win32")
    assert "not built on win32" in decided().build_info()["fallback"]


def test_a_free_threaded_python_works_without_lpsgd_ext(no_lpsgd_ext, monkeypatch):
    """The stand-in for such a Python is one that says so of itself."""
    monkeypatch.setitem(sysconfig.get_config_vars(), "Py_GIL_DISABLED", 1)
    assert "relies on the GIL" in decided().build_info()["fallback"]


def test_lpsgd_ext_that_cannot_be_loaded_is_missing_for_the_linkers_reason(tmp_path, monkeypatch):
    (tmp_path / "lpsgd_ext.abi3.so").write_text("no library")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "lpsgd_ext")
    monkeypatch.delenv("LPSGD_NATIVE", raising=False)
    native = decided()
    assert native.lpsgd_ext is _reference
    assert "lpsgd_ext cannot be loaded: " in native.FALLBACK
    assert "lpsgd_ext.abi3.so: file too short" in native.FALLBACK


def test_the_environment_chooses(no_lpsgd_ext, monkeypatch):
    monkeypatch.setenv("LPSGD_NATIVE", "1")
    with pytest.raises(ImportError, match="lpsgd_ext"):
        decided()
    monkeypatch.undo()
    monkeypatch.setenv("LPSGD_NATIVE", "0")
    assert decided().lpsgd_ext is _reference
    assert decided().build_info()["fallback"] == "LPSGD_NATIVE=0 is in the environment"


class LikeMps(TorchDispatchMode):
    """Sees that a device gets no float64, as MPS has none, and no operands that lie elsewhere."""

    def __init__(self, device):
        super().__init__()
        self.device = torch.device(device)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, torch.Tensor)]
        dtypes = {x.dtype for x in tensors if x.device == self.device}
        assert dtypes.isdisjoint({torch.float64, torch.complex128}), function
        devices = {x.device for x in tensors if x.numel() > 1}
        assert len(devices) < 2 or function is torch.ops.aten._to_copy.default, function
        return result


VALUES = {
    "by default": {},
    "for loop": {"foreach": False},
    "foreach": {"foreach": True},
    "numbers": {"weight_decay": 0.1, "eps": 0.1, "pivot": 0.3, "maximize": True},
    "a tensor": {"lr": torch.tensor(0.1)},
    "differentiable": {"lr": torch.tensor(0.1), "differentiable": True},
    "random": {"stochastic_rounding": True},
}
OF_MOMENTUM = {
    "bfloat16": {"momentum_dtype": torch.bfloat16, "stochastic_rounding": True},
    "one byte": {"momentum_dtype": torch.float8_e5m2},
}
CASES = [(cls, name) for cls in CLASSES for name in VALUES]
CASES += [(lpsgd.LPSGDM, name) for name in OF_MOMENTUM]


@pytest.mark.parametrize("cls, values", CASES)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_nothing_asks_a_device_for_float64_or_for_another_device(cls, values, device):
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.complex64)
    params = [Parameter(torch.ones(5, 3, dtype=dtype, device=device)) for dtype in dtypes]
    values = {"lr": 0.1, **{**VALUES, **OF_MOMENTUM}[values]}
    if values.get("differentiable"):
        params = [param.detach().requires_grad_().clone() for param in params]
    optimizer = cls(params, **values)
    schedule = lpsgd.CosineAnnealingP(optimizer, 3)
    with LikeMps(device):
        for _ in range(3):
            for param in params:
                param.grad = torch.full_like(param, 0.5)
            if not values.get("differentiable"):
                optimizer.grad_scale = torch.tensor(2.0) if device == "cpu" else 2.0
            optimizer.step()
            schedule.step()
        optimizer.load_state_dict(optimizer.state_dict())
        if device == "cpu":
            lpsgd.suggest_pivot(optimizer)
            if cls is lpsgd.LPSGDM:
                lpsgd.momentum_report(optimizer)
            else:  # whose groups have a momentum that they were saved with for SGD
                with pytest.raises(TypeError, match="needs an LPSGDM"):
                    lpsgd.momentum_report(optimizer)
    if device == "cpu":
        assert all((param != 1.0).all() for param in params)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e5m2])
def test_momentum_of_float64_is_loaded_where_there_is_none(dtype):
    """As from a checkpoint of a model in float64, which was trained elsewhere."""
    param = Parameter(torch.ones(5, dtype=torch.float64))
    other = Parameter(torch.ones(5, device="meta"))
    wide, optimizer = lpsgd.LPSGDM([param]), lpsgd.LPSGDM([other], momentum_dtype=dtype)
    param.grad = torch.ones_like(param)
    wide.step()
    saved = wide.state_dict()
    saved["param_groups"][0]["momentum_dtype"] = optimizer.param_groups[0]["momentum_dtype"]
    with LikeMps("meta"):
        optimizer.load_state_dict(saved)
    assert optimizer.state[other]["momentum_buffer"].dtype == dtype
    assert optimizer.state[other]["momentum_buffer"].device.type == "meta"


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan")])
def test_an_impossible_scale_is_refused_before_anything_is_written(cls, scale):
    params = [Parameter(torch.ones(3)), Parameter(torch.ones(3, dtype=torch.complex64))]
    optimizer = cls([{"params": params[:1]}, {"params": params[1:]}], foreach=False)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.grad_scale = torch.tensor(scale)
    with pytest.raises(ValueError, match="Invalid grad_scale"):
        optimizer.step()
    assert all((param == 1.0).all() for param in params) and not any(optimizer.state.values())


def test_no_state_is_made_while_an_xpu_graph_is_captured(monkeypatch):
    param = Parameter(torch.ones(3, dtype=torch.complex64))
    param.grad = torch.ones_like(param)
    optimizer = lpsgd.LPSGDM([param])
    monkeypatch.setattr(torch.xpu, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.xpu, "is_current_stream_capturing", lambda: True, raising=False)
    monkeypatch.setattr("lpsgd._unusual._check_graph_capture", lambda optimizer: None)
    with pytest.raises(RuntimeError, match="make a step before the capture"):
        optimizer.step()
    assert not any(optimizer.state.values())
