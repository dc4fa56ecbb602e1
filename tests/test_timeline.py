"""Times in a request: the grammar in a prompt, `sections`, overlaps, which section gets what. No models."""

import math
import subprocess
import sys
from pathlib import Path

import pytest

from core.errors import RequestError
from core.pipeline.sections import plan_sections
from core.request import TimedSection, parse_request
from core.timeline import Cue, TimedEntry, Timeline, moving_average, read_timeline, without_effect

ROOT = Path(__file__).parents[1]
REQUIRED = {"input_image": "aGVsbG8="}


def spans(timeline: Timeline) -> list[tuple]:
    return [(entry.start_s, entry.end_s, entry.prompt) for entry in timeline.entries]


def refused(prompt: str = "x", sections: object = ()) -> str:
    with pytest.raises(RequestError) as caught:
        parse_request(REQUIRED | {"prompt": prompt, "sections": [*sections]})
    assert caught.value.code == "invalid_request"
    sentence = str(caught.value)
    assert sentence.isprintable() and sentence.endswith(".") and len(sentence) < 200
    return sentence


def test_it_needs_no_torch():
    code = "import sys, core.timeline; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


class TestPrompt:
    def test_timed_parts(self):
        timeline = read_timeline("a woman in a park [1s-3s: she waves] [3s-: she turns away]")
        assert timeline.prompt == "a woman in a park"
        assert spans(timeline) == [(1, 3, "she waves"), (3, math.inf, "she turns away")]

    @pytest.mark.parametrize(
        ("part", "start", "end"),
        [
            ("[1s: x]", 1, math.inf),
            ("[1s-: x]", 1, math.inf),
            ("[ 1 s - 2 s : x ]", 1, 2),
            ("[1s–2s:x]", 1, 2),
            ("[0.5s-.75s:x]", 0.5, 0.75),
            ("[1s\n-\n2s:\nx\n]", 1, 2),
            ("[007s: x]", 7, math.inf),
        ],
    )
    def test_ways_to_write_one(self, part, start, end):
        timeline = read_timeline(f"before {part} after")
        assert timeline.prompt == "before after"
        assert spans(timeline) == [(start, end, "x")]

    def test_order_is_by_time_and_an_open_end_is_the_next_start(self):
        timeline = read_timeline("[4s: c][0s: a][2s-3s: b]")
        assert spans(timeline) == [(0, 2, "a"), (2, 3, "b"), (4, math.inf, "c")]
        assert timeline.prompt == ""

    @pytest.mark.parametrize(
        "prompt",
        [
            "plain",
            "  spaces  kept ",
            "[a] [1] [1-3] [1-3: x] [3 seconds later: x] [3s later: x] [1sec: x] [s: x]",
            "a [[ ]] ] [",
            "[1e3s: x] [٣s: x] [1.s.2]",
            "(1s-3s: she waves)",
        ],
    )
    def test_other_brackets_are_text(self, prompt):
        assert read_timeline(prompt) == Timeline(prompt, ())

    @pytest.mark.parametrize(
        "part",
        [
            "[1s]",
            "[1s-3s]",
            "[1-3s: x]",
            "[-1s: x]",
            "[1,5s: x]",
            "[1.5.2s: x]",
            "[1s-x: a]",
            "[1s",
            "[1S-3S: x]",
            "[1s—3s: x]",
        ],
    )
    def test_what_looks_like_a_time_must_be_one(self, part):
        sentence = refused(f"a {part}")
        assert sentence.startswith("`prompt` has a timed part, [")
        assert "that cannot be read; write [1s-3s: text], [1s-: text] or [1s: text]" in sentence

    @pytest.mark.parametrize("prompt", ["[1s: x", "[1s: a [b] c]", "[1s: a [2s: b]"])
    def test_a_part_must_be_closed(self, prompt):
        assert refused(prompt) == "`prompt` has a timed part, [1s:, that is not closed by a bracket."

    @pytest.mark.parametrize("prompt", ["[1s:]", "a [1s-2s: \n ] b"])
    def test_a_part_must_have_text(self, prompt):
        assert refused(prompt).endswith(":, without text.")

    @pytest.mark.parametrize("part", ["[3s-3s: x]", "[3s-1s: x]"])
    def test_a_part_must_have_a_length(self, part):
        assert refused(part).endswith("must end after it starts.")

    @pytest.mark.parametrize("number", ["3601", "9" * 3000])
    def test_no_start_after_an_hour(self, number):
        assert refused(f"[{number}s: x]").endswith("must start by 3600 s.")

    @pytest.mark.parametrize("number", ["3601", "9" * 3000])
    def test_no_end_after_an_hour(self, number):
        assert refused(f"[1s-{number}s: x]").endswith("that must end by 3600 s.")

    def test_long_prompts_are_read_in_no_time(self):
        for piece in ("[1", "[ ", "[1s:", "1.", "[1s-", "[.,"):
            text = (piece * 4000)[:4000]
            for prompt in (text, "[" + text, "[1" + text):
                try:
                    read_timeline(prompt)
                except RequestError as error:
                    assert len(str(error)) < 200


class TestSections:
    def test_they_and_the_prompt_are_one_timeline(self):
        sections = [TimedSection(start_s=3.0, image="aW1n"), TimedSection(start_s=0.0, end_s=1.0, prompt="a")]
        timeline = read_timeline("base [1s: b]", sections)
        assert timeline.entries == (
            TimedEntry("`sections.1`", 0, 1, "a"),
            TimedEntry("`prompt`", 1, 3, "b"),
            TimedEntry("`sections.0`", 3, math.inf, None, keyframe=0),
        )
        assert timeline.prompt_at(0.5) == "a" and timeline.prompt_at(2.999) == "b"
        assert timeline.prompt_at(3) == timeline.prompt_at(1000) == "base"

    @pytest.mark.parametrize(
        ("prompt", "sections", "sentence"),
        [
            (
                "[1s-3s: a] [2s-: b]",
                [],
                "`prompt` (1–3 s) and `prompt` (2 s on) overlap; a time can have one of them.",
            ),
            (
                "x",
                [{"start_s": 2, "prompt": "a"}, {"start_s": 2, "prompt": "b"}],
                "`sections.0` (2 s on) and `sections.1` (2 s on) overlap; a time can have one of them.",
            ),
            (
                "[0s-5s: a]",
                [{"start_s": 2, "end_s": 3, "image": "b"}],
                "`prompt` (0–5 s) and `sections.0` (2–3 s) overlap; a time can have one of them.",
            ),
        ],
    )
    def test_overlaps(self, prompt, sections, sentence):
        assert refused(prompt, sections) == sentence

    @pytest.mark.parametrize(
        ("section", "sentence"),
        [
            (5, "`sections.0` must be an object (got 5)."),
            ({}, "`sections.0.start_s` is required."),
            ({"start_s": 1}, "`sections.0` must have a `prompt` or an `image`."),
            ({"start_s": -1, "prompt": "a"}, "`sections.0.start_s` must be at least 0 (got -1)."),
            ({"start_s": 3601, "prompt": "a"}, "`sections.0.start_s` must be at most 3600 (got 3601)."),
            (
                {"start_s": "1", "prompt": "a"},
                '`sections.0.start_s` must be a number (got the string "1").',
            ),
            (
                {"start_s": 0, "end_s": math.nan, "prompt": "a"},
                "`sections.0.end_s` must be a finite number (got NaN).",
            ),
            ({"start_s": 2, "end_s": 2, "prompt": "a"}, "`sections.0` (2–2 s) must end after it starts."),
            ({"start_s": 1, "prompt": ""}, "`sections.0.prompt` must not be empty."),
            (
                {"start_s": 1, "prompt": "a [2s: b]"},
                "`sections.0.prompt` must have no timed parts; the section has its time.",
            ),
            (
                {"start_s": 1, "prompt": "x" * 4001},
                "`sections.0.prompt` must have at most 4000 characters (got 4001).",
            ),
            ({"start_s": 1, "prompt": "\ud800"}, "`sections.0.prompt` must be valid Unicode text."),
            ({"start_s": 1, "image": ["secret"]}, "`sections.0.image` must be a string (got a list)."),
            ({"start_s": 1, "image": 5}, "`sections.0.image` must be a string (got a number)."),
            (
                {"start_s": 1, "promt": "a"},
                "`sections.0.promt` is not a known field (did you mean `prompt`?).",
            ),
        ],
        ids=repr,
    )
    def test_bad_values(self, section, sentence):
        assert refused(sections=[section]) == sentence

    def test_limits(self):
        prompts = [{"start_s": k, "prompt": "a"} for k in range(17)]
        images = [{"start_s": k, "image": "a"} for k in range(9)]
        assert refused(sections=prompts) == "`sections` must have at most 16 entries (got 17)."
        assert refused(sections=images) == "`sections` must have at most 8 images (got 9)."
        assert "at most 16 timed entries (got 17)" in refused("[99s: x]", prompts[:16])
        assert len(parse_request(REQUIRED | {"prompt": "x", "sections": prompts[:16]}).sections) == 16
        many = [dict.fromkeys(map(str, range(1000)))] * 11
        assert refused(sections=many) == "`sections` has too many fields (11000)."

    def test_images_are_neither_echoed_nor_printed(self):
        from core.request import echo_of

        section = {"start_s": 1, "end_s": 2.5, "prompt": "a", "image": "a-secret"}
        request = parse_request(REQUIRED | {"prompt": "x", "sections": [section]})
        assert "a-secret" not in repr(request)
        assert echo_of(request)["sections"] == [{"start_s": 1, "end_s": 2.5, "prompt": "a"}]


class TestCues:
    def test_a_section_takes_what_covers_its_middle(self):
        timeline = read_timeline("base [1s-2s: a]", [TimedSection(start_s=2.0, end_s=3.0, image="x")])
        assert timeline.cues([0.99, 1.0, 1.99, 2.0, 3.0]) == [
            Cue((("base", 1),)),
            Cue((("a", 1),)),
            Cue((("a", 1),)),
            Cue((("base", 1),), keyframe=0),
            Cue((("base", 1),)),
        ]

    @pytest.mark.parametrize("direction", ["i2v", "f1"])
    def test_sections_lie_in_time_as_the_videos_frames_do(self, direction):
        """At W = 9 the section at place k makes the frames 36k + 1 … 36(k + 1)."""
        plan = plan_sections(5, 9, direction)
        assert plan.frames == 145
        assert plan.middles_s == pytest.approx([19 / 30, 55 / 30, 91 / 30, 127 / 30])
        places = [plan.position(section) for section in plan.sections]
        assert places == ([3, 2, 1, 0] if direction == "i2v" else [0, 1, 2, 3])

    @pytest.mark.parametrize(
        ("blend", "weights_of_b"),
        [
            (0, [0, 0, 0, 1, 1, 1]),
            (1, [0, 0, 0, 1 / 2, 1, 1]),
            (2, [0, 0, 1 / 3, 2 / 3, 1, 1]),
            (3, [0, 0, 1 / 4, 2 / 4, 3 / 4, 1]),
            (4, [0, 1 / 5, 2 / 5, 3 / 5, 4 / 5, 1]),
            (10, [3 / 11, 4 / 11, 5 / 11, 6 / 11, 7 / 11, 8 / 11]),
        ],
    )
    def test_a_change_becomes_a_ramp(self, blend, weights_of_b):
        mixtures = [dict(mixture) for mixture in moving_average("aaabbb", blend)]
        assert [mixture.get("b", 0) for mixture in mixtures] == pytest.approx(weights_of_b)
        assert [sum(mixture.values()) for mixture in mixtures] == pytest.approx([1] * 6)

    def test_a_prompt_shorter_than_the_ramp_mixes_with_both_sides(self):
        assert dict(moving_average("abc", 2)[1]) == pytest.approx({"a": 1 / 3, "b": 1 / 3, "c": 1 / 3})


class TestWithoutEffect:
    middles = (0.6, 1.8, 3.0)

    def sentences(self, prompt, *sections, blend=0):
        timeline = read_timeline(prompt, [TimedSection(**section) for section in sections])
        return without_effect(timeline, self.middles, 3.63, blend)

    def test_what_all_acts_is_not_spoken_of(self):
        assert self.sentences("base [1s-2s: a]", {"start_s": 2.0, "prompt": "b"}, blend=1) == []

    def test_beyond_the_video(self):
        assert self.sentences("base [4s-5s: a]") == [
            "`prompt` (4–5 s) had no effect: the video ends at 3.63 s."
        ]

    def test_between_two_middles(self):
        assert self.sentences("base", {"start_s": 2.0, "end_s": 2.5, "image": "x"}) == [
            "`sections.0` (2–2.5 s) had no effect: no section has its middle there, the nearest is at 1.8 s."
        ]

    def test_a_prompt_that_timed_ones_replace_throughout(self):
        assert self.sentences("base [0s: a]") == [
            "`prompt` had no effect: timed prompts cover every section."
        ]
        assert self.sentences("[0s: a]") == []

    def test_no_prompt_at_all(self):
        (sentence,) = self.sentences("[1s: a]")
        assert sentence.endswith("the sections that none of them covers have no prompt.")

    def test_a_blend_without_a_change(self):
        assert self.sentences("base", {"start_s": 1.0, "prompt": "base"}, blend=3) == [
            "`blend_sections` had no effect: the prompt does not change."
        ]
