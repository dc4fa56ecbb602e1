"""Weights are read before they are loaded: all that will be, no more than fits, and never an error."""

from dataclasses import replace
from pathlib import Path

import pytest

from core.weights import read_ahead as module
from core.weights.read_ahead import read_ahead, weight_files
from tests.tiny import TINY, TINY_MODELS


@pytest.fixture
def reads(monkeypatch) -> list[tuple[Path, int]]:
    """Files and offsets, as they are read, a kilobyte at a time."""
    found = []

    class Watched(type(Path())):
        def open(self, *arguments, **named):
            file = super().open(*arguments, **named)
            seek = file.seek
            file.seek = lambda at: found.append((Path(self), at)) or seek(at)
            return file

    monkeypatch.setattr(module, "CHUNK", 1024)
    monkeypatch.setattr(module, "weight_files", lambda settings: map(Watched, weight_files(settings)))
    return found


def wait(threads) -> None:
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()


def test_every_byte_of_what_is_loaded_at_start(reads):
    wait(read_ahead(TINY))
    loaded = {*TINY_MODELS.rglob("*.safetensors")} - {*(TINY_MODELS / "framepack_f1").iterdir()}
    assert sorted(reads) == sorted(
        (path, at) for path in loaded for at in range(0, path.stat().st_size, 1024)
    )


def test_no_more_than_fits_into_memory(reads, monkeypatch):
    monkeypatch.setattr(module, "free_host_memory", lambda: 50_000)
    wait(read_ahead(TINY))
    assert 35 < len(reads) <= 40
    first = {path.parent.name for path, _ in reads}
    assert first <= {"text_encoder", "text_encoder_2", "vae", "image_encoder"}  # in the order of loading


@pytest.mark.parametrize("broken", ["no folder", "no file"])
def test_what_is_missing_is_for_the_loader_to_tell(broken, tmp_path):
    folder = tmp_path / "models"
    if broken == "no file":
        folder.mkdir()
    wait(read_ahead(replace(TINY, hunyuan_model=str(folder))))
