"""`python -m client` as a process: with RunPod's API by script, with a real worker behind it, and locally."""

import base64
import json
import os
import pty
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from client.__main__ import main
from client.errors import ClientError
from client.options import FIELDS, parse_options
from core.request import VideoRequest
from tests.fake_endpoint import ENDPOINT_ID, JOB_ID, KEY, FakeEndpoint, WorkingEndpoint, mp4, state
from tests.fake_runpod import (
    ROOT,
    TIMEOUT_S,
    FakeRunPod,
    environment,
    is_mp4,
    job_input,
    running_warm_handler,
)

PNG = base64.b64decode(job_input()["input_image"])
VIDEO = mp4()
LATENTS = save({"history": torch.zeros(1, 16, 1, 8, 8)}, {"seed": "7"})
ESCAPES = re.compile(r"\x1b\[")

PROGRESS = {
    "stage": "sample",
    "section": 1,
    "sections": 2,
    "step": 5,
    "steps": 25,
    "percent": 10,
    "seconds_left": 80.4,
}
OUTPUT = {
    "video_base64": base64.b64encode(VIDEO).decode(),
    "content_type": "video/mp4",
    "seed": 7,
    "width": 608,
    "height": 640,
    "frames": 73,
    "duration_s": 2.433,
    "warnings": ["`rs` had no effect: it acts only where `cfg` is above 1."],
    "timings": {
        "text_encode": 0.05,
        "image_encode": {"vae": 0.04, "clip_vision": 0.02},
        "sections": [
            {"sample": 17.04, "steps": 25, "steps_computed": 15, "decode": 1.72},
            {"sample": 15.95, "steps": 25, "steps_computed": 14, "decode": 3.99},
        ],
        "total": 39.95,
    },
}
DONE = state("COMPLETED", OUTPUT, delayTime=2500, executionTime=41000)


def with_video(**output) -> dict:
    return state("COMPLETED", {"seed": 7} | output)


def inlined(data: bytes) -> str:
    return base64.b64encode(data).decode()


@pytest.fixture
def folder(tmp_path):
    """A current folder with a picture in it."""
    (tmp_path / "dancer.png").write_bytes(PNG)
    return tmp_path


def start(
    folder: Path,
    *arguments: str,
    endpoint: FakeEndpoint | None = None,
    program: tuple[str, ...] = ("-m", "client"),
    stderr: int = subprocess.PIPE,
    **variables: str,
) -> subprocess.Popen[str]:
    server = {"RUNPOD_API_URL": endpoint.url} if endpoint else {}
    named = {"PYTHONPATH": str(ROOT), "RUNPOD_ENDPOINT_ID": ENDPOINT_ID, "RUNPOD_API_KEY": KEY}
    return subprocess.Popen(
        [sys.executable, *program, "--poll-interval", "0.02", *arguments],
        cwd=folder,
        env=environment(**(named | server | variables)),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        encoding="utf-8",
    )


def run(folder: Path, *arguments: str, **options) -> subprocess.CompletedProcess[str]:
    """The client run to its end. Wherever it comes from, no key, traceback or unfinished file is left."""
    with start(folder, *arguments, **options) as process:
        try:
            out, err = process.communicate(timeout=TIMEOUT_S)
        finally:
            process.kill()
    assert KEY not in out + err
    assert "Traceback" not in err
    assert not [*folder.glob(".*")]
    return subprocess.CompletedProcess(arguments, process.returncode, out, err)


def make(folder: Path, *states, arguments=(), **options) -> subprocess.CompletedProcess[str]:
    """A job of the picture, at an endpoint of these states."""
    with FakeEndpoint(*states) as endpoint:
        return run(folder, "dancer.png", "She spins.", *arguments, endpoint=endpoint, **options)


def wait_until(condition) -> None:
    give_up = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.01)


# The way of a job


def test_progress_is_told_and_the_video_saved(folder):
    states = [state("IN_QUEUE"), state("IN_PROGRESS"), state("IN_PROGRESS", PROGRESS), DONE]
    with FakeEndpoint(*states) as endpoint:
        done = run(folder, "dancer.png", "She spins.", "-o", "out.mp4", endpoint=endpoint)
    assert done.returncode == 0
    assert done.stdout == ""
    assert (folder / "out.mp4").read_bytes() == VIDEO
    *lines, _ = done.stderr.partition("stage")[0].splitlines()
    assert lines[:-1] == [
        "Job job-1",
        "waiting for a worker",
        "running",
        "sampling, section 1 of 2, step 5 of 25: 10 %, about 1:20 left",
        "done: 100 %",
        "Saved out.mp4: 0.01 MB, 608×640, 73 frames, 2.433 s, seed 7.",
        "Warning: `rs` had no effect: it acts only where `cfg` is above 1.",
    ]
    for name, seconds in [("in RunPod's queue", "2.50"), ("image encode: vae", "0.04"), ("total", "39.95")]:
        assert re.search(rf"{name} +{seconds}", done.stderr)
    assert re.search(r"section 2: sample +15\.95 +14 of 25", done.stderr)
    assert not ESCAPES.search(done.stderr)

    (submitted,) = endpoint.asked("run")
    assert submitted.path == f"/{ENDPOINT_ID}/run"
    assert submitted.json == {
        "input": {"input_image": base64.b64encode(PNG).decode(), "prompt": "She spins."}
    }
    assert not endpoint.asked("cancel")


def test_a_terminal_gets_a_bar(folder):
    states = [state("IN_QUEUE"), *[state("IN_PROGRESS", PROGRESS | {"step": k}) for k in range(5)], DONE]
    terminal, stderr = pty.openpty()
    with FakeEndpoint(*states) as endpoint:
        arguments = ["dancer.png", "She spins.", "--poll-interval", "0.2"]
        with start(
            folder, *arguments, endpoint=endpoint, stderr=stderr, TERM="xterm", COLUMNS="120"
        ) as process:
            os.close(stderr)
            shown = read_terminal(terminal)
    assert process.returncode == 0
    assert ESCAPES.search(shown)
    assert re.search(r"sampling, section 1 of 2, step \d of 25 .*━.* 10 %, about 1:20 left", shown)
    assert "Saved dancer.mp4" in shown


def read_terminal(terminal: int) -> str:
    shown = b""
    while True:
        try:
            shown += os.read(terminal, 1 << 16)
        except OSError:  # Linux's way to say that nobody writes any more
            os.close(terminal)
            return shown.decode()


def test_every_field_can_be_set(folder):
    (folder / "job.json").write_text(
        json.dumps({"input": {"rs": 0.5, "steps": 3, "prompt": "No."}, "webhook": "x"})
    )
    flags = {
        "--seconds": "2.4", "--seed": "-1", "--steps": "12", "--model": "f1", "--cfg": "3", "--gs": "8",
        "--resolution": "512", "--negative-prompt": "blur", "--crf": "20", "--input-json": "job.json",
        "--set": "use_teacache=false", "--execution-timeout": "1800", "--preview": "now.jpg",
        "--timeout": "90", "--width": "640", "--height": "480", "--aspect-ratio": "4:3", "--window": "7",
        "--sampler": "euler", "--shift": "3", "--cache": "magcache", "--cache-threshold": "0.05",
        "--end-image": "end.png", "--end-strength": "0.7", "--lora": "slow motion.safetensors=0.8",
        "--rescale": "0.7", "--cache-order": "1", "--blend": "2", "--end-mode": "embedding",
    }  # fmt: skip
    (folder / "end.png").write_bytes(PNG + b"end")
    lora_url = "https://example.com/a.safetensors?token=b"
    with FakeEndpoint(DONE) as endpoint:
        arguments = [text for flag in flags.items() for text in flag]
        arguments += ["--partial", "--exact-length", "--poster"]
        arguments += ["--set", 'output="url"', "--lora", f"{lora_url}=-1"]
        done = run(folder, "dancer.png", "Yes.", *arguments, endpoint=endpoint)
    assert done.returncode == 0
    body = endpoint.asked("run")[0].json
    fields = body.pop("input")
    assert body == {"webhook": "x", "policy": {"executionTimeout": 1_800_000}}
    assert fields.pop("input_image") == base64.b64encode(PNG).decode()
    assert fields.pop("end_image") == base64.b64encode(PNG + b"end").decode()
    assert fields.pop("loras") == [
        {"name": "slow motion.safetensors", "weight": 0.8},
        {"url": lora_url, "weight": -1.0},
    ]
    assert fields == {
        "prompt": "Yes.", "rs": 0.7, "total_second_length": 2.4, "seed": -1, "steps": 12, "model": "f1",
        "cfg": 3.0, "gs": 8.0, "resolution": 512, "n_prompt": "blur", "mp4_crf": 20, "use_teacache": False,
        "output": "url", "preview": True, "timeout_s": 90.0, "partial": True, "width": 640, "height": 480,
        "aspect_ratio": "4:3", "latent_window_size": 7, "sampler": "euler", "shift": 3.0,
        "cache": "magcache", "cache_threshold": 0.05, "end_image_strength": 0.7,
        "cache_order": 1, "blend_sections": 2, "end_image_mode": "embedding", "exact_length": True,
        "poster": True,
    }  # fmt: skip


def test_an_input_file_is_enough_and_names_the_video(folder):
    (folder / "spin.json").write_text(json.dumps(job_input()))
    with FakeEndpoint(DONE) as endpoint:
        assert run(folder, "--input-json", "spin.json", endpoint=endpoint).returncode == 0
    assert endpoint.asked("run")[0].json == {"input": job_input()}
    assert (folder / "spin.mp4").read_bytes() == VIDEO


def test_an_image_on_the_web_is_left_to_the_worker(folder):
    with FakeEndpoint(DONE) as endpoint:
        url = "https://example.com/pictures/dancer-2.webp?size=640/x"
        assert run(folder, url, "She spins.", endpoint=endpoint).returncode == 0
    assert endpoint.asked("run")[0].json["input"]["input_image"] == url
    assert (folder / "dancer-2.mp4").read_bytes() == VIDEO


def test_a_video_to_go_on_from_stands_in_place_of_the_image(folder):
    (folder / "clip.mp4").write_bytes(VIDEO)
    with FakeEndpoint(DONE) as endpoint:
        assert run(folder, "She goes on.", "--input-video", "clip.mp4", endpoint=endpoint).returncode == 0
    fields = {"prompt": "She goes on.", "input_video": base64.b64encode(VIDEO).decode()}
    assert endpoint.asked("run")[0].json == {"input": fields}
    assert (folder / "clip-extended.mp4").read_bytes() == VIDEO


def test_a_colour_to_start_with_stands_in_place_of_the_image(folder):
    with FakeEndpoint(DONE) as endpoint:
        assert run(folder, "Snow falls.", "--start", "#102030", endpoint=endpoint).returncode == 0
    assert endpoint.asked("run")[0].json == {"input": {"prompt": "Snow falls.", "start": "#102030"}}
    assert (folder / "video.mp4").read_bytes() == VIDEO


def test_sections_come_from_a_file_with_the_images_beside_it(folder):
    story = folder / "story"
    story.mkdir()
    (story / "end.png").write_bytes(PNG + b"end")
    url = "https://example.com/a.png"
    told = [
        {"start_s": 0, "end_s": 1.2, "prompt": "She waves."},
        {"start_s": 1.2, "image": "end.png"},
        {"start_s": 2.4, "image": url},
    ]
    (story / "times.json").write_text(json.dumps(told))
    with FakeEndpoint(DONE) as endpoint:
        arguments = ["dancer.png", "She spins.", "--sections", "story/times.json"]
        assert run(folder, *arguments, endpoint=endpoint).returncode == 0
    inlined = {"start_s": 1.2, "image": base64.b64encode(PNG + b"end").decode()}
    assert endpoint.asked("run")[0].json["input"]["sections"] == [told[0], inlined, told[2]]


def test_json_is_one_document_without_the_video(folder):
    done = make(folder, DONE, arguments=["--json"])
    assert done.returncode == 0
    output = {name: value for name, value in OUTPUT.items() if name != "video_base64"}
    assert json.loads(done.stdout) == DONE | {"output": output, "saved": "dancer.mp4"}
    assert "Saved dancer.mp4" in done.stderr


def test_a_picture_is_saved_as_what_it_is(folder):
    picture = {"content_type": "image/png", "frames": 1, "duration_s": None}
    whole = with_video(video_base64=base64.b64encode(PNG).decode(), **picture)
    done = make(folder, whole, arguments=["--set", "one_frame={}"])
    assert done.returncode == 0, done.stderr
    assert "Saved dancer-picture.png" in done.stderr and "None" not in done.stderr
    assert (folder / "dancer-picture.png").read_bytes() == PNG
    cut = with_video(video_base64=base64.b64encode(PNG[:-1]).decode(), **picture)
    assert "The picture is cut short." in make(folder, cut, arguments=["-o", "cut.png"]).stderr


def test_latents_are_saved_and_gone_on_from(folder):
    whole = state("COMPLETED", OUTPUT | {"latents_base64": inlined(LATENTS)})
    with FakeEndpoint(whole) as endpoint:
        arguments = ["dancer.png", "She spins.", "--latents", "dancer.safetensors", "--json"]
        done = run(folder, *arguments, endpoint=endpoint)
        arguments = ["She spins.", "--resume-latents", "dancer.safetensors", "-o", "longer.mp4"]
        assert run(folder, *arguments, endpoint=endpoint).returncode == 0
    assert done.returncode == 0, done.stderr
    assert (folder / "dancer.safetensors").read_bytes() == LATENTS
    assert "Saved the latents dancer.safetensors: 0.00 MB." in done.stderr
    document = json.loads(done.stdout)
    assert document["saved_latents"] == "dancer.safetensors" and document["saved"] == "dancer.mp4"
    assert "latents_base64" not in document["output"]
    first, second = (request.json["input"] for request in endpoint.asked("run"))
    assert first["return_latents"] is True
    assert second == {"prompt": "She spins.", "resume_latents": inlined(LATENTS)}


def test_latents_by_url_are_downloaded(folder):
    with FakeEndpoint() as endpoint:
        endpoint.set_state(state("COMPLETED", OUTPUT | {"latents_url": endpoint.file_url("latents")}))
        endpoint.files, endpoint.drops = {"latents": LATENTS}, [1000]
        arguments = ["dancer.png", "She spins.", "--latents", "a.safetensors"]
        done = run(folder, *arguments, endpoint=endpoint)
    assert done.returncode == 0, done.stderr
    assert "downloading the latents" in done.stderr
    assert (folder / "a.safetensors").read_bytes() == LATENTS


def test_latents_of_several_outputs_are_numbered(folder):
    outputs = [{"video_base64": inlined(VIDEO), "latents_base64": inlined(LATENTS)}] * 2
    arguments = ["--outputs", "2", "--latents", "a.safetensors", "--json"]
    done = make(folder, with_video(outputs=outputs), arguments=arguments)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["saved_latents"] == ["a-1.safetensors", "a-2.safetensors"]
    assert (folder / "a-2.safetensors").read_bytes() == LATENTS


@pytest.mark.parametrize(
    ("output", "told"),
    [
        ({"latents_handle": "job-1-0123456789abcdef"}, "--resume-latents job-1-0123456789abcdef"),
        ({}, "The reply holds no latents."),
    ],
    ids=["on the volume", "nowhere"],
)
def test_latents_that_do_not_come_are_told(folder, output, told):
    done = make(folder, state("COMPLETED", OUTPUT | output), arguments=["--latents", "a.safetensors"])
    assert done.returncode == 0
    assert told in done.stderr
    assert {path.name for path in folder.iterdir()} == {"dancer.png", "dancer.mp4"}


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (VIDEO, "not a safetensors file"),
        (b"", "not a safetensors file"),
        (LATENTS[:20], "not a safetensors file"),
        (b"\x02\0\0\0\0\0\0\0{}", "not a safetensors file"),
        (LATENTS[:-1], "cut short"),
    ],
    ids=["a video", "empty", "half a header", "no tensor", "cut"],
)
def test_latents_that_are_not_whole_leave_no_file(folder, data, told):
    whole = state("COMPLETED", OUTPUT | {"latents_base64": inlined(data)})
    done = make(folder, whole, arguments=["--latents", "a.safetensors"])
    assert done.returncode == 6
    assert told in done.stderr
    assert not (folder / "a.safetensors").exists()


def test_latents_of_a_failed_job_are_saved(folder):
    failed = state("FAILED", {"code": "timed_out", "latents_base64": inlined(LATENTS)}, error="Too long.")
    done = make(folder, failed, arguments=["--latents", "a.safetensors", "--json"])
    assert done.returncode == 1
    assert "The job failed (timed_out): Too long." in done.stderr
    assert (folder / "a.safetensors").read_bytes() == LATENTS
    assert "latents_base64" not in done.stdout + done.stderr


@pytest.mark.parametrize("source", ["https://example.com/a.safetensors", "job-1-0123456789abcdef"])
def test_latents_elsewhere_are_left_to_the_worker(folder, source):
    with FakeEndpoint(DONE) as endpoint:
        done = run(folder, "dancer.png", "She spins.", "--resume-latents", source, endpoint=endpoint)
    assert done.returncode == 0, done.stderr
    assert endpoint.asked("run")[0].json["input"]["resume_latents"] == source


def test_quiet_says_nothing(folder):
    done = make(folder, state("IN_PROGRESS", PROGRESS), DONE, arguments=["--quiet"])
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (folder / "dancer.mp4").exists()


def test_the_newest_preview_is_kept(folder):
    previews = [b"\xff\xd8\xff first", b"\xff\xd8\xff second", b"no picture"]
    states = [
        state("IN_PROGRESS", PROGRESS | {"preview": base64.b64encode(jpeg).decode()}) for jpeg in previews
    ]
    done = make(folder, *states, DONE, arguments=["--preview", "now.jpg"])
    assert done.returncode == 0
    assert (folder / "now.jpg").read_bytes() == previews[1]
    assert done.stderr.count("The preview is not a JPEG.") == 1


def test_a_detached_job_is_resumed_by_its_id(folder):
    with FakeEndpoint(state("IN_PROGRESS", PROGRESS), DONE) as endpoint:
        detached = run(folder, "dancer.png", "She spins.", "--detach", endpoint=endpoint)
        assert (detached.returncode, detached.stdout) == (0, f"{JOB_ID}\n")
        assert not endpoint.asked("status")
        resumed = run(folder, "--resume", JOB_ID, "-o", "spin.mp4", endpoint=endpoint)
    assert resumed.returncode == 0
    assert "sampling, section 1 of 2" in resumed.stderr
    assert (folder / "spin.mp4").read_bytes() == VIDEO
    assert len(endpoint.asked("run")) == 1


def test_progress_of_another_shape_does_no_harm(folder):
    shapes = [
        "working",
        [1, 2],
        {"stage": ["sample"], "section": "1", "sections": 2, "percent": "10", "seconds_left": True},
        {"stage": "new", "section": -1, "sections": 0, "percent": 1e300, "seconds_left": -3, "preview": 5},
        {"stage": "last", "percent": 250},
    ]
    states = [state("IN_PROGRESS", shape) for shape in shapes]
    done = make(folder, *states, DONE, arguments=["--preview", "now.jpg"])
    assert done.returncode == 0
    assert done.stderr.splitlines()[1:5] == ["running", "new", "last: 100 %", "done: 100 %"]


@pytest.mark.parametrize(
    "reply",
    [
        {"timings": [1], "warnings": "none", "frames": None},
        {"timings": {"total": "long", "sections": [3, {"sample": None}], "step": 10**400, "x": {"y": True}}},
    ],
    ids=["types", "values"],
)
def test_timings_of_another_shape_do_no_harm(folder, reply):
    done = make(folder, with_video(video_base64=OUTPUT["video_base64"], **reply))
    assert done.returncode == 0
    assert (folder / "dancer.mp4").exists()


def test_many_sections_are_summed_up(folder):
    sections = [{"sample": 1.5, "steps": 25, "steps_computed": 15, "decode": 0.25}] * 40
    done = make(folder, with_video(video_base64=OUTPUT["video_base64"], timings={"sections": sections}))
    assert re.search(r"40 sections: sample +60\.00", done.stderr)
    assert re.search(r"40 sections: decode +10\.00", done.stderr)


# Videos by URL, and broken ones


def test_a_download_goes_on_where_its_connection_dropped(folder):
    with FakeEndpoint() as endpoint:
        endpoint.set_state(with_video(video_url=endpoint.file_url("clip")))
        endpoint.files = {"clip": VIDEO}
        endpoint.drops = [3000, 0, 1000]
        done = run(folder, "dancer.png", "She spins.", endpoint=endpoint)
    assert done.returncode == 0
    assert (folder / "dancer.mp4").read_bytes() == VIDEO
    fetched = endpoint.asked("files")
    assert [request.headers.get("Range") for request in fetched] == [
        None,
        "bytes=3000-",
        "bytes=3000-",
        "bytes=4000-",
    ]
    assert not [request for request in fetched if "Authorization" in request.headers]


@pytest.mark.parametrize("status", [500, 429], ids=str)
def test_a_download_is_tried_again_after_a_refusal_that_may_pass(folder, status):
    with FakeEndpoint() as endpoint:
        endpoint.set_state(with_video(video_url=endpoint.file_url("clip")))
        endpoint.files = {"clip": VIDEO}
        endpoint.refusals = [status, status]
        assert run(folder, "dancer.png", "She spins.", endpoint=endpoint).returncode == 0
    assert (folder / "dancer.mp4").read_bytes() == VIDEO


@pytest.mark.parametrize(
    ("output", "told"),
    [
        ({}, "its reply holds no video"),
        ({"video_base64": "a video"}, "not valid base64"),
        ({"video_base64": base64.b64encode(b"<html>").decode()}, "not an MP4"),
        ({"video_base64": base64.b64encode(VIDEO[:-1]).decode()}, "cut short"),
        ({"video_base64": base64.b64encode(VIDEO[:100]).decode()}, "cut short"),
        ({"video_base64": ""}, "not an MP4"),
        ({"video_url": "http://192.0.2.1/clip.mp4"}, "not https"),
        ({"video_url": "file:///etc/passwd"}, "not https"),
        ({"video_url": "https://[::1/clip.mp4"}, "not valid"),
        ({"video_url": "FILES/expired"}, "HTTP 403"),
        ({"video_url": "FILES/elsewhere"}, "not https"),
        ({"video_url": "FILES/unreliable"}, "failed 6 times"),
        ({"video_url": "FILES/page"}, "not an MP4"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_video_that_cannot_be_had_leaves_no_file_and_a_way_back(folder, output, told):
    with FakeEndpoint() as endpoint:
        endpoint.files = {
            "elsewhere": "http://192.0.2.1/clip.mp4",
            "unreliable": VIDEO,
            "page": b"<html></html>",
        }
        endpoint.drops = [0] * 6 if "unreliable" in str(output) else []
        output = {name: value.replace("FILES/", endpoint.file_url("")) for name, value in output.items()}
        endpoint.set_state(with_video(**output))
        done = run(folder, "dancer.png", "She spins.", endpoint=endpoint)
    assert done.returncode == 6
    assert told in done.stderr
    assert f"python -m client --resume {JOB_ID}" in done.stderr
    assert [path.name for path in folder.iterdir()] == ["dancer.png"]


# Jobs that end badly


def test_a_failed_job_tells_the_workers_sentence_code_and_path(folder):
    output = {"code": "result_too_large", "video_path": "/runpod-volume/videos/job-1.mp4"}
    failed = state("FAILED", output, error="The video has 21.0 MB.")
    done = make(folder, state("IN_PROGRESS", PROGRESS), failed, arguments=["--json"])
    assert done.returncode == 1
    assert "The job failed (result_too_large): The video has 21.0 MB." in done.stderr
    assert "video_path: /runpod-volume/videos/job-1.mp4" in done.stderr
    assert json.loads(done.stdout) == output | {
        "id": JOB_ID,
        "error": "The video has 21.0 MB.",
        "exit_code": 1,
    }
    assert not (folder / "dancer.mp4").exists()


@pytest.mark.parametrize(
    ("last", "code", "told"),
    [
        (state("FAILED"), 1, "The job failed (failed): RunPod shows it as FAILED"),
        (state("FAILED", ["x"], error={"type": "x"}), 1, '{"type": "x"}'),
        (
            state("COMPLETED", {"error": "No.", "code": "invalid_image"}),
            1,
            "The job failed (invalid_image): No.",
        ),
        (state("CANCELLED"), 1, "The job failed (cancelled)"),
        (state("TIMED_OUT"), 5, "--execution-timeout"),
    ],
    ids=["no reason", "objects", "as completed", "cancelled elsewhere", "timed out"],
)
def test_every_other_bad_end_has_its_exit_code(folder, last, code, told):
    done = make(folder, state("IN_PROGRESS"), last)
    assert done.returncode == code
    assert told in done.stderr
    assert "--resume" not in done.stderr


def test_waiting_ends_but_not_the_job(folder):
    with FakeEndpoint(state("IN_PROGRESS", PROGRESS)) as endpoint:
        done = run(folder, "dancer.png", "She spins.", "--wait", "0.3", "--json", endpoint=endpoint)
    assert done.returncode == 5
    assert json.loads(done.stdout)["code"] == "wait_over"
    assert f"python -m client --resume {JOB_ID}" in done.stderr
    assert len(endpoint.asked("status")) > 1
    assert not endpoint.asked("cancel")


def test_what_the_endpoint_writes_cannot_move_the_cursor(folder):
    hostile = "\x1b[2J\x1b]0;title\x07[red]\u202eno\r\n" + "x" * 100_000
    done = make(
        folder,
        state("IN_PROGRESS", PROGRESS | {"stage": hostile}),
        state("FAILED", {"code": hostile, hostile: hostile}, error=hostile),
    )
    assert done.returncode == 1
    assert not re.search(r"[^\n -~…]", done.stderr)
    assert "[red]" in done.stderr
    assert len(done.stderr) < 10_000


# An endpoint that is not there, or only now and then


@pytest.mark.parametrize(
    ("variables", "code", "told"),
    [
        ({"RUNPOD_API_KEY": "rpa_wrong"}, 3, "refused the API key (HTTP 401)"),
        ({"RUNPOD_ENDPOINT_ID": "another"}, 4, "knows no endpoint another"),
        ({"RUNPOD_API_URL": "http://127.0.0.1:1"}, 4, "cannot be reached"),
    ],
    ids=["401", "404", "no server"],
)
def test_a_wrong_key_endpoint_or_server_has_its_exit_code(folder, variables, code, told):
    with FakeEndpoint(DONE) as endpoint:
        options = {"RUNPOD_API_URL": endpoint.url} | variables
        done = run(folder, "dancer.png", "She spins.", "--json", **options)
    assert done.returncode == code
    assert told in done.stderr
    assert json.loads(done.stdout)["exit_code"] == code
    assert "rpa_wrong" not in done.stdout + done.stderr
    assert "--resume" not in done.stderr


def test_a_submission_is_repeated_until_it_is_taken(folder):
    with FakeEndpoint(DONE, run=(500, 429, 503, 502)) as endpoint:
        done = run(folder, "dancer.png", "She spins.", endpoint=endpoint)
    assert done.returncode == 0
    assert len(endpoint.asked("run")) == 5
    assert "answered HTTP 500. Trying again." in done.stderr


def test_a_submission_that_is_never_taken_ends(folder):
    with FakeEndpoint(DONE, run=(503,) * 9) as endpoint:
        done = run(folder, "dancer.png", "She spins.", endpoint=endpoint)
    assert done.returncode == 4
    assert "Nothing was submitted in 6 attempts." in done.stderr


@pytest.mark.parametrize(
    "answer",
    [
        None,
        b"<html>",
        b"[]",
        b"{}",
        b'{"id": 5, "status": "IN_QUEUE"}',
        b'{"id": "../x", "status": "IN_QUEUE"}',
        b"[" * 100_000,
        504,
    ],
)
def test_a_submission_that_may_have_arrived_is_not_repeated(folder, answer):
    """It would be paid for twice."""
    with FakeEndpoint(DONE, run=(answer,)) as endpoint:
        done = run(folder, "dancer.png", "She spins.", endpoint=endpoint)
    assert done.returncode == 4
    assert "may be queued all the same" in done.stderr
    assert len(endpoint.asked("run")) == 1


def test_a_refused_request_is_told_without_the_key(folder):
    with FakeEndpoint(DONE, run=((400, f"Bad request\nfrom {KEY}".encode()),)) as endpoint:
        done = run(folder, "dancer.png", "She spins.", endpoint=endpoint)
    assert done.returncode == 2
    assert "refused the request (HTTP 400): Bad request from …" in done.stderr


def test_failed_polls_do_not_give_the_job_up(folder):
    running = state("IN_PROGRESS", PROGRESS)
    with FakeEndpoint(
        running, 500, None, b"<html>", 404, 404, running, 429, b"[]", 404, 404, DONE
    ) as endpoint:
        done = run(folder, "dancer.png", "She spins.", endpoint=endpoint)
    assert done.returncode == 0
    assert (folder / "dancer.mp4").read_bytes() == VIDEO
    assert len(endpoint.asked("status")) == 12
    assert "The job goes on; asking again." in done.stderr


@pytest.mark.parametrize(("answer", "code"), [(404, 4), (401, 3)])
def test_a_job_that_cannot_be_asked_for_ends_the_waiting(folder, answer, code):
    with FakeEndpoint(answer) as endpoint:
        done = run(folder, "--resume", "job-9", endpoint=endpoint)
    assert done.returncode == code


def test_after_a_long_silence_the_job_is_left_to_itself(folder):
    with FakeEndpoint(500) as endpoint:
        program = "import client.api as api, client.__main__ as it; api.SILENCE_S = 0.1; exit(it.main())"
        done = run(folder, "--resume", JOB_ID, endpoint=endpoint, program=("-c", program))
    assert done.returncode == 4
    assert f"python -m client --resume {JOB_ID}" in done.stderr


# Ctrl-C


def interrupted(
    folder: Path, endpoint: FakeEndpoint, operation: str, again: str | None = None
) -> tuple[int, str]:
    """The client's exit code and stderr: Ctrl-C when it asks for `operation`, again when it says `again`."""
    log = folder.with_suffix(".log")
    with (
        log.open("w") as stderr,
        start(folder, "dancer.png", "She spins.", endpoint=endpoint, stderr=stderr) as process,
    ):
        try:
            wait_until(lambda: endpoint.asked(operation))
            process.send_signal(signal.SIGINT)
            if again is None:
                endpoint.release()
            else:
                wait_until(lambda: again in log.read_text() and endpoint.asked(endpoint.held))
                process.send_signal(signal.SIGINT)
            process.wait(TIMEOUT_S)
        finally:
            process.kill()
    err = log.read_text()
    assert "Traceback" not in err
    assert [path.name for path in folder.iterdir()] == ["dancer.png"]
    return process.returncode, err


def test_ctrl_c_cancels_the_remote_job(folder):
    with FakeEndpoint(state("IN_PROGRESS", PROGRESS)) as endpoint:
        code, err = interrupted(folder, endpoint, "status")
    assert code == 130
    assert "The job is cancelled." in err
    (cancel,) = endpoint.asked("cancel")
    assert (cancel.method, cancel.path) == ("POST", f"/{ENDPOINT_ID}/cancel/{JOB_ID}")
    assert endpoint.requests[-1] == cancel


def test_a_cancellation_is_repeated_until_it_is_seen(folder):
    running = state("IN_PROGRESS", PROGRESS)
    with FakeEndpoint(running, cancel=(500, None, running)) as endpoint:
        code, err = interrupted(folder, endpoint, "status")
    assert code == 130
    assert "The job is cancelled." in err
    assert len(endpoint.asked("cancel")) == 3
    assert endpoint.requests[-1].path.startswith(f"/{ENDPOINT_ID}/status")


def test_ctrl_c_in_a_submission_cancels_what_was_submitted(folder):
    with FakeEndpoint(state("IN_QUEUE")) as endpoint:
        endpoint.held = "run"
        code, err = interrupted(folder, endpoint, "run")
    assert code == 130
    assert "Waiting for the job's id" in err
    assert "The job is cancelled." in err
    assert endpoint.asked("cancel")


def test_ctrl_c_between_two_submissions_leaves_no_job(folder):
    with FakeEndpoint(state("IN_QUEUE"), run=(429,) * 9) as endpoint:
        code, _ = interrupted(folder, endpoint, "run")
    assert code == 130
    assert not endpoint.asked("cancel")


def test_a_job_that_ended_before_its_cancellation_can_still_be_had(folder):
    with FakeEndpoint(state("IN_PROGRESS"), cancel=(DONE,)) as endpoint:
        code, err = interrupted(folder, endpoint, "status")
    assert code == 130
    assert "had already ended (COMPLETED)" in err
    assert f"python -m client --resume {JOB_ID}" in err


@pytest.mark.parametrize("held", ["run", "cancel"])
def test_a_second_ctrl_c_quits_at_once(folder, held):
    """Although `held` is never answered."""
    with FakeEndpoint(state("IN_PROGRESS", PROGRESS)) as endpoint:
        endpoint.held = held
        first = {"run": "run", "cancel": "status"}[held]
        code, err = interrupted(folder, endpoint, first, again="Ctrl-C again quits at once.")
        assert code == 130
        assert {"run": "the job may be queued", "cancel": "it may still run"}[held] in err
        assert len(endpoint.asked("cancel")) == (held == "cancel")


def test_ctrl_c_in_a_download_leaves_the_finished_job_alone(folder):
    with FakeEndpoint() as endpoint:
        endpoint.set_state(with_video(video_url=endpoint.file_url("clip")))
        endpoint.held = "clip"
        code, err = interrupted(folder, endpoint, "files")
    assert code == 130
    assert f"python -m client --resume {JOB_ID}" in err
    assert not endpoint.asked("cancel")


# What is wrong before anything is sent


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["dancer.png"], "IMAGE and PROMPT are needed"),
        (["nobody.png", "x"], "cannot be read (No such file or directory)"),
        (["notes.txt", "x"], "not a PNG, JPEG or WebP"),
        (["large.png", "x"], "The request has 10.7 MB and RunPod takes 10 MB"),
        (["huge.png", "x"], "over 20 MB"),
        (["http://example.com/a.png", "x"], "an https URL"),
        (["dancer.png", "x", "-o", "notes.txt"], "notes.txt exists; --force overwrites it"),
        (["dancer.png", "x", "-o", "."], "is a folder"),
        (["dancer.png", "x", "-o", "nowhere/out.mp4"], "cannot be written"),
        (["dancer.png", "x", "--preview", "notes.txt"], "notes.txt exists"),
        (["dancer.png", "x", "--set", "steps"], "takes NAME=JSON"),
        (["dancer.png", "x", "--set", "output=url"], "a text needs quotes"),
        (["dancer.png", "x", "--set", "cfg=1e999"], "a number that JSON does not know"),
        (["dancer.png", "x", "--cfg", "nan"], "a number that JSON does not know"),
        (["dancer.png", "x", "--end-image", "notes.txt"], "is not a PNG, JPEG or WebP"),
        (["x", "--input-video", "dancer.png"], "is not an MP4, MOV, WebM, MKV or GIF"),
        (["dancer.png", "x", "--input-video", "a.mp4"], "only one must be given"),
        (["dancer.png", "x", "--start", "black"], "only one must be given"),
        (["x", "--start", "black", "--input-video", "a.mp4"], "only one must be given"),
        (["dancer.png", "x", "--sections", "policy.json"], "policy.json must be a JSON list"),
        (["dancer.png", "x", "--sections", "list.json"], "Entry 1 of list.json must be a JSON object"),
        (["dancer.png", "x", "--sections", "times.json"], "notes.txt is not a PNG, JPEG or WebP"),
        (["--resume", JOB_ID, "--sections", "times.json"], "--resume takes a job as it was submitted"),
        (["--resume", JOB_ID, "--poster"], "--resume takes a job as it was submitted"),
        (["--resume", JOB_ID, "--input-video", "a.mp4"], "--resume takes a job as it was submitted"),
        (["dancer.png", "x", "--lora", "a.safetensors=strong"], "the weight must be a number (got strong)"),
        (["--input-json", "notes.txt"], "not valid JSON"),
        (["--input-json", "list.json"], "must be a JSON object"),
        (["--input-json", "policy.json", "--execution-timeout", "60"], "`policy` must be a JSON object"),
        (["--resume", JOB_ID, "--end-image", "dancer.png"], "--resume takes a job as it was submitted"),
        (["--resume", JOB_ID, "--steps", "3"], "--resume takes a job as it was submitted"),
        (["--resume", "../run"], "--resume takes a job's id"),
        (["dancer.png", "x", "--local", "localhost:8000"], "--local must be an http or https URL"),
        (["dancer.png", "x", "--local", "http://localhost:8000", "--detach"], "--local has no --detach"),
        (["dancer.png", "x", "--api-url", "http://example.com/v2"], "must be https"),
        (["dancer.png", "x", "--api-url", "https://[::1"], "must be an http or https URL"),
        (["dancer.png", "x", "--endpoint", "a/b"], "must be the endpoint's id"),
        (["dancer.png", "x", "--api-key", "rpa\r\nX: y"], "must be an API key"),
        (["dancer.png", "x", "--wait", "-1"], "must be above 0"),
        (["dancer.png", "x", "--execution-timeout", "1"], "must be 5 to 604800 seconds"),
        (["dancer.png", "x", "--stepz", "1"], "unrecognized arguments"),
    ],
    ids=lambda value: " ".join(value[1:]) if isinstance(value, list) else "",
)
def test_a_fault_here_is_told_before_anything_is_sent(folder, monkeypatch, capsys, arguments, told):
    (folder / "notes.txt").write_text("notes")
    (folder / "list.json").write_text("[1]")
    (folder / "times.json").write_text('[{"start_s": 0, "image": "notes.txt"}]')
    (folder / "policy.json").write_text('{"input": {}, "policy": 5}')
    (folder / "large.png").write_bytes(PNG + bytes(8_000_000))
    (folder / "huge.png").write_bytes(PNG + bytes(20_000_000))
    monkeypatch.chdir(folder)
    monkeypatch.setenv("RUNPOD_ENDPOINT_ID", ENDPOINT_ID)
    monkeypatch.setenv("RUNPOD_API_KEY", KEY)
    with FakeEndpoint(DONE) as endpoint:
        monkeypatch.setenv("RUNPOD_API_URL", endpoint.url)
        try:
            code = main(arguments)
        except SystemExit as exit:  # argparse's
            code = exit.code
    out, err = capsys.readouterr()
    assert code == 2
    assert told in " ".join(err.split())
    assert out == ""
    assert KEY not in err
    assert not endpoint.requests
    assert (folder / "notes.txt").read_text() == "notes"


def test_a_missing_key_is_told(folder):
    done = make(folder, DONE, arguments=["--json"], RUNPOD_API_KEY=" ")
    assert done.returncode == 2
    assert json.loads(done.stdout)["error"].startswith("--api-key or RUNPOD_API_KEY must be")


def test_an_existing_file_is_overwritten_when_told(folder):
    (folder / "dancer.mp4").write_bytes(b"old")
    assert make(folder, DONE, arguments=["--force"]).returncode == 0
    assert (folder / "dancer.mp4").read_bytes() == VIDEO


def test_a_file_that_comes_to_exist_meanwhile_is_kept(folder):
    with FakeEndpoint(DONE) as endpoint:
        endpoint.held = "status"
        with start(folder, "dancer.png", "She spins.", endpoint=endpoint) as process:
            wait_until(lambda: endpoint.asked("status"))
            (folder / "dancer.mp4").write_bytes(b"another's")
            endpoint.release()
            _, err = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 6
    assert f"python -m client --resume {JOB_ID}" in err
    assert (folder / "dancer.mp4").read_bytes() == b"another's"


def test_the_video_is_saved_though_nobody_reads_what_is_told(folder):
    with FakeEndpoint(state("IN_PROGRESS", PROGRESS), DONE) as endpoint:
        endpoint.held = "run"
        with start(folder, "dancer.png", "She spins.", endpoint=endpoint) as process:
            process.stderr.close()
            endpoint.release()
            assert process.wait(TIMEOUT_S) == 0
    assert (folder / "dancer.mp4").read_bytes() == VIDEO


def test_it_runs_where_only_httpx_and_rich_are_installed(folder):
    """Nothing of the worker, nothing of the venv but these two and what they need."""
    allowed = "client httpx rich httpcore h11 certifi idna anyio markdown_it mdurl pygments typing_extensions"
    program = f"""
import sys
class OnlyThese:
    def find_spec(self, name, *_):
        if name.partition(".")[0] not in {{*sys.stdlib_module_names, *{allowed.split()!r}}}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, OnlyThese())
from client.__main__ import main
sys.exit(main())
"""
    with FakeEndpoint(state("IN_PROGRESS", PROGRESS), DONE) as endpoint:
        done = run(folder, "dancer.png", "She spins.", endpoint=endpoint, program=("-c", program))
    assert done.returncode == 0, done.stderr
    assert (folder / "dancer.mp4").exists()


@pytest.mark.parametrize("text", ["help", "docs"])
def test_every_exit_code_is_documented(folder, text):
    told = (
        run(folder, "--help").stdout if text == "help" else (ROOT / "docs" / "client.md").read_text("utf-8")
    )

    def errors(kind):
        yield kind
        for child in kind.__subclasses__():
            yield from errors(child)

    for error in [*errors(ClientError)][1:]:
        assert re.search(rf"^\W*{error.exit_code}\b", told, re.MULTILINE)


def test_the_flags_are_of_fields_that_the_worker_knows():
    assert {*FIELDS} <= VideoRequest.model_fields.keys()


# The README's examples


def example(language: str) -> str:
    section = (ROOT / "README.md").read_text("utf-8").partition("### From your own code")[2]
    return re.search(rf"```{language}\n(.*?)```", section, re.DOTALL)[1]


@pytest.mark.parametrize("operation", ["run", "runsync"])
@pytest.mark.parametrize(
    ("language", "command"),
    [("bash", ["bash", "-eu"]), ("python", [sys.executable]), ("js", ["node", "--input-type=module"])],
    ids=["curl", "python", "javascript"],
)
def test_the_readmes_examples_make_the_video(folder, language, command, operation):
    if not all(shutil.which(tool) for tool in ([command[0], *["curl", "jq"] * (language == "bash")])):
        pytest.skip("a tool of this example is not installed")
    with FakeEndpoint(state("IN_PROGRESS", PROGRESS), DONE) as endpoint:
        program = example(language)
        for text, instead in [
            ("https://api.runpod.ai/v2", endpoint.url),
            ('/run"', f'/{operation}"'),
            ("sleep 2", "sleep 0"),
            ("sleep(2)", "sleep(0)"),
            ("2000", "0"),
        ]:
            program = program.replace(text, instead)
        done = subprocess.run(
            command,
            input=program,
            cwd=folder,
            env=environment(RUNPOD_ENDPOINT_ID=ENDPOINT_ID, RUNPOD_API_KEY=KEY),
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
        )
    assert done.returncode == 0, done.stderr
    assert "COMPLETED" in done.stdout
    assert (folder / "dancer.mp4").read_bytes() == VIDEO
    (submitted,) = endpoint.asked(operation)
    assert submitted.json["input"]["input_image"] == base64.b64encode(PNG).decode()
    assert len(endpoint.asked("status")) == 2


# Real workers


@pytest.fixture(scope="module")
def workers(tmp_path_factory):
    """An endpoint with a worker as on RunPod, and the URL of a local server; both on the tiny models."""
    logs = tmp_path_factory.mktemp("logs")
    port = free_port()
    local = ("--rp_serve_api", "--rp_api_port", str(port))
    with (
        FakeRunPod() as runpod,
        WorkingEndpoint(runpod) as endpoint,
        running_warm_handler(logs / "worker", **runpod.variables) as worker,
        running_warm_handler(logs / "local", *local) as server,
    ):
        worker.wait_until(lambda: runpod.asked_for_jobs)
        server.wait_until(lambda: is_open(port))
        yield endpoint, f"http://localhost:{port}"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def is_open(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


QUICK = ("--seconds", "1", "--steps", "2", "--resolution", "256", "--set", "latent_window_size=6")


def test_a_real_workers_progress_is_told_and_its_video_saved(folder, workers):
    endpoint, _ = workers
    every_step = ("--steps", "100", "--set", "use_teacache=false")
    done = run(folder, "dancer.png", "She spins.", *QUICK, *every_step, endpoint=endpoint)
    assert done.returncode == 0, done.stderr
    assert is_mp4((folder / "dancer.mp4").read_bytes())
    assert re.search(r"^sampling, section 1 of 1, step \d+ of 100: \d+ %", done.stderr, re.MULTILINE)
    assert re.search(r"section 1: sample +\d+\.\d\d +100 of 100", done.stderr)


def test_a_real_workers_refusal_is_told(folder, workers):
    endpoint, _ = workers
    done = run(folder, "dancer.png", "She spins.", "--steps", "0", endpoint=endpoint)
    assert done.returncode == 1
    assert "The job failed (invalid_request): `steps` must be at least 1 (got 0)." in done.stderr


def test_the_local_server_makes_the_video(folder, workers):
    _, url = workers
    done = run(folder, "dancer.png", "She spins.", *QUICK, "--local", url, "--json", RUNPOD_API_KEY="")
    assert done.returncode == 0, done.stderr
    assert is_mp4((folder / "dancer.mp4").read_bytes())
    assert json.loads(done.stdout)["output"]["frames"] == 25


def test_a_real_workers_latents_are_saved_and_gone_on_from(folder, workers):
    _, url = workers
    first, second = (
        run(folder, *arguments, *QUICK, "--local", url, "--json", RUNPOD_API_KEY="")
        for arguments in (
            ("dancer.png", "She spins.", "--latents", "a.safetensors"),
            ("She spins.", "--resume-latents", "a.safetensors"),
        )
    )
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    assert json.loads(second.stdout)["output"]["resumed_sections"] == 1
    assert is_mp4((folder / "video.mp4").read_bytes())


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["--steps", "0"], 1, "`steps` must be at least 1 (got 0)."),
        ([*QUICK, "--steps", "100", "--wait", "0.2"], 5, "not finished after 0.2 s"),
    ],
    ids=["failed", "waited"],
)
def test_the_local_servers_bad_ends_have_their_exit_codes(folder, workers, arguments, code, told):
    _, url = workers
    done = run(folder, "dancer.png", "She spins.", *arguments, "--local", url)
    assert done.returncode == code
    assert told in done.stderr
    assert "--resume" not in done.stderr


def test_ctrl_c_leaves_a_local_job_to_the_server_which_gets_no_key(folder):
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        with start(folder, "dancer.png", "She spins.", "--local", url) as process:
            connection, _ = server.accept()
            sent = connection.recv(1 << 16)
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=TIMEOUT_S)
            connection.close()
    assert process.returncode == 130
    assert "the local server cannot cancel" in err
    assert b"POST /runsync" in sent
    assert KEY.encode() not in sent


def test_a_local_server_that_is_not_there_is_told(folder):
    done = run(folder, "dancer.png", "She spins.", "--local", f"http://localhost:{free_port()}")
    assert done.returncode == 4
    assert "`python handler.py --rp_serve_api` should be running" in done.stderr


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.safetensors", {"name": "a.safetensors", "weight": 1.0}),
        ("a=b.safetensors", {"name": "a=b.safetensors", "weight": 1.0}),
        ("a=b.safetensors=-0.5", {"name": "a=b.safetensors", "weight": -0.5}),
        ("https://x/a.safetensors=2", {"url": "https://x/a.safetensors", "weight": 2.0}),
    ],
)
def test_a_lora_is_a_name_or_a_url_and_a_weight(text, expected):
    assert parse_options(["x.png", "x", "--lora", text], {}).loras == [expected]
