"""Several videos of one job, and videos cut to their exact length."""

import asyncio
import base64
import json

import pytest
import torch

import core.pipeline.encoding
import handler
import runpod_posts
from core import outputs
from core.delivery import Delivery
from core.errors import CancelledError, RequestError, TimeLimitError, UploadError
from core.job import run_job
from core.pipeline import generate_video_sync
from core.pipeline.sections import plan_sections
from core.request import parse_request
from core.settings import Settings
from core.worker import Worker
from diffusers_helper.blending import frames_between
from tests.test_endurance import quick_input

MAX_SEED = 2**32 - 1


@pytest.mark.usefixtures("quick_decode")
class TestSeveral:
    def test_each_is_what_a_job_of_its_own_would_be(self, tiny_models, monkeypatch):
        """To the byte, with each of the encoders run once; after the largest seed comes 0."""
        encoded = []

        def counted(name, function):
            return lambda *args, **kw: encoded.append(name) or function(*args, **kw)

        data = quick_input(seed=MAX_SEED, num_outputs=2, mp4_crf=16)
        with monkeypatch.context() as patch:
            for module, name in (("vae", "encode_image"), ("clip_vision", "encode_image")):
                target = getattr(core.pipeline.encoding, module)
                patch.setattr(target, name, counted(module, getattr(target, name)))
            text = core.pipeline.encoding.encode_prompt
            patch.setattr(core.pipeline.encoding, "encode_prompt", counted("text", text))
            reply = run_job(data, tiny_models)
        assert sorted(encoded) == ["clip_vision", "text", "vae"]
        assert [output["seed"] for output in reply["outputs"]] == [MAX_SEED, 0]
        for output in reply["outputs"]:
            alone = run_job(data | {"seed": output["seed"], "num_outputs": 1}, tiny_models)
            assert output["video_base64"] == alone["video_base64"]
            assert output.keys() | {"content_type"} <= alone.keys()
        assert reply["outputs"][0]["video_base64"] != reply["outputs"][1]["video_base64"]

        assert reply["seed"] == MAX_SEED and reply["parameters"]["num_outputs"] == 2
        assert reply["timings"].keys() == {"input", "model_load", "loras", "total"}
        first, second = (output["timings"] for output in reply["outputs"])
        assert first["text_encode"] > 0 == second["text_encode"] == second["image_encode"]["vae"]
        assert all(t["total"] > t["mp4_encode"] > 0 and len(t["sections"]) == 1 for t in (first, second))
        assert "video_base64" not in reply and reply["warnings"] == []
        assert json.loads(json.dumps(reply, allow_nan=False)) == reply

    def test_progress_is_of_all(self, tiny_models):
        told = []
        run_job(quick_input(num_outputs=3, steps=2), tiny_models, report=lambda p: told.append(p.as_dict()))
        percents = [progress["percent"] for progress in told]
        assert percents == sorted(percents) and percents[-1] == 100
        sampled = [
            (p["output"], p["step"], p["percent"]) for p in told if p["stage"] == "sample" and p["step"]
        ]
        assert sampled == [(1, 1, 16), (1, 2, 33), (2, 1, 50), (2, 2, 66), (3, 1, 83), (3, 2, 100)]
        assert all(p["outputs"] == 3 for p in told[1:])
        left = [p["seconds_left"] for p in told if p["stage"] == "sample" and p["step"]]
        assert all(seconds >= 0 for seconds in left) and left[-1] == 0

    def test_one_alone_says_nothing_of_outputs(self, tiny_models):
        told = []
        run_job(quick_input(), tiny_models, report=lambda p: told.append(p.as_dict()))
        assert not any("output" in progress for progress in told)

    def test_each_is_encoded_and_delivered_before_the_next_is_sampled(self, tiny_models):
        events = []

        def deliver(path, job_id, request, check_cancelled, taken):
            assert path.stat().st_size > 0
            events.append(job_id)
            return {"video_url": f"https://storage.example/{job_id}.mp4"}

        def report(progress):
            if progress.stage == "sample" and progress.step:
                events.append(progress.output)

        run_job(quick_input(num_outputs=2), tiny_models, job_id="job", report=report, deliver=deliver)
        assert events == [1, "job-1", 2, "job-2"]

    def test_the_inline_limit_is_for_all_of_them(self, tiny_models, tmp_path):
        data = quick_input(num_outputs=2)
        made = run_job(data, tiny_models)["outputs"]
        sizes = [len(base64.b64decode(output["video_base64"])) for output in made]
        fitting = Delivery(Settings(inline_limit_mb=sum(sizes) / 1e6, volume_dir=tmp_path))
        assert len(run_job(data, tiny_models, deliver=fitting)["outputs"]) == 2
        short = Delivery(Settings(inline_limit_mb=(sum(sizes) - 1) / 1e6, volume_dir=tmp_path))
        reply = run_job(data, tiny_models, deliver=short)
        assert len(reply["outputs"]) == 1
        (warning,) = reply["warnings"]
        assert warning.startswith("Output 2 of 2 (seed 31338) failed and ended the job: The video has")
        (kept,) = (tmp_path / "framepack-results").iterdir()
        assert str(kept) in warning

    @pytest.mark.parametrize(
        ("error", "told", "refresh"),
        [
            (UploadError("The storage is gone."), "The storage is gone.", False),
            (TimeLimitError("The time is up."), "The time is up.", False),
            (ZeroDivisionError("a secret"), "The worker failed on it.", False),
            (torch.AcceleratorError("CUDA error: gone"), "The worker failed on it.", True),
        ],
        ids=lambda value: type(value).__name__,
    )
    def test_a_later_failure_leaves_what_is_finished(self, tiny_models, monkeypatch, error, told, refresh):
        self.failing(monkeypatch, error, on=2)
        reply = Worker(lambda: tiny_models).submit("job", quick_input(num_outputs=3)).result()
        assert [output["seed"] for output in reply["outputs"]] == [31337]
        assert reply["warnings"] == [f"Output 2 of 3 (seed 31338) failed and ended the job: {told}"]
        assert reply.get("refresh_worker", False) is refresh

    def failing(self, monkeypatch, error, on):
        calls = []

        def generate(*args, **options):
            calls.append(1)
            if len(calls) == on:
                raise error
            return generate_video_sync(*args, **options)

        monkeypatch.setattr("core.job.generate_video_sync", generate)

    def test_a_failure_of_the_first_is_the_jobs(self, tiny_models, monkeypatch):
        self.failing(monkeypatch, UploadError("The storage is gone."), on=1)
        with pytest.raises(UploadError):
            run_job(quick_input(num_outputs=2), tiny_models)

    def test_a_cancel_leaves_nothing(self, tiny_models, monkeypatch):
        self.failing(monkeypatch, CancelledError("The job was cancelled."), on=2)
        with pytest.raises(CancelledError):
            run_job(quick_input(num_outputs=2), tiny_models)

    def test_a_local_run_leaves_a_file_of_each(self, tiny_models, monkeypatch, tmp_path, capsys):
        monkeypatch.setenv("OUTPUT_DIR", str(tmp_path))
        monkeypatch.setattr(handler, "worker", Worker(lambda: tiny_models))
        job = {"id": "job", "input": quick_input(num_outputs=2, format="gif")}
        reply = asyncio.run(handler.local_handler(job))
        paths = [tmp_path / "job-1.gif", tmp_path / "job-2.gif"]
        assert [output["video_path"] for output in reply["outputs"]] == [*map(str, paths)]
        assert sorted(tmp_path.iterdir()) == paths
        assert all(path.read_bytes().startswith(b"GIF8") for path in paths)
        assert "video_base64" not in str(reply)


def test_a_refused_result_has_all_its_videos_kept(monkeypatch):
    """What RunPod does not take is stored, each under its own name, with the others."""
    stored = {}

    def uploaded(self, path, job_id, bucket, check_cancelled):
        stored[f"{job_id}{path.suffix}"] = path.read_bytes()
        return {"video_url": f"https://storage.example/{job_id}"}

    monkeypatch.setattr(Delivery, "_uploaded", uploaded)
    monkeypatch.setenv("BUCKET_NAME", "videos")
    entries = [{"video_base64": base64.b64encode(data).decode(), "seed": 7} for data in (b"one", b"two")]
    output = {"outputs": [*entries, {"video_url": "https://x"}], "content_type": "image/gif"}
    posted = runpod_posts._without_video({"output": output}, "job", "HTTP 413")
    assert posted["output"]["outputs"] == [
        {"seed": 7, "video_url": "https://storage.example/job-1"},
        {"seed": 7, "video_url": "https://storage.example/job-2"},
        {"video_url": "https://x"},
    ]
    assert stored == {"job-1.gif": b"one", "job-2.gif": b"two"}


def test_warnings_say_which_output_they_are_of():
    def made(*warnings):
        return outputs.Made(None, {}, 0, list(warnings), False, None)

    assert outputs.all_warnings([made("A.", "B.")]) == ["A.", "B."]
    assert outputs.all_warnings([made("A.", "B."), made("A."), made("B.", "A.")]) == [
        "A.",
        "Output 1: B.",
        "Output 3: B.",
    ]


@pytest.mark.parametrize("num_outputs", [0, 5, 1.5, "2", True, None])
def test_bad_counts(num_outputs):
    with pytest.raises(RequestError, match="`num_outputs` must be"):
        parse_request(quick_input(num_outputs=num_outputs))


class TestExactLength:
    @pytest.mark.parametrize("direction", ["i2v", "f1"])
    def test_every_length_is_met_with_no_section_too_many(self, direction):
        for window in (1, 2, 6, 9, 33):
            for tenths in range(10, 300, 7):
                seconds = tenths / 10
                rounded = plan_sections(seconds, window, direction)
                exact = plan_sections(seconds, window, direction, exact=True)
                assert exact.frames == round(30 * seconds)
                made = 4 * len(exact.sections) * window + 1
                assert made >= exact.frames
                extra = len(exact.sections) - len(rounded.sections)
                assert extra == (rounded.frames < exact.frames)

    def test_clips_are_cut_where_the_count_is_reached(self):
        clips = [torch.full((1, 3, length, 2, 2), float(k)) for k, length in enumerate((4, 1, 5))]
        for count in range(1, 12):
            cut = torch.cat([*frames_between(clips, 0, count)], dim=2)
            assert torch.equal(cut, torch.cat(clips, dim=2)[:, :, :count])

    @pytest.mark.usefixtures("quick_decode")
    @pytest.mark.parametrize("model", ["i2v", "f1"])
    def test_the_end_goes_and_the_start_stays(self, tiny_models, monkeypatch, model):
        """1.3 s are 39 frames: a second section of 6 latent frames is planned, and 49 frames are cut."""
        kept = []
        monkeypatch.setattr(
            "core.pipeline.save_video",
            lambda clips, path, file: (
                kept.append(torch.cat([*clips], 2)) or path.touch() or kept[-1].shape[2]
            ),
        )
        data = quick_input(total_second_length=1.3, model=model)
        exact = run_job(data | {"exact_length": True}, tiny_models)
        longer = run_job(data | {"total_second_length": 1.6}, tiny_models)
        rounded = run_job(data, tiny_models)
        assert (rounded["frames"], longer["frames"], exact["frames"]) == (49, 49, 39)
        assert (exact["duration_s"], exact["requested_s"], exact["sections"]) == (1.3, 1.3, 2)
        assert rounded["requested_s"] == 1.3
        assert torch.equal(kept[0], kept[1][:, :, :39])

    @pytest.mark.usefixtures("quick_decode")
    def test_a_section_more_where_rounding_makes_it_too_short(self, tiny_models):
        data = quick_input(total_second_length=1.1)
        rounded, exact = run_job(data, tiny_models), run_job(data | {"exact_length": True}, tiny_models)
        assert (rounded["frames"], rounded["sections"]) == (25, 1)
        assert (exact["frames"], exact["sections"], exact["duration_s"]) == (33, 2, 1.1)

    @pytest.mark.usefixtures("quick_decode")
    def test_a_partial_video_is_not_cut(self, tiny_models):
        done = []

        def check():
            if done and done[-1].section == 2:
                raise TimeLimitError("The job took longer than its limit of 1 seconds.")

        data = quick_input(total_second_length=1.1, exact_length=True, partial=True, timeout_s=1000)
        reply = run_job(data, tiny_models, report=done.append, check_cancelled=check)
        assert reply["partial"] and reply["frames"] == 21
        assert any(warning.startswith("`exact_length` had no effect") for warning in reply["warnings"])
