"""Fetching: which files, resumed how, refused when, and what a second run does. From a hub on 127.0.0.1."""

import shutil
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import snapshot_download, try_to_load_from_cache

from builder.fetch_models import main
from core.errors import ModelError
from core.weights import hub as fetching
from core.weights.hub import PlainFolder, Snapshot, fetch
from core.weights.profiles import HUNYUAN, TRANSFORMER, Source
from tests.fake_hub import COMMIT, FakeHub, asking, etag, fake_hub
from tests.fake_runpod import environment
from tests.hub_files import NEEDED, UNNEEDED, default_sources, make_files, make_repositories

ROOT = Path(__file__).parents[1]
HUNYUAN_SOURCE, _, I2V, F1 = default_sources()
SHARD = "diffusion_pytorch_model-00001-of-00002.safetensors"
LARGE = f"{I2V}/{SHARD}"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Asked by huggingface_hub in this process, whose cache is `cache`; no wait between attempts."""
    monkeypatch.setattr(fetching, "LONGEST_WAIT_S", 0.0)
    monkeypatch.setattr("huggingface_hub.utils._http.time", SimpleNamespace(sleep=lambda seconds: None))
    for name in ("MODEL_PROFILE", "FRAMEPACK_MODEL", "FRAMEPACK_F1_MODEL", "HUNYUAN_MODEL", "REDUX_MODEL"):
        monkeypatch.delenv(name, raising=False)
    with (
        fake_hub(make_repositories(tmp_path / "repositories")) as hub,
        asking(hub, tmp_path / "cache"),
    ):
        yield hub


@pytest.fixture(params=["hub cache", "folder"])
def place(request, tmp_path):
    """Both places that can be fetched into: the command's arguments, and where a source's files are then."""
    if request.param == "hub cache":
        return [], lambda source: Snapshot(source, tmp_path / "cache").folder
    to = tmp_path / "baked"
    return ["--to", str(to)], lambda source: PlainFolder(source, to).folder


def size(hub: FakeHub, key: str) -> int:
    owner, name, file = key.split("/", 2)
    return (hub.repositories[f"{owner}/{name}"] / file).stat().st_size


def files_in(folder: Path) -> set[str]:
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    return found - {PlainFolder.NOTE}


def one_line(capsys) -> str:
    """What the command says of its failure; the progress bar is ended by a line break."""
    error = capsys.readouterr().err
    assert "Traceback" not in error
    *_, line = error.splitlines()
    assert line.endswith(".")
    return line


def test_only_the_files_needed_are_fetched_at_the_pinned_revisions(hub, place):
    arguments, folder_of = place
    assert main(arguments) == 0
    for source in default_sources():
        assert files_in(folder_of(source)) == set(NEEDED[source.parts])
        repository = hub.repositories[source.location]
        for name in NEEDED[source.parts]:
            assert (folder_of(source) / name).read_bytes() == (repository / name).read_bytes()
    assert {(repository, revision) for repository, revision, _ in hub.asked} == {
        (source.location, source.revision) for source in default_sources()
    }
    assert hub.content_bytes == sum(
        size(hub, f"{source}/{name}") for source in default_sources() for name in NEEDED[source.parts]
    )


@pytest.mark.parametrize(("models", "absent"), [("i2v", F1), ("f1", I2V)])
def test_one_transformer_may_do(hub, models, absent):
    assert main(["--models", models]) == 0
    assert len(hub.listed) == 3
    assert absent.location not in {repository for repository, _ in hub.listed}


def test_a_second_run_does_nothing(hub, place, capsys):
    arguments, folder_of = place
    assert main(arguments) == 0
    before = {path: path.lstat().st_mtime_ns for path in folder_of(I2V).iterdir() if path.suffix != ".json"}
    hub.forget()
    assert main(arguments) == 0
    assert hub.content_bytes == 0
    assert not hub.requests and not hub.asked
    assert {path: path.lstat().st_mtime_ns for path in before} == before
    assert capsys.readouterr().out.count("nothing to fetch") == 4


def test_huggingface_hub_knows_what_was_fetched(hub):
    assert main([]) == 0
    hub.forget()
    for source in default_sources():
        folder = snapshot_download(source.location, revision=source.revision, local_files_only=True)
        for name in NEEDED[source.parts]:
            assert try_to_load_from_cache(source.location, name, revision=source.revision) == str(
                Path(folder) / name
            )
    allowed = NEEDED[HUNYUAN]
    snapshot_download(HUNYUAN_SOURCE.location, revision=HUNYUAN_SOURCE.revision, allow_patterns=allowed)
    assert hub.content_bytes == 0


def test_what_huggingface_hub_fetched_is_not_fetched_again(hub):
    """Also when it has fetched everything, needed or not."""
    for source in default_sources():
        snapshot_download(source.location, revision=source.revision)
    assert hub.content_bytes > 0
    hub.forget()
    assert main([]) == 0
    assert main(["--verify"]) == 0
    assert hub.content_bytes == 0


def test_a_dropped_connection_is_continued(hub, place):
    arguments, folder_of = place
    hub.cut_after[LARGE] = [5000, 1, 3000]
    assert main(arguments) == 0
    assert hub.requests[LARGE] == 4
    assert hub.served[LARGE] == size(hub, LARGE)  # no byte twice
    assert (folder_of(I2V) / SHARD).read_bytes() == (hub.repositories[I2V.location] / SHARD).read_bytes()


def test_a_run_goes_on_where_the_last_one_ended(hub, place, capsys):
    arguments, folder_of = place
    hub.cut_after[LARGE] = [9000, *[0] * fetching.ATTEMPTS]
    assert main(arguments) == 1
    assert "cannot be reached" in one_line(capsys)
    assert hub.served[LARGE] == 9000
    first = hub.served.copy()
    hub.forget()
    assert main(arguments) == 0
    assert hub.served[LARGE] == size(hub, LARGE) - 9000
    whole = sum(size(hub, f"{s}/{name}") for s in default_sources() for name in NEEDED[s.parts])
    assert first.total() + hub.content_bytes == whole
    assert (folder_of(I2V) / SHARD).read_bytes() == (hub.repositories[I2V.location] / SHARD).read_bytes()


def test_a_hub_that_ignores_ranges_is_asked_for_the_whole_file(hub):
    hub.cut_after[LARGE] = [5000]
    hub.ignores_ranges = True
    assert main([]) == 0
    assert hub.served[LARGE] == 5000 + size(hub, LARGE)
    assert (Snapshot(I2V, Path(fetching.constants.HF_HUB_CACHE)).folder / SHARD).stat().st_size == size(
        hub, LARGE
    )


@pytest.mark.parametrize("left", [-1000, 0, 1], ids=["too short", "of the right size", "too long"])
def test_a_half_file_that_is_wrong_is_begun_anew(hub, tmp_path, left):
    """Another revision's, perhaps."""
    folder = PlainFolder(I2V, tmp_path / "baked").folder
    folder.mkdir(parents=True)
    fetching.partial_of(folder / SHARD).write_bytes(bytes(size(hub, LARGE) + left))
    assert main(["--to", str(tmp_path / "baked")]) == 0
    assert hub.served[LARGE] == size(hub, LARGE) + max(0, -left)
    assert (folder / SHARD).read_bytes() == (hub.repositories[I2V.location] / SHARD).read_bytes()


def test_a_wrong_checksum_is_refused(hub, place, capsys):
    arguments, folder_of = place
    hub.corrupt = {LARGE}
    assert main(arguments) == 1
    line = one_line(capsys)
    assert SHARD in line and I2V.location in line and "checksum" in line
    whole = hub.repositories[I2V.location] / SHARD
    kept = folder_of(I2V) if arguments else folder_of(I2V).parents[1]
    assert not [path for path in kept.rglob("*") if path.name.startswith((SHARD, etag(whole)))]

    hub.corrupt = set()
    hub.forget()
    assert main(arguments) == 0
    assert hub.served[LARGE] == size(hub, LARGE)  # nothing of the wrong content was kept


def test_a_small_file_is_checked_too(hub, place, capsys):
    arguments, _ = place
    hub.corrupt = {f"{I2V}/config.json"}
    assert main(arguments) == 1
    assert "config.json" in one_line(capsys)


@pytest.mark.parametrize("statuses", [[503], [429, 500, 503]])
def test_a_busy_hub_is_asked_again(hub, statuses):
    hub.answers = [*statuses]
    assert main(["--workers", "1"]) == 0
    assert hub.answers == []


def test_a_hub_that_stays_busy_is_an_error(hub, capsys):
    hub.answers = [503] * 1000
    assert main([]) == 1
    assert "the hub answered 503" in one_line(capsys)


@pytest.mark.parametrize(
    ("status", "code", "told"),
    [
        (403, "GatedRepo", "accepted its terms"),
        (401, "RepoNotFound", "does not have it, or not for this HF_TOKEN"),
        (404, "RepoNotFound", "does not have it"),
        (404, "RevisionNotFound", f"its revision {HUNYUAN_SOURCE.revision}"),
        (403, "", "answered 403"),
    ],
)
def test_a_refusal_is_told_in_one_sentence(hub, status, code, told, capsys):
    hub.refusal = (status, code)
    assert main([]) == 1
    line = one_line(capsys)
    assert told in line and HUNYUAN_SOURCE.location in line
    assert "127.0.0.1" not in line


def test_a_hub_without_a_needed_file_is_refused(hub, capsys):
    (hub.repositories[HUNYUAN_SOURCE.location] / "vae" / "config.json").unlink()
    assert main([]) == 1
    assert "has no vae/config.json" in one_line(capsys)
    assert hub.content_bytes == 0


def test_too_little_space_is_found_before_anything_is_fetched(hub, place, monkeypatch, capsys):
    arguments, _ = place
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100_000))
    assert main(arguments) == 1
    assert "0.0 GB are free" in one_line(capsys)
    assert hub.content_bytes == 0


def test_a_place_that_cannot_be_written_is_named(hub, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["--to", str(tmp_path / "file")]) == 1
    assert "could not be fetched" in one_line(capsys)


def test_verifying_asks_nobody_and_removes_what_is_damaged(hub, place, capsys):
    arguments, folder_of = place
    assert main(arguments) == 0
    hub.forget()
    assert main([*arguments, "--verify"]) == 0
    damaged = folder_of(I2V) / SHARD
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1  # same size, sound header
    damaged.write_bytes(content)
    assert main([*arguments, "--verify"]) == 1
    assert str(damaged) in one_line(capsys)
    assert not damaged.exists()
    assert hub.listed == [] and hub.content_bytes == 0
    assert main([*arguments, "--verify"]) == 1
    assert f"{damaged} is missing" in one_line(capsys)

    assert main(arguments) == 0
    assert hub.content_bytes == size(hub, LARGE)
    assert main([*arguments, "--verify"]) == 0


def test_a_file_cut_short_later_is_fetched_again(hub, place):
    arguments, folder_of = place
    assert main(arguments) == 0
    hub.forget()
    (folder_of(I2V) / SHARD).write_bytes(b"short")
    assert main(arguments) == 0
    assert hub.content_bytes == size(hub, LARGE)
    assert (folder_of(I2V) / SHARD).stat().st_size == size(hub, LARGE)


def test_verifying_what_was_never_fetched_fails(hub, place, capsys):
    arguments, _ = place
    assert main([*arguments, "--verify"]) == 1
    assert "is missing" in one_line(capsys)


def test_a_folder_at_another_revision_is_brought_up_to_this_one(hub, tmp_path):
    """Same names, same sizes, other contents."""
    old = Source(I2V.location, TRANSFORMER, "f" * 40)
    fetch([old], PlainFolder, tmp_path / "baked")
    make_files(hub.repositories[I2V.location], NEEDED[TRANSFORMER], seed=9)
    hub.forget()
    assert main(["--to", str(tmp_path / "baked"), "--models", "i2v"]) == 0
    assert hub.served[LARGE] == size(hub, LARGE)
    new = PlainFolder(I2V, tmp_path / "baked").folder / SHARD
    assert new.read_bytes() == (hub.repositories[I2V.location] / SHARD).read_bytes()


def test_a_file_system_without_links_will_do(hub, monkeypatch, tmp_path):
    def no_links(*_):
        raise OSError("no links here")

    monkeypatch.setattr(Path, "symlink_to", no_links)
    tokenizers = hub.repositories[HUNYUAN_SOURCE.location]
    twice = "special_tokens_map.json"  # one content, two names
    shutil.copy(tokenizers / "tokenizer" / twice, tokenizers / "tokenizer_2" / twice)
    assert main([]) == 0
    hub.forget()
    assert main([]) == 0
    assert hub.content_bytes == 0
    assert main(["--verify"]) == 0
    for source in default_sources():
        assert files_in(Snapshot(source, tmp_path / "cache").folder) == set(NEEDED[source.parts])
    damaged = Snapshot(I2V, tmp_path / "cache").folder / SHARD
    damaged.write_bytes(bytes(size(hub, LARGE)))
    assert main(["--verify"]) == 1  # the hub is asked for the hashes
    assert not damaged.exists()


def test_two_at_once_fetch_everything_once(hub, tmp_path):
    outcomes = []
    runs = [threading.Thread(target=lambda: outcomes.append(main([]))) for _ in range(2)]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    assert outcomes == [0, 0]
    assert hub.served[LARGE] == size(hub, LARGE)


def test_the_token_goes_to_the_hub_alone(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert main([]) == 0
    assert hub.tokens == {("hub", "Bearer hf_secret"), ("cdn", None)}


def test_a_model_of_ones_own_is_fetched_as_it_is_now(hub, monkeypatch, tmp_path):
    hub.repositories["someone/else"] = hub.repositories[I2V.location]
    monkeypatch.setenv("FRAMEPACK_MODEL", "someone/else")
    assert main(["--models", "i2v"]) == 0
    own = Source("someone/else", TRANSFORMER)
    assert Snapshot(own, tmp_path / "cache").folder.name == COMMIT
    hub.forget()
    assert main(["--models", "i2v"]) == 0
    assert hub.content_bytes == 0


@pytest.mark.parametrize("to", [[], ["--to", "baked"]])
def test_one_repository_may_be_several_sources(hub, monkeypatch, tmp_path, to):
    monkeypatch.chdir(tmp_path)
    whole = tmp_path / "whole"
    for source in default_sources():
        make_files(whole, NEEDED[source.parts])
    hub.repositories["me/all"] = whole
    for name in ("HUNYUAN_MODEL", "REDUX_MODEL", "FRAMEPACK_MODEL"):
        monkeypatch.setenv(name, "me/all")
    assert main([*to, "--models", "i2v"]) == 0
    hub.forget()
    assert main([*to, "--models", "i2v"]) == 0
    assert hub.content_bytes == 0
    assert main([*to, "--models", "i2v", "--verify"]) == 0


def test_a_name_that_is_no_hub_id_is_refused(hub, monkeypatch, capsys):
    monkeypatch.setenv("FRAMEPACK_MODEL", "a/b/c")
    assert main([]) == 1
    assert "neither a folder nor a hub id" in one_line(capsys)


def test_folders_are_not_fetched(hub, monkeypatch):
    monkeypatch.setenv("MODEL_PROFILE", "demo")
    assert main([]) == 0
    assert hub.listed == []


def test_files_outside_their_folder_are_never_taken():
    taken = [name for parts in NEEDED.values() for name in parts]
    assert all(any(Source("a/b", parts).takes(name) for parts in NEEDED) for name in taken)
    for name in (
        "tokenizer/../../x",
        "tokenizer/..",
        "/etc/passwd",
        "tokenizer/sub/x.json",
        "../config.json",
    ):
        assert not Source("a/b", HUNYUAN).takes(name)
        assert not Source("a/b", TRANSFORMER).takes(name)


def test_the_unneeded_files_are_there_to_be_left(hub):
    for source in default_sources():
        for name in UNNEEDED[source.parts]:
            assert (hub.repositories[source.location] / name).is_file()


def test_fetching_offline_is_refused(hub, monkeypatch):
    monkeypatch.setattr(fetching.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="HF_HUB_OFFLINE forbids it"):
        fetch([I2V], Snapshot, Path(fetching.constants.HF_HUB_CACHE))


def test_the_command_ends_with_status_1_and_one_line(hub, tmp_path):
    """In a process of its own, as in an image build."""
    hub.corrupt = {LARGE}
    command = [
        sys.executable,
        "-m",
        "builder.fetch_models",
        "--models",
        "i2v",
        "--to",
        str(tmp_path / "baked"),
    ]
    variables = {"MODEL_PROFILE": "framepack", "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0"}
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=environment(**variables, HF_HUB_DISABLE_PROGRESS_BARS="1"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert SHARD in line and "checksum" in line
