"""Which of the eleven plain colour words fit pixels: surely, or perhaps; in OKLCh, where hues are even."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white", "gray")

CLEAR_SHARE = 0.5
"""A thing has a colour if so much of it surely has."""
MOST_OF_ANOTHER = 0.3
"""... and at most so much surely has any other."""
ABSENT_SHARE = 0.08
"""A thing does not have a colour if at most so much of it perhaps has."""


@dataclass(frozen=True)
class _Range:
    """Lightness 0 to 1, chroma 0 to about .37, hue in degrees (from above to means through 0)."""

    lightness: tuple[float, float] = (0.0, 1.01)
    chroma: tuple[float, float] = (0.0, 1.0)
    hue: tuple[float, float] = (0.0, 360.0)

    def holds(self, lightness: np.ndarray, chroma: np.ndarray, hue: np.ndarray) -> np.ndarray:
        """Which pixels lie within, (N,) bool."""
        first, last = self.hue
        inside = (hue >= first) & (hue <= last) if first <= last else (hue >= first) | (hue <= last)
        inside &= (lightness >= self.lightness[0]) & (lightness <= self.lightness[1])
        return inside & (chroma >= self.chroma[0]) & (chroma <= self.chroma[1])


# The sure ranges leave gaps and the others overlap: between them a colour is disputable, and never asked for.
_SURE = {
    "red": _Range((0.38, 0.68), (0.13, 1.0), (10, 36)),
    "orange": _Range((0.62, 1.0), (0.12, 1.0), (46, 72)),
    "yellow": _Range((0.75, 1.01), (0.11, 1.0), (84, 112)),
    "green": _Range((0.30, 0.92), (0.07, 1.0), (122, 162)),
    "blue": _Range((0.25, 0.88), (0.06, 1.0), (222, 278)),
    "purple": _Range((0.20, 0.80), (0.07, 1.0), (292, 330)),
    "pink": _Range((0.68, 1.0), (0.07, 1.0), (338, 14)),
    "brown": _Range((0.25, 0.55), (0.035, 0.14), (35, 80)),
    "black": _Range((0.0, 0.32), (0.0, 0.05)),
    "white": _Range((0.88, 1.01), (0.0, 0.035)),
    "gray": _Range((0.42, 0.80), (0.0, 0.025)),
}
_PERHAPS = {
    "red": _Range((0.25, 0.75), (0.08, 1.0), (355, 48)),
    "orange": _Range((0.50, 1.0), (0.08, 1.0), (36, 84)),
    "yellow": _Range((0.60, 1.01), (0.06, 1.0), (74, 122)),
    "green": _Range((0.15, 1.01), (0.04, 1.0), (108, 190)),
    "blue": _Range((0.10, 1.01), (0.035, 1.0), (185, 295)),
    "purple": _Range((0.10, 1.0), (0.04, 1.0), (278, 345)),
    "pink": _Range((0.55, 1.01), (0.04, 1.0), (325, 40)),
    "brown": _Range((0.10, 0.70), (0.025, 0.20), (20, 95)),
    "black": _Range((0.0, 0.45), (0.0, 0.09)),
    "white": _Range((0.78, 1.01), (0.0, 0.07)),
    "gray": _Range((0.30, 0.90), (0.0, 0.06)),
}

_TO_CONES = np.array(
    [[0.4122214708, 0.5363325363, 0.0514459929], [0.2119034982, 0.6806995451, 0.1073969566],
     [0.0883024619, 0.2817188376, 0.6299787005]]
)  # fmt: skip
_TO_OKLAB = np.array(
    [[0.2104542553, 0.7936177850, -0.0040720468], [1.9779984951, -2.4285922050, 0.4505937099],
     [0.0259040371, 0.7827717662, -0.8086757660]]
)  # fmt: skip


def oklch(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lightness, chroma and hue (degrees) of sRGB pixels, each (N,). pixels (N, 3), 0 to 255."""
    value = np.clip(np.asarray(pixels, np.float64) / 255, 0, 1)
    linear = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    lab = np.cbrt(linear @ _TO_CONES.T) @ _TO_OKLAB.T
    hue = np.degrees(np.arctan2(lab[:, 2], lab[:, 1])) % 360
    return lab[:, 0], np.hypot(lab[:, 1], lab[:, 2]), hue


def color_verdicts(pixels: np.ndarray) -> np.ndarray:
    """Whether pixels of one thing have each colour: 1 yes, -1 no, 0 disputable; (len(COLORS),) int8.

    Args:
        pixels: (N, 3), sRGB 0 to 255, at least one.
    """
    place = oklch(pixels)
    sure = np.array([_SURE[color].holds(*place).mean() for color in COLORS])
    perhaps = np.array([_PERHAPS[color].holds(*place).mean() for color in COLORS])
    verdicts = np.zeros(len(COLORS), np.int8)
    verdicts[perhaps <= ABSENT_SHARE] = -1
    best = int(sure.argmax())
    if sure[best] >= CLEAR_SHARE and np.delete(sure, best).max() <= MOST_OF_ANOTHER:
        verdicts[best] = 1
    return verdicts
