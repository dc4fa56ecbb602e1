"""The two ways to run the worker on one's own machine: RunPod's local server, and one job from a terminal."""

import json
import socket

import httpx
import pytest

from tests.fake_runpod import (
    BASE64,
    TIMEOUT_S,
    decode,
    is_mp4,
    job_input,
    run_warm_handler,
    running_warm_handler,
)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A client of `handler.py --rp_serve_api`, and the server's process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    options = {"base_url": f"http://localhost:{port}", "timeout": TIMEOUT_S, "trust_env": False}
    with (
        running_warm_handler(log, "--rp_serve_api", "--rp_api_port", str(port)) as process,
        httpx.Client(**options) as client,
    ):
        process.wait_until(lambda: _answers(client))
        yield client, process


def _answers(client: httpx.Client) -> bool:
    try:
        return client.get("/").status_code == 200
    except httpx.ConnectError:
        return False


def run(client: httpx.Client, data: dict) -> dict:
    response = client.post("/runsync", json={"input": data})
    assert response.status_code == 200
    return response.json()


def assert_completed(reply: dict) -> None:
    assert reply["status"] == "COMPLETED"
    assert is_mp4(decode(reply["output"]["video_base64"]))


def assert_failed(reply: dict, told: str) -> None:
    assert reply["status"] == "FAILED"
    assert told in reply["error"]
    assert "Traceback" not in reply["error"]


def test_runsync_answers_with_the_video(server):
    client, process = server
    assert_completed(run(client, job_input()))
    assert not BASE64.search(process.log)


def test_run_queues_and_status_answers_with_the_video(server):
    client, _ = server
    queued = client.post("/run", json={"input": job_input()}).json()
    assert queued["status"] == "IN_PROGRESS"
    reply = client.post(f"/status/{queued['id']}").json()  # the SDK's server runs the job only here
    assert reply["id"] == queued["id"]
    assert_completed(reply)


def test_after_a_bad_job_the_next_good_one_works(server):
    client, _ = server
    assert_failed(run(client, job_input(steps=0)), "`steps`")
    assert_completed(run(client, job_input()))


@pytest.mark.parametrize("body", ['["a prompt"]', '{"input": ["a prompt"]}', "{}", '{"input": '])
def test_a_body_of_another_shape_is_refused_and_the_server_lives_on(server, body):
    client, process = server
    response = client.post("/runsync", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 422
    assert_failed(run(client, {}), "`prompt` is required")
    assert process.alive


@pytest.mark.parametrize(
    ("arguments", "job_id"),
    [
        ([], "local_test"),  # the SDK's name for a job without one
        (["--test_input", json.dumps({"id": "clip-7", "input": job_input()})], "clip-7"),
    ],
    ids=["test_input.json", "--test_input"],
)
def test_a_local_run_leaves_a_file_and_no_base64(tmp_path, arguments, job_id):
    folder = tmp_path / "not" / "yet"
    done = run_warm_handler(tmp_path, *arguments, OUTPUT_DIR=folder)
    assert done.returncode == 0
    (video,) = folder.iterdir()
    assert video == folder / f"{job_id}.mp4"
    assert is_mp4(video.read_bytes())
    assert str(video) in done.stdout
    assert not BASE64.search(done.stdout + done.stderr)
    assert "Traceback" not in done.stdout + done.stderr


def test_a_bad_local_job_is_told_in_a_sentence(tmp_path):
    folder = tmp_path / "out"
    bad = json.dumps({"input": job_input(steps=0)})
    done = run_warm_handler(tmp_path, "--test_input", bad, OUTPUT_DIR=folder)
    assert done.returncode == 1
    assert "`steps` must be at least 1" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
    assert not folder.exists()


@pytest.mark.parametrize(
    ("content", "as_argument", "told"),
    [
        ('{"input": ', True, "--test_input is not valid JSON"),
        ('["a prompt"]', True, "must be an object"),
        ('{"input": ', False, "test_input.json is not valid JSON"),
        (None, False, "there is no test_input.json here"),
    ],
    ids=["broken argument", "list argument", "broken file", "no file"],
)
def test_a_broken_test_input_is_told_in_one_line(tmp_path, content, as_argument, told):
    if content is not None and not as_argument:
        (tmp_path / "test_input.json").write_text(content, encoding="utf-8")
    arguments = ["--test_input", content] if as_argument else []
    done = run_warm_handler(tmp_path, *arguments, cwd=tmp_path)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert told in line
    assert "Traceback" not in done.stdout
