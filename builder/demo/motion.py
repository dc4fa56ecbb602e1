"""Verbs, speeds, and how much of an action has happened at a time.

Times are frames since the start image, any real t ≥ 0. `amount` is the one definition of every motion; the
world draws by it and the measures compare with it. Per frame at the ordinary speed ("slowly" is half, "fast"
twice):

| action  | amount                        | rate        | in a long video                             |
|---------|-------------------------------|-------------|---------------------------------------------|
| moves   | path, in shorter sides        | 0.006       | stops MARGIN before the first edge it meets |
| turns   | angle, in radians             | π/72 (2.5°) | goes on forever; a quarter in a section     |
| grows   | log of the size ratio         | ln 1.8 / 48 | stops at 1.8 times the size                 |
| shrinks | the same, of the inverse      | ln 1.8 / 48 | stops at 1/1.8 of the size                  |
| bounces | height, in shorter sides      | see below   | goes on forever, each hop 0.12 high         |
| changes | share of the way to the colour| 1/18        | keeps the new colour                        |
| stays   | nothing                       |             |                                             |
| pans    | path, in shorter sides        | 0.006       | stops after 0.45                            |
| zooms   | log of the magnification      | ln 1.6 / 72 | stops at 1.6 times, or 1/1.6                |

A section of a video is 36 frames. A hop takes 36, 24 or 18 ("slowly", "", "fast"), so that even a slow one is
seen to come down again within a section.
"""

import math
from dataclasses import dataclass

import numpy as np

SECTION = 36  # frames of one section; every action has room for this long
SPEEDS = {"slowly": 0.5, "": 1.0, "fast": 2.0}

_HALF = math.sqrt(0.5)
DIRECTIONS = {
    "right": (1.0, 0.0),
    "left": (-1.0, 0.0),
    "up": (0.0, -1.0),
    "down": (0.0, 1.0),
    "up and right": (_HALF, -_HALF),
    "up and left": (-_HALF, -_HALF),
    "down and right": (_HALF, _HALF),
    "down and left": (-_HALF, _HALF),
}
MOVES = tuple(f"moves {direction}" for direction in DIRECTIONS)
TURNS = ("turns clockwise", "turns counterclockwise")
SIZES = ("grows", "shrinks")
SHAPE_VERBS = (*MOVES, *TURNS, *SIZES, "bounces", "changes colour", "stays")
PANS = tuple(f"pans {direction}" for direction in ("right", "left", "up", "down"))
ZOOMS = ("zooms in", "zooms out")
CAMERA_VERBS = (*PANS, *ZOOMS)

MARGIN = 0.04  # of the shorter side, between a shape and the frame's edge
MOVE_RATE = 0.006
TURN_RATE = math.pi / 72
SIZE_LIMIT = math.log(1.8)
SIZE_RATE = SIZE_LIMIT / 48
HOP_FRAMES = {"slowly": 36, "": 24, "fast": 18}
HOP_HEIGHT = 0.12
CHANGE_FRAMES = 18
PAN_RATE = 0.006
PAN_LIMIT = 0.45
ZOOM_LIMIT = math.log(1.6)
ZOOM_RATE = ZOOM_LIMIT / 72


@dataclass(frozen=True)
class Action:
    verb: str  # of SHAPE_VERBS or CAMERA_VERBS
    speed: str = ""  # of SPEEDS
    colour: str | None = None  # what "changes colour" ends with

    @property
    def direction(self) -> tuple[float, float]:
        """Unit vector, x to the right and y down, of what moves or pans."""
        return DIRECTIONS[self.verb.split(maxsplit=1)[1]]

    @property
    def sign(self) -> int:
        """Of what turns (clockwise is positive, as y points down), grows or zooms."""
        return -1 if self.verb in {"turns counterclockwise", "shrinks", "zooms out"} else 1


def amount(action: Action, times: np.ndarray, room: float = math.inf) -> np.ndarray:
    """How much has happened at each time, unsigned and in the units above; `room` is what `room_for` says."""
    t = np.asarray(times, dtype=np.float64) * SPEEDS[action.speed]
    match action.verb.split()[0]:
        case "moves":
            return np.minimum(MOVE_RATE * t, room)
        case "turns":
            return TURN_RATE * t
        case "grows" | "shrinks":
            return np.minimum(SIZE_RATE * t, SIZE_LIMIT)
        case "bounces":
            phase = np.asarray(times) / HOP_FRAMES[action.speed] % 1
            return HOP_HEIGHT * 4 * phase * (1 - phase)
        case "changes":
            return np.minimum(t / CHANGE_FRAMES, 1)
        case "pans":
            return np.minimum(PAN_RATE * t, PAN_LIMIT)
        case "zooms":
            return np.minimum(ZOOM_RATE * t, ZOOM_LIMIT)
        case "stays":
            return np.zeros_like(t)
    raise ValueError(f"Nothing {action.verb!r} in this world.")


def room_for(action: Action, x: float, y: float, radius: float, height: float, width: float) -> float:
    """How far a shape at (x, y) can go until its edge is within MARGIN of the frame's, in shorter sides."""
    short = min(height, width)
    clear = radius + MARGIN * short
    along = []
    for step, position, length in zip(action.direction, (x, y), (width, height), strict=True):
        if step:
            way = length - clear - position if step > 0 else position - clear
            along.append(way / abs(step))
    return max(0.0, min(along) / short)
