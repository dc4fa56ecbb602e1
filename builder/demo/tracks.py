"""Frames → where the pixels of one named colour are: centre, size and angle, frame by frame.

Knows nothing of a scene: a colour is found by `colours.labels` after a mean over 3 × 3 pixels (against
noise), and pixels far from the others' middle are left out (against stray ones in a background).
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from builder.demo.colours import NAMES, labels
from builder.demo.flow import CameraPath, camera_path
from builder.demo.geometry import AREA, SYMMETRY

LEAST_AREA = 0.001  # of the frame, for a colour to be there
_REACH = 2.0  # pixels further from the middle are not the shape's, in radii of a circle of its area


class Place(NamedTuple):
    """Where a colour is in one frame."""

    x: float
    y: float
    area: float  # pixels; 0 where the colour is not there, and the others NaN
    spread: float = (
        math.nan
    )  # root mean square distance from the centre: what blur and thin arms change least


NOWHERE = Place(math.nan, math.nan, 0)


@dataclass(frozen=True)
class Track:
    """A colour's places over time, (T,) each."""

    x: np.ndarray
    y: np.ndarray
    area: np.ndarray
    spread: np.ndarray

    def place(self, frame: int) -> Place:
        return Place(self.x[frame], self.y[frame], self.area[frame], self.spread[frame])

    @property
    def found(self) -> np.ndarray:
        return self.area > 0

    def radius(self, kind: str) -> np.ndarray:
        """Of a shape of that kind with this area."""
        return np.sqrt(self.area / AREA[kind])


class Tracks:
    """The colours of one clip, (T, H, W, 3) uint8, and its camera; each is found once, when asked for."""

    def __init__(self, frames: np.ndarray):
        self.frames = frames
        self.height, self.width = frames.shape[1:3]
        self._tracks: dict[str, Track] = {}

    @cached_property
    def smooth(self) -> np.ndarray:
        """The frames' means over 3 × 3 pixels, uint8."""
        return np.stack([_mean_3x3(frame) for frame in self.frames])

    @cached_property
    def labels(self) -> np.ndarray:
        return labels(self.smooth)

    @cached_property
    def camera(self) -> CameraPath:
        return camera_path(self.frames)

    def of(self, colour: str) -> Track:
        if colour not in self._tracks:
            self._tracks[colour] = self._followed(colour)
        return self._tracks[colour]

    def present(self) -> list[str]:
        """The colours of the first frame that are shapes there: many pixels, close together."""
        return [colour for colour in NAMES if self._is_compact(colour)]

    def at_the_end(self, colour: str, place: Place) -> Place:
        """Of a colour in the last frame, about a place where another one was."""
        return self._place(colour, -1, place)

    def mask(self, colour: str, frame: int) -> np.ndarray:
        return self.labels[frame] == NAMES.index(colour)

    def turned(self, colour: str, kind: str) -> np.ndarray:
        """Radians clockwise since the first frame, (T,); from frame to frame it is below half a symmetry."""
        track, points = self.of(colour), SYMMETRY[kind]
        phase = [
            _phase(self.mask(colour, frame), track.place(frame), points) for frame in range(len(self.frames))
        ]
        return (np.unwrap(phase) - phase[0]) / points

    def _is_compact(self, colour: str) -> bool:
        area = self.of(colour).area[0]
        return area > 0 and area > 0.7 * self.mask(colour, 0).sum()

    def _followed(self, colour: str) -> Track:
        """In each frame near its place in the frame before: another shape may pass through its colour."""
        places, last = [], None
        for frame in range(len(self.frames)):
            place = self._place(colour, frame, last)
            places.append(place)
            last = place if place.area else last
        return Track(*np.array(places).T)

    def _place(self, colour: str, frame: int, near: Place | None) -> Place:
        points = np.argwhere(self.mask(colour, frame))[:, ::-1] + 0.5
        if near is not None:
            points = _near(points, near)
        for _ in range(2):
            if len(points):
                points = _near(points, Place(*np.median(points, axis=0), len(points)))
        if len(points) < LEAST_AREA * self.height * self.width:
            return NOWHERE
        x, y = points.mean(axis=0)
        return Place(x, y, len(points), math.sqrt(np.square(points - (x, y)).sum(-1).mean()))


def _mean_3x3(frame: np.ndarray) -> np.ndarray:
    padded = np.pad(frame, ((1, 1), (1, 1), (0, 0)), mode="edge").astype(np.uint16)
    rows = padded[:-2] + padded[1:-1] + padded[2:]
    return ((rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:] + 4) // 9).astype(np.uint8)


def _near(points: np.ndarray, place: Place) -> np.ndarray:
    distance = np.hypot(points[:, 0] - place.x, points[:, 1] - place.y)
    return points[distance <= _REACH * math.sqrt(place.area / math.pi)]


def _phase(mask: np.ndarray, place: Place, points: int) -> float:
    """Of the mask's part with so many equal points: `points` times the angle of one of them."""
    if not place.area:
        return 0.0
    part = _near(np.argwhere(mask)[:, ::-1] + 0.5, place) - (place.x, place.y)
    distance, angle = np.hypot(*part.T), points * np.arctan2(part[:, 1], part[:, 0])
    return math.atan2((distance**2 * np.sin(angle)).sum(), (distance**2 * np.cos(angle)).sum())
