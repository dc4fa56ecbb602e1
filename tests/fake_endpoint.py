"""RunPod's API of one endpoint on this machine: by script, or with a real worker behind it."""

import json
import re
import struct
import threading
from collections import deque
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

from tests.fake_runpod import FakeRunPod

ENDPOINT_ID = "endpoint1"
KEY = "rpa_0123456789SECRET"
JOB_ID = "job-1"

Answer = int | tuple[int, bytes] | bytes | dict | None
"""An HTTP status, alone or with a body; a body; a JSON object; a connection dropped without a word."""


def mp4(size: int = 5000) -> bytes:
    """A row of boxes as an MP4 has them; no player would show it."""
    boxes = [
        (b"ftyp", b"isom\0\0\2\0isom"),
        (b"moov", bytes(100)),
        (b"mdat", bytes(range(256)) * (size // 256)),
    ]
    return b"".join(struct.pack(">I4s", 8 + len(content), kind) + content for kind, content in boxes)


def state(status: str, output: Any = None, **more: Any) -> dict:
    return {"id": JOB_ID, "status": status} | ({} if output is None else {"output": output}) | more


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    headers: dict[str, str]
    body: bytes = field(repr=False)

    @property
    def json(self) -> dict:
        return json.loads(self.body)


class FakeEndpoint(ThreadingHTTPServer):
    """Answers /status with `states` in turn, the last one again and again, until the job is cancelled.

    `run` comes before the answer to /run that has the job's id, `cancel` before the one that says CANCELLED.
    `files` are served at /files/NAME, with ranges; a text there is an address to go on to. Such answers are
    first `refusals`, then broken off after the bytes in `drops`. The operation `held` waits for `release`.
    """

    def __init__(
        self, *states: Answer, run: tuple[Answer, ...] = (), cancel: tuple[Answer, ...] = ()
    ) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self._answers = {
            "run": deque([*run, state("IN_QUEUE")]),
            "cancel": deque([*cancel, state("CANCELLED")]),
            "status": deque(states),
        }
        self.requests: list[Request] = []
        self.files: dict[str, bytes | str] = {}
        self.refusals: list[int] = []
        self.drops: list[int] = []
        self.held = ""
        self._released = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def file_url(self, name: str) -> str:
        return f"{self.url}/files/{name}"

    def set_state(self, answer: Answer) -> None:
        self._answers["status"] = deque([answer])

    def asked(self, operation: str) -> list[Request]:
        return [request for request in self.requests if f"/{operation}" in request.path]

    def answer(self, operation: str, request: Request) -> Answer:
        answers = self._answers["run" if operation == "runsync" else operation]
        answer = answers.popleft() if len(answers) > 1 else answers[0]
        if operation == "cancel" and isinstance(answer, dict):
            self.set_state(state("CANCELLED"))
        return answer

    def release(self) -> None:
        self._released.set()

    def wait_for_release(self) -> None:
        self._released.wait()

    def __enter__(self) -> "FakeEndpoint":
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()
        self.shutdown()
        self.server_close()


class WorkingEndpoint(FakeEndpoint):
    """Its jobs are run by the worker that asks `runpod` for them."""

    def __init__(self, runpod: FakeRunPod) -> None:
        super().__init__()
        self._runpod = runpod
        self._cancelled: set[str] = set()
        self._count = 0

    def answer(self, operation: str, request: Request) -> Answer:
        if operation == "run":
            self._count += 1
            job_id = f"job-{self._count}"
            self._runpod.queue(job_id, request.json["input"])
            return {"id": job_id, "status": "IN_QUEUE"}
        job_id = request.path.rpartition("/")[2]
        if operation == "cancel":
            self._runpod.stop(job_id)
            self._cancelled.add(job_id)
        return {"id": job_id} | self._state(job_id)

    def _state(self, job_id: str) -> dict:
        if job_id in self._cancelled:
            return {"status": "CANCELLED"}
        if final := self._runpod.final(job_id):
            return {"status": "FAILED" if "error" in final.body else "COMPLETED"} | final.body
        if progress := self._runpod.progress(job_id):
            return {"status": "IN_PROGRESS", "output": progress[-1]}
        return {"status": "IN_PROGRESS" if job_id in self._runpod.taken else "IN_QUEUE"}


class _Handler(BaseHTTPRequestHandler):
    server: FakeEndpoint
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        self._serve()

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        request = Request(self.command, urlsplit(self.path).path, dict(self.headers), body)
        self.server.requests.append(request)
        place, operation = request.path.strip("/").split("/")[:2]
        if operation == self.server.held:
            self.server.wait_for_release()
        if place == "files":
            self._send_file(operation)
        elif place != ENDPOINT_ID:
            self._send(404, b"")
        elif self.headers["Authorization"] != f"Bearer {KEY}":
            self._send(401, b"")
        else:
            self._answer(self.server.answer(operation, request))

    def _answer(self, answer: Answer) -> None:
        match answer:
            case None:
                self.close_connection = True
            case int():
                self._send(answer, b"")
            case (status, body):
                self._send(status, body)
            case bytes():
                self._send(200, answer)
            case _:
                self._send(200, json.dumps(answer).encode())

    def _send_file(self, name: str) -> None:
        if self.server.refusals:
            self._send(self.server.refusals.pop(0), b"")
            return
        data = self.server.files.get(name)
        if not isinstance(data, bytes):
            self._send(302 if data else 403, b"", data or "")
            return
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(asked[1]) if asked else 0
        self.send_response(206 if asked else 200)
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        end = len(data)
        if self.server.drops:
            end = start + self.server.drops.pop(0)
            self.close_connection = True
        self.wfile.write(data[start:end])

    def _send(self, status: int, content: bytes, location: str = "") -> None:
        self.send_response(status)
        if location:
            self.send_header("Location", location)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass
