# SPDX-License-Identifier: MIT
"""The pictures of `lpsgd.experiments.geometry`: `python -m benchmarks.paper.toy`.

Writes quadratics.png, the paths; p-to-2.png and p-to-2.gif, what p does on the way.
"""

import argparse
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
from matplotlib.animation import FuncAnimation, PillowWriter
from matplotlib.axes import Axes

from benchmarks.paper.report import save
from lpsgd.experiments.geometry import (
    QUADRATICS,
    Quadratic,
    draw,
    draw_moment,
    draw_moments,
    paths,
    table,
)


def animate(f: Quadratic, file: Path) -> None:
    """Writes the same as an animation, of every second step."""
    figure, (above, below) = plt.subplots(1, 2, figsize=(4.8, 2.8), layout="constrained")
    path = paths(f)["LPSGD"]

    def frame(step: int) -> list[Axes]:
        above.clear()
        below.clear()
        draw_moment(above, below, f, path, step)
        return [above, below]

    FuncAnimation(figure, frame, frames=range(0, f.steps, 2)).save(
        file, PillowWriter(fps=4), dpi=80
    )
    plt.close(figure)


def main() -> None:
    """Writes all pictures."""
    parser = argparse.ArgumentParser(description="Draw LPSGD's paths on two quadratics.")
    parser.add_argument("--output", type=Path, default=Path("build/paper"), help="directory")
    directory = parser.parse_args().output
    matplotlib.use("Agg")
    directory.mkdir(parents=True, exist_ok=True)
    print(table())
    save(draw(), directory / "quadratics.png")
    _, weak = QUADRATICS
    save(draw_moments(weak), directory / "p-to-2.png")
    animate(weak, directory / "p-to-2.gif")


if __name__ == "__main__":
    main()
