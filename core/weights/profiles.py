"""Which models a profile uses, where they come from, and which of their files it needs."""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from core.settings import Settings

Direction = Literal["i2v", "f1"]

DEMO_MODELS = Path(__file__).parents[2] / "models" / "demo"


@dataclass(frozen=True)
class Part:
    """What one loader reads: a folder of a source, "" being its root."""

    folder: str
    files: tuple[str, ...]  # without these it is not whole
    checkpoint: str | None = None  # weights: `<checkpoint>.safetensors`, or numbered shards with their index
    unused_layers: int = 0  # the last ones of those that config.json counts, which are never loaded

    def path(self, name: str) -> str:
        """Of the file `name`, from the source's root."""
        return f"{self.folder}/{name}" if self.folder else name

    def takes(self, path: str) -> bool:
        """Whether the hub's file at `path` is of use: no other format's or precision's copy of the weights.

        A part without a checkpoint is small, and taken whole.
        """
        folder, _, name = path.rpartition("/")
        if folder != self.folder:
            return False
        if self.checkpoint is None:
            return re.fullmatch(r"\w[\w.-]*", name) is not None
        weights = rf"{self.checkpoint}(-\d{{5}}-of-\d{{5}})?\.safetensors(\.index\.json)?"
        return name in self.files or re.fullmatch(weights, name) is not None


TRANSFORMER = (Part("", ("config.json",), "diffusion_pytorch_model"),)
HUNYUAN = (
    Part("tokenizer", ("tokenizer.json", "tokenizer_config.json")),
    Part("tokenizer_2", ("vocab.json", "merges.txt", "tokenizer_config.json")),
    Part("text_encoder", ("config.json",), "model", unused_layers=2),
    Part("text_encoder_2", ("config.json",), "model"),
    Part("vae", ("config.json",), "diffusion_pytorch_model"),
)
REDUX = (
    Part("feature_extractor", ("preprocessor_config.json",)),
    Part("image_encoder", ("config.json",), "model"),
)


@dataclass(frozen=True)
class Source:
    """A hub id with its pinned revision, or a folder in the hub's layout."""

    location: str
    parts: tuple[Part, ...]
    revision: str | None = None

    @property
    def is_folder(self) -> bool:
        """Hub ids are `owner/name`; what exists on disk, or is written as a path, is a folder."""
        path = Path(self.location)
        return path.is_dir() or path.is_absolute() or self.location.startswith((".", "~"))

    def takes(self, path: str) -> bool:
        return any(part.takes(path) for part in self.parts)

    def __str__(self) -> str:
        return self.location


@dataclass(frozen=True)
class ModelProfile:
    """A worker's models: a transformer for each direction, shared encoders and VAE, and its own defaults."""

    name: str
    direction: Direction  # the transformer loaded at start, and a request's default
    transformers: dict[Direction, Source]
    hunyuan: Source
    redux: Source
    resolution: int

    def sources(self, *directions: Direction) -> list[Source]:
        """All that is needed to serve `directions`."""
        return [self.hunyuan, self.redux, *(self.transformers[direction] for direction in directions)]


def load_profile(settings: Settings) -> ModelProfile:
    """The profile named by `settings`, with its sources replaced where the environment says so."""
    profile = _demo() if settings.model_profile == "demo" else _framepack(settings.model_profile)
    i2v, f1 = profile.transformers["i2v"], profile.transformers["f1"]
    return ModelProfile(
        name=profile.name,
        direction=profile.direction,
        transformers={
            "i2v": _chosen(settings.framepack_model, i2v),
            "f1": _chosen(settings.framepack_f1_model, f1),
        },
        hunyuan=_chosen(settings.hunyuan_model, profile.hunyuan),
        redux=_chosen(settings.redux_model, profile.redux),
        resolution=profile.resolution,
    )


def _chosen(location: str | None, default: Source) -> Source:
    """An explicit location has no pinned revision, unless it is the default's own hub id."""
    if location in (None, default.location):
        return default
    return replace(default, location=location, revision=None)


def _framepack(name: str) -> ModelProfile:
    return ModelProfile(
        name=name,
        direction="f1" if name == "framepack-f1" else "i2v",
        transformers={
            "i2v": Source(
                "lllyasviel/FramePackI2V_HY", TRANSFORMER, "86cef4396041b6002c957852daac4c91aaa47c79"
            ),
            "f1": Source(
                "lllyasviel/FramePack_F1_I2V_HY_20250503",
                TRANSFORMER,
                "ab239828e0b384fed75580f186f078717d4020f7",
            ),
        },
        hunyuan=Source(
            "hunyuanvideo-community/HunyuanVideo", HUNYUAN, "e8c2aaa66fe3742a32c11a6766aecbf07c56e773"
        ),
        redux=Source("lllyasviel/flux_redux_bfl", REDUX, "45b801affc54ff2af4e5daf1b282e0921901db87"),
        resolution=640,
    )


def _demo() -> ModelProfile:
    return ModelProfile(
        name="demo",
        direction="i2v",
        transformers=dict.fromkeys(("i2v", "f1"), Source(str(DEMO_MODELS / "framepack"), TRANSFORMER)),
        hunyuan=Source(str(DEMO_MODELS / "hunyuan"), HUNYUAN),
        redux=Source(str(DEMO_MODELS / "redux"), REDUX),
        resolution=192,
    )
