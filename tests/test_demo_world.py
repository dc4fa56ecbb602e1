"""The demo models' world: it draws what its prompts say, and the measures tell that from what they do not."""

import math
import random
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from benchmarks.demo_measure import all_three
from builder.demo import photographs
from builder.demo.colours import COLOURS, NAMES
from builder.demo.controls import CONTROLS, wrong_meanings
from builder.demo.flow import camera_path
from builder.demo.geometry import KINDS
from builder.demo.measure import bystanders_stay, drift, followed, shapes_kept, travel_ratios
from builder.demo.motion import CAMERA_VERBS, MARGIN, MOVES, SECTION, SHAPE_VERBS, SPEEDS, Action, amount
from builder.demo.prompts import PHRASES, plain_prompt, prompt_of, vocabulary
from builder.demo.scene import (
    FRAME_SIZES,
    TEST_KINDS,
    Background,
    Event,
    Scene,
    Shape,
    held_out,
    test_scenes,
    train_scene,
)
from builder.demo.similarity import first_frame_psnr, psnr, ssim
from builder.demo.tracks import LEAST_AREA, Tracks
from builder.demo.world import render, render_batch

GREY = Background("flat", ((150, 150, 145), (150, 150, 145)), 0)
CLIP = range(SECTION + 1)


def photograph(name: str) -> np.ndarray:
    """Stands in for a photograph: coarse and fine patches of all colours, other ones for every name."""
    rng = np.random.default_rng(list(name.encode()))
    picture = np.zeros((400, 520, 3))
    for size in (40, 10):
        patches = rng.uniform(0, 128, (400 // size, 520 // size, 3))
        picture += patches.repeat(size, axis=0).repeat(size, axis=1)
    return picture.astype(np.uint8)


def one_shape(action: Action | None = None, kind: str = "square", colour: str = "red", **more) -> Scene:
    return Scene(160, 224, GREY, (Shape(kind, colour, 90.0, 80.0, 22.0, action=action),), **more)


def moving(scene: Scene) -> int:
    """How many of the events go anywhere."""
    return sum(event.action.verb != "stays" for event in scene.meaning)


def red_part(frame: np.ndarray) -> tuple[float, float, float]:
    """Centre and area of the red on the grey, to a fraction of a pixel."""
    cover = (150.0 - frame[..., 1]) / (150 - COLOURS["red"][1])
    rows, columns = np.indices(cover.shape) + 0.5
    area = cover.sum()
    return (cover * columns).sum() / area, (cover * rows).sum() / area, area


class TestWorld:
    def test_frames_are_uint8_and_the_same_each_time(self):
        scene = train_scene(random.Random(3))
        frames = render(scene, [0, 0.5, 360], photograph)
        assert frames.shape == (3, scene.height, scene.width, 3) and frames.dtype == np.uint8
        assert np.array_equal(frames, render(train_scene(random.Random(3)), [0, 0.5, 360], photograph))

    def test_a_batch_holds_each_scenes_frames_from_its_start_on(self):
        scenes = [train_scene(random.Random(seed), (128, 256)) for seed in range(6)]
        starts = [0, 36, 72, 108, 1, 5]
        batch = render_batch(scenes, starts, 3, "cpu", photograph)
        assert batch.shape == (6, 3, 128, 256, 3)
        for scene, start, clip in zip(scenes, starts, batch, strict=True):
            assert np.array_equal(clip, render(scene, range(start, start + 3), photograph))

    def test_a_batch_has_one_size(self):
        scenes = [train_scene(random.Random(0), size) for size in FRAME_SIZES[:2]]
        with pytest.raises(ValueError, match="one size"):
            render_batch(scenes, [0, 0], 1, "cpu", photograph)

    @pytest.mark.parametrize(
        "direction, dx, dy", [("right", 1, 0), ("up", 0, -1), ("down and left", -0.7071, 0.7071)]
    )
    def test_what_moves_goes_where_and_as_far_as_the_table_says(self, direction, dx, dy):
        first, last = render(one_shape(Action(f"moves {direction}")), [0, 25])
        (x0, y0, size0), (x1, y1, size1) = red_part(first), red_part(last)
        assert (x1 - x0, y1 - y0) == pytest.approx((24 * dx, 24 * dy), abs=0.1)
        assert size1 == pytest.approx(size0, rel=0.01)

    def test_speeds_are_half_and_twice(self):
        ends = [red_part(render(one_shape(Action("moves right", s)), [20])[0])[0] for s in SPEEDS]
        assert np.diff(ends) == pytest.approx([9.6, 19.2], abs=0.1)

    def test_what_grows_has_its_area_and_stops(self):
        sizes = [red_part(f)[2] for f in render(one_shape(Action("grows")), [0, 24, 48, 361])]
        assert sizes[1:] == pytest.approx([1.8 * sizes[0], 3.24 * sizes[0], 3.24 * sizes[0]], rel=0.01)

    def test_a_square_that_turned_a_quarter_looks_as_before_and_differs_between(self):
        start, between, quarter = render(one_shape(Action("turns clockwise")), [0, 18, 36])
        assert psnr(quarter, start) > 50 > 30 > psnr(between, start)

    def test_clockwise_is_as_the_clock_goes(self):
        shape = Shape("triangle", "red", 90.0, 80.0, 40.0, -math.pi / 2, Action("turns clockwise"))
        upright, turned = render(Scene(160, 224, GREY, (shape,)), [0, 12])
        before, after = red_part(upright[:60])[0], red_part(turned[:60])[0]
        assert after > before + 5  # the tip went to the right

    def test_what_bounces_comes_back(self):
        heights = [red_part(f)[1] for f in render(one_shape(Action("bounces")), [0, 12, 24, 36])]
        assert heights == pytest.approx([80, 80 - 0.12 * 160, 80, 80 - 0.12 * 160], abs=0.1)

    def test_a_colour_is_the_asked_one_in_the_end(self):
        frames = render(one_shape(Action("changes colour", colour="blue")), [0, 18])
        assert frames[:, 80, 90].tolist() == [list(COLOURS["red"]), list(COLOURS["blue"])]

    def test_a_panning_camera_shows_the_world_moved_against_it(self):
        for verb, ours, theirs in (
            ("pans right", np.s_[:, :-24], np.s_[:, 24:]),
            ("pans up", np.s_[24:], np.s_[:-24]),
        ):
            scene = Scene(160, 224, Background("noise", ((90, 90, 90), (190, 180, 170)), 5), (), Action(verb))
            first, later = render(scene, [0, 25])
            assert np.abs(later[ours].astype(int) - first[theirs]).max() <= 1

    def test_a_zoom_keeps_the_middle_and_stops(self):
        background = Background("photograph", ((0, 0, 0), (0, 0, 0)), 5, "any")
        scene = Scene(160, 224, background, (), Action("zooms in", "fast"))
        frames = render(scene, [*CLIP, 361], photograph)
        path = camera_path(frames)
        assert path.zoom[-1] == pytest.approx(math.log(1.6), abs=0.01)
        assert (path.x[-1], path.y[-1]) == pytest.approx((0, 0), abs=1)
        assert np.array_equal(frames[-2], frames[-1])

    def test_edges_are_one_pixel_wide(self):
        shape = Shape("circle", "red", 90.0, 80.5, 22.25)
        row = render(Scene(160, 224, GREY, (shape,)), [0])[0, 80, :, 1].astype(int)
        red = COLOURS["red"][1]
        assert row[66:70].tolist() == pytest.approx([150, 150 - (150 - red) / 4, red, red], abs=1)

    def test_a_missing_package_is_named(self, monkeypatch):
        monkeypatch.setattr(photographs, "find_spec", lambda package: None)
        with pytest.raises(FileNotFoundError, match=r"inside sklearn.*requirements\.txt"):
            photographs.load_photograph.__wrapped__("china")


class TestScenes:
    scenes = tuple(train_scene(random.Random(seed)) for seed in range(400))

    def test_shapes_keep_inside_and_apart_in_long_videos(self):
        times = np.arange(0, 400)
        for scene in self.scenes:
            poses = [shape.pose(times, scene.height, scene.width) for shape in scene.shapes]
            for x, y, radius, *_ in poses:
                clear = radius + MARGIN * scene.short - 1e-6
                assert (x >= clear).all() and (x <= scene.width - clear).all()
                assert (y >= clear).all() and (y <= scene.height - clear).all()
            for i, a in enumerate(poses):
                for b in poses[:i]:
                    assert (np.hypot(a.x - b.x, a.y - b.y) > a.radius + b.radius).all()

    def test_nothing_stops_before_a_section_is_over(self):
        for scene in self.scenes:
            for shape in scene.shapes:
                if shape.action and shape.action.verb.startswith("moves"):
                    pose = shape.pose(np.array([0, SECTION]), scene.height, scene.width)
                    path = math.hypot(pose.x[1] - pose.x[0], pose.y[1] - pose.y[0])
                    assert path == pytest.approx(scene.short * amount(shape.action, SECTION), rel=1e-6)

    def test_every_verb_kind_colour_and_size_is_drawn(self):
        acting = [event for scene in self.scenes for event in scene.meaning]
        assert {event.action.verb for event in acting} == {*SHAPE_VERBS, *CAMERA_VERBS}
        assert {shape.kind for scene in self.scenes for shape in scene.shapes} == set(KINDS)
        assert {shape.colour for scene in self.scenes for shape in scene.shapes} == set(NAMES)
        assert {(scene.height, scene.width) for scene in self.scenes} == set(FRAME_SIZES)

    def test_of_long_videos_most_are_of_moving_shapes_and_none_is_left_out(self):
        scenes = [train_scene(random.Random(seed), long=True) for seed in range(600)]
        verbs = [event.action.verb for scene in scenes for event in scene.meaning]
        assert set(verbs) == {*SHAPE_VERBS, *CAMERA_VERBS}
        assert 0.55 < sum(verb in MOVES for verb in verbs) / len(verbs) < 0.75
        assert not any(
            held_out(s.kind, s.colour, s.action.verb) for x in scenes for s in x.shapes if s.action
        )

    def test_an_eighth_of_the_combinations_is_never_trained_and_tested_on(self):
        everything = [(k, c, v) for k in KINDS for c in NAMES for v in SHAPE_VERBS]
        assert sum(held_out(*each) for each in everything) * 8 == len(everything)
        trained = [e for scene in self.scenes for e in scene.meaning if e.kind]
        assert not any(held_out(event.kind, event.colour, event.action.verb) for event in trained)
        for scene in test_scenes("combination", 30):
            assert all(held_out(event.kind, event.colour, event.action.verb) for event in scene.meaning)

    def test_training_and_tests_share_no_photograph(self):
        seen = {scene.background.photograph for scene in self.scenes}
        unseen = {scene.background.photograph for kind in TEST_KINDS for scene in test_scenes(kind, 40)}
        assert seen - {None} == set(photographs.SEEN)
        assert unseen - {None} == set(photographs.HELD_OUT)
        assert not any(scene.background.photograph for scene in test_scenes("aspect", 40, photographs=()))

    @pytest.mark.parametrize("kind", TEST_KINDS)
    def test_test_scenes_are_the_same_at_every_call_and_begin_alike(self, kind):
        assert test_scenes(kind, 12)[:5] == test_scenes(kind, 5)

    def test_an_unknown_kind_is_named(self):
        with pytest.raises(ValueError, match="'three'"):
            test_scenes("three", 1)


class TestPrompts:
    def test_a_prompt_says_what_happens(self):
        meaning = (
            Event(Action("moves right", "slowly"), "red", "circle"),
            Event(Action("changes colour", colour="pink"), "blue", "square"),
        )
        assert plain_prompt(meaning) == (
            "the red circle moves right slowly and the blue square changes colour to pink"
        )
        assert plain_prompt((Event(Action("zooms in", "fast")),)) == "the camera zooms in fast"

    def test_every_word_is_in_the_vocabulary(self):
        words = set(vocabulary())
        rng = random.Random(0)
        for scene in TestScenes.scenes:
            prompt = prompt_of(scene, rng)
            assert set(prompt.replace(",", " , ").replace(".", " . ").split()) <= words, prompt

    def test_no_phrase_means_two_things(self):
        for verbs in (SHAPE_VERBS, CAMERA_VERBS):
            phrases = [phrase for verb in verbs for phrase in PHRASES[verb]]
            assert len(phrases) == len(set(phrases))
            assert all(len(PHRASES[verb]) >= 3 for verb in verbs)

    def test_no_torch_is_needed(self):
        code = "import sys, builder.demo.prompts; sys.exit('torch' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


class TestMeasures:
    @pytest.mark.parametrize("kind", TEST_KINDS)
    def test_a_true_clip_follows_its_own_prompt_and_no_other(self, kind):
        """Nor when blurred, noisy and compressed. benchmarks/demo_measure.py does this with many more."""
        tried = set()
        for index, scene in enumerate(test_scenes(kind, 4)):
            true = Tracks(render(scene, CLIP, photograph))
            assert followed(true, scene.meaning)
            assert travel_ratios(true, scene.meaning) == pytest.approx([1.0] * moving(scene), abs=0.05)
            assert all(bystanders_stay(true, scene.meaning))
            degraded = Tracks(all_three(true.frames))
            assert followed(degraded, scene.meaning)
            assert travel_ratios(degraded, scene.meaning) == pytest.approx([1.0] * moving(scene), abs=0.25)
            assert all(bystanders_stay(degraded, scene.meaning))
            for name, wrong in wrong_meanings(scene, random.Random(index)).items():
                assert not followed(degraded, wrong), name
                tried.add(name)
            if moving(scene):
                assert not followed(true.frames[:1].repeat(len(CLIP), axis=0), scene.meaning)
        assert tried >= set(CONTROLS) - {"other object"}

    def test_travel_is_told_as_a_part_of_what_was_asked(self):
        scene = one_shape(Action("moves right"))
        half = render(scene, np.arange(37) / 2)
        assert travel_ratios(half, scene.meaning) == pytest.approx([0.5], abs=0.02)
        assert not followed(half, scene.meaning)
        assert travel_ratios(half, (Event(Action("grows"), "green", "star"),)) == [0.0]

    def test_a_path_that_ends_at_the_edge_is_followed(self):
        scene = one_shape(Action("moves right"))
        frames = render(scene, range(0, 145))
        assert np.ptp(frames[112:], axis=0).max() == 0
        assert followed(frames, scene.meaning)

    def test_who_is_at_the_edge_and_told_to_go_on_has_not_followed(self):
        scene = Scene(160, 224, GREY, (Shape("circle", "red", 25.0, 80.0, 22.0),))
        still = render(scene, [0]).repeat(len(CLIP), axis=0)
        asked = (Event(Action("moves left"), "red", "circle"),)
        assert travel_ratios(still, asked) == [0.0] and not followed(still, asked)

    def test_a_bystander_that_moves_is_noticed(self):
        scene = next(s for s in test_scenes("two", 40) if len(s.meaning) == len(s.shapes) == 2)
        frames = render(scene, CLIP, photograph)
        assert bystanders_stay(frames, scene.meaning) == []
        assert bystanders_stay(frames, scene.meaning[:1]) == [False]

    def test_shapes_that_vanish_or_swell_are_not_kept(self):
        action = Action("changes colour", colour="green")
        scene = one_shape(action)
        frames = render(scene, CLIP)
        assert shapes_kept(frames, scene.meaning) == [True]
        assert shapes_kept(
            np.concatenate([frames, render(replace(scene, shapes=()), [0])]), scene.meaning
        ) == [False]
        swollen = replace(scene.shapes[0], radius=44.0)
        late = render(replace(scene, shapes=(swollen,)), [36])
        assert shapes_kept(np.concatenate([frames, late]), scene.meaning) == [False]

    def test_backgrounds_hold_no_named_colour(self):
        for scene in [s for kind in ("one", "two", "aspect") for s in test_scenes(kind, 8)]:
            tracks = Tracks(render(scene, [0], photograph))
            assert sorted(tracks.present()) == sorted(shape.colour for shape in scene.shapes)
            absent = set(NAMES) - {shape.colour for shape in scene.shapes}
            for colour in absent:
                assert tracks.mask(colour, 0).mean() < LEAST_AREA

    def test_drift_is_one_without_any_and_tells_what_faded(self):
        frames = render(one_shape(Action("stays")), range(72))
        same = drift(frames)
        assert (same.brightness, same.contrast, same.sharpness, same.chroma) == pytest.approx((0, 1, 1, 1))
        faded = frames.copy()
        faded[36:] = faded[36:] // 2 + 40
        drifted = drift(faded)
        assert drifted.brightness < -20
        assert (drifted.contrast, drifted.chroma) == pytest.approx((0.5, 0.5), abs=0.06)
        with pytest.raises(ValueError, match="72 frames or more, not 71"):
            drift(frames[:71])


class TestSimilarity:
    y, x, c = np.mgrid[0:40, 0:56, 0:3]
    picture = ((x * 7 + y * 13 + c * 29 + (x * y) // 5) % 256).astype(np.uint8)

    def test_psnr_of_a_known_error(self):
        dark, bright = (np.full((2, 8, 8, 3), value, np.uint8) for value in (100, 110))
        assert psnr(dark, bright) == pytest.approx(20 * math.log10(25.5))
        assert psnr(dark, dark) == math.inf
        assert first_frame_psnr(np.concatenate([dark[:1], bright]), bright[0]) == psnr(dark, bright)

    def test_ssim_is_that_of_the_reference(self):
        """0.92763 is what scikit-image 0.26 gives with Wang's window and the plain covariance."""
        other = (self.picture // 2 + np.roll(self.picture, 1, axis=1) // 2).astype(np.uint8)
        assert ssim(self.picture, other) == pytest.approx(0.9276321676, abs=1e-9)
        assert ssim(self.picture[None], self.picture[None]) == pytest.approx(1)

    def test_ssim_of_two_flat_pictures_has_a_closed_form(self):
        a, b = (np.full((16, 16, 3), value, np.uint8) for value in (100, 120))
        c1 = (0.01 * 255) ** 2
        assert ssim(a, b) == pytest.approx((2 * 100 * 120 + c1) / (100**2 + 120**2 + c1))
