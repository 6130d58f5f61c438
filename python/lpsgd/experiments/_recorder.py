# SPDX-License-Identifier: MIT
"""What an optimizer does, step by step."""

import functools
import io
import math
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer
from torch.utils.hooks import RemovableHandle

from .._eager import BYTE, _direction, _fit, _fold, decoded
from .._pivot import norm
from .._report import report_of
from .._schedule import innermost, outside_of_graphs
from .._values import check_integer, momentum_exponent_in

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure


class Record(NamedTuple):
    """One group of parameters in one step. None is what the optimizer does not have."""

    step: int  #: the number of the step
    group: int  #: the index of the group
    lr: float  #: of this step, before schedules move on
    p: float | None  #: of this step
    u: float | None  #: mean :math:`|u|`
    delta: float | None  #: mean :math:`|\Delta\theta|`
    grad_norm: float | None  #: the 2-norm of the gradient
    at_zero: float | None  #: the fraction of the momentum that is 0
    saturated: float | None  #: the fraction at the largest number that its dtype has, or infinite


#: What `Recorder.plot` draws: fields of a record, the panel's title, and the scale.
_PANELS = (
    (("lr",), "learning rate", "log"),
    (("p",), "p", "linear"),
    (("u",), "mean |u|", "log"),
    (("delta",), "mean |Δθ|", "log"),
    (("grad_norm",), "norm of the gradient", "log"),
    (("at_zero", "saturated"), "momentum: 0, saturated (dotted)", "linear"),
)


class Recorder:
    r"""Records what every n-th step of an optimizer does, for each group of parameters.

    It hooks itself into `optimizer.step()`; the training loop stays as it is. What a record has is
    said at :class:`Record`. Means and norms are over all elements of the group that require
    gradients.

    For LPSGD and LPSGDM, u is what the rule makes of the gradient or the momentum as it is stored,
    so that it is right also where the parameters' dtype loses the step. For other optimizers it is
    :math:`|\Delta\theta|` / lr, without decoupled weight decay where the group says that it has
    that, as `torch.optim.AdamW`'s. The momentum is LPSGDM's and SGD's `momentum_buffer`, or
    `exp_avg`.

    A recorded step copies the parameters, reads all tensors and waits for the GPU. Between them a
    step costs two calls that count; after `stop` nothing. Steps that GradScaler skips do not count.

    Args:
        optimizer: any torch.optim.Optimizer, or what a framework has wrapped around one.
        every: n. The steps n, 2n, 3n and so on are recorded.
        step: the number of steps made before, where training is resumed.

    Raises:
        ValueError, TypeError: for arguments out of range.

    Note:
        Where gradients are stepped in backward (`release_gradients`), parameters move before
        `step()` and no gradient is left: `delta` and `grad_norm` are None. In a step that is
        compiled, the hooks run outside of the graph. Replays of a CUDA graph run no hooks. A copy
        of the optimizer is not recorded. DTensors count as wholes, so that all ranks must record.

    Example:
        >>> from lpsgd import LPSGDM
        >>> model = torch.nn.Linear(4, 1)
        >>> optimizer = LPSGDM(model.parameters(), lr=0.01, p=6.0)
        >>> recorder = Recorder(optimizer, every=10)
        >>> for _ in range(30):
        ...     optimizer.zero_grad()
        ...     model(torch.ones(8, 4)).square().mean().backward()
        ...     optimizer.step()
        >>> [(record.step, record.p) for record in recorder.records]
        [(10, 6.0), (20, 6.0), (30, 6.0)]
    """

    records: list[Record]  #: all so far

    def __init__(self, optimizer: Optimizer, every: int = 1, *, step: int = 0) -> None:
        self._optimizer = innermost(optimizer)
        self.every = check_integer("every", every, 1)
        self.steps = check_integer("step", step, 0)  #: made so far
        self.records = []
        self._stepping = False
        self._before: list[tuple[dict[str, Any], list[Tensor] | None]] | None = None
        self._hooks: list[RemovableHandle] = []
        self._writers: list[Callable[[list[Record]], None]] = []
        self._display: Any = None
        self.start()

    def __repr__(self) -> str:
        name = type(self._optimizer).__name__
        return f"Recorder({name}, every={self.every}, {len(self.records)} records)"

    def start(self) -> None:
        """Records from the next step on, as a new recorder does by itself."""
        if not self._hooks:
            self._hooks = [
                self._optimizer.register_step_pre_hook(self._before_step),
                self._optimizer.register_step_post_hook(self._after_step),
            ]

    def stop(self) -> None:
        """Leaves the optimizer alone. What has been recorded stays."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    # The hooks.

    @outside_of_graphs
    def _before_step(self, optimizer: Optimizer, *_: Any) -> None:
        self._stepping, self._before = True, None
        if (self.steps + 1) % self.every == 0:
            # Steps that were made parameter by parameter have moved already.
            parts: Any = getattr(optimizer, "_parts", None)
            moved = parts is not None and (parts.released or parts.taken)
            self._before = [
                (
                    {name: _number(value) for name, value in group.items() if name != "params"},
                    None if moved else [param.detach().clone() for param in _trained(group)],
                )
                for group in optimizer.param_groups
            ]

    @outside_of_graphs
    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        # Where a step calls its base's, torch.optim runs hooks twice. A fused optimizer is told by
        # GradScaler that it has to skip the step.
        stepping, self._stepping = self._stepping, False
        if not stepping or getattr(optimizer, "found_inf", False):
            return
        self.steps += 1
        if self._before is None:
            return
        before, self._before = self._before, None
        with torch.no_grad():
            made = [
                _record(optimizer, self.steps, i, values, params)
                for i, (values, params) in enumerate(before)
            ]
        self.records += made
        for write in self._writers:
            write(made)

    # What has been recorded.

    def to_frame(self) -> "pandas.DataFrame":
        """A pandas.DataFrame with a row for each record and a column for each field of
        :class:`Record`; NaN where that is None."""
        import pandas

        frame = pandas.DataFrame(self.records, columns=list(Record._fields))
        return frame.astype(dict.fromkeys(Record._fields[2:], "float64"))

    def plot(self, *, live: bool = False) -> "Figure":
        """Draws what has been recorded, with a line for each group.

        Args:
            live: show the picture in the notebook's cell at once, in the place of the one that was
                shown there before. Call it now and then in the training loop.

        Returns:
            a matplotlib.figure.Figure, which a notebook shows if it is a cell's last value.
        """
        figure = _draw(self.records)
        if live:
            from IPython.display import Image, display

            buffer = io.BytesIO()
            figure.savefig(buffer, format="png", dpi=80)
            picture = Image(data=buffer.getvalue())
            if self._display is None or self._display[0] != _cell():
                self._display = _cell(), display(picture, display_id=True)
            else:
                self._display[1].update(picture)
        return figure

    def log(self, writer: Any, prefix: str = "lpsgd") -> None:
        """Writes what has been recorded, and from now on every record as it is made.

        Args:
            writer: TensorBoard's SummaryWriter (which has `add_scalar`), what has `log(values,
                step=…)`, such as a run of Weights & Biases, or what has `log_metrics(values,
                step=…)`, such as Lightning's loggers and MLflow.
            prefix: of the names, which are `prefix/u` and so on, or `prefix/u/1` for the second of
                several groups.

        Raises:
            TypeError: for other objects.
        """
        if hasattr(writer, "add_scalar"):

            def send(values: dict[str, float], step: int) -> None:
                for name, value in values.items():
                    writer.add_scalar(name, value, step)

        elif hasattr(writer, "log_metrics"):
            send = functools.partial(_send, writer.log_metrics)
        elif hasattr(writer, "log"):
            send = functools.partial(_send, writer.log)
        else:
            raise TypeError(
                f"{type(writer).__name__} has neither add_scalar nor log_metrics nor log"
            )

        def write(records: list[Record]) -> None:
            by_step: dict[int, dict[str, float]] = {}
            for record in records:
                several = len(self._optimizer.param_groups) > 1
                suffix = f"/{record.group}" if several else ""
                for name, value in zip(Record._fields[2:], record[2:], strict=True):
                    if value is not None:
                        by_step.setdefault(record.step, {})[f"{prefix}/{name}{suffix}"] = value
            for step, values in by_step.items():
                send(values, step)

        write(self.records)
        self._writers.append(write)


def _send(function: Callable[..., Any], values: Mapping[str, float], step: int) -> None:
    function(dict(values), step=step)


def _cell() -> Any:
    """What tells a notebook's cell from one that ran before it."""
    from IPython import get_ipython

    shell = get_ipython()
    return None if shell is None else shell.execution_count


def _number(value: Any) -> Any:
    """A value of a group as it is now: a Tensor may be changed in place."""
    return value.item() if isinstance(value, Tensor) and value.numel() == 1 else value


def _trained(group: dict[str, Any]) -> list[Tensor]:
    return [param for param in group["params"] if param.requires_grad]


def _mean(tensors: list[Tensor]) -> float | None:
    """Of all magnitudes."""
    count = sum(x.numel() for x in tensors)
    return math.fsum(norm(x, 1.0) for x in tensors) / count if count else None


def _momentum(optimizer: Optimizer, group: dict[str, Any]) -> tuple[str, list[Tensor]]:
    """The name of the momentum in the state, and the group's as they are stored."""
    for name in ("momentum_buffer", "exp_avg"):
        found = [optimizer.state.get(param, {}).get(name) for param in group["params"]]
        if tensors := [x for x in found if isinstance(x, Tensor)]:
            return name, tensors
    return "", []


def _record(
    optimizer: Optimizer,
    step: int,
    i: int,
    values: dict[str, Any],
    before: list[Tensor] | None,
) -> Record:
    """`values` are those of the group and `before` its parameters before the step."""
    group = optimizer.param_groups[i]
    params, lr = _trained(group), float(values["lr"])
    ours = "pivot" in values
    grads = [param.grad for param in params if param.grad is not None]
    grads = [grad.coalesce().values() if grad.is_sparse else grad for grad in grads]
    # GradScaler's, which our steps leave in the gradients and torch's do not.
    scale = _number(getattr(optimizer, "grad_scale", None)) or 1.0
    divisor = scale if ours else 1.0
    name, momentum = _momentum(optimizer, group)
    change = delta = u = None
    if before is not None:
        # In float32 at least: the difference of two bfloat16 may be none.
        wide = [torch.promote_types(param.dtype, torch.float32) for param in params]
        change = [
            param.detach().to(dtype) - old.to(dtype)
            for param, old, dtype in zip(params, before, wide, strict=True)
        ]
        delta = _mean(change)
    if ours:
        u = _mean([_u(x, values, divisor) for x in (momentum if "momentum" in values else grads)])
    elif change is not None and before is not None and lr:
        decay = lr * values["weight_decay"] if values.get("decoupled_weight_decay") else 0.0
        undone = [d + decay * old for d, old in zip(change, before, strict=True)]
        mean = _mean(undone if decay else change)
        u = None if mean is None else mean / lr
    report = report_of(group, optimizer, name) if momentum else None
    return Record(
        step=step,
        group=i,
        lr=lr,
        p=float(values["p"]) if "p" in values else None,
        u=u,
        delta=delta,
        grad_norm=math.hypot(*map(norm, grads)) / divisor if grads else None,
        at_zero=report.at_zero if report else None,
        saturated=report.at_largest if report else None,
    )


def _u(x: Tensor, values: dict[str, Any], divisor: float) -> Tensor:
    """u of eq 21 and 24, of a gradient or of the momentum as it is stored."""
    x = decoded(x, momentum_exponent_in(values)) if x.dtype == BYTE else x
    x = torch.view_as_real(x.resolve_conj()) if x.is_complex() else x
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if "momentum" not in values:
        x = x / divisor
    rho, unit, _ = _fold(1.0, float(values["p"]), float(values["pivot"]), 1.0, False)
    return _direction(x, rho, _fit(float(values["eps"]), x.dtype)) * unit


def _draw(records: list[Record]) -> "Figure":
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(9, 4.6), layout="constrained", sharex=True)
    groups = sorted({record.group for record in records})
    for panel, (names, title, scale) in zip(axes.flat, _PANELS, strict=True):
        for group in groups:
            rows = [record for record in records if record.group == group]
            steps = [record.step for record in rows]
            for name, style in zip(names, ("-", ":"), strict=False):
                line = [getattr(record, name) for record in rows]
                if any(value is not None for value in line):
                    line = [math.nan if value is None else value for value in line]
                    panel.plot(steps, line, style, color=f"C{group}", label=f"group {group}")
        positive = any(y > 0 for line in panel.lines for y in line.get_ydata())
        panel.set_yscale(scale if positive else "linear")
        panel.set_title(title, fontsize=10)
        panel.grid(alpha=0.3)
        if not panel.lines:
            panel.text(0.5, 0.5, "none", transform=panel.transAxes, ha="center", color="0.5")
    for panel in axes[1]:
        panel.set_xlabel("step")
    if len(groups) > 1 and axes[0, 0].lines:
        axes[0, 0].legend(fontsize=8)
    plt.close(figure)  # it is shown by who gets it, not by pyplot a second time
    return figure
