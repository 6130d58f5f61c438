# SPDX-License-Identifier: MIT
"""The schedule of p against eq 19."""

import io
import math

import pytest
import torch

import lpsgd
import lpsgd_ext


def eq_19(s, total, p_max, p_min=2.0):
    return p_min + (p_max - p_min) * (1 + math.cos(math.pi * (s - 1) / (total - 1))) / 2


def optimizer(*ps):
    return lpsgd.LPSGDM([{"params": [torch.nn.Parameter(torch.zeros(1))], "p": p} for p in ps])


@pytest.mark.parametrize("total", [2, 3, 10, 200, 12345])
@pytest.mark.parametrize("p_max, p_min", [(6.0, 2.0), (9.0, 2.5), (100.0, 2.0), (2.0, 2.0)])
def test_cosine_is_eq_19(total, p_max, p_min):
    values = [lpsgd_ext.cosine_p(s, total, p_max, p_min) for s in range(1, total + 1)]
    exact = [eq_19(s, total, p_max, p_min) for s in range(1, total + 1)]
    assert values == pytest.approx(exact, rel=4e-16 * p_max, abs=0)
    assert values == sorted(values, reverse=True)
    assert (values[0], values[-1]) == (p_max, p_min)


def test_middle_is_exact():
    assert lpsgd_ext.cosine_p(3, 5, 6.0) == 4.0


def test_one_iteration_has_p_max_and_later_ones_p_min():
    assert lpsgd_ext.cosine_p(1, 1, 6.0) == 6.0
    assert lpsgd_ext.cosine_p(2, 1, 6.0) == 2.0


def test_after_the_last_it_stays_at_p_min():
    assert lpsgd_ext.cosine_p(1e300, 10, 6.0) == 2.0


def test_after_k_steps_p_is_eq_19_at_k_plus_1_in_every_group():
    groups = optimizer(6.0, 9.0)
    schedule = lpsgd.CosineAnnealingP(groups, total_iters=10, p_min=2.5)
    for k in range(15):
        s = min(k + 1, 10)
        expected = [lpsgd_ext.cosine_p(s, 10, p_max, 2.5) for p_max in (6.0, 9.0)]
        assert schedule.get_last_p() == expected
        assert [group["p"] for group in groups.param_groups] == expected
        schedule.step()


def test_it_goes_on_from_a_checkpoint():
    whole = optimizer(6.0)
    schedule = lpsgd.CosineAnnealingP(whole, total_iters=10)
    for _ in range(4):
        schedule.step()
    file = io.BytesIO()
    torch.save({"optimizer": whole.state_dict(), "schedule": schedule.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = optimizer(6.0)
    resumed_schedule = lpsgd.CosineAnnealingP(resumed, total_iters=99)
    resumed.load_state_dict(saved["optimizer"])
    resumed_schedule.load_state_dict(saved["schedule"])
    for _ in range(8):
        assert resumed_schedule.get_last_p() == schedule.get_last_p()
        assert resumed_schedule.state_dict() == schedule.state_dict()
        resumed_schedule.step()
        schedule.step()


def test_a_schedule_made_anew_can_start_in_the_middle():
    first = lpsgd.CosineAnnealingP(optimizer(6.0), total_iters=10)
    for _ in range(4):
        first.step()
    second = lpsgd.CosineAnnealingP(optimizer(6.0), total_iters=10, last_epoch=4)
    assert second.get_last_p() == first.get_last_p()


def test_a_group_added_late_is_scheduled_too():
    groups = optimizer(6.0)
    schedule = lpsgd.CosineAnnealingP(groups, total_iters=3)
    schedule.step()
    groups.add_param_group({"params": [torch.nn.Parameter(torch.zeros(1))], "p": 8.0})
    schedule.step()
    assert schedule.get_last_p() == [2.0, 2.0]
    assert groups.param_groups[1]["initial_p"] == 8.0


@pytest.mark.parametrize(
    "arguments",
    [{"total_iters": 0}, {"total_iters": 5, "p_min": 1.0}, {"total_iters": 5, "p_min": math.inf}],
)
def test_arguments_out_of_range_are_refused(arguments):
    groups = optimizer(6.0)
    with pytest.raises(ValueError, match="Invalid"):
        lpsgd.CosineAnnealingP(groups, **arguments)
    assert "initial_p" not in groups.param_groups[0]


def test_infinite_p_and_foreign_optimizers_are_refused():
    with pytest.raises(ValueError, match="p = inf"):
        lpsgd.CosineAnnealingP(optimizer(math.inf), total_iters=5)
    sgd = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    with pytest.raises(ValueError, match="has no p"):
        lpsgd.CosineAnnealingP(sgd, total_iters=5)
    with pytest.raises(TypeError, match="is not an Optimizer"):
        lpsgd.CosineAnnealingP(None, total_iters=5)
