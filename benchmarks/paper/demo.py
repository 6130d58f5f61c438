# SPDX-License-Identifier: MIT
"""What LPSGD does, in three pictures and their tables: `python -m benchmarks.paper.demo`.

Writes quadratics.png, digits-headline.png, digits.png and digits.json into the output directory.
"""

import argparse
import os
from pathlib import Path

import matplotlib

from benchmarks.paper import report
from benchmarks.paper.config import find, load
from benchmarks.paper.sweep import run_study
from benchmarks.paper.training import Machine
from lpsgd.experiments import geometry


def main() -> None:
    """Runs both experiments with the command line's settings."""
    parser = argparse.ArgumentParser(description="Compare LPSGD with SGD and AdamW.")
    parser.add_argument("--output", type=Path, default=Path("build/demo"), help="directory")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="processes")
    parser.add_argument(
        "--quick", action="store_true", help="one seed, two epochs, three learning rates: a test"
    )
    arguments = parser.parse_args()
    matplotlib.use("Agg")
    arguments.output.mkdir(parents=True, exist_ok=True)

    print(geometry.table(), end="\n\n")
    report.save(geometry.draw(), arguments.output / "quadratics.png")

    study = load(find("digits"), small=arguments.quick)
    # Starting processes takes longer than the quick study itself.
    jobs = 1 if arguments.quick else arguments.jobs
    result = run_study(study, arguments.output, arguments.output, Machine(), jobs)
    digits = report.read(result)
    print(f"\n{report.table(digits)}\n\n{report.CAVEAT}")
    report.draw(digits, arguments.output)
    print(f"Pictures and figures are in {arguments.output}.")


if __name__ == "__main__":
    main()
