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
        "other verb": _doing_another(event, rng),
        "other speed": _at_another_speed(event),
    }
    meanings = {name: (*meaning[:at], new, *meaning[at + 1 :]) for name, new in wrong.items() if new}
    others = _of_others(scene, rng)
    return meanings | ({"other object": others} if others else {})


def _reversed(event: Event) -> Event | None:
    verb = " ".join(_OTHER_WAY.get(word, word) for word in event.action.verb.split())
    return replace(event, action=replace(event.action, verb=verb)) if verb != event.action.verb else None


def _of_others(scene: Scene, rng: random.Random) -> Meaning | None:
    """Two events change places; one becomes that of a bystander, or of a colour that is not there.

    None where that would be no less true, or could not be seen: what stays, what turns and is round.
    """
    meaning = scene.meaning
    if len(meaning) == 2:
        first, second = meaning
        swapped = (replace(first, action=second.action), replace(second, action=first.action))
        return swapped if all(map(_can_be_seen, swapped)) else None
    (event,) = meaning
    if event.kind is None or event.action.verb == "stays":
        return None
    bystanders = [(shape.colour, shape.kind) for shape in scene.shapes if shape.action is None]
    absent = [(name, event.kind) for name in NAMES if name not in {event.colour, event.action.colour}]
    colour, kind = rng.choice(bystanders or absent)
    other = replace(event, colour=colour, kind=kind)
    return (other,) if _can_be_seen(other) else None


def _can_be_seen(event: Event) -> bool:
    return event.kind in SYMMETRY or not event.action.verb.startswith("turns")


def _doing_another(event: Event, rng: random.Random) -> Event:
    """Something of another sort: not only another direction."""
    sort = event.action.verb.split()[0]
    verbs = CAMERA_VERBS if event.kind is None else SHAPE_VERBS
    others = [replace(event, action=Action(verb)) for verb in verbs if verb.split()[0] != sort]
    other = rng.choice([other for other in others if _can_be_seen(other)])
    if other.action.verb == "changes colour":
        colour = rng.choice([name for name in NAMES if name != event.colour])
        return replace(other, action=Action("changes colour", colour=colour))
    return other


def _at_another_speed(event: Event) -> Event | None:
    if event.action.verb == "stays":
        return None
    speed = {"slowly": "fast", "fast": "slowly", "": "fast"}[event.action.speed]
    return replace(event, action=replace(event.action, speed=speed))
