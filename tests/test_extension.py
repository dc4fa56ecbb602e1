"""A given video that is gone on from: forward by F1, backward by I2V."""

import base64
import subprocess
from itertools import pairwise
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import core.job
import core.pipeline
import core.pipeline.sampling
from core.errors import CancelledError, RequestError, UrlRefusedError, VideoEncodingError, VideoError
from core.extension import MAX_BYTES
from core.input_video import InputVideo, fit_video
from core.job import run_job
from core.pipeline import Models, generate_video_sync
from core.pipeline.capacity import check_capacity
from core.pipeline.sections import Join, plan_sections
from core.reproduce import request_of
from core.request import parse_request
from core.settings import Settings
from core.video import VideoFile, save_video
from core.weights.profiles import load_profile
from core.worker import Worker
from diffusers_helper.buckets import resize_and_center_crop
from tests.lora_formats import kohya, originals
from tests.test_images import to_base64
from tests.tiny import TINY

HEIGHT, WIDTH = 64, 80
QUICK = {
    "prompt": "x",
    "steps": 1,
    "width": WIDTH,
    "height": HEIGHT,
    "latent_window_size": 3,
    "total_second_length": 1,
    "seed": 7,
    "format": "png_sequence",
}
NEW = {"f1": 24, "i2v": 20}  # frames of two sections


def scene(frames: int = 60, height: int = HEIGHT, width: int = WIDTH, seed: int = 0) -> torch.Tensor:
    """A smooth pattern that moves, (1, 3, T, H, W) uint8."""
    t, y, x = np.mgrid[0:frames, 0:height, 0:width].astype(np.float32)
    waves = [np.sin((c + 1) * x / 19 + y / (11 + seed) + t / 5 + seed) for c in range(3)]
    return torch.from_numpy((127 + 110 * np.stack(waves)).astype(np.uint8))[None]


def ffmpeg(path: Path, *arguments: str) -> bytes:
    subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", *arguments, str(path)], check=True)
    return path.read_bytes()


@pytest.fixture
def encoded(tmp_path):
    """A scene as an MP4 that loses nothing but its colours' sharpness."""

    def encoded(clip: torch.Tensor, **options) -> bytes:
        path = tmp_path / "source.mp4"
        save_video([clip], path, VideoFile(**{"crf": 1} | options))
        return path.read_bytes()

    return encoded


def as_frames(clip: torch.Tensor) -> np.ndarray:
    return clip[0].permute(1, 2, 3, 0).numpy()


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.square(a.astype(float) - b.astype(float)).mean()))


@pytest.fixture
def run(tiny_models, quick_decode, monkeypatch):
    """A job whose video comes back as frames (T, H, W, 3), and its reply."""
    saved = []

    def keep(clips, path, file):
        saved.append(np.concatenate([as_frames(clip) for clip in clips]))
        path.write_bytes(b"x")
        return len(saved[-1])

    monkeypatch.setattr(core.pipeline, "save_video", keep)

    def run(data: bytes, models: Models = tiny_models, settings: Settings | None = None, **fields):
        reply = run_job(QUICK | {"input_video": to_base64(data)} | fields, models, settings)
        return saved[-1], reply

    return run


class TestArithmetic:
    @pytest.mark.parametrize("window", [1, 3, 9, 33])
    @pytest.mark.parametrize("forward", [True, False])
    def test_the_overlap_is_what_the_latents_seen_decode_to(self, forward, window):
        for frames in (5, 6, 8, 9, 60, 200):
            join = Join(forward, window, frames)
            assert join.seen <= frames and join.seen % 4 == 1
            latents = len(range((join.seen - 1) // 4 + 1)[join.latents])
            assert 1 <= latents <= max(19, window)
            decoded = 4 * (min(latents, window) + window) - 3  # with one section
            new = plan_sections(1, window, "f1" if forward else "i2v", extends=True).frames_with(1)
            assert decoded - join.overlap == new
            assert join.overlap <= join.seen

    def test_nothing_before_a_video_is_near_its_start(self):
        plan = plan_sections(6, 9, "i2v", extends=True)
        assert [section.latents[0] // 9 for section in plan.sections] == [3, 2, 2, 2, 2]
        assert not any(section.adds_start for section in plan.sections)

    @pytest.mark.parametrize("direction", ["i2v", "f1"])
    def test_an_exact_length_is_that_of_the_new_part(self, direction):
        for seconds in (1, 1.3, 2.4, 7):
            plan = plan_sections(seconds, 9, direction, exact=True, extends=True)
            assert plan.frames == round(30 * seconds) <= plan.frames_with(len(plan.sections))


@pytest.mark.parametrize("frames", [17, 120])
@pytest.mark.parametrize("model", ["f1", "i2v"])
def test_history_holds_the_videos_own_latents(model, frames, run, encoded, tiny_models, monkeypatch):
    """Of the first section sampled: as the VAE encodes the frames nearest to the join."""
    packed, pack = [], core.pipeline.sampling.pack

    def spy(section, clean, half, quarter, models):
        packed.append((clean, half, quarter))
        return pack(section, clean, half, quarter, models)

    monkeypatch.setattr(core.pipeline.sampling, "pack", spy)
    monkeypatch.setattr(
        "core.pipeline.conditioning.ImageLatent.of", _mean_of(core.pipeline.conditioning.ImageLatent)
    )
    data = encoded(scene(frames))
    _, reply = run(data, model=model)
    clean, half, quarter = packed[0]
    forward = model == "f1"
    order = (quarter, half, clean[:, :, 1:]) if forward else (clean[:, :, 1:], half, quarter)
    history = torch.cat(order, dim=2)
    assert history.shape[2] == 19

    seen = 77 if frames == 120 else 17
    assert reply["source"]["seen_frames"] == seen
    decoded = np.stack([*InputVideo(data).frames(HEIGHT, WIDTH)])
    pixels = torch.from_numpy(decoded[-seen:] if forward else decoded[:seen]).permute(3, 0, 1, 2)[None]
    vae = tiny_models.vae
    with torch.no_grad():
        latents = vae.encode(pixels / 127.5 - 1).latent_dist.mean * vae.config.scaling_factor
    if frames == 120:
        expected = latents[:, :, 1:]
    else:
        kept = latents if forward else latents[:, :, 1:]
        empty = torch.zeros(1, 16, 19 - kept.shape[2], *kept.shape[3:])
        expected = torch.cat([empty, kept] if forward else [kept, empty], dim=2)
    assert (history - expected).abs().max() < 1e-4


def _mean_of(kind):
    """In place of `ImageLatent.of`: the middle of the posterior, without a draw."""

    def of(posterior, device, seed, seed_mask, strength=1.0):
        mean = posterior.parameters.chunk(2, dim=1)[0] * posterior.scaling_factor
        return kind(strength * mean, posterior, device, seed_mask, strength)

    return of


class TestJobs:
    def test_forward_the_source_comes_first(self, run, encoded):
        clip = scene(60, 96, 100)
        frames, reply = run(encoded(clip), model="f1")
        resized = np.stack([resize_and_center_crop(frame, HEIGHT, WIDTH) for frame in as_frames(clip)])
        blended = reply["source"]["blended_frames"]
        assert blended == 9  # W = 3 latent frames
        assert len(frames) == reply["frames"] == 60 + NEW["f1"]
        assert psnr(frames[: 60 - blended], resized[: 60 - blended]) > 33
        assert psnr(frames[60 - blended], resized[60 - blended]) > 33  # where the blending begins
        source = {"width": 100, "height": 96, "frames": 60, "duration_s": 2.0, "seen_frames": 57}
        assert reply["source"] == source | {"blended_frames": 9}
        assert reply["parameters"]["include_source"] and "input_video" not in reply["parameters"]
        assert reply["warnings"] == []

        alone, reply = run(encoded(clip), model="f1", include_source=False)
        assert (alone == frames[60:]).all() and len(alone) == NEW["f1"]
        other, _ = run(encoded(scene(60, 96, 100, seed=3)), model="f1", include_source=False)
        assert (other != alone).mean() > 0.2

    def test_backward_the_source_comes_last(self, run, encoded):
        clip = scene()
        frames, reply = run(encoded(clip), model="i2v")
        new, blended = NEW["i2v"], reply["source"]["blended_frames"]
        assert blended == 13  # and the first frame
        assert len(frames) == 60 + new
        assert psnr(frames[new + blended :], as_frames(clip)[blended:]) > 33
        assert psnr(frames[:60], as_frames(clip)) < 30

        alone, _ = run(encoded(clip), model="i2v", include_source=False)
        assert (alone == frames[:new]).all() and len(alone) == new
        other, _ = run(encoded(scene(seed=3)), model="i2v", include_source=False)
        assert (other != alone).mean() > 0.2

    @pytest.mark.parametrize("model", ["f1", "i2v"])
    def test_an_exact_length_stays_at_the_join(self, run, encoded, model):
        """0.1 seconds more than the sections have: one more is made, and its far end cut off."""
        data = encoded(scene(33))
        whole, _ = run(data, model=model, total_second_length=1.2)
        exact, reply = run(data, model=model, total_second_length=1.2, exact_length=True)
        assert len(exact) == reply["frames"] == 33 + 36
        if model == "f1":
            assert (exact == whole[: 33 + 36]).all()
        else:
            assert psnr(exact[36 + 13 :], as_frames(scene(33))[13:]) > 33

    @pytest.mark.parametrize("model", ["f1", "i2v"])
    def test_when_the_time_is_up_the_nearest_section_is_there(self, run, encoded, model, monkeypatch):
        """The rest of the given video is decoded after that."""
        data, decoded = encoded(scene()), []
        whole, _ = run(data, model=model)
        add = core.pipeline.VideoDecoder.add
        monkeypatch.setattr(core.pipeline.VideoDecoder, "add", lambda *args: decoded.append(add(*args)))
        monkeypatch.setattr("core.job.Deadline.left", property(lambda self: 0.0 if decoded else 9.0))
        frames, reply = run(data, model=model, partial=True, timeout_s=9)
        assert (reply["sections"], reply["partial"], len(frames)) == (
            1,
            True,
            60 + (12 if model == "f1" else 8),
        )
        assert any("they are the new part's" in warning for warning in reply["warnings"])
        near = slice(0, 60) if model == "f1" else slice(-47, None)
        assert (frames[near] == whole[near]).all()

    def test_outputs_latents_and_times(self, run, encoded, tiny_models):
        """Two seeds differ; what a job's latents begin is gone on with; times are those of the new part."""
        data = encoded(scene())
        fields = {"model": "f1", "return_latents": True, "poster": True, "preview": True}
        fields["prompt"] = "x [0s-0.4s: y] [3s: z]"
        first, reply = run(data, **fields)
        assert [warning.split(" had")[0] for warning in reply["warnings"]] == ["`prompt` (3 s on)"]
        again, resumed = run(data, resume_latents=reply["latents_base64"], **fields)
        assert resumed["resumed_sections"] == 2
        assert (again == first).all()
        with pytest.raises(RequestError, match="with `input_video`"):
            run(encoded(scene(seed=1)), resume_latents=reply["latents_base64"], **fields)

        _, both = run(data, model="f1", num_outputs=2)
        assert both["outputs"][0]["frames"] == 84
        assert run(data, model="f1", seed=8)[0].tobytes() != first.tobytes()

    @pytest.mark.parametrize("model", ["f1", "i2v"])
    def test_latents_of_every_length_are_taken_back(self, run, encoded, model, monkeypatch):
        """I2V needs one section more than F1 for the same frames, and its latents are as much larger."""
        monkeypatch.setattr("core.latents.MAX_HEADER_BYTES", 6_000)  # little more than such a header has
        fields = {"model": model, "total_second_length": 1.2, "exact_length": True}
        data = encoded(scene(33))
        first, reply = run(data, return_latents=True, **fields)
        again, resumed = run(data, resume_latents=reply["latents_base64"], **fields)
        assert resumed["resumed_sections"] == reply["sections"] == (3 if model == "f1" else 4)
        assert (again == first).all()

    def test_loras_act_and_leave_no_trace(self, run, encoded, tmp_path):
        models, settings = Models(load_profile(TINY), torch.device("cpu")), Settings(volume_dir=tmp_path)
        (tmp_path / "loras").mkdir()
        save_file(kohya(originals(models.transformer, 1)), tmp_path / "loras" / "a.safetensors")
        data, fields = encoded(scene()), {"model": "f1", "include_source": False}
        plain, _ = run(data, models, settings, **fields)
        changed, reply = run(data, models, settings, loras=[{"name": "a.safetensors"}], **fields)
        assert reply["loras"][0]["matched"] and (changed != plain).mean() > 0.2
        assert (run(data, models, settings, **fields)[0] == plain).all()

    def test_a_step_cache_skips_steps(self, run, encoded):
        fields = {"model": "f1", "steps": 12, "include_source": False}
        whole, _ = run(encoded(scene()), cache="none", **fields)
        frames, reply = run(encoded(scene()), cache="teacache", cache_threshold=1.0, **fields)
        assert all(section["steps_computed"] < 12 for section in reply["timings"]["sections"])
        assert frames.shape == whole.shape and (frames != whole).any()

    def test_out_of_memory_is_tried_again_in_tiles(self, run, encoded, tiny_models, monkeypatch):
        attempts, tiled = [], []

        def generate(*args, **options):
            attempts.append(options["frugal"])
            if len(attempts) == 1:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
            return generate_video_sync(*args, **options)

        monkeypatch.setattr(core.job, "generate_video_sync", generate)
        encode = tiny_models.vae.encode
        monkeypatch.setattr(
            tiny_models.vae,
            "encode",
            lambda pixels: tiled.append((pixels.shape[2], tiny_models.vae.use_tiling)) or encode(pixels),
        )
        frames, reply = run(encoded(scene(seed=5)), model="f1")  # a video that no cache knows
        assert attempts == [False, True] and len(frames) == 84
        assert (57, True) in tiled and not tiny_models.vae.use_tiling
        assert "run again" in reply["warnings"][0]

    def test_a_video_holds_its_request(self, tiny_models, quick_decode, encoded, tmp_path):
        data = encoded(scene(20))
        asked = QUICK | {"format": "gif", "model": "f1", "input_video": to_base64(data)}
        reply = run_job(asked, tiny_models)
        path, source = tmp_path / "made.gif", tmp_path / "source.mp4"
        path.write_bytes(base64.b64decode(reply["video_base64"]))
        again = run_job(request_of(path, [source])["input"], tiny_models)
        assert again["video_base64"] == reply["video_base64"]
        assert again["frames"] == 20 + NEW["f1"]


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"input_image": "y"}, "`input_image` must not be given with `input_video`"),
        ({"start": "black"}, "`start` must not be given with `input_video`"),
        ({"end_image": "y"}, "`end_image` must not be given with `input_video`: what follows is the video."),
        ({"one_frame": {}}, "`one_frame` must not be given with `input_video`"),
        ({"input_video": ["y"]}, "`input_video` must be a string (got a list)."),
    ],
    ids=str,
)
def test_fields_that_contradict_it(fields, sentence):
    with pytest.raises(RequestError) as caught:
        parse_request({"prompt": "x", "input_video": "x"} | fields)
    assert str(caught.value).startswith(sentence)


def test_a_field_without_a_video_is_told_of(make_video, tiny_models):
    request = parse_request({"prompt": "x", "start": "black", "include_source": False})
    assert core.job.inert_extension_fields(request) == [
        "`include_source` had no effect: there is no `input_video`."
    ]


class TestHostile:
    """One sentence and a code each, before anything is computed, and no file left behind."""

    @pytest.fixture
    def refused(self, tiny_models, tmp_path, monkeypatch):
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
        monkeypatch.setattr("core.pipeline.models.Models.use_direction", None)  # not reached

        def refused(data, **fields):
            before = sorted(tmp_path.iterdir())
            text = data if isinstance(data, str) else to_base64(data)
            with pytest.raises(VideoError) as caught:
                run_job(QUICK | {"input_video": text, "model": "f1"} | fields, tiny_models)
            assert sorted(tmp_path.iterdir()) == before
            sentence = str(caught.value)
            assert sentence.startswith("The input video") and sentence.endswith(".") and "\n" not in sentence
            return f"{caught.value.code}: {sentence}"

        return refused

    def test_what_is_no_video(self, refused, tmp_path, encoded):
        assert refused("not base64!").startswith("invalid_video")
        kinds = "invalid_video: The input video is not an MP4, MOV, WebM, MKV or GIF."
        assert refused(b"Once upon a time") == refused(b"#EXTM3U\nfile:///etc/passwd\n") == kinds
        assert refused(b"ffconcat version 1.0\nfile /etc/passwd\n") == kinds
        assert refused(b"\0\0\0\x18ftypmp42" + bytes(500)).endswith("damaged or cut short.")
        sound = ffmpeg(tmp_path / "sound.mp4", "-f", "lavfi", "-i", "sine=d=1")
        assert refused(sound).endswith("has no pictures in it.")
        assert refused(b"\x1aE\xdf\xa3").endswith("damaged or cut short.")
        cut = encoded(scene())
        assert refused(cut[: len(cut) * 2 // 3]).endswith("damaged or cut short.")

    def test_what_is_too_much(self, refused, tmp_path, encoded, monkeypatch):
        pictures = ("-f", "lavfi", "-i")
        wide = ffmpeg(tmp_path / "wide.mp4", *pictures, "color=s=4112x2320:r=2:d=1", "-preset", "ultrafast")
        assert refused(wide) == "video_too_large: The input video's frames have over 9.4 megapixels."
        long = ffmpeg(tmp_path / "long.mp4", *pictures, "color=s=64x64:r=2:d=61")
        assert refused(long) == "video_too_large: The input video is longer than 60 seconds."
        assert refused("A" * (MAX_BYTES // 3 * 4 + 8)) == "video_too_large: The input video has over 100 MB."
        strip = ffmpeg(tmp_path / "strip.gif", *pictures, "color=s=220x20:r=10:d=1")
        assert refused(strip).startswith("invalid_video: The input video is too elongated (220×20)")
        foreign = ffmpeg(tmp_path / "foreign.mov", *pictures, "color=s=64x64:r=10:d=1", "-c:v", "mjpeg")
        assert refused(foreign).endswith("codec is not H.264, H.265, VP8, VP9, AV1 or GIF.")
        monkeypatch.setattr("core.input_video.DECODE_S", 0)
        assert refused(encoded(scene())).startswith("video_too_large: The input video takes over 0 s")

    def test_a_gap_in_time_takes_no_memory(self, refused, tmp_path):
        """600,000 frames between two: one after the other, or ffmpeg would come to its limit."""
        gap = ("-vf", "setpts='PTS+gt(N,2)*20000/TB'", "-fps_mode", "vfr")
        data = ffmpeg(tmp_path / "gap.mkv", "-f", "lavfi", "-i", "testsrc=s=96x64:r=30:d=0.2", *gap)
        assert refused(data) == "video_too_large: The input video is longer than 60 seconds."

    def test_the_decoders_memory_is_bounded(self, refused, tmp_path, monkeypatch):
        data = ffmpeg(tmp_path / "a.mp4", "-f", "lavfi", "-i", "testsrc=s=1920x1080:r=30:d=0.5")
        InputVideo(data)
        monkeypatch.setattr("core.ffmpeg_reader.MAX_MEMORY", 50_000_000)
        assert refused(data).startswith("invalid_video: The input video")

    def test_the_frames_seen_must_fit_in_memory(self, tiny_models, monkeypatch):
        """77 of them, as bytes and in float32 for the encoder; without them 4.3 GB are needed."""
        monkeypatch.setattr("core.pipeline.capacity.available_memory", lambda: 4.6e9)
        plan = plan_sections(1, 1, "f1", extends=True)
        check_capacity(tiny_models, plan, 1024, 1024)
        with pytest.raises(RequestError, match="can be had"):
            check_capacity(tiny_models, plan, 1024, 1024, Join.most_seen(1))

    def test_a_failed_encoding_leaves_no_decoder(self, tiny_models, quick_decode, encoded, monkeypatch):
        def fail(clips, path, file):
            frames = iter(clips)  # held by the error's traceback
            next(frames)
            assert children() > before
            raise VideoEncodingError("The video could not be encoded: the disk is full.")

        def children() -> int:
            return sum(len(each.read_text().split()) for each in Path("/proc/self/task").glob("*/children"))

        monkeypatch.setattr(core.pipeline, "save_video", fail)
        data = QUICK | {"model": "f1", "input_video": to_base64(encoded(scene()))}
        before, open_files = children(), len([*Path("/proc/self/fd").iterdir()])
        reply = Worker(lambda: tiny_models).submit("a", data).result()
        assert reply["code"] == "video_encoding_failed"
        assert children() == before and len([*Path("/proc/self/fd").iterdir()]) <= open_files

    def test_what_is_too_little(self, refused, encoded, tmp_path):
        assert refused(encoded(scene(4))) == (
            "invalid_video: The input video is too short: 4 frames at 30 per second; it must have 5."
        )
        none = ffmpeg(tmp_path / "none.mp4", "-f", "lavfi", "-i", "color=s=64x64", "-frames:v", "0")
        assert refused(none).startswith("invalid_video")

    def test_urls_are_guarded(self, tiny_models):
        with pytest.raises(UrlRefusedError, match=r"The host 127\.0\.0\.1"):
            run_job(QUICK | {"input_video": "https://127.0.0.1/a.mp4"}, tiny_models)

    def test_a_cancel_ends_the_decoder(self, encoded):
        def cancelled():
            raise CancelledError("The job was cancelled.")

        video = InputVideo(encoded(scene()))
        with pytest.raises(CancelledError):
            fit_video(video, HEIGHT, WIDTH, 3, forward=True, check=cancelled)


@pytest.mark.parametrize(
    ("suffix", "codec"),
    [("webm", "libvpx-vp9"), ("gif", "gif"), ("mkv", "libx265"), ("mp4", "libsvtav1"), ("mkv", "libvpx")],
)
def test_other_kinds_at_other_paces(suffix, codec, tmp_path):
    """2 seconds of 20 frames each become 60 frames, whatever the container."""
    data = ffmpeg(tmp_path / f"a.{suffix}", *("-f", "lavfi", "-i", "testsrc=s=90x64:r=20:d=2", "-c:v", codec))
    frames = [*InputVideo(data).frames(64, 64)]
    assert abs(len(frames) - 60) <= 1
    assert frames[0].shape == (64, 64, 3)


class TestTimes:
    @pytest.fixture
    def frames(self, tmp_path):
        def frames(suffix: str, *arguments: str) -> list[np.ndarray]:
            data = ffmpeg(tmp_path / f"made{suffix}", *arguments)
            return [*InputVideo(data).frames(64, 64)]

        return frames

    def test_a_late_start_is_not_filled(self, frames):
        """As where the sound begins first."""
        picture = ("-itsoffset", "5", "-f", "lavfi", "-i", "testsrc=s=96x64:r=30:d=1")
        assert len(frames(".mkv", *picture, "-f", "lavfi", "-i", "sine=d=8")) == 30

    def test_frames_last_as_long_as_they_are_shown(self, frames):
        """30 at once, then one that stands for a second, then 15."""
        wait = ("-vf", "setpts='PTS+gte(N,31)*1/TB'", "-fps_mode", "vfr", "-crf", "1")
        shown = frames(".mp4", "-f", "lavfi", "-i", "testsrc=s=64x64:r=30:d=1.5", *wait)
        changes = [bool((a != b).any()) for a, b in pairwise(shown)]
        assert len(shown) == 75
        assert not any(changes[30:59]) and changes[29] and changes[60]

    def test_a_turned_video_is_upright(self, tmp_path):
        lying = tmp_path / "lying.mp4"
        ffmpeg(lying, "-f", "lavfi", "-i", "testsrc=s=96x64:r=30:d=0.2", "-crf", "1")
        turned = ffmpeg(tmp_path / "turned.mp4", "-display_rotation", "90", "-i", str(lying), "-c", "copy")
        upright = np.rot90(InputVideo(lying.read_bytes()).first_frame)
        video = InputVideo(turned)
        assert np.array_equal(video.first_frame, upright)
        assert np.array_equal(next(video.frames(96, 64)), upright)
