"""An S3 service on 127.0.0.1 that misbehaves, by words in the name of what is put there."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit


class FakeStorage(ThreadingHTTPServer):
    """Keeps what is put, except: `refuse` is forbidden, `drop` cuts its first connection in the middle of
    the body, `stall` never answers (until the server ends)."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Put)
        self.kept: dict[str, bytes] = {}
        self.attempts: list[str] = []  # names, one for each request
        self.ended = threading.Event()

    @property
    def variables(self) -> dict[str, str]:
        """The worker's environment for this storage."""
        return {
            "BUCKET_NAME": "videos",
            "BUCKET_ENDPOINT_URL": f"http://127.0.0.1:{self.server_port}",
            "BUCKET_ACCESS_KEY_ID": "key",
            "BUCKET_SECRET_ACCESS_KEY": "a-secret",
            "BUCKET_REGION": "us-east-1",
        }


class _Put(BaseHTTPRequestHandler):
    server: FakeStorage
    protocol_version = "HTTP/1.1"

    def do_PUT(self) -> None:
        name = urlsplit(self.path).path.removeprefix("/videos/")
        self.server.attempts.append(name)
        if "refuse" in name:
            self._answer(403)
        elif "stall" in name:
            self.server.ended.wait()
        elif "drop" in name and self.server.attempts.count(name) == 1:
            self.rfile.read(1000)
            self.close_connection = True
        else:
            self._read_body(name)
            self._answer(200)

    def _read_body(self, name: str) -> None:
        if self.headers.get("Expect") == "100-continue":
            self.send_response_only(100)
            self.end_headers()
        self.server.kept[name] = self.rfile.read(int(self.headers["Content-Length"]))

    def _answer(self, status: int) -> None:
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.send_header("ETag", '"etag"')
        self.end_headers()

    def handle_expect_100(self) -> bool:
        return True  # answered in _read_body, where the body is wanted

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def fake_storage() -> Iterator[FakeStorage]:
    server = FakeStorage()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.ended.set()
        server.shutdown()
        server.server_close()


def wait_for(condition, seconds: float = 60) -> None:
    """Until `condition()` is true; fails after `seconds`, which only guards against hanging."""
    give_up = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < give_up, "still waiting"
        time.sleep(0.02)
