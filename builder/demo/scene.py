"""What a picture holds and what happens in it; the scenes of training and of the tests. Draws no pixel.

Training never sees: the photographs of `photographs.HELD_OUT`; the acting shapes for which `held_out` is
true, one colour in eight for every kind of shape and verb; the scenes of the tests, whose generators are
seeded with words.
"""

import itertools
import math
import random
from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np

from builder.demo.colours import BACKGROUND_CHROMA, NAMES, from_oklab
from builder.demo.geometry import KINDS, SYMMETRY, UPRIGHT
from builder.demo.motion import (
    CAMERA_VERBS,
    HOP_HEIGHT,
    MARGIN,
    MOVES,
    SECTION,
    SHAPE_VERBS,
    SIZE_LIMIT,
    SIZES,
    SPEEDS,
    TURNS,
    Action,
    amount,
    room_for,
)
from builder.demo.photographs import HELD_OUT, SEEN
from diffusers_helper.buckets import buckets

FRAME_SIZES = tuple(buckets(192))  # (height, width)
TEST_KINDS = ("one", "two", "combination", "camera", "speed", "aspect")

CAMERA_SHARE, CAMERA_SHARE_LONG = 0.25, 0.1  # of the scenes of training
PLAIN = ("flat", "gradient", "glow", "stripes", "checks")
TEXTURES = ("noise", "blobs")  # also before the camera: one sees in every direction how they move

_FAMILIES = (MOVES[:4], MOVES[4:], TURNS, SIZES, ("bounces",), ("changes colour",), ("stays",))
_WEIGHTS, _WEIGHTS_LONG = (6, 3, 4, 4, 2, 4, 1), (18, 18, 4, 10, 2, 4, 1)

_VIVID_CHROMA = 0.12  # of a texture that has no shapes to be told from
_RADII = {1: (0.13, 0.2), 2: (0.11, 0.17), 3: (0.1, 0.14)}  # by number of shapes, in shorter sides
_GAP = 0.03  # between shapes at all times, in shorter sides
_LOOKS = np.arange(0, 10 * SECTION + 1, 4.0)  # the times at which shapes are kept apart


class Pose(NamedTuple):
    """A shape over time, (T,) each: pixels, radians clockwise, share of the new colour."""

    x: np.ndarray
    y: np.ndarray
    radius: np.ndarray
    angle: np.ndarray
    mix: np.ndarray


@dataclass(frozen=True)
class Shape:
    kind: str
    colour: str
    x: float  # pixels, at the start
    y: float
    radius: float
    angle: float = 0.0
    action: Action | None = None  # None: it stays and nobody speaks of it

    def pose(self, times: np.ndarray, height: int, width: int) -> Pose:
        still = np.zeros(np.shape(times))
        x, y, radius = self.x + still, self.y + still, self.radius + still
        angle, mix = self.angle + still, still
        if self.action is None:
            return Pose(x, y, radius, angle, mix)
        short = min(height, width)
        match self.action.verb.split()[0]:
            case "moves":
                room = room_for(self.action, self.x, self.y, self.radius, height, width)
                path = short * amount(self.action, times, room)
                dx, dy = self.action.direction
                x, y = x + dx * path, y + dy * path
            case "bounces":
                y = y - short * amount(self.action, times)
            case "grows" | "shrinks":
                radius = radius * np.exp(self.action.sign * amount(self.action, times))
            case "turns":
                angle = angle + self.action.sign * amount(self.action, times)
            case "changes":
                mix = amount(self.action, times)
        return Pose(x, y, radius, angle, mix)


@dataclass(frozen=True)
class Background:
    kind: str  # of PLAIN or TEXTURES, or "photograph"
    colours: tuple[tuple[float, float, float], tuple[float, float, float]]  # sRGB, 0…255
    seed: int  # of where its waves and edges lie, or of the crop
    photograph: str | None = None


@dataclass(frozen=True)
class Event:
    """One thing that is said to happen, to a shape or (without colour and kind) to the camera."""

    action: Action
    colour: str | None = None
    kind: str | None = None


Meaning = tuple[Event, ...]


@dataclass(frozen=True)
class Scene:
    height: int
    width: int
    background: Background
    shapes: tuple[Shape, ...] = ()
    camera: Action | None = None

    @property
    def short(self) -> int:
        return min(self.height, self.width)

    @property
    def meaning(self) -> Meaning:
        """What its prompt says."""
        said = tuple(Event(s.action, s.colour, s.kind) for s in self.shapes if s.action)
        return said if self.camera is None else (Event(self.camera), *said)


def held_out(kind: str, colour: str, verb: str) -> bool:
    """True for one colour in eight of every kind and verb: no shape acts so in training."""
    return (NAMES.index(colour) + 3 * KINDS.index(kind) + 5 * SHAPE_VERBS.index(verb)) % len(NAMES) == 0


def train_scene(
    rng: random.Random,
    size: tuple[int, int] | None = None,
    photographs: Collection[str] = SEEN,
    long: bool = False,
) -> Scene:
    """One scene of training, of the size (height, width) or of any of FRAME_SIZES.

    Of `long` videos most are of moving shapes: far from where they began, they are the hardest to draw.
    """
    size = size or rng.choice(FRAME_SIZES)
    if rng.random() < (CAMERA_SHARE_LONG if long else CAMERA_SHARE):
        return _camera_scene(rng, size, photographs, bystanders=rng.choice((0, 0, 1, 2)))
    actors = _draw_actors(rng)
    bystanders = rng.choice((0, 1, 1, 2) if actors == 1 else (0, 0, 1))
    weights = _WEIGHTS_LONG if long else _WEIGHTS
    return _shape_scene(rng, size, photographs, actors, bystanders, weights=weights)


def draw_meaning(rng: random.Random) -> Meaning:
    """What a scene of training may be about, without the scene."""
    if rng.random() < CAMERA_SHARE:
        return (Event(_draw_action(rng, rng.choice(CAMERA_VERBS))),)
    actors = _draw_actors(rng)
    verbs = _draw_verbs(rng, actors, moving=False)
    while True:
        colours = rng.sample(NAMES, 2 * actors)
        events = tuple(
            Event(_draw_action(rng, verb, new), old, _draw_kind(rng, verb))
            for verb, old, new in zip(verbs, colours[:actors], colours[actors:], strict=True)
        )
        if not any(held_out(event.kind, event.colour, event.action.verb) for event in events):
            return events


def photograph_scene(rng: random.Random, size: tuple[int, int], photographs: Collection[str] = SEEN) -> Scene:
    """A camera before a photograph in its own colours."""
    return _camera_scene(rng, size, photographs, textures=())


def test_scenes(kind: str, count: int, photographs: Collection[str] = HELD_OUT) -> list[Scene]:
    """The first `count` scenes of a kind of TEST_KINDS, the same ones at every call.

    "one" shape; "two" or three shapes, of which one or two act; a "combination" that training never sees; a
    "camera" over photographs; "speed", slowly and fast in turn; "aspect", every size of frame in turn.
    """
    return [_test_scene(kind, index, random.Random(f"{kind} {index}"), photographs) for index in range(count)]


test_scenes.__test__ = False  # pytest collects what begins with "test"


def _test_scene(kind: str, index: int, rng: random.Random, photographs: Collection[str]) -> Scene:
    size = rng.choice(FRAME_SIZES)
    draw = partial(_shape_scene, rng, size, photographs)
    match kind:
        case "one":
            return draw(actors=1, bystanders=0)
        case "two":
            return draw(actors=1 + index % 2, bystanders=1 - index % 2 + rng.randrange(2))
        case "combination":
            return draw(actors=1, bystanders=rng.randrange(2), unseen=True)
        case "camera":
            return photograph_scene(rng, size, photographs)
        case "speed":
            return draw(actors=1, bystanders=rng.randrange(2), speed=("slowly", "fast")[index % 2])
        case "aspect":
            size = FRAME_SIZES[index % len(FRAME_SIZES)]
            return _shape_scene(rng, size, photographs, actors=1, bystanders=rng.randrange(2))
    raise ValueError(f"There are no test scenes {kind!r}; there are {', '.join(TEST_KINDS)}.")


def _shape_scene(
    rng: random.Random,
    size: tuple[int, int],
    photographs: Collection[str],
    actors: int,
    bystanders: int,
    unseen: bool = False,
    speed: str | None = None,
    weights: tuple[int, ...] = _WEIGHTS,
) -> Scene:
    """`actors` shapes that act, each with its own verb; with `unseen`, as none does in training."""
    verbs = _draw_verbs(rng, actors, moving=speed is not None, weights=weights)
    count = actors + bystanders
    while True:
        colours = rng.sample(NAMES, count + actors)  # the last ones are what colours change to
        shapes = []
        for index in range(count):
            action = None
            if index < actors:
                action = _draw_action(rng, verbs[index], colours[count + index], speed)
            shapes.append(_draw_shape(rng, size, colours[index], action, _RADII[count]))
        acts = [(shape.kind, shape.colour, shape.action.verb) for shape in shapes[:actors]]
        if all(held_out(*act) == unseen for act in acts) and _apart(shapes, size):
            rng.shuffle(shapes)
            return Scene(*size, _draw_background(rng, photographs, PLAIN + TEXTURES), tuple(shapes))


def _camera_scene(
    rng: random.Random,
    size: tuple[int, int],
    photographs: Collection[str],
    bystanders: int = 0,
    textures: tuple[str, ...] = TEXTURES,
) -> Scene:
    """A moving camera before a photograph or a texture, with or without shapes that stay where they are."""
    camera = _draw_action(rng, rng.choice(CAMERA_VERBS))
    while True:
        colours = rng.sample(NAMES, bystanders)
        shapes = [_draw_shape(rng, size, colour, None, _RADII[bystanders]) for colour in colours]
        if _apart(shapes, size):
            background = _draw_background(rng, photographs, textures, vivid=not shapes, photographic=0.7)
            return Scene(*size, background, tuple(shapes), camera)


def _draw_actors(rng: random.Random) -> int:
    return 1 if rng.random() < 0.7 else 2


def _draw_kind(rng: random.Random, verb: str) -> str:
    return rng.choice(tuple(SYMMETRY) if verb in TURNS else KINDS)


def _draw_verbs(
    rng: random.Random, count: int, moving: bool, weights: tuple[int, ...] = _WEIGHTS
) -> list[str]:
    """Different ones, by the weights of _FAMILIES; with `moving`, none that has no speed."""
    *others, stays = weights
    verbs = []
    while len(verbs) < count:
        (family,) = rng.choices(_FAMILIES, (*others, 0 if moving else stays))
        verb = rng.choice(family)
        if verb not in verbs:
            verbs.append(verb)
    return verbs


def _draw_action(
    rng: random.Random, verb: str, colour: str | None = None, speed: str | None = None
) -> Action:
    if verb == "stays":
        return Action(verb)
    speed = rng.choice(("", "", *SPEEDS)) if speed is None else speed
    return Action(verb, speed, colour if verb == "changes colour" else None)


def _draw_shape(
    rng: random.Random,
    size: tuple[int, int],
    colour: str,
    action: Action | None,
    radii: tuple[float, float],
) -> Shape:
    """A shape somewhere where its action has room for a section."""
    height, width = size
    short = min(size)
    radius = rng.uniform(*radii) * short
    verb = action.verb if action else "stays"
    kind = _draw_kind(rng, verb)
    clear = MARGIN * short + radius * (math.exp(SIZE_LIMIT) if verb == "grows" else 1)
    left, top, right, bottom = clear, clear, width - clear, height - clear
    if verb in MOVES:
        path = short * float(amount(action, SECTION))
        dx, dy = (path * step for step in action.direction)
        left, right = left + max(0, -dx), right - max(0, dx)
        top, bottom = top + max(0, -dy), bottom - max(0, dy)
    if verb == "bounces":
        top += HOP_HEIGHT * short
    angle = rng.uniform(0, math.tau) if rng.random() < 0.5 else UPRIGHT.get(kind, 0.0)
    return Shape(kind, colour, rng.uniform(left, right), rng.uniform(top, bottom), radius, angle, action)


def _apart(shapes: list[Shape], size: tuple[int, int]) -> bool:
    """Whether no two shapes come near each other in a long video."""
    poses = [shape.pose(_LOOKS, *size) for shape in shapes]
    return all(
        (np.hypot(a.x - b.x, a.y - b.y) > a.radius + b.radius + _GAP * min(size)).all()
        for a, b in itertools.combinations(poses, 2)
    )


def _draw_background(
    rng: random.Random,
    photographs: Collection[str],
    kinds: tuple[str, ...],
    vivid: bool = False,
    photographic: float = 0.2,
) -> Background:
    photograph = None
    if photographs and (not kinds or rng.random() < photographic):
        photograph = rng.choice(tuple(photographs))
    kind = "photograph" if photograph else rng.choice(kinds)
    chroma = _VIVID_CHROMA if vivid else BACKGROUND_CHROMA
    light = rng.uniform(0.3, 0.92)
    other = light + rng.choice((-1, 1)) * rng.uniform(0.12, 0.4)
    if not 0.25 <= other <= 0.95:
        other = 2 * light - other
    pair = tuple(_draw_colour(rng, lightness, chroma) for lightness in (light, other))
    return Background(kind, pair, rng.randrange(2**31), photograph)


def _draw_colour(rng: random.Random, lightness: float, most_chroma: float) -> tuple[float, float, float]:
    chroma, hue = rng.uniform(0, 0.9 * most_chroma), rng.uniform(0, math.tau)
    return tuple(from_oklab((lightness, chroma * math.cos(hue), chroma * math.sin(hue))).tolist())
