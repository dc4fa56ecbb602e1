"""The hub's repositories in small: every file that the real ones are asked for, and some that are not.

They have the right names and sound weight files, yet no model could be made of them.
"""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from core.settings import Settings
from core.weights.profiles import HUNYUAN, REDUX, TRANSFORMER, Source, load_profile

SHARDS = ("-00001-of-00002.safetensors", "-00002-of-00002.safetensors", ".safetensors.index.json")


def sharded(checkpoint: str) -> list[str]:
    return [checkpoint + ending for ending in SHARDS]


NEEDED = {
    HUNYUAN: [
        *(f"tokenizer/{name}.json" for name in ("tokenizer", "tokenizer_config", "special_tokens_map")),
        *(f"tokenizer_2/{name}.json" for name in ("vocab", "tokenizer_config", "special_tokens_map")),
        "tokenizer_2/merges.txt",
        "text_encoder/config.json",
        *sharded("text_encoder/model"),
        "text_encoder_2/config.json",
        "text_encoder_2/model.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    ],
    REDUX: [
        "feature_extractor/preprocessor_config.json",
        "image_encoder/config.json",
        "image_encoder/model.safetensors",
    ],
    TRANSFORMER: ["config.json", *sharded("diffusion_pytorch_model")],
}
UNNEEDED = {
    HUNYUAN: [
        "model_index.json",
        "transformer/config.json",
        *sharded("transformer/diffusion_pytorch_model"),
        "text_encoder/model.safetensors",  # the shards once more
        "text_encoder_2/model.fp16.safetensors",
        "text_encoder_2/pytorch_model.bin",
        "vae/diffusion_pytorch_model.fp16.safetensors",
        "vae/pytorch_model.pt",
    ],
    REDUX: ["README.md", "image_embedder/config.json", "image_embedder/diffusion_pytorch_model.safetensors"],
    TRANSFORMER: [
        ".gitattributes",
        "README.md",
        "diffusion_pytorch_model.bin",
        *sharded("diffusion_pytorch_model.fp16"),
    ],
}


def default_sources() -> list[Source]:
    return load_profile(Settings()).sources("i2v", "f1")


def make_repositories(folder: Path) -> dict[str, Path]:
    """All repositories of the default profile below `folder`, by hub id."""
    repositories = {}
    for seed, source in enumerate(default_sources()):
        repositories[source.location] = folder / source.location
        make_files(folder / source.location, NEEDED[source.parts] + UNNEEDED[source.parts], seed)
    return repositories


def make_files(folder: Path, names: list[str], seed: int = 0) -> None:
    generator = np.random.default_rng(seed)
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".index.json"):
            first, second, _ = sharded(path.name.removesuffix(".safetensors.index.json"))
            path.write_text(json.dumps({"weight_map": {"weight": first, "bias": first, "last": second}}))
        elif name.endswith(".safetensors"):
            tensors = ("last",) if name.endswith(SHARDS[1]) else ("weight", "bias")
            save_file(
                {tensor: generator.random(4000 // len(tensors), np.float32) for tensor in tensors}, path
            )
        elif name.endswith(".json"):
            path.write_text(json.dumps({"name": name, "seed": seed}))
        else:
            path.write_bytes(generator.bytes(1000))
