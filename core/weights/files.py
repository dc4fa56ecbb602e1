"""Where a source's files lie on this machine, and whether they are whole. Nothing is loaded here.

Each source is looked for by itself: an explicit folder, the hub caches, the models baked into the image. What
is nowhere is fetched into the hub cache, where that is allowed.
"""

import json
import logging
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import constants, is_offline_mode
from safetensors import SafetensorError, safe_open

from core.errors import ModelError
from core.settings import Settings
from core.weights.hub import PlainFolder, Snapshot, fetch, partial_of
from core.weights.profiles import ModelProfile, Source

log = logging.getLogger(__name__)


def locate(source: Source, settings: Settings) -> Path:
    """The folder that has all files of `source`, fetched if it must and may be.

    Raises ModelError with one sentence.
    """
    if folder := find(source, settings):
        return folder
    if forbidden := _why_not_fetched(settings):
        raise _not_found(source, settings, forbidden)
    cache = Path(constants.HF_HUB_CACHE)
    log.info("fetching %s into %s", source, cache)
    ((snapshot, _),) = fetch([source], Snapshot, cache)
    return snapshot.folder


def find(source: Source, settings: Settings) -> Path | None:
    """As `locate`, without the hub: None where no folder has all files. An explicit folder is not questioned.

    Raises ModelError when an explicit folder does not exist.
    """
    if source.is_folder:
        folder = Path(source.location).expanduser()
        if not folder.is_dir():
            raise ModelError(f"The model folder {folder} does not exist.")
        return folder
    for folder in _places(source, settings):
        if folder.is_dir() and not missing_files(folder, source):
            if folder.parent.name == "snapshots" and folder.name != (source.revision or folder.name):
                log.warning("%s: not its revision %s but %s is cached", source, source.revision, folder.name)
            return folder
    return None


def check_files(folder: Path, source: Source) -> None:
    """Raise ModelError naming the file of `source` that is missing, half-written or damaged.

    Of weights only the headers are read: they say how long the file must be.
    """
    for part in source.parts:
        path = folder / part.folder
        for name in part.files:
            _check_small(path / name)
        if part.checkpoint is not None:
            _check_weights(path, part.checkpoint)


def check_sources(profile: ModelProfile, settings: Settings) -> None:
    """Whether a worker could start: raises ModelError for files that are damaged, or missing for good."""
    for source in profile.sources(profile.direction):
        if folder := find(source, settings):
            check_files(folder, source)
        elif forbidden := _why_not_fetched(settings):
            raise _not_found(source, settings, forbidden)


def missing_files(folder: Path, source: Source) -> list[str]:
    """Which files of `source` are not in `folder`, without a look into those that are."""
    missing = []
    for part in source.parts:
        names = [*part.files]
        if part.checkpoint is not None:
            names += checkpoint_files(folder / part.folder, part.checkpoint)
        missing += [path for name in names if not (folder / (path := part.path(name))).is_file()]
    return missing


def checkpoint_files(folder: Path, checkpoint: str) -> list[str]:
    """Names of the weight files: those that the index in `folder` lists, or the only one."""
    index = folder / f"{checkpoint}.safetensors.index.json"
    return [*_shards(index)] if index.is_file() else [f"{checkpoint}.safetensors"]


def hub_caches(settings: Settings) -> list[Path]:
    """The environment's cache, and the network volume's, where RunPod has its cached models."""
    return [Path(constants.HF_HUB_CACHE), settings.volume_dir / "huggingface-cache" / "hub"]


def _places(source: Source, settings: Settings) -> Iterator[Path]:
    """Where a hub's model may lie: at its revision, at any (RunPod caches the newest), baked."""
    wanted = [Snapshot(source, cache).folder for cache in hub_caches(settings)]
    yield from wanted
    for folder in wanted:
        yield from sorted(folder.parent.glob("*/"), key=lambda other: -other.stat().st_mtime)
    yield PlainFolder(source, settings.baked_models_dir).folder


def _why_not_fetched(settings: Settings) -> str | None:
    if is_offline_mode():
        return "HF_HUB_OFFLINE is set"
    return None if settings.allow_download else "ALLOW_DOWNLOAD is false"


def _not_found(source: Source, settings: Settings, forbidden: str) -> ModelError:
    places = [*map(str, dict.fromkeys(hub_caches(settings))), str(settings.baked_models_dir)]
    half = next((folder for folder in _places(source, settings) if folder.is_dir()), None)
    but = f" ({half} lacks {missing_files(half, source)[0]})" if half else ""
    return ModelError(
        f"The model {source}, revision {source.revision or 'main'}, is not in {' or '.join(places)}{but}, "
        f"and {forbidden}; `python -m builder.fetch_models` fetches it."
    )


def _check_small(path: Path) -> None:
    _check_there(path)
    if path.suffix == ".json":
        _read_json(path)


def _check_weights(folder: Path, checkpoint: str) -> None:
    single, index = folder / f"{checkpoint}.safetensors", folder / f"{checkpoint}.safetensors.index.json"
    if index.is_file():
        for shard, names in _shards(index).items():
            if lacking := sorted(names - _tensors(folder / shard)):
                raise ModelError(
                    f"The model file {folder / shard} lacks {len(lacking)} of the tensors that {index.name} "
                    f"has there, the first {lacking[0]}."
                )
    if single.is_file() or not index.is_file():
        _tensors(single)


def _shards(index: Path) -> dict[str, set[str]]:
    """Tensor names by the file that has them."""
    shards: dict[str, set[str]] = {}
    try:
        for name, shard in _read_json(index)["weight_map"].items():
            shards.setdefault(shard, set()).add(name)
    except (KeyError, TypeError, AttributeError):
        raise ModelError(f"The model file {index} is damaged: it is no index of weights.") from None
    return shards


def _tensors(path: Path) -> set[str]:
    """The names in a weight file whose header is sound and whose length is what the header says."""
    _check_there(path)
    try:
        with safe_open(path, framework="numpy") as file:
            return set(file.keys())
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"The model file {path} is damaged or half-written ({path.stat().st_size} bytes): {error}."
        ) from error


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"The model file {path} is damaged: {error}.") from error


def _check_there(path: Path) -> None:
    if path.is_file():
        return
    begun = " (its download was cut off)" if partial_of(path).is_file() else ""
    raise ModelError(f"The model file {path} is missing{begun}.")
