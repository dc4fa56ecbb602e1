"""Frames and what was asked → was it done, and how far. Judges by the pixels; is told the meaning, no scene.

Clips are (T, H, W, 3) uint8 from the start image on; to ask several things of one, give its Tracks instead.
Lengths are in shorter sides of the frame, as in motion.py, whose `amount` is what the measured course is
compared with. An event has been followed when all of these hold:

* the shape is found by its colour in the first and the last frame, and in FOUND of all frames;
* the course is the asked one: what was measured, fitted as a multiple of what should be, is that times RATIO,
  and differs from the multiple by less than MISFIT (root mean square against root mean square);
* with "slowly" or "fast", no other speed's course is nearer to the measured one;
* nothing else happens to the shape. What moves goes less than ASIDE of its path to the side, what turns,
  grows or changes colour moves less than STILL, and what is not to grow keeps its size within STEADY. What
  stays does not turn by UNTURNED either;
* a new colour is nearer to the asked one than to any other.

What only the truth can tell is left to PSNR: whether the background stays, whether a shape that moves also
turns.
"""

import math
from dataclasses import dataclass, replace

import numpy as np

from builder.demo.colours import COLOURS, NAMES, nearest_colour
from builder.demo.geometry import SYMMETRY
from builder.demo.motion import SECTION, SPEEDS, Action, amount, room_for
from builder.demo.scene import Event, Meaning
from builder.demo.tracks import Track, Tracks

FOUND = 0.9
RATIO = (0.6, 1.6)
MISFIT = 0.35
ASIDE = math.tan(math.radians(22.5))  # half way to the next of the eight directions
STILL = 0.05
STEADY = math.log(1.15)
UNTURNED = math.radians(20)
KEPT = (0.6, 1.6)  # of the size it should have, for a shape that is still there


@dataclass(frozen=True)
class Course:
    """How one event went: (N,) measured, and as it should be; and whether anything else happened."""

    measured: np.ndarray
    asked: np.ndarray
    speed_fits: bool = True
    alone: bool = True

    @property
    def ratio(self) -> float:
        """The multiple of the asked course that is nearest to the measured one; 0 with no way to go."""
        return float(self.measured @ self.asked / max(self.asked @ self.asked, 1e-9))

    @property
    def misfit(self) -> float:
        multiple = self.ratio * self.asked
        return float(np.linalg.norm(self.measured - multiple) / max(np.linalg.norm(multiple), 1e-9))

    @property
    def followed(self) -> bool:
        fits = RATIO[0] <= self.ratio <= RATIO[1] and self.misfit < MISFIT
        return bool(fits and self.speed_fits and self.alone)


@dataclass(frozen=True)
class Drift:
    """The last section's statistics against the first one's."""

    brightness: float  # difference of the means, in grey levels
    contrast: float  # ratio of the standard deviations
    sharpness: float  # ratio of the mean steps from pixel to pixel
    chroma: float  # ratio of the mean distances from grey


def followed(frames: np.ndarray | Tracks, meaning: Meaning) -> bool:
    """Whether everything asked happens in the clip."""
    tracks = _tracks(frames)
    return all(_followed(tracks, event) for event in meaning)


def travel_ratios(frames: np.ndarray | Tracks, meaning: Meaning) -> list[float]:
    """Of every event that goes anywhere, how far it went: 1 is as far as asked, 0 nowhere or not there."""
    tracks = _tracks(frames)
    courses = [_course(tracks, event) for event in meaning if event.action.verb != "stays"]
    return [course.ratio if course else 0.0 for course in courses]


def bystanders_stay(frames: np.ndarray | Tracks, meaning: Meaning) -> list[bool]:
    """For every shape of the first frame that the prompt does not name: whether it keeps its place and size.

    None are reported before a moving camera, where nothing keeps its place.
    """
    if any(event.kind is None for event in meaning):
        return []
    tracks = _tracks(frames)
    named = {event.colour for event in meaning}
    return [
        _is_there(tracks.of(colour)) and _stays(tracks, tracks.of(colour))
        for colour in tracks.present()
        if colour not in named
    ]


def shapes_kept(frames: np.ndarray | Tracks, meaning: Meaning) -> list[bool]:
    """For every named shape: whether the last frame has it, in its colour and about its size by then."""
    tracks = _tracks(frames)
    kept = []
    for event in meaning:
        if event.kind is not None:
            track = tracks.of(event.colour)
            first = track.place(0)
            done = float(amount(event.action, len(tracks.frames) - 1))
            changed = event.action.colour is not None and done > 0.5
            last = tracks.at_the_end(event.action.colour, first) if changed else track.place(-1)
            grown = event.action.sign * done if event.action.verb in {"grows", "shrinks"} else 0.0
            kept.append(
                bool(KEPT[0] <= last.spread / first.spread / math.exp(grown) <= KEPT[1])
            )  # NaN: not there
    return kept


def drift(frames: np.ndarray, section: int = SECTION) -> Drift:
    """ValueError when the clip has not two sections."""
    if len(frames) < 2 * section:
        raise ValueError(f"Drift needs {2 * section} frames or more, not {len(frames)}.")
    first, last = (_statistics(part) for part in (frames[:section], frames[-section:]))
    return Drift(
        last[0] - first[0], *(float(b / max(a, 1e-6)) for a, b in zip(first[1:], last[1:], strict=True))
    )


def _statistics(frames: np.ndarray) -> tuple[float, float, float, float]:
    """Mean, standard deviation, mean step between neighbours and mean distance from grey."""
    frames = frames.astype(np.float32)
    grey = frames.mean(-1)
    steps = np.abs(np.diff(grey, axis=1)).mean() + np.abs(np.diff(grey, axis=2)).mean()
    return float(grey.mean()), float(grey.std()), float(steps), float(np.abs(frames - grey[..., None]).mean())


def _tracks(frames: np.ndarray | Tracks) -> Tracks:
    return frames if isinstance(frames, Tracks) else Tracks(frames)


def _followed(tracks: Tracks, event: Event) -> bool:
    if event.action.verb == "stays":
        track = tracks.of(event.colour)
        return _is_there(track) and _stays(tracks, track) and _unturned(tracks, event)
    course = _course(tracks, event)
    return course is not None and course.followed


def _course(tracks: Tracks, event: Event) -> Course | None:
    """None when the shape is not there."""
    if event.kind is None:
        return _camera_course(tracks, event.action)
    if event.action.verb == "changes colour":
        return _colour_course(tracks, event)
    track = tracks.of(event.colour)
    return _shape_course(tracks, track, event) if _is_there(track) else None


def _shape_course(tracks: Tracks, track: Track, event: Event) -> Course:
    action = event.action
    height, width = tracks.height, tracks.width
    times, x, y = np.flatnonzero(track.found), *_shift(tracks, track)
    size = _growth(track)
    rest, steady = np.hypot(x, y).max() < STILL, np.abs(size).max() < STEADY
    room = math.inf
    match action.verb.split()[0]:
        case "moves":
            room = room_for(action, track.x[0], track.y[0], track.radius(event.kind)[0], height, width)
            measured, aside = _along(action, x, y)
            alone = steady and np.abs(aside).max() < ASIDE * max(measured.max(), STILL)
        case "turns":
            measured, alone = (
                action.sign * tracks.turned(event.colour, event.kind)[track.found],
                rest and steady,
            )
        case "grows" | "shrinks":
            measured, alone = action.sign * size, rest
        case "bounces":
            measured, alone = -y, np.abs(x).max() < STILL and steady
    return _compared(action, times, measured, alone, room)


def _colour_course(tracks: Tracks, event: Event) -> Course | None:
    """By the mean colour where the shape was in the first frame, away from its edge."""
    old = tracks.of(event.colour).place(0)
    if not old.area:
        return None
    place = _inner(tracks.mask(event.colour, 0))
    colours = tracks.smooth[:, place].mean(1)
    way = np.subtract(COLOURS[event.action.colour], COLOURS[event.colour])
    measured = (colours - colours[0]) @ way / (way @ way)
    times = np.arange(len(measured))
    alone = True
    if amount(event.action, times[-1]) > 0.9:
        ends_so = NAMES.index(event.action.colour) == nearest_colour(colours[-1])
        new = tracks.at_the_end(event.action.colour, old)
        shift = math.hypot(new.x - old.x, new.y - old.y) / min(tracks.height, tracks.width)
        grown = abs(math.log(new.spread / old.spread))
        # twice the usual tolerance, as colours are found up to different depths of a blurred edge
        alone = ends_so and shift < STILL and grown < 2 * STEADY  # false where it is not found: NaN
    return _compared(event.action, times, measured, alone)


def _inner(mask: np.ndarray, pixels: int = 2) -> np.ndarray:
    """The mask less its edge, or all of it when nothing else is left."""
    sides = [np.roll(mask, step, axis) for axis in (0, 1) for step in (-pixels, pixels)]
    inner = np.logical_and.reduce([mask, *sides])
    return inner if inner.any() else mask


def _camera_course(tracks: Tracks, action: Action) -> Course:
    path = tracks.camera
    short = min(tracks.height, tracks.width)
    x, y = path.x / short, path.y / short
    if action.verb.startswith("zooms"):
        measured, alone = action.sign * path.zoom, np.hypot(x, y).max() < 2 * STILL
    else:
        measured, aside = _along(action, x, y)
        alone = (
            np.abs(aside).max() < ASIDE * max(measured.max(), STILL) and np.abs(path.zoom).max() < 2 * STILL
        )
    return _compared(action, path.times, measured, alone)


def _compared(
    action: Action, times: np.ndarray, measured: np.ndarray, alone: bool, room: float = math.inf
) -> Course:
    misses = {
        speed: np.linalg.norm(measured - amount(replace(action, speed=speed), times, room))
        for speed in SPEEDS
    }
    speed_fits = action.speed == "" or misses[action.speed] == min(misses.values())
    return Course(measured, amount(action, times, room), speed_fits, bool(alone))


def _along(action: Action, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A shift's part in the action's direction, and its part to the side."""
    dx, dy = action.direction
    return x * dx + y * dy, x * dy - y * dx


def _is_there(track: Track) -> bool:
    return bool(track.found[0] and track.found[-1] and track.found.mean() >= FOUND)


def _stays(tracks: Tracks, track: Track) -> bool:
    x, y = _shift(tracks, track)
    return bool(np.hypot(x, y).max() < STILL and np.abs(_growth(track)).max() < STEADY)


def _unturned(tracks: Tracks, event: Event) -> bool:
    return event.kind not in SYMMETRY or bool(
        np.abs(tracks.turned(event.colour, event.kind)).max() < UNTURNED
    )


def _shift(tracks: Tracks, track: Track) -> tuple[np.ndarray, np.ndarray]:
    """x and y from the first frame on, where it is found, in shorter sides."""
    short = min(tracks.height, tracks.width)
    return (track.x[track.found] - track.x[0]) / short, (track.y[track.found] - track.y[0]) / short


def _growth(track: Track) -> np.ndarray:
    """Log of the size ratio to the first frame, where it is found."""
    return np.log(track.spread[track.found] / track.spread[0])
