"""The fault matrix: RunPod's own loop in a process, with one thing gone wrong at a time.

Every row ends with the same worker serving a good job, or asking to be replaced. docs/operations.md has the
matrix in words.
"""

import base64
import os
import time
from pathlib import Path

import imageio_ffmpeg
import pytest

from tests.fake_runpod import FakeRunPod, decode, is_mp4, running_handler
from tests.fake_storage import fake_storage
from tests.test_endurance import quick_input

NUMBERS = iter(range(1000))


@pytest.fixture(scope="module")
def storage():
    with fake_storage() as storage:
        yield storage


@pytest.fixture(scope="module")
def runpod():
    with FakeRunPod() as runpod:
        yield runpod


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("faults")
    for name in ("temporary", "volume"):
        (root / name).mkdir()
    return root


@pytest.fixture(scope="module")
def worker(runpod, storage, folders):
    variables = (
        runpod.variables
        | storage.variables
        | {
            "TMPDIR": str(folders / "temporary"),
            "VOLUME_DIR": str(folders / "volume"),
            "REAL_FFMPEG": imageio_ffmpeg.get_ffmpeg_exe(),
            "UPLOAD_TIMEOUT_S": "2",
        }
    )
    program = ("-m", "tests.faulty_worker")
    with running_handler(folders / "log", program=program, **variables) as worker:
        yield worker


@pytest.fixture
def run(runpod, worker):
    """Queue a job with these faults and wait for what RunPod hears of it at the end."""

    def run(name: str = "job", faults: str = "", **fields) -> dict:
        job_id = submit(runpod, name, faults, **fields)
        return worker.wait_until(lambda: runpod.final(job_id)).body

    return run


def submit(runpod: FakeRunPod, name: str, faults: str = "", **fields) -> str:
    job_id = f"{name}-{next(NUMBERS)}"
    runpod.queue(job_id, quick_input(**{"prompt": faults or "A cat turns its head.", "steps": 2} | fields))
    return job_id


def video_of(body: dict) -> bytes:
    assert body.keys() == {"output"}, body
    video = decode(body["output"]["video_base64"])
    assert is_mp4(video)
    return video


@pytest.fixture
def then_the_next_job(run):
    """Is served, after a row whose own job ended without a video (the others show it by being served)."""
    yield
    video_of(run("next"))


@pytest.fixture(autouse=True)
def and_nothing_is_left(folders, worker):
    yield
    assert list((folders / "temporary").glob("framepack-*")) == []
    assert list((folders / "volume").glob("framepack-*/video.mp4")) == []
    assert worker.alive


class TestTheResult:
    @pytest.mark.parametrize("faults", [[500, 500], [502], [429], ["drop"], ["drop", "drop", 503]], ids=str)
    def test_is_posted_again_until_it_is_taken(self, runpod, run, worker, faults):
        job_id = submit(runpod, "again")
        runpod.result_faults[job_id].extend(faults)
        video_of(worker.wait_until(lambda: runpod.final(job_id)).body)
        assert len(runpod.finals(job_id)) == 1
        assert not runpod.result_faults[job_id]

    def test_whose_acknowledgement_is_lost_arrives_twice_and_is_the_same(self, runpod, worker):
        job_id = submit(runpod, "acknowledged")
        runpod.result_faults[job_id].append("lose")
        worker.wait_until(lambda: len(runpod.finals(job_id)) == 2)
        first, second = runpod.finals(job_id)
        assert first == second

    @pytest.mark.parametrize("faults", [[400], [413], ["drop"] * 4], ids=str)
    def test_that_is_refused_is_uploaded_and_its_url_posted(self, runpod, worker, storage, faults):
        job_id = submit(runpod, "refused-by-runpod".replace("refuse", "reject"))
        runpod.result_faults[job_id].extend(faults)
        output = worker.wait_until(lambda: runpod.final(job_id)).body["output"]
        assert "video_base64" not in output and output["frames"] == 25
        assert f"/videos/{job_id}.mp4?" in output["video_url"]
        assert is_mp4(storage.kept[f"{job_id}.mp4"])

    def test_that_is_refused_with_no_storage_is_kept_on_the_volume(self, runpod, worker, folders):
        job_id = submit(runpod, "refuse-everywhere")  # the storage refuses this name
        runpod.result_faults[job_id].append(400)
        body = worker.wait_until(lambda: runpod.final(job_id)).body
        assert body["output"]["code"] == "upload_failed" or body["error"]
        kept = Path(body["output"]["video_path"])
        assert kept == folders / "volume" / "framepack-results" / f"{job_id}.mp4"
        assert is_mp4(kept.read_bytes())
        assert str(kept) in worker.log or kept.exists()

    def test_delivered_twice_is_made_once(self, runpod, worker):
        """RunPod hands the same job out again: the same video, without another second of GPU."""
        job_id = submit(runpod, "twice", seed=-1)
        first = video_of(worker.wait_until(lambda: runpod.final(job_id)).body)
        runpod.queue(job_id, quick_input(prompt="A cat turns its head.", steps=2, seed=-1))
        worker.wait_until(lambda: len(runpod.finals(job_id)) == 2)
        second = runpod.finals(job_id)[1]
        assert video_of(second) == first
        assert "more than once" in second["output"]["warnings"][-1]


class TestRunPod:
    def test_takes_its_time_to_hand_out_a_job(self, runpod, run):
        runpod.take_delay = 3.0
        try:
            video_of(run("slow-take"))
        finally:
            runpod.take_delay = 0.0

    @pytest.mark.parametrize("fault", [500, 400, "drop"], ids=str)
    def test_takes_no_progress(self, runpod, run, fault):
        runpod.progress_fault = fault
        try:
            video_of(run("no-progress"))
        finally:
            runpod.progress_fault = None

    def test_progress_never_follows_the_result(self, runpod, run, worker):
        job_id = submit(runpod, "ordered", preview=True, steps=50, use_teacache=False)
        worker.wait_until(lambda: runpod.final(job_id))
        time.sleep(1)
        *updates, last = runpod.posts_of(job_id)
        assert last.is_final and updates and not any(post.is_final for post in updates)
        previews = [base64.b64decode(p["preview"]) for p in runpod.progress(job_id) if "preview" in p]
        assert previews and all(p.startswith(b"\xff\xd8") and len(p) < 100_000 for p in previews)


@pytest.mark.usefixtures("then_the_next_job")
class TestCancel:
    def stop(self, runpod, worker, job_id):
        runpod.stop(job_id)
        worker.wait_until(lambda: f"{job_id} | Job stopped." in worker.log)
        assert f"| {job_id} | cancelled: " in worker.log
        assert runpod.finals(job_id) == []

    def test_mid_step(self, runpod, worker):
        job_id = submit(runpod, "mid-step", total_second_length=120, latent_window_size=33)
        worker.wait_until(lambda: runpod.progress(job_id))
        self.stop(runpod, worker, job_id)
        assert runpod.progress(job_id)[-1]["section"] <= 1

    def test_mid_decode(self, runpod, worker):
        """One section of 33 latent frames is some ten calls of the decoder, half a second each."""
        job_id = submit(runpod, "mid-decode", "slow-decode", latent_window_size=33, total_second_length=4)
        worker.wait_until(lambda: any(p["stage"] == "decode" for p in runpod.progress(job_id)))
        self.stop(runpod, worker, job_id)
        assert runpod.progress(job_id)[-1]["stage"] == "decode"
        assert f"{job_id} | mp4_encode" not in worker.log

    def test_mid_upload(self, runpod, worker, storage):
        job_id = submit(runpod, "stall-upload", output="url")
        worker.wait_until(lambda: f"{job_id}.mp4" in storage.attempts)
        self.stop(runpod, worker, job_id)
        assert f"{job_id}.mp4" not in storage.kept


class TestStorage:
    def test_that_refuses_falls_back_to_inline(self, run):
        body = run("refuse", output="url")
        video_of(body)
        assert "AccessDenied" in body["output"]["warnings"][0] or "403" in body["output"]["warnings"][0]

    def test_that_stalls_is_given_up_in_time(self, run):
        body = run("stall", output="url")
        video_of(body)
        assert "longer than 2 seconds" in body["output"]["warnings"][0]

    def test_that_drops_a_part_is_tried_again(self, run, storage):
        output = run("drop", output="url")["output"]
        name = output["video_url"].split("?")[0].rsplit("/", 1)[1]
        assert storage.attempts.count(name) == 2
        assert is_mp4(storage.kept[name])


class TestTheMp4:
    def test_whose_disk_is_full_is_written_on_the_volume(self, run):
        video_of(run("disk", "disk-full"))

    @pytest.mark.usefixtures("then_the_next_job")
    @pytest.mark.parametrize("fault", ["disk-and-volume-full", "no-ffmpeg", "ffmpeg-killed"])
    def test_that_cannot_be_written_is_a_clear_error(self, run, fault):
        body = run("unwritten", fault)
        assert body["output"] == {"code": "video_encoding_failed"}
        assert body["error"].startswith("The video could not be encoded: ")
        assert "/" not in body["error"]

    def test_whose_ffmpeg_is_killed_is_encoded_again(self, run, folders):
        body = run("killed", "ffmpeg-killed-once")
        assert (folders / "temporary.killed").exists()
        assert video_of(body) == video_of(run("whole", "ffmpeg-killed-once"))


@pytest.mark.usefixtures("then_the_next_job")
class TestTheGpu:
    def test_out_of_memory_once_is_made_up_for(self, run):
        body = run("oom", "oom-once")
        video_of(body)
        assert "run again" in body["output"]["warnings"][0]

    @pytest.mark.parametrize(("fault", "code"), [("oom-always", "out_of_memory"), ("gpu-lost", "gpu_failed")])
    def test_beyond_help_asks_for_another_worker(self, run, fault, code):
        body = run("beyond-help", fault)
        assert body["output"] == {"code": code}
        assert body["stopPod"] is True

    def test_an_unknown_error_names_the_job(self, runpod, worker):
        job_id = submit(runpod, "unknown", "bug")
        body = worker.wait_until(lambda: runpod.final(job_id)).body
        assert job_id in body["error"] and body["output"] == {"code": "internal_error"}
        assert "ZeroDivisionError" not in body["error"] and "ZeroDivisionError" in worker.log


class TestTime:
    def test_runs_out_and_the_finished_sections_come_back(self, run):
        body = run(
            "partial", "slow-decode", total_second_length=3, latent_window_size=6, timeout_s=2, partial=True
        )
        output = body["output"]
        video_of(body)
        assert output["partial"] is True and 0 < output["sections"] < 4
        assert output["frames"] == 4 * (6 * output["sections"] - 1) + 1
        assert any("time was up" in warning for warning in output["warnings"])

    def test_runs_out_and_the_error_says_how_far_it_got(self, run):
        body = run("late", "slow-decode", total_second_length=3, latent_window_size=6, timeout_s=2)
        assert body["output"] == {"code": "timed_out"}
        assert "of 4 sections finished" in body["error"]


def test_no_secret_no_prompt_and_no_video_is_logged(run, worker):
    secret = {"accessId": "hidden-id", "accessSecret": "hidden-secret", "bucketName": "b-b"}
    run("secret", "a hidden prompt", s3Config=secret | {"endpointUrl": "https://127.0.0.1"}, output="url")
    log = worker.log
    assert "hidden" not in log and "a-secret" not in log
    assert max(map(len, log.splitlines())) < 2000
    assert os.environ.get("RUNPOD_ENDPOINT_ID") is None
