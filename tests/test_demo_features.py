"""Each feature that shows in a video, on the demo models, which animate: whether it does what its name says.

A red circle in front of a plain gradient is followed by its colour. Only relations are asked for, well within
what the models can do, so that other weights of the same world pass; tests/test_demo_quality.py has figures.
"""

import base64
import io
import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load, save_file

from builder.demo.motion import Action
from builder.demo.scene import Background, Scene, Shape
from builder.demo.similarity import psnr
from builder.demo.tracks import Tracks
from builder.demo.world import render
from core.job import run_job
from core.pipeline import Models, initialize_models
from core.pipeline.encoding import Encoder
from core.settings import Settings
from core.timing import JobTimer
from core.video import VideoFile, save_video
from diffusers_helper.blending import to_uint8
from diffusers_helper.vae import decode_latents
from tests.lora_formats import peft
from tests.test_files import frames_of
from tests.test_frame import png
from tests.tiny import TRAINED_ENV

SIDE = 96
RADIUS = 0.16 * SIDE
W = 9  # latent frames of a section, after the start image's
ONE, TWO = 1.2, 2.4  # seconds of one and of two sections
SOURCE = 21  # frames of a video to go on from
RIGHT, LEFT, DOWN, STAYS, BLUE = (
    f"the red circle {verb}" for verb in ("moves right", "moves left", "moves down", "stays", "becomes blue")
)

# in sides of the frame; in one section a shape is to go 0.216
MOVED = 0.1
STILL = 0.05
NEARER = 3.0  # dB
NEARER_AT_THE_END = 1.0  # what an end image does against a prompt that says otherwise
FARTHER = 0.2  # what a negative prompt does, as a share of the distance to what it says
COLOURS = ((60, 120, 190), (200, 210, 120))


def scene(x: float = 0.5, y: float = 0.5, colours=COLOURS, height: int = SIDE, width: int = SIDE) -> Scene:
    """The circle's centre is at the shares x and y of width and height."""
    circle = Shape("circle", "red", x * width, y * height, RADIUS, action=Action("moves right"))
    return Scene(height, width, Background("gradient", colours, seed=3), (circle,))


def picture(**values) -> np.ndarray:
    return render(scene(**values), range(1))[0]


@dataclass(frozen=True)
class Job:
    """A reply, and the video's latents (1, 16, 1 + W n, h, w), of which the first is the start image's."""

    reply: dict = field(repr=False)
    latents: torch.Tensor = field(repr=False)
    models: Models = field(repr=False)

    def picture(self, place: int) -> np.ndarray:
        """The latent frame there, decoded as a picture: (H, W, 3) uint8."""
        pixels = decode_latents(self.latents[:, :, place : place + 1], self.models.vae, self.models.device)
        return to_uint8(pixels)[0, :, 0].permute(1, 2, 0).numpy()

    def area(self, place: int, colour: str) -> float:
        """How much is of that colour there, in circles."""
        return Tracks(self.picture(place)[None]).of(colour).area[0] / (math.pi * RADIUS**2)

    def path(self, *places: int) -> np.ndarray:
        """(x, y) of the circle in those latent frames, NaN where it is not seen."""
        return path_in(np.stack([self.picture(place) for place in places]))


def path_in(frames: np.ndarray) -> np.ndarray:
    track = Tracks(frames).of("red")
    return np.stack([track.x, track.y], axis=1) / min(frames.shape[1:3])


def goes_right(path: np.ndarray, sign: int = 1) -> bool:
    """From the first place to the last, and much less up or down; to the left with the sign −1."""
    x, y = path[-1] - path[0]
    return bool(sign * x > MOVED and abs(y) < abs(x) / 2)


def latents_of(latents_base64: str) -> torch.Tensor:
    tensors = load(base64.b64decode(latents_base64))
    return torch.cat([tensors["start_latent"], tensors["history"]], dim=2)


@pytest.fixture(scope="module")
def remembered() -> dict[str, Job]:
    return {}


@pytest.fixture
def reply_to(demo_models):
    """A job in the fewest steps that show anything, with the real decoder."""

    def reply_to(*, models=demo_models, settings=None, report=lambda progress: None, **fields) -> dict:
        data = {"prompt": RIGHT, "width": SIDE, "height": SIDE, "total_second_length": ONE}
        data |= {"steps": 6, "seed": 1, "cache": "none"}
        if not fields.keys() & {"input_image", "start", "input_video"}:
            data["input_image"] = png(picture())
        return run_job(data | fields, models, settings, report=report)

    return reply_to


@pytest.fixture
def run(reply_to, demo_models, quick_decode, remembered):
    """A job of which only the latents are wanted; each is run once."""

    def run(*, models=demo_models, settings=None, **fields) -> Job:
        key = json.dumps([id(models), str(settings), fields], sort_keys=True)
        if key not in remembered:
            reply = reply_to(models=models, settings=settings, return_latents=True, **fields)
            remembered[key] = Job(reply, latents_of(reply["latents_base64"]), models)
        return remembered[key]

    return run


@pytest.mark.parametrize("model", ["i2v", "f1"])
def test_the_prompt_is_followed_from_the_image_on(run, model):
    right, left = (run(model=model, prompt=prompt) for prompt in (RIGHT, LEFT))
    assert psnr(right.picture(0), picture()) > 30
    assert goes_right(right.path(0, W)) and goes_right(left.path(0, W), -1)


def test_a_timed_prompt_turns_the_circle_round(run):
    on = run(model="f1", input_image=png(picture(x=0.3)), total_second_length=TWO)
    back = run(
        model="f1",
        input_image=png(picture(x=0.3)),
        total_second_length=TWO,
        prompt=f"{RIGHT} [{ONE}s-: {LEFT}]",
    )
    first = slice(0, W + 1)
    assert torch.equal(on.latents[:, :, first], back.latents[:, :, first])
    assert goes_right(on.path(0, W)) and goes_right(on.path(W, 2 * W))
    assert goes_right(back.path(W, 2 * W), -1)


def test_a_timed_prompt_changes_the_colour_in_its_section(run):
    """Of I2V, which samples that section first, and does not know where the other one will have moved to."""
    changes = run(model="i2v", total_second_length=TWO, prompt=f"{STAYS} [{ONE}s-: {BLUE}]")
    before, after = W // 2, 2 * W
    assert changes.area(before, "red") > 0.5 and changes.area(before, "blue") == 0
    assert changes.area(after, "blue") > 0.5 and changes.area(after, "red") == 0


def test_a_blended_change_of_prompt_bends_the_path(run):
    fields = {"model": "f1", "input_image": png(picture(x=0.3, y=0.25)), "total_second_length": TWO}
    sharp, blended = (
        run(prompt=f"{DOWN} [{ONE}s-: {RIGHT}]", blend_sections=n, **fields).path(W, 2 * W) for n in (0, 1)
    )
    (right, down), (less_right, more_down) = sharp[1] - sharp[0], blended[1] - blended[0]
    assert right > MOVED and abs(down) < STILL
    assert more_down > down + STILL
    assert STILL < less_right < right - STILL


def test_a_negative_prompt_is_kept_away_from(run):
    """Farther than what follows the prompt is anyway, or guided by an empty one."""
    right, left = (run(model="i2v", prompt=prompt) for prompt in (RIGHT, LEFT))
    guided, by_nothing = (run(model="i2v", prompt=RIGHT, cfg=2, n_prompt=text) for text in (LEFT, ""))

    def from_left(job: Job) -> float:
        return float((job.latents - left.latents).norm())

    farther = FARTHER * from_left(right)
    assert from_left(guided) > max(from_left(right), from_left(by_nothing)) + farther
    assert goes_right(guided.path(0, W))


def test_what_is_gone_on_from_latents_is_the_same_motion(run):
    whole = run(model="f1", input_image=png(picture(x=0.3)), total_second_length=TWO)
    half = run(model="f1", input_image=png(picture(x=0.3)))
    later = run(
        model="f1",
        input_image=png(picture(x=0.3)),
        total_second_length=TWO,
        resume_latents=half.reply["latents_base64"],
    )
    assert half.latents.shape[2] == W + 1 and later.reply["resumed_sections"] == 1
    assert torch.equal(later.latents, whole.latents)


@pytest.mark.parametrize("mode", ["history", "embedding"])
def test_the_video_ends_near_its_end_image(run, mode):
    end = picture(x=0.7, y=0.25)
    without, led, at_0 = (
        run(prompt=RIGHT, **fields)
        for fields in (
            {"model": "i2v"},
            {"end_image": png(end), "end_image_mode": mode},
            {"end_image": png(end), "end_image_mode": mode, "end_image_strength": 0},
        )
    )
    assert psnr(led.picture(W), end) > psnr(without.picture(W), end) + NEARER_AT_THE_END
    assert psnr(led.picture(0), picture()) > 30
    assert torch.equal(at_0.latents, without.latents)


def test_a_keyframe_gives_its_section_its_looks(run):
    other = picture(colours=((190, 60, 60), (120, 210, 200)))
    without = run(input_image=png(picture(x=0.3)), total_second_length=TWO)
    keyframe = run(
        input_image=png(picture(x=0.3)),
        total_second_length=TWO,
        sections=[{"start_s": ONE, "image": png(other)}],
    )
    assert psnr(keyframe.picture(2 * W), other) > psnr(without.picture(2 * W), other) + NEARER
    assert psnr(keyframe.picture(0), picture(x=0.3)) > 30


def test_a_colour_to_start_with_is_all_that_is_seen(run):
    made = run(start="#3c78be")
    for place in (0, W):
        assert psnr(made.picture(place), np.full((SIDE, SIDE, 3), (0x3C, 0x78, 0xBE))) > 26


def test_a_wide_frame_holds_the_same_motion(run):
    made = run(width=128, height=64, input_image=png(picture(height=64, width=128)))
    assert made.picture(0).shape == (64, 128, 3)
    assert goes_right(made.path(0, W))


@pytest.mark.parametrize(
    "choice", [{"sampler": "euler"}, {"sampler": "unipc_bh2"}, {"shift": 12}], ids=lambda c: str(*c.values())
)
def test_every_sampler_comes_to_about_the_same(run, choice):
    usual, other = run(model="i2v", prompt=RIGHT), run(**choice)
    assert not torch.equal(usual.latents, other.latents)
    assert goes_right(other.path(0, W))
    assert np.abs(usual.path(W) - other.path(W)).max() < STILL


@pytest.mark.parametrize(
    "choice",
    [
        {"cache": "teacache"},
        {"cache": "magcache"},
        {"cache": "firstblock", "cache_threshold": 0.15},
    ],
    ids=lambda choice: " ".join(map(str, choice.values())),
)
def test_fewer_steps_are_computed_and_show_the_same(run, choice):
    exact, cached = run(steps=15), run(steps=15, **choice)
    assert [section["steps_computed"] for section in exact.reply["timings"]["sections"]] == [15]
    assert cached.reply["timings"]["sections"][0]["steps_computed"] < 15
    assert goes_right(cached.path(0, W))
    assert np.abs(exact.path(W) - cached.path(W)).max() < STILL


def test_several_outputs_share_what_is_encoded_and_all_follow(reply_to, demo_models, quick_decode):
    reply = reply_to(num_outputs=2, input_image=png(picture(x=0.4)), return_latents=True)
    first, second = reply["outputs"]
    assert first["timings"]["encodings"]["misses"] >= 2  # the image, twice
    assert second["timings"]["encodings"] == {"hits": 0, "misses": 0}
    made = [Job(reply, latents_of(output["latents_base64"]), demo_models) for output in reply["outputs"]]
    assert not torch.equal(made[0].latents, made[1].latents)
    assert all(goes_right(job.path(0, W)) for job in made)


def test_previews_show_the_motion_before_it_is_decoded(reply_to, quick_decode):
    strips = []
    reply_to(preview=True, report=lambda progress: strips.append(progress.as_dict().get("preview")))
    strip = np.asarray(Image.open(io.BytesIO(base64.b64decode([*filter(None, strips)][-1]))))
    frames = np.stack(np.split(strip, 5, axis=1))
    assert goes_right(path_in(frames))


def test_with_float8_weights_the_video_is_about_the_same(run):
    rounded = initialize_models(Settings.from_env(TRAINED_ENV | {"PRECISION": "fp8"}))
    usual, other = run(model="i2v", prompt=RIGHT), run(models=rounded)
    assert other.reply["worker"]["precision"] == "fp8"
    assert not torch.equal(usual.latents, other.latents)
    assert np.abs(usual.path(W) - other.path(W)).max() < STILL


def test_a_lora_that_reads_right_as_left(run, demo_models, tmp_path):
    save_file(peft("transformer.", right_as_left(demo_models)), tmp_path / "left.safetensors")
    settings = Settings(lora_dir=str(tmp_path))

    def with_weight(weight: float) -> Job:
        return run(settings=settings, loras=[{"name": "left.safetensors", "weight": weight}])

    right, left = (run(model="i2v", prompt=prompt) for prompt in (RIGHT, LEFT))
    assert goes_right(with_weight(1).path(0, W), -1)
    assert (with_weight(1).latents - left.latents).abs().max() < 0.1
    assert torch.equal(with_weight(0).latents, right.latents)


def right_as_left(models: Models) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """down and up of the three layers that see the prompt, which has one word of another."""
    right, left = Encoder(models, JobTimer()).prompts([RIGHT, LEFT])
    assert torch.equal(right.encoder_attention_mask, left.encoder_attention_mask)
    tokens = right.encoder_attention_mask[0]
    right_tokens, left_tokens = (e.encoder_hidden_states[0, tokens].float() for e in (right, left))

    def pair(name: str, rows: torch.Tensor, wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What makes a layer's outputs for `rows` those for `wanted`, (N, inputs) each."""
        weight = models.transformer.get_submodule(name).weight.float()
        return torch.linalg.pinv(rows).T.contiguous(), (weight @ (wanted - rows).T).contiguous()

    means = (right_tokens.mean(0, keepdim=True), left_tokens.mean(0, keepdim=True))
    seen = {
        "context_embedder.proj_in": (right_tokens, left_tokens),
        "context_embedder.time_text_embed.text_embedder.linear_1": means,
        "time_text_embed.text_embedder.linear_1": (right.pooled_projections, left.pooled_projections),
    }
    return {name: pair(name, *(rows.float() for rows in both)) for name, both in seen.items()}


def test_a_picture_at_a_later_index_shows_more_of_the_motion(reply_to):
    def x(index: int) -> float:
        reply = reply_to(one_frame={"target_index": index})
        frame = np.asarray(Image.open(io.BytesIO(base64.b64decode(reply["video_base64"]))))
        return path_in(frame[None])[0, 0]

    start, near, far = path_in(picture()[None])[0, 0], x(1), x(W)
    assert abs(near - start) < STILL
    assert far > near + MOVED / 2


def frames_in(reply: dict, folder: Path) -> np.ndarray:
    path = folder / "frames.zip"
    path.write_bytes(base64.b64decode(reply["video_base64"]))
    return frames_of(path)[1]


def test_an_exact_length_cuts_off_the_motions_end(reply_to, demo_models, tmp_path):
    fields = {"format": "png_sequence", "return_latents": True}
    reply = reply_to(total_second_length=1, exact_length=True, **fields)
    frames = frames_in(reply, tmp_path)
    whole = Job(reply, latents_of(reply["latents_base64"]), demo_models)
    last, at_28, at_the_end = path_in(frames)[-1, 0], *whole.path(7, W)[:, 0]
    assert len(frames) == 30
    assert abs(last - at_28) < abs(last - at_the_end)


def extended(reply_to, source: np.ndarray, folder: Path, **fields) -> np.ndarray:
    """All frames of a video and its new part."""
    clip = torch.from_numpy(source).permute(3, 0, 1, 2)[None]
    save_video([clip], folder / "source.mp4", VideoFile(crf=1))
    video = base64.b64encode((folder / "source.mp4").read_bytes()).decode()
    return frames_in(reply_to(input_video=video, format="png_sequence", **fields), folder)


def test_an_extended_video_goes_on_moving(reply_to, tmp_path):
    """Forward, from the place where the given one ends."""
    source = render(scene(x=0.2), range(SOURCE))
    frames = extended(reply_to, source, tmp_path, model="f1")
    path = path_in(frames)
    assert len(frames) == SOURCE + 4 * W
    assert psnr(frames[0], source[0]) > 30
    assert goes_right(path[SOURCE - 1 :])
    assert np.abs(np.diff(path, axis=0)).max() < STILL  # at no frame does it jump


def test_what_is_put_before_a_video_leads_up_to_it(reply_to, tmp_path):
    """Backward, to the place where the given one starts."""
    source = render(scene(x=0.6), range(SOURCE))
    frames = extended(reply_to, source, tmp_path, model="i2v")
    assert len(frames) == 4 * W - 4 + SOURCE
    assert psnr(frames[-1], source[-1]) > 30
    assert np.abs(np.diff(path_in(frames), axis=0)).max() < STILL
