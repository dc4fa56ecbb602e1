"""The worker's environment, read once into one frozen object."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

from core.errors import SettingsError

MEMORY_MODES = ("auto", "resident", "swap")
PROFILES = ("framepack", "framepack-f1", "demo")


@dataclass(frozen=True)
class Settings:
    """Every variable the worker reads; a model source is a hub id or a folder in the hub's layout."""

    model_profile: str = "framepack"  # MODEL_PROFILE: framepack | framepack-f1 | demo
    memory_mode: str = "auto"  # MEMORY_MODE: auto | resident | swap
    framepack_model: str | None = None  # FRAMEPACK_MODEL: the I2V transformer, at the root
    framepack_f1_model: str | None = None  # FRAMEPACK_F1_MODEL: the F1 transformer, at the root
    hunyuan_model: str | None = None  # HUNYUAN_MODEL: tokenizer(_2)/ text_encoder(_2)/ vae/
    redux_model: str | None = None  # REDUX_MODEL: feature_extractor/ image_encoder/
    output_dir: Path = Path("outputs")  # OUTPUT_DIR: where a local run leaves its MP4

    def __post_init__(self) -> None:
        _one_of("MODEL_PROFILE", self.model_profile, PROFILES)
        _one_of("MEMORY_MODE", self.memory_mode, MEMORY_MODES)

    @classmethod
    def from_env(cls, env: Mapping[str, str] = os.environ) -> "Settings":
        """Read the variables named above; an empty one counts as unset. Raises SettingsError."""
        values = {
            f.name: env[f.name.upper()].strip() for f in fields(cls) if env.get(f.name.upper(), "").strip()
        }
        if "output_dir" in values:
            values["output_dir"] = Path(values["output_dir"])
        return cls(**values)


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise SettingsError(f"{name} must be one of {', '.join(allowed)} (got {value!r}).")
