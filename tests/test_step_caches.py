"""Step caches: each skips, changes the result only where it skips, and has a state for every pass."""

import base64
import io
import json
import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from builder.measure_magnitudes import main as measure_magnitudes
from core.errors import ModelError, RequestError
from core.job import run_job
from core.pipeline import Models
from core.pipeline.caching import CACHES, step_caches
from core.pipeline.conditioning import encode_conditioning
from core.pipeline.encoding import Encoder
from core.pipeline.magnitudes import FILE, FRAMEPACK, curves_of
from core.pipeline.sampling import sample_sections
from core.pipeline.sections import plan_sections
from core.request import VideoRequest, parse_request
from core.timing import JobTimer
from core.weights.profiles import load_profile
from diffusers_helper.magcache import PUBLISHED, MagCache, MagnitudeCurve, MagnitudeRecorder
from diffusers_helper.samplers import SAMPLERS
from diffusers_helper.schedule import shifted_sigmas
from diffusers_helper.step_cache import StepCache, extrapolation_weights
from tests.tiny import TINY, TINY_ENV, TINY_MODELS

STEPS = 8
# no real model's: the tiny one's residuals jump, and MagCache would rightly skip hardly any step
GENTLE = MagnitudeCurve(tuple(shifted_sigmas(STEPS, 1.0)[:-1].tolist()), (1.0, *[0.98] * (STEPS - 1)))
SKIPPING = {"teacache": 1.0, "magcache": 0.5, "firstblock": 1.0}  # thresholds at which the tiny model skips


@pytest.fixture
def models(tiny_models):
    """The tiny models, as if their magnitudes had been measured."""
    tiny_models.magnitudes = dict.fromkeys(("i2v", "f1"), GENTLE)
    yield tiny_models
    tiny_models.magnitudes = {}


@pytest.fixture(scope="module")
def prompt(tiny_models):
    """A job's conditioning, with a negative prompt that acts where cfg > 1."""
    picture = np.random.default_rng(0).integers(0, 256, (96, 64, 3), dtype=np.uint8)
    request, encoder = asked(cfg=3.0, n_prompt="blurry"), Encoder(tiny_models, JobTimer())
    return encode_conditioning(tiny_models, picture, plan_sections(1, 2, "i2v"), request, 0, encoder)


def asked(**fields):
    required = {"input_image": "…", "prompt": "The circle moves.", "steps": STEPS, "latent_window_size": 2}
    return parse_request(required | fields)


def sampled(models, prompt, sections=1, **fields):
    """A job's latents by section, the caches in the order they were made, and what the timer has of them."""
    request, timer, made = asked(**fields), JobTimer(), []
    new = step_caches(request, models.direction, models.magnitudes)

    def noted(sigmas):
        made.append(new(sigmas))
        return made[-1]

    plan = plan_sections(1, 2, models.direction)
    plan = replace(plan, sections=plan.sections[-sections:])
    loop = sample_sections(
        models, plan, prompt, request, 0, timer, lambda *_: None, preserved_gb=0, new_cache=noted
    )
    return [section.latents for section in loop], made, timer.sections


def computed_in(sections):
    return [section["steps_computed"] for section in sections]


@pytest.fixture
def runs(models):
    """How often each block of the tiny transformer ran, the first being 0."""
    blocks = [*models.transformer.transformer_blocks, *models.transformer.single_transformer_blocks]
    counts = Counter()
    hooks = [
        block.register_forward_pre_hook(lambda *_, index=index: counts.update([index]))
        for index, block in enumerate(blocks)
    ]
    yield counts
    for hook in hooks:
        hook.remove()


class TestEveryKind:
    kinds = pytest.mark.parametrize("kind", CACHES)

    def test_the_request_offers_them(self):
        offered = VideoRequest.model_json_schema()["properties"]
        assert offered["cache"]["anyOf"][0]["enum"] == ["none", *CACHES]
        assert offered["sampler"]["enum"] == [*SAMPLERS]
        told = offered["cache_threshold"]["description"]
        assert ", ".join(f"{kind} {of.THRESHOLD:g}" for kind, of in CACHES.items()) in told

    @kinds
    @pytest.mark.parametrize("cfg", [1.0, 3.0])
    def test_at_threshold_0_every_bit_is_as_without(self, kind, cfg, models, prompt):
        (exact,), _, _ = sampled(models, prompt, cache="none", cfg=cfg)
        (same,), _, sections = sampled(models, prompt, cache=kind, cache_threshold=0.0, cfg=cfg)
        assert torch.equal(exact, same) and computed_in(sections) == [STEPS]

    @kinds
    def test_the_result_changes_where_it_skips(self, kind, models, prompt, runs):
        (exact,), _, _ = sampled(models, prompt, cache="none")
        runs.clear()
        (near,), (cache, unused), sections = sampled(
            models, prompt, cache=kind, cache_threshold=SKIPPING[kind]
        )
        assert 2 <= len(cache.computed) < STEPS and unused.computed == []
        assert computed_in(sections) == [len(cache.computed)]
        assert cache.computed[0] == 0 and cache.computed[-1] == STEPS - 1
        assert 1e-4 < (near - exact).norm() / exact.norm() < 1
        first, *others = (runs[index] for index in sorted(runs))
        assert {*others} == {len(cache.computed)}
        assert first == (STEPS if kind == "firstblock" else len(cache.computed))

    @kinds
    def test_a_higher_threshold_computes_no_more(self, kind, models, prompt):
        counts = []
        for threshold in (0.0, SKIPPING[kind] / 8, SKIPPING[kind] / 2, SKIPPING[kind]):
            _, _, sections = sampled(models, prompt, cache=kind, cache_threshold=threshold)
            counts += computed_in(sections)
        assert counts == sorted(counts, reverse=True) and counts[0] > counts[-1]

    @kinds
    def test_a_state_for_each_pass_of_each_section(self, kind, models, prompt):
        fields = {"cache": kind, "cache_threshold": SKIPPING[kind], "cfg": 3.0}
        latents, made, sections = sampled(models, prompt, sections=2, **fields)
        assert len({id(cache) for cache in made}) == 4
        for cache in made:
            assert cache.computed[0] == 0 and cache.computed[-1] == STEPS - 1
            assert len(cache.computed) < STEPS
        pairs = [{*made[i].computed, *made[i + 1].computed} for i in (0, 2)]
        assert computed_in(sections) == [len(steps) for steps in pairs]
        again, _, _ = sampled(models, prompt, sections=2, **fields)
        assert all(map(torch.equal, latents, again))

    @pytest.mark.parametrize(("kind", "some"), [("teacache", 0.3), ("magcache", 0.05), ("firstblock", 0.7)])
    def test_an_extrapolated_residual_is_another(self, kind, some, models, prompt):
        """At a threshold that skips late steps too, before which three were computed."""
        fields = {"cache": kind, "cache_threshold": some, "steps": 12}
        results = [sampled(models, prompt, cache_order=order, **fields) for order in (0, 1, 2)]
        last, line, parabola = (latents for (latents,), _, _ in results)
        assert not torch.equal(last, line) and not torch.equal(line, parabola)

    @kinds
    @pytest.mark.parametrize("steps", [1, 2])
    def test_few_steps(self, kind, steps, models, prompt):
        (latents,), _, sections = sampled(models, prompt, cache=kind, steps=steps, cache_order=2)
        (exact,), _, _ = sampled(models, prompt, cache="none", steps=steps)
        assert torch.equal(latents, exact) and computed_in(sections) == [steps]


class Listed(StepCache):
    """Computes the steps it is told."""

    THRESHOLD = 0.5

    def __init__(self, steps, compute, order):
        super().__init__(steps, order=order)
        self.compute = compute

    def error(self, signal):
        return float(self._step in self.compute)

    def note(self, signal, computed):
        pass


class TestExtrapolation:
    """Of residuals that follow a polynomial in the step."""

    class Blocks:
        def __init__(self, residual):
            self.residual = residual

        def rest(self, tokens):
            return tokens + self.residual

    @pytest.mark.parametrize("order", [0, 1, 2])
    @pytest.mark.parametrize("degree", [0, 1, 2])
    def test_an_order_is_exact_to_its_degree(self, order, degree):
        tokens, shape = torch.ones(1, 3, 4), torch.arange(12.0).view(1, 3, 4)
        cache = Listed(9, compute=(1, 2, 4), order=order)
        off = []
        for step in range(8):
            residual = shape * (step - 3.0) ** degree
            output = cache.run(tokens, self.Blocks(residual))
            if step > 4:  # three are known: 1, 2, 4
                off.append((output - tokens - residual).abs().max().item())
        assert cache.computed == [0, 1, 2, 4]
        assert (max(off) < 1e-3) == (degree <= order)

    def test_as_many_as_there_are(self):
        assert extrapolation_weights([3], 5) == [1.0]
        assert extrapolation_weights([3, 4], 5) == [-1.0, 2.0]
        assert extrapolation_weights([0, 1, 2], 3) == [1.0, -3.0, 3.0]


class TestMagCache:
    @pytest.mark.parametrize(
        ("direction", "computed"),
        [
            ("i2v", [0, 1, 2, 3, 4, 7, 9, 12, 15, 18, 22, 24]),
            ("f1", [0, 1, 2, 3, 4, 7, 9, 12, 16, 20, 22, 24]),
        ],
    )
    def test_the_published_curve_at_the_published_settings(self, direction, computed):
        """What the authors' rule computes of 25 steps: by hand from their formula."""
        curve = PUBLISHED[direction]
        ratios = curve.at(shifted_sigmas(25, math.log(7))[:-1].tolist())
        assert ratios == pytest.approx(curve.ratios, abs=1e-9)
        cache = MagCache(25, ratios=ratios)
        assert [step for step in range(25) if cache.should_compute(None)] == cache.computed == computed

    def test_half_as_many_steps_have_the_products_of_the_ratios(self):
        sigmas = [1.0, 0.9, 0.7, 0.4, 0.3]
        curve = MagnitudeCurve(tuple(sigmas), (1.0, 1.2, 1.1, 0.9, 0.5))
        assert curve.at(sigmas[::2]) == pytest.approx([1.0, 1.2 * 1.1, 0.9 * 0.5])
        below = curve.at([*sigmas, 0.2])[-1]
        assert below == pytest.approx(0.5)  # goes on as it ended, to lower noise than was measured

    @pytest.mark.parametrize("steps", [1, 2, 10, 25, 50, 100])
    @pytest.mark.parametrize("shift", [0.1, 1.0, 7.0, 20.0])
    def test_any_schedule(self, steps, shift):
        for curve in PUBLISHED.values():
            ratios = curve.at(shifted_sigmas(steps, math.log(shift))[:-1].tolist())
            assert len(ratios) == steps and all(0 < ratio < math.inf for ratio in ratios)

    def test_at_most_three_in_a_row_and_none_of_the_first(self):
        cache = MagCache(25, 1.0, ratios=[1.0] * 25)
        assert [step for step in range(25) if cache.should_compute(None)] == [
            0,
            1,
            2,
            3,
            4,
            8,
            12,
            16,
            20,
            24,
        ]

    def test_the_recorder_measures_means_over_the_tokens(self):
        recorder = MagnitudeRecorder(3)
        tokens = torch.zeros(1, 2, 4)
        for scale in (1.0, 2.0, 3.0):
            assert recorder.should_compute(None)
            recorder.store(tokens, torch.tensor([scale, scale**2]).view(1, 2, 1).expand(1, 2, 4))
        assert recorder.ratios == [1.0, (2 + 4) / 2, round((3 / 2 + 9 / 4) / 2, 5)]

    def test_framepack_has_the_published_curves_and_other_models_none(self, tmp_path, tiny_models):
        assert curves_of(tmp_path, FRAMEPACK) == PUBLISHED
        assert curves_of(tmp_path, tiny_models.transformer.config) == {} == tiny_models.magnitudes
        with pytest.raises(RequestError, match="i2v model has no measured magnitudes"):
            run_job({"input_image": BLACK, "prompt": "x", "cache": "magcache"}, tiny_models)

    def test_measured_magnitudes_are_what_the_worker_uses(self, tmp_path, monkeypatch, capsys, quick_decode):
        for part in ("framepack", "framepack_f1"):
            (tmp_path / part).mkdir()
            for file in (TINY_MODELS / part).iterdir():
                (tmp_path / part / file.name).symlink_to(file)
        names = {"FRAMEPACK_MODEL": "framepack", "FRAMEPACK_F1_MODEL": "framepack_f1"}
        for name, value in (TINY_ENV | {key: str(tmp_path / part) for key, part in names.items()}).items():
            monkeypatch.setenv(name, value)
        job = {"input_image": BLACK, "prompt": "x", "steps": 4, "latent_window_size": 6}
        (tmp_path / "job.json").write_text(json.dumps({"input": job | {"total_second_length": 1}}))
        assert measure_magnitudes(["--job", str(tmp_path / "job.json")]) == 0
        written = capsys.readouterr().out.split()
        assert written == [str(tmp_path / part / FILE) for part in names.values()]

        settings = replace(
            TINY,
            framepack_model=str(tmp_path / "framepack"),
            framepack_f1_model=str(tmp_path / "framepack_f1"),
        )
        models = Models(load_profile(settings), torch.device("cpu"))
        curve = models.magnitudes["i2v"]
        assert len(curve.sigmas) == 4 and curve.ratios[0] == 1 and len({*curve.ratios}) == 4
        reply = run_job(job | {"cache": "magcache"}, models)
        assert reply["parameters"]["cache"] == "magcache"
        models.use_direction("f1")
        assert [*models.magnitudes] == ["f1"] and models.magnitudes["f1"] != curve

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "[]",
            "{",
            '{"i2v": 5}',
            '{"i2v": {"sigmas": [1, 0.5]}}',
            '{"i2v": {"sigmas": [1, 0.5], "ratios": [1]}}',
            '{"i2v": {"sigmas": [0.5, 1], "ratios": [1, 1]}}',
            '{"i2v": {"sigmas": [1, 0.5], "ratios": [1, NaN]}}',
            '{"i2v": {"sigmas": [1, 0.5], "ratios": [1, -1]}}',
            '{"i2v": {"sigmas": [1], "ratios": [1]}}',
            '{"other": {"sigmas": [1, 0.5], "ratios": [1, 1]}}',
        ],
    )
    def test_a_damaged_file_is_named(self, text, tmp_path):
        (tmp_path / FILE).write_text(text)
        with pytest.raises(ModelError, match=FILE):
            curves_of(tmp_path, FRAMEPACK)

    def test_a_job_that_cannot_be_read_is_one_line(self, tmp_path, capsys):
        (tmp_path / "job.json").write_text("{")
        assert measure_magnitudes(["--job", str(tmp_path / "job.json")]) == 1
        assert capsys.readouterr().err.count("\n") == 1


def black():
    buffer = io.BytesIO()
    Image.new("RGB", (64, 96)).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


BLACK = black()
JOB = {"input_image": BLACK, "prompt": "x", "total_second_length": 1, "latent_window_size": 6, "steps": STEPS}


@pytest.mark.usefixtures("quick_decode")
class TestReply:
    @pytest.mark.parametrize("kind", CACHES)
    @pytest.mark.parametrize("cfg", [1.0, 3.0])
    def test_what_was_used_and_computed(self, kind, cfg, models):
        reply = run_job(JOB | {"cache": kind, "cache_threshold": SKIPPING[kind], "cfg": cfg}, models)
        for section in reply["timings"]["sections"]:
            assert section["steps"] == STEPS and 2 <= section["steps_computed"] < STEPS
        used = reply["parameters"]
        assert (used["cache"], used["cache_threshold"]) == (kind, SKIPPING[kind])
        assert used["use_teacache"] == (kind == "teacache") and reply["warnings"] == []

    def test_the_defaults_are_told_and_sent_back_they_make_the_same_video(self, models):
        reply = run_job(JOB, models)
        used = reply["parameters"]
        assert (used["cache"], used["cache_threshold"], used["sampler"]) == ("teacache", 0.15, "unipc_bh1")
        assert 1 < used["shift"] < 7
        own = {"resolution": None}  # the demo's is below what may be asked for
        again = run_job({"input_image": BLACK} | used | own, models)
        assert again["video_base64"] == reply["video_base64"] and again["parameters"] == used

    def test_without_a_cache(self, models):
        reply = run_job(JOB | {"use_teacache": False}, models)
        assert (reply["parameters"]["cache"], reply["parameters"]["cache_threshold"]) == ("none", None)
        assert {section["steps_computed"] for section in reply["timings"]["sections"]} == {STEPS}

    def test_sampler_and_shift_change_the_video(self, models):
        job = JOB | {"use_teacache": False, "steps": 3}
        fields = [{}, {"sampler": "unipc_bh2"}, {"sampler": "euler"}, {"shift": 1.0}, {"shift": 20}]
        videos = [run_job(job | one, models)["video_base64"] for one in fields]
        assert len({*videos}) == len(fields)

    @pytest.mark.parametrize(
        ("fields", "inert"),
        [
            (
                {"use_teacache": False, "cache_threshold": 0.1, "cache_order": 1},
                ["cache_threshold", "cache_order"],
            ),
            ({"cache": "none", "cache_threshold": 0.0}, ["cache_threshold"]),
            ({"cache": "firstblock", "cache_threshold": 0.0}, ["cache"]),
            ({"cache": "teacache", "steps": 2}, ["cache"]),
            ({"steps": 2, "sampler": "euler"}, ["sampler"]),
            ({"steps": 1, "sampler": "unipc_bh2", "shift": 3.0}, ["sampler", "shift"]),
            ({"steps": 2, "shift": 3.0}, []),
            ({"steps": 2}, []),
        ],
    )
    def test_what_had_no_effect_is_said(self, fields, inert, models):
        warnings = run_job(JOB | {"steps": 3} | fields, models)["warnings"]
        assert [warning.split(" ")[0] for warning in warnings] == [f"`{name}`" for name in inert]
