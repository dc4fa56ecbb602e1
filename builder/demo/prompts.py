"""What happens → words. Needs no torch; several ways to say each thing, all of them listed here."""

import random
import re

from builder.demo.colours import NAMES
from builder.demo.geometry import KINDS
from builder.demo.motion import CAMERA_VERBS, SHAPE_VERBS, SPEEDS, Action
from builder.demo.scene import Event, Meaning, Scene

ARTICLES = ("the", "a")
JOINTS = (" and ", " while ", ", ")
ADVERBS = {"slowly": ("slowly",), "fast": ("fast", "quickly")}


def _moving(direction: str) -> tuple[str, ...]:
    vertical, _, side = direction.partition(" and ")
    if side:
        to = (f"{vertical} and {side}", f"{vertical} and to the {side}", f"diagonally {vertical} and {side}")
    elif direction in {"left", "right"}:
        to = (direction, f"to the {direction}")
    else:
        to = (direction, f"{direction}wards")
    return tuple(f"{verb} {where}" for verb in ("moves", "is moving", "slides") for where in to)


PHRASES = {
    verb: _moving(verb.removeprefix("moves ")) for verb in SHAPE_VERBS if verb.startswith("moves ")
} | {
    "turns clockwise": ("turns clockwise", "is turning clockwise", "rotates clockwise", "spins clockwise"),
    "turns counterclockwise": (
        "turns counterclockwise",
        "is turning counterclockwise",
        "rotates counterclockwise",
        "spins counterclockwise",
    ),
    "grows": ("grows", "is growing", "gets bigger", "becomes larger"),
    "shrinks": ("shrinks", "is shrinking", "gets smaller", "becomes smaller"),
    "bounces": ("bounces", "is bouncing", "bounces up and down", "jumps up and down"),
    "changes colour": ("changes colour to {}", "changes color to {}", "becomes {}", "is becoming {}"),
    "stays": ("stays", "stays still", "stays where it is", "does not move"),
    "pans right": ("pans right", "pans to the right", "is panning right", "moves to the right"),
    "pans left": ("pans left", "pans to the left", "is panning left", "moves to the left"),
    "pans up": ("pans up", "pans upwards", "is panning up", "moves up"),
    "pans down": ("pans down", "pans downwards", "is panning down", "moves down"),
    "zooms in": ("zooms in", "is zooming in", "moves closer"),
    "zooms out": ("zooms out", "is zooming out", "moves away"),
}


def prompt_of(scene: Scene, rng: random.Random) -> str:
    """What happens in the scene, in one of the ways to say it."""
    return describe(scene.meaning, rng)


def describe(meaning: Meaning, rng: random.Random) -> str:
    """The meaning in words, the events in any order; one prompt in three is written as a sentence."""
    return spoken(meaning, rng)[0]


def spoken(meaning: Meaning, rng: random.Random) -> tuple[str, list[tuple[int, Event]]]:
    """The same, and where in it each event's clause begins."""
    events = rng.sample(meaning, len(meaning))
    clauses = [_clause(event, rng) for event in events]
    joint = rng.choice(JOINTS)
    starts = [len(joint.join([*clauses[:number], ""])) for number in range(len(clauses))]
    prompt = joint.join(clauses)
    if rng.random() < 1 / 3:
        prompt = prompt[0].upper() + prompt[1:] + "."
    return prompt, list(zip(starts, events, strict=True))


def plain_prompt(meaning: Meaning) -> str:
    """The first way to say it, in the order given: "the red circle moves right slowly"."""
    return " and ".join(f"the {_subject(event)} {_predicates(event.action)[0]}" for event in meaning)


def vocabulary() -> list[str]:
    """Every word and punctuation mark of every prompt, capitalised ones too, sorted."""
    words = {*NAMES, *KINDS, *ARTICLES, "camera", "an"}
    for verb in (*SHAPE_VERBS, *CAMERA_VERBS):
        for speed in SPEEDS:
            for phrase in _predicates(Action(verb, speed, NAMES[0])):
                words |= set(phrase.split())
    words |= set(re.findall(r"\w+|,", "".join(JOINTS)))
    return sorted({*words, *(article.capitalize() for article in (*ARTICLES, "an")), "."})


def _clause(event: Event, rng: random.Random) -> str:
    subject = _subject(event)
    article = "the" if event.kind is None else rng.choice(ARTICLES)
    if article == "a" and subject[0] in "aeiou":
        article = "an"
    return f"{article} {subject} {rng.choice(_predicates(event.action))}"


def _subject(event: Event) -> str:
    return "camera" if event.kind is None else f"{event.colour} {event.kind}"


def _predicates(action: Action) -> list[str]:
    """Every way to say what the action does and how fast, the adverb before or after the verb."""
    phrases = [phrase.format(action.colour) for phrase in PHRASES[action.verb]]
    if action.speed == "" or action.verb == "stays":
        return phrases
    after = [f"{phrase} {adverb}" for adverb in ADVERBS[action.speed] for phrase in phrases]
    return after + [
        f"slowly {phrase}" for phrase in phrases if action.speed == "slowly" and phrase[:3] != "is "
    ]
