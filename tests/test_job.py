"""A job from JSON to JSON on the tiny models: the reply, memory retry, cancelling, tidiness."""

import base64
import io
import json
import tempfile
import threading

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from PIL import Image

import core.job
from core.errors import CancelledError, ModelError, OutOfMemoryError, VideoEncodingError
from core.job import run_job
from core.pipeline import generate_video_sync
from core.video import save_bcthw_as_mp4
from core.worker import Worker


@pytest.fixture
def data(picture):
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return {
        "input_image": base64.b64encode(buffer.getvalue()).decode(),
        "prompt": "The circle moves.",
        "total_second_length": 1,
        "latent_window_size": 2,
        "steps": 2,
    }


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch):
    """Every test's own temporary folder, empty again at its end."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    assert list(folder.iterdir()) == []


def frames_of(video_base64, tmp_path):
    path = tmp_path / "reply.mp4"
    path.write_bytes(base64.b64decode(video_base64))
    reader = imageio_ffmpeg.read_frames(str(path))
    meta = next(reader)
    return meta, sum(1 for _ in reader)


def test_the_reply(data, tiny_models, tmp_path):
    reply = run_job(data | {"latent_window_size": 4}, tiny_models)
    meta, frames = frames_of(reply["video_base64"], tmp_path)
    assert (meta["codec"], meta["fps"]) == ("h264", 30)
    assert meta["pix_fmt"].startswith("yuv420p")
    assert meta["size"] == (reply["width"], reply["height"]) == (160, 224)
    assert frames == reply["frames"] == 33
    assert reply["duration_s"] == 1.1 and reply["sections"] == 2 and reply["fps"] == 30
    assert reply["content_type"] == "video/mp4" and reply["seed"] == 31337 and reply["warnings"] == []
    assert reply["parameters"]["model"] == "i2v" and reply["parameters"]["resolution"] == 192
    assert "input_image" not in reply["parameters"]
    assert json.loads(json.dumps(reply, allow_nan=False)) == reply

    timings = reply["timings"]
    stages = [timings["text_encode"], *timings["image_encode"].values(), timings["mp4_encode"]]
    stages += [section[key] for section in timings["sections"] for key in ("sample", "decode")]
    assert len(timings["sections"]) == 2 and all(seconds > 0 for seconds in stages)
    assert sum(stages) <= timings["total"]
    assert all(s["steps"] == s["steps_computed"] == 2 for s in timings["sections"])
    assert timings["step"]["median"] <= timings["step"]["p95"]
    assert reply["worker"]["device"] == "cpu" and reply["worker"]["precision"] == "float32"
    assert reply["worker"]["libraries"]["torch"] == torch.__version__


@pytest.mark.usefixtures("quick_decode")
def test_same_seed_same_video_other_seed_other_video(data, tiny_models):
    first, again = run_job(data, tiny_models), run_job(data, tiny_models)
    other = run_job(data | {"seed": 1}, tiny_models)
    assert first["video_base64"] == again["video_base64"] != other["video_base64"]


@pytest.mark.usefixtures("quick_decode")
@pytest.mark.parametrize("seed", [None, -1])
def test_a_drawn_seed_is_echoed_and_repeats_the_video(data, tiny_models, seed):
    drawn = run_job(data | {"seed": seed}, tiny_models)
    assert 0 <= drawn["seed"] == drawn["parameters"]["seed"] < 2**32
    assert run_job(data | {"seed": drawn["seed"]}, tiny_models)["video_base64"] == drawn["video_base64"]


@pytest.mark.usefixtures("quick_decode")
def test_f1_and_guidance(data, tiny_models):
    f1 = run_job(data | {"model": "f1"}, tiny_models)
    assert f1["parameters"]["model"] == "f1" and f1["frames"] == 33
    plain = run_job(data, tiny_models)
    guided = run_job(data | {"cfg": 3, "rs": 0.7, "n_prompt": "blurry"}, tiny_models)
    assert plain["parameters"]["model"] == "i2v"
    assert len({f1["video_base64"], plain["video_base64"], guided["video_base64"]}) == 3


@pytest.mark.usefixtures("quick_decode")
def test_what_had_no_effect_is_said(data, tiny_models):
    reply = run_job(data | {"n_prompt": "x", "rs": 0.5, "gpu_memory_preservation": 3}, tiny_models)
    assert [w.split(" ")[0] for w in reply["warnings"]] == ["`n_prompt`", "`rs`", "`gpu_memory_preservation`"]
    long = run_job(data | {"prompt": "word " * 100}, tiny_models)
    assert long["warnings"] == [
        "`prompt` is longer than the 256 tokens the model reads; the rest was ignored."
    ]


@pytest.mark.usefixtures("quick_decode")
def test_teacache_says_what_it_computed(data, tiny_models):
    skipping = run_job(data | {"steps": 12, "total_second_length": 1}, tiny_models)
    section = skipping["timings"]["sections"][0]
    assert section["steps"] == 12 and 2 <= section["steps_computed"] < 12


@pytest.mark.usefixtures("quick_decode")
class TestOutOfMemory:
    def failing(self, monkeypatch, times):
        """The generation fails so many times for lack of memory, then works."""
        calls = []

        def generate(*args, **options):
            calls.append(options["frugal"])
            if len(calls) <= times:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
            return generate_video_sync(*args, **options)

        monkeypatch.setattr(core.job, "generate_video_sync", generate)
        return calls

    def test_one_retry_with_less(self, data, tiny_models, monkeypatch):
        calls = self.failing(monkeypatch, times=1)
        reply = run_job(data, tiny_models)
        assert calls == [False, True]
        assert "run again" in reply["warnings"][0] and reply["worker"]["memory_mode"] == "swap"

    def test_then_a_clear_error_that_asks_for_a_fresh_worker(self, data, tiny_models, monkeypatch):
        self.failing(monkeypatch, times=2)
        with pytest.raises(OutOfMemoryError, match="too little memory"):
            run_job(data, tiny_models)
        worker = Worker(lambda: tiny_models)
        self.failing(monkeypatch, times=2)
        reply = worker.submit("a", data).result()
        assert reply["code"] == "out_of_memory" and reply["refresh_worker"] is True
        assert "video_base64" in worker.submit("b", data).result()

    def test_a_lost_gpu_asks_for_a_fresh_worker(self, data, tiny_models, monkeypatch):
        """Even where tidying up after it fails as well, as it does on a context that is gone."""

        def lost(*_, **__):
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

        monkeypatch.setattr(core.job, "generate_video_sync", lost)
        monkeypatch.setattr(core.job.memory, "release_unused_memory", lost)
        reply = Worker(lambda: tiny_models).submit("a", data).result()
        assert reply["code"] == "gpu_failed" and reply["refresh_worker"] is True

    def test_other_errors_are_not_retried(self, data, tiny_models, monkeypatch):
        def generate(*args, **options):
            raise ZeroDivisionError

        monkeypatch.setattr(core.job, "generate_video_sync", generate)
        with pytest.raises(ZeroDivisionError):
            run_job(data, tiny_models)


@pytest.mark.usefixtures("quick_decode")
class TestCancel:
    @pytest.mark.parametrize("after", [0, 1, 3, 6])
    def test_stops_at_the_next_check(self, data, tiny_models, after):
        reports = []

        def check():
            if len(reports) > after:
                raise CancelledError("The job was cancelled.")

        with pytest.raises(CancelledError):
            run_job(data, tiny_models, report=reports.append, check_cancelled=check)
        assert len(reports) == after + 1  # not one stage or step more
        assert "video_base64" in run_job(data, tiny_models)

    def test_every_step_is_checked(self, data, tiny_models):
        reports = []
        run_job(data, tiny_models, report=reports.append)
        sampled = [(p.section, p.step) for p in reports if p.stage == "sample" and p.step]
        assert sampled == [(section, step) for section in (1, 2, 3, 4) for step in (1, 2)]
        assert [p.percent for p in reports] == sorted(p.percent for p in reports)

    def test_a_job_cancelled_while_it_waits_never_starts(self, data, tiny_models):
        worker, cancelled = Worker(lambda: tiny_models), threading.Event()
        cancelled.set()
        assert worker.submit("a", data, cancelled=cancelled).result()["code"] == "cancelled"


@pytest.mark.usefixtures("quick_decode")
class TestWorker:
    def test_models_load_once_and_only_when_needed(self, data, tiny_models):
        loads = []
        worker = Worker(lambda: loads.append(1) or tiny_models)
        assert loads == []
        worker.start()
        first, second = worker.submit("a", data).result(), worker.submit("b", data).result()
        assert loads == [1]
        assert first["timings"]["model_load"] > 0 == second["timings"]["model_load"]

    def test_models_that_cannot_load_are_an_error_reply(self, data):
        def load():
            raise ModelError("The model folder nowhere does not exist.")

        reply = Worker(load).submit("a", data).result()
        assert reply == {"error": "The model folder nowhere does not exist.", "code": "model_unavailable"}


@pytest.mark.usefixtures("quick_decode")
class TestDelivery:
    def test_too_large_a_video_is_an_error_and_the_next_job_runs(
        self, data, tiny_models, monkeypatch, tmp_path
    ):
        worker = Worker(lambda: tiny_models)
        monkeypatch.setenv("VOLUME_DIR", str(tmp_path))
        monkeypatch.setenv("INLINE_LIMIT_MB", "0.001")
        reply = worker.submit("job-9", data).result()
        assert reply["code"] == "result_too_large"
        assert reply["video_path"] == str(tmp_path / "framepack-results" / "job-9.mp4")
        monkeypatch.delenv("INLINE_LIMIT_MB")
        assert "video_base64" in worker.submit("job-10", data).result()

    def test_a_url_reply_has_no_base64(self, data, tiny_models):
        def deliver(path, job_id, request, check_cancelled, taken):
            assert path.read_bytes()[4:8] == b"ftyp" and (job_id, request.output) == ("job-9", "url")
            return {"video_url": "https://storage.example/job-9.mp4", "delivery_warning": "Slow today."}

        worker = Worker(lambda: tiny_models, deliver)
        reply = worker.submit("job-9", data | {"output": "url"}).result()
        assert reply["video_url"].endswith("job-9.mp4") and reply["content_type"] == "video/mp4"
        assert "video_base64" not in reply and "delivery_warning" not in reply
        assert reply["warnings"] == ["Slow today."] and reply["timings"]["deliver"] >= 0

    def test_a_reply_that_is_not_json_is_an_error(self, data, tiny_models):
        worker = Worker(lambda: tiny_models, lambda *_: {"video_base64": b"bytes"})
        assert worker.submit("job-9", data).result()["code"] == "internal_error"


class TestVideo:
    def test_nothing_is_left_of_a_video_that_could_not_be_written(self, tmp_path):
        with pytest.raises(VideoEncodingError):
            save_bcthw_as_mp4([], tmp_path / "empty.mp4")
        clip = torch.zeros(1, 3, 4, 32, 32, dtype=torch.uint8)
        with pytest.raises(VideoEncodingError):
            save_bcthw_as_mp4([clip], tmp_path / "no" / "such" / "folder.mp4")
        assert list(tmp_path.glob("**/*.mp4")) == []

    def test_lossless_frames_come_back_in_order(self, tmp_path):
        """Grey levels survive yuv420p to within rounding, so each frame can be told by its own."""
        levels = torch.arange(0, 250, 10, dtype=torch.uint8)
        clip = levels.view(1, 1, -1, 1, 1).expand(1, 3, -1, 64, 96)
        path = tmp_path / "grey.mp4"
        assert save_bcthw_as_mp4([clip[:, :, :10], clip[:, :, 10:]], path, crf=0) == 25
        reader = imageio_ffmpeg.read_frames(str(path))
        assert next(reader)["size"] == (96, 64)
        means = [np.frombuffer(frame, np.uint8).mean() for frame in reader]
        assert np.abs(np.array(means) - levels.numpy()).max() < 2
        assert path.read_bytes().find(b"moov") < path.read_bytes().find(b"mdat")
