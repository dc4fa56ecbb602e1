"""The real architectures at full size with random weights, in the hub's layout: they time like the real ones.

    python -m benchmarks.full_size_models FOLDER

About 43 GB on disk. Made on the GPU when there is one.
"""

import argparse
import base64
import io
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLHunyuanVideo, HunyuanVideoFramepackTransformer3DModel
from PIL import Image
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    LlamaConfig,
    LlamaModel,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from builder.demo.encoders import write_clip_tokenizer, write_llama_tokenizer
from core.weights.profiles import HUNYUAN, REDUX, TRANSFORMER, ModelProfile, Source

HEIGHT, WIDTH = 640, 608
PROMPT = "The dancer spins slowly in front of the window, her dress following the turn."

LLAMA_8B = {
    "vocab_size": 128_320,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0},
}
CLIP_L = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
SIGLIP_SO400M = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
}


def profile_of(folder: Path) -> ModelProfile:
    return ModelProfile(
        name="full-size",
        direction="i2v",
        transformers=dict.fromkeys(("i2v", "f1"), Source(str(folder / "framepack"), TRANSFORMER)),
        hunyuan=Source(str(folder / "hunyuan"), HUNYUAN),
        redux=Source(str(folder / "redux"), REDUX),
        resolution=640,
    )


def random_pixels() -> np.ndarray:
    """(HEIGHT, WIDTH, 3) uint8"""
    return np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)


def random_image() -> str:
    """The same, as a request has it."""
    buffer = io.BytesIO()
    Image.fromarray(random_pixels()).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def make_full_size_models(folder: Path) -> None:
    """Write `hunyuan/`, `redux/` and `framepack/` below `folder`; weights are N(0, 0.02²) from seed 0."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    hunyuan, redux = folder / "hunyuan", folder / "redux"
    write_llama_tokenizer(hunyuan / "tokenizer", [PROMPT])
    write_clip_tokenizer(hunyuan / "tokenizer_2", [PROMPT])
    SiglipImageProcessorPil(size={"height": 384, "width": 384}).save_pretrained(redux / "feature_extractor")
    parts = (
        (hunyuan / "text_encoder", torch.float16, lambda: LlamaModel(LlamaConfig(**LLAMA_8B))),
        (hunyuan / "text_encoder_2", torch.float16, lambda: CLIPTextModel(CLIPTextConfig(**CLIP_L))),
        (hunyuan / "vae", torch.float16, AutoencoderKLHunyuanVideo),
        (
            redux / "image_encoder",
            torch.float16,
            lambda: SiglipVisionModel(SiglipVisionConfig(**SIGLIP_SO400M)),
        ),
        (folder / "framepack", torch.bfloat16, framepack_transformer),
    )
    for path, dtype, make in parts:
        started = time.perf_counter()
        model = with_random_weights(make, dtype, torch.device(device))
        model.save_pretrained(path)
        print(f"{path}: {time.perf_counter() - started:.1f} s", flush=True)
        del model
        torch.cuda.empty_cache()


def with_random_weights(make: Callable[[], nn.Module], dtype: torch.dtype, device: torch.device) -> nn.Module:
    with torch.device("meta"):
        model = make().to(dtype)
    model.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in model.named_parameters():
        norm = parameter.ndim == 1 and name.endswith("weight")  # scales near 1 keep the numbers sane
        parameter.data.normal_(1.0 if norm else 0.0, 0.02, generator=generator)
    return model


def framepack_transformer() -> HunyuanVideoFramepackTransformer3DModel:
    return HunyuanVideoFramepackTransformer3DModel(has_image_proj=True, has_clean_x_embedder=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    make_full_size_models(parser.parse_args().folder)
