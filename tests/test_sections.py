"""The section plan against the official demo's figures."""

import pytest

from core.pipeline.sections import frames_of, paddings, plan_sections, section_count


@pytest.mark.parametrize(
    ("seconds", "expected_paddings", "frames"),
    [
        (1, [0], 37),
        (2.4, [1, 0], 73),
        (5, [3, 2, 1, 0], 145),
        (6, [3, 2, 2, 1, 0], 181),
        (10, [3, 2, 2, 2, 2, 2, 1, 0], 289),
    ],
)
def test_paddings_and_length(seconds, expected_paddings, frames):
    plan = plan_sections(seconds, 9, "i2v")
    assert paddings(len(plan.sections)) == expected_paddings
    assert plan.frames == frames
    assert plan_sections(seconds, 9, "f1").frames == frames


@pytest.mark.parametrize(("seconds", "count"), [(1, 1), (1.7, 1), (1.8, 2), (3.0, 2), (4.2, 4), (120, 100)])
def test_count_rounds_half_to_even(seconds, count):
    assert section_count(seconds, 9) == count


def test_there_is_always_one_section():
    assert section_count(1, 33) == 1


def test_inverted_indices():
    """start | blank | section | clean | 2× | 4× on one axis."""
    first, second = plan_sections(2.4, 9, "i2v").sections
    assert first.latents == tuple(range(10, 19))  # after the start and 9 blanks
    assert first.clean == (0, 19)
    assert first.history_2x == (20, 21)
    assert first.history_4x == tuple(range(22, 38))
    assert not first.adds_start and first.decode_frames is None
    assert second.latents == tuple(range(1, 10))
    assert second.clean == (0, 10)
    assert second.adds_start and second.decode_frames == 19


def test_forward_indices():
    """start | 4× | 2× | clean | section on one axis, the same for every section."""
    first, second = plan_sections(2.4, 9, "f1").sections
    for section in (first, second):
        assert section.clean == (0, 19)
        assert section.history_4x == tuple(range(1, 17))
        assert section.history_2x == (17, 18)
        assert section.latents == tuple(range(20, 29))
        assert not section.adds_start
    assert first.decode_frames is None and second.decode_frames == 18


def test_smallest_window():
    plan = plan_sections(1, 1, "i2v")
    assert len(plan.sections) == 8
    assert plan.overlap == 1
    assert plan.frames == frames_of(9) == 33
