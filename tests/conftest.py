"""What several tests need: the tiny models, loaded once, and a small picture."""

import os
import signal
from dataclasses import replace

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch, before its first tensor: a third fewer seconds

import numpy as np
import pytest
import torch

from diffusers_helper import memory

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the processes share the cores

# Begun in the background of a shell, programs ignore Ctrl-C, and so would those to which tests send it.
signal.signal(signal.SIGINT, signal.default_int_handler)


# the files that take longest, those first: one begun last would run on alone, beside an idle process
LONGEST = (
    "test_runpod_loop",
    "test_resume",
    "test_demo_features",
    "test_quality",
    "test_fuzz",
    "test_bad_inputs",
    "test_faults",
    "test_serve_api",
    "test_soak",
    "test_hub",
    "test_endurance",
    "test_parity",
    "test_compile",
)


def pytest_collection_modifyitems(items):
    """Share the tests out by file, as their fixtures go; only the long parity jobs go one by one."""
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(LONGEST)))
    for item in items:
        if item.path.stem != "test_parity":
            item.add_marker(pytest.mark.xdist_group(item.path.stem))


def pytest_collection_finish():
    """Every job collects garbage, and looks only at what the tests make."""
    memory.keep_for_good()


@pytest.fixture(scope="session")
def tiny_models():
    """The tiny models on the CPU, without a cache of encodings. Tests must leave them as they found them."""
    from core.pipeline import Models
    from core.weights.profiles import load_profile
    from tests.tiny import TINY

    models = Models(load_profile(TINY), torch.device("cpu"), settings=replace(TINY, encoding_cache_mb=0))
    memory.keep_for_good()  # loading has imported half of transformers and diffusers
    return models


@pytest.fixture(scope="session")
def demo_models():
    """The trained demo models on the CPU. Tests must leave them as they found them."""
    from core.pipeline import initialize_models
    from core.settings import Settings
    from tests.tiny import TRAINED_ENV

    models = initialize_models(Settings.from_env(TRAINED_ENV))
    memory.keep_for_good()
    return models


@pytest.fixture(autouse=True)
def _as_they_were(request):
    """A job leaves the shared models with the transformer that it asked for."""
    shared = {"tiny_models", "demo_models"} & set(request.fixturenames)
    models = [request.getfixturevalue(name) for name in shared]
    yield
    for used in models:
        used.use_direction("i2v")


@pytest.fixture
def picture() -> np.ndarray:
    """(256, 256, 3) uint8 noise from a fixed seed."""
    return np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)


@pytest.fixture
def quick_decode(monkeypatch):
    """Nothing in place of the VAE's decode, nearly all of a tiny job's time: for tests of all around it."""
    from benchmarks.caches import undecoded

    monkeypatch.setattr("core.pipeline.decoding.decode_latents", undecoded)


@pytest.fixture
def make_video(tiny_models, picture, tmp_path, quick_decode):
    """Two sections of four steps, without the job around them."""
    from core.pipeline import generate_video_sync
    from core.request import VideoRequest

    def make_video(**fields):
        request = VideoRequest(
            **{
                "input_image": "unused",
                "prompt": "A cat turns its head.",
                "total_second_length": 1.2,
                "latent_window_size": 4,
                "steps": 4,
                "resolution": 256,
                "seed": 0,
                "use_teacache": False,
            }
            | fields
        )
        return generate_video_sync(tiny_models, picture, request, tmp_path / "video.mp4")

    return make_video
