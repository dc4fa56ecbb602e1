"""The quality benchmark: fixed samples, figures of clips of known quality, tables that say what holds."""

import hashlib
import json
import shutil
from functools import partial

import numpy as np
import pytest
import torch

from benchmarks import quality, quality_report
from benchmarks.quality import EQUAL, SETS, Choice, animate, compare, draw_samples, generate, main, mislead
from benchmarks.quality_report import bound_rows, digest, summarised, summarised_costs, write_report
from builder.demo.motion import SECTION
from builder.demo.world import render
from builder.make_demo_models import RECORD, SUMS, take
from core.pipeline.caching import CACHES
from core.pipeline.sections import plan_sections
from core.request import parse_request
from core.timing import JobTimer
from diffusers_helper.magcache import MagnitudeCurve
from tests.test_demo_world import photograph
from tests.tiny import TINY_MODELS


@pytest.fixture(autouse=True)
def photographs(monkeypatch):
    """Stand-ins: the packages that have them are only needed by the benchmark itself."""
    monkeypatch.setattr(quality, "render", partial(render, photograph=photograph))


@pytest.fixture
def worker_makes(monkeypatch):
    """Takes a function of the true clip, whose result every job has as its video from then on."""

    def set_up(make):
        def video(models, picture, job, frugal=False):
            (truth,) = [clip for clip in clips if np.array_equal(clip[0], picture)]
            timer = JobTimer()
            timer.sections.append({"sample": 1.0})
            return make(truth), timer

        clips = []
        monkeypatch.setattr(quality, "generate", video)
        true_clip = quality.Sample.true_clip

        def noted(sample):
            clips[:] = [true_clip(sample)]
            return clips[0]

        monkeypatch.setattr(quality.Sample, "true_clip", noted)

    return set_up


def still(clip: np.ndarray) -> np.ndarray:
    return clip[:1].repeat(len(clip), axis=0)


def found_of(*names: str, most: int | None = None) -> list[dict]:
    return [quality.judge(None, sample) for sample in draw_samples([*names], 0.01)[:most]]


def cost(choice: str, psnr: float, seconds: float) -> dict:
    return {
        "choice": choice,
        "to_exact": psnr,
        "psnr": psnr - 10,
        "followed": choice == "exact",
        "computed": round(10 * seconds),
        "sample_s": seconds,
        "total_s": 2 * seconds,
    }


class TestSamples:
    def test_there_are_as_many_as_the_sets_say(self):
        samples = draw_samples([*SETS])
        counts = {name: sum(sample.set == name for sample in samples) for name in SETS}
        assert counts == {
            "vae": 50,
            "i2v": 100,
            "unseen": 100,
            "f1": 100,
            "i2v-4": 40,
            "f1-4": 40,
            "i2v-10": 20,
            "f1-10": 20,
            "camera": 20,
            "camera-f1": 20,
            "control": 40,
            "costs": 12,
        }
        assert len({*samples}) == len(samples)

    def test_they_are_the_same_at_every_call_and_in_both_directions(self):
        first, again, f1 = (draw_samples([name], 0.1) for name in ("i2v", "i2v", "f1"))
        assert first == again and [a.job for a in first] == [a.job for a in again]
        assert [a.job | {"model": "f1"} for a in first] == [b.job for b in f1]
        assert len({a.job["seed"] for a in first}) == len(first)

    def test_a_quick_look_has_the_first_of_every_kind(self):
        samples = draw_samples(["i2v"], 0.01)
        assert [(sample.kind, sample.index) for sample in samples] == [
            (kind, 0) for kind in SETS["i2v"].counts
        ]
        assert {*samples} < {*draw_samples(["i2v"])}

    @pytest.mark.parametrize("name", [name for name in SETS if name != "vae"])
    def test_the_video_is_as_long_as_the_true_clip(self, name):
        sample = draw_samples([name], 0.01)[0]
        request = parse_request({"input_image": "…"} | sample.job)
        plan = plan_sections(request.total_second_length, request.latent_window_size, request.model)
        assert len(plan.sections) == SETS[name].sections
        assert plan.frames == len(sample.true_clip()) == SETS[name].sections * SECTION + 1

    def test_an_unknown_set_is_refused(self, capsys):
        with pytest.raises(SystemExit):
            main(["--sets", "i2v,f2"])
        assert "no set 'f2'" in capsys.readouterr().err


class TestFigures:
    def test_the_true_clip_is_as_good_as_can_be(self, worker_makes):
        worker_makes(lambda truth: truth)
        for found in found_of("i2v", "unseen", "camera") + found_of("i2v-4", most=1):
            assert found["followed"] and all(found["bystanders"]) and all(found["kept"]), found
            assert all(abs(event["travel"] - 1) < 0.1 for event in found["events"])
            assert found["psnr"] == found["first_frame"] == EQUAL and found["ssim"] == pytest.approx(1)
            assert found["gain"] > 20
            assert found.get("drift") == found.get("true_drift")
            assert ("drift" in found) == (found["set"] == "i2v-4")

    def test_a_still_follows_nothing_and_gains_nothing(self, worker_makes):
        worker_makes(still)
        for found in found_of("i2v", "camera-f1"):
            assert not found["followed"] and found["gain"] == pytest.approx(0), found
            assert [abs(event["travel"]) < 0.1 for event in found["events"]] == [True] * len(found["events"])
            assert found["first_frame"] == EQUAL and all(found["kept"])

    def test_a_wrong_prompt_is_told_from_the_right_one(self, worker_makes):
        worker_makes(lambda truth: truth)
        samples = draw_samples(["control"], 0.4)
        found = [mislead(None, sample) for sample in samples]
        assert all(one["true_followed"] and not one["wrong_followed"] for one in found)
        assert len({one["control"] for one in found}) == 4
        assert None in {one["wrong_followed"] for one in found}  # the asked shape is not there
        for one, sample in zip(found, samples, strict=True):
            assert one["prompt"] != sample.job["prompt"] and one["seed"] == sample.job["seed"]
        worker_makes(still)
        assert not any(mislead(None, sample)["true_followed"] for sample in samples)

    def test_the_vae_alone(self, tiny_models):
        world, photographs = (
            quality.judge(tiny_models, sample)
            for sample in draw_samples(["vae"], 0.01)
            if sample.kind in {"one", "camera"}
        )
        assert 5 < world["clip"] < 30 and "still" not in world
        assert 5 < photographs["still"] < 30

    def test_a_job_of_the_worker(self, tiny_models):
        sample = draw_samples(["f1"], 0.01)[0]
        found = animate(tiny_models, sample)
        assert found["psnr"] < 30 and not found["followed"]
        assert found["sample_s"] > 0
        json.dumps(found, allow_nan=False)

    def test_what_a_choice_costs(self, tiny_models, quick_decode, monkeypatch):
        """The exact path again is equal; each other choice does what it says, and is undone."""
        seen = []

        def watched(models, picture, job, frugal=False):
            dtypes = models.transformer_dtype, models.vae.dtype
            seen.append((job["cache"], job.get("cache_threshold"), frugal, *dtypes))
            return generate(models, picture, job | {"steps": min(4, job.get("steps", 4))}, frugal)

        offered = [
            Choice("exact"),
            Choice("again"),
            Choice("teacache 1", {"cache": "teacache", "cache_threshold": 1.0}),
            Choice("magcache 1", {"cache": "magcache", "cache_threshold": 1.0}),
            Choice("euler 4", {"sampler": "euler", "steps": 4}),
            Choice("tiled decode", tiled=True),
            Choice("bfloat16", transformer=torch.bfloat16),
        ]
        monkeypatch.setattr(quality, "generate", watched)
        monkeypatch.setattr(quality, "choices", lambda device: offered)
        monkeypatch.setattr(tiny_models, "magnitudes", {"i2v": MagnitudeCurve((1.0, 0.5), (1.0, 1.05))})
        (sample, *_) = draw_samples(["costs"], 0.01)
        found = compare(tiny_models, sample)["choices"]
        assert [one["choice"] for one in found] == [choice.name for choice in offered]
        equal = [one["choice"] for one in found if one["to_exact"] == EQUAL]
        assert equal == ["exact", "again", "tiled decode"]
        single = torch.float32
        assert seen[1::2] == [
            ("none", None, False, single, single),
            ("none", None, False, single, single),
            ("teacache", 1.0, False, single, single),
            ("magcache", 1.0, False, single, single),
            ("none", None, False, single, single),
            ("none", None, True, single, single),
            ("none", None, False, torch.bfloat16, single),
        ]
        assert tiny_models.transformer_dtype == tiny_models.transformer.dtype == single
        assert tiny_models.vae.tile_sample_min_height == 256

    def test_models_that_were_not_measured_are_measured_once(self, tiny_models, monkeypatch):
        curve, asked = MagnitudeCurve((1.0, 0.5), (1.0, 1.05)), []
        monkeypatch.setattr(quality, "measure", lambda models, *what: asked.append(what) or curve)
        monkeypatch.setattr(tiny_models, "magnitudes", {})
        for _ in range(2):
            quality.measure_magnitudes(tiny_models, "i2v")
        ((picture, request),) = asked
        assert tiny_models.magnitudes == {"i2v": curve}
        assert picture.ndim == 3 and request.model == "i2v"

    def test_every_choice_is_a_request_that_the_worker_takes(self):
        offered = quality.choices(torch.device("cpu"))
        for choice in offered:
            parse_request({"input_image": "…", "prompt": "x", "cache": "none"} | choice.fields)
        names = {choice.name for choice in offered}
        assert len(names) == len(offered)
        assert {f"{kind} {of.THRESHOLD:g}" for kind, of in CACHES.items()} <= names
        assert {name.partition(" ")[0] for name in names} >= {"bh2", "euler", "shift", "teacache+"}

    def test_on_a_cpu_no_other_precision_is_offered(self):
        names, with_gpu = ([c.name for c in quality.choices(torch.device(of))] for of in ("cpu", "cuda"))
        others = {"transformer float32", "transformer float16", "VAE float32", "fp8", "fp8 attention"}
        assert names[0] == "exact" and not {*names} & others
        assert {*with_gpu} - {*names} == others | {"fp8 both"}


class TestReport:
    def test_a_bound_that_fails_is_marked(self, worker_makes):
        worker_makes(lambda truth: truth)
        good = summarised(found_of("i2v"))
        assert {row[-1] for row in bound_rows({"i2v": good})} == {"✓"}
        worker_makes(still)
        marks = {row[1]: row[-1] for row in bound_rows({"i2v": summarised(found_of("i2v"))})}
        assert marks["prompt followed"] == "✗" and marks["bystanders stay"] == "✓"
        assert bound_rows({"i2v": good | {"followed": 0.9699}})[0][2:] == ("97.0 %", "≥ 97 %", "✗")

    def test_costs_are_ratios_to_the_exact_path_of_the_same_scene(self):
        scenes = [
            {"set": "costs", "choices": [cost("exact", 100.0, s), cost("fast", 40.0 + s, s / 2)]}
            for s in (1.0, 5.0)
        ]
        assert summarised_costs(scenes)["fast"] == {
            "to_exact": 43.0,
            "to_exact_least": 41.0,
            "change": -57.0,
            "followed": 0.0,
            "computed": 15,
            "sample_time": 0.5,
            "total_time": 0.5,
        }

    def test_every_table_is_written(self, worker_makes, tmp_path, monkeypatch, capsys):
        drawn = []
        monkeypatch.setattr(quality_report, "draw", lambda *what: drawn.append(what[-1]))
        worker_makes(lambda truth: truth)
        found = found_of("i2v", "control") + found_of("i2v-4", most=1)
        found += [
            {"set": "vae", "kind": "one", "index": 0, "clip": 37.0},
            {"set": "vae", "kind": "camera", "index": 0, "clip": 27.0, "still": 26.0},
            {
                "set": "costs",
                "kind": "one",
                "index": 0,
                "choices": [cost("exact", 100.0, 2.0), cost("fast", 40, 1.0)],
            },
        ]
        found[0] |= {"followed": False, "bystanders": [False]}
        write_report(found, TINY_MODELS, tmp_path, {"processes": 1})
        assert drawn == [tmp_path / "quality.png"]
        text = (tmp_path / "quality.md").read_text("utf-8")
        assert text in capsys.readouterr().out
        for heading in ("Bounds", "Videos", "VAE", "Wrong prompts", "Costs", "Drift", "Failures"):
            assert f"\n## {heading}" in text
        assert "| vae | VAE, photographs: PSNR, mean (dB) | 26.0 | ≥ 28 | ✗ |" in text
        assert "| fast | 40.0 | 40.0 | -60.00 | 0% | 10 | 0.50 | 0.50 |" in text
        assert "a bystander did not stay" in text and found[0]["prompt"] in text
        written = json.loads((tmp_path / "quality.json").read_text("utf-8"))
        assert written["samples"] == found
        assert written["about"]["weights"] == digest(TINY_MODELS)


def test_the_weights_are_named_by_the_digest_of_their_sums(tmp_path):
    run = tmp_path / "run"
    for part in ("hunyuan", "redux", "framepack"):
        shutil.copytree(TINY_MODELS / part, run / part)
    (run / RECORD).write_text("{}")
    take(run, tmp_path / "weights")
    sums = (tmp_path / "weights" / SUMS).read_bytes()
    assert digest(run) == digest(tmp_path / "weights") == hashlib.sha256(sums).hexdigest()


def test_the_command(tmp_path, monkeypatch, capsys):
    """Through a process of its own, on a scene that needs no photograph."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # the command sets it, for its processes
    monkeypatch.setattr(quality_report, "draw", lambda *what: None)
    main(["--models", str(TINY_MODELS), "--sets", "unseen", "--count-scale", "0.01", "--out", str(tmp_path)])
    (sample,) = json.loads((tmp_path / "quality.json").read_text("utf-8"))["samples"]
    assert sample["set"] == "unseen" and not sample["followed"]
    assert "1 of 1" in capsys.readouterr().out
