"""Named colours, kept apart in OKLab (https://bottosson.github.io/posts/oklab/), and which one a pixel has.

Every shape has a named colour, and every background is muted: its chroma stays below BACKGROUND_CHROMA, less
than half of any named colour's. So a shape is told from what is behind it by colour alone, whatever the
textures.
"""

from functools import cache

import numpy as np

COLOURS = {
    "red": (222, 36, 44),
    "orange": (250, 138, 20),
    "yellow": (246, 222, 32),
    "green": (36, 164, 62),
    "cyan": (24, 204, 222),
    "blue": (36, 84, 232),
    "purple": (136, 48, 206),
    "pink": (252, 106, 190),
}
NAMES = tuple(COLOURS)
BACKGROUND = len(NAMES)  # the label of a pixel that has none of the colours

BACKGROUND_CHROMA = 0.045
MUTED = 0.25  # what is left of a photograph's colour behind shapes

# the matrices of that page: linear sRGB → cone responses → L, a, b
_TO_CONES = np.array(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
)
_TO_LAB = np.array(
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
)
_LIGHTNESS_WEIGHT = (
    0.5  # a shape's lightness varies more than its hue: shadows in a blurred edge, compression
)
_BITS = 6  # of each channel, in the table of labels


def oklab(rgb: np.ndarray) -> np.ndarray:
    """(…, 3) sRGB in 0…255 → (…, 3) OKLab."""
    value = np.asarray(rgb, dtype=np.float64) / 255
    linear = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    return np.cbrt(linear @ _TO_CONES.T) @ _TO_LAB.T


def from_oklab(lab: np.ndarray) -> np.ndarray:
    """(…, 3) OKLab → (…, 3) sRGB in 0…255, clipped to what a screen can show."""
    cones = (np.asarray(lab, dtype=np.float64) @ np.linalg.inv(_TO_LAB).T) ** 3
    linear = np.clip(cones @ np.linalg.inv(_TO_CONES).T, 0, 1)
    return 255 * np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)


def nearest_colour(rgb: np.ndarray) -> np.ndarray:
    """(…, 3) sRGB in 0…255 → index into NAMES, or BACKGROUND where the nearest of all is a grey."""
    lab = oklab(rgb)
    named = oklab(np.array(list(COLOURS.values())))
    difference = lab[..., None, :] - named
    difference[..., 0] *= _LIGHTNESS_WEIGHT
    distance = np.linalg.norm(difference, axis=-1)
    chroma = np.linalg.norm(lab[..., 1:], axis=-1)
    return np.where(distance.min(-1) < chroma, distance.argmin(-1), BACKGROUND).astype(np.uint8)


def labels(frames: np.ndarray) -> np.ndarray:
    """(…, 3) uint8 → (…) uint8, `nearest_colour` from a table."""
    red, green, blue = np.moveaxis(frames >> (8 - _BITS), -1, 0)
    return _table()[red, green, blue]


@cache
def _table() -> np.ndarray:
    level = (np.arange(2**_BITS) + 0.5) * 2 ** (8 - _BITS)
    return nearest_colour(np.stack(np.meshgrid(level, level, level, indexing="ij"), axis=-1))
