# SPDX-License-Identifier: MIT
"""One colour and one line for a method, in every picture, and names at the ends of lines.

A colour is a family, a line tells relatives apart. The colours are Okabe and Ito's and one more;
those who see no red or no green can tell them apart (tests/experiments/test_style.py simulates it).
"""

from collections.abc import Iterable
from itertools import product
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ORANGE, SKY, GREEN, BLUE = "#E69F00", "#56B4E9", "#009E73", "#0072B2"
VERMILLION, PURPLE, BLACK, WINE = "#D55E00", "#CC79A7", "#000000", "#882255"
GREY = "#CCCCCC"

#: Colour and line of matplotlib's.
STYLES = {
    "AdamW": (BLUE, "-"),
    "NAdamW": (BLUE, "--"),
    "cautious AdamW": (BLUE, ":"),
    "SGDM": (ORANGE, "-"),
    "SGD": (ORANGE, "--"),
    "Lion": (SKY, "-"),
    "LPSGDM 6→2": (GREEN, "-"),
    "LPSGD 6→2": (GREEN, "--"),
    "LPSGDM 6→2 κ=1e-4": (GREEN, "-."),
    "LPSGDM p=2": (VERMILLION, "-"),
    "LPSGDM p=3": (WINE, "--"),
    "LPSGDM p=6": (PURPLE, "-"),
    "LPSGDM p=11": (WINE, "-"),
    "LPSGDM p=∞": (BLACK, "-"),
    # The battery's
    "SGDM (Nesterov)": (ORANGE, "-"),
    "p=∞ (Signum)": (BLACK, "-"),
    "p=∞ (one byte)": (BLACK, ":"),
    "p=11 (PowerStep)": (WINE, "-"),
    "p=6": (PURPLE, "-"),
    "p=6 (one byte)": (PURPLE, ":"),
    "p 6→2": (GREEN, "-"),
    "p 6→2 (pivot)": (GREEN, "-."),
    "p 3→20 (pivot)": (VERMILLION, "-."),
    # What is timed. SGD has momentum there.
    "LPSGDM p=4": (GREEN, "-"),
    "SGD fused": (ORANGE, "-"),
    "SGD foreach": (ORANGE, "--"),
    "AdamW fused": (BLUE, "-"),
    "eager LPSGDM": (GREEN, ":"),
    "memory": (GREY, "-"),
    # The paper's quadratics
    "gradient descent": (ORANGE, "--"),
    "sign descent": (BLACK, "-"),
    "LPSGD": (GREEN, "-"),
}


def style(name: str) -> tuple[str, str]:
    """The colour and line of a method; of those without a place above, by what p does.

    Example:
        >>> style("LPSGDM 8→2") == STYLES["LPSGDM 6→2"]
        True
    """
    return styles([name])[name]


def styles(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Those of all methods of a picture: what is unknown here gets what no other has."""
    found = {}
    for name in names:
        relative = "LPSGDM 6→2 κ=1e-4" if "κ=" in name else "LPSGDM 6→2" if "→" in name else name
        found[name] = STYLES.get(name) or STYLES.get(relative)
    colors = (SKY, VERMILLION, WINE, PURPLE, ORANGE, BLUE, GREEN, BLACK)
    free = ((color, line) for line, color in product(("-", "--", ":", "-."), colors))
    unused = (one for one in free if one not in found.values())
    return {name: known or next(unused) for name, known in found.items()}


def label_lines(axes: "Axes", ends: Iterable[tuple[float, str, str]]) -> None:
    """Names lines to the right of the axes: y of a line's end, its name and its colour, moved apart
    where names would overlap. The lines must have been drawn."""
    size = 9
    axes.figure.draw_without_rendering()  # type: ignore[union-attr]
    gap = 1.4 * size / 72 * axes.figure.dpi / axes.get_window_extent().height
    to_axes = axes.transData + axes.transAxes.inverted()
    left = axes.get_xlim()[0]
    placed = sorted(
        (float(to_axes.transform((left, y))[1]), name, color) for y, name, color in ends
    )
    places = [place for place, *_ in placed]
    for i in range(1, len(places)):
        places[i] = max(places[i], places[i - 1] + gap)
    ceiling = 1.0
    for i in reversed(range(len(places))):
        places[i] = min(places[i], ceiling)
        ceiling = places[i] - gap
    for place, (_, name, color) in zip(places, placed, strict=True):
        axes.annotate(
            name, (1.02, place), xycoords="axes fraction", color=color, va="center", fontsize=size
        )
