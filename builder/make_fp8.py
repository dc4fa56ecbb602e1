"""Write a transformer's checkpoint in float8: 16.7 GB instead of 25.7, and nothing to quantise at start.

    python -m builder.make_fp8 --model i2v --to /models/framepack-fp8
    FRAMEPACK_MODEL=/models/framepack-fp8 python handler.py

The environment names the transformer as it does for the worker, which fetches it where it is nowhere. The
weights are what PRECISION=fp8 makes of the original at each start; the others are kept as they are.
"""

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from core.errors import ModelError, WorkerError
from core.pipeline.loading import FP8, PRECISION, stored_precision
from core.pipeline.magnitudes import FILE as MAGNITUDES
from core.settings import Settings
from core.weights.files import check_files, checkpoint_files, locate
from core.weights.profiles import TRANSFORMER, Source, load_profile
from diffusers_helper.fp8 import is_fp8_weight, quantise

GB = 1_000_000_000


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 0, or 1 and one line that says what is wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", choices=("i2v", "f1"), default="i2v", help="which transformer (i2v)")
    parser.add_argument(
        "--to", type=Path, required=True, metavar="DIR", help="a folder that is not there yet"
    )
    options = parser.parse_args(arguments)
    try:
        settings = Settings.from_env()
        source = load_profile(settings).transformers[options.model]
        size = make(locate(source, settings), options.to)
    except (WorkerError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{options.to}: {size / GB:.2f} GB")
    return 0


def make(folder: Path, to: Path) -> int:
    """Write the float8 checkpoint of the transformer in `folder`; returns the bytes of its weights.

    `to` appears when it is whole. Raises ModelError where the original is damaged or float8 itself, and
    OSError.
    """
    check_files(folder, Source(str(folder), TRANSFORMER))
    if stored_precision(folder) is not None:
        raise ModelError(f"The model in {folder} is in {stored_precision(folder)} already.")
    if to.exists():
        raise ModelError(f"The folder {to} is there already.")
    to.parent.mkdir(parents=True, exist_ok=True)
    (checkpoint,) = (part.checkpoint for part in TRANSFORMER)
    index = folder / f"{checkpoint}.safetensors.index.json"
    with tempfile.TemporaryDirectory(prefix=f".{to.name}-", dir=to.parent) as temporary:
        made = Path(temporary) / "whole"
        made.mkdir()
        weight_map, size = {}, 0
        for shard in checkpoint_files(folder, checkpoint):
            tensors = dict(_quantised(folder / shard))
            save_file(tensors, made / shard, {"format": "pt"})
            (made / shard).chmod(0o644)  # a worker may run as somebody else
            weight_map |= dict.fromkeys(tensors, shard)
            size += sum(tensor.nbytes for tensor in tensors.values())
        if index.is_file():
            _write(made / index.name, {"metadata": {"total_size": size}, "weight_map": weight_map})
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        _write(made / "config.json", config | {PRECISION: FP8})
        if (folder / MAGNITUDES).is_file():
            shutil.copyfile(folder / MAGNITUDES, made / MAGNITUDES)
        made.rename(to)
    return size


def _quantised(file: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """The file's tensors, those that become float8 with their scales."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with safe_open(file, framework="pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118 - it is no dict
            tensor = tensors.get_tensor(name)
            if is_fp8_weight(name, tuple(tensor.shape)):
                weight, scale = quantise(tensor.to(device).float())
                yield name, weight.cpu()
                yield f"{name.removesuffix('weight')}scale", scale.cpu()
            else:
                yield name, tensor


def _write(path: Path, data: dict) -> None:
    path.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
