"""Compiled blocks: the same latents, no graph made in front of a user, and a worker that can do without."""

from dataclasses import replace

import pytest
import torch

from core.job import run_job
from core.pipeline import Models, compiling, generate_video_sync, initialize_models
from core.pipeline.compiling import warm_up
from core.request import parse_request
from core.settings import Settings
from diffusers_helper import compiled
from tests.test_endurance import quick_input
from tests.tiny import TINY

JOBS = [  # what changes from one to the next is what a graph could have been made for
    {"prompt": "a cat"},
    {"prompt": "a cat walks slowly over the grass, and the wind is in the trees", "latent_window_size": 4},
    {"model": "f1", "cache": "firstblock", "resolution": None, "width": 256, "height": 128},
    {"cfg": 2.0, "n_prompt": "noise", "aspect_ratio": "16:9", "total_second_length": 2, "steps": 2},
]

pytestmark = pytest.mark.usefixtures("quick_decode")


@pytest.fixture(autouse=True)
def traced_only(monkeypatch):
    """Blocks are traced and guarded as ever; generating code, which takes a minute, is left out."""
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def start(**settings) -> Models:
    return initialize_models(replace(TINY, encoding_cache_mb=0, **settings))


@pytest.fixture
def sample(picture, tmp_path):
    """A job's section latents."""

    def sample(models: Models, fields: dict) -> list[torch.Tensor]:
        request = parse_request(quick_input(seed=1, **fields))
        models.use_direction(request.model or "i2v")
        sections = []
        generate_video_sync(models, picture, request, tmp_path / "video.mp4", on_section=sections.append)
        return [section.latents for section in sections]

    return sample


def test_jobs_of_every_size_run_on_the_graphs_made_at_start(sample):
    before = compiled.graphs_made()
    plain = start()
    expected = [sample(plain, fields) for fields in JOBS]
    assert compiled.graphs_made() == before

    models = start(compile="on")
    made = compiled.graphs_made()
    assert 2 <= made - before <= 4
    for fields, latents in zip(JOBS, expected, strict=True):
        for ours, theirs in zip(sample(models, fields), latents, strict=True):
            assert (ours - theirs).norm() < 1e-5 * theirs.norm()
        assert compiled.graphs_made() == made, fields
    assert not models.warnings


def test_a_compiler_that_fails_is_done_without(monkeypatch, caplog):
    def fails(graph, inputs):
        raise OSError("no compiler")

    monkeypatch.setattr(compiled, "BACKEND", fails)
    reply = run_job(quick_input(), start(compile="on"), Settings())
    (warning,) = reply["warnings"]
    assert warning.startswith("The transformer's blocks are not compiled: compiling failed (")
    assert "no compiler" in caplog.text


def test_the_kernel_of_attention_is_chosen_when_graphs_are_made(monkeypatch):
    flash_allowed = []

    def backend(graph, inputs):
        flash_allowed.append(torch.backends.cuda.flash_sdp_enabled())
        return graph.forward

    monkeypatch.setattr(compiled, "BACKEND", backend)
    assert start(compile="on", attention="math").compiled
    assert flash_allowed and not any(flash_allowed)


@pytest.fixture
def never_run(monkeypatch):
    """For tests of what goes on around the blocks."""
    monkeypatch.setattr(compiling, "run_blocks", lambda models: None)


@pytest.mark.usefixtures("never_run")
def test_streamed_blocks_are_not_compiled(monkeypatch):
    models = start(compile="on")
    assert compiled.is_compiled(models.transformer)
    monkeypatch.setattr(models, "device", torch.device("cuda", 0))  # a CPU has no swap mode
    monkeypatch.setattr("core.pipeline.models.memory.release_unused_memory", lambda device: None)
    models.set_memory_mode("swap")
    assert not compiled.is_compiled(models.transformer)
    (warning,) = models.warnings
    assert warning.endswith("in swap mode the blocks' weights come and go.")


@pytest.fixture
def bundle(monkeypatch, never_run) -> list[bytes]:
    """What torch's caches have been given; what is in them is always `bundle`."""
    given = []

    def load(data):
        given.append(data)
        return "info" if data == b"bundle" else None

    monkeypatch.setattr(torch.compiler, "save_cache_artifacts", lambda: (b"bundle", "info"))
    monkeypatch.setattr(torch.compiler, "load_cache_artifacts", load)
    return given


def test_what_was_compiled_is_kept_once_and_taken_from_there(bundle, tmp_path):
    models = start(compile="on", compile_cache_dir=str(tmp_path / "kept"))
    (kept,) = (tmp_path / "kept").iterdir()
    assert kept.read_bytes() == b"bundle" and not bundle
    before = kept.stat().st_mtime_ns
    warm_up(models, tmp_path / "kept")
    assert bundle == [b"bundle"] and kept.stat().st_mtime_ns == before
    kept.write_bytes(b"damaged")
    warm_up(models, tmp_path / "kept")
    assert bundle[1:] == [b"damaged"] and kept.read_bytes() == b"bundle"


@pytest.mark.usefixtures("bundle")
def test_graphs_of_other_kernels_are_kept_apart(tmp_path):
    for attention in ("auto", "math"):
        start(compile="on", attention=attention, compile_cache_dir=str(tmp_path))
    assert len([*tmp_path.iterdir()]) == 2


def test_a_folder_that_cannot_be_written_costs_a_line_in_the_log(bundle, tmp_path, caplog):
    (tmp_path / "kept").write_text("a file")
    models = start(compile="on", compile_cache_dir=str(tmp_path / "kept"))
    assert compiled.is_compiled(models.transformer) and not models.warnings
    assert "what was compiled could not be kept" in caplog.text
