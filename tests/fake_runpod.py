"""`python handler.py` as a process, and a RunPod for it to talk to on this machine."""

import base64
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from core.settings import Settings
from tests.tiny import TINY_ENV
from tests.warm_process import WarmProcess

ROOT = Path(__file__).parents[1]
HANDLER = ROOT / "handler.py"
TIMEOUT_S = 120  # only a guard against hanging
LONG_POLL_S = 2.0
BASE64 = re.compile(r"[A-Za-z0-9+/]{200,}")

QUICK = {"total_second_length": 1, "latent_window_size": 6, "steps": 2, "resolution": 256}


def job_input(**values: Any) -> dict:
    """The input of test_input.json, as one short section of few steps unless `values` say otherwise."""
    job = json.loads((ROOT / "test_input.json").read_text(encoding="utf-8"))
    return job["input"] | QUICK | values


def is_mp4(data: bytes) -> bool:
    return data[4:8] == b"ftyp"


def decode(video_base64: str) -> bytes:
    return base64.b64decode(video_base64, validate=True)


def environment(**values: str) -> dict[str, str]:
    """This process's environment, on the CPU and with nothing that leads outside.

    With the tiny models, unless `values` say which profile.
    """
    own = {field.name.upper() for field in fields(Settings)}
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in own
        and not name.startswith(("RUNPOD_", "HF_"))
        and not name.lower().endswith("_proxy")  # the SDK's pings would go through it
    }
    models = {} if "MODEL_PROFILE" in values else TINY_ENV
    fixed = {
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",  # more threads than free cores make torch many times slower
    }
    return kept | models | fixed | values


def run_handler(
    *arguments: str, cwd: Path = ROOT, **variables: str | Path
) -> subprocess.CompletedProcess[str]:
    """Run handler.py to its end, in a new Python."""
    return subprocess.run(
        [sys.executable, str(HANDLER), *arguments],
        cwd=cwd,
        env=environment(**{name: str(value) for name, value in variables.items()}),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=TIMEOUT_S,
    )


def run_warm_handler(
    folder: Path, *arguments: str, cwd: Path = ROOT, **variables: str | Path
) -> subprocess.CompletedProcess[str]:
    """As `run_handler`, in a WarmProcess; its streams are kept in `folder`."""
    streams = {"stdout": folder / "stdout", "stderr": folder / "stderr"}
    process = WarmProcess(
        [str(HANDLER), *arguments],
        cwd=cwd,
        env=environment(**{name: str(value) for name, value in variables.items()}),
        **streams,
    )
    with _until_killed(HandlerProcess(process, streams["stdout"])) as handler:
        status = handler.wait()
    told = {name: path.read_text(encoding="utf-8") for name, path in streams.items()}
    return subprocess.CompletedProcess(arguments, status, **told)


class HandlerProcess:
    """A running handler.py; stdout and stderr go to one file, so that their order is known."""

    def __init__(self, process: subprocess.Popen | WarmProcess, log: Path) -> None:
        self._process, self._log = process, log

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def log(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace")

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def terminate(self) -> None:
        self._process.send_signal(signal.SIGTERM)

    def wait(self) -> int:
        """The exit status."""
        return self._process.wait(TIMEOUT_S)

    def wait_until(self, condition: Callable[[], Any]) -> Any:
        """The first true value of `condition`; fails when the process ends before there is one."""
        give_up = time.monotonic() + TIMEOUT_S
        while True:
            alive = self.alive  # before the condition: the process's last act may be what makes it true
            if value := condition():
                return value
            if not alive or time.monotonic() > give_up:
                what = "still waiting" if alive else "the process has ended"
                pytest.fail(f"{what}; its log ends:\n{self.log[-4000:]}")
            time.sleep(0.02)

    def kill(self) -> None:
        """The whole group: the SDK's heartbeat is a process of its own and may outlive its parent."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(TIMEOUT_S)


@contextmanager
def running_handler(
    log: Path, *arguments: str, program: tuple[str, ...] = ("handler.py",), **variables: str
) -> Iterator[HandlerProcess]:
    """In a new Python."""
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, *program, *arguments],
            cwd=ROOT,
            env=environment(**variables),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    with _until_killed(HandlerProcess(process, log)) as handler:
        yield handler


@contextmanager
def running_warm_handler(log: Path, *arguments: str, **variables: str) -> Iterator[HandlerProcess]:
    """In a WarmProcess."""
    process = WarmProcess([str(HANDLER), *arguments], cwd=ROOT, env=environment(**variables), stdout=log)
    with _until_killed(HandlerProcess(process, log)) as handler:
        yield handler


@contextmanager
def _until_killed(process: HandlerProcess) -> Iterator[HandlerProcess]:
    try:
        yield process
    finally:
        process.kill()


@dataclass(frozen=True)
class Post:
    """What the worker sent for a job, and when it arrived."""

    job_id: str
    body: dict
    time: float

    @property
    def is_final(self) -> bool:
        return self.body.get("status") != "IN_PROGRESS"


class FakeRunPod(ThreadingHTTPServer):
    """RunPod's side of a worker: hands out jobs and stop signals, keeps what is posted."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Request)
        self._changed = threading.Condition()
        self._jobs: deque[dict] = deque()
        self._stops: deque[str] = deque()
        self._closing = False
        self.take_delay = 0.0  # seconds that a job waits here before the worker gets it
        # what becomes of a job's next result posts, by its id: a status, "drop" (the connection, the result
        # thrown away) or "lose" (the connection, the result kept); then they are taken as usual
        self.result_faults: defaultdict[str, deque[int | str]] = defaultdict(deque)
        self.progress_fault: int | str | None = None  # likewise, of every progress post
        self.asked_for_jobs = False
        self.pings: list[str] = []  # what was asked with each
        self.taken: list[str] = []
        self.posts: list[Post] = []

    @property
    def variables(self) -> dict[str, str]:
        """The environment that RunPod would give the worker."""
        api = f"http://127.0.0.1:{self.server_port}/v2/endpoint"
        return {
            "RUNPOD_WEBHOOK_GET_JOB": f"{api}/job-take/$ID?gpu=none",
            "RUNPOD_WEBHOOK_POST_OUTPUT": f"{api}/job-done/$RUNPOD_POD_ID/$ID?gpu=none",
            "RUNPOD_WEBHOOK_PING": f"{api}/ping/$RUNPOD_POD_ID?gpu=none",
            "RUNPOD_PING_INTERVAL": "1000",
            "RUNPOD_POD_ID": "worker",
            "RUNPOD_AI_API_KEY": "none",
            # these look for a GPU, for gigabytes of free memory and for the internet
            "RUNPOD_SKIP_AUTO_SYSTEM_CHECKS": "true",
            "RUNPOD_SKIP_GPU_CHECK": "true",
        }

    def queue(self, job_id: str, data: Any) -> None:
        with self._changed:
            self._jobs.append({"id": job_id, "input": data})
            self._changed.notify_all()

    def stop(self, job_id: str) -> None:
        with self._changed:
            self._stops.append(job_id)
            self._changed.notify_all()

    def posts_of(self, job_id: str) -> list[Post]:
        """In the order they arrived."""
        with self._changed:
            return [post for post in self.posts if post.job_id == job_id]

    def final(self, job_id: str) -> Post | None:
        return next((post for post in self.posts_of(job_id) if post.is_final), None)

    def progress(self, job_id: str) -> list[dict]:
        return [post.body["output"] for post in self.posts_of(job_id) if not post.is_final]

    def take_job(self) -> dict | None:
        with self._changed:
            self.asked_for_jobs = True
            self._changed.wait_for(lambda: self._jobs or self._closing, LONG_POLL_S)
            if not self._jobs or self._closing:
                return None
            job = self._jobs.popleft()
            self.taken.append(job["id"])
        time.sleep(self.take_delay)
        return job

    def take_stops(self) -> dict | None:
        with self._changed:
            self._changed.wait_for(lambda: self._stops or self._closing, LONG_POLL_S)
            stops = [*self._stops]
            self._stops.clear()
            return {"jobsToStop": stops} if stops else None

    def fault_of(self, job_id: str, body: dict) -> int | str | None:
        with self._changed:
            if body.get("status") == "IN_PROGRESS":
                return self.progress_fault
            faults = self.result_faults[job_id]
            return faults.popleft() if faults else None

    def finals(self, job_id: str) -> list[dict]:
        """Every result that was taken; more than one only where one was lost on its way."""
        return [post.body for post in self.posts_of(job_id) if post.is_final]

    def keep(self, job_id: str, body: dict) -> None:
        with self._changed:
            self.posts.append(Post(job_id, body, time.monotonic()))

    def __enter__(self) -> "FakeRunPod":
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self.shutdown()
        self.server_close()


class _Request(BaseHTTPRequestHandler):
    server: FakeRunPod

    def do_GET(self) -> None:
        kind = self._path()[2]
        if kind == "ping":
            self.server.pings.append(self.path)
            self._reply(200, {})
        elif kind in ("job-take", "job-stop"):
            body = self.server.take_job() if kind == "job-take" else self.server.take_stops()
            self._reply(204 if body is None else 200, body)
        else:
            self._reply(404, None)

    def do_POST(self) -> None:
        *_, kind, _, job_id = self._path()
        if kind != "job-done":
            self._reply(404, None)
            return
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        fault = self.server.fault_of(job_id, body)
        if fault in (None, "lose"):
            self.server.keep(job_id, body)
        if isinstance(fault, str):
            self.close_connection = True
        else:
            self._reply(fault or 200, {})

    def _path(self) -> list[str]:
        return urlsplit(self.path).path.strip("/").split("/")

    def _reply(self, status: int, body: dict | None) -> None:
        content = b"" if body is None else json.dumps(body).encode()
        self.send_response(status)
        if body is not None:
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass
