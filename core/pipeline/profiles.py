"""Which models a profile uses and where they come from."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from core.settings import Settings

Direction = Literal["i2v", "f1"]

DEMO_MODELS = Path(__file__).parents[2] / "models" / "demo"


@dataclass(frozen=True)
class Source:
    """A hub id with its pinned revision, or a folder in the hub's layout."""

    location: str
    revision: str | None = None

    @property
    def is_folder(self) -> bool:
        """Hub ids are `owner/name`; what exists on disk, or is written as a path, is a folder."""
        path = Path(self.location)
        return path.is_dir() or path.is_absolute() or self.location.startswith((".", "~"))

    def __str__(self) -> str:
        return self.location


@dataclass(frozen=True)
class ModelProfile:
    """A worker's models: one transformer per direction, shared encoders and VAE, and its own defaults."""

    name: str
    direction: Direction  # the transformer loaded at start, and a request's default
    transformers: dict[Direction, Source]
    hunyuan: Source
    redux: Source
    resolution: int


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
    return default if location in (None, default.location) else Source(location)


def _framepack(name: str) -> ModelProfile:
    return ModelProfile(
        name=name,
        direction="f1" if name == "framepack-f1" else "i2v",
        transformers={
            "i2v": Source("lllyasviel/FramePackI2V_HY", "86cef4396041b6002c957852daac4c91aaa47c79"),
            "f1": Source(
                "lllyasviel/FramePack_F1_I2V_HY_20250503", "ab239828e0b384fed75580f186f078717d4020f7"
            ),
        },
        hunyuan=Source("hunyuanvideo-community/HunyuanVideo", "e8c2aaa66fe3742a32c11a6766aecbf07c56e773"),
        redux=Source("lllyasviel/flux_redux_bfl", "45b801affc54ff2af4e5daf1b282e0921901db87"),
        resolution=640,
    )


def _demo() -> ModelProfile:
    return ModelProfile(
        name="demo",
        direction="i2v",
        transformers={
            "i2v": Source(str(DEMO_MODELS / "framepack")),
            "f1": Source(str(DEMO_MODELS / "framepack_f1")),
        },
        hunyuan=Source(str(DEMO_MODELS / "hunyuan")),
        redux=Source(str(DEMO_MODELS / "redux")),
        resolution=256,
    )
