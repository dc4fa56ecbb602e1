"""A model hub on this machine: folders served as repositories, as huggingface_hub asks for them."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub:
    """`repositories` maps `owner/name` to a folder; `asked` lists (repository, revision, file)."""

    def __init__(self, repositories: dict[str, Path]) -> None:
        self.repositories = repositories
        self.asked: list[tuple[str, str, str]] = []
        self.url = ""

    def file(self, path: str) -> tuple[str, str, Path] | None:
        """Repository, revision and file of /owner/name/resolve/revision/file, if there is one."""
        owner, name, verb, revision, *rest = [*unquote(urlsplit(path).path).strip("/").split("/"), *[""] * 4][
            :40
        ]
        repository, inside = f"{owner}/{name}", "/".join(part for part in rest if part)
        if verb != "resolve" or repository not in self.repositories:
            return None
        self.asked.append((repository, revision, inside))
        file = self.repositories[repository] / inside
        return (repository, revision, file) if inside and file.is_file() else None


@contextmanager
def fake_hub(repositories: dict[str, Path]) -> Iterator[FakeHub]:
    """Serve `repositories` on 127.0.0.1 while the block runs."""
    hub = FakeHub(repositories)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self):
            self._answer(with_body=False)

        def do_GET(self):
            self._answer(with_body=True)

        def _answer(self, with_body: bool) -> None:
            found = hub.file(self.path)
            data = found[2].read_bytes() if found else json.dumps({"error": "not found"}).encode()
            self.send_response(200 if found else 404)
            if found:
                revision = found[1]
                self.send_header("X-Repo-Commit", revision if len(revision) == 40 else COMMIT)
                self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
            else:
                self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if with_body:
                self.wfile.write(data)

        def log_message(self, *_):
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
