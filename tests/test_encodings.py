"""Encodings kept from job to job: bounded, bit-identical, and the encoders stay where they are."""

from contextlib import contextmanager

import numpy as np
import pytest
import torch
from PIL import Image

import core.job
from core.errors import CancelledError
from core.job import run_job
from core.pipeline import generate_video_sync
from core.pipeline.encoding import Encoder
from core.pipeline.encoding_cache import EncodingCache, content_key
from core.settings import Settings, SettingsError
from core.timing import JobTimer
from tests.test_images import encoded, to_base64


@pytest.fixture
def models(tiny_models, monkeypatch):
    """The tiny models with a cache of their own."""
    monkeypatch.setattr(tiny_models, "encodings", EncodingCache(1e6))
    return tiny_models


@pytest.fixture
def small() -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)


@pytest.fixture
def data(picture):
    return {
        "input_image": to_base64(encoded(Image.fromarray(picture), "PNG")),
        "prompt": "The circle moves.",
        "total_second_length": 1,
        "latent_window_size": 4,
        "steps": 1,
    }


@pytest.fixture
def moved(models, monkeypatch) -> list[str]:
    """The models that were asked for on the device, in order."""
    names, on_device = [], type(models).on_device

    @contextmanager
    def recorded(self, *asked, **options):
        names.extend(asked)
        with on_device(self, *asked, **options):
            yield

    monkeypatch.setattr(type(models), "on_device", recorded)
    return names


class TestCache:
    def test_the_ones_used_last_stay(self):
        cache = EncodingCache(max_bytes=300)
        a, b, c = (torch.full((25,), float(k)) for k in range(3))  # 100 bytes each
        cache.keep(b"a", a), cache.keep(b"b", b), cache.keep(b"c", c)
        assert cache.get(b"a") is a and cache.nbytes == 300
        cache.keep(b"d", torch.zeros(25))
        assert cache.get(b"b") is None and cache.get(b"a") is a and cache.nbytes == 300

    def test_what_is_larger_than_all_of_it_is_not_kept(self):
        cache = EncodingCache(max_bytes=99)
        cache.keep(b"a", torch.zeros(25))
        assert cache.get(b"a") is None and cache.nbytes == 0

    def test_a_size_of_zero_keeps_nothing(self):
        cache = EncodingCache(0)
        cache.keep(b"a", torch.zeros(1))
        assert cache.get(b"a") is None

    def test_keys_tell_kinds_texts_sizes_and_pixels_apart(self):
        flat = np.zeros((2, 8, 3), np.uint8)
        contents = ["", " ", "a", flat, flat.reshape(4, 4, 3), flat + 1]
        keys = {content_key(kind, content) for kind in ("vae", "clip_vision") for content in contents}
        assert len(keys) == 12
        assert content_key("vae", flat[:, ::2]) == content_key("vae", flat[:, ::2].copy())

    def test_its_size_is_a_setting(self):
        assert Settings.from_env({"ENCODING_CACHE_MB": "0"}).encoding_cache_mb == 0
        with pytest.raises(SettingsError, match="ENCODING_CACHE_MB must be between 0"):
            Settings.from_env({"ENCODING_CACHE_MB": "-1"})


class TestEncoder:
    def encode(self, models, prompts, image, seed=0, check=lambda: None):
        timer = JobTimer()
        encoder = Encoder(models, timer, check)
        embeds = encoder.prompts(prompts)
        (posterior,), (clip,) = encoder.posteriors([image]), encoder.image_embeds([image])
        latent = posterior.draw(torch.Generator().manual_seed(seed))
        tensors = [
            tensor
            for prompt in embeds
            for tensor in (
                prompt.encoder_hidden_states,
                prompt.encoder_attention_mask,
                prompt.pooled_projections,
            )
        ]
        return [*tensors, latent, clip], timer.encodings

    def test_kept_ones_are_bit_for_bit_the_new_ones(self, models, small):
        fresh, counts = self.encode(models, ["a cat", "a dog"], small)
        assert counts == {"hits": 0, "misses": 4}
        assert all(tensor.device.type == "cpu" for tensor in fresh)
        kept, counts = self.encode(models, ["a cat", "a dog"], small)
        assert counts == {"hits": 4, "misses": 0}
        assert all(map(torch.equal, kept, fresh))

    def test_another_seed_has_another_draw_from_the_same_posterior(self, models, small):
        first, _ = self.encode(models, ["a cat"], small, seed=1)
        kept, counts = self.encode(models, ["a cat"], small, seed=2)
        models.encodings = EncodingCache(0)
        fresh, _ = self.encode(models, ["a cat"], small, seed=2)
        assert counts["misses"] == 0
        assert torch.equal(kept[-2], fresh[-2]) and not torch.equal(kept[-2], first[-2])

    def test_the_same_thing_twice_is_encoded_once_even_without_a_cache(self, models, small):
        models.encodings = EncodingCache(0)
        fresh, counts = self.encode(models, ["a cat", "a cat"], small)
        assert counts == {"hits": 0, "misses": 3}
        assert torch.equal(fresh[0], fresh[3])

    def test_models_are_brought_only_for_what_is_missing(self, models, small, moved):
        self.encode(models, ["a cat"], small)
        assert moved == ["text_encoder", "text_encoder_2", "vae", "image_encoder"]
        moved.clear()
        self.encode(models, ["a cat"], small, seed=5)
        assert moved == []
        self.encode(models, ["a dog", "a cat"], small)
        assert moved == ["text_encoder", "text_encoder_2"]

    def test_it_stays_within_its_bytes(self, models, small):
        models.encodings = EncodingCache(200_000)
        for number in range(20):
            self.encode(models, [f"cat {number}"], small)
            assert 0 < models.encodings.nbytes <= 200_000

    def test_a_cancel_is_heard_between_two_encodings_and_loses_none(self, models, small):
        calls = []

        def check():
            calls.append(1)
            if len(calls) == 2:
                raise CancelledError("The job was cancelled.")

        with pytest.raises(CancelledError):
            self.encode(models, ["a cat", "a dog"], small, check=check)
        _, counts = self.encode(models, ["a cat", "a dog"], small)
        assert counts == {"hits": 1, "misses": 3}


@pytest.mark.usefixtures("quick_decode")
class TestJobs:
    def test_the_second_job_has_the_same_video_from_kept_encodings(self, data, models, moved):
        first = run_job(data, models)
        assert first["timings"]["encodings"] == {"hits": 0, "misses": 3}
        moved.clear()
        again = run_job(data, models)
        assert again["timings"]["encodings"] == {"hits": 3, "misses": 0}
        assert again["video_base64"] == first["video_base64"]
        assert set(moved) == {"transformer", "vae"} and moved[0] == "transformer"  # the VAE only decodes

    def test_f1_and_i2v_share_them(self, data, models):
        run_job(data, models)
        assert run_job(data | {"model": "f1"}, models)["timings"]["encodings"]["misses"] == 0
        models.use_direction("i2v")

    def test_a_retry_finds_what_the_failed_attempt_encoded(self, data, models, monkeypatch):
        fails = [True]

        def generate(*args, **options):
            def fail_once(sampled):
                if fails and fails.pop():
                    raise torch.cuda.OutOfMemoryError("CUDA out of memory.")

            return generate_video_sync(*args, **options, on_section=fail_once)

        expected = run_job(data, models)["video_base64"]
        models.encodings = EncodingCache(1e6)
        monkeypatch.setattr(core.job, "generate_video_sync", generate)
        reply = run_job(data, models)
        assert reply["timings"]["encodings"] == {"hits": 3, "misses": 3}
        assert reply["video_base64"] == expected
