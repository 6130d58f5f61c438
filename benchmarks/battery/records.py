# SPDX-License-Identifier: MIT
"""The results: a JSON file for each task, one line for each run."""

import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.battery.plan import Job
from benchmarks.battery.problem import Problem
from benchmarks.paper.records import dumps, write_whole
from benchmarks.paper.training import Metrics

HEAD = ("task", "title", "cost", "chance", "fingerprint", "torch", "commits")
ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results"
ORDER = ("contender", "final", "setting", "epochs", "seed")


def commit() -> str:
    """The last commit of the code on which results depend, marked "-dirty" if the working tree is
    another; "unknown" without git."""
    code = ("csrc", "lpsgd_ext", "python", "benchmarks", ":!benchmarks/*/results/*")

    def git(*arguments: str) -> str:
        command = ["git", *arguments, "--", *code]
        return subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True).stdout

    try:
        changed = git("status", "--porcelain")
        return git("log", "-1", "--format=%H")[:12] + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


class TaskFile:
    """The results of one task, which are written whenever there is a new one."""

    def __init__(self, file: Path, name: str, problem: Problem) -> None:
        """Reads what is there.

        Raises:
            ValueError: if it was made from other data, so that runs could not be compared.
        """
        self.file = file
        old = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        self.head: dict[str, Any] = {
            "task": name,
            "title": problem.title,
            "cost": problem.cost,
            "chance": problem.chance,
            "fingerprint": problem.fingerprint(),
            "torch": torch.__version__,
            "commits": old.get("commits", []),
        }
        for what in ("fingerprint", "torch"):
            if old and old[what] != self.head[what]:
                raise ValueError(
                    f"{file} was made with another {what}, {old[what]} instead of "
                    f"{self.head[what]}: begin anew with other --results"
                )
        self.runs: dict[str, dict[str, Any]] = old.get("runs", {})

    def add(self, job: Job, entry: Mapping[str, Any], commit: str) -> None:
        """Keeps what is known of a run, and of which commit the code was."""
        self.runs[job.run.key] = {
            "contender": job.contender,
            "setting": job.setting,
            "final": job.run.final,
            "epochs": job.run.epochs,
            "seed": job.run.seeds[0],
            **entry,
        }
        if commit not in self.head["commits"]:
            self.head["commits"].append(commit)
        head = [f" {dumps(name)}: {dumps(self.head[name])}" for name in HEAD]
        # Sorted, so that the file does not depend on which of two processes was faster.
        runs = sorted(self.runs.items(), key=lambda item: [item[1][name] for name in ORDER])
        lines = [f"  {dumps(key)}: {dumps(run)}" for key, run in runs]
        body = ",\n".join(lines)
        text = "{\n" + ",\n".join([*head, ' "runs": {\n' + body + "\n }"]) + "\n}\n"
        self.file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self.file, lambda part: part.write_text(text, encoding="utf-8"))


def entry_of(problem: Problem, history: list[Metrics], seconds: float) -> dict[str, Any]:
    """What is kept of a run: the cost, the mean losses, and the seconds of the processor."""
    last = history[-1]
    return {
        "cost": problem.cost_of(last),
        "loss": last["held_out_loss"][0],
        "training_loss": last["loss"][0],
        "seconds": round(seconds, 1),
    }


def read(file: Path) -> dict[str, Any]:
    """A file of results."""
    record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return record


def all_runs(files: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The runs of all files, by their keys."""
    return {key: run for file in files.values() for key, run in file["runs"].items()}


def all_commits(files: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The commits of the code that made them."""
    return sorted({commit for file in files.values() for commit in file["commits"]})


def hours(runs: Mapping[str, Mapping[str, Any]]) -> float:
    """What runs have taken of a processor core."""
    seconds: float = sum(run["seconds"] for run in runs.values())
    return seconds / 3600
