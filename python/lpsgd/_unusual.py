# SPDX-License-Identifier: MIT
"""The way of an unusual step, from top to bottom: gather, try C, rows, routes, calls, checks."""

import functools
import operator
import sys
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, _get_capturable_supported_devices

from . import _eager, _shards
from ._native import BY_CHOICE, FALLBACK, lpsgd_ext
from ._values import (
    by_default,
    check_ranges,
    check_values,
    is_on_cuda,
    momentum_dtype_in,
    momentum_dtype_of,
    momentum_exponent_in,
    rounds_at_random,
)

if TYPE_CHECKING:
    from ._base import LPOptimizer

Lists = list[list[Tensor]]  # parameters, gradients and, for LPSGDM, momentum buffers
States = deque[tuple[Tensor, dict[str, Any]]]
Fresh = dict[Tensor, Tensor]  # the buffers that a step makes, by their parameters
Call = Callable[[], None]
UsualStep = Callable[[], bool]  # a step by one call of C, which answers whether it has made it

Span = tuple[int, int]  # the address of a tensor's first byte and that behind its last one

PLAIN_TYPES = (Tensor, torch.nn.Parameter)

_NATIVE_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_STATE_FOLLOWS = (
    "; optimizer.load_state_dict(optimizer.state_dict()) lets the state follow a model that has "
    "changed its dtype or device"
)
_STATE_STARTS_ANEW = "; optimizer.state.pop(param) lets a parameter of a new shape start anew"
_NO_SPARSE = "LPSGD and LPSGDM do not support sparse tensors"
# The second is its name in older PyTorch.
_check_graph_capture: Callable[[Optimizer], None] = (
    getattr(Optimizer, "_accelerator_graph_capture_health_check", None)
    or Optimizer._cuda_graph_capture_health_check
)


class Gathered(NamedTuple):
    """What a step takes of a group; `streams` as for lpsgd_ext.lpsgd_."""

    group: dict[str, Any]
    lists: Lists
    streams: list[int]
    part: "Part | None" = None  # what the step of a whole group has not


class Row(NamedTuple):
    """One parameter, or a piece of it, in a step; `stream` and `offset` as for lpsgd_ext.lpsgd_."""

    tensors: tuple[Tensor, ...]  # the parameter, its gradient and what the state holds
    stream: int
    offset: int = 0
    shares: bool = False  # see sharing(): torch.optim steps such rows one after the other


class Part(NamedTuple):
    """What distinguishes the part that one parameter, or its gradient of one micro-batch, has in a
    step; as for lpsgd_ext.step_param."""

    number: int
    accumulate: int
    taken: int
    momentum_only: bool

    def values(self) -> dict[str, Any]:
        """What lpsgd_ext.lpsgdm_ takes."""
        return {
            "accumulate": self.accumulate,
            "continues": self.taken > 0,
            "momentum_only": self.momentum_only,
        }


def unusual_step(optimizer: "LPOptimizer") -> None:
    """Makes a step that is not one call of C, or raises and has changed nothing."""
    check_capture(optimizer)
    if has_found_inf(optimizer):
        return
    with torch.set_grad_enabled(optimizer.defaults["differentiable"]):
        gathered, fresh = _gather(optimizer)
        _make(optimizer, gathered, fresh, optimizer._usual_step)


def unusual_part(
    optimizer: "LPOptimizer", group: dict[str, Any], param: Tensor, part: Part, usual: UsualStep
) -> None:
    """The same for one parameter, which has a gradient. `usual` tries it once more in C."""
    check_capture(optimizer)
    fresh: Fresh = {}
    lists = optimizer._gather({**group, "params": [param]}, deque(), fresh)
    with torch.no_grad():
        _make(optimizer, [Gathered(group, lists, [part.number], part)], fresh, usual)


def _make(
    optimizer: "LPOptimizer", gathered: list[Gathered], fresh: Fresh, usual: UsualStep
) -> None:
    """Makes what has been gathered, with the states that it lacks."""
    if fresh:
        _check_may_make_state()
    state = optimizer.state
    stateless = [param for param in fresh if param not in state]
    empty = [param for param in fresh if "momentum_buffer" in state.get(param, ())]
    try:
        for param, buffer in fresh.items():
            state[param]["momentum_buffer"] = buffer
        if fresh and usual():  # all that was unusual may have been the states
            return
        calls = prepare(optimizer, gathered)
    except BaseException:
        for param in fresh:
            state.get(param, {}).pop("momentum_buffer", None)
        for param in stateless:
            state.pop(param, None)
        for param in empty:
            state[param]["momentum_buffer"] = None
        raise
    for call in calls:
        call()


def check_capture(optimizer: Optimizer) -> None:
    """Raises torch.optim's error where a step that is not capturable is being captured in a graph:
    its replays would keep this step's lr and p."""
    if torch.cuda.is_initialized() or torch.xpu.is_initialized():  # otherwise nothing is
        _check_graph_capture(optimizer)


def _check_may_make_state() -> None:
    for module in (torch.cuda, torch.xpu):
        is_capturing = getattr(module, "is_current_stream_capturing", None)  # older ones lack XPU's
        if module.is_initialized() and is_capturing and is_capturing():
            raise RuntimeError(
                "momentum buffers cannot be made while a graph is captured, as every replay would "
                "set them to zero: make a step before the capture"
            )


def has_found_inf(optimizer: Optimizer) -> bool:
    """Whether torch.amp.GradScaler found a gradient that is not finite, if the CPU knows."""
    value = getattr(optimizer, "found_inf", None)
    return value is not None and not is_on_cuda(value) and bool(value != 0)


def _gather(optimizer: "LPOptimizer") -> tuple[list[Gathered], Fresh]:
    """The groups that have gradients, and the buffers that their states lack."""
    known: States = deque(optimizer.state.items())
    fresh: Fresh = {}
    gathered = []
    first = 0
    for group in optimizer.param_groups:
        lists = optimizer._gather(group, known, fresh)
        streams: list[int] = []
        if rounds_at_random(group):
            numbered = enumerate(group["params"], first)
            streams = [i for i, param in numbered if param.grad is not None]
        first += len(group["params"])
        if lists[0]:
            gathered.append(Gathered(group, lists, streams))
    return gathered, fresh


def prepare(optimizer: "LPOptimizer", gathered: Sequence[Gathered]) -> list[Call]:
    """Checks everything there is to check; returns the calls that are left to make."""
    alone = len(gathered) == 1
    return [call for one in gathered for call in _calls(optimizer, one, alone)]


def _calls(optimizer: "LPOptimizer", gathered: Gathered, alone: bool) -> list[Call]:
    """The calls that make a group's step, all of whose tensors are checked here. `alone`: there is
    no other group; then the step may have been made already."""
    group, lists, streams, part = gathered
    values = _step_values(optimizer, group, part)
    rounding, count = _rounding(optimizer, group, part)
    in_c = not group["differentiable"] and (
        group["fused"] or (by_default(group) and not observed())
    )
    if group["capturable"] and not group["fused"]:
        _check_capturable(lists[0])
    whole = None
    if in_c and not any(map(is_on_cuda, values.values())):
        # Nearly always C takes the whole list. By rows, which are looked at in Python, a step of
        # small tensors takes 5 to 9 times as long; checked first, where it can be made at once,
        # twice as long.
        streamed = {**rounding, "streams": streams} if rounding else {}
        whole = partial(optimizer._native_step, lists, **values, **streamed)
        at_once = alone and not count
        try:
            whole(dry_run=not at_once)
            return [] if at_once else [whole, *count]
        except lpsgd_ext.CudaError:
            raise
        except (TypeError, ValueError, RuntimeError):
            pass  # nothing has been written, and what C refuses goes by rows
    check_values(group)
    rows = [
        piece
        for i, tensors in enumerate(zip(*lists, strict=True))
        for piece in _localize(Row(tensors, streams[i] if rounding else i), bool(rounding))
    ]
    for row in rows:
        _check_buffers(row.tensors, values.get("momentum_dtype"))
    spans = [tuple(map(span, row.tensors)) for row in rows]
    for i in sharing(spans):
        rows[i] = rows[i]._replace(shares=True)
    native_rows, others = list[Row](), list[Row]()
    for row, places in zip(rows, spans, strict=True):
        (native_rows if in_c and _is_native(row, places) else others).append(row)
    if group["fused"] and others:
        _refuse_fused(group, others, whole)
    if in_c:
        _warn_of_fallback(others)
    calls = _native_calls(optimizer, native_rows, values, rounding)
    calls += _fallback_calls(group, others, values, rounding)
    written = [tensor for column in lists[::2] for tensor in column]
    if any(_shards.is_dtensor(tensor) for tensor in written):
        calls.append(partial(torch.autograd.graph.increment_version, written))
    return calls + count


# Values.


def _step_values(
    optimizer: "LPOptimizer", group: dict[str, Any], part: Part | None
) -> dict[str, Any]:
    """What a group's step takes beside tensors and what stochastic rounding needs."""
    values = {name: group[name] for name in optimizer._HYPER}
    grad_scale = getattr(optimizer, "grad_scale", None)
    if grad_scale is not None:
        values["grad_scale"] = grad_scale
    found_inf = getattr(optimizer, "found_inf", None)
    if is_on_cuda(found_inf):
        values["found_inf"] = found_inf
    momentum_dtype = momentum_dtype_in(group)
    if momentum_dtype is not None:
        values["momentum_dtype"] = momentum_dtype
    if part is not None and "momentum" in values:
        values |= part.values()
    return values


def _rounding(
    optimizer: Optimizer, group: dict[str, Any], part: Part | None
) -> tuple[dict[str, int], list[Call]]:
    """What rounding at random needs, and the call that counts the step once it is made, if it is a
    whole one."""
    if not rounds_at_random(group):
        return {}, []
    check_values(group)  # now, as rounding_step is counted on here
    step = group.get("rounding_step", 0)
    numbers = {"seed": group["seed"], "step": step + (part.taken if part else 0)}
    if momentum_dtype_in(group) is _eager.BYTE:
        numbers["momentum_exponent"] = momentum_exponent_in(group)
        numbers["stochastic_rounding"] = bool(group["stochastic_rounding"])
    if part is not None:
        return numbers, []
    following = step + (not changes_nothing(optimizer))
    return numbers, [partial(operator.setitem, group, "rounding_step", following)]


def changes_nothing(optimizer: Optimizer) -> bool:
    """Whether lr and the gradients are all 0: torch.distributed.checkpoint takes such a step where
    it finds an optimizer without state. It is none of the steps that are counted."""
    parts, groups = getattr(optimizer, "_parts", None), optimizer.param_groups
    if parts is not None and parts.moved:  # their gradients are gone
        return False
    if any(is_on_cuda(group["lr"]) or group["lr"] != 0.0 for group in groups):
        return False
    grads = [param.grad for group in groups for param in group["params"]]
    return not any(grad is not None and _shards.has_nonzero(grad) for grad in grads)


# Rows.


def _localize(row: Row, in_pieces: bool) -> list[Row]:
    """A DTensor's row as one of its local shard, or as one for each run of elements that are
    neighbours in the whole parameter; any other row as it is."""
    param = row.tensors[0]
    if not _shards.is_dtensor(param):
        return [row]
    tensors = _shards.local_tensors(row.tensors)
    if not in_pieces or not all(tensor.numel() and tensor.is_contiguous() for tensor in tensors):
        return [row._replace(tensors=tensors)]
    length, starts = _shards.runs(param)
    pieces = zip(*(torch.split(tensor.view(-1), length) for tensor in tensors), strict=True)
    return [Row(piece, row.stream, start) for piece, start in zip(pieces, starts, strict=True)]


def span(tensor: Any) -> Span | None:
    """Where a tensor has its elements, if that is known."""
    if (
        type(tensor) not in PLAIN_TYPES
        or tensor.layout != torch.strided
        or torch._C._functorch.is_functorch_wrapped_tensor(tensor)
        or not tensor.numel()
    ):
        return None
    low = tensor.data_ptr()  # 0: on no device, or freed
    contiguous = tensor.is_contiguous()
    size = tensor.nbytes if contiguous else _extent(tensor) * tensor.element_size()
    return (low, low + size) if low else None


def sharing(rows: Iterable[Sequence[Span | None]]) -> set[int]:
    """The indices of the rows that share memory to which a step writes, with each other or within
    themselves."""
    spans = sorted(
        (*place, j != 1, i)
        for i, places in enumerate(rows)
        for j, place in enumerate(places)
        if place
    )
    found: set[int] = set()
    end, together = 0, list[tuple[bool, int]]()
    for low, high, is_written, i in [*spans, (sys.maxsize, sys.maxsize, False, -1)]:
        if low >= end:  # no span before reaches this one
            if len(together) > 1 and any(written for written, _ in together):
                found.update(i for _, i in together)
            together = []
        together.append((is_written, i))
        end = max(end, high)
    return found


def _extent(tensor: Tensor) -> int:
    """The number of elements between the first one and the end of the last one."""
    return 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))


def _columns(rows: Sequence[Row]) -> Lists:
    return [list(column) for column in zip(*(row.tensors for row in rows), strict=True)]


def _numbers_of(rows: Sequence[Row]) -> dict[str, Any]:
    return {"streams": [row.stream for row in rows], "offsets": [row.offset for row in rows]}


def _by_device(rows: Iterable[Row]) -> list[tuple[torch.device, list[Row]]]:
    on: dict[torch.device, list[Row]] = {}
    for row in rows:
        on.setdefault(row.tensors[0].device, []).append(row)
    return list(on.items())


# Routes.


def observed() -> bool:
    """Whether something other than a device context watches PyTorch's operations."""
    if (
        torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack()
        or torch.autograd.forward_ad._current_level >= 0
    ):
        return True
    return any(
        not isinstance(torch._C._get_function_stack_at(i), torch.utils._device.DeviceContext)
        for i in range(torch._C._len_torch_function_stack())
    )


def _is_native(row: Row, places: Sequence[Span | None]) -> bool:
    """Whether the C kernels are meant for this parameter and what goes with it."""
    param, grad, *_ = row.tensors
    device = param.device
    return (
        device.type in ("cpu", "cuda")
        and not row.shares
        and _refusal(device) is None
        and grad.dtype == param.dtype in _NATIVE_DTYPES
        and all(_has_native_memory(param, tensor) for tensor in row.tensors)
        # PyTorch's operations could not step it on a GPU either: there C refuses it.
        and (param.is_cuda or all(map(is_aligned, row.tensors, places)))
        and _is_dense(param)
    )


def _refusal(device: torch.device) -> str | None:
    """Why the C kernels don't run on this device, if it is one that they are for."""
    if FALLBACK and device.type in ("cpu", "cuda"):
        return FALLBACK
    if device.type != "cuda":
        return None
    if torch.version.hip:
        return "this PyTorch is built for ROCm"
    return lpsgd_ext.cuda_refusal(device.index)


def _has_native_memory(param: Tensor, other: Tensor) -> bool:
    """Whether `other`'s elements lie in memory as `param`'s do, as the C kernels need it."""
    return (
        type(other) in PLAIN_TYPES
        and other.layout == torch.strided
        and not other.is_neg()
        and other.stride() == param.stride()
    )


def is_aligned(tensor: Tensor, place: Span | None) -> bool:
    """Whether it begins at a multiple of its element size, where that is known."""
    return place is None or place[0] % tensor.element_size() == 0


def _is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one stretch of memory in some order of the dimensions."""
    extent = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride != extent:
            return tensor.numel() == 0
        extent *= size
    return True


def _warn_of_fallback(rows: Iterable[Row]) -> None:
    """Says once, or once for a device, that the C kernels cannot be used there, and why."""
    for device, _ in _by_device(rows):
        refusal = _refusal(device)
        if refusal and not BY_CHOICE:
            where = "" if FALLBACK else f" on {device}"
            _warn_once(f"PyTorch's operations step{where}: {refusal}")


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=2)


# Calls.


def _native_calls(
    optimizer: "LPOptimizer", rows: list[Row], values: dict[str, Any], rounding: dict[str, int]
) -> list[Call]:
    """The step in C, one call for each device; checks the rows."""
    calls: list[Call] = []
    for device, same in _by_device(rows):
        numbers = {**_for_device(values, device), **rounding, **_numbers_of(same)}
        native = partial(optimizer._native_step, _columns(same), **numbers)
        native(dry_run=True)
        calls.append(native)
    return calls


def _for_device(values: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Values as the C kernels on a device take them. Those that are on a GPU stay on one: nothing
    waits for it."""
    on_cuda = [name for name, value in values.items() if is_on_cuda(value)]
    moved = {name: values[name].to(device, non_blocking=device.type == "cuda") for name in on_cuda}
    if on_cuda and device.type == "cuda":
        size = lpsgd_ext.cuda_scratch_size()
        moved["scratch"] = torch.empty(size, dtype=torch.uint8, device=device)
    return {**values, **moved}


def _fallback_calls(
    group: dict[str, Any], rows: list[Row], values: dict[str, Any], rounding: dict[str, int]
) -> list[Call]:
    """A group's step in PyTorch's operations."""
    found_inf = values.get("found_inf")
    if not rows or (found_inf is not None and found_inf != 0):
        return []
    values = {name: value for name, value in values.items() if name != "found_inf"}
    transformed = torch._C._functorch.peek_interpreter_stack() is not None
    use_foreach = group["foreach"] or (
        by_default(group) and not group["differentiable"] and not transformed
    )
    return _eager_calls(rows, use_foreach, _for_eager(group, values), rounding)


def _for_eager(group: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """Values of a group as _eager takes them: numbers, except where tensors have to stay. Checks
    them."""
    keep = ("lr", "weight_decay") if group["differentiable"] or group["capturable"] else ()
    numbers = {
        name: value.item() if isinstance(value, Tensor) and name not in keep else value
        for name, value in values.items()
    }
    check_ranges(numbers)
    return numbers


def _eager_calls(
    rows: Iterable[Row], use_foreach: bool, values: dict[str, Any], rounding: dict[str, int]
) -> list[Call]:
    """The step in PyTorch's operations; checks the rows."""
    values = {name: value for name, value in values.items() if name != "momentum_dtype"}
    at_random = (torch.bfloat16, _eager.BYTE) if rounding else ()

    def can_foreach(row: Row) -> bool:
        param, _, *buffers = row.tensors
        return (
            use_foreach
            and not row.shares
            and all(type(t) in PLAIN_TYPES and not t.is_neg() for t in row.tensors)
            and not param.is_complex()
            and all(tensor.dtype not in at_random for tensor in (param, *buffers))
        )

    def key(row: Row) -> tuple[str, ...]:  # one by one they keep their order
        param = row.tensors[0]
        return (str(param.device), str(param.dtype)) if can_foreach(row) else ()

    rows = sorted(rows, key=key)
    for row in rows:
        _check_eager(row.tensors)
        if row.shares:
            _check_eager_overlaps(row.tensors)
    calls: list[Call] = []
    for in_foreach, group in groupby(rows, key=key):
        same = list(group)
        params, grads, *buffers = _columns(same)
        momentum_buffers = buffers[0] if buffers else None
        if in_foreach:
            calls.append(partial(_eager.foreach, params, grads, momentum_buffers, **values))
        else:
            numbers = {**values, **rounding, **_numbers_of(same)}
            calls.append(partial(_eager.for_loop, params, grads, momentum_buffers, **numbers))
    return calls


# Checks.


def _check_capturable(params: Sequence[Tensor]) -> None:
    devices = _get_capturable_supported_devices(supports_xla=False)
    if any(param.device.type not in devices for param in params):
        raise AssertionError(f"If capturable=True, params must be on supported devices: {devices}.")


def _refuse_fused(
    group: dict[str, Any], rows: Sequence[Row], whole: Callable[..., None] | None
) -> NoReturn:
    """Raises what is wrong with rows that C cannot step although `fused=True`: in torch.optim's
    words, or else in those of C, which has refused `whole`, the step of the whole list."""
    supported = ["cpu", "cuda"] if lpsgd_ext.build_info()["cuda"] else ["cpu"]
    why = ""
    if FALLBACK:
        supported, why = [], f": {FALLBACK}"
    if any(row.tensors[1].layout != torch.strided for row in rows):
        raise RuntimeError(_NO_SPARSE)
    for row in rows:
        param = row.tensors[0]
        if param.device.type not in supported or param.dtype not in _NATIVE_DTYPES:
            raise RuntimeError(
                "`fused=True` requires all the params to be floating point Tensors of "
                f"supported devices: {supported} but {param.dtype} and {param.device.type}"
                f"{why}"
            )
        refusal = _refusal(param.device)
        if refusal:
            raise RuntimeError(f"`fused=True` cannot be used on {param.device}: {refusal}")
    if any(row.shares for row in rows):
        _refuse_listed_twice(group)
    if whole:
        whole(dry_run=True)
    raise RuntimeError("`fused=True` needs tensors that C can step")


def _refuse_listed_twice(group: dict[str, Any]) -> None:
    places = group.get("param_names") or [f"params[{i}]" for i in range(len(group["params"]))]
    first: dict[int, str] = {}
    for place, param in zip(places, group["params"], strict=True):
        if first.setdefault(id(param), place) != place:
            raise ValueError(
                "`fused=True` cannot step a parameter that is listed twice in its group: "
                f"{first[id(param)]} and {place} are one"
            )


def _check_buffers(tensors: tuple[Tensor, ...], momentum_dtype: torch.dtype | None) -> None:
    """That a momentum_buffer fits its parameter, whatever steps them."""
    param, _, *buffers = tensors
    for buffer in buffers:
        if type(buffer) not in (*PLAIN_TYPES, type(param)):
            raise TypeError(
                f"momentum_buffer must be a Tensor as its parameter is, not {type(buffer).__name__}"
            )
        _check_shape_and_device("momentum_buffer", param, buffer)
        expected = momentum_dtype_of(param, momentum_dtype)
        if buffer.dtype != expected:
            raise RuntimeError(
                f"momentum_buffer must be {expected}, but is {buffer.dtype}{_STATE_FOLLOWS}"
            )


def _check_shape_and_device(name: str, param: Tensor, other: Tensor) -> None:
    is_state = name == "momentum_buffer"
    if other.shape != param.shape:
        raise RuntimeError(
            f"{name} must have the parameter's shape, {tuple(param.shape)}, but has "
            f"{tuple(other.shape)}{_STATE_STARTS_ANEW if is_state else ''}"
        )
    if other.device != param.device:
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, "
            f"{param.device} and {other.device}!{_STATE_FOLLOWS if is_state else ''}"
        )


def _check_eager(tensors: tuple[Tensor, ...]) -> None:
    """What PyTorch's own operations would not refuse, or only after some have been made."""
    param, grad, *buffers = tensors
    if any(tensor.layout != torch.strided for tensor in tensors):
        raise RuntimeError(_NO_SPARSE)
    _check_shape_and_device("gradient", param, grad)
    if param.dtype not in _NATIVE_DTYPES and not param.is_complex():
        raise RuntimeError(f"LPSGD and LPSGDM cannot step parameters of {param.dtype}")
    if grad.is_complex() != param.is_complex():
        raise RuntimeError(f"a gradient of {grad.dtype} does not fit a parameter of {param.dtype}")
    transformed = torch._C._functorch.peek_interpreter_stack() is not None  # no memory to look at
    for tensor in (param, *buffers):
        _check_eager_written(tensor, transformed)
    if not transformed and any(
        type(tensor) in PLAIN_TYPES and is_out_of_bounds(tensor) for tensor in tensors
    ):
        raise RuntimeError("a tensor reaches beyond its storage, which has been resized since")


def _check_eager_written(tensor: Tensor, transformed: bool) -> None:
    if tensor.is_inference() and not torch.is_inference_mode_enabled():
        raise RuntimeError(
            "Inplace update to inference tensor outside InferenceMode is not allowed"
        )
    if torch.is_grad_enabled() and tensor.requires_grad and tensor.is_leaf:
        raise RuntimeError(
            "a leaf Variable that requires grad is being used in an in-place operation."
        )
    if not transformed and torch._debug_has_internal_overlap(tensor) == 1:
        raise RuntimeError(
            "unsupported operation: more than one element of the written-to tensor refers to "
            "a single memory location. Please clone() the tensor before performing the "
            "operation."
        )


def _check_eager_overlaps(tensors: tuple[Tensor, ...]) -> None:
    """PyTorch adds no gradient to a buffer that overlaps with it in part."""
    _, grad, *buffers = tensors
    read = span(grad)
    for buffer in buffers:
        written = span(buffer)
        if (
            read
            and written
            and max(read[0], written[0]) < min(read[1], written[1])
            and not (read == written and grad.stride() == buffer.stride())
            and _is_dense(grad)
            and _is_dense(buffer)
        ):
            raise RuntimeError(
                "unsupported operation: some elements of the input tensor and the written-to "
                "tensor refer to a single memory location. Please clone() the tensor before "
                "performing the operation."
            )


def is_out_of_bounds(tensor: Tensor) -> bool:
    """Whether the tensor reaches beyond its storage, which PyTorch's operations don't notice."""
    if tensor.device.type == "meta" or tensor.numel() == 0:
        return False
    end = (tensor.storage_offset() + _extent(tensor)) * tensor.element_size()
    return bool(end > tensor.untyped_storage().nbytes())
