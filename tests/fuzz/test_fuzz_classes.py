# SPDX-License-Identifier: MIT
"""Random lives of an optimizer, beside one that makes the same with PyTorch's operations.

Everything is done to both. The momenta are such that the moving average has one rounding in either
way of computing it, so that buffers must have the same bits, and parameters differ by the power's
4 ulp and a few roundings. After every step the twin takes over the parameters' bits.
"""

import collections
import copy
import math
import pickle
import time
import warnings

import hypothesis
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch.nn import Parameter

import lpsgd
from fuzzing import SECONDS, report

# In units of the larger of the parameter and its update: 4 ulp of C's power, 2 of PyTorch's, and
# the roundings of the product and of the sum.
TOLERANCE = 8

SHAPES = [(), (1,), (5,), (3, 4), (2, 3, 4), (0,), (700,)]
DTYPES = [
    torch.float32,
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.complex64,
]
LAYOUTS = {
    "contiguous": lambda t: t,
    "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1) if t.dim() else t,
    "gaps": lambda t: t.repeat_interleave(2, -1)[..., ::2] if t.dim() else t,
    "offset": lambda t: torch.cat([t.new_zeros(3), t.reshape(-1)])[3:].view(t.shape),
}
VALUES = {
    "lr": [0.1, 1.0, 1e-3, "tensor", 0.0],
    "p": [2.0, 3.0, 6.0, 100.0, math.inf],
    "momentum": [0.0, 0.5, 0.75],
    "weight_decay": [0.1, 0.0],
    "eps": [1e-8, 0.0, 0.1],
    "pivot": [1.0, 1e-3],
    "maximize": [False, True],
    "stochastic_rounding": [False, True],
    "momentum_exponent": [15, -3, 126],
}
MOMENTUM_DTYPES = [torch.float32, torch.bfloat16, torch.float8_e5m2]
BAD_VALUES = {"lr": -1.0, "p": 1.0, "weight_decay": math.nan, "eps": -1.0, "pivot": 0.0}
GRADS = {
    "usual": lambda g: g,
    "zero": torch.zeros_like,
    "nan": lambda g: g * math.nan,
    "infinite": lambda g: g / 0.0,
    "huge": lambda g: g * 1e4,
    "tiny": lambda g: g * 1e-7,
    "expanded": lambda g: g.new_ones(()).expand(g.shape),
    "none": lambda g: None,
}
BUFFERS = {
    "a copy": torch.clone,
    "other strides": LAYOUTS["transposed"],
    "gaps": LAYOUTS["gaps"],
    "flat": lambda b: b.reshape(-1)[None],
    "another dtype": lambda b: b.to(torch.float16 if b.dtype != torch.float16 else torch.float64),
    "integers": lambda b: torch.zeros(b.shape, dtype=torch.int32),
    "None": lambda b: None,
    "a number": lambda b: 0.5,
    "absent": lambda b: ...,
}


def random_like(shape, dtype, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def clock(optimizer):
    return [group.get("rounding_step") for group in optimizer.param_groups]


def same(a, b):
    """Whether two tensors have the same bits, NaNs aside."""
    if a.dtype == b.dtype == torch.float8_e5m2:  # for which PyTorch has little
        a, b = a.float(), b.float()
    return (
        a.shape == b.shape
        and a.dtype == b.dtype
        and torch.equal(a.isnan(), b.isnan())
        and (torch.equal(a.nan_to_num(), b.nan_to_num()))
    )


class Side:
    """An optimizer with its schedule and checkpoints."""

    def __init__(self, optimizer):
        self.optimizer, self.schedule, self.checkpoint = optimizer, None, None

    @property
    def params(self):
        return [param for group in self.optimizer.param_groups for param in group["params"]]

    def buffer(self, param):
        return self.optimizer.state.get(param, {}).get("momentum_buffer")

    def snapshot(self):
        """All that a step that raises must leave alone."""
        optimizer = self.optimizer
        tensors = self.params + [p.grad for p in self.params if p.grad is not None]
        state = [(id(p), list(s.items())) for p, s in optimizer.state.items()]
        tensors += [v for _, items in state for _, v in items if isinstance(v, torch.Tensor)]
        readable = [t for t in tensors if t.untyped_storage().nbytes() >= t.nbytes]
        return (
            [(id(t), t._version, pickle.dumps(t.detach().tolist())) for t in readable],
            [(n, [(k, id(v)) for k, v in items]) for n, items in state],
            [
                {k: repr(v) for k, v in group.items() if k != "params"}
                for group in optimizer.param_groups
            ],
        )


class OptimizerMachine(RuleBasedStateMachine):
    cls: type
    counts: collections.Counter

    @initialize(data=st.data())
    def make(self, data):
        self.counts["sequences"] += 1
        groups = [self.draw_group(data) for _ in range(data.draw(st.integers(1, 2)))]
        more = {"momentum": 0.5} if self.cls is lpsgd.LPSGDM else {}
        if more and data.draw(st.booleans()):
            more["momentum_dtype"] = data.draw(st.sampled_from(MOMENTUM_DTYPES))
        self.actual = Side(self.cls(copy.deepcopy(groups), **more))
        self.twin = Side(self.cls(copy.deepcopy(groups), foreach=False, **more))

    def draw_group(self, data):
        dtype = data.draw(st.sampled_from(DTYPES))
        tensors = data.draw(
            st.lists(
                st.tuples(
                    st.sampled_from(SHAPES), st.sampled_from(sorted(LAYOUTS)), st.integers(0, 99)
                ),
                min_size=1,
                max_size=3,
            )
        )
        params = [
            Parameter(LAYOUTS[layout](random_like(shape, dtype, seed)))
            for shape, layout, seed in tensors
        ]
        return {"params": params, **{name: self.draw_value(data, name) for name in self.names()}}

    def names(self):
        return [n for n in VALUES if "momentum" not in n or self.cls is lpsgd.LPSGDM]

    def draw_value(self, data, name):
        value = data.draw(st.sampled_from(VALUES[name]))
        return torch.tensor(0.25) if value == "tensor" else value

    def both(self, action):
        """Does it to both; what is raised must be raised by both. Returns whether it worked."""
        errors = []
        for side in (self.actual, self.twin):
            before = side.snapshot()
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    action(side)
                errors.append(None)
            except (TypeError, ValueError, RuntimeError, KeyError, OverflowError) as error:
                errors.append(error)
                assert side.snapshot() == before, f"{error!r} came after something had changed"
        assert (errors[0] is None) == (errors[1] is None), errors
        self.counts["refusals"] += errors[0] is not None
        return errors[0] is None

    def draw_param(self, data):
        return data.draw(st.integers(0, len(self.actual.params) - 1))

    @rule(seed=st.integers(0, 2**30), data=st.data())
    def backward(self, seed, data):
        for i, _ in enumerate(self.actual.params):
            how = data.draw(st.sampled_from(sorted(GRADS)))
            for side in (self.actual, self.twin):
                param = side.params[i]
                if param.requires_grad:
                    grad = random_like(param.shape, param.dtype, seed + i)
                    param.grad = GRADS[how](LAYOUTS["contiguous"](grad))

    @rule(times=st.integers(1, 3), seed=st.integers(0, 99), fresh=st.booleans())
    def step(self, times, seed, fresh):
        for n in range(times):
            for i, (a, b) in enumerate(zip(self.actual.params, self.twin.params, strict=True)):
                if fresh and a.requires_grad:
                    a.grad = random_like(a.shape, a.dtype, seed + 10 * n + i)
                    b.grad = a.grad.clone()
            self.step_both()

    def step_both(self):
        old = [param.detach().clone() for param in self.twin.params]
        if self.both(lambda side: side.optimizer.step()):
            self.counts["steps"] += 1
            self.counts["updates"] += sum(param.grad is not None for param in self.actual.params)
            self.compare(old)
        else:
            self.mend()

    def compare(self, old):
        assert clock(self.actual.optimizer) == clock(self.twin.optimizer)
        for a, b, before in zip(self.actual.params, self.twin.params, old, strict=True):
            m, n = self.actual.buffer(a), self.twin.buffer(b)
            assert type(m) is type(n)
            if isinstance(m, torch.Tensor):
                assert m.stride() == n.stride() and same(m, n), (m, n)
            a, b = a.detach(), b.detach()
            assert a.dtype == b.dtype
            scale = before.abs() + (b - before).abs()
            if b.dtype in (torch.float16, torch.bfloat16, torch.float32):
                scale = scale.float()
            unit = torch.finfo(b.dtype).eps * scale.clamp_min(torch.finfo(b.dtype).smallest_normal)
            close = (a - b).abs() <= TOLERANCE * unit
            agree = close | (a == b) | (a.isnan() & b.isnan())
            assert agree.all(), (a[~agree], b[~agree], before[~agree])
            b.copy_(a)

    def mend(self):
        """Gives the optimizers what they can step, so that a sequence does not end here."""
        for side in (self.actual, self.twin):
            for param in side.params:
                param.grad = None
                side.optimizer.state.pop(param, None)

    @rule(data=st.data())
    def change_a_value(self, data):
        self.counts["changes"] += 1
        i = data.draw(st.integers(0, len(self.actual.optimizer.param_groups) - 1))
        name = data.draw(st.sampled_from(self.names()))
        value = self.draw_value(data, name)
        for side in (self.actual, self.twin):
            side.optimizer.param_groups[i][name] = copy.deepcopy(value)

    @rule(name=st.sampled_from(sorted(BAD_VALUES)), last=st.booleans())
    def step_with_a_bad_value(self, name, last):
        for side in (self.actual, self.twin):
            group = side.optimizer.param_groups[-last]
            group["kept"], group[name] = group[name], BAD_VALUES[name]
        self.step_both()
        for side in (self.actual, self.twin):
            group = side.optimizer.param_groups[-last]
            group[name] = group.pop("kept")

    @rule(data=st.data())
    def add_a_group(self, data):
        if len(self.actual.optimizer.param_groups) < 4:
            group = self.draw_group(data)
            self.both(lambda side: side.optimizer.add_param_group(copy.deepcopy(group)))

    @rule(data=st.data(), shape=st.sampled_from(SHAPES), seed=st.integers(0, 99))
    def replace_data(self, data, shape, seed):
        i = self.draw_param(data)
        keeps = data.draw(st.booleans())
        for side in (self.actual, self.twin):
            param = side.params[i]
            param.data = random_like(param.shape if keeps else shape, param.dtype, seed)
            if not keeps:
                param.grad = None

    @rule(data=st.data(), size=st.integers(0, 9), seed=st.integers(0, 99))
    def resize(self, data, size, seed):
        i = self.draw_param(data)
        for side in (self.actual, self.twin):
            param = side.params[i]
            param.grad, requires_grad = None, param.requires_grad
            param.requires_grad_(False).resize_(size).copy_(random_like(size, param.dtype, seed))
            param.requires_grad_(requires_grad)

    @rule(data=st.data())
    def step_with_a_freed_storage(self, data):
        i = self.draw_param(data)
        if not self.actual.params[i].numel():
            return
        kept = self.actual.params[i].detach().clone()
        for side in (self.actual, self.twin):
            side.params[i].grad = kept.clone()
            side.params[i].untyped_storage().resize_(0)
        assert not self.both(lambda side: side.optimizer.step())
        for side in (self.actual, self.twin):
            side.params[i].data = kept.clone()
        self.mend()

    @rule(dtype=st.sampled_from(DTYPES), with_state=st.booleans())
    def cast_as_module_does(self, dtype, with_state):
        for side in (self.actual, self.twin):
            for param in side.params:
                grad, param.grad = param.grad, None
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # complex to real
                    param.data = param.data.to(dtype)
                    param.grad = None if grad is None else grad.to(dtype)

        def follow(side):
            side.optimizer.load_state_dict(side.optimizer.state_dict())

        if with_state and not self.both(follow):  # complex momentum fits no byte
            self.mend()

    @rule(data=st.data(), how=st.sampled_from(sorted(BUFFERS)))
    def replace_a_buffer(self, data, how):
        i = self.draw_param(data)
        for side in (self.actual, self.twin):
            buffer = side.buffer(side.params[i])
            if isinstance(buffer, torch.Tensor):
                changed = BUFFERS[how](buffer.clone())
                if changed is ...:
                    del side.optimizer.state[side.params[i]]
                else:
                    side.optimizer.state[side.params[i]]["momentum_buffer"] = changed

    @rule(data=st.data())
    def freeze_or_thaw(self, data):
        i = self.draw_param(data)
        for side in (self.actual, self.twin):
            side.params[i].requires_grad_(not side.params[i].requires_grad)
            side.params[i].grad = None

    @rule()
    def save(self):
        for side in (self.actual, self.twin):
            side.checkpoint = copy.deepcopy(side.optimizer.state_dict())

    def load(self, side, checkpoint):
        foreach = [group["foreach"] for group in side.optimizer.param_groups]
        side.optimizer.load_state_dict(checkpoint)
        for group, value in zip(side.optimizer.param_groups, foreach, strict=True):
            group["foreach"] = value

    @precondition(lambda self: self.actual.checkpoint)
    @rule(damage=st.sampled_from(["none", "no lr", "a group less", "no buffer", "no groups"]))
    def load_what_was_saved(self, damage):
        def load(side):
            checkpoint = copy.deepcopy(side.checkpoint)
            if damage == "no lr":
                del checkpoint["param_groups"][0]["lr"]
            elif damage == "a group less":
                checkpoint["param_groups"].pop()
            elif damage == "no buffer":
                for state in checkpoint["state"].values():
                    state.clear()
            elif damage == "no groups":
                del checkpoint["param_groups"]
            self.load(side, checkpoint)

        self.both(load)
        self.counts["loads"] += 1

    @rule(momentum=st.sampled_from([0.0, 0.5]), seed=st.integers(0, 99))
    def load_a_checkpoint_of_sgd(self, momentum, seed):
        def load(side):
            groups = [{"params": g["params"]} for g in copy.deepcopy(side.optimizer.param_groups)]
            sgd = torch.optim.SGD(groups, lr=0.1, momentum=momentum)
            for param in parameters_of(groups):
                param.grad = random_like(param.shape, param.dtype, seed)
            sgd.step()
            with warnings.catch_warnings():  # which tell what is kept and taken
                warnings.simplefilter("ignore")
                self.load(side, sgd.state_dict())

        self.both(load)
        self.counts["loads"] += 1

    # No cosine that drives itself: where a group's p has none, it says so after the step is made.
    @rule(how=st.sampled_from(["cosine", "function", "every step"]), total=st.integers(1, 9))
    def schedule(self, how, total):
        def make(side):
            if how == "cosine":
                side.schedule = lpsgd.CosineAnnealingP(side.optimizer, total)
            else:
                side.schedule = lpsgd.LambdaP(
                    side.optimizer, lambda k: 2.0 + k % total, every_step=how == "every step"
                )

        self.both(make)

    @precondition(lambda self: self.actual.schedule)
    @rule()
    def step_the_schedule(self):
        self.both(lambda side: side.schedule.step())
        pairs = zip(
            self.actual.optimizer.param_groups, self.twin.optimizer.param_groups, strict=True
        )
        assert all(a["p"] == b["p"] for a, b in pairs)

    @rule(by_pickle=st.booleans())
    def copy_the_optimizer(self, by_pickle):
        for side in (self.actual, self.twin):
            side.schedule = None  # belongs to the old one
            side.optimizer._optimizer_step_post_hooks.clear()  # functions cannot be pickled
            old = side.optimizer
            grads = [param.grad for param in side.params]
            side.optimizer = pickle.loads(pickle.dumps(old)) if by_pickle else copy.deepcopy(old)
            for param, grad in zip(side.params, grads, strict=True):
                param.grad = None if grad is None else grad.clone()


def parameters_of(groups):
    return [param for group in groups for param in group["params"]]


@pytest.mark.parametrize("examples", [80, pytest.param(400, marks=pytest.mark.full)])
@pytest.mark.parametrize("cls", [lpsgd.LPSGD, lpsgd.LPSGDM])
def test_a_life_is_the_same_in_c_and_in_pytorchs_operations(cls, examples):
    counts = collections.Counter()
    machine = type(cls.__name__ + "Machine", (OptimizerMachine,), {"cls": cls, "counts": counts})
    usual = settings(
        max_examples=examples,
        stateful_step_count=30,
        deadline=None,
        database=None,
        derandomize=SECONDS is None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )
    until = time.monotonic() + (SECONDS or 0) / 2
    seed = int(time.time())
    while SECONDS is None or time.monotonic() < until:
        if SECONDS is not None:
            seed += 1
            hypothesis.seed(seed)(machine)
        run_state_machine_as_test(machine, settings=usual)
        if SECONDS is None:
            break
    report(f"{cls.__name__}: " + ", ".join(f"{n} {what}" for what, n in counts.items()))
