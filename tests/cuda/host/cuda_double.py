# SPDX-License-Identifier: MIT
"""The driver's double (csrc/cuda_double.h) and tensors that lpsgd_ext takes for CUDA tensors.

It needs a process whose LD_LIBRARY_PATH has the double's folder, and must be imported before
lpsgd_ext. PyTorch takes the tensors for CPU tensors, and may touch them within `opened` alone.
"""

import contextlib
import ctypes
import importlib.util
import math
import shutil

import torch

import_path = importlib.util.find_spec("lpsgd_ext").origin
driver = ctypes.CDLL("libcuda.so.1")
for _name, _result, *_arguments in (
    ("double_reset", None, ctypes.c_int),
    ("double_version", None, ctypes.c_int),
    ("double_fail", None, ctypes.c_char_p, ctypes.c_int, ctypes.c_int),
    ("double_log", ctypes.c_char_p),
    ("double_forget", None),
    ("double_allocate", ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t),
    ("double_device_of", ctypes.c_int, ctypes.c_void_p),
    ("double_host", ctypes.c_void_p, ctypes.c_void_p),
    ("double_open", None, ctypes.c_int),
    ("double_current", ctypes.c_int),
    ("double_capture", None, ctypes.c_int, ctypes.c_int, ctypes.c_int),
    ("double_wrong", None, ctypes.c_char_p),
    ("exchange_double", ctypes.c_void_p, ctypes.c_void_p),
    ("exchange_set_stream", None, ctypes.c_int, ctypes.c_int),
    ("exchange_fail", None, ctypes.c_int),
):
    getattr(driver, _name).restype = _result
    getattr(driver, _name).argtypes = _arguments


def _replace_exchange_table():
    """Puts the double's table in the place of PyTorch's; modules read it when they are imported."""
    pointer_of, capsule_of = ctypes.pythonapi.PyCapsule_GetPointer, ctypes.pythonapi.PyCapsule_New
    pointer_of.restype, pointer_of.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
    capsule_of.restype = ctypes.py_object
    capsule_of.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
    table = driver.exchange_double(pointer_of(torch.Tensor.__dlpack_c_exchange_api__, _CAPSULE))
    torch.Tensor.__dlpack_c_exchange_api__ = capsule_of(table, _CAPSULE, None)


_CAPSULE = b"dlpack_exchange_api"  # outlives the capsule, which only points to it
_replace_exchange_table()


def reset(devices=3):
    driver.double_reset(devices)
    driver.exchange_fail(0)
    for device in range(devices):
        driver.exchange_set_stream(device, 0)


def fail(call, nth=1, error=719):
    """The nth call of this name from now on answers the error, once; every one if nth is 0."""
    driver.double_fail(call.encode(), nth, error)


def mend():
    driver.double_fail(b"", -1, 0)


def log():
    """The calls since `reset` or `forget`."""
    return driver.double_log().decode().splitlines()


def count(call):
    return sum(line.startswith(call) for line in log())


def forget():
    driver.double_forget()


def capture(capturing, device=0, stream=1):
    """Begins or ends the capture of a stream."""
    driver.double_capture(device, stream, capturing)


def sabotage(kernel):
    """Makes the kernel of this name leave a wrong bit."""
    driver.double_wrong(kernel.encode())


@contextlib.contextmanager
def opened():
    """Within, PyTorch's operations can run on the tensors, as on a GPU."""
    driver.double_open(1)
    yield
    driver.double_open(0)


def fresh_module(folder):
    """An lpsgd_ext that has called nothing of the driver yet: C's statics belong to the file."""
    path = shutil.copy(import_path, folder)
    spec = importlib.util.spec_from_file_location("lpsgd_ext", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def at(address, dtype, shape):
    """A tensor of this memory."""
    size = math.prod(shape) * dtype.itemsize
    memory = (ctypes.c_byte * size).from_address(address)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def cuda(tensor, device=0):
    """A copy in the memory of a device."""
    address = driver.double_allocate(device, tensor.nbytes)
    assert address, "the device has no more memory"
    copy = at(address, tensor.dtype, tensor.shape)
    host(copy).copy_(tensor.detach())
    return copy


def host(tensor):
    """The elements of such a tensor where the host can touch them."""
    return at(driver.double_host(tensor.data_ptr()), tensor.dtype, tensor.shape)


def device_of(tensor):
    """The index of the device that has the tensor's memory; -1: none."""
    return driver.double_device_of(tensor.data_ptr())


def present_as_cuda(monkeypatch):
    """Lets the tensors say themselves that they are on CUDA devices, and `to`, `empty` and
    `zeros_like` make such tensors: what the optimizers' Python uses."""
    true_device, true_to = torch.Tensor.device, torch.Tensor.to
    empty, zeros_like = torch.empty, torch.zeros_like

    def device(tensor):
        index = device_of(tensor)
        return true_device.__get__(tensor) if index < 0 else torch.device("cuda", index)

    def to(tensor, *args, **kwargs):
        if device_of(tensor) < 0 or not isinstance(args[0], torch.device):
            return true_to(tensor, *args, **kwargs)
        target = args[0]
        if target == tensor.device:
            return tensor
        copy = host(tensor).clone()
        return copy if target.type == "cpu" else cuda(copy, target.index)

    def make_empty(*args, device=None, **kwargs):
        made = empty(*args, **kwargs)
        return cuda(made, device.index) if device is not None and device.type == "cuda" else made

    def make_zeros_like(tensor, **kwargs):
        index, made = device_of(tensor), zeros_like(tensor, **kwargs)
        return made if index < 0 else cuda(made, index)

    monkeypatch.setattr(torch.Tensor, "device", property(device))
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda t: device_of(t) >= 0))
    monkeypatch.setattr(torch.Tensor, "to", to)
    monkeypatch.setattr(torch, "empty", make_empty)
    monkeypatch.setattr(torch, "zeros_like", make_zeros_like)
