"""Models out of their folders, by the libraries' own loaders: what is missing or broken becomes a ModelError.

Weights whose dtype is the wanted one are mapped from their files and read when they are first used or moved.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from core.errors import ModelError
from diffusers_helper.fp8 import Fp8FramePackTransformer
from diffusers_helper.transformer import FramePackTransformer

PRECISION = "_precision"  # in a transformer's config.json; absent where its weights are as they were trained
FP8 = "fp8"


def load_transformer(folder: Path, dtype: torch.dtype) -> FramePackTransformer:
    """The transformer in `folder`, in `dtype`; in float8 what its files have so."""
    precision = stored_precision(folder)
    if precision is None:
        return load_weights(FramePackTransformer, folder, torch_dtype=dtype)
    if precision != FP8:
        raise ModelError(f"The model in {folder} is of a precision that is not known: {str(precision)[:40]}.")
    with _default_dtype(dtype):  # without a `torch_dtype` each weight gets its layer's, float8 among them
        return load_weights(Fp8FramePackTransformer, folder)


def stored_precision(folder: Path) -> Any:
    """What a transformer's config says of how its weights are stored. Raises ModelError."""
    with naming(folder):
        return json.loads((folder / "config.json").read_text(encoding="utf-8")).get(PRECISION)


def load(loader: type, folder: Path, **options: Any) -> Any:
    """`loader.from_pretrained` on a folder; whatever it raises becomes a ModelError."""
    with naming(folder):
        return loader.from_pretrained(folder, local_files_only=True, **options)


def load_weights(loader: type, folder: Path, **options: Any) -> Any:
    """As `load`, for a module: frozen, in eval mode, and refused when a weight is missing or misshapen."""
    model, info = load(
        loader,
        folder,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        use_safetensors=True,
        **options,
    )
    if missing := sorted(info["missing_keys"]):
        raise ModelError(f"The model in {folder} lacks {len(missing)} of its weights, such as {missing[0]}.")
    if mismatched := sorted(info["mismatched_keys"]):
        name, shape, expected = mismatched[0]
        raise ModelError(
            f"The model in {folder} has {len(mismatched)} of its weights in the wrong shape, such as {name}: "
            f"{tuple(shape)} instead of {tuple(expected)}."
        )
    return model.eval().requires_grad_(False)


@contextmanager
def naming(folder: Path) -> Iterator[None]:
    try:
        yield
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        if len(reason) > 300:
            reason = f"{reason[:297]}..."
        raise ModelError(f"The model in {folder} could not be loaded: {reason}") from error


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
