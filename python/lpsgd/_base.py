# SPDX-License-Identifier: MIT
"""What LPSGD and LPSGDM share: construction, checkpoints in torch.optim's format, and `step`."""

import functools
import inspect
import warnings
from collections.abc import Callable
from typing import Any, ClassVar, ParamSpec, TypeVar, overload

import torch
from torch import Tensor
from torch.optim.optimizer import (
    Optimizer,
    ParamsT,
    _global_optimizer_post_hooks,
    _global_optimizer_pre_hooks,
)

from ._checkpoints import as_integers, buffers_of, fit_buffers, from_integers, translate
from ._compiled import register, running, traced_step
from ._native import lpsgd_ext
from ._parts import Parts
from ._schedule import attach, schedule_of
from ._unusual import (
    Fresh,
    Lists,
    States,
    observed,
    sharing,
    span,
    unusual_step,
)
from ._values import MOMENTUM_DTYPES, check_values, momentum_dtype_in

_P = ParamSpec("_P")
_R = TypeVar("_R")

# The optimizers whose step is running, with its hooks.
_stepping: list[Optimizer] = []


class LPOptimizer(Optimizer):
    """The base class. What is abstract in it tells LPSGD from LPSGDM."""

    _HYPER: ClassVar[tuple[str, ...]]  # the keys of a group that a step takes
    _SGD: ClassVar[dict[str, Any]]  # what torch.optim.SGD needs in a checkpoint besides
    _parts: Parts | None = None  # of the running step, where it is made parameter by parameter

    def _gather(self, group: dict[str, Any], known: States, fresh: Fresh) -> Lists:
        """The parameters that have a gradient, their gradients and what the state holds.

        `known` has the states that no earlier group of this step took, in their order. `fresh` gets
        what the state will hold if the step is made.
        """
        raise NotImplementedError

    def _traced_buffers(self, group: dict[str, Any], params: list[Tensor]) -> list[Tensor]:
        """What the state holds, in a way that Dynamo can trace."""
        raise NotImplementedError

    def _native_step(self, lists: Lists, **values: Any) -> None:
        """The step in C."""
        raise NotImplementedError

    # Construction.

    def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        check_values(defaults)
        _store_dtype_by_name(defaults)
        super().__init__(params, defaults)
        self._number = register(self)
        if defaults["fused"]:
            self._step_supports_amp_scaling = True
        self._take_over_schedule()

    def _take_over_schedule(self) -> None:
        """Horovod makes a new optimizer of the groups of one, which may have a schedule."""
        groups = {id(group) for group in self.param_groups if "p_last_epoch" in group}
        for other in running() if groups else ():
            schedule = schedule_of(other)
            if schedule is not None and groups & set(map(id, other.param_groups)):
                attach(schedule, self)
                break

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if isinstance(param_group, dict):
            check_values({**self.defaults, **param_group})
            _store_dtype_by_name(param_group)
        super().add_param_group(param_group)
        if self._parts is not None:
            self._parts.attach(len(self.param_groups) - 1)

    # Copies and checkpoints.

    def __getstate__(self) -> dict[str, Any]:
        """As torch.optim's, which leaves hooks out; a schedule with `every_step=True` is kept."""
        state: dict[str, Any] = super().__getstate__()
        state["state"] = as_integers(self.state, self.param_groups)
        schedule = schedule_of(self)
        if schedule is not None and schedule.every_step:
            state["schedule"] = schedule
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = {**state}
        schedule = state.pop("schedule", None)
        if "_loading" in self.__dict__:  # by torch.optim, which has checked the rest
            saved, remark = self._loading
            fit_buffers(state, saved, {**_signature_defaults(type(self)), **self.defaults})
            if remark:
                warnings.warn(f"loading another optimizer's checkpoint: {remark}", stacklevel=6)
        else:
            state["state"] = from_integers(state["state"], state["param_groups"])
        super().__setstate__(state)
        if self._parts is not None:
            self._parts.taken.clear()
        self._number = register(self)
        if schedule is not None:
            attach(schedule, self)
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
        """As torch.optim's, also for a checkpoint of the other class or of torch.optim.SGD.

        float32 momentum buffers of bfloat16 parameters keep their bits, and buffers get the strides
        of their parameters.

        SGD's lr and weight_decay mean something else, and it has no p: the groups keep the values
        that they have. Its momentum buffers are taken, as the averages that LPSGDM keeps: times
        (1 - momentum) / (1 - dampening). LPSGD drops momentum buffers; LPSGDM keeps its momentum
        where it loads LPSGD's checkpoint. A warning says so.

        Raises:
            ValueError: for a checkpoint of yet another optimizer, and as torch.optim; then nothing
                has changed.
        """
        try:
            with self.register_load_state_dict_pre_hook(lambda _, given: self._translate(given)):
                super().load_state_dict(state_dict)
        finally:
            self.__dict__.pop("_loading", None)

    def _translate(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """What is loaded in the place of a state_dict, after all other hooks."""
        groups, has_momentum = self.param_groups, "momentum" in self._HYPER
        translated, remark = translate(state_dict, groups, has_momentum)
        self._loading = buffers_of(translated, groups) if has_momentum else {}, remark
        return translated

    # The step.

    @staticmethod
    def profile_hook_step(func: Callable[_P, _R]) -> Callable[_P, _R]:
        """torch.optim's wrapper of `step`, which runs hooks and tells the profiler, left out while
        there is neither: that is a third of a small step's time. In a class whose `step` calls its
        base's, both are wrapped; what they make is one step."""
        hooked = Optimizer.profile_hook_step(func)

        @functools.wraps(func)
        def step(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            optimizer: Any = args[0]
            if not _has_hooks(optimizer) or optimizer in _stepping:
                return func(*args, **kwargs)
            _stepping.append(optimizer)
            try:
                return hooked(*args, **kwargs)
            finally:
                _stepping.remove(optimizer)

        return step

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
        if self._parts is not None:
            self._parts.check_step(closure)
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if torch.compiler.is_compiling():
            traced_step(self)
        else:
            self._eager_step()
        return loss

    def _shares_memory(self) -> bool:
        """Whether a parameter is listed twice or shares memory with other tensors of a step, as far
        as there are any when a graph is made."""
        params = [param for group in self.param_groups for param in group["params"]]
        buffers = [self.state.get(param, {}).get("momentum_buffer") for param in params]
        rows = zip(params, [param.grad for param in params], buffers, strict=True)
        return bool(sharing([tuple(map(span, row)) for row in rows]))

    # As torch.compiler.assume_constant_result does, which imports torch._dynamo.
    _shares_memory._dynamo_marked_constant = True  # type: ignore[attr-defined]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch.optim's. What parameters have been stepped by keeps its effect, also where the
        step has not come to its end."""
        if self._parts is not None:
            self._parts.drop()
        super().zero_grad(set_to_none)

    def supports_fused_back_pass(self) -> bool:
        """Whether there is `step_parameter`; trainers ask."""
        return True

    def step_parameter(self, param: Tensor, group: dict[str, Any], index: int) -> None:
        """Steps one parameter by its gradient, as `step` would, for trainers that do so in hooks of
        backward and free the gradient. `lpsgd.release_gradients` does it by itself.

        All parameters together are one step, which ends with `step`, with `zero_grad`, or where a
        parameter comes for the second time.

        Args:
            param: the parameter. Without a gradient it is left as it is.
            group: the one of `param_groups` that it is in.
            index: its index in `group["params"]`.
        """
        i = next((i for i, one in enumerate(self.param_groups) if one is group), None)
        there = group["params"][index : index + 1] if i is not None and index >= 0 else []
        if i is None or not any(one is param for one in there):
            raise ValueError("step_parameter() needs a parameter, its group and its index in that")
        if self._parts is None:
            self._parts = Parts(self)
        self._parts.step_by_hand(param, i, index)

    def _eager_step(self) -> None:
        if self._parts is not None:
            self._parts.end()
        if not self._usual_step():
            unusual_step(self)

    def _usual_step(self) -> bool:
        """The whole step by one call of C, if there is nothing unusual about it."""
        attributes = self.__dict__
        if attributes.get("grad_scale") is not None or attributes.get("found_inf") is not None:
            return False
        state = self.state if "momentum" in self._HYPER else None
        return lpsgd_ext.step_param_groups(self.param_groups, state, observed())


def _has_hooks(optimizer: Any) -> bool:
    """Whether a step has more to do than to step."""
    return bool(
        optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or _global_optimizer_pre_hooks
        or _global_optimizer_post_hooks
        or torch.autograd.profiler._is_profiler_enabled
    )


def defaults_of(arguments: dict[str, Any]) -> dict[str, Any]:
    """The defaults of groups, whose keys are the names of a constructor's arguments, out of its
    locals()."""
    others = ("self", "params", "__class__")
    return {name: value for name, value in arguments.items() if name not in others}


def _store_dtype_by_name(group: dict[str, Any]) -> None:
    dtype = momentum_dtype_in(group)
    if dtype is not None:
        names = {value: name for name, value in MOMENTUM_DTYPES.items()}
        group["momentum_dtype"] = names[dtype]


def _signature_defaults(cls: type) -> dict[str, Any]:
    parameters = inspect.signature(cls).parameters.values()
    return {one.name: one.default for one in parameters if one.default is not one.empty}
