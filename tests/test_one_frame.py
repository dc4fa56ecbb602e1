"""A single picture in place of a video."""

import base64
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import core.pipeline
from core.embedding import NoParametersError, read_embedded
from core.errors import RequestError
from core.job import run_job
from core.pipeline import generate_video_sync
from core.png_file import PngWriter
from core.reproduce import request_of
from core.request import parse_request
from tests.test_frame import END, IMAGE

GOLDEN = Path(__file__).parent / "golden"
PICTURE = {"prompt": "x", "input_image": IMAGE, "one_frame": {}, "steps": 1, "width": 80, "height": 64}


@pytest.mark.usefixtures("quick_decode")
@pytest.mark.parametrize(
    "name", ["i2v_one_frame", "i2v_one_frame_reference", "i2v_one_frame_mixed", "f1_one_frame"]
)
def test_same_latents_as_musubi_tuner(name, tiny_models, monkeypatch):
    """tests/golden/README.md tells how its files were made."""
    golden = np.load(GOLDEN / f"{name}.npz")
    request = parse_request({"input_image": "golden/input.png"} | json.loads(str(golden["args"])))
    image = np.asarray(Image.open(GOLDEN / "input.png").convert("RGB"))
    reference = image[::-1, ::-1] if request.end_image else None
    monkeypatch.setattr(core.pipeline, "save_video", lambda clips, *_: len(list(clips)))
    sections = []
    tiny_models.use_direction(request.model)
    made = generate_video_sync(
        tiny_models, image, request, "unused", end_image=reference, on_section=sections.append
    )
    assert (made.frames, made.sections) == (1, 1)
    ours, theirs = sections[0].latents[..., ::4, ::4], torch.from_numpy(golden["latents_0"])
    # Another position, or one kind of empty frame more or less, is at least 4e-3 away. Processors differ by
    # 1e-5: UniPC's coefficients are float32.
    assert (ours - theirs).norm() / theirs.norm() < 1e-4


@pytest.fixture
def quick_job(tiny_models, quick_decode):
    return lambda **fields: run_job(PICTURE | fields, tiny_models)


def test_a_job_makes_one_png_that_is_made_again_from_itself(quick_job, tiny_models, tmp_path):
    reply = quick_job(end_image=END, num_outputs=2, seed=5, poster=True)
    assert json.loads(json.dumps(reply)) == reply
    assert (reply["content_type"], reply["requested_s"], reply["warnings"]) == ("image/png", None, [])
    assert reply["parameters"]["format"] == "png" and reply["parameters"]["codec"] is None
    asked = {"target_index": 9, "control_index": 0, "end_index": 10}
    assert reply["parameters"]["one_frame"] == asked | dict.fromkeys(["no_post", "no_2x", "no_4x"], False)
    first, second = reply["outputs"]
    assert (first["frames"], first["duration_s"], first["sections"]) == (1, None, 1)
    assert first["video_base64"] != second["video_base64"]

    path = tmp_path / "picture.png"
    path.write_bytes(base64.b64decode(second["video_base64"]))
    picture = np.asarray(Image.open(path)).astype(int)
    assert picture.shape == (64, 80, 3)
    poster = np.asarray(Image.open(io.BytesIO(base64.b64decode(second["poster_base64"]))))
    assert np.abs(poster - picture).mean() < 12

    found = request_of(path)["input"]
    assert found["seed"] == 6 and found["one_frame"] == reply["parameters"]["one_frame"]
    again = run_job(found | {"input_image": IMAGE, "end_image": END}, tiny_models)
    assert again["video_base64"] == second["video_base64"]


def test_what_has_no_effect_is_said(quick_job):
    free = {"target_index": 3, "end_index": 4, "no_post": True, "no_2x": True, "no_4x": True}
    inert = {"total_second_length": 3, "exact_length": True, "partial": True, "fps": 24, "mp4_crf": 20}
    warnings = quick_job(one_frame=free, latent_window_size=5, blend_sections=1, **inert)["warnings"]
    names = {*inert, "one_frame.end_index", "latent_window_size", "blend_sections"}
    assert {warning.split("`")[1] for warning in warnings} == names and len(warnings) == len(names)
    assert quick_job(latent_window_size=5)["warnings"] == []


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"format": "mp4"}, "`format` must be png with `one_frame` (got mp4)."),
        ({"codec": "h264"}, "`codec` h264 does not go with `format` png: png has no codec to choose."),
        ({"return_latents": True}, "`return_latents` must not be given with `one_frame`: a picture does not"),
        ({"resume_latents": "x"}, "`resume_latents` must not be given with `one_frame`"),
        (
            {"sections": [{"start_s": 0, "prompt": "y"}]},
            "`sections` and timed prompts must not be given with",
        ),
        ({"prompt": "[0s-1s: y] x"}, "`sections` and timed prompts must not be given with `one_frame`"),
        ({"end_image": "y", "model": "f1"}, "`end_image` needs the `model` i2v"),
        ({"one_frame": None, "format": "png"}, "`format` png is one picture and needs `one_frame`"),
        ({"one_frame": 9}, "`one_frame` must be an object (got 9)."),
        ({"one_frame": {"target_index": 101}}, "`one_frame.target_index` must be at most 100 (got 101)."),
        ({"one_frame": {"control_index": -1}}, "`one_frame.control_index` must be at least 0 (got -1)."),
        ({"one_frame": {"end_index": 1.5}}, "`one_frame.end_index` must be a whole number (got 1.5)."),
        ({"one_frame": {"no_2x": 1}}, "`one_frame.no_2x` must be true or false (got 1)."),
        (
            {"one_frame": {"target": 1}},
            "`one_frame.target` is not a known field (did you mean `target_index`?).",
        ),
    ],
    ids=str,
)
def test_refused(fields, sentence):
    with pytest.raises(RequestError) as caught:
        parse_request(PICTURE | fields)
    assert str(caught.value).startswith(sentence)


class TestThePng:
    FRAME = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)

    def written(self, path: Path, parameters: str | None) -> bytes:
        writer = PngWriter(path, parameters)
        writer.write(self.FRAME)
        writer.finish()
        return path.read_bytes()

    def test_holds_one_frame(self, tmp_path):
        self.written(tmp_path / "a.png", None)
        assert (np.asarray(Image.open(tmp_path / "a.png")) == self.FRAME).all()
        writer = PngWriter(tmp_path / "b.png")
        writer.write(self.FRAME)
        with pytest.raises(ValueError, match="one frame"):
            writer.write(self.FRAME)

    def test_damaged_ones_have_no_parameters(self, tmp_path):
        path = tmp_path / "a.png"
        text = json.dumps({"framepack_worker": 1, "images": {}, "parameters": {"prompt": "日本語"}})
        data = self.written(path, text)
        assert read_embedded(path)["parameters"] == {"prompt": "日本語"}
        at = data.index(b"Comment")
        for damaged in (
            data[:20],
            data[: at + 30],
            data[:at] + b"comment" + data[at + 7 :],
            data[: at - 8] + b"\xff\xff\xff\xff" + data[at - 4 :],
            self.written(path, None),
        ):
            path.write_bytes(damaged)
            with pytest.raises(NoParametersError, match=r"a\.png (cannot be read|holds no)"):
                read_embedded(path)
