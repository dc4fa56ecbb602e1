"""Wrong prompts for a scene: what did not happen in it, to see what a measure or a model makes of that."""

import random
from dataclasses import replace

from builder.demo.colours import NAMES
from builder.demo.geometry import SYMMETRY
from builder.demo.motion import CAMERA_VERBS, SHAPE_VERBS, Action
from builder.demo.scene import Event, Meaning, Scene

CONTROLS = ("reversed", "other object", "other verb", "other speed")

_OPPOSITES = (
    ("up", "down"),
    ("right", "left"),
    ("counterclockwise", "clockwise"),
    ("grows", "shrinks"),
    ("in", "out"),
)
_OTHER_WAY = {a: b for pair in _OPPOSITES for a, b in (pair, pair[::-1])}


def wrong_meanings(scene: Scene, rng: random.Random) -> dict[str, Meaning]:
    """For each of CONTROLS that the scene allows, its meaning with one event made wrong."""
    meaning = scene.meaning
    at = rng.randrange(len(meaning))
    event = meaning[at]
    wrong = {
        "reversed": _reversed(event),
        "other object": _of_another(event, scene, rng),
        "other verb": _doing_another(event, rng),
        "other speed": _at_another_speed(event),
    }
    return {name: (*meaning[:at], new, *meaning[at + 1 :]) for name, new in wrong.items() if new}


def _reversed(event: Event) -> Event | None:
    verb = " ".join(_OTHER_WAY.get(word, word) for word in event.action.verb.split())
    return replace(event, action=replace(event.action, verb=verb)) if verb != event.action.verb else None


def _of_another(event: Event, scene: Scene, rng: random.Random) -> Event | None:
    """Of a shape that is there, if there is another one, else of one that is not."""
    if event.kind is None or event.action.verb == "stays":
        return None  # the others stay too
    others = [
        s for s in scene.shapes if s.colour != event.colour and (s.action is None or s.action != event.action)
    ]
    if others:
        other = rng.choice(others)
        if "turns" in event.action.verb and other.kind not in SYMMETRY:
            return None  # nobody can see whether that turns
        return replace(event, colour=other.colour, kind=other.kind)
    absent = [name for name in NAMES if name not in {event.colour, event.action.colour}]
    return replace(event, colour=rng.choice(absent))


def _doing_another(event: Event, rng: random.Random) -> Event:
    verbs = CAMERA_VERBS if event.kind is None else SHAPE_VERBS
    first = event.action.verb.split()[0]
    others = [
        verb
        for verb in verbs
        if verb.split()[0] != first and (event.kind in SYMMETRY or not verb.startswith("turns"))
    ]
    verb = rng.choice(others)
    colour = (
        rng.choice([name for name in NAMES if name != event.colour]) if verb == "changes colour" else None
    )
    return replace(event, action=Action(verb, event.action.speed, colour))


def _at_another_speed(event: Event) -> Event | None:
    if event.action.verb == "stays":
        return None
    speed = {"slowly": "fast", "fast": "slowly", "": "fast"}[event.action.speed]
    return replace(event, action=replace(event.action, speed=speed))
