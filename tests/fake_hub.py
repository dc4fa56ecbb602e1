"""A model hub on this machine: folders served as repositories, as huggingface_hub asks for them.

Like the real one it keeps weights in LFS, on a second server (its CDN) to which a file's address redirects.
"""

import hashlib
import json
import re
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import close_session, constants
from huggingface_hub.utils.sha import git_hash

COMMIT = "0123456789abcdef0123456789abcdef01234567"  # what every branch points at


@dataclass
class FakeHub:
    """`repositories` maps `owner/name` to a folder. What went wrong or was served is by `owner/name/file`."""

    repositories: dict[str, Path]
    url: str = ""
    cdn: str = ""
    asked: list[tuple[str, str, str]] = field(default_factory=list)  # repository, revision, file
    listed: list[tuple[str, str]] = field(default_factory=list)  # repository, revision
    served: Counter[str] = field(default_factory=Counter)  # bytes of content
    requests: Counter[str] = field(default_factory=Counter)  # for content
    tokens: set[tuple[str, str | None]] = field(default_factory=set)  # of all requests: server, Authorization
    # faults; lists are used up from the front
    cut_after: dict[str, list[int]] = field(default_factory=dict)  # the connection drops after so many bytes
    corrupt: set[str] = field(default_factory=set)  # one bit of the content is wrong
    answers: list[int] = field(default_factory=list)  # HTTP statuses instead of content
    refusal: tuple[int, str] | None = None  # status and error code of every request to the hub
    ignores_ranges: bool = False

    @property
    def content_bytes(self) -> int:
        return self.served.total()

    def forget(self) -> None:
        """Start counting again."""
        for log in (self.asked, self.listed, self.served, self.requests, self.tokens):
            log.clear()


@cache
def digests(path: Path, modified: int) -> tuple[str, str]:
    """SHA-256, and git's hash."""
    data = path.read_bytes()
    return hashlib.sha256(data).hexdigest(), git_hash(data)


def is_lfs(path: Path) -> bool:
    return path.suffix == ".safetensors"


def etag(path: Path) -> str:
    sha256, git = digests(path, path.stat().st_mtime_ns)
    return sha256 if is_lfs(path) else git


class Request(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # header and body are sent apart
    hub: FakeHub

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        raise NotImplementedError

    def reply(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def refuse(self, status: int, code: str) -> None:
        self.reply(status, b'{"error": "refused"}', X_Error_Code=code)

    def send_content(self, repository: str, path: Path, **headers: str) -> None:
        """All of it or the range asked for, with the faults that are due."""
        hub = self.hub
        key = f"{repository}/{path.relative_to(hub.repositories[repository]).as_posix()}"
        data = path.read_bytes()
        if self.command == "HEAD":
            self.send_response(200)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            return
        hub.requests[key] += 1
        if hub.answers:
            self.reply(hub.answers.pop(0))
            return
        if key in hub.corrupt:
            data = data[:-1] + bytes([data[-1] ^ 1])
        start = 0
        if (range_ := self.headers.get("Range")) and not hub.ignores_ranges:
            start = int(re.fullmatch(r"bytes=(\d+)-", range_)[1])
            headers["Content_Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        self.send_response(206 if start else 200)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        sent = data[start:]
        if hub.cut_after.get(key):
            sent = sent[: hub.cut_after[key].pop(0)]
            self.close_connection = True
        hub.served[key] += len(sent)
        self.wfile.write(sent)


class HubRequest(Request):
    def answer(self) -> None:
        hub = self.hub
        hub.tokens.add(("hub", self.headers.get("Authorization")))
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        if hub.refusal:
            self.refuse(*hub.refusal)
        elif parts[:2] == ["api", "models"] and len(parts) >= 4:
            self.answer_api("/".join(parts[2:4]), *parts[4:])
        elif len(parts) >= 5 and parts[2] == "resolve":
            self.answer_file("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        else:
            self.refuse(404, "RepoNotFound")

    def answer_api(self, repository: str, verb: str = "revision", revision: str = "main") -> None:
        if repository not in self.hub.repositories:
            self.refuse(404, "RepoNotFound")
            return
        folder = self.hub.repositories[repository]
        self.hub.listed.append((repository, revision))
        if verb == "tree":
            answer = [self.entry(folder, path) for path in sorted(folder.rglob("*"))]
        else:
            answer = {"id": repository, "sha": COMMIT}
        self.reply(200, json.dumps(answer).encode(), Content_Type="application/json")

    @staticmethod
    def entry(folder: Path, path: Path) -> dict:
        name = path.relative_to(folder).as_posix()
        if path.is_dir():
            return {"type": "directory", "path": name, "oid": COMMIT}
        size, oid = path.stat().st_size, digests(path, path.stat().st_mtime_ns)[1]
        entry = {"type": "file", "path": name, "size": size, "oid": oid}
        if is_lfs(path):
            entry["lfs"] = {"oid": etag(path), "size": size, "pointerSize": 134}
        return entry

    def answer_file(self, repository: str, revision: str, name: str) -> None:
        if repository not in self.hub.repositories:
            self.refuse(404, "RepoNotFound")
            return
        self.hub.asked.append((repository, revision, name))
        path = self.hub.repositories[repository] / name
        if not path.is_file():
            self.refuse(404, "EntryNotFound")
            return
        headers = {"X_Repo_Commit": revision if len(revision) == 40 else COMMIT}
        if is_lfs(path):
            linked = {"X_Linked_Etag": f'"{etag(path)}"', "X_Linked_Size": str(path.stat().st_size)}
            self.reply(302, Location=f"{self.hub.cdn}/{repository}/{name}", **headers, **linked)
        else:
            self.send_content(repository, path, ETag=f'"{etag(path)}"', **headers)


class CdnRequest(Request):
    def answer(self) -> None:
        self.hub.tokens.add(("cdn", self.headers.get("Authorization")))
        owner, name, *inside = unquote(urlsplit(self.path).path).strip("/").split("/")
        repository = f"{owner}/{name}"
        self.send_content(repository, self.hub.repositories[repository].joinpath(*inside))


def _quiet(*_: object) -> None:
    pass


@contextmanager
def fake_hub(repositories: dict[str, Path]) -> Iterator[FakeHub]:
    """Serve `repositories` on 127.0.0.1 while the block runs."""
    hub = FakeHub(repositories)
    servers = []
    for kind in (HubRequest, CdnRequest):
        handler = type(kind.__name__, (kind,), {"hub": hub, "log_message": _quiet})
        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), handler))
        threading.Thread(target=servers[-1].serve_forever, args=(0.02,), daemon=True).start()
    hub.url, hub.cdn = (f"http://127.0.0.1:{server.server_port}" for server in servers)
    try:
        yield hub
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()


@contextmanager
def asking(hub: FakeHub, cache: Path) -> Iterator[pytest.MonkeyPatch]:
    """In this process huggingface_hub asks `hub` and keeps in `cache`, as by HF_ENDPOINT and HF_HUB_CACHE."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", hub.url)
        patch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        patch.setattr(constants, "HF_HUB_CACHE", str(cache))
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
            patch.delenv(name, raising=False)
            patch.delenv(name.lower(), raising=False)
        close_session()
        yield patch
        close_session()
