"""What a video starts and ends with, and its size: end images, made pictures, any frame."""

import base64
import io
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from PIL import Image

import core.pipeline
import core.pipeline.sampling
import serverless_handler
from core.errors import (
    DownloadError,
    ImageError,
    LatentsMismatchError,
    RequestError,
    TimeLimitError,
    TooLargeForMemoryError,
)
from core.frame import frame_size, start_picture
from core.job import run_job
from core.pipeline import generate_video_sync
from core.pipeline.capacity import available_memory, check_capacity, section_tokens
from core.pipeline.sections import plan_sections
from core.reproduce import request_of
from core.request import VideoRequest, parse_request
from core.worker import Worker
from diffusers_helper.buckets import resize_and_center_crop, sides_of_ratio
from tests.test_resume import time_up_after

GOLDEN = Path(__file__).parent / "golden"
GIB = 1024**3


def png(image: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


PICTURES = np.random.default_rng(1).integers(0, 256, (2, 96, 128, 3), dtype=np.uint8)
IMAGE, END = map(png, PICTURES)
SHORT = {"prompt": "x", "total_second_length": 1, "latent_window_size": 4, "steps": 1, "use_teacache": False}


def refused(**fields) -> str:
    with pytest.raises(RequestError) as caught:
        parse_request(SHORT | fields)
    assert caught.value.code == "invalid_request"
    return str(caught.value)


# which fields go together


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({}, "`input_image`, `start` or `input_video` is required."),
        ({"input_image": None, "start": None}, "`input_image`, `start` or `input_video` is required."),
        ({"prompt": ""}, "`input_image`, `start` or `input_video` is required; `prompt` must not be empty."),
        (
            {"input_image": "x", "start": "black"},
            "`input_image` and `start` must not both be given: a video starts with one.",
        ),
        ({"start": "black", "width": 320}, "`width` needs `height` beside it."),
        ({"start": "black", "height": 320}, "`height` needs `width` beside it."),
        (
            {"start": "black", "width": 320, "height": 192, "resolution": 640},
            "`resolution` must not be given with `width` and `height`, which are the size.",
        ),
        (
            {"input_image": "x", "width": 320, "height": 192, "aspect_ratio": "auto"},
            "`aspect_ratio` must not be given with `width` and `height`, which are the size.",
        ),
        (
            {"start": "black", "aspect_ratio": "auto"},
            "`aspect_ratio` must not be auto with `start`: there is no image to take it from.",
        ),
        (
            {"start": "black", "aspect_ratio": "9:2"},
            "`aspect_ratio` must be between 1:4 and 4:1 (got 9:2).",
        ),
        (
            {"input_image": "x", "aspect_ratio": "2:9"},
            "`aspect_ratio` must be between 1:4 and 4:1 (got 2:9).",
        ),
        (
            {"input_image": "x", "end_image": "y", "model": "f1"},
            "`end_image` needs the `model` i2v: f1 makes the video forwards and sees only what came before.",
        ),
    ],
    ids=str,
)
def test_fields_that_contradict_each_other(fields, sentence):
    assert refused(**fields) == sentence


@pytest.mark.parametrize("name", ["width", "height"])
@pytest.mark.parametrize(
    ("value", "fault"),
    [
        (48, "at least 64"),
        (2064, "at most 2048"),
        (200, "a multiple of 16"),
        (64.5, "a whole number"),
        ("64", "a whole number"),
        (True, "a whole number"),
    ],
)
def test_sides(name, value, fault):
    sides = {"width": 64, "height": 2048} | {name: value}
    assert f"`{name}` must be {fault} (got " in refused(start="black", **sides)


@pytest.mark.parametrize(
    "start", ["", "Black", "grey", "#12345", "#1234567", "#12345g", "123456", "#123456\n"]
)
def test_forms_of_start(start):
    assert "`start` must be black, white, noise or a colour such as #1a2b3c (got " in refused(start=start)


@pytest.mark.parametrize(
    "ratio", ["", "16", "16:", ":9", "0:9", "16:0", "16/9", "1.5:1", "-1:1", "16:9\n", "12345:9999", "AUTO"]
)
def test_forms_of_a_ratio(ratio):
    sentence = refused(input_image="x", aspect_ratio=ratio)
    assert "`aspect_ratio` must be auto or two whole numbers such as 16:9 (got " in sentence


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("end_image_strength", 1.1),
        ("end_image_strength", -0.1),
        ("end_image_mode", "both"),
        ("end_image", ""),
    ],
)
def test_the_end_images_fields(name, value):
    assert refused(input_image="x", **{name: value}).startswith(f"`{name}` must ")


# sizes


@pytest.mark.parametrize(
    ("fields", "shape", "size"),
    [
        ({}, (96, 128, 3), (544, 704)),  # the official bucket
        ({"aspect_ratio": "auto"}, (96, 128, 3), (544, 704)),
        ({"aspect_ratio": "16:9"}, (96, 128, 3), (480, 864)),
        ({"aspect_ratio": "9:16"}, (96, 128, 3), (864, 480)),
        ({"aspect_ratio": "1:1"}, (96, 128, 3), (640, 640)),
        ({"width": 336, "height": 2048}, (96, 128, 3), (2048, 336)),
        ({"start": "black"}, None, (640, 640)),
        ({"start": "black", "resolution": 256, "aspect_ratio": "4:1"}, None, (128, 512)),
        ({"start": "black", "width": 64, "height": 80}, None, (80, 64)),
    ],
    ids=str,
)
def test_frame_size(fields, shape, size):
    image = None if shape is None else np.zeros(shape, np.uint8)
    request = parse_request(SHORT | ({} if "start" in fields else {"input_image": "x"}) | fields)
    assert frame_size(request, image, request.resolution or 640) == size


@pytest.mark.parametrize("resolution", range(256, 961, 32))
def test_every_ratio_gives_sides_that_may_be_asked_for(resolution):
    for across, down in [(4, 1), (1, 4), (16, 9), (21, 9), (1, 1), (9999, 2500)]:
        height, width = sides_of_ratio(down, across, resolution)
        parse_request(SHORT | {"start": "black", "width": width, "height": height})
        assert width / height == pytest.approx(across / down, rel=0.3)
        assert height * width == pytest.approx(resolution**2, rel=0.2)


@pytest.mark.parametrize("shape", [(1, 10), (10, 1), (333, 77), (2049, 640)])
@pytest.mark.parametrize("size", [(64, 2048), (2048, 64), (80, 112)])
def test_images_are_cut_to_exactly_the_size(shape, size):
    assert resize_and_center_crop(np.zeros((*shape, 3), np.uint8), *size).shape == (*size, 3)


@pytest.mark.usefixtures("quick_decode")
@pytest.mark.parametrize(
    ("fields", "size"),
    [
        ({"input_image": IMAGE, "width": 80, "height": 112}, (80, 112)),
        ({"start": "noise", "width": 272, "height": 64}, (272, 64)),
        ({"start": "white", "aspect_ratio": "9:16", "resolution": 256}, (192, 352)),
        ({"start": "white"}, (192, 192)),
    ],
    ids=str,
)
def test_the_mp4_has_the_size(fields, size, tiny_models, tmp_path):
    reply = run_job(SHORT | fields, tiny_models)
    path = tmp_path / "reply.mp4"
    path.write_bytes(base64.b64decode(reply["video_base64"]))
    meta = next(imageio_ffmpeg.read_frames(str(path)))
    assert meta["size"] == meta["source_size"] == size == (reply["width"], reply["height"])
    echoed = reply["parameters"]
    assert {name: echoed[name] for name in fields if name != "input_image"} == {
        name: value for name, value in fields.items() if name != "input_image"
    }
    assert echoed["resolution"] == (None if "width" in fields else fields.get("resolution", 192))
    if echoed["resolution"] != 192:  # the tiny models' own, smaller than any that may be asked for
        parse_request(echoed | fields)
    assert reply["warnings"] == []


# videos from a prompt alone


@pytest.mark.parametrize(
    ("start", "colour"),
    [
        ("black", (0, 0, 0)),
        ("white", (255, 255, 255)),
        ("#1a2B3c", (0x1A, 0x2B, 0x3C)),
        ("#000000", (0, 0, 0)),
    ],
)
def test_a_colour_to_start_with(start, colour):
    request = parse_request(SHORT | {"start": start})
    image = start_picture(request, None, 64, 80, 0)
    assert image.shape == (64, 80, 3) and image.dtype == np.uint8
    assert (image == colour).all()


def test_noise_to_start_with_follows_from_the_seed():
    request = parse_request(SHORT | {"start": "noise"})
    first, again, other = (start_picture(request, None, 64, 80, seed) for seed in (7, 7, 2**32 - 1))
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    assert 120 < first.mean() < 135 and first.std() > 70
    assert first[0, 0].tolist() == [175, 240, 136]  # and numpy's next version draws the same


def sampled(models, monkeypatch, request, image=None, end_image=None, **options):
    """The video's section latents, and the packed histories that they were sampled from."""
    histories, sections = [], []
    pack = core.pipeline.sampling.pack_history

    def spy(*arguments):
        histories.append(pack(*arguments))
        return histories[-1]

    with monkeypatch.context() as patch:
        patch.setattr(core.pipeline.sampling, "pack_history", spy)
        patch.setattr(core.pipeline, "save_video", lambda clips, *_: len(list(clips)))
        generate_video_sync(
            models, image, request, "unused.mp4", end_image=end_image, on_section=sections.append, **options
        )
    return [section.latents for section in sections], histories


@pytest.mark.usefixtures("quick_decode")
def test_a_colour_is_the_same_as_a_picture_of_it(tiny_models, monkeypatch):
    plain = np.full((64, 80, 3), (0x33, 0x66, 0x99), np.uint8)
    sizes = {"width": 80, "height": 64}
    made, histories = sampled(
        tiny_models, monkeypatch, parse_request(SHORT | sizes | {"start": "#336699"}), seed=5
    )
    given, expected = sampled(
        tiny_models, monkeypatch, parse_request(SHORT | sizes | {"input_image": "x"}), plain, seed=5
    )
    assert all(map(torch.equal, made, given))
    assert torch.equal(histories[0].latents_clean, expected[0].latents_clean)
    black, _ = sampled(tiny_models, monkeypatch, parse_request(SHORT | sizes | {"start": "black"}), seed=5)
    assert not torch.equal(black[0], made[0])


# end images


@pytest.mark.usefixtures("quick_decode")
@pytest.mark.parametrize("mode", ["embedding", "history"])
def test_same_latents_as_the_code_it_follows(mode, tiny_models, monkeypatch):
    """tests/golden/README.md tells whose, and how they were made."""
    golden = np.load(GOLDEN / f"i2v_end_{mode}.npz")
    arguments = json.loads(str(golden["args"]))
    assert arguments["end_image_mode"] == mode
    request = VideoRequest(input_image="golden/input.png", use_teacache=False, **arguments)
    image = np.asarray(Image.open(GOLDEN / "input.png").convert("RGB"))
    latents, _ = sampled(tiny_models, monkeypatch, request, image, image[::-1, ::-1])
    assert len(latents) == 2
    for i, ours in enumerate(latents):
        official = torch.from_numpy(golden[f"latents_{i}"])
        # Without an end image the first section is 3.4e-3 away. UniPC's coefficients are float32 and differ
        # between processors: where the files were made ours is 1.4e-7 away, on another it is 1.2e-5.
        assert (ours[..., ::4, ::4] - official).norm() / official.norm() < 1e-4


@pytest.mark.usefixtures("quick_decode")
@pytest.mark.parametrize("mode", ["embedding", "history"])
def test_what_an_end_image_changes(mode, tiny_models, monkeypatch):
    """The place of the nearest history frame in the first section sampled; nothing else there."""
    encoded, embedded = [], []

    def encode(image, vae, device):
        """A VAE whose latents are nothing but the draw."""

        def draw(generator):
            encoded.append((image, torch.randn(1, 16, 1, 8, 10, generator=generator)))
            return encoded[-1][1]

        posterior = SimpleNamespace(draw=draw, nbytes=1, to=lambda device: posterior)
        return posterior

    embed = core.pipeline.encoding.clip_vision.encode_image

    def embed_and_tell(image, *rest):
        embedded.append(image)
        return embed(image, *rest)

    monkeypatch.setattr("core.pipeline.encoding.vae.encode_image", encode)
    monkeypatch.setattr("core.pipeline.encoding.clip_vision.encode_image", embed_and_tell)
    fields = SHORT | {"input_image": "x", "width": 80, "height": 64, "end_image_mode": mode}
    image, end = PICTURES

    def run(strength, with_end=True, seed=3):
        request = parse_request(fields | {"end_image_strength": strength})
        end_image = end if with_end else None
        return sampled(tiny_models, monkeypatch, request, image, end_image, seed=seed)

    plain, plain_histories = run(1, with_end=False)
    assert len(plain) == 2 and len(encoded) == len(embedded) == 1
    half, histories = run(0.5)
    assert len(encoded) == 3 and len(embedded) == (3 if mode == "embedding" else 2)
    assert np.array_equal(encoded[2][0], resize_and_center_crop(end, 64, 80))
    assert torch.equal(encoded[0][1], encoded[1][1])  # the start's draw is its own
    end_latent = encoded[2][1]
    assert not torch.equal(encoded[1][1], end_latent)

    first, expected = histories[0], plain_histories[0]
    assert torch.equal(first.latents_clean[:, :, 1:], 0.5 * end_latent)
    assert not expected.latents_clean[:, :, 1:].any()
    for name in vars(first):
        ours, theirs = getattr(first, name), getattr(expected, name)
        if name == "latents_clean":
            ours, theirs = ours[:, :, :1], theirs[:, :, :1]
        assert torch.equal(ours, theirs), name
    assert not torch.equal(half[0], plain[0])

    # the second section sees four frames of the first, and what was behind them among the 4× frames
    second = histories[1]
    assert torch.equal(second.latents_clean[:, :, 1:], half[0][:, :, :1])
    assert torch.equal(second.latents_history_4x[:, :, 0], half[0][:, :, 3])
    behind = 0.5 * end_latent[:, :, 0] if mode == "history" else torch.zeros_like(end_latent[:, :, 0])
    assert torch.equal(second.latents_history_4x[:, :, 1], behind)
    assert not second.latents_history_4x[:, :, 2:].any()

    again, _ = run(0.5)
    assert all(map(torch.equal, again, half))
    nothing, _ = run(0)
    assert all(map(torch.equal, nothing, plain))
    full, _ = run(1)
    assert not torch.equal(full[0], half[0])


@pytest.mark.usefixtures("quick_decode")
def test_a_job_with_an_end_image(tiny_models):
    data = SHORT | {"input_image": IMAGE, "width": 80, "height": 64, "mp4_crf": 0, "embed_parameters": False}
    plain = run_job(data, tiny_models)
    ended = run_job(data | {"end_image": f"data:image/png;base64,{END}"}, tiny_models)
    assert plain["video_base64"] != ended["video_base64"]
    assert plain["frames"] == ended["frames"]
    assert "end_image" not in ended["parameters"] and ended["parameters"]["end_image_strength"] == 1
    assert ended["warnings"] == []

    inert = run_job(data | {"end_image": END, "end_image_strength": 0}, tiny_models)
    assert inert["video_base64"] == plain["video_base64"]
    assert inert["warnings"] == ["`end_image` had no effect: its `end_image_strength` is 0."]
    alone = run_job(data | {"end_image_strength": 0.5, "end_image_mode": "embedding"}, tiny_models)
    assert alone["video_base64"] == plain["video_base64"]
    assert alone["warnings"] == [
        "`end_image_strength` had no effect: there is no `end_image`.",
        "`end_image_mode` had no effect: there is no `end_image`.",
    ]


def no_gpu_work(monkeypatch):
    def fail(*_, **__):
        raise AssertionError("something was computed")

    monkeypatch.setattr(core.pipeline, "encode_conditioning", fail)


@pytest.mark.parametrize(
    ("end_image", "sentence"),
    [
        ("no base64!", "The end image is not valid base64."),
        ("data:image/png,x", "The end image's data URI must be base64."),
        (base64.b64encode(b"GIF89a").decode(), "The end image is not a PNG, JPEG or WebP but a GIF."),
        (END[:400], "The end image is damaged or cut short."),
        (
            png(np.zeros((10, 110, 3), np.uint8)),
            "The end image is too elongated (110×10): at most 10:1.",
        ),
    ],
    ids=range(5),
)
def test_a_bad_end_image(end_image, sentence, tiny_models, monkeypatch):
    no_gpu_work(monkeypatch)
    with pytest.raises(ImageError) as caught:
        run_job(SHORT | {"input_image": IMAGE, "end_image": end_image}, tiny_models)
    assert str(caught.value) == sentence


def test_of_two_urls_the_one_at_fault_is_named(tiny_models, monkeypatch):
    no_gpu_work(monkeypatch)

    def fetch(url, **options):
        assert options["max_bytes"] == 20_000_000
        if "end" in url:
            raise DownloadError("The host images.test answered with status 404.")
        return base64.b64decode(IMAGE)

    monkeypatch.setattr("core.job.fetch_url", fetch)
    urls = {"input_image": "https://images.test/1.png", "end_image": "https://images.test/end.png"}
    with pytest.raises(DownloadError) as caught:
        run_job(SHORT | urls, tiny_models)
    assert str(caught.value) == "`end_image`: The host images.test answered with status 404."


def test_a_worker_of_f1_refuses_an_end_image(monkeypatch, tiny_models):
    """Also where the request leaves the model to the worker; with i2v asked for, it is taken."""
    no_gpu_work(monkeypatch)
    monkeypatch.setattr(tiny_models, "profile", replace(tiny_models.profile, direction="f1"))
    data = SHORT | {"input_image": IMAGE, "end_image": END}
    with pytest.raises(RequestError, match="`end_image` needs the `model` i2v"):
        run_job(data, tiny_models)
    with pytest.raises(RequestError, match="`end_image` needs the `model` i2v"):
        generate_video_sync(
            tiny_models, PICTURES[0], parse_request(data), "unused.mp4", end_image=PICTURES[1]
        )
    with pytest.raises(AssertionError, match="something was computed"):
        run_job(data | {"model": "i2v"}, tiny_models)


# what memory allows


def test_too_large_for_the_machine(tiny_models, monkeypatch):
    """A clear answer before anything is computed, and the next job runs."""
    large = SHORT | {"start": "black", "width": 2048, "height": 2048}
    worker = Worker(lambda: tiny_models)
    with monkeypatch.context() as patch:
        no_gpu_work(patch)
        patch.setattr("core.pipeline.capacity.available_memory", lambda: 8 * GIB)
        reply = worker.submit("a", large).result()
        patch.setattr(serverless_handler, "worker", worker)
        response = serverless_handler.lambda_handler({"body": large}, None)
        small = worker.submit("b", large | {"width": 64, "height": 64}).result()
    assert reply["code"] == "too_large_for_memory" and "refresh_worker" not in reply
    assert reply["error"].startswith("A video of 2048×2048 pixels and 33 frames, 4 latent frames a section, ")
    assert "and 8.0 GB can be had" in reply["error"]
    assert response["statusCode"] == 413
    assert small["code"] == "internal_error"  # which is as far as `no_gpu_work` lets it come


class TestOnAGpu:
    """Of a figure for free memory that is not this machine's, with the real models' sizes."""

    @pytest.fixture
    def models(self, monkeypatch):
        monkeypatch.setattr("core.pipeline.capacity.memory.weight_bytes", lambda module: 0.5 * GIB)
        monkeypatch.setattr("core.pipeline.capacity.memory.least_streamed_bytes", lambda module: 2 * GIB)
        monkeypatch.setattr("core.pipeline.capacity.memory.bytes_on_gpu", lambda module: module)
        monkeypatch.setattr("core.pipeline.capacity.available_memory", lambda: 100 * GIB)
        config = SimpleNamespace(num_attention_heads=24, attention_head_dim=128, patch_size=2)
        return SimpleNamespace(
            device=torch.device("cuda"),
            transformer_dtype=torch.bfloat16,
            transformer=SimpleNamespace(config=config),
            vae=SimpleNamespace(
                dtype=torch.float16,
                config=SimpleNamespace(block_out_channels=(128, 256, 512, 512)),
                tile_sample_min_height=256,
                tile_sample_min_width=256,
                tile_sample_min_num_frames=16,
            ),
            modules=lambda: [],
            idle=[],
        )

    def free(self, monkeypatch, gib):
        monkeypatch.setattr("core.pipeline.capacity.memory.free_gpu_memory", lambda device: gib * GIB)

    def test_what_is_known_to_run_is_let_through(self, models, monkeypatch):
        self.free(monkeypatch, 11.0)  # 10.9 were measured
        check_capacity(models, plan_sections(5, 9, "i2v"), 640, 608)

    @pytest.mark.parametrize(("gib", "fits"), [(11, False), (20, False), (48, True)])
    def test_a_large_frame_needs_a_large_card(self, models, monkeypatch, gib, fits):
        self.free(monkeypatch, gib)
        plan = plan_sections(5, 9, "i2v")
        if fits:
            check_capacity(models, plan, 2048, 2048)
        else:
            with pytest.raises(TooLargeForMemoryError, match=f"GPU memory, and {gib}.0 GB can be had"):
                check_capacity(models, plan, 2048, 2048)

    def test_what_an_idle_transformer_takes_can_be_had(self, models, monkeypatch):
        self.free(monkeypatch, 20)
        models.idle = ["a transformer of 28 GB"]
        monkeypatch.setattr("core.pipeline.capacity.memory.bytes_on_gpu", lambda module: 28 * GIB)
        check_capacity(models, plan_sections(5, 9, "i2v"), 2048, 2048)

    def test_a_long_window_counts(self, models, monkeypatch):
        self.free(monkeypatch, 11)
        check_capacity(models, plan_sections(5, 9, "i2v"), 960, 960)
        with pytest.raises(TooLargeForMemoryError, match="33 latent frames a section"):
            check_capacity(models, plan_sections(5, 33, "i2v"), 1360, 1360)

    def test_weights_that_can_make_room_are_no_reason(self, models, monkeypatch):
        self.free(monkeypatch, 4)
        plan = plan_sections(5, 9, "i2v")
        with pytest.raises(TooLargeForMemoryError):
            check_capacity(models, plan, 1360, 1360)
        models.modules = lambda: [24 * GIB, 15 * GIB]
        check_capacity(models, plan, 1360, 1360)

    def test_the_finished_video_is_in_the_machines_memory(self, models, monkeypatch):
        self.free(monkeypatch, 80)
        long = plan_sections(120, 9, "i2v")
        monkeypatch.setattr("core.pipeline.capacity.available_memory", lambda: 2 * GIB)
        check_capacity(models, long, 1360, 1360)  # what is over a gigabyte waits on the disk
        monkeypatch.setattr("core.pipeline.capacity.available_memory", lambda: GIB // 2)
        with pytest.raises(TooLargeForMemoryError, match=r"0.9 GB of memory, and 0.5 GB can be had"):
            check_capacity(models, long, 1360, 1360)


def test_tokens_of_a_section():
    """640×608 and W = 9: 9 + 2 frames of 40×38, one of 20×19, four of 10×10; odd sides are rounded up."""
    assert section_tokens(plan_sections(1, 9, "i2v"), 640, 608, 2) == 11 * 1520 + 380 + 4 * 100
    assert section_tokens(plan_sections(1, 1, "f1"), 80, 112, 2) == 3 * 35 + 3 * 4 + 4 * 2 * 2


def test_available_memory_is_read_or_infinite(monkeypatch, tmp_path):
    info = tmp_path / "meminfo"
    monkeypatch.setattr("core.pipeline.capacity.MEMORY_INFO", info)
    assert available_memory() == float("inf")
    info.write_text("MemTotal:  9 kB\n")
    assert available_memory() == float("inf")
    info.write_text("MemTotal:       24684092 kB\nMemAvailable:   16375072 kB\n")
    assert available_memory() == 16375072 * 1024


# with what else a job may ask for


@pytest.mark.usefixtures("quick_decode")
@pytest.mark.parametrize("fields", [{"input_image": IMAGE, "end_image": END}, {"start": "noise"}])
def test_each_of_several_outputs_is_what_its_seed_alone_gives(fields, tiny_models):
    data = SHORT | fields | {"width": 80, "height": 64, "seed": 5, "steps": 1, "embed_parameters": False}
    both = run_job(data | {"num_outputs": 2}, tiny_models)["outputs"]
    alone = [run_job(data | {"seed": seed}, tiny_models) for seed in (5, 6)]
    assert [one["video_base64"] for one in both] == [one["video_base64"] for one in alone]
    assert both[0]["video_base64"] != both[1]["video_base64"]


@pytest.mark.usefixtures("quick_decode")
@pytest.mark.parametrize(
    "fields",
    [
        {"input_image": IMAGE, "end_image": END, "width": 80, "height": 64},
        {"input_image": IMAGE, "end_image": END, "end_image_mode": "embedding", "aspect_ratio": "4:1"},
        {"start": "noise", "aspect_ratio": "2:1", "resolution": 256},
        {"start": "#336699"},
    ],
    ids=str,
)
def test_latents_are_gone_on_from(fields, tiny_models):
    """Sections that are yet to be sampled see the end image as they would have, and sizes stay."""
    data = SHORT | fields | {"latent_window_size": 2, "embed_parameters": False}
    whole = run_job(data, tiny_models)
    with time_up_after(1), pytest.raises(TimeLimitError) as caught:
        run_job(data | {"return_latents": True}, tiny_models)
    rest = {name: value for name, value in data.items() if name != "input_image"}
    rest["resume_latents"] = caught.value.details["latents_base64"]
    again = run_job(rest, tiny_models)
    assert again["resumed_sections"] == 2 < again["sections"] == 4
    assert again["video_base64"] == whole["video_base64"]
    if "end_image" in fields:
        with pytest.raises(LatentsMismatchError, match="`end_image`"):
            run_job(rest | {"end_image": IMAGE}, tiny_models)


@pytest.mark.usefixtures("quick_decode")
def test_a_file_names_both_images_and_is_made_again(tiny_models, tmp_path):
    data = SHORT | {"input_image": IMAGE, "end_image": END, "width": 80, "height": 64, "steps": 1}
    made = run_job(data, tiny_models)
    path = tmp_path / "video.mp4"
    path.write_bytes(base64.b64decode(made["video_base64"]))
    files = []
    for name in ("input_image", "end_image"):
        files.append(tmp_path / f"{name}.png")
        files[-1].write_bytes(base64.b64decode(data[name]))
    found = request_of(path, files)["input"]
    assert (found["input_image"], found["end_image"]) == (data["input_image"], data["end_image"])
    assert run_job(found, tiny_models)["video_base64"] == made["video_base64"]
    assert request_of(path, files[1:])["input"]["input_image"].startswith("sha256:")
