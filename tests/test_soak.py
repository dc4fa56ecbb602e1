"""Many jobs with random faults through RunPod's own loop: each has one outcome, and nothing piles up.

    SOAK_JOBS=500 python -m pytest tests/test_soak.py -n 0

The suite runs a short one. What goes wrong is drawn from a fixed seed.
"""

import json
import os
import random
import sys
import time
from pathlib import Path

import imageio_ffmpeg
import pytest

from tests.fake_runpod import BASE64, FakeRunPod, decode, is_mp4, running_handler
from tests.fake_storage import fake_storage
from tests.test_endurance import SMALL, STEADY, quick_input

JOBS = int(os.environ.get("SOAK_JOBS", "20"))
EVERY = max(5, JOBS // 10)  # jobs between two looks at what the process holds
MOST_GROWTH = 4_000_000  # from the second look to the last; a kept frame or latent a job would be far more

# what to ask for, and the codes that may come back ("" is a video)
WORKER_FAULTS = {
    "": {""},
    "oom-once": {""},
    "oom-always": {"out_of_memory"},
    "bug": {"internal_error"},
    "no-ffmpeg": {"video_encoding_failed"},
    "ffmpeg-killed": {"video_encoding_failed"},
    "disk-full": {""},
}
RESULT_FAULTS = [[], [], [500], [500, 500], [429], ["drop"], [400], ["lose"]]
BAD_FIELDS = [{"steps": 0}, {"input_image": "aGVsbG8="}, {"input_image": "https://127.0.0.1/x.png"}, {"x": 1}]
OUTPUTS = ["auto", "auto", "url"]


@pytest.mark.skipif(os.name != "posix", reason="reads /proc")
def test_every_job_has_one_outcome_and_nothing_piles_up(tmp_path):
    draw = random.Random(2718)
    temporary, volume, report = tmp_path / "temporary", tmp_path / "volume", tmp_path / "report"
    temporary.mkdir()
    volume.mkdir()
    with FakeRunPod() as runpod, fake_storage() as storage:
        variables = (
            runpod.variables
            | storage.variables
            | STEADY
            | {
                "TMPDIR": str(temporary),
                "VOLUME_DIR": str(volume),
                "REAL_FFMPEG": imageio_ffmpeg.get_ffmpeg_exe(),
                "UPLOAD_TIMEOUT_S": "2",
                "REPORT": str(report),
                "RUNPOD_ENDPOINT_ID": "endpoint",  # logs are JSON then
            }
        )
        program = ("-m", "tests.faulty_worker")
        with running_handler(tmp_path / "log", program=program, **variables) as worker:
            outcomes: dict[str, str] = {}
            for number in range(JOBS):
                job_id, expected = queue_one(runpod, draw, number)
                if expected is None:
                    worker.wait_until(lambda job_id=job_id: logged(worker, job_id, "Started."))
                    runpod.stop(job_id)
                    worker.wait_until(lambda job_id=job_id: ended(runpod, worker, job_id))
                    outcomes[job_id] = "video or cancelled"
                else:
                    body = worker.wait_until(lambda job_id=job_id: runpod.final(job_id)).body
                    outcomes[job_id] = outcome_of(body, storage)
                    assert outcomes[job_id] in expected, (job_id, body)
            worker.wait_until(lambda: len(runpod.taken) == JOBS)
            time.sleep(1)
            children = children_of(worker.pid)
            worker.terminate()
            assert worker.wait() == 0

        assert len(outcomes) == JOBS
        for job_id in outcomes:
            finals = runpod.finals(job_id)
            assert len(finals) <= (2 if "lose" in job_id else 1)
            assert all(final == finals[0] for final in finals)
            *updates, last = runpod.posts_of(job_id) or [None]
            assert last is None or last.is_final == bool(finals)  # no progress after the result
            assert not any(post.is_final for post in updates if post is not last) or "lose" in job_id

    lines = [json.loads(line) for line in worker.log.splitlines() if line.startswith("{")]
    assert all(line.keys() == {"requestId", "message", "level"} for line in lines)
    assert {line["requestId"] for line in lines} >= outcomes.keys()
    assert not BASE64.search(worker.log) and "a-secret" not in worker.log

    looks = [json.loads(line) for line in report.read_text(encoding="utf-8").splitlines()]
    _, settled, *_, last = looks
    growth = last["memory"] - settled["memory"]
    sys.stdout.write(f"{JOBS} jobs: {settled['memory'] / 1e6:.1f} MB → {last['memory'] / 1e6:.1f} MB\n")
    assert growth < MOST_GROWTH
    assert last["descriptors"] <= settled["descriptors"] + 2  # a connection to RunPod may be open or not
    assert [name for name in last["threads"] if name not in settled["threads"]] == []
    assert list(temporary.glob("framepack-*")) == []
    assert [path.name for path in volume.iterdir()] in ([], ["framepack-results"])
    assert children <= 1  # the SDK's heartbeat


def queue_one(runpod: FakeRunPod, draw: random.Random, number: int) -> tuple[str, set[str] | None]:
    """Queue a job; returns its id and the outcomes it may have, None for one to be cancelled."""
    words, fields = draw.choice([*WORKER_FAULTS]), {"output": draw.choice(OUTPUTS), "seed": number}
    faults = draw.choice(RESULT_FAULTS)
    expected = WORKER_FAULTS[words]
    kind = draw.random()
    cancelled = kind < 0.1
    if 0.1 <= kind < 0.25:
        fields |= draw.choice(BAD_FIELDS)
        expected = {"invalid_request", "invalid_image", "url_refused"}
    name = "-".join(["job", str(number), *map(str, faults)])
    if draw.random() < 0.1:
        name += "-refuse"  # the storage does
    if 400 in faults:  # the result is refused: it comes back smaller, or as an error that says where it is
        expected = (
            {"", "internal_error", "upload_failed"} if "" in expected else expected | {"internal_error"}
        )
    if number % EVERY == EVERY - 1:
        words += " report"
    runpod.result_faults[name].extend(faults)
    runpod.queue(name, quick_input(**{"prompt": f"{words} job"} | SMALL | fields))
    return name, None if cancelled else expected


def outcome_of(body: dict, storage) -> str:
    """The error's code; "" for a video that is really there."""
    output = body["output"]
    if "error" in body:
        return output["code"]
    if "video_url" in output:
        name = output["video_url"].split("?")[0].rsplit("/", 1)[1]
        assert is_mp4(storage.kept[name])
    else:
        assert is_mp4(decode(output["video_base64"]))
    return ""


def ended(runpod: FakeRunPod, worker, job_id: str) -> bool:
    """Cancelled, or done before the cancel was heard."""
    return logged(worker, job_id, "Job stopped.") or runpod.final(job_id) is not None


def logged(worker, job_id: str, message: str) -> bool:
    return f'"requestId": "{job_id}", "message": "{message}"' in worker.log


def children_of(pid: int) -> int:
    return len(Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
