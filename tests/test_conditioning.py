"""What each section is conditioned on, seen at the transformer's door on the tiny models."""

import base64
import hashlib
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from PIL import Image

from core.errors import DownloadError, ImageError, ImageTooLargeError, RequestError, UrlRefusedError
from core.job import run_job
from core.keyframes import decode_keyframes
from core.pipeline.conditioning import Conditioning, encode_conditioning
from core.pipeline.encoding import Encoder
from core.pipeline.sampling import sample_sections
from core.pipeline.sections import plan_sections
from core.request import parse_request
from core.timing import JobTimer
from diffusers_helper.text import mix_prompts
from diffusers_helper.transformer import PackedHistory
from tests.test_images import encoded, to_base64


def noise(seed: int) -> np.ndarray:
    """(64, 64, 3) uint8"""
    return np.random.default_rng(seed).integers(0, 256, (64, 64, 3), dtype=np.uint8)


@dataclass(frozen=True)
class Seen:
    """What the transformer is given in a section, for the positive pass."""

    history: PackedHistory
    hidden_states: torch.Tensor
    mask: torch.Tensor
    pooled: torch.Tensor
    image_embeds: torch.Tensor


@dataclass(frozen=True)
class Job:
    conditioning: Conditioning
    latents: list[torch.Tensor]  # by the sections' places in the video, as all that follows
    seen: list[Seen]
    first_frame: torch.Tensor
    timer: JobTimer


@pytest.fixture
def sample(tiny_models, monkeypatch):
    """Request fields → a job of four sections of two latent frames, of one step each.

    Their middles are at 1/6, 13/30, 7/10 and 29/30 of a second. Images are numbers, the seeds of noise.
    """

    def run(**fields) -> Job:
        model = fields.pop("model", "i2v")
        keyframes = {}
        for place, section in enumerate(fields.get("sections", [])):
            if "image" in section:
                keyframes[place] = noise(section["image"])
                section["image"] = "decoded elsewhere"
        defaults = {"input_image": "x", "prompt": "base", "total_second_length": 1, "latent_window_size": 2}
        request = parse_request(defaults | {"steps": 1, "model": model} | fields)
        plan = plan_sections(1, 2, model)
        tiny_models.use_direction(model)
        timer = JobTimer()
        encoder = Encoder(tiny_models, timer)
        conditioning = encode_conditioning(tiny_models, noise(0), plan, request, 5, encoder, keyframes)

        histories, conditions = [], []
        transformer = tiny_models.transformer
        prepare_history, prepare_condition = transformer.prepare_history, transformer.prepare_condition

        def history(packed):
            histories.append(packed)
            conditions.append([])
            return prepare_history(packed)

        def condition(text, mask, pooled, image_embeds, guidance):
            conditions[-1].append((text, mask, pooled, image_embeds))
            return prepare_condition(text, mask, pooled, image_embeds, guidance)

        with monkeypatch.context() as patch:
            patch.setattr(transformer, "prepare_history", history)
            patch.setattr(transformer, "prepare_condition", condition)
            sampled = list(
                sample_sections(
                    tiny_models, plan, conditioning, request, 5, timer, lambda *_: None, preserved_gb=6
                )
            )
        order = sorted(plan.sections, key=plan.position)
        seen = [Seen(packed, *passes[0]) for packed, passes in zip(histories, conditions, strict=True)]
        return Job(
            conditioning,
            [sampled[section.index].latents for section in order],
            [seen[section.index] for section in order],
            sampled[-1 if model == "i2v" else 0].to_decode[:, :, :1],
            timer,
        )

    return run


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> list[bool]:
    return list(map(torch.equal, a, b))


class TestPrompts:
    """A change in the section at place 1: I2V samples 3, 2, 1, 0, and F1 0, 1, 2, 3."""

    @pytest.mark.parametrize(
        ("model", "unchanged"), [("i2v", [False, False, True, True]), ("f1", [True, False, False, False])]
    )
    @pytest.mark.parametrize(
        "timed",
        [
            {"prompt": "base [0.3s-0.6s: other]"},
            {"sections": [{"start_s": 0.3, "end_s": 0.6, "prompt": "other"}]},
        ],
        ids=["inline", "sections"],
    )
    def test_a_timed_prompt_acts_in_its_time(self, sample, model, unchanged, timed):
        plain, changed = sample(model=model), sample(model=model, **timed)
        assert same(changed.latents, plain.latents) == unchanged
        assert same([s.hidden_states for s in changed.seen], [s.hidden_states for s in plain.seen]) == [
            True,
            False,
            True,
            True,
        ]
        assert changed.conditioning.warnings == ()

    def test_each_prompt_is_encoded_once_and_only_where_it_is_needed(self, sample):
        timed = "unused [0s-0.3s: a] [0.3s-0.6s: b] [0.6s-0.8s: a] [0.8s-: c] [9s: never]"
        job = sample(prompt=timed)
        assert job.timer.encodings == {"hits": 0, "misses": 3 + 2}
        assert list(job.conditioning.prompts) == ["c", "a", "b"]
        assert job.conditioning.warnings == (
            "`prompt` (9 s on) had no effect: the video ends at 1.1 s.",
            "`prompt` had no effect: timed prompts cover every section.",
        )
        assert torch.equal(job.seen[0].hidden_states, job.seen[2].hidden_states)

    def test_guidance_has_one_negative_prompt_throughout(self, sample):
        timed = {"sections": [{"start_s": 0.3, "end_s": 0.6, "prompt": "other"}]}
        job = sample(cfg=2, n_prompt="blurry", **timed)
        plain = sample(cfg=2, n_prompt="blurry")
        sections = plan_sections(1, 2, "i2v").sections
        for section in sections:
            ours, theirs = job.conditioning.of(section).negative, plain.conditioning.of(section).negative
            assert torch.equal(ours.encoder_hidden_states, theirs.encoder_hidden_states)
        assert job.timer.encodings["misses"] == 3 + 2
        assert same(job.latents, plain.latents) == [False, False, True, True]
        without = sample(**timed).conditioning.of(sections[0]).negative
        assert without.encoder_hidden_states.abs().sum() == 0  # the negative of cfg 1 is zeros, as it was

    def test_too_long_a_timed_prompt_is_named(self, sample):
        job = sample(sections=[{"start_s": 0.3, "end_s": 0.6, "prompt": "word " * 100}])
        assert job.conditioning.warnings == (
            "`sections.0` (0.3–0.6 s) is longer than the 256 tokens the model reads; the rest was ignored.",
        )


class TestBlend:
    def test_sections_around_a_change_get_a_mixture(self, sample):
        prompts = "one [0.5s: quite another, longer prompt]"
        hard, soft = sample(prompt=prompts), sample(prompt=prompts, blend_sections=2)
        one, other = hard.seen[0], hard.seen[3]
        for place, weight in ((0, 0), (1, 1 / 3), (2, 2 / 3), (3, 1)):
            mixed = soft.seen[place]
            for name in ("hidden_states", "pooled"):
                expected = (1 - weight) * getattr(one, name) + weight * getattr(other, name)
                assert torch.allclose(getattr(mixed, name), expected, atol=1e-6)
        assert torch.equal(soft.seen[0].hidden_states, one.hidden_states)
        assert torch.equal(soft.seen[3].hidden_states, other.hidden_states)
        tokens = [int(seen.mask.sum()) for seen in soft.seen]
        assert tokens[0] < tokens[1] == tokens[2] == tokens[3]
        assert same(soft.latents, hard.latents) == [False, False, False, True]

    def test_tokens_that_one_prompt_lacks_fade(self, sample):
        job = sample(prompt="one [0.5s: quite another, longer prompt]")
        short, long = (
            job.conditioning.prompts["one"],
            job.conditioning.prompts["quite another, longer prompt"],
        )
        mixed = mix_prompts([(short, 0.25), (long, 0.75)])
        rest = slice(int(short.encoder_attention_mask.sum()), None)
        assert torch.equal(mixed.encoder_attention_mask, long.encoder_attention_mask)
        tail = mixed.encoder_hidden_states[:, rest]
        assert tail.abs().sum() > 0
        assert torch.equal(tail, 0.75 * long.encoder_hidden_states[:, rest])

    def test_one_prompt_is_not_touched(self, sample):
        prompt = sample().conditioning.prompts["base"]
        assert mix_prompts([(prompt, 1.0)]) is prompt

    def test_without_a_change_it_says_so_and_changes_nothing(self, sample):
        job = sample(blend_sections=3)
        assert job.conditioning.warnings == ("`blend_sections` had no effect: the prompt does not change.",)
        assert all(same(job.latents, sample().latents))


class TestKeyframes:
    @pytest.mark.parametrize("model", ["i2v", "f1"])
    @pytest.mark.parametrize("place", range(4))
    def test_only_its_sections_see_it(self, sample, model, place):
        """In the start image's slot of the packed history, and as SigLIP's embedding."""
        start_s = (0, 0.3, 0.6, 0.8)[place]
        plain = sample(model=model)
        job = sample(model=model, sections=[{"start_s": start_s, "end_s": start_s + 0.25, "image": 1}])
        keyframe = job.conditioning.images[0]
        for k, seen in enumerate(job.seen):
            slot, history = seen.history.latents_clean.split(1, dim=2)
            latent = keyframe.drawn.latent if k == place else job.conditioning.start_latent
            assert torch.equal(slot, latent)
            assert torch.equal(seen.image_embeds, keyframe.embeds) == (k == place)
            assert not torch.equal(history, keyframe.drawn.latent)
        assert not torch.equal(keyframe.drawn.latent, job.conditioning.start_latent)
        changed = [not equal for equal in same(job.latents, plain.latents)]
        assert changed == [k <= place if model == "i2v" else k >= place for k in range(4)]

    def test_the_first_frame_stays_the_input_image(self, sample):
        for model in ("i2v", "f1"):
            job = sample(model=model, sections=[{"start_s": 0, "image": 1}])
            assert torch.equal(job.first_frame, job.conditioning.start_latent)

    def test_an_image_is_encoded_once_however_often_it_is_used(self, sample):
        job = sample(sections=[{"start_s": 0, "end_s": 0.5, "image": 1}, {"start_s": 0.6, "image": 1}])
        assert job.timer.encodings == {"hits": 0, "misses": 1 + 2 + 2}
        assert same([s.image_embeds for s in job.seen], [job.seen[0].image_embeds] * 4) == [True] * 4

    def test_an_image_that_no_section_sees_is_not_encoded(self, sample):
        job = sample(sections=[{"start_s": 50, "image": 1}])
        assert job.timer.encodings["misses"] == 3
        assert job.conditioning.warnings == (
            "`sections.0` (50 s on) had no effect: the video ends at 1.1 s.",
        )

    def test_the_input_image_as_keyframe_changes_nothing(self, sample):
        job = sample(sections=[{"start_s": 0, "image": 0}])
        assert all(same(job.latents, sample().latents))


class TestDecoding:
    def sections(self, *images):
        data = [{"start_s": k, "image": image} for k, image in enumerate(images)]
        return parse_request({"input_image": "x", "prompt": "x", "sections": data}).sections

    def test_images_are_cropped_to_the_videos_size(self, picture):
        image = to_base64(encoded(Image.fromarray(picture), "PNG"))
        keyframes = decode_keyframes(self.sections(image, image), None, (96, 160))
        assert {place: keyframe.pixels.shape for place, keyframe in keyframes.items()} == {
            0: (96, 160, 3),
            1: (96, 160, 3),
        }

    @pytest.mark.parametrize(
        ("image", "kind", "sentence"),
        [
            ("!", ImageError, "The image of `sections.1` is not valid base64."),
            ("aGVsbG8=", ImageError, "The image of `sections.1` is not a PNG, JPEG or WebP."),
            ("data:,x", ImageError, "The image of `sections.1`'s data URI must be base64."),
            ("A" * 30_000_000, ImageTooLargeError, "The image of `sections.1` has over 20 MB."),
        ],
        ids=["base64", "text", "data URI", "size"],
    )
    def test_what_is_wrong_names_the_section(self, picture, image, kind, sentence):
        good = to_base64(encoded(Image.fromarray(picture), "PNG"))
        with pytest.raises(kind) as caught:
            decode_keyframes(self.sections(good, image), None, (96, 160))
        assert str(caught.value) == sentence and type(caught.value) is kind

    @pytest.mark.parametrize("kind", [UrlRefusedError, DownloadError])
    def test_a_url_goes_through_the_same_guard(self, kind):
        def fetch(url, max_bytes):
            assert (url, max_bytes) == ("https://images.test/a.png", 20_000_000)
            raise kind("The URL is not valid.")

        with pytest.raises(kind) as caught:
            decode_keyframes(self.sections("https://images.test/a.png"), fetch, (96, 160))
        assert str(caught.value) == "`sections.0.image`: The URL is not valid."


@pytest.mark.usefixtures("quick_decode")
class TestJobs:
    @pytest.fixture
    def data(self, picture):
        return {
            "input_image": to_base64(encoded(Image.fromarray(picture), "PNG")),
            "prompt": "The circle moves.",
            "total_second_length": 1,
            "latent_window_size": 4,
            "steps": 1,
        }

    def test_the_reply_of_a_timed_job(self, data, tiny_models, picture):
        keyframe = to_base64(encoded(Image.fromarray(255 - picture), "JPEG"))
        section = {"start_s": 0.5, "prompt": "It stops."}
        reply = run_job(
            data | {"sections": [section | {"image": keyframe}], "blend_sections": 1}, tiny_models
        )
        named = f"sha256:{hashlib.sha256(base64.b64decode(keyframe)).hexdigest()}"
        assert reply["parameters"]["sections"] == [section | {"end_s": None, "image": named}]
        assert reply["parameters"]["blend_sections"] == 1
        assert reply["warnings"] == [] and reply["sections"] == 2
        assert reply["timings"]["encodings"] == {"hits": 0, "misses": 2 + 2 + 2}
        assert keyframe not in str(reply)
        assert reply["video_base64"] != run_job(data, tiny_models)["video_base64"]

    def test_a_bad_keyframe_is_refused_before_any_model_is_used(self, data, tiny_models, monkeypatch):
        monkeypatch.setattr("core.job.generate_video_sync", None)
        with pytest.raises(RequestError, match=r"The image of `sections.0` is not a PNG"):
            run_job(data | {"sections": [{"start_s": 0, "image": "aGVsbG8="}]}, tiny_models)
