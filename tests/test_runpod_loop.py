"""RunPod's own loop, in a process as on RunPod, against a control plane in this one.

One worker serves the jobs of all tests here, as a worker does; the last test ends it.
"""

import json
import shutil
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.fake_runpod import (
    BASE64,
    FakeRunPod,
    decode,
    is_mp4,
    job_input,
    run_handler,
    run_warm_handler,
    running_handler,
)
from tests.tiny import TINY_MODELS

IN_FLIGHT_S = 1.5  # for an update to arrive; below the 2 s between two updates


@pytest.fixture(scope="module")
def runpod():
    with FakeRunPod() as runpod:
        yield runpod


@pytest.fixture(scope="module")
def worker(runpod, tmp_path_factory):
    log = tmp_path_factory.mktemp("worker") / "log"
    with running_handler(log, **runpod.variables) as worker:
        yield worker


def test_a_job_posts_its_progress_and_then_its_video(runpod, worker):
    """Nothing may arrive after the result: RunPod would show the job as in progress for ever."""
    runpod.queue("good", job_input(steps=100, use_teacache=False))
    reply = worker.wait_until(lambda: runpod.final("good")).body
    assert reply.keys() == {"output"}
    assert is_mp4(decode(reply["output"]["video_base64"]))

    time.sleep(IN_FLIGHT_S)
    *updates, last = runpod.posts_of("good")
    assert updates
    assert [post.is_final for post in updates] == [False] * len(updates)
    assert last.is_final
    for update in runpod.progress("good"):
        assert update.keys() == {"stage", "section", "sections", "step", "steps", "percent", "seconds_left"}
        assert update["stage"] in ("input", "encode", "sample", "decode", "mp4_encode", "deliver")
        if update["stage"] not in ("input", "encode"):
            assert (update["sections"], update["steps"]) == (1, 100)
            assert update["percent"] == update["step"]
    assert not BASE64.search(worker.log)


@pytest.mark.parametrize(
    ("job_id", "data", "told"),
    [
        ("bad-steps", job_input(steps=0), "`steps`"),
        ("bad-list", ["a prompt"], "a list"),
        ("bad-null", None, "null"),
    ],
    ids=["steps", "list", "null"],
)
def test_a_bad_job_posts_its_error_and_the_worker_lives_on(runpod, worker, job_id, data, told):
    runpod.queue(job_id, data)
    reply = worker.wait_until(lambda: runpod.final(job_id)).body
    assert reply.keys() == {"error", "output"}
    assert reply["output"] == {"code": "invalid_request"}
    assert told in reply["error"]
    assert "Traceback" not in json.dumps(reply)
    runpod.queue(f"after-{job_id}", job_input(steps=0))
    worker.wait_until(lambda: runpod.final(f"after-{job_id}"))
    assert worker.alive


def test_a_cancelled_job_makes_room_for_the_next(runpod, worker):
    """Hundreds of steps are left when the stop comes; nothing is heard of the job after it."""
    # so large a section that stopping only at its end would show: many updates would follow the stop
    long = job_input(total_second_length=120, latent_window_size=33, steps=100, use_teacache=False)
    runpod.queue("cancelled", long)
    worker.wait_until(lambda: any(update["step"] for update in runpod.progress("cancelled")))
    runpod.stop("cancelled")
    runpod.queue("next", job_input())
    worker.wait_until(lambda: "cancelled | Stopping job." in worker.log)
    noticed = time.monotonic()
    reply = worker.wait_until(lambda: runpod.final("next")).body

    assert is_mp4(decode(reply["output"]["video_base64"]))
    assert runpod.taken[-2:] == ["cancelled", "next"]
    assert runpod.final("cancelled") is None
    assert not [post for post in runpod.posts_of("cancelled") if post.time > noticed + IN_FLIGHT_S]
    last = runpod.progress("cancelled")[-1]
    assert (last["stage"], last["section"]) == ("sample", 1)
    assert last["step"] < last["steps"]
    # the GPU was free before RunPod's loop went on, and only then did the next job start
    ended, stopped, started = (
        worker.log.index(line)
        for line in ("cancelled | cancelled: ", "cancelled | Job stopped.", "next | Started.")
    )
    assert ended < stopped < started


def test_sigterm_lets_the_running_job_finish(runpod, worker):
    runpod.queue("last", job_input(steps=50, use_teacache=False))
    runpod.queue("never", job_input())
    worker.wait_until(lambda: runpod.progress("last"))
    assert runpod.final("last") is None
    worker.terminate()
    assert worker.wait() == 0
    reply = runpod.final("last").body
    assert reply.keys() == {"output"}
    assert is_mp4(decode(reply["output"]["video_base64"]))
    assert runpod.taken[-1] == "last"
    assert "Traceback" not in worker.log


def broken_models(folder: Path, fault: str) -> Path:
    """The tiny HunyuanVideo models with something wrong with the VAE's weights; returns the file."""
    if fault != "missing":
        shutil.copytree(TINY_MODELS / "hunyuan", folder)
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    if fault == "truncated":
        weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    if fault == "wrong-shape":
        state = load_file(weights)
        save_file(state | {"decoder.conv_out.conv.bias": torch.zeros(5)}, weights)
    return folder if fault == "missing" else weights


@pytest.mark.parametrize("fault", ["missing", "truncated", "wrong-shape"])
def test_a_worker_without_its_models_takes_no_job(tmp_path, fault):
    """RunPod is told the reason as well, in the ping that the SDK sends for an unhealthy worker."""
    named = broken_models(tmp_path / "hunyuan", fault)
    with FakeRunPod() as runpod:
        runpod.queue("waiting", job_input())
        done = run_warm_handler(tmp_path, HUNYUAN_MODEL=tmp_path / "hunyuan", **runpod.variables)
        assert not runpod.asked_for_jobs
        assert any("status=unhealthy" in ping and "ModelError" in ping for ping in runpod.pings)
    assert done.returncode == 1
    (line,) = [line for line in done.stdout.splitlines() if "Fitness check failed" in line]
    assert "load_models | ModelError: " in line
    assert str(named if fault != "wrong-shape" else named.parent) in line
    assert fault != "wrong-shape" or "decoder.conv_out.conv.bias: (5,) instead of (3,)" in line
    assert "Traceback" not in done.stdout + done.stderr


def test_a_worker_without_ffmpeg_takes_no_job():
    with FakeRunPod() as runpod:
        runpod.queue("waiting", job_input())
        done = run_handler(IMAGEIO_FFMPEG_EXE="/nowhere/ffmpeg", **runpod.variables)
        assert not runpod.asked_for_jobs
    assert done.returncode == 1
    assert "check_machine | FitnessError: ffmpeg does not run" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
