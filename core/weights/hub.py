"""Fetching models from the hub: only the files needed, several at once, resumed, and their hashes checked.

huggingface_hub lists the files and sends the requests. Its own downloads begin a file anew in every process,
and show it in the cache without having compared its hash.
"""

import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx2
from huggingface_hub import HfApi, constants, hf_hub_url
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import (
    WeakFileLock,
    build_hf_headers,
    hf_raise_for_status,
    http_stream_backoff,
    tqdm,
)
from huggingface_hub.utils.sha import git_hash

from core.errors import ModelError
from core.weights.profiles import Source

WORKERS = 8
ATTEMPTS = 5  # at a file, since its last byte arrived
LONGEST_WAIT_S = 8.0  # between two of them
PARTIAL = ".incomplete"  # added to the name of a file that is being fetched
GB = 1e9


@dataclass(frozen=True)
class HubFile:
    """A file of a repository. `digest` is its SHA-256; for a small one, outside LFS, git's own hash."""

    path: str
    size: int
    digest: str

    def is_content(self, path: Path) -> bool:
        with path.open("rb") as file:
            if len(self.digest) == 64:
                return hashlib.file_digest(file, "sha256").hexdigest() == self.digest
            return git_hash(file.read()) == self.digest


class Snapshot:
    """A source in a hub cache, laid out as huggingface_hub does: a revision's folder of links to `blobs/`."""

    def __init__(self, source: Source, root: Path, commit: str | None = None) -> None:
        """Without a `commit`: the pinned one, or what `main` was when it was last fetched."""
        self.source = source
        self.root = root
        self.name = repo_folder_name(repo_id=source.location, repo_type="model")
        self._main = root / self.name / "refs" / "main"
        self.commit = commit or source.revision or self._last_main()
        self.folder = root / self.name / "snapshots" / self.commit

    def content(self, file: HubFile) -> Path:
        return self.root / self.name / "blobs" / file.digest

    def has(self, file: HubFile) -> bool:
        return file.size in (size_of(self.content(file)), size_of(self.folder / file.path))

    def finish(self, files: list[HubFile]) -> None:
        """Show the files, all fetched by now: a snapshot is never seen half done."""
        digests = [file.digest for file in files]
        for file in files:
            link, content = self.folder / file.path, self.content(file)
            if size_of(link) == file.size:
                continue
            link.parent.mkdir(parents=True, exist_ok=True)
            link.unlink(missing_ok=True)
            try:
                link.symlink_to(os.path.relpath(content, link.parent))
            except OSError:  # a file system without links
                (shutil.copyfile if digests.count(file.digest) > 1 else os.replace)(content, link)
        if self.source.revision is None:
            self._main.parent.mkdir(exist_ok=True)
            self._main.write_text(self.commit, encoding="utf-8")

    def known_files(self) -> list[HubFile]:
        """The files here, by the hashes that their contents are named by; none where a file is no link."""
        links = {path.relative_to(self.folder).as_posix(): path for path in sorted(self.folder.rglob("*"))}
        links = {name: path for name, path in links.items() if self.source.takes(name)}
        if not all(path.is_symlink() for path in links.values()):
            return []
        return [HubFile(name, size_of(path), path.readlink().name) for name, path in links.items()]

    def remove(self, file: HubFile) -> None:
        (self.folder / file.path).unlink(missing_ok=True)
        self.content(file).unlink(missing_ok=True)

    def _last_main(self) -> str:
        return self._main.read_text(encoding="utf-8").strip() if self._main.is_file() else "main"


class PlainFolder:
    """A source in a folder of its own, as baked into an image, with a note of the hub's hashes."""

    NOTE = ".fetched.json"

    def __init__(self, source: Source, root: Path, commit: str | None = None) -> None:
        self.source = source
        self.root = root
        self.name = source.location.replace("/", "--")
        self.commit = commit
        self.folder = root / self.name

    def content(self, file: HubFile) -> Path:
        return self.folder / file.path

    def has(self, file: HubFile) -> bool:
        path = self.content(file)
        return size_of(path) == file.size and (file in self.known_files() or file.is_content(path))

    def finish(self, files: list[HubFile]) -> None:
        noted = {file.path: vars(file) for file in [*self.known_files(), *files]}
        note = {"repository": self.source.location, "revision": self.commit, "files": [*noted.values()]}
        (self.folder / self.NOTE).write_text(json.dumps(note, indent=1), encoding="utf-8")

    def known_files(self) -> list[HubFile]:
        """The files as the hub described them when they were fetched."""
        try:
            note = json.loads((self.folder / self.NOTE).read_text(encoding="utf-8"))
            return [HubFile(**file) for file in note["files"]]
        except (OSError, ValueError, KeyError, TypeError):
            return []

    def remove(self, file: HubFile) -> None:
        self.content(file).unlink(missing_ok=True)


Store = Snapshot | PlainFolder


def needed_files(source: Source) -> tuple[str, list[HubFile]]:
    """The hub's commit of `source`, and the files that are needed of it. Raises ModelError."""
    with _explained(source):
        api = HfApi()
        commit = source.revision or api.model_info(source.location).sha
        files = {
            entry.path: HubFile(entry.path, entry.size, entry.lfs.sha256 if entry.lfs else entry.blob_id)
            for entry in api.list_repo_tree(source.location, recursive=True, revision=commit)
            if isinstance(entry, RepoFile) and source.takes(entry.path)
        }
    for part in source.parts:
        if part.checkpoint is not None and part.path(f"{part.checkpoint}.safetensors.index.json") in files:
            files.pop(part.path(f"{part.checkpoint}.safetensors"), None)  # the same weights again
        elif part.checkpoint is not None and part.path(f"{part.checkpoint}.safetensors") not in files:
            raise ModelError(f"The hub's {source} has no {part.path(part.checkpoint)}.safetensors.")
        for name in part.files:
            if part.path(name) not in files:
                raise ModelError(f"The hub's {source} has no {part.path(name)}.")
    return commit, [*files.values()]


def fetch(
    sources: Sequence[Source], store_type: type[Store], root: Path, workers: int = WORKERS
) -> list[tuple[Store, list[HubFile]]]:
    """Have `sources` whole below `root`; returns for each where it is, and the files that had to be fetched.

    Another process that wants the same waits. Whatever was fetched before an error is kept, half files too.
    Raises ModelError with one sentence.
    """
    with ExitStack() as locks:
        needed: list[tuple[Store, list[HubFile]]] = []
        for source in sources:
            commit, files = needed_files(source)
            store = store_type(source, root, commit)
            if store.name not in {other.name for other, _ in needed}:  # one repository may be several sources
                locks.enter_context(_locked(store))
            needed.append((store, files))
        missing = [(store, [file for file in files if not store.has(file)]) for store, files in needed]
        # by content: a repository may have the same under two names
        transfers = {store.content(file): (store, file) for store, files in missing for file in files}
        if transfers:
            _check_space(root, transfers)
            _fetch_all([*transfers.values()], workers)
        for store, files in needed:
            with _explained(store.source):
                store.finish(files)
    return missing


def damaged_files(store: Store, workers: int = WORKERS) -> list[HubFile]:
    """The files here that differ from the hub's. The hub is asked only where their hashes are not known."""
    files = store.known_files() or needed_files(store.source)[1]
    present = [file for file in files if (store.folder / file.path).is_file()]

    def is_right(file: HubFile) -> bool:
        path = store.folder / file.path
        return size_of(path) == file.size and file.is_content(path)

    damaged = []
    with (
        tqdm(total=sum(file.size for file in present), unit="B", unit_scale=True, desc="Checking") as bar,
        ThreadPoolExecutor(workers) as pool,
    ):
        for file, right in zip(present, pool.map(is_right, present), strict=True):
            bar.update(file.size)
            if not right:
                damaged.append(file)
    return damaged


def size_of(path: Path) -> int:
    """In bytes; -1 where there is no file."""
    return path.stat().st_size if path.is_file() else -1


def partial_of(path: Path) -> Path:
    """Where the file is while it is being fetched."""
    return path.with_name(path.name + PARTIAL)


@contextmanager
def _locked(store: Store) -> Iterator[None]:
    with ExitStack() as stack:
        with _explained(store.source):
            lock = store.root / ".locks" / f"{store.name}.fetch.lock"
            lock.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(WeakFileLock(lock))
        yield


def _check_space(root: Path, transfers: dict[Path, tuple[Store, HubFile]]) -> None:
    needed = sum(file.size - max(0, size_of(partial_of(path))) for path, (_, file) in transfers.items())
    free = shutil.disk_usage(root).free
    if needed > free:
        raise ModelError(
            f"The models need {needed / GB:.1f} GB in {root}, where {free / GB:.1f} GB are free."
        )


def _fetch_all(transfers: list[tuple[Store, HubFile]], workers: int) -> None:
    transfers.sort(key=lambda transfer: -transfer[1].size)  # no large one left to go alone at the end
    total = sum(file.size for _, file in transfers)
    stop = threading.Event()
    with (
        tqdm(total=total, unit="B", unit_scale=True, desc="Fetching models") as bar,
        ThreadPoolExecutor(workers) as pool,
    ):
        futures = [pool.submit(_fetch_file, store, file, bar.update, stop) for store, file in transfers]
        try:
            for future in as_completed(futures):
                future.result()
        except BaseException:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _fetch_file(store: Store, file: HubFile, advance: Callable[[int], object], stop: threading.Event) -> None:
    content = store.content(file)
    partial = partial_of(content)
    url = hf_hub_url(store.source.location, file.path, revision=store.commit)
    with _explained(store.source):
        content.parent.mkdir(parents=True, exist_ok=True)
        while True:
            resumed = size_of(partial) > 0
            _transfer(url, partial, file.size, advance, stop)
            if stop.is_set():
                return
            if file.is_content(partial):
                partial.replace(content)
                return
            advance(-size_of(partial))
            partial.unlink()
            if not resumed:  # else the fault may lie in what an earlier run left
                raise ModelError(
                    f"{file.path} of {store.source} did not arrive as the hub has it (its checksum differs), "
                    "and was removed; fetch it again."
                )


def _transfer(
    url: str, partial: Path, size: int, advance: Callable[[int], object], stop: threading.Event
) -> None:
    """Append to `partial` what it lacks of `size` bytes, over as many connections as it takes."""
    partial.touch()
    advance(size_of(partial))
    failures = 0
    while (have := size_of(partial)) < size and not stop.is_set():
        try:
            _append(url, partial, size, advance, stop)
        except httpx2.TransportError:
            failures = 0 if size_of(partial) > have else failures + 1
            if failures == ATTEMPTS:
                raise
            stop.wait(min(2.0**failures, LONGEST_WAIT_S))


def _append(
    url: str, partial: Path, size: int, advance: Callable[[int], object], stop: threading.Event
) -> None:
    have = size_of(partial)
    headers = build_hf_headers() | {"Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    with http_stream_backoff(
        "GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT, retry_on_exceptions=()
    ) as response:
        hf_raise_for_status(response)
        with partial.open("ab") as file:
            if have and response.status_code != 206:  # the whole file, in spite of the range
                file.truncate(0)
                advance(-have)
            for chunk in response.iter_bytes():
                file.write(chunk)
                advance(len(chunk))
                if stop.is_set() or file.tell() > size:
                    return


@contextmanager
def _explained(source: Source) -> Iterator[None]:
    """Whatever the hub, the network or the disk does wrong, in one sentence without addresses."""
    try:
        yield
    except GatedRepoError:
        problem = "the hub has it only for those who accepted its terms; do so on its page, and set HF_TOKEN"
    except RepositoryNotFoundError:
        problem = "the hub does not have it, or not for this HF_TOKEN"
    except RevisionNotFoundError:
        problem = f"the hub does not have its revision {source.revision}"
    except HfHubHTTPError as error:
        problem = f"the hub answered {error.response.status_code}"
    except HFValidationError:
        problem = "it is neither a folder nor a hub id"
    except ValueError:
        problem = "what answered is no hub"
    except httpx2.HTTPError as error:
        problem = f"the hub cannot be reached ({type(error).__name__})"
    except OfflineModeIsEnabled:
        problem = "HF_HUB_OFFLINE forbids it"
    except OSError as error:
        problem = error.strerror or type(error).__name__
    else:
        return
    raise ModelError(f"The model {source} could not be fetched: {problem}.")
