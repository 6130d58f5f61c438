# SPDX-License-Identifier: MIT
"""Who takes part, and the eight settings of each that are tried: the declared search space.

The lr is log-uniform over two decades and the momentum (β₁) one of four, for all alike; some have a
third choice of four. The settings are the first eight points of Sobol's sequence without
scrambling: each eighth of the lr's range has one, each momentum two.

`python -m benchmarks.battery.contenders` prints them.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from scipy.stats import qmc

TRIALS = 8
DECADES = 2.0
MOMENTA = (0.6, 0.8, 0.9, 0.95)
BETAS2 = (0.95, 0.98, 0.99, 0.999)
PIVOT = 1e-3
WITHOUT_DECAY = {"weight_decay": 0.0}


@dataclass(frozen=True)
class Contender:
    """An optimizer and where its settings are looked for.

    Attributes:
        optimizer: a name of `benchmarks.paper.methods.OPTIMIZERS`.
        middle: of the lr's range, in logarithms. That of SGDM is of lr / (1 - momentum), since its
            buffer is a sum of gradients and not a mean.
        bytes: of the state, for each element of a float32 parameter.
        settings, run: keyword arguments of the optimizer, and fields of the run, that are fixed.
        lr_schedules: the third choice, unless it is β₂.
    """

    name: str
    optimizer: str
    middle: float
    bytes: int = 4
    settings: Mapping[str, Any] = field(default_factory=dict)
    run: Mapping[str, Any] = field(default_factory=dict)
    lr_schedules: Sequence[str] = ("cosine",) * 4

    def at(self, trial: int) -> dict[str, Any]:
        """The fields of a `Run` with the setting of this number."""
        place, momentum, third = POINTS[trial]
        lr = self.middle * 10 ** (DECADES * (place - 0.5))
        beta = MOMENTA[int(4 * momentum)]
        settings = dict(self.settings)
        if self.optimizer == "SGDM":
            lr *= 1 - beta
            settings["momentum"] = beta
        elif self.optimizer == "LPSGDM":
            settings["momentum"] = beta
        elif self.optimizer == "Lion":
            settings["betas"] = (beta, 0.99)
        else:
            settings["betas"] = (beta, BETAS2[int(4 * third)])
        schedule = self.lr_schedules[int(4 * third)]
        return {
            "optimizer": self.optimizer,
            "lr": float(f"{lr:.3g}"),
            "settings": settings,
            "lr_schedule": schedule,
            **self.run,
        }

    def label(self, trial: int) -> str:
        """The setting of this number, for tables."""
        run = self.at(trial)
        constant = ", constant" if run["lr_schedule"] == "constant" else ""
        return f"{run['lr']:.2g}, {', '.join(f'{beta:g}' for beta in self.betas(trial))}{constant}"

    def betas(self, trial: int) -> tuple[float, ...]:
        """The momentum of the setting of this number, or its β₁ and β₂."""
        settings = self.at(trial)["settings"]
        return tuple(settings.get("betas", (settings.get("momentum"),)))

    @staticmethod
    def at_edge(trial: int) -> bool:
        """Whether the setting's lr is the smallest or the largest of all."""
        places = [place for place, _, _ in POINTS]
        return POINTS[trial][0] in (min(places), max(places))


def _points() -> list[tuple[float, float, float]]:
    """In the middle of their cells, where Sobol's are at the lower edge."""
    shift = 1 / (2 * TRIALS)
    sobol = qmc.Sobol(3, scramble=False).random(TRIALS) + shift
    return [(float(a), float(b), float(c)) for a, b, c in sobol]


POINTS = _points()

_RISING = {"anneal_p": True, "p_end": 20.0}
_TO_2 = {"anneal_p": True}
_BYTE = {"momentum_dtype": "float8_e5m2"}

CONTENDERS = (
    Contender("AdamW", "AdamW", 3e-3, 8, WITHOUT_DECAY),
    Contender("NAdamW", "NAdamW", 3e-3, 8, WITHOUT_DECAY),
    Contender("cautious AdamW", "CautiousAdamW", 3e-3, 8, WITHOUT_DECAY),
    Contender("SGDM (Nesterov)", "SGDM", 1.0, 4, {"nesterov": True}),
    Contender("Lion", "Lion", 5e-4, 4, WITHOUT_DECAY),
    Contender("p=∞ (Signum)", "LPSGDM", 1e-3, 4, {"p": math.inf}),
    Contender("p=11 (PowerStep)", "LPSGDM", 2e-3, 4, {"p": 11.0}),
    Contender("p=6", "LPSGDM", 4e-3, 4, {"p": 6.0}),
    # Every other one of its settings keeps the lr constant.
    Contender("p 6→2", "LPSGDM", 1e-2, 4, {"p": 6.0}, _TO_2, ("cosine", "constant") * 2),
    Contender("p 6→2 (pivot)", "LPSGDM", 1e-3, 4, {"p": 6.0, "pivot": PIVOT}, _TO_2),
    Contender("p 3→20 (pivot)", "LPSGDM", 1e-3, 4, {"p": 3.0, "pivot": PIVOT}, _RISING),
    Contender("p=∞ (one byte)", "LPSGDM", 1e-3, 1, {"p": math.inf, **_BYTE}),
    Contender("p=6 (one byte)", "LPSGDM", 4e-3, 1, {"p": 6.0, **_BYTE}),
)
REFERENCE = "AdamW"


def table(contenders: Sequence[Contender] = CONTENDERS) -> str:
    """All settings, in Markdown."""
    head = ["contender", *(str(trial + 1) for trial in range(TRIALS))]
    rows = [[c.name, *(c.label(trial) for trial in range(TRIALS))] for c in contenders]
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    print(table())
