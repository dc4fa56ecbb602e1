"""What only a GPU can show: moving models changes nothing but the time. Run with `pytest -m gpu`."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from core.pipeline import Models, generate_video_sync
from core.pipeline.profiles import load_profile
from core.request import VideoRequest, parse_request
from diffusers_helper import memory
from tests.tiny import TINY

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

REQUEST = VideoRequest(input_image="given below", prompt="a test", total_second_length=2.4, steps=6)


@pytest.fixture(scope="module")
def models():
    """Without a cache of encodings: what is compared is made anew."""
    return Models(load_profile(TINY), torch.device("cuda", 0), "resident", replace(TINY, encoding_cache_mb=0))


def generate(models, tmp_path, request=REQUEST, **options):
    """All section latents and the file's bytes."""
    image = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    latents = []
    path = tmp_path / "video.mp4"
    generate_video_sync(
        models, image, request, path, on_section=lambda s: latents.append(s.latents), **options
    )
    return torch.stack(latents), path.read_bytes()


def test_swapped_and_resident_give_the_same_video(models, tmp_path):
    models.set_memory_mode("resident")
    expected_latents, expected_video = generate(models, tmp_path)
    models.set_memory_mode("swap")
    latents, video = generate(models, tmp_path)
    models.set_memory_mode("resident")
    assert torch.equal(latents, expected_latents)
    assert video == expected_video


def test_swapped_and_resident_give_the_same_picture(models, tmp_path):
    """With less history than a video's sections have."""
    request = parse_request(
        {
            "input_image": "given below",
            "prompt": "a test",
            "steps": 4,
            "one_frame": {"no_2x": True, "no_4x": True},
        }
    )
    models.set_memory_mode("resident")
    _, expected = generate(models, tmp_path, request)
    models.set_memory_mode("swap")
    _, picture = generate(models, tmp_path, request)
    models.set_memory_mode("resident")
    assert picture == expected


def test_streaming_every_block_gives_the_same_latents(models, tmp_path):
    models.set_memory_mode("resident")
    expected, _ = generate(models, tmp_path)
    models.set_memory_mode("swap")
    latents, _ = generate(models, tmp_path, frugal=True)
    models.set_memory_mode("resident")
    assert torch.equal(latents, expected)


def test_a_tiled_job_leaves_no_trace_in_the_next(models, tmp_path):
    models.set_memory_mode("resident")
    expected, _ = generate(models, tmp_path)
    generate(models, tmp_path, frugal=True)
    latents, _ = generate(models, tmp_path)
    assert torch.equal(latents, expected)


def test_swap_leaves_the_gpu_empty(models, tmp_path):
    models.set_memory_mode("swap")
    generate(models, tmp_path)
    weights = [p for name in ("vae", "transformer") for p in getattr(models, name).parameters()]
    assert all(not p.is_cuda for p in weights)
    assert torch.cuda.memory_allocated() < 64 * 1024**2  # cuBLAS keeps a workspace
    models.set_memory_mode("resident")
    assert next(models.transformer.parameters()).is_cuda


def test_blocks_stay_resident_while_they_fit(models):
    models.set_memory_mode("swap")
    transformer = models.transformer
    blocks = len(transformer.transformer_blocks) + len(transformer.single_transformer_blocks)
    with models.on_device("transformer"):
        assert all(p.is_cuda for p in transformer.parameters())
    # the first block stays whatever happens: step caches look at it before they skip the others
    assert memory.DynamicSwapInstaller.install_model(transformer, models.device, math.inf) == 1
    memory.DynamicSwapInstaller.uninstall_model(transformer)
    assert memory.DynamicSwapInstaller.install_model(transformer, models.device, 0) == blocks
    memory.DynamicSwapInstaller.uninstall_model(transformer)
    models.set_memory_mode("resident")
