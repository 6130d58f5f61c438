# SPDX-License-Identifier: MIT
"""The pictures' colours, as those see them who see no red or no green."""

from itertools import combinations

import numpy as np
import pytest
from matplotlib.colors import to_rgb

from lpsgd.experiments._style import STYLES

# Machado, Oliveira and Fernandes 2009, of linear RGB.
EYES = {
    "three colours": np.eye(3),
    "no red": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "no green": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
}
XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


def lab(color, eyes):
    """CIELAB's coordinates of what these eyes see."""
    rgb = np.array(to_rgb(color))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    xyz = XYZ @ np.clip(np.array(eyes) @ linear, 0, 1) / XYZ.sum(axis=1)
    x, y, z = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("eyes", EYES.values(), ids=EYES)
def test_colours_can_be_told_apart(eyes):
    """By 15 at least, where 2.3 is what can just be noticed side by side."""
    for one, other in combinations(sorted({color for color, _ in STYLES.values()}), 2):
        assert np.linalg.norm(lab(one, eyes) - lab(other, eyes)) > 15, (one, other)
