"""Bad and odd jobs through `handler.handler`: each gets its sentence or its video, and the next one runs."""

import asyncio
import base64
import itertools
import json
import math
import struct
import tempfile
import threading

import pytest
from PIL import Image

import handler
from core.errors import ModelError
from core.worker import Worker
from tests.test_endurance import quick_input, quick_models
from tests.test_images import (
    BOMBS,
    GREY,
    PALETTE,
    RGB,
    encoded,
    picture,
    png,
    to_base64,
    with_orientation,
)

PALETTE_OF_ONE = [(b"PLTE", b"\x10\x80\xf0")]
MANY = encoded(picture(), "PNG") + bytes(20_000_000)


def image(data: bytes) -> dict:
    return quick_input(input_image=to_base64(data))


def video(data: bytes) -> dict:
    return quick_input(input_image=None, input_video=to_base64(data))


def cut(format: str) -> bytes:
    data = encoded(picture(), format)
    return data[: len(data) // 2]


def without(name: str) -> dict:
    return {key: value for key, value in quick_input().items() if key != name}


# group: {what it is: (the job's input, code, part of the sentence)}
REFUSED = {
    "not an image": {
        "text that is not base64": (quick_input(input_image="not base64!"), "invalid_image", "base64"),
        "base64 of a text": (image(b"Once upon a time."), "invalid_image", "PNG, JPEG or WebP"),
        "a URL of this machine": (
            quick_input(input_image="https://127.0.0.1/cat.png"),
            "url_refused",
            "127.0.0.1",
        ),
        "an http URL": (quick_input(input_image="http://example.com/cat.png"), "url_refused", "https"),
        "a data URI without base64": (
            quick_input(input_image="data:image/svg+xml,%3Csvg/%3E"),
            "invalid_image",
            "base64",
        ),
        "an empty image": (quick_input(input_image=""), "invalid_request", "`input_image`"),
        "an image of spaces": (quick_input(input_image="   "), "invalid_image", "image"),
        "truncated PNG": (image(cut("PNG")), "invalid_image", "cut short"),
        "truncated JPEG": (image(cut("JPEG")), "invalid_image", "cut short"),
        "truncated WebP": (image(cut("WEBP")), "invalid_image", "image"),
        "animated GIF": (
            image(encoded(picture(), "GIF", save_all=True, append_images=[picture().rotate(90)])),
            "invalid_image",
            "GIF",
        ),
        "BMP": (image(encoded(picture(), "BMP")), "invalid_image", "BMP"),
    },
    "not a video": {
        "a text": (video(b"Once upon a time."), "invalid_video", "not an MP4, MOV, WebM, MKV or GIF"),
        "a truncated MP4": (video(b"\0\0\0\x18ftypmp42" + bytes(99)), "invalid_video", "cut short"),
        "a URL of this machine": (
            quick_input(input_image=None, input_video="https://127.0.0.1/cat.mp4"),
            "url_refused",
            "127.0.0.1",
        ),
        "video and image": (
            quick_input(input_video="x"),
            "invalid_request",
            "`input_image` must not be given",
        ),
    },
    "times": {
        "overlapping sections": (
            quick_input(sections=[{"start_s": 0, "end_s": 2, "prompt": "a"}, {"start_s": 1, "prompt": "b"}]),
            "invalid_request",
            "`sections.0` (0–2 s) and `sections.1` (1 s on) overlap",
        ),
        "a timed part without its unit": (
            quick_input(prompt="a cat [1-3s: it sleeps]"),
            "invalid_request",
            "[1-3s:, that cannot be read",
        ),
        "a keyframe that is no image": (
            quick_input(sections=[{"start_s": 0, "image": "aGVsbG8="}]),
            "invalid_image",
            "The image of `sections.0` is not a PNG",
        ),
        "a keyframe of this machine": (
            quick_input(sections=[{"start_s": 0, "image": "https://127.0.0.1/cat.png"}]),
            "url_refused",
            "`sections.0.image`: The host 127.0.0.1",
        ),
    },
    "size": {
        "0×0 PNG": (image(png(0, 0, 8, RGB)), "invalid_image", "image"),
        "40,000×40,000 PNG": (image(BOMBS["PNG"]), "image_too_large", "50 megapixels"),
        "65,500×65,500 JPEG": (image(BOMBS["JPEG"]), "image_too_large", "50 megapixels"),
        "16,384×16,383 animated WebP": (image(BOMBS["WebP"]), "image_too_large", "50 megapixels"),
        "file of over 20 MB": (image(MANY), "image_too_large", "20 MB"),
        "11:1 PNG": (image(encoded(picture(110, 10), "PNG")), "invalid_image", "110×10"),
    },
    "fields": {
        "no prompt": (without("prompt"), "invalid_request", "`prompt` is required"),
        "no image": (
            without("input_image"),
            "invalid_request",
            "`input_image`, `start` or `input_video` is required",
        ),
        "empty input": (
            {},
            "invalid_request",
            "`input_image`, `start` or `input_video` is required; `prompt` is required",
        ),
        "empty prompt": (quick_input(prompt=""), "invalid_request", "`prompt`"),
        "prompt of 4,001 characters": (quick_input(prompt="x" * 4001), "invalid_request", "4000"),
        "prompt a number": (quick_input(prompt=5), "invalid_request", "`prompt` must be a string"),
        "image a list": (quick_input(input_image=["x"]), "invalid_request", "`input_image` must be a string"),
        "unknown field": (quick_input(stepz=5), "invalid_request", "did you mean `steps`"),
        "unknown field, nothing like it": (quick_input(zzzz=5), "invalid_request", "not a known field"),
        "field and alias together": (
            quick_input(num_inference_steps=5),
            "invalid_request",
            "`steps` is given twice",
        ),
        "unknown model": (quick_input(model="f2"), "invalid_request", "`model`"),
        "many faults": (
            quick_input(steps=0, cfg=0, gs="x", rs=2, zzzz=1),
            "invalid_request",
            "and 2 more",
        ),
    },
    "frame": {
        "image and start": (quick_input(start="black"), "invalid_request", "`start`"),
        "start of no colour": (quick_input(input_image=None, start="#12345"), "invalid_request", "#1a2b3c"),
        "width alone": (quick_input(resolution=None, width=256), "invalid_request", "`height`"),
        "width 250": (
            quick_input(resolution=None, width=250, height=256),
            "invalid_request",
            "multiple of 16",
        ),
        "width and resolution": (quick_input(width=256, height=256), "invalid_request", "`resolution`"),
        "ratio 9:2": (quick_input(aspect_ratio="9:2"), "invalid_request", "between 1:4 and 4:1"),
        "ratio 16x9": (quick_input(aspect_ratio="16x9"), "invalid_request", "such as 16:9"),
        "end image with f1": (quick_input(end_image="aGVsbG8=", model="f1"), "invalid_request", "i2v"),
        "end image of text": (quick_input(end_image="aGVsbG8="), "invalid_image", "The end image is not a"),
    },
    "numbers": {
        "seed −2": (quick_input(seed=-2), "invalid_request", "at least -1"),
        "seed 2³²": (quick_input(seed=2**32), "invalid_request", "at most 4294967295"),
        "seed 1.5": (quick_input(seed=1.5), "invalid_request", "whole number"),
        "seed true": (quick_input(seed=True), "invalid_request", "whole number"),
        "seed of 10,000 letters": (quick_input(seed="A" * 10_000), "invalid_request", "whole number"),
        "steps 0": (quick_input(steps=0), "invalid_request", "at least 1"),
        'steps "25"': (quick_input(steps="25"), "invalid_request", "whole number"),
        "steps null": (quick_input(steps=None), "invalid_request", "whole number"),
        "cfg NaN": (quick_input(cfg=math.nan), "invalid_request", "finite number"),
        "cfg Infinity": (quick_input(cfg=math.inf), "invalid_request", "finite number"),
        "length −Infinity": (
            quick_input(total_second_length=-math.inf),
            "invalid_request",
            "`total_second_length`",
        ),
        'length "5"': (quick_input(total_second_length="5"), "invalid_request", "must be a number"),
        "length 0.5": (quick_input(total_second_length=0.5), "invalid_request", "at least 1"),
        "length 121": (quick_input(total_second_length=121), "invalid_request", "at most 120"),
        "resolution 300": (quick_input(resolution=300), "invalid_request", "multiple of 32"),
        "use_teacache 1": (quick_input(use_teacache=1), "invalid_request", "true or false"),
    },
    "not an object": {
        "input a list": ([quick_input()], "invalid_request", "a list"),
        "input a string": ("text", "invalid_request", "a string"),
        "input null": (None, "invalid_request", "null"),
        "input a number": (5, "invalid_request", "a number"),
    },
    "text that breaks a line or an encoding": {
        "prompt with a lone surrogate": (quick_input(prompt="\ud800"), "invalid_request", "`prompt` must be"),
        "image with a lone surrogate": (
            quick_input(input_image="\ud800"),
            "invalid_request",
            "`input_image` must be",
        ),
        "unknown field with a lone surrogate": (
            quick_input(**{"\ud800": 1}),
            "invalid_request",
            "not a known field",
        ),
        "unknown field with a line break": (quick_input(**{"a\nb": 1}), "invalid_request", "known field"),
        "seed with a line break": (quick_input(seed="a\nb"), "invalid_request", "whole number"),
    },
}

# what it is: (the job's input, the video's width and height or None, its frames)
WORKS = {
    "1×1 PNG": (image(encoded(picture(1, 1), "PNG")), None, 25),
    "3:1 PNG": (image(encoded(picture(96, 32), "PNG")), (320, 192), 25),
    "1:3 PNG": (image(encoded(picture(32, 96), "PNG")), (192, 320), 25),
    "10:1 PNG": (image(encoded(picture(100, 10), "PNG")), (320, 192), 25),
    "3:1 JPEG on its side (EXIF 6)": (
        image(encoded(picture(96, 32), "JPEG", exif=with_orientation(6))),
        (192, 320),
        25,
    ),
    "CMYK JPEG": (image(encoded(Image.new("CMYK", (32, 32), (0, 255, 255, 0)), "JPEG")), None, 25),
    "palette PNG": (image(png(2, 2, 8, PALETTE, [b"\0\0"] * 2, PALETTE_OF_ONE)), None, 25),
    "16-bit grey PNG": (image(png(2, 2, 16, GREY, [struct.pack(">HH", 0, 65535)] * 2)), None, 25),
    "RGBA PNG": (image(encoded(picture().convert("RGBA"), "PNG")), None, 25),
    "animated WebP": (
        image(encoded(picture(), "WEBP", save_all=True, append_images=[picture().rotate(90)])),
        None,
        25,
    ),
    "data URI": (
        quick_input(input_image="data:image/png;base64," + to_base64(encoded(picture(), "PNG"))),
        None,
        25,
    ),
    "emoji prompt": (quick_input(prompt="🐈‍⬛💃🏽🎉"), None, 25),
    "prompt of 4,000 characters": (quick_input(prompt="x" * 4000), None, 25),
    "seed null": (quick_input(seed=None), None, 25),
    "seed −1": (quick_input(seed=-1), None, 25),
    "steps 1.0": (quick_input(steps=1.0), None, 25),
    "latent_window_size 1": (quick_input(latent_window_size=1), None, 33),
}


NUMBERS = itertools.count(1000)


def run(data, job_id=None) -> dict:
    """One job as RunPod would hand it over, each with its own id; its reply must survive JSON."""
    reply = asyncio.run(handler.handler({"id": job_id or f"job-{next(NUMBERS)}", "input": data}))
    return json.loads(json.dumps(reply, allow_nan=False))


def assert_refused(reply: dict, code: str, part: str) -> None:
    assert set(reply) == {"error", "code"}
    assert reply["code"] == code
    assert part in reply["error"]
    assert reply["error"].endswith(".")
    assert len(reply["error"].splitlines()) == 1
    assert len(reply["error"]) < 400
    for foreign in ("Traceback", 'File "', "Input should", "validation error"):
        assert foreign not in reply["error"]


def assert_video(reply: dict, frames: int = 25) -> None:
    assert "error" not in reply
    assert base64.b64decode(reply["video_base64"])[4:8] == b"ftyp"
    assert reply["frames"] == frames


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory):
    """The temporary folder of this module's jobs."""
    with pytest.MonkeyPatch.context() as patch:
        path = tmp_path_factory.mktemp("temporary")
        patch.setattr(tempfile, "tempdir", str(path))
        patch.delenv("RUNPOD_WEBHOOK_POST_OUTPUT", raising=False)
        yield path


@pytest.fixture(scope="module")
def loads():
    """The threads on which the worker has loaded its models."""
    return []


@pytest.fixture(scope="module", autouse=True)
def one_worker(loads):
    """All jobs of this module run on one worker."""

    def load():
        loads.append(threading.current_thread())
        return quick_models()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(handler, "worker", Worker(load))
        yield


@pytest.fixture(scope="module")
def good_video(one_worker):
    """What the good job gives before any bad one."""
    reply = run(quick_input())
    assert_video(reply)
    return reply["video_base64"]


@pytest.fixture
def assert_well(good_video, folder, loads):
    """Nothing is left behind, and the next good job gives the very video it gave at first."""

    def check() -> None:
        assert list(folder.iterdir()) == []
        reply = run(quick_input())
        assert_video(reply)
        assert reply["video_base64"] == good_video
        assert list(folder.iterdir()) == []
        assert len(loads) == 1
        assert loads[0].is_alive()

    return check


@pytest.mark.parametrize("group", REFUSED)
def test_refused(group, subtests, assert_well):
    for what, (data, code, part) in REFUSED[group].items():
        with subtests.test(what):
            assert_refused(run(data), code, part)
    assert_well()


@pytest.mark.parametrize("what", WORKS)
def test_works(what, folder, good_video):
    data, size, frames = WORKS[what]
    reply = run(data)
    assert_video(reply, frames)
    if size is not None:
        assert (reply["width"], reply["height"]) == size
    assert list(folder.iterdir()) == []


def test_jobs_without_an_input_or_an_id(assert_well):
    assert_refused(asyncio.run(handler.handler({"id": "job-1"})), "invalid_request", "null")
    assert_refused(asyncio.run(handler.handler({"input": {}})), "invalid_request", "`prompt` is required")
    assert_well()


def test_bad_and_good_jobs_at_once(good_video):
    """Queued together they keep their replies apart."""

    async def all_of_them() -> list[dict]:
        jobs = [{"id": str(n), "input": quick_input(steps=n % 2)} for n in range(4)]
        return await asyncio.gather(*map(handler.handler, jobs))

    bad, good, also_bad, also_good = asyncio.run(all_of_them())
    assert_refused(bad, "invalid_request", "`steps`")
    assert_refused(also_bad, "invalid_request", "`steps`")
    assert good["video_base64"] == also_good["video_base64"] == good_video


def test_a_job_has_a_folder_while_it_runs(folder):
    """So that finding none afterwards says something."""
    seen = set()
    handler.worker.submit("job-1", quick_input(), lambda _: seen.update(folder.iterdir())).result()
    assert [path.name.startswith("framepack-") for path in seen] == [True]
    assert list(folder.iterdir()) == []


def broken(*_, **__):
    raise RuntimeError("a secret of the worker's")


def assert_internal_error(reply: dict) -> None:
    assert_refused(reply, "internal_error", "job-77")
    assert "secret" not in reply["error"]
    assert "RuntimeError" not in reply["error"]


@pytest.mark.parametrize("place", ["core.job.run_job", "core.job.decode_image", "core.pipeline.save_video"])
def test_unknown_errors(place, monkeypatch, caplog, assert_well):
    """The caller gets the job's id; the traceback is in the log under it."""
    with monkeypatch.context() as patch:
        patch.setattr(place, broken)
        assert_internal_error(run(quick_input(), "job-77"))
    record = next(record for record in caplog.records if record.exc_info)
    assert "job-77" in record.getMessage()
    assert "a secret of the worker's" in caplog.text
    assert_well()


def test_an_error_after_files_were_written(monkeypatch, assert_well):
    def write_and_fail(clips, path, *_):
        path.write_bytes(b"half a video")
        raise RuntimeError("a secret of the worker's")

    with monkeypatch.context() as patch:
        patch.setattr("core.pipeline.save_video", write_and_fail)
        assert_internal_error(run(quick_input(), "job-77"))
    assert_well()


def test_no_memory_for_an_image(monkeypatch, assert_well):
    def no_memory(*_, **__):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr("core.job.decode_image", no_memory)
        assert_refused(run(quick_input(), "job-77"), "internal_error", "job-77")
    assert_well()


def test_models_that_cannot_be_loaded(monkeypatch, tmp_path):
    """With the loader the worker has by itself, and a folder that is not there."""
    monkeypatch.setenv("MODEL_PROFILE", "demo")
    monkeypatch.setenv("HUNYUAN_MODEL", str(tmp_path / "nowhere"))
    monkeypatch.setattr(handler, "worker", Worker())
    for _ in range(2):
        assert_refused(run(quick_input()), "model_unavailable", "nowhere")


def test_settings_that_make_no_sense(monkeypatch):
    monkeypatch.setenv("MODEL_PROFILE", "nonsense")
    monkeypatch.setattr(handler, "worker", Worker())
    assert_refused(run(quick_input()), "invalid_settings", "MODEL_PROFILE")


def test_models_that_load_at_the_third_attempt(monkeypatch, caplog):
    attempts = iter([ModelError("The model is being moved."), RuntimeError("a secret of the worker's"), None])

    def load():
        if error := next(attempts):
            raise error
        return quick_models()

    monkeypatch.setattr(handler, "worker", Worker(load))
    assert_refused(run(quick_input()), "model_unavailable", "is being moved")
    assert_internal_error(run(quick_input(), "job-77"))
    assert_video(run(quick_input()))
    assert_video(run(quick_input()))


def test_the_worker_is_as_it_was(assert_well):
    """After everything above."""
    assert_well()
