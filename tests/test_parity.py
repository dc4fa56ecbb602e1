"""Section latents and pixels against what the official code made from the same tiny models (tests/golden)."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import core.pipeline
from core.pipeline import Models, generate_video_sync
from core.request import VideoRequest
from core.weights.profiles import load_profile
from tests.tiny import TINY

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="module")
def models():
    official = replace(TINY, model_profile="framepack")  # for its resolution
    return Models(load_profile(official), torch.device("cpu"))


@pytest.fixture
def same_video(models, monkeypatch, tmp_path):
    """Make the video of a golden file, and compare its latents; returns the file and our frames."""

    def run(name, model):
        golden = np.load(GOLDEN / f"{name}.npz")
        arguments = {"use_teacache": False} | json.loads(str(golden["args"]))
        arguments.pop("image", None)
        request = VideoRequest(input_image="golden/input.png", model=model, **arguments)

        clips, sections = [], []
        monkeypatch.setattr(core.pipeline, "save_video", lambda c, *_: clips.extend(c) or 0)  # before H.264
        models.use_direction(model)
        image = np.asarray(Image.open(GOLDEN / "input.png").convert("RGB"))
        generate_video_sync(models, image, request, tmp_path / "unused.mp4", on_section=sections.append)

        for i, sampled in enumerate(sections):
            official = torch.from_numpy(golden[f"latents_{i}"])
            thinned = sampled.latents.shape[-1] // official.shape[-1]
            ours = sampled.latents[..., ::thinned, ::thinned]
            assert (ours - official).norm() / official.norm() < 1e-4
        assert f"latents_{len(sections)}" not in golden
        return golden, clips

    return run


@pytest.mark.usefixtures("quick_decode")
@pytest.mark.parametrize("name", ["i2v_cfg", "i2v_teacache"])
def test_same_latents_as_the_official_code(name, same_video):
    same_video(name, "i2v")


@pytest.mark.parametrize("model", ["i2v", "f1"])
def test_same_video_as_the_official_code(model, same_video):
    golden, clips = same_video(f"{model}_2_sections", model)
    video = torch.cat(clips, dim=2)[0].permute(1, 2, 3, 0).numpy()
    assert video.shape == tuple(golden["shape"])
    difference = np.abs(video[::4, ::4, ::4].astype(int) - golden["frames"])
    assert difference.mean() < 1


def test_the_prompt_template_is_cropped_where_the_real_tokenizer_crops_it(models):
    from diffusers_helper.text import template_crop

    assert template_crop(models.tokenizer) == 95
