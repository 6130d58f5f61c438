# SPDX-License-Identifier: MIT
"""Damages checkpoints and loads them. Each mutation is a function of its number. From tests:

    python -m fuzz.mutate_checkpoints [--count COUNT | --seconds SECONDS] [--first FIRST]

does many and prints how many there were, and what came of them. Loading, and the step after it,
must work or raise an exception that a user can read; what raised must have changed nothing. Run as
a process of its own, so that a crash of the interpreter is seen; the file of --progress then
holds the number of the mutation that it died of.
"""

import argparse
import collections
import copy
import faulthandler
import io
import itertools
import math
import pickle
import random
import sys
import time
import warnings
import zipfile

import torch
from torch.nn import Parameter

import lpsgd
from helpers import bits

# Errors that say nothing of the checkpoint, beside PyTorch's own assertions.
UNCLEAR = (SystemError, NameError)

SCALARS = [None, True, -1, 0, 2**63, -(2**70), 1e308, 1e-320, math.nan, math.inf, -math.inf, 1j]
SCALARS += [
    "",
    "float32",
    "float8_e5m2",
    "momentum_buffer",
    b"\x00",
    (),
    [],
    {},
    [1, 2],
    {"momentum_buffer": 1},
]
SCALARS += [torch.float32, torch.float16, torch.int8]
NAMES = ["momentum_buffer", "lr", "p", "params", "state", "param_groups", "step", "optimizer", 0, 7]
NAMES += ["momentum_dtype", "momentum_exponent"]


def shrunk(tensor):
    tensor = tensor.clone()
    tensor.untyped_storage().resize_(1)
    return tensor


TENSORS = [
    lambda t: t.reshape(-1),
    lambda t: t[..., :-1] if t.dim() else t,
    lambda t: t.reshape(-1)[:1].reshape(()),
    lambda t: t.new_empty(0),
    lambda t: t.t().contiguous().t() if t.dim() == 2 else t[::2],
    lambda t: t.new_zeros(1).expand(t.shape),
    lambda t: t.to(torch.float64),
    lambda t: t.to(torch.bfloat16),
    lambda t: t.to(torch.int32),
    lambda t: t.to(torch.bool),
    lambda t: t.to(torch.complex64),
    lambda t: t.to(torch.complex64).conj(),
    lambda t: t.to_sparse(),
    lambda t: t.to("meta"),
    lambda t: t * math.nan,
    lambda t: torch._neg_view(t),
    lambda t: t.clone().requires_grad_(),
    lambda t: Parameter(t),
    lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8),
    lambda t: t.to(torch.float8_e4m3fn),
    lambda t: t.to(torch.float8_e5m2),
    shrunk,
]


def paths(value, path=()):
    """The places in nested dicts and lists that something else can be put in."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
        yield (*path, key)
        if isinstance(inner, dict | list):
            yield from paths(inner, (*path, key))


def mutate(checkpoint, chance):
    """Damages nested dicts and lists at a place or a few."""
    for _ in range(chance.choice([1, 1, 1, 2, 5])):
        *path, key = chance.choice(list(paths(checkpoint)) or [(None,)])
        holder = checkpoint
        for name in path:
            holder = holder[name]
        if key is None:
            return
        old = holder[key]
        what = chance.randrange(10)
        if what == 0:
            del holder[key]
        elif what == 1 and isinstance(holder, dict):
            holder[chance.choice(NAMES)] = old
        elif what == 2 and isinstance(holder, dict):
            holder[chance.choice(NAMES)] = holder.pop(key)
        elif what == 3 and isinstance(holder, list):
            holder.insert(chance.randrange(3), old)
        elif isinstance(old, torch.Tensor) and what < 9:
            try:
                holder[key] = chance.choice(TENSORS)(old)
            except (RuntimeError, IndexError, NotImplementedError):  # damaged twice
                holder[key] = None
        elif isinstance(old, float) and what < 7:
            holder[key] = old * chance.choice([-1.0, 0.0, 1e300, 1e-300, 7.5])
        else:
            holder[key] = copy.deepcopy(chance.choice(SCALARS))


def mutate_bytes(data, chance):
    data = bytearray(data)
    for _ in range(chance.choice([1, 2, 8])):
        at = chance.randrange(len(data))
        what = chance.randrange(4)
        if what == 0:
            data[at] ^= 1 << chance.randrange(8)
        elif what == 1:
            data[at] = chance.randrange(256)
        elif what == 2:
            del data[at : at + chance.randrange(1, 9)]
        else:
            data[at:at] = chance.randbytes(chance.randrange(1, 9))
        if not data:
            break
    return bytes(data)


def saved(checkpoint, old_format):
    file = io.BytesIO()
    torch.save(checkpoint, file, _use_new_zipfile_serialization=not old_format)
    return file.getvalue()


def loaded(data):
    return torch.load(io.BytesIO(data), weights_only=True)


def mutate_record(data, chance):
    """Damages one record inside a saved file, whose checksums are right again."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(file, "w") as new:
        names = old.namelist()
        # Most of the time the pickle, which says how the rest is to be read.
        victim = next(n for n in names if n.endswith("data.pkl"))
        victim = chance.choice([victim, victim, victim, *names])
        for name in names:
            record = old.read(name)
            damaged = name == victim and record
            new.writestr(name, mutate_bytes(record, chance) if damaged else record)
    return file.getvalue()


def make(chance):
    """An optimizer that has made a step, maybe with a schedule, and with two groups."""
    cls = chance.choice([lpsgd.LPSGD, lpsgd.LPSGDM])
    dtype = chance.choice([torch.float32, torch.bfloat16, torch.float64])
    params = [Parameter(torch.randn(shape).to(dtype)) for shape in [(3, 4), (5,), ()]]
    more = {"stochastic_rounding": True} if chance.randrange(3) == 0 else {}
    if cls is lpsgd.LPSGDM and chance.randrange(2):
        more["momentum_dtype"] = chance.choice([torch.float32, torch.bfloat16, torch.float8_e5m2])
    optimizer = cls([{"params": params[:2]}, {"params": params[2:], "lr": 0.1, "p": 3.0}], **more)
    schedules = [
        lambda: lpsgd.CosineAnnealingP(optimizer, 9),
        lambda: lpsgd.LambdaP(optimizer, lambda step: 2.0 + step),
        lambda: lpsgd.CosineAnnealingP(optimizer, 9, every_step=True),
    ]
    schedule = chance.choice(schedules)()
    set_grads(optimizer)
    optimizer.step()
    return optimizer, schedule


def checkpoint_of_sgd(optimizer):
    """What torch.optim.SGD saves that has made a step with the same parameters."""
    groups = [{"params": group["params"]} for group in copy.deepcopy(optimizer.param_groups)]
    sgd = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    set_grads(sgd)
    sgd.step()
    return sgd.state_dict()


def set_grads(optimizer):
    for group in optimizer.param_groups:
        for param in group["params"]:
            if isinstance(param, torch.Tensor):
                param.grad = torch.full_like(param, 0.5)


def frozen(value, holders=()):
    """What a value is, to be compared later; a tensor's bits where they can be read. `holders` are
    the dicts and lists that it lies in, which a damaged file may put into themselves."""
    if id(value) in holders:
        return "holds itself"
    if isinstance(value, torch.Tensor):
        readable = (
            value.layout == torch.strided
            and value.device.type == "cpu"
            and not value.is_quantized
            and not value.is_neg()
            and value.dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float8_e5m2)
            and value.untyped_storage().nbytes() >= value.nbytes
        )
        return id(value), value._version, bits(value).tolist() if readable else None
    holders = (*holders, id(value))
    if isinstance(value, dict):
        return [(frozen(k, holders), frozen(v, holders)) for k, v in value.items()]
    if isinstance(value, list | tuple):
        return [frozen(v, holders) for v in value]
    return repr(value)


def everything(optimizer, schedule):
    return frozen([vars(optimizer)["param_groups"], dict(optimizer.state), schedule.state_dict()])


def attempt(action, optimizer, schedule, what):
    """Whether the action works. If not, it must have said why and changed nothing."""
    before = everything(optimizer, schedule)
    try:
        action()
    except Exception as error:
        if isinstance(error, UNCLEAR) or "INTERNAL ASSERT" in str(error):
            raise
        after = everything(optimizer, schedule)
        if before != after:
            raise AssertionError(f"{what} raised and changed something") from error
        return False
    return True


def one(number):
    """Makes the mutation of this number; returns how and what came of it."""
    chance = random.Random(number)
    torch.manual_seed(number)
    optimizer, schedule = make(chance)
    checkpoint = {"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
    if chance.randrange(4) == 0:
        checkpoint["optimizer"] = checkpoint_of_sgd(optimizer)
    checkpoint = copy.deepcopy(checkpoint)
    how = chance.choice(
        ["values", "values", "values", "pickled object", "file", "record", "old file"]
    )
    if how == "pickled object":
        state = copy.deepcopy(optimizer.__getstate__())
        mutate(state, chance)
        try:
            optimizer = pickle.loads(pickle.dumps(_Remade(type(optimizer), state)))
            list(optimizer.param_groups), dict(optimizer.state)
        except UNCLEAR:
            raise
        except Exception:
            return how, "not loaded"
    else:
        try:
            if how == "values":
                mutate(checkpoint, chance)
                checkpoint = loaded(saved(checkpoint, False)) if chance.randrange(2) else checkpoint
            else:
                data = saved(checkpoint, how == "old file")
                damage = mutate_record if how == "record" else mutate_bytes
                checkpoint = loaded(damage(data, chance))
            parts = checkpoint["optimizer"], checkpoint["schedule"]
        except Exception:
            return how, "refused by torch.load"
        optimizer_loaded = attempt(
            lambda: optimizer.load_state_dict(parts[0]), optimizer, schedule, "load_state_dict"
        )
        schedule_loaded = attempt(
            lambda: schedule.load_state_dict(parts[1]),
            optimizer,
            schedule,
            "the schedule's load_state_dict",
        )
        if not (optimizer_loaded or schedule_loaded):
            return how, "not loaded"
    try:
        set_grads(optimizer)
    except Exception:
        return how, "no parameters to step"
    # A schedule that drives itself acts after the step, and is tried apart from it.
    optimizer._optimizer_step_post_hooks.clear()
    stepped = attempt(optimizer.step, optimizer, schedule, "step")
    if stepped and isinstance(optimizer, lpsgd.LPSGDM):
        for param in itertools.chain(*(group["params"] for group in optimizer.param_groups)):
            buffer = optimizer.state[param]["momentum_buffer"]
            assert buffer.shape == param.shape, "a step took a momentum_buffer of another shape"
    if not schedule.every_step:
        stepped &= attempt(schedule.step, optimizer, schedule, "the schedule's step")
    return how, "stepped" if stepped else "refused by step"


class _Remade:
    """Pickles as an object of a class and a state."""

    def __init__(self, cls, state):
        self.parts = cls.__new__, (cls,), state

    def __reduce__(self):
        return self.parts


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=1)
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--progress")
    arguments = parser.parse_args()
    faulthandler.enable()
    warnings.simplefilter("ignore")
    results = collections.Counter()
    until = time.monotonic() + (arguments.seconds or math.inf)
    for number in itertools.count(arguments.first):
        if arguments.seconds is None and number == arguments.first + arguments.count:
            break
        if time.monotonic() > until:
            break
        if arguments.progress:
            with open(arguments.progress, "w") as file:
                file.write(str(number))
        try:
            results[one(number)] += 1
        except BaseException:
            print(f"mutation {number}", file=sys.stderr)
            raise
    print(results.total(), "mutations")
    for (how, outcome), times in sorted(results.items()):
        print(f"  {how}: {outcome}: {times}")


if __name__ == "__main__":
    main()
