"""The finished file: its kind, its pace, its poster, and the request inside it."""

import base64
import hashlib
import io
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from PIL import Image

from core.delivery import Delivery
from core.embedding import as_ffmetadata, embedded, read_embedded
from core.errors import RequestError, ResultTooLargeError, VideoEncodingError
from core.ffmpeg import check_encoder
from core.file_format import FORMATS, content_type_of, suffix_of
from core.job import run_job
from core.request import parse_request
from core.settings import Settings
from core.video import VideoFile, first_frame_jpeg, save_bcthw_as_mp4, save_video
from tests.test_endurance import quick_input

ROOT = Path(__file__).parents[1]
STAND_INS = Path(__file__).parent / "ffmpeg"
KINDS = [
    ("mp4", "h264", "h264"),
    ("mp4", "h265", "hevc"),
    ("mp4", "av1", "av1"),
    ("webm", "vp9", "vp9"),
    ("webm", "av1", "av1"),
    ("gif", None, "gif"),
    ("png_sequence", None, "png"),
]
VIDEOS = [format for format in FORMATS if format != "png"]  # which is for one picture: test_one_frame.py
ODD_PROMPT = '= ; # \\ \\n "quoted" \' \n\t\x01 日本語 🐈 ' + "long " * 500


@pytest.fixture
def clip() -> torch.Tensor:
    """(1, 3, 24, 64, 96): a grey that brightens from frame to frame, over a still gradient."""
    levels = torch.arange(24).view(1, 1, 24, 1, 1) * 5
    gradient = torch.arange(96).view(1, 1, 1, 1, 96)
    return (levels + gradient).to(torch.uint8).expand(1, 3, 24, 64, 96)


def frames_of(path: Path) -> tuple[dict, np.ndarray]:
    """What ffmpeg, or for pictures PIL, reads: codec, fps and size, and the frames (T, H, W, 3)."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith(".png")]
            assert names == [f"frame_{number:05d}.png" for number in range(1, len(names) + 1)]
            frames = [np.asarray(Image.open(io.BytesIO(archive.read(name)))) for name in names]
        return {"codec": "png", "size": frames[0].shape[1::-1]}, np.stack(frames)
    reader = imageio_ffmpeg.read_frames(str(path))
    meta = next(reader)
    width, height = meta["size"]
    return meta, np.stack([np.frombuffer(f, np.uint8).reshape(height, width, 3) for f in reader])


def written(tmp_path: Path, clip: torch.Tensor, **values) -> Path:
    file = VideoFile(**values)
    path = tmp_path / f"video{FORMATS[file.format].suffix}"
    assert save_video([clip[:, :, :10], clip[:, :, 10:]], path, file) == 24
    assert list(tmp_path.iterdir()) == [path]
    return path


class TestKinds:
    @pytest.mark.parametrize(("format", "codec", "found"), KINDS)
    def test_holds_the_frames_at_its_pace_and_its_parameters(self, tmp_path, clip, format, codec, found):
        text = embedded({"prompt": ODD_PROMPT}, "demo", {"input_image": "00"})
        path = written(tmp_path, clip, format=format, codec=codec, fps=25, parameters=text)
        meta, frames = frames_of(path)
        assert meta["codec"].startswith(found) and meta["size"] == (96, 64)
        assert format == "png_sequence" or meta["fps"] == 25
        assert frames.shape == (24, 64, 96, 3)
        wanted = clip[0].permute(1, 2, 3, 0).numpy().astype(int)
        assert np.abs(frames - wanted).mean() < (0.01 if format == "png_sequence" else 4)
        assert read_embedded(path)["parameters"] == {"prompt": ODD_PROMPT}

    @pytest.mark.parametrize(("format", "codec", "found"), KINDS)
    def test_the_same_frames_are_the_same_bytes(self, tmp_path, clip, format, codec, found):
        values = {"format": format, "codec": codec, "parameters": embedded({}, "demo", {"input_image": "00"})}
        first = written(tmp_path, clip, **values).read_bytes()
        assert written(tmp_path, clip, **values).read_bytes() == first

    @pytest.mark.parametrize("codec", ["h264", "h265", "av1"])
    def test_a_lower_crf_is_larger(self, tmp_path, codec):
        noise = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (1, 3, 24, 64, 96), np.uint8))
        sizes = [written(tmp_path, noise, codec=codec, crf=crf).stat().st_size for crf in (0, 16, 51)]
        assert sizes == sorted(set(sizes), reverse=True) and sizes[0] > 1.5 * sizes[2]

    def test_h265_has_the_tag_that_apples_players_know(self, tmp_path, clip):
        assert b"hvc1" in written(tmp_path, clip, codec="h265").read_bytes()

    def test_parameters_change_no_pixel(self, tmp_path, clip):
        plain, told = tmp_path / "plain.mp4", tmp_path / "told.mp4"
        save_bcthw_as_mp4([clip], plain)
        save_video([clip], told, VideoFile(parameters=embedded({}, "demo", {"input_image": "00"})))
        assert plain.read_bytes() != told.read_bytes()
        assert media_data(plain) == media_data(told)
        assert (frames_of(plain)[1] == frames_of(told)[1]).all()

    def test_a_gif_has_one_palette_that_suits_all_its_frames_and_goes_on_for_ever(self, tmp_path):
        colours = torch.tensor([[250, 10, 10], [10, 250, 10], [10, 10, 250], [200, 200, 40]])
        clip = (
            colours.repeat_interleave(6, 0).T.reshape(1, 3, 24, 1, 1).expand(1, 3, 24, 64, 96).to(torch.uint8)
        )
        path = written(tmp_path, clip, format="gif", codec=None, fps=20)
        assert len(gif_palettes(path)) == 1
        assert np.abs(frames_of(path)[1] - clip[0].permute(1, 2, 3, 0).numpy().astype(int)).max() <= 4
        with Image.open(path) as gif:
            assert gif.info["loop"] == 0 and gif.n_frames == 24
            durations = [gif.info["duration"] for frame in range(24) if gif.seek(frame) is None]
        assert durations == [50] * 24

    def test_a_gif_without_a_second_pass_is_none(self, tmp_path, clip):
        once = iter([clip])
        with pytest.raises(VideoEncodingError, match="no frames"):
            save_video(once, tmp_path / "video.gif", VideoFile("gif", None))
        assert list(tmp_path.iterdir()) == []

    def test_suffixes_and_content_types(self):
        for kind in FORMATS.values():
            assert content_type_of(Path(f"a{kind.suffix}")) == kind.content_type
            assert suffix_of(kind.content_type) == kind.suffix
        assert suffix_of(None) == suffix_of("text/html") == ".mp4"


def gif_palettes(path: Path) -> set[bytes]:
    """The colour tables that the frames are drawn with: the global one, and a frame's own."""
    data = path.read_bytes()

    def table(flags: int, start: int) -> bytes:
        return data[start : start + 3 * 2 ** (flags % 8 + 1)] if flags & 0x80 else b""

    def after_blocks(start: int) -> int:
        while data[start]:
            start += data[start] + 1
        return start + 1

    shared, found = table(data[10], 13), set()
    place = 13 + len(shared)
    while (kind := data[place : place + 1]) != b";":
        if kind == b"!":
            place = after_blocks(place + 2)
            continue
        own = table(data[place + 9], place + 10)
        found.add(own or shared)
        place = after_blocks(place + 10 + len(own) + 1)
    return found


def media_data(path: Path) -> bytes:
    """The `mdat` box, of those at the top: the coded pictures."""
    data = path.read_bytes()
    start = 0
    while data[start + 4 : start + 8] != b"mdat":
        start += int.from_bytes(data[start : start + 4])
    return data[start : start + int.from_bytes(data[start : start + 4])]


class TestFailures:
    @pytest.mark.parametrize(("format", "codec", "found"), KINDS)
    @pytest.mark.parametrize("stand_in", ["killed", "missing", "disk_full_everywhere"])
    def test_leave_one_sentence_and_no_file(
        self, tmp_path, clip, format, codec, found, stand_in, monkeypatch
    ):
        if format == "png_sequence":
            pytest.skip("written without ffmpeg")
        monkeypatch.setenv("REAL_FFMPEG", imageio_ffmpeg.get_ffmpeg_exe())
        monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(STAND_INS / stand_in))
        path = tmp_path / f"video{FORMATS[format].suffix}"
        file = VideoFile(format, codec, parameters=embedded({}, "demo", {"input_image": "00"}))
        many = [clip.repeat(1, 1, 4, 2, 2)] * 2
        with pytest.raises(VideoEncodingError, match=r"could not be encoded: [^/]*\.$"):
            save_video(many, path, file)
        assert list(tmp_path.iterdir()) == []

    def test_a_zip_on_a_full_disk(self, tmp_path, clip):
        path = tmp_path / "video.zip"
        path.symlink_to("/dev/full")
        with pytest.raises(VideoEncodingError, match="the disk is full"):
            save_video([clip], path, VideoFile("png_sequence", None))
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("format", VIDEOS)
    def test_what_the_frames_raise_comes_through(self, tmp_path, clip, format):
        def broken():
            yield clip
            raise ZeroDivisionError

        codec = next(iter(FORMATS[format].codecs), None)
        with pytest.raises(ZeroDivisionError):
            save_video(broken(), tmp_path / f"video{FORMATS[format].suffix}", VideoFile(format, codec))
        assert list(tmp_path.iterdir()) == []


@pytest.fixture
def poor_ffmpeg(tmp_path, monkeypatch):
    """An ffmpeg with libx264 and nothing else."""
    script = tmp_path / "poor-ffmpeg"
    script.write_text("#!/bin/sh\necho ' V....D libx264    libx264 H.264 (codec h264)'\n")
    script.chmod(0o755)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(script))


class TestTheRequest:
    @pytest.mark.parametrize(
        ("fields", "sentence"),
        [
            ({"format": "webm", "codec": "h264"}, "a webm holds vp9 or av1"),
            ({"format": "mp4", "codec": "vp9"}, "a mp4 holds h264 or h265 or av1"),
            ({"format": "gif", "codec": "h264"}, "gif has no codec to choose"),
            ({"format": "png_sequence", "codec": "av1"}, "png_sequence has no codec to choose"),
            ({"format": "gif", "fps": 51}, "`fps` must be at most 50"),
            ({"format": "avi"}, "`format` must be"),
            ({"codec": "x264"}, "`codec` must be"),
        ],
    )
    def test_contradictions_are_refused(self, fields, sentence):
        with pytest.raises(RequestError, match=sentence):
            parse_request(quick_input(**fields))

    @pytest.mark.parametrize(
        "fields",
        [{"codec": "h265"}, {"codec": "av1"}, {"format": "webm"}, {"format": "gif"}],
        ids=lambda fields: "-".join(fields.values()),
    )
    def test_what_ffmpeg_lacks_is_refused_before_the_image_is_read(self, poor_ffmpeg, fields):
        data = quick_input(**fields) | {"input_image": "no image"}
        with pytest.raises(RequestError, match="this worker's ffmpeg has no"):
            run_job(data, models=FakeModels)

    def test_what_it_has_passes(self, poor_ffmpeg):
        check_encoder("h264", "mp4")
        check_encoder(None, "png_sequence")

    def test_no_ffmpeg_at_all_is_said_before_the_image_is_read(self, monkeypatch):
        monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", "/nowhere/ffmpeg")
        with pytest.raises(VideoEncodingError, match=r"^[^/]*$"):
            run_job(quick_input(codec="av1") | {"input_image": "no image"}, models=FakeModels)


class FakeModels:
    device = torch.device("cpu")


@pytest.mark.usefixtures("quick_decode")
class TestJobs:
    @pytest.mark.parametrize("format", VIDEOS)
    def test_a_job_of_each_format(self, tiny_models, tmp_path, format):
        data = quick_input(format=format, fps=15, mp4_crf=20, poster=True)
        reply = run_job(data, tiny_models)
        path = tmp_path / f"video{FORMATS[format].suffix}"
        path.write_bytes(base64.b64decode(reply["video_base64"]))
        meta, frames = frames_of(path)
        assert len(frames) == reply["frames"] == 25
        assert meta["size"] == (reply["width"], reply["height"])
        assert reply["fps"] == 15 and reply["duration_s"] == 1.667 and reply["requested_s"] == 1
        assert reply["content_type"] == FORMATS[format].content_type
        assert reply["parameters"]["codec"] == {"mp4": "h264", "webm": "vp9"}.get(format)
        inert = {"gif": ["`mp4_crf`"], "png_sequence": ["`mp4_crf`", "`fps`"]}.get(format, [])
        assert [warning.split(" ")[0] for warning in reply["warnings"]] == inert

        poster = Image.open(io.BytesIO(base64.b64decode(reply["poster_base64"])))
        assert poster.format == "JPEG" and poster.size == meta["size"]
        if format == "png_sequence":
            assert np.abs(np.asarray(poster).astype(int) - frames[0]).mean() < 12
            assert np.abs(np.asarray(poster).astype(int) - frames[-1]).mean() > 12

        found = read_embedded(path)
        assert found["parameters"] == reply["parameters"]
        image = base64.b64decode(data["input_image"])
        assert found["images"] == {"input_image": hashlib.sha256(image).hexdigest()}

    def test_nothing_is_embedded_unless_wanted(self, tiny_models):
        data = quick_input(prompt="A tell-tale prompt.")
        told = base64.b64decode(run_job(data, tiny_models)["video_base64"])
        plain = base64.b64decode(run_job(data | {"embed_parameters": False}, tiny_models)["video_base64"])
        assert b"tell-tale" in told and b"tell-tale" not in plain

    def test_no_secret_is_embedded(self, tiny_models):
        bucket = {"accessId": "hidden-id", "accessSecret": "hidden-key", "bucketName": "hidden-b"}
        data = quick_input(s3_config=bucket | {"endpointUrl": "https://hidden.example"})
        video = base64.b64decode(run_job(data, tiny_models)["video_base64"])
        assert b"framepack_worker" in video and b"hidden" not in video
        assert data["input_image"][:40].encode() not in video

    def test_a_poster_takes_its_share_of_the_reply(self, tiny_models, tmp_path):
        data = quick_input(mp4_crf=30, poster=True)
        reply = run_job(data, tiny_models)
        video, poster = (len(base64.b64decode(reply[f"{name}_base64"])) for name in ("video", "poster"))
        sizes = {"exact": video + poster, "short": video + poster - 1}
        limits = {name: Settings(inline_limit_mb=size / 1e6) for name, size in sizes.items()}
        assert "video_base64" in run_job(data, tiny_models, deliver=Delivery(limits["exact"]))
        with pytest.raises(ResultTooLargeError, match="beside"):
            run_job(data, tiny_models, deliver=Delivery(limits["short"]))


def test_the_poster_is_the_first_frame(clip):
    poster = np.asarray(Image.open(io.BytesIO(first_frame_jpeg([clip]))))
    assert np.abs(poster.astype(int) - clip[0, :, 0].permute(1, 2, 0).numpy()).max() < 4


class TestReproduce:
    """`python -m core.reproduce`, which prints the request of a file."""

    def run(self, *arguments) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "core.reproduce", *map(str, arguments)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            assert done.returncode == 1 and done.stdout == ""
            assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr
        return done

    @pytest.fixture
    def made(self, tmp_path, clip) -> Path:
        image = b"an image's file"
        (tmp_path / "image.png").write_bytes(image)
        request = parse_request(quick_input(prompt=ODD_PROMPT[:400], seed=7))
        parameters = request.model_dump(exclude={"input_image", "s3_config"})
        folder = tmp_path / "made"
        folder.mkdir()
        text = embedded(parameters, "demo", {"input_image": hashlib.sha256(image).hexdigest()})
        return written(folder, clip, parameters=text)

    def test_prints_the_request_and_fills_the_image_in(self, tmp_path, made):
        placeholder = json.loads(self.run(made).stdout)["input"]["input_image"]
        assert placeholder == "sha256:" + hashlib.sha256(b"an image's file").hexdigest()
        job = json.loads(self.run(made, "--image", tmp_path / "image.png").stdout)
        assert base64.b64decode(job["input"]["input_image"]) == b"an image's file"
        request = parse_request(job["input"])
        assert (request.seed, request.prompt) == (7, ODD_PROMPT[:400])

    def test_fills_in_the_images_of_sections(self, tmp_path, clip):
        files = {name: name.encode() for name in ("start", "later")}
        digests = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
        for name, data in files.items():
            (tmp_path / name).write_bytes(data)
        places = [("later", 0.0), (None, 0.4), ("start", 0.8)]
        sections = [
            {"start_s": start, "end_s": start + 0.4, "image": f"sha256:{digests[name]}" if name else None}
            for name, start in places
        ]
        text = embedded({"prompt": "x", "sections": sections}, "demo", {"input_image": digests["start"]})
        folder = tmp_path / "made"
        folder.mkdir()
        made = written(folder, clip, parameters=text)
        job = json.loads(self.run(made, "--image", tmp_path / "start").stdout)["input"]
        images = [section["image"] for section in job["sections"]]
        assert images == [f"sha256:{digests['later']}", None, base64.b64encode(b"start").decode()]
        assert base64.b64decode(job["input_image"]) == b"start"
        both = ("--image", tmp_path / "start", "--image", tmp_path / "later")
        job = json.loads(self.run(made, *both).stdout)["input"]
        assert base64.b64decode(job["sections"][0]["image"]) == b"later"

    def test_refuses_another_image(self, tmp_path, made):
        (tmp_path / "image.png").write_bytes(b"another")
        assert "is no image that" in self.run(made, "--image", tmp_path / "image.png").stderr
        assert "cannot be read" in self.run(made, "--image", tmp_path / "none.png").stderr

    def test_the_request_of_a_file_makes_the_file_again(self, tiny_models, tmp_path, quick_decode):
        data = quick_input(seed=-1, exact_length=True, total_second_length=1.3)
        first = run_job(data, tiny_models)
        path = tmp_path / "video.mp4"
        path.write_bytes(base64.b64decode(first["video_base64"]))
        job = json.loads(self.run(path).stdout)
        again = run_job(job["input"] | {"input_image": data["input_image"]}, tiny_models)
        assert again["video_base64"] == first["video_base64"]


class TestDamagedFiles:
    @pytest.mark.parametrize("format", VIDEOS)
    def test_are_refused_in_one_sentence(self, tmp_path, clip, format):
        codec = next(iter(FORMATS[format].codecs), None)
        path = written(
            tmp_path, clip, format=format, codec=codec, parameters=embedded({}, "demo", {"input_image": "00"})
        )
        data = path.read_bytes()
        random = np.random.default_rng(0)
        for attempt in range(6):
            cut = data[: int(len(data) * attempt / 6)]
            noise = bytearray(data)
            for place in random.integers(0, len(data), 200):
                noise[place] = random.integers(0, 256)
            for damaged in (cut, bytes(noise)):
                path.write_bytes(damaged)
                try:
                    found = read_embedded(path)
                except Exception as error:
                    assert type(error).__name__ == "NoParametersError", error
                    assert str(error).endswith(".")
                else:
                    assert found["parameters"] == {}

    @pytest.mark.parametrize(
        "data", [b"", b"GIF89a", b"PK\x03\x04", b"\0\0\0\x18ftypisom", b"\x1aE\xdf\xa3", b"hello " * 100]
    )
    def test_of_nothing(self, tmp_path, data):
        path = tmp_path / "file"
        path.write_bytes(data)
        assert TestReproduce().run(path).stderr.startswith(str(path))

    def test_files_that_others_made(self, tmp_path, clip):
        path = written(tmp_path, clip)
        assert "no parameters of this worker's" in TestReproduce().run(path).stderr
        assert "cannot be read" in TestReproduce().run(tmp_path / "none.mp4").stderr
        with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
            archive.writestr("parameters.json", "[" * 100_000)
        assert "no parameters" in TestReproduce().run(tmp_path / "other.zip").stderr


def test_ffmetadata_is_escaped():
    assert as_ffmetadata("a=b;c#d\\e\nf") == ";FFMETADATA1\ncomment=a\\=b\\;c\\#d\\\\e\\\nf\n"
