# SPDX-License-Identifier: MIT
"""What LPSGD does, in two pictures and their tables: `python -m benchmarks.paper.demo`.

Writes quadratics.png, digits.png and digits.json into the output directory.
"""

import argparse
import json
import os
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from PIL import Image

from benchmarks.paper import digits, digits_report, quadratics


def save(figure: Figure, file: Path) -> None:
    """Writes a PNG that is 800 pixels wide, with a palette, which makes it a third as large."""
    figure.savefig(file, dpi=100)
    with Image.open(file) as image:
        image.convert("RGB").quantize(256).save(file, optimize=True)


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

    print(quadratics.table(), end="\n\n")
    save(quadratics.draw(), arguments.output / "quadratics.png")

    # Starting processes takes longer than the quick study itself.
    settings, jobs = (digits.QUICK, 1) if arguments.quick else (digits.Settings(), arguments.jobs)
    study = digits.study(settings, jobs)
    print(f"\n{digits_report.table(study, settings)}")
    print(f"Training took {study.seconds:.0f} s in all with {jobs} process(es).")
    save(digits_report.draw(study, settings), arguments.output / "digits.png")
    with open(arguments.output / "digits.json", "w", encoding="utf-8") as file:
        json.dump(digits_report.record(study, settings), file, indent=1, allow_nan=False)
    print(f"Pictures and figures are in {arguments.output}.")


if __name__ == "__main__":
    main()
