"""What the demo models make of one scene, against its true clip: what a change to the worker may not cost.

The figures are those of the weights in the repository; new weights have new ones.
"""

import math

import pytest
import torch

from builder.demo.bank import encode_clips
from builder.demo.measure import followed
from builder.demo.motion import SECTION, Action
from builder.demo.scene import Background, Scene, Shape
from builder.demo.similarity import first_frame_psnr, psnr
from builder.demo.world import render
from core.pipeline import generate_video_sync
from core.request import VideoRequest
from core.timing import JobTimer
from diffusers_helper.blending import to_uint8
from diffusers_helper.vae import decode_latents

MOST_LOST = 1.0  # dB
SCENE = Scene(
    height=128,
    width=128,
    background=Background("gradient", ((60, 120, 190), (200, 210, 120)), seed=3),
    shapes=(Shape("circle", "red", 36, 64, 20, action=Action("moves right")),),
)
PROMPT, STEPS = "the red circle moves right", 15

FIRST_FRAME = 44.8  # dB to the picture
VIDEO = 36.3  # dB to the true clip
LATENTS = {  # cache and threshold → the same before the decode, of latents whose spread is 1
    ("none", None): 15.13,
    ("teacache", None): 15.38,
    ("magcache", None): 15.38,
    ("firstblock", 0.15): 15.13,
}


@pytest.fixture(scope="module")
def truth():
    """(T, H, W, 3) uint8"""
    return render(SCENE, range(SECTION + 1))


@pytest.fixture
def sample(demo_models, truth, tmp_path, quick_decode):
    """One section with a cache, as `core.pipeline` hands it on, and how many steps were computed."""

    def sample(cache, threshold=None):
        request = VideoRequest(
            input_image="given below",
            prompt=PROMPT,
            height=SCENE.height,
            width=SCENE.width,
            total_second_length=1.2,
            steps=STEPS,
            seed=1,
            cache=cache,
            cache_threshold=threshold,
        )
        sections, timer = [], JobTimer()
        path = tmp_path / "video.mp4"
        generate_video_sync(demo_models, truth[0], request, path, timer=timer, on_section=sections.append)
        return sections[0], timer.sections[0]["steps_computed"]

    return sample


def test_no_cache_costs_more_than_it_did(demo_models, truth, sample):
    true_latents = encode_clips(demo_models.vae, torch.from_numpy(truth)[None])[:, :, 1:]
    found, lost, computed = {}, {}, {}
    for choice, before in LATENTS.items():
        section, computed[choice] = sample(*choice)
        found[choice] = -10 * math.log10((section.latents - true_latents).square().mean())
        lost[choice] = before - found[choice]
    assert max(lost.values()) <= MOST_LOST, found
    assert computed.pop(("none", None)) == STEPS and max(computed.values()) < STEPS, computed


def test_the_video_shows_what_is_asked(demo_models, truth, sample):
    section, _ = sample("none")
    frames = to_uint8(decode_latents(section.to_decode, demo_models.vae, demo_models.device))
    frames = frames[0].permute(1, 2, 3, 0).numpy()
    assert followed(frames, SCENE.meaning)
    assert first_frame_psnr(frames, truth[0]) > FIRST_FRAME - MOST_LOST
    assert psnr(frames, truth) > VIDEO - MOST_LOST
