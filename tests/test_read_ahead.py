"""Weights are read before they are loaded: all that will be, no more than fits, and never an error."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from core.weights import read_ahead as module
from core.weights.read_ahead import _loaded, read_ahead, weight_files
from diffusers_helper.text import PromptEncoder
from tests.tiny import TINY, TINY_MODELS

LLAMA = TINY_MODELS / "hunyuan" / "text_encoder" / "model.safetensors"


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

    def watched(settings):
        return ((Watched(path), unused) for path, unused in weight_files(settings))

    monkeypatch.setattr(module, "weight_files", watched)
    return found


def wait(threads) -> None:
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()


def test_every_byte_of_what_is_loaded_at_start(reads):
    wait(read_ahead(TINY))
    loaded = {*TINY_MODELS.rglob("*.safetensors")} - {*(TINY_MODELS / "framepack_f1").iterdir()}
    loaded.remove(LLAMA)
    assert sorted(read for read in reads if read[0] != LLAMA) == sorted(
        (path, at) for path in loaded for at in range(0, path.stat().st_size, 1024)
    )
    (unused,) = (unused for path, unused in weight_files(TINY) if path == LLAMA)
    assert sorted(at for path, at in reads if path == LLAMA) == [
        at for where in _loaded(LLAMA, unused) for at in where[::1024]
    ]


def test_all_but_the_layers_that_are_not_loaded():
    """What the model has, and the header; and the last norm, which is of no size."""
    found = [where for path, unused in weight_files(TINY) if path == LLAMA for where in _loaded(path, unused)]
    data = LLAMA.read_bytes()
    begin = 8 + int.from_bytes(data[:8], "little")
    names = PromptEncoder.from_pretrained(LLAMA.parent).state_dict()
    tensors = {
        name: it["data_offsets"] for name, it in json.loads(data[8:begin]).items() if name != "__metadata__"
    }
    loaded = {name for name in tensors if name in names or name == "norm.weight"}
    assert loaded < set(tensors)
    expected = {*range(begin)}
    for name in loaded:
        expected |= {*range(begin + tensors[name][0], begin + tensors[name][1])}
    assert expected == {at for where in found for at in where}


@pytest.mark.parametrize("content", [b"", b"\xff" * 64, (9).to_bytes(8, "little") + b'{"a": {}}'])
def test_a_damaged_file_is_for_the_loader_to_tell_too(content, tmp_path):
    shutil.copytree(TINY_MODELS / "hunyuan", tmp_path / "hunyuan")
    (tmp_path / "hunyuan" / "text_encoder" / "model.safetensors").write_bytes(content)
    wait(read_ahead(replace(TINY, hunyuan_model=str(tmp_path / "hunyuan"))))


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
