# SPDX-License-Identifier: MIT
"""safetensors keeps momentum of every dtype as it is."""

import copy

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from helpers import parameters, same_bits, steps
from lpsgd import LPSGDM


def buffers(optimizer):
    return [state["momentum_buffer"] for state in optimizer.state.values()]


@pytest.mark.parametrize("momentum_dtype", [torch.float32, torch.bfloat16, torch.float8_e5m2])
def test_a_run_goes_on_with_the_same_bits(tmp_path, momentum_dtype):
    params = parameters((70,), (4, 5))
    values = {"momentum_dtype": momentum_dtype, "momentum_exponent": 12, "seed": 3}
    optimizer = LPSGDM(params, 0.1, **values)
    steps(optimizer, params, range(3))
    state_dict = optimizer.state_dict()
    states = state_dict.pop("state")
    save_file({str(i): state["momentum_buffer"] for i, state in states.items()}, tmp_path / "file")
    if momentum_dtype is torch.float8_e5m2:
        with safe_open(tmp_path / "file", "pt") as file:
            assert file.get_slice("0").get_dtype() == "F8_E5M2"

    loaded = {int(i): {"momentum_buffer": m} for i, m in load_file(tmp_path / "file").items()}
    others = copy.deepcopy(params)
    resumed = LPSGDM(others)
    resumed.load_state_dict({**state_dict, "state": loaded})
    assert [buffer.dtype for buffer in buffers(resumed)] == [momentum_dtype] * 2
    assert same_bits(buffers(resumed), buffers(optimizer))
    for one, group in ((optimizer, params), (resumed, others)):
        steps(one, group, range(3, 6))
    assert same_bits(params, others)
    assert same_bits(buffers(optimizer), buffers(resumed))
