"""The worker's environment, read once into one frozen object."""

import math
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path

from core.errors import SettingsError

MEMORY_MODES = ("auto", "resident", "swap")
PRECISIONS = ("bf16", "fp8")
COMPILE = ("off", "on")
ATTENTION = ("auto", "cudnn", "flash", "efficient", "math", "fp8")
PROFILES = ("framepack", "framepack-f1", "demo")
BOOLEANS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


@dataclass(frozen=True)
class Settings:
    """Every variable the worker reads; a model source is a hub id or a folder in the hub's layout."""

    model_profile: str = "framepack"  # MODEL_PROFILE: framepack | framepack-f1 | demo
    memory_mode: str = "auto"  # MEMORY_MODE: auto | resident | swap
    precision: str = "bf16"  # PRECISION: bf16 | fp8, the transformer's; a checkpoint in fp8 is used as it is
    compile: str = "off"  # COMPILE: off | on, the transformer's blocks, with torch.compile
    attention: str = "auto"  # ATTENTION: auto | cudnn | flash | efficient | math | fp8, the transformer's
    compile_cache_dir: str | None = None  # COMPILE_CACHE_DIR; unset: compiled/ on the volume, or not kept
    keep_both_models: bool = True  # KEEP_BOTH_MODELS: I2V and F1, once both were used, where memory allows
    framepack_model: str | None = None  # FRAMEPACK_MODEL: the I2V transformer, at the root
    framepack_f1_model: str | None = None  # FRAMEPACK_F1_MODEL: the F1 transformer, at the root
    hunyuan_model: str | None = None  # HUNYUAN_MODEL: tokenizer(_2)/ text_encoder(_2)/ vae/
    redux_model: str | None = None  # REDUX_MODEL: feature_extractor/ image_encoder/
    baked_models_dir: Path = Path("/models")  # BAKED_MODELS_DIR: as `builder.fetch_models --to` fills it
    allow_download: bool = True  # ALLOW_DOWNLOAD: of models that are nowhere on this machine
    output_dir: Path = Path("outputs")  # OUTPUT_DIR: where a local run leaves its MP4
    inline_limit_mb: float = 7.0  # INLINE_LIMIT_MB: largest MP4 returned as base64, which adds a third
    bucket_name: str | None = None  # BUCKET_NAME: object storage for larger ones; unset: none
    bucket_endpoint_url: str | None = None  # BUCKET_ENDPOINT_URL: of an S3-compatible service; unset: AWS
    bucket_region: str | None = None  # BUCKET_REGION
    bucket_prefix: str = ""  # BUCKET_PREFIX: put before each video's key
    bucket_access_key_id: str | None = field(default=None, repr=False)  # BUCKET_ACCESS_KEY_ID
    bucket_secret_access_key: str | None = field(default=None, repr=False)  # BUCKET_SECRET_ACCESS_KEY
    bucket_session_token: str | None = field(default=None, repr=False)  # BUCKET_SESSION_TOKEN
    url_expires_s: int = 24 * 3600  # URL_EXPIRES_S: life of a video's URL, 7 days at most
    upload_timeout_s: float = 300.0  # UPLOAD_TIMEOUT_S: longest upload of one video
    input_hosts: tuple[str, ...] = ()  # INPUT_HOSTS: where input URLs may lead, with commas; unset: anywhere
    download_timeout_s: float = 30.0  # DOWNLOAD_TIMEOUT_S: longest download of one input
    lora_dir: str | None = None  # LORA_DIR: the LoRAs that requests name; unset: loras/ on the volume
    lora_hosts: tuple[str, ...] = ()  # LORA_HOSTS: where LoRAs' URLs may lead, with commas; unset: nowhere
    lora_max_mb: float = 2000.0  # LORA_MAX_MB: largest LoRAs of one job together, and of those kept in memory
    lora_timeout_s: float = 300.0  # LORA_TIMEOUT_S: longest download of one LoRA
    lora_cache_dir: str | None = None  # LORA_CACHE_DIR: keeps downloaded ones; unset: in the temporary folder
    lora_cache_gb: float = 10.0  # LORA_CACHE_GB: most that these may take
    job_timeout_s: float = math.inf  # JOB_TIMEOUT_S: most any job may take; unset: no limit
    volume_dir: Path = Path("/runpod-volume")  # VOLUME_DIR: keeps videos that could not be delivered
    encoding_cache_mb: float = 256.0  # ENCODING_CACHE_MB: of host memory for encoded prompts and images
    min_free_disk_gb: float = 2.0  # MIN_FREE_DISK_GB: room in the temporary folder, or no job is taken

    def __post_init__(self) -> None:
        _one_of("MODEL_PROFILE", self.model_profile, PROFILES)
        _one_of("MEMORY_MODE", self.memory_mode, MEMORY_MODES)
        _one_of("PRECISION", self.precision, PRECISIONS)
        _one_of("COMPILE", self.compile, COMPILE)
        _one_of("ATTENTION", self.attention, ATTENTION)
        _within("INLINE_LIMIT_MB", self.inline_limit_mb, 0, 14)  # /runsync takes 20 MB of base64
        _within("URL_EXPIRES_S", self.url_expires_s, 60, 7 * 24 * 3600)
        _within("UPLOAD_TIMEOUT_S", self.upload_timeout_s, 1, 24 * 3600)
        _within("DOWNLOAD_TIMEOUT_S", self.download_timeout_s, 1, 3600)
        _within("LORA_TIMEOUT_S", self.lora_timeout_s, 1, 3600)
        _within("LORA_CACHE_GB", self.lora_cache_gb, 0.001, 10_000)
        _within("LORA_MAX_MB", self.lora_max_mb, 1, 1000 * self.lora_cache_gb)
        _within("JOB_TIMEOUT_S", self.job_timeout_s, 1, math.inf)
        _within("ENCODING_CACHE_MB", self.encoding_cache_mb, 0, 100_000)
        _within("MIN_FREE_DISK_GB", self.min_free_disk_gb, 0, 1000)

    @property
    def volume(self) -> Path | None:
        """The network volume, if there is one: at its default place only what is mounted, since a cache
        that was created there would go with the container."""
        if self.volume_dir == Settings.volume_dir and not self.volume_dir.is_mount():
            return None
        return self.volume_dir if self.volume_dir.is_dir() else None

    @property
    def lora_folder(self) -> Path:
        return Path(self.lora_dir) if self.lora_dir else self.volume_dir / "loras"

    @property
    def compile_cache(self) -> Path | None:
        """What was compiled once is kept here; None: nowhere."""
        if self.compile_cache_dir:
            return Path(self.compile_cache_dir)
        return self.volume / "compiled" if self.volume else None

    @property
    def lora_cache(self) -> Path:
        return Path(self.lora_cache_dir or Path(tempfile.gettempdir()) / "framepack-loras")

    @classmethod
    def from_env(cls, env: Mapping[str, str] = os.environ) -> "Settings":
        """Read the variables named above; an empty one counts as unset. Raises SettingsError."""
        values = {}
        for setting in fields(cls):
            name = setting.name.upper()
            if text := env.get(name, "").strip():
                values[setting.name] = _typed(name, text, setting.type)
        return cls(**values)


def _typed(name: str, text: str, kind: type) -> str | float | int | bool | Path | tuple[str, ...]:
    if kind == tuple[str, ...]:
        return tuple(part.strip() for part in text.split(",") if part.strip())
    if kind is bool:
        _one_of(name, text.lower(), tuple(BOOLEANS))
        return BOOLEANS[text.lower()]
    if kind not in (float, int, Path):
        return text
    try:
        return kind(text)
    except ValueError:
        raise SettingsError(f"{name} must be a number (got {text!r}).") from None


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise SettingsError(f"{name} must be one of {', '.join(allowed)} (got {value!r}).")


def _within(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise SettingsError(f"{name} must be between {low:g} and {high:g} (got {value:g}).")
