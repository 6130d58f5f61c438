# SPDX-License-Identifier: MIT
"""What helps a transformer at an lr that is a little too large: `python -m
benchmarks.battery.stability`, 10 minutes of a processor core.

Four contenders train the battery's GPT with the third of their settings (momentum or β₁ 0.8), as
they do in the battery and with one change. Writes stability.json beside the battery's results, and
prints a table of perplexities on validation data.
"""

from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.battery.advice import Change, long_warmup, times
from benchmarks.battery.contenders import CONTENDERS
from benchmarks.battery.plan import TUNING_SEED, Plan
from benchmarks.battery.records import RESULTS
from benchmarks.battery.report import markdown
from benchmarks.battery.runs import problem_of
from benchmarks.paper.records import dumps, rounded, write_whole
from benchmarks.paper.sweep import one_thread
from benchmarks.paper.task import Source
from benchmarks.paper.training import Trainer

NAMES = ("AdamW", "p=∞ (Signum)", "p=11 (PowerStep)", "p=6")
TRIAL = 2
SEEDS = (TUNING_SEED, 0, 1)
CHANGES: Mapping[str, Change] = {
    "as in the battery": lambda run: run,
    "half the lr": times(0.5),
    "warm-up of 30 %": long_warmup,
    "gradients clipped to norm 1": lambda run: replace(run, clip_norm=1.0),
}


def train(what: tuple[str, str, int]) -> dict[str, Any]:
    """The perplexity of a run, and its mean training loss in each epoch."""
    name, change, seed = what
    (contender,) = (one for one in CONTENDERS if one.name == name)
    run = CHANGES[change](Plan().job("gpt", contender, TRIAL, seed, final=False).run)
    problem = problem_of("gpt", False, Source(None, Path("build/battery/data")), 1)
    with one_thread():
        history = Trainer(run, problem).train()
    cost = problem.cost_of(history[-1])
    losses = rounded([epoch["loss"][0] for epoch in history])
    return {"contender": name, "change": change, "seed": seed, "cost": cost, "loss": losses}


def table(runs: list[dict[str, Any]]) -> str:
    """Perplexities by seed, in Markdown."""
    rows = [["setting 3 of", *CHANGES]]
    for name in NAMES:
        own = [
            [run for run in runs if (run["contender"], run["change"]) == (name, change)]
            for change in CHANGES
        ]
        rows.append([name, *(", ".join(f"{run['cost']:.2f}" for run in at) for at in own)])
    return markdown(rows)


def main() -> None:
    """Trains all of them."""
    wanted = [(name, change, seed) for name in NAMES for change in CHANGES for seed in SEEDS]
    with ProcessPoolExecutor(2, get_context("spawn")) as executor:
        runs = list(tqdm(executor.map(train, wanted), total=len(wanted), unit="run"))
    file = RESULTS / "stability.json"
    lines = ",\n".join(f" {dumps(run)}" for run in runs)
    write_whole(file, lambda part: part.write_text(f"[\n{lines}\n]\n", encoding="utf-8"))
    print(table(runs))


if __name__ == "__main__":
    main()
