# SPDX-License-Identifier: MIT
"""The classes: bookkeeping in torch.optim's style around the steps of lpsgd_ext and _eager."""

import functools
import inspect
import itertools
import operator
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar, ParamSpec, TypeVar, overload

import torch
from torch import Tensor
from torch.optim.optimizer import (
    Optimizer,
    ParamsT,
    _global_optimizer_post_hooks,
    _global_optimizer_pre_hooks,
)

import lpsgd_ext

from . import _shards
from ._routing import (
    PLAIN_TYPES,
    Lists,
    Row,
    by_device,
    check_capturable,
    check_fused,
    columns,
    eager_calls,
    for_device,
    for_eager,
    is_native,
    is_on_cuda,
    localize,
    momentum_dtype_of,
    numbers_of,
    observed,
    warn_of_fallback,
)

_States = deque[tuple[Tensor, dict[str, Any]]]
_Fresh = dict[Tensor, Tensor]  # the buffers that a step makes, by their parameters
_Gathered = tuple[int, Lists, list[int]]  # a group's index, its lists, its parameters' numbers

_P = ParamSpec("_P")
_R = TypeVar("_R")

_FLOAT32 = (torch.float32, "float32")

_RANGES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "lr": ("learning rate", lambda value: value >= 0.0),
    "p": ("p value", lambda value: value >= 2.0),
    "momentum": ("momentum value", lambda value: 0.0 <= value < 1.0),
    "weight_decay": ("weight_decay value", lambda value: value >= 0.0),
    "eps": ("epsilon value", lambda value: value >= 0.0),
    "pivot": ("pivot value", lambda value: 0.0 < value < float("inf")),
}


def _check_range(name: str, value: Any) -> None:
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ValueError(f"Tensor {name} must be 1-element")
    if isinstance(value, Tensor) and value.device.type != "cpu":
        return  # to look at it would wait for the device
    text, in_range = _RANGES[name]
    try:
        valid = in_range(value)
    except (TypeError, NotImplementedError):
        raise TypeError(f"{name} must be a number, not {type(value).__name__}") from None
    if not valid:
        raise ValueError(f"Invalid {text}: {value}")


def _check_values(values: dict[str, Any]) -> None:
    """Raises, naming the argument, for a value of a group that no step can use."""
    for name in _RANGES:
        if name in values:
            _check_range(name, values[name])
    if values.get("momentum_dtype") not in (None, *_FLOAT32):
        raise ValueError(f"Invalid momentum_dtype: {values['momentum_dtype']}")
    for name in ("seed", "rounding_step"):
        if not isinstance(value := values.get(name, 0), int):
            raise TypeError(f"{name} must be an int, not {type(value).__name__}")
    if values["fused"] and values["foreach"]:
        raise RuntimeError("`fused` and `foreach` cannot be `True` together.")
    for name in ("fused", "foreach", "stochastic_rounding"):
        if values["differentiable"] and values[name]:
            raise RuntimeError(f"`{name}` does not support `differentiable`")
    if values["stochastic_rounding"] and values["capturable"]:  # replays would repeat the bits
        raise RuntimeError("`stochastic_rounding` does not support `capturable`")


def _by_default(group: dict[str, Any]) -> bool:
    """Whether the group leaves it to us how to step."""
    return group["fused"] is None and group["foreach"] is None


def _fallback_calls(
    group: dict[str, Any], rows: list[Row], values: dict[str, Any], rounding: dict[str, int]
) -> list[Callable[[], None]]:
    """A group's step in PyTorch's operations."""
    found_inf = values.get("found_inf")
    if not rows or (found_inf is not None and found_inf != 0):
        return []
    values = {name: value for name, value in values.items() if name != "found_inf"}
    transformed = torch._C._functorch.peek_interpreter_stack() is not None
    use_foreach = group["foreach"] or (
        _by_default(group) and not group["differentiable"] and not transformed
    )
    return eager_calls(rows, use_foreach, for_eager(group, values), rounding)


def changes_nothing(optimizer: Optimizer) -> bool:
    """Whether lr and the gradients are all 0: torch.distributed.checkpoint takes such a step where
    it finds an optimizer without state. It is none of the steps that are counted."""
    groups = optimizer.param_groups
    if any(is_on_cuda(group["lr"]) or group["lr"] != 0.0 for group in groups):
        return False
    grads = [param.grad for group in groups for param in group["params"]]
    return not any(grad is not None and _shards.has_nonzero(grad) for grad in grads)


# Running optimizers by a number that a compiled graph can hold.
_optimizers: weakref.WeakValueDictionary[int, "_LPOptimizer"] = weakref.WeakValueDictionary()
_numbers = itertools.count()


@torch.library.custom_op("lpsgd::step_", mutates_args=("params", "momentum_buffers"))
def _compiled_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    streams: Sequence[int],
    optimizer: int,
    group: int,
) -> None:
    """The step of one group, as torch.compile sees it. lr, p and the like are read from the group
    when it runs, so that no graph depends on them."""
    lists = [list(params), list(grads), list(momentum_buffers)]
    if not momentum_buffers:
        del lists[2]
    self = _optimizers[optimizer]
    if not self._found_inf():
        gathered = [(group, lists, list(streams))]
        for call in self._prepare(gathered):
            call()


@_compiled_step.register_fake
def _(*args: Any) -> None:
    return None


def _store_dtype_by_name(group: dict[str, Any]) -> None:
    # torch.distributed.checkpoint refuses a torch.dtype in a group.
    if group.get("momentum_dtype") is torch.float32:
        group["momentum_dtype"] = "float32"


def _signature_defaults(cls: type) -> dict[str, Any]:
    parameters = inspect.signature(cls).parameters.values()
    return {one.name: one.default for one in parameters if one.default is not one.empty}


def _has_hooks(optimizer: Any) -> bool:
    """Whether a step has more to do than to step."""
    return bool(
        optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or _global_optimizer_pre_hooks
        or _global_optimizer_post_hooks
        or torch.autograd.profiler._is_profiler_enabled
    )


class _LPOptimizer(Optimizer):
    """What LPSGD and LPSGDM share."""

    _HYPER: ClassVar[tuple[str, ...]]  # the keys of a group that a step takes
    _SGD: ClassVar[dict[str, Any]]  # what torch.optim.SGD needs in a checkpoint besides

    def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        _check_values(defaults)
        _store_dtype_by_name(defaults)
        super().__init__(params, defaults)
        self._register()
        if defaults["fused"]:
            self._step_supports_amp_scaling = True

    @staticmethod
    def profile_hook_step(func: Callable[_P, _R]) -> Callable[_P, _R]:
        """torch.optim's wrapper of `step`, which runs hooks and tells the profiler, left out while
        there is neither: that is a third of a small step's time."""
        hooked = Optimizer.profile_hook_step(func)

        @functools.wraps(func)
        def step(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            return (hooked if _has_hooks(args[0]) else func)(*args, **kwargs)

        return step

    def _register(self) -> None:
        self._number = next(_numbers)
        _optimizers[self._number] = self

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if isinstance(param_group, dict):
            _check_values({**self.defaults, **param_group})
            _store_dtype_by_name(param_group)
        super().add_param_group(param_group)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._register()
        for group in self.param_groups:
            for name, value in {**_signature_defaults(type(self)), **self.defaults}.items():
                group.setdefault(name, value)

    def state_dict(self) -> dict[str, Any]:
        """As torch.optim's; the groups have besides what torch.optim.SGD needs to load it."""
        state_dict = super().state_dict()
        for group in state_dict.get("param_groups", ()):  # a hook may have returned anything
            for name, value in self._SGD.items():
                group[name] = group["momentum"] if value == "momentum" else value
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch.optim's; float32 momentum buffers of bfloat16 parameters keep their bits."""
        try:
            with self.register_load_state_dict_pre_hook(lambda _, state: self._prepare_load(state)):
                super().load_state_dict(state_dict)
        finally:
            self.__dict__.pop("_loading", None)

    def _prepare_load(self, state_dict: dict[str, Any]) -> None:
        """Looks at a state_dict that is being loaded, after all other hooks."""

    def _gather(self, group: dict[str, Any], known: _States, fresh: _Fresh) -> Lists:
        """The parameters that have a gradient, their gradients and what the state holds.

        `known` has the states that no earlier group of this step took, in their order. `fresh` gets
        what the state will hold if the step is made.
        """
        raise NotImplementedError

    def _traced_buffers(self, group: dict[str, Any], params: list[Tensor]) -> list[Tensor]:
        """What the state holds, in a way that Dynamo can trace."""
        raise NotImplementedError

    def _native_step(self, lists: Lists, **values: Any) -> None:
        raise NotImplementedError

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Performs a single optimization step.

        Args:
            closure: reevaluates the model and returns the loss, which `step` returns.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if torch.compiler.is_compiling():
            self._traced_step()
        else:
            self._eager_step()
        return loss

    def _traced_step(self) -> None:
        # By any other way to the groups Dynamo would guard on all their values, lr and p included.
        groups = vars(self)["param_groups"]
        # All gradients come before any state: Dynamo guards on the identity of what it reaches
        # through the keys of the state.
        streams: list[list[int]] = []
        lists: list[tuple[list[Tensor], list[Tensor]]] = []
        first = 0
        for group in groups:
            params = [param for param in group["params"] if param.grad is not None]
            if any(type(param) not in PLAIN_TYPES for param in params):  # DTensors have no rule
                torch.compiler.disable(self._eager_step)()  # type: ignore[no-untyped-call]
                return
            lists.append((params, [param.grad for param in params]))
            numbered = enumerate(group["params"], first)
            streams.append([i for i, param in numbered if param.grad is not None])
            first += len(group["params"])
        for i, (params, grads) in enumerate(lists):
            if params:
                buffers = self._traced_buffers(groups[i], params)
                # Not by no_grad: a compiled graph that raises would leave grad mode off.
                detached = [param.detach() for param in params]
                _compiled_step(detached, grads, buffers, streams[i], self._number, i)

    def _eager_step(self) -> None:
        if self._usual_step() or self._found_inf():
            return
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            self._checked_step()

    def _usual_step(self) -> bool:
        """The whole step by one call of C, if there is nothing unusual about it."""
        attributes = self.__dict__
        if attributes.get("grad_scale") is not None or attributes.get("found_inf") is not None:
            return False
        state = self.state if "momentum" in self._HYPER else None
        return lpsgd_ext.step_param_groups(self.param_groups, state, observed())

    def _checked_step(self) -> None:
        known: _States = deque(self.state.items())
        fresh: _Fresh = {}
        gathered: list[_Gathered] = []
        first = 0
        for i, group in enumerate(self.param_groups):
            lists = self._gather(group, known, fresh)
            streams: list[int] = []
            if group["stochastic_rounding"]:
                numbered = enumerate(group["params"], first)
                streams = [i for i, param in numbered if param.grad is not None]
            first += len(group["params"])
            if lists[0]:
                gathered.append((i, lists, streams))
        stateless = [param for param in fresh if param not in self.state]
        empty = [param for param in fresh if "momentum_buffer" in self.state.get(param, ())]
        try:
            for param, buffer in fresh.items():
                self.state[param]["momentum_buffer"] = buffer
            if fresh and self._usual_step():  # all that was unusual may have been the states
                return
            calls = self._prepare(gathered)
        except BaseException:
            for param in fresh:
                self.state.get(param, {}).pop("momentum_buffer", None)
            for param in stateless:
                self.state.pop(param, None)
            for param in empty:
                self.state[param]["momentum_buffer"] = None
            raise
        for call in calls:
            call()

    def _found_inf(self) -> bool:
        """Whether torch.amp.GradScaler found a gradient that is not finite, if the CPU knows."""
        found_inf = getattr(self, "found_inf", None)
        return found_inf is not None and not is_on_cuda(found_inf) and bool(found_inf != 0)

    def _prepare(self, gathered: Sequence[_Gathered]) -> list[Callable[[], None]]:
        """Checks everything there is to check; returns the calls that are left to make."""
        alone = len(gathered) == 1
        return [
            call
            for i, lists, streams in gathered
            for call in self._calls(self.param_groups[i], lists, streams, alone)
        ]

    def _calls(
        self, group: dict[str, Any], lists: Lists, streams: list[int], alone: bool
    ) -> list[Callable[[], None]]:
        """The calls that make a group's step, all of whose tensors are checked here. `alone`: there
        is no other group; then the step may have been made already."""
        values = self._values(group)
        rounding, count = self._rounding(group)
        in_c = not group["differentiable"] and (
            group["fused"] or (_by_default(group) and not observed())
        )
        refusal = None
        if group["capturable"] and not group["fused"]:
            check_capturable(lists[0])
        if in_c and not any(map(is_on_cuda, values.values())):
            numbers = {**rounding, "streams": streams} if rounding else {}
            native = partial(self._native_step, lists, **values, **numbers)
            at_once = alone and not count
            try:
                native(dry_run=not at_once)
                return [] if at_once else [native, *count]
            except lpsgd_ext.CudaError:
                raise
            except (TypeError, ValueError, RuntimeError) as error:
                refusal = error.with_traceback(None)  # which holds this frame, which holds it
        # Nothing has been written so far. What C refuses goes to PyTorch's operations.
        _check_values(group)
        rows = [
            piece
            for i, tensors in enumerate(zip(*lists, strict=True))
            for piece in localize(Row(tensors, streams[i] if rounding else i), bool(rounding))
        ]
        native_rows = [row for row in rows if in_c and is_native(row.tensors)]
        others = [row for row in rows if not (in_c and is_native(row.tensors))]
        if group["fused"] and others:
            check_fused(others)
            try:
                raise refusal or RuntimeError("`fused=True` needs tensors that C can step")
            finally:
                del refusal  # its traceback holds this frame
        if in_c:
            warn_of_fallback(others)
        calls = self._native_calls(native_rows, values, rounding)
        calls += _fallback_calls(group, others, values, rounding)
        written = [tensor for column in lists[::2] for tensor in column]
        if any(_shards.is_dtensor(tensor) for tensor in written):
            calls.append(partial(torch.autograd.graph.increment_version, written))
        return calls + count

    def _values(self, group: dict[str, Any]) -> dict[str, Any]:
        """What a group's step takes beside tensors and what stochastic rounding needs."""
        values = {name: group[name] for name in self._HYPER}
        grad_scale = getattr(self, "grad_scale", None)
        if grad_scale is not None:
            values["grad_scale"] = grad_scale
        found_inf = getattr(self, "found_inf", None)
        if is_on_cuda(found_inf):
            values["found_inf"] = found_inf
        if group.get("momentum_dtype") in _FLOAT32:
            values["momentum_float32"] = True
        return values

    def _rounding(self, group: dict[str, Any]) -> tuple[dict[str, int], list[Callable[[], None]]]:
        """What stochastic rounding needs, and the call that counts the step once it is made."""
        if not group["stochastic_rounding"]:
            return {}, []
        _check_values(group)  # now, as rounding_step is counted on here
        step = group.get("rounding_step", 0)
        following = step + (not changes_nothing(self))
        count = partial(operator.setitem, group, "rounding_step", following)
        return {"seed": group["seed"], "step": step}, [count]

    def _native_calls(
        self, rows: list[Row], values: dict[str, Any], rounding: dict[str, int]
    ) -> list[Callable[[], None]]:
        calls: list[Callable[[], None]] = []
        for device, same in by_device(rows):
            numbers = {**for_device(values, device), **rounding, **numbers_of(same)}
            native = partial(self._native_step, columns(same), **numbers)
            native(dry_run=True)
            calls.append(native)
        return calls


class LPSGD(_LPOptimizer):
    r"""LPSGD: steepest descent between the :math:`\ell_2` and the :math:`\ell_\infty` norm.

    For every element, with :math:`\rho = (p - 2) / (p - 1)` (arXiv:2606.02078, eq 20 to 22):

    .. math::
        u = g / (|g| + \epsilon)^\rho \cdot \kappa^{-1/(p-1)}, \qquad
        \theta \leftarrow (1 - \eta \lambda) \theta - \eta u

    p = 2 is `torch.optim.SGD`, p = inf is sign descent smoothed by eps. `CosineAnnealingP` takes p
    from its first value to 2 in the course of training.

    Note:
        :math:`|u|` is about 1 for large p and :math:`|g|` for p = 2, so the schedule of p is also
        a decay of the step: p = 2 wants an lr 100 to 300 times that of p = 6. With an lr that
        decays by itself, keep p fixed or set `pivot`.

    Args:
        params: parameters, named parameters or groups of them, as for torch.optim. Any shape;
            float32, float64, bfloat16 or float16 on the CPU run in C, the rest in PyTorch's
            operations.
        lr: learning rate :math:`\eta \geq 0`, a number or a Tensor of one element.
        p: the norm, :math:`2 \leq p \leq \infty`.
        weight_decay: decoupled weight decay :math:`\lambda \geq 0` (torch.optim.SGD's is coupled).
        eps: :math:`\epsilon \geq 0`.
        pivot: :math:`\kappa > 0`, the gradient at which :math:`|u| = 1` for every p. 1 is the
            paper; `suggest_pivot`, or about 1e-4, keeps the step from shrinking as p goes to 2.
        maximize: maximize the objective instead of minimizing it.
        foreach: True forces PyTorch's `torch._foreach_*` operations, False one by one.
        capturable: the step may be captured in a CUDA graph: a Tensor lr stays on the device.
        differentiable: autograd goes through the step, also to a Tensor lr or weight_decay.
        fused: True demands the C kernels and raises where they can't be used; None takes them
            wherever they can; False never does.
        stochastic_rounding: round bfloat16 results up or down at random such that the mean is
            exact; other dtypes are rounded to nearest. The random bits depend on seed, on the
            number of the step (`rounding_step` in the group), on the number of the parameter in
            the optimizer and on the index of the element alone: not on threads, nor on the
            sharding of a DTensor.
        seed: an int. All replicas of a parameter need the same.

    Raises:
        ValueError, TypeError: for arguments out of range. `step` raises them too, and
            RuntimeError, for tensors it cannot update; then no tensor has changed.

    Example:
        >>> param = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
        >>> optimizer = LPSGD([param], lr=0.5, p=3.0)
        >>> param.grad = torch.tensor([0.04, -4.0])  # p = 3 takes the square root
        >>> optimizer.step()
        >>> param
        Parameter containing:
        tensor([0.9000, 2.0000], requires_grad=True)
    """

    _HYPER = ("lr", "p", "weight_decay", "eps", "pivot", "maximize")
    _SGD: ClassVar[dict[str, Any]] = {"momentum": 0.0, "dampening": 0.0, "nesterov": False}

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        p: float = 6.0,
        weight_decay: float = 0.0,
        eps: float = 1e-8,
        pivot: float = 1.0,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        stochastic_rounding: bool = False,
        seed: int = 0,
    ) -> None:
        defaults = {
            "lr": lr,
            "p": p,
            "weight_decay": weight_decay,
            "eps": eps,
            "pivot": pivot,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
            "stochastic_rounding": stochastic_rounding,
            "seed": seed,
        }
        super().__init__(params, defaults)

    def _gather(self, group: dict[str, Any], known: _States, fresh: _Fresh) -> Lists:
        params = [param for param in group["params"] if param.grad is not None]
        return [params, [param.grad for param in params]]

    def _traced_buffers(self, group: dict[str, Any], params: list[Tensor]) -> list[Tensor]:
        return []

    def _native_step(self, lists: Lists, **values: Any) -> None:
        lpsgd_ext.lpsgd_(lists[0], lists[1], **values)


class LPSGDM(_LPOptimizer):
    r"""LPSGDM: LPSGD on an exponential average of the gradient, with decoupled weight decay.

    For every element, with :math:`\rho = (p - 2) / (p - 1)` (arXiv:2606.02078, eq 20 and 23 to 25):

    .. math::
        m \leftarrow \beta m + (1 - \beta) g, \qquad
        u = m / (|m| + \epsilon)^\rho \cdot \kappa^{-1/(p-1)}, \qquad
        \theta \leftarrow (1 - \eta \lambda) \theta - \eta u

    p = 2 is `torch.optim.SGD(momentum=beta, dampening=beta)` from a zero buffer, p = inf is Signum.
    The state of a parameter is `momentum_buffer`, as for torch.optim.SGD.

    Args:
        momentum: :math:`0 \leq \beta < 1`.
        momentum_dtype: None or torch.float32, the dtype of the momentum_buffer of bfloat16 and
            float16 parameters: their own or float32.

    The other arguments, the note on lr and the errors are those of :class:`LPSGD`; eps and pivot
    refer to :math:`|m|`.

    Example:
        >>> from lpsgd import CosineAnnealingP
        >>> model = torch.nn.Linear(4, 1)
        >>> optimizer = LPSGDM(model.parameters(), lr=0.01, p=6.0)
        >>> schedule = CosineAnnealingP(optimizer, total_iters=30)
        >>> for epoch in range(30):
        ...     optimizer.zero_grad()
        ...     model(torch.ones(8, 4)).square().mean().backward()
        ...     optimizer.step()
        ...     schedule.step()
        >>> optimizer.param_groups[0]["p"]
        2.0
    """

    _HYPER = ("lr", "p", "momentum", "weight_decay", "eps", "pivot", "maximize")
    _SGD: ClassVar[dict[str, Any]] = {"dampening": "momentum", "nesterov": False}

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        p: float = 6.0,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        eps: float = 1e-8,
        pivot: float = 1.0,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        momentum_dtype: torch.dtype | None = None,
        stochastic_rounding: bool = False,
        seed: int = 0,
    ) -> None:
        defaults = {
            "lr": lr,
            "p": p,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "eps": eps,
            "pivot": pivot,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
            "momentum_dtype": momentum_dtype,
            "stochastic_rounding": stochastic_rounding,
            "seed": seed,
        }
        super().__init__(params, defaults)

    def _prepare_load(self, state_dict: dict[str, Any]) -> None:
        saved = itertools.chain.from_iterable(g["params"] for g in state_dict["param_groups"])
        params = itertools.chain.from_iterable(g["params"] for g in self.param_groups)
        self._loading = {}
        for i, (number, param) in enumerate(zip(saved, params, strict=False)):
            state = state_dict["state"].get(number)
            if state is None:
                continue
            if "momentum_buffer" not in state:
                raise ValueError(
                    f"loaded state dict has no momentum_buffer in the state of parameter {i}: it "
                    "is no checkpoint of LPSGDM or SGD"
                )
            if isinstance(state["momentum_buffer"], Tensor):
                self._loading[param] = state["momentum_buffer"]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # torch.optim has cast the buffers that are being loaded to the parameters' dtype.
        loading: dict[Tensor, Tensor] = self.__dict__.pop("_loading", {})
        for group in self.param_groups:
            for param in group["params"] if group["momentum_dtype"] is not None else ():
                if param in loading:
                    dtype = momentum_dtype_of(param, momentum_float32=True)
                    self.state[param]["momentum_buffer"] = loading[param].to(param.device, dtype)

    def _gather(self, group: dict[str, Any], known: _States, fresh: _Fresh) -> Lists:
        params, grads, momentum_buffers = [], [], []
        for param in group["params"]:
            # A look-up calls Tensor.__hash__, which is slow; most states come in order.
            in_order = known and known[0][0] is param
            state = known.popleft()[1] if in_order else None
            grad = param.grad
            if grad is None:
                continue
            if not in_order:
                state = self.state.get(param, {})
            if not isinstance(state, dict):
                raise TypeError(f"a parameter's state must be a dict, not {type(state).__name__}")
            buffer = state.get("momentum_buffer")
            if buffer is None:
                if param not in fresh:
                    fresh[param] = _new_buffer(group, param)
                buffer = fresh[param]
            params.append(param)
            grads.append(grad)
            momentum_buffers.append(buffer)
        return [params, grads, momentum_buffers]

    def _traced_buffers(self, group: dict[str, Any], params: list[Tensor]) -> list[Tensor]:
        states = [self.state[param] for param in params]
        for param, state in zip(params, states, strict=True):
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = _new_buffer(group, param)
        return [state["momentum_buffer"] for state in states]

    def _native_step(self, lists: Lists, **values: Any) -> None:
        lpsgd_ext.lpsgdm_(lists[0], lists[1], lists[2], **values)


def _new_buffer(group: dict[str, Any], param: Tensor) -> Tensor:
    dtype = momentum_dtype_of(param, group["momentum_dtype"] is not None)
    return torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)
