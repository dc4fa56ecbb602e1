"""What a request says of the video's times: prompts and keyframe images from one second to another.

Pure arithmetic on seconds and texts. It knows neither how the model's sections lie in time (it is given the
middle of each) nor what an image or an embedding is.

A prompt may hold timed parts, in this grammar, where spaces may stand between any two of its words:

    part   =  "[" time [ "-" [ time ] ] ":" text "]"
    time   =  number "s"        a number such as 2, 0.5 or .5; "–" does for "-"
    text   =  anything but "[" and "]", and not only spaces

[1s-3s: …] lasts from second 1 to second 3; [1s: …] and [1s-: …] until the next timed entry begins, or the
end. A bracket looks like a time when it begins with a number and its unit s (or S), followed by a dash, ":"
or "]", or with two numbers and the unit ([1-3s: …]). One that looks like a time and does not follow the
grammar is an error; every other bracket is plain text.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from core.errors import RequestError

if TYPE_CHECKING:
    from core.request import TimedSection

MAX_SECONDS = 3600
MAX_ENTRIES = 16
MAX_KEYFRAMES = 8

_TIME = r"([0-9]+(?:\.[0-9]+)?|\.[0-9]+)\s*s"
_HEAD = re.compile(rf"\[\s*{_TIME}\s*(?:[-–]\s*(?:{_TIME}\s*)?)?:")
_TEXT = re.compile(r"([^\[\]]*)\]")
_ANY_NUMBER = r"-?[.,]*[0-9][0-9.,]*\s*"
_AFTER = r"s\s*(?:[-–—:\]]|$)"
_LOOKS_TIMED = re.compile(
    rf"\[\s*{_ANY_NUMBER}(?:{_AFTER}|[-–—]\s*{_ANY_NUMBER}{_AFTER})",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class TimedEntry:
    """From `start_s` to before `end_s` a prompt, a keyframe image, or both."""

    name: str  # of the field it comes from
    start_s: float
    end_s: float  # infinite: to the end
    prompt: str | None = None
    keyframe: int | None = None  # its place in the request's `sections`

    def __str__(self) -> str:
        until = f"–{self.end_s:g} s" if self.end_s < math.inf else " s on"
        return f"{self.name} ({self.start_s:g}{until})"


@dataclass(frozen=True)
class Cue:
    """What one section is given."""

    prompts: tuple[tuple[str, float], ...]  # with their weights, which sum to 1
    keyframe: int | None = None


@dataclass(frozen=True)
class Timeline:
    prompt: str  # where no timed one is
    entries: tuple[TimedEntry, ...]  # in time's order; no two overlap

    def at(self, second: float) -> TimedEntry | None:
        """The entry that covers `second`; its start is in it, its end is not."""
        return next((entry for entry in self.entries if entry.start_s <= second < entry.end_s), None)

    def prompt_at(self, second: float) -> str:
        entry = self.at(second)
        return self.prompt if entry is None or entry.prompt is None else entry.prompt

    def cues(self, middles: Sequence[float], blend: int = 0) -> list[Cue]:
        """What each section is given, by the second at its middle, in the video's order.

        `blend` sections around every change of prompt are given a mixture (`moving_average`).
        """
        mixtures = moving_average([self.prompt_at(middle) for middle in middles], blend)
        covering = [self.at(middle) for middle in middles]
        return [
            Cue(mixture, entry.keyframe if entry else None)
            for mixture, entry in zip(mixtures, covering, strict=True)
        ]

    def name_of(self, prompt: str) -> str:
        """The field that `prompt` comes from, for sentences about it."""
        return next((str(entry) for entry in self.entries if entry.prompt == prompt), "`prompt`")


def moving_average(prompts: Sequence[str], blend: int) -> list[tuple[tuple[str, float], ...]]:
    """For each section the prompts of `blend` + 1 neighbouring ones, itself included, with equal weights.

    So a change of prompt becomes a linear ramp over `blend` sections, the first half of them (rounded down)
    before it: the later prompt's weights there are 1, 2 … `blend` out of `blend` + 1. Beyond its ends the
    video goes on as it ends.
    """
    last = len(prompts) - 1
    mixtures = []
    for section in range(len(prompts)):
        first = section - (blend - blend // 2)
        seen = Counter(prompts[min(max(k, 0), last)] for k in range(first, first + blend + 1))
        mixtures.append(tuple((prompt, count / (blend + 1)) for prompt, count in seen.items()))
    return mixtures


def read_timeline(prompt: str, sections: Sequence["TimedSection"] = ()) -> Timeline:
    """The request's `prompt`, with its timed parts, and `sections`. Raises RequestError."""
    base, entries = _timed_parts(prompt)
    for index, section in enumerate(sections):
        if section.prompt is None and section.image is None:
            raise RequestError(f"`sections.{index}` must have a `prompt` or an `image`.")
        if section.prompt and _LOOKS_TIMED.search(section.prompt):
            raise RequestError(
                f"`sections.{index}.prompt` must have no timed parts; the section has its time."
            )
        entries.append(
            TimedEntry(
                f"`sections.{index}`",
                section.start_s,
                math.inf if section.end_s is None else section.end_s,
                section.prompt,
                None if section.image is None else index,
            )
        )
    if len(entries) > MAX_ENTRIES:
        raise RequestError(
            f"`prompt` and `sections` must have at most {MAX_ENTRIES} timed entries (got {len(entries)})."
        )
    keyframes = sum(entry.keyframe is not None for entry in entries)
    if keyframes > MAX_KEYFRAMES:
        raise RequestError(f"`sections` must have at most {MAX_KEYFRAMES} images (got {keyframes}).")
    return Timeline(base, _in_order(entries))


def _in_order(entries: list[TimedEntry]) -> tuple[TimedEntry, ...]:
    """By time, open ends closed by what comes next. Raises RequestError for overlaps and early ends."""
    for entry in entries:
        if entry.start_s > MAX_SECONDS:
            raise RequestError(f"{entry} must start by {MAX_SECONDS} s.")
        if entry.end_s <= entry.start_s:
            raise RequestError(f"{entry} must end after it starts.")
    entries = sorted(entries, key=lambda entry: entry.start_s)
    for i, following in enumerate(entries[1:]):
        entry = entries[i]
        overlap = entry.end_s < math.inf and following.start_s < entry.end_s
        if overlap or following.start_s == entry.start_s:
            raise RequestError(f"{entry} and {following} overlap; a time can have one of them.")
        entries[i] = replace(entry, end_s=min(entry.end_s, following.start_s))
    return tuple(entries)


def _timed_parts(prompt: str) -> tuple[str, list[TimedEntry]]:
    """The prompt without its timed parts, and these. A prompt without any is left as it is."""
    entries, rest, position = [], [], 0
    for looks in _LOOKS_TIMED.finditer(prompt):
        head = _HEAD.match(prompt, looks.start())
        shown = " ".join((head or looks)[0].split())[:40]
        if not head:
            raise RequestError(
                f"`prompt` has a timed part, {shown}, that cannot be read; "
                "write [1s-3s: text], [1s-: text] or [1s: text]."
            )
        if not (text := _TEXT.match(prompt, head.end())):
            raise RequestError(f"`prompt` has a timed part, {shown}, that is not closed by a bracket.")
        if not text[1].strip():
            raise RequestError(f"`prompt` has a timed part, {shown}, without text.")
        start, end = float(head[1]), float(head[2]) if head[2] else math.inf
        if head[2] and end > MAX_SECONDS:
            raise RequestError(f"`prompt` has a timed part, {shown}, that must end by {MAX_SECONDS} s.")
        entries.append(TimedEntry("`prompt`", start, end, text[1].strip()))
        rest.append(prompt[position : looks.start()])
        position = text.end()
    if not entries:
        return prompt, []
    return " ".join("".join([*rest, prompt[position:]]).split()), entries


def without_effect(timeline: Timeline, middles: Sequence[float], video_s: float, blend: int = 0) -> list[str]:
    """Sentences on what of the timeline acts on none of the sections, given as to `Timeline.cues`."""
    covering = [timeline.at(middle) for middle in middles]
    sentences = []
    for entry in timeline.entries:
        if entry in covering:
            continue
        if entry.start_s >= video_s:
            why = f"the video ends at {video_s:.4g} s"
        else:
            nearest = min(middles, key=lambda middle: max(entry.start_s - middle, middle - entry.end_s))
            why = f"no section has its middle there, the nearest is at {nearest:.4g} s"
        sentences.append(f"{entry} had no effect: {why}.")
    needed = any(entry is None or entry.prompt is None for entry in covering)
    if timeline.prompt and not needed:
        sentences.append("`prompt` had no effect: timed prompts cover every section.")
    if needed and not timeline.prompt:
        sentences.append(
            "`prompt` has only timed parts; the sections that none of them covers have no prompt."
        )
    if blend and len({timeline.prompt_at(middle) for middle in middles}) == 1:
        sentences.append("`blend_sections` had no effect: the prompt does not change.")
    return sentences
