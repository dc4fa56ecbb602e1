"""Where a source is found, in which order, and which of its files is at fault when it is not whole."""

import json
import logging
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import constants

from core.errors import ModelError
from core.settings import Settings, SettingsError
from core.weights.files import check_files, check_sources, find, locate, missing_files
from core.weights.hub import PlainFolder, Snapshot, partial_of
from core.weights.profiles import HUNYUAN, TRANSFORMER, Source, load_profile
from tests.fake_hub import COMMIT, asking, fake_hub
from tests.hub_files import NEEDED, default_sources, make_files, make_repositories

SOURCE = default_sources()[2]  # the I2V transformer
OWN = Source("someone/else", TRANSFORMER)
FIRST = "diffusion_pytorch_model-00001-of-00002.safetensors"
NEWER, NEWEST = "a" * 40, "b" * 40


@pytest.fixture
def settings(tmp_path) -> Settings:
    return Settings(volume_dir=tmp_path / "volume", baked_models_dir=tmp_path / "baked")


@pytest.fixture
def hub(tmp_path):
    """The hub's cache is `cache`, empty at first."""
    with fake_hub(make_repositories(tmp_path / "repositories")) as hub, asking(hub, tmp_path / "cache"):
        hub.repositories[OWN.location] = hub.repositories[SOURCE.location]
        yield hub


@pytest.fixture
def caches(hub, tmp_path) -> tuple[Path, Path]:
    """The environment's and the network volume's."""
    return tmp_path / "cache", tmp_path / "volume" / "huggingface-cache" / "hub"


def put(folder: Path, source: Source = SOURCE) -> Path:
    make_files(folder, NEEDED[source.parts])
    return folder


def test_the_order_in_which_a_source_is_looked_for(hub, caches, settings, tmp_path):
    """Everywhere at first; whenever it is found, it is taken away, and the next place has its turn."""
    cache, volume = caches
    explicit = put(tmp_path / "explicit")
    expected = [
        put(Snapshot(SOURCE, cache).folder),
        put(Snapshot(SOURCE, volume).folder),
        put(Snapshot(SOURCE, cache, NEWER).folder),
        put(Snapshot(SOURCE, volume, NEWER).folder),
        put(PlainFolder(SOURCE, settings.baked_models_dir).folder),
    ]
    assert locate(Source(str(explicit), TRANSFORMER), settings) == explicit
    for folder in expected:
        assert locate(SOURCE, settings) == folder
        shutil.rmtree(folder)
    assert hub.listed == []
    assert locate(SOURCE, settings) == Snapshot(SOURCE, cache).folder
    assert hub.content_bytes > 0


def test_each_source_is_looked_for_by_itself(hub, caches, settings, tmp_path):
    hunyuan, redux, i2v, f1 = default_sources()
    expected = {
        hunyuan: put(Snapshot(hunyuan, caches[1]).folder, hunyuan),
        redux: put(PlainFolder(redux, settings.baked_models_dir).folder, redux),
        i2v: Snapshot(i2v, caches[0]).folder,
        Source(str(tmp_path / "f1"), f1.parts): put(tmp_path / "f1", f1),
    }
    assert {source: locate(source, settings) for source in expected} == expected
    assert {repository for repository, _ in hub.listed} == {i2v.location}


@pytest.mark.parametrize("lacking", NEEDED[TRANSFORMER][:3])
def test_a_place_that_lacks_a_file_is_passed_over(hub, caches, settings, lacking):
    half = put(Snapshot(SOURCE, caches[0]).folder)
    (half / lacking).unlink()
    whole = put(PlainFolder(SOURCE, settings.baked_models_dir).folder)
    assert locate(SOURCE, settings) == whole
    shutil.rmtree(whole)
    assert locate(SOURCE, settings) == half
    assert missing_files(half, SOURCE) == []
    assert hub.requests.keys() == {f"{SOURCE}/{lacking}"}


def test_another_snapshot_is_used_with_a_warning_the_newest_first(caches, settings, caplog):
    caplog.set_level(logging.WARNING)
    for at, commit in enumerate((NEWER, NEWEST)):
        os.utime(put(Snapshot(SOURCE, caches[1], commit).folder), (at, at))
    assert locate(SOURCE, settings).name == NEWEST
    (message,) = (record.getMessage() for record in caplog.records)
    assert SOURCE.location in message and SOURCE.revision in message and NEWEST in message
    caplog.clear()
    put(Snapshot(SOURCE, caches[1]).folder)
    assert locate(SOURCE, settings).name == SOURCE.revision
    assert caplog.records == []


def test_a_model_of_ones_own_is_downloaded_once(hub, caches, settings):
    folder = locate(OWN, settings)
    assert folder == Snapshot(OWN, caches[0], COMMIT).folder
    hub.forget()
    put(Snapshot(OWN, caches[0], NEWER).folder)  # newer, but not what `main` was
    assert locate(OWN, settings) == folder
    assert hub.listed == []


@pytest.mark.parametrize("why", ["HF_HUB_OFFLINE", "ALLOW_DOWNLOAD"])
def test_what_is_nowhere_and_may_not_be_fetched_is_told_with_the_places(
    hub, caches, settings, monkeypatch, why
):
    if why == "HF_HUB_OFFLINE":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    else:
        settings = replace(settings, allow_download=False)
    with pytest.raises(ModelError, match=why) as error:
        locate(SOURCE, settings)
    for told in (SOURCE.location, SOURCE.revision, *map(str, caches), str(settings.baked_models_dir)):
        assert told in str(error.value)
    assert "`python -m builder.fetch_models`" in str(error.value)
    assert "\n" not in str(error.value)
    assert hub.listed == []


def test_what_a_half_done_snapshot_lacks_is_told(hub, caches, settings):
    half = put(Snapshot(SOURCE, caches[1]).folder)
    (half / FIRST).unlink()
    with pytest.raises(ModelError) as error:
        locate(SOURCE, replace(settings, allow_download=False))
    assert f"{half} lacks {FIRST}" in str(error.value)


def test_a_hub_that_fails_is_told(hub, settings):
    hub.refusal = (403, "GatedRepo")
    with pytest.raises(ModelError, match=f"{SOURCE} could not be fetched: .*accepted its terms"):
        locate(SOURCE, settings)


def shorten(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def drop_last_shard_tensor(path: Path) -> None:
    """The index has a tensor that its shard has not."""
    index = path.parent / "model.safetensors.index.json"
    mapping = json.loads(index.read_text())["weight_map"] | {"forgotten": path.name}
    index.write_text(json.dumps({"weight_map": mapping}))


def half_fetched(path: Path) -> None:
    path.rename(partial_of(path))


SHARD = "text_encoder/model-00001-of-00002.safetensors"
INDEX = "text_encoder/model.safetensors.index.json"
WEIGHTS = "vae/diffusion_pytorch_model.safetensors"
FAULTS = {
    "missing": (WEIGHTS, Path.unlink, "is missing"),
    "begun": (WEIGHTS, half_fetched, "is missing (its download was cut off)"),
    "a link to nothing": (
        WEIGHTS,
        lambda path: (path.unlink(), path.symlink_to("nothing")),
        "is missing",
    ),
    "no bytes": (WEIGHTS, lambda path: shorten(path, 0), "half-written (0 bytes)"),
    "five bytes": (WEIGHTS, lambda path: shorten(path, 5), "half-written (5 bytes)"),
    "cut in the header": (WEIGHTS, lambda path: shorten(path, 40), "half-written (40 bytes)"),
    "cut in the weights": (WEIGHTS, lambda path: shorten(path, 9000), "half-written (9000 bytes)"),
    "one byte less": (
        WEIGHTS,
        lambda path: shorten(path, path.stat().st_size - 1),
        "half-written",
    ),
    "one byte more": (WEIGHTS, lambda path: path.write_bytes(path.read_bytes() + b"x"), "damaged"),
    "zeros": (WEIGHTS, lambda path: path.write_bytes(bytes(path.stat().st_size)), "damaged"),
    "another file": (WEIGHTS, lambda path: path.write_bytes(b"<!DOCTYPE html>" * 99), "damaged"),
    "a shard missing": (SHARD, Path.unlink, "is missing"),
    "a shard cut short": (SHARD, lambda path: shorten(path, 9000), "half-written (9000 bytes)"),
    "a shard of another index": (SHARD, drop_last_shard_tensor, "lacks 1 of the tensors"),
    "no index": (INDEX, Path.unlink, "text_encoder/model.safetensors is missing"),
    "half an index": (INDEX, lambda path: shorten(path, 30), "is damaged"),
    "an index of nothing": (INDEX, lambda path: path.write_text("[]"), "no index of weights"),
    "no config": ("vae/config.json", Path.unlink, "is missing"),
    "an empty config": ("vae/config.json", lambda path: shorten(path, 0), "is damaged"),
    "half a tokenizer": ("tokenizer/tokenizer.json", lambda path: shorten(path, 9), "is damaged"),
    "no merges": ("tokenizer_2/merges.txt", Path.unlink, "is missing"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_file_at_fault_is_named(tmp_path, fault):
    name, spoil, told = FAULTS[fault]
    source = Source(str(tmp_path), HUNYUAN)
    put(tmp_path, source)
    check_files(tmp_path, source)
    spoil(tmp_path / name)
    with pytest.raises(ModelError) as error:
        check_files(tmp_path, source)
    sentence = str(error.value)
    assert str(tmp_path / name if fault != "no index" else tmp_path / "text_encoder") in sentence
    assert told in sentence
    assert sentence.endswith(".") and "\n" not in sentence


def test_only_headers_of_weights_are_read(tmp_path):
    """A change within the weights is `builder.fetch_models --verify`'s to find."""
    put(tmp_path)
    data = bytearray((tmp_path / FIRST).read_bytes())
    data[-1] ^= 1
    (tmp_path / FIRST).write_bytes(data)
    check_files(tmp_path, Source(str(tmp_path), TRANSFORMER))


def test_a_worker_that_could_start_passes(hub, caches, settings):
    """Without a download; `f1` is not looked for, as it is not loaded at start."""
    profile = load_profile(settings)
    check_sources(profile, settings)  # everything can be fetched
    assert hub.listed == []
    forbidden = replace(settings, allow_download=False)
    with pytest.raises(ModelError, match="ALLOW_DOWNLOAD"):
        check_sources(profile, forbidden)
    for source in profile.sources("i2v"):
        put(Snapshot(source, caches[1]).folder, source)
    check_sources(profile, forbidden)
    (Snapshot(SOURCE, caches[1]).folder / FIRST).write_bytes(b"")
    with pytest.raises(ModelError, match=FIRST):
        check_sources(profile, settings)


def test_an_explicit_folder_that_is_not_there_is_named(settings, tmp_path):
    with pytest.raises(ModelError, match=f"{tmp_path}/nowhere does not exist"):
        find(Source(str(tmp_path / "nowhere"), TRANSFORMER), settings)


@pytest.mark.parametrize(
    ("text", "value"),
    [("true", True), ("1", True), ("YES", True), ("False", False), ("0", False), ("no", False), ("", True)],
)
def test_allow_download_is_read(text, value):
    assert Settings.from_env({"ALLOW_DOWNLOAD": text}).allow_download is value


@pytest.mark.parametrize("text", ["maybe", "2", "on"])
def test_allow_download_is_yes_or_no(text):
    with pytest.raises(SettingsError, match="ALLOW_DOWNLOAD must be one of true, 1, yes, false, 0, no"):
        Settings.from_env({"ALLOW_DOWNLOAD": text})
