"""Frames → what the camera did: one shift and one magnification of the whole picture, by its brightness.

Between two frames, shift and magnification are what best explains the difference by the gradients (Lucas and
Kanade's equations with three unknowns), from coarse to fine. Over a clip these steps are summed up.
"""

import itertools
from dataclasses import dataclass

import numpy as np

STEP = 3  # frames from one comparison to the next: a motion of a few pixels, well above the error of one step
_LEVELS = (8, 4, 2)  # pixels of the frame to one of the compared pictures
_ROUNDS = 4
_LUMA = (0.299, 0.587, 0.114)


@dataclass(frozen=True)
class CameraPath:
    """Of the camera since the first frame, (N,) each, at the clip's frames `times`."""

    times: np.ndarray
    x: np.ndarray  # pixels to the right
    y: np.ndarray  # pixels down
    zoom: np.ndarray  # log of the magnification


def camera_path(frames: np.ndarray) -> CameraPath:
    """(T, H, W, 3) uint8 → the camera's path at every STEP-th frame and the last."""
    times = np.unique([*range(0, len(frames), STEP), len(frames) - 1])
    grey = frames[times] @ np.array(_LUMA, dtype=np.float32)
    steps = [_step(before, after) for before, after in itertools.pairwise(grey)]
    x, y, zoom = np.cumsum([(0, 0, 0), *steps], axis=0).T
    return CameraPath(times, x, y, zoom)


def _step(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """(x, y, log magnification) of the camera between two grey pictures."""
    estimate = np.zeros(3)
    for size in _LEVELS:
        first, second = _shrunk(before, size), _shrunk(after, size)
        gradient_y, gradient_x = np.gradient(first)
        rows, columns = (np.arange(n) + 0.5 - n / 2 for n in first.shape)
        inside = np.s_[1:-1, 1:-1]
        # first(p) = second(p · magnification − shift): its derivatives by the two shifts and the log
        design = np.stack(
            [-gradient_x, -gradient_y, gradient_x * columns + gradient_y * rows[:, None]], axis=-1
        )
        for _ in range(_ROUNDS):
            shift_x, shift_y, zoom = estimate / (size, size, 1)
            scale = np.exp(zoom)
            moved, seen = _sampled(second, columns * scale - shift_x, rows * scale - shift_y)
            seen = seen[inside]
            error = (first - moved)[inside][seen]
            update, *_ = np.linalg.lstsq(design[inside][seen], error, rcond=1e-4)
            estimate = estimate + update * (size, size, 1)
    return estimate


def _shrunk(picture: np.ndarray, size: int) -> np.ndarray:
    """Means over size × size pixels, less the mean of all."""
    height, width = (n // size * size for n in picture.shape)
    blocks = picture[:height, :width].reshape(height // size, size, width // size, size).mean((1, 3))
    return blocks - blocks.mean()


def _sampled(picture: np.ndarray, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The picture at columns x and rows y from its middle, linearly between pixels, and where it reaches."""
    rows, along_y, seen_y = _between(y, picture.shape[0])
    columns, along_x, seen_x = _between(x, picture.shape[1])
    across = picture[:, columns] * (1 - along_x) + picture[:, columns + 1] * along_x
    sampled = across[rows] * (1 - along_y)[:, None] + across[rows + 1] * along_y[:, None]
    return sampled, seen_y[:, None] & seen_x


def _between(at: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    index = at + length / 2 - 0.5
    low = np.clip(np.floor(index).astype(int), 0, length - 2)
    return low, np.clip(index - low, 0, 1), (index >= 0) & (index <= length - 1)
