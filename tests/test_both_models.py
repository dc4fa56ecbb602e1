"""Both transformers in one worker: kept while memory allows, the idle one dropped where it does not."""

import shutil
import weakref
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from core.errors import ModelError
from core.job import run_job
from core.pipeline import Models
from core.pipeline.models import HOST_HEADROOM_GB, RESIDENT_HEADROOM_GB
from core.settings import Settings, SettingsError
from core.weights.profiles import load_profile
from diffusers_helper import host_memory, memory
from tests.test_endurance import quick_input
from tests.tiny import TINY, TINY_MODELS

GPU = torch.device("cuda", 0)


def load(settings=TINY):
    return Models(load_profile(settings), torch.device("cpu"), settings=settings)


@pytest.fixture
def host(monkeypatch):
    """Sets how much host memory is free: what a job needs, and so many transformers of these `models`."""

    def leaves(models, transformers):
        free = HOST_HEADROOM_GB * memory.GB + transformers * memory.weight_bytes(models.transformer)
        monkeypatch.setattr("core.pipeline.models.free_host_memory", lambda: int(free))

    return leaves


@pytest.fixture
def loads(monkeypatch):
    """The folders that transformers are loaded from."""
    folders = []
    original = Models._load_transformer
    monkeypatch.setattr(
        Models,
        "_load_transformer",
        lambda self, folder: folders.append(folder.name) or original(self, folder),
    )
    return folders


def test_both_stay_where_memory_allows(host, loads):
    models = load()
    i2v = models.transformer
    host(models, 1)
    models.use_direction("f1")
    f1 = models.transformer
    for direction, transformer in (("i2v", i2v), ("f1", f1), ("f1", f1), ("i2v", i2v)):
        models.use_direction(direction)
        assert models.transformer is transformer and models.direction == direction
    assert loads == ["framepack", "framepack_f1"]


def test_the_idle_one_goes_where_memory_is_short(host, loads):
    models = load()
    host(models, 0.99)
    for direction in ("f1", "i2v", "f1"):
        models.use_direction(direction)
    assert loads == ["framepack", "framepack_f1", "framepack", "framepack_f1"]


def test_all_are_dropped_at_once_and_nothing_is_looked_for_where_none_was(host, monkeypatch):
    """A collection of what was kept for good takes half a second."""
    models = load()
    host(models, 1)
    models.use_direction("f1")
    dropped = [weakref.ref(model) for model in (models.transformer, *models.idle)]
    collections = []
    release = memory.release_dropped_models
    monkeypatch.setattr(
        memory, "release_dropped_models", lambda device: collections.append(device) or release(device)
    )
    models.drop_transformers()
    assert len(collections) == 1 and [ref() for ref in dropped] == [None, None]
    models.drop_transformers()
    assert len(collections) == 1
    models.use_direction("i2v")
    assert models.transformer is not None and not models.idle


def test_of_three_the_longest_idle_goes_first(host, tmp_path):
    """There are two today; a third stands for what a profile may have one day."""
    models = load()
    host(models, 1)
    shutil.copytree(TINY_MODELS / "framepack", tmp_path / "third")
    sources = models.profile.transformers
    third = replace(sources["i2v"], location=str(tmp_path / "third"))
    models.use_direction("f1")
    models._idle[third] = models._load_another(third)
    rooms = iter([False, True])
    models._room_for_another = lambda: next(rooms, True)
    models._load_another(third)
    assert [*models._idle] == [third]  # and i2v is gone
    assert models.transformer is not None


def test_keep_both_models_can_be_turned_off(host, loads):
    models = load(replace(TINY, keep_both_models=False))
    host(models, 9)
    for direction in ("f1", "i2v"):
        models.use_direction(direction)
    assert len(loads) == 3
    assert Settings.from_env({"KEEP_BOTH_MODELS": "false"}).keep_both_models is False
    with pytest.raises(SettingsError, match="KEEP_BOTH_MODELS"):
        Settings.from_env({"KEEP_BOTH_MODELS": "auto"})


def test_on_a_gpu_its_memory_decides(host, loads, monkeypatch):
    models = load()
    host(models, 0)
    size = memory.weight_bytes(models.transformer)
    free = RESIDENT_HEADROOM_GB * memory.GB + size
    monkeypatch.setattr("core.pipeline.models.memory.free_gpu_memory", lambda device: int(free))
    monkeypatch.setattr(models, "device", GPU)
    assert models._room_for_another()
    free -= 1
    assert not models._room_for_another()
    monkeypatch.setattr(models, "memory_mode", "swap")  # then the host's
    assert not models._room_for_another()
    unpinned = sum(map(memory.weight_bytes, models.modules())) / size
    host(models, 1 + unpinned)
    assert models._room_for_another()
    host(models, 0.9 + unpinned)
    assert not models._room_for_another()
    monkeypatch.setattr("core.pipeline.models.memory.is_pinned", lambda module: True)
    assert models._room_for_another()


def test_a_decode_that_needs_the_memory_drops_the_idle_one(host, monkeypatch):
    """So that a video does not depend on what the worker did before."""
    models = load()
    host(models, 1)
    models.use_direction("f1")
    size = memory.weight_bytes(models.transformer)
    monkeypatch.setattr(
        "core.pipeline.models.memory.free_gpu_memory", lambda device: 1000 + size * (1 - len(models._idle))
    )
    assert models.has_gpu_memory(1000) and len(models._idle) == 1
    assert not models.has_gpu_memory(1001 + size) and len(models._idle) == 1  # it would not help
    assert models.has_gpu_memory(1001) and len(models._idle) == 0


def test_a_change_of_memory_mode_drops_the_idle_one(host, monkeypatch):
    models = load()
    host(models, 1)
    models.use_direction("f1")
    models.memory_mode = "swap"
    models.set_memory_mode("resident")
    assert models.transformer is not None and not models._idle


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("room", [0, 1])
def test_the_other_one_broken_leaves_the_first_served(host, loads, tmp_path, room):
    folder = tmp_path / "f1"
    shutil.copytree(TINY_MODELS / "framepack_f1", folder)
    weights = folder / "diffusion_pytorch_model.safetensors"
    state = load_file(weights)
    state.pop("proj_out.weight")
    save_file(state, weights)
    models = load(replace(TINY, framepack_f1_model=str(folder)))
    first = models.transformer
    host(models, room)
    with pytest.raises(ModelError, match="proj_out"):
        models.use_direction("f1")
    assert models.direction == "i2v"
    models.use_direction("i2v")
    assert (models.transformer is first) == bool(room)
    assert loads == ["framepack", "f1", *(["framepack"] if not room else [])]


@pytest.mark.usefixtures("quick_decode")
def test_the_videos_are_those_of_a_worker_with_one_model(host):
    models = load()
    host(models, 0)
    alone = [run_job(quick_input(model=model, resolution=256), models) for model in ("i2v", "f1")]
    host(models, 1)
    for _ in range(2):
        for model, expected in zip(("i2v", "f1"), alone, strict=True):
            reply = run_job(quick_input(model=model, resolution=256), models)
            assert reply["video_base64"] == expected["video_base64"]
            kept = reply["timings"]["model_load"]
    assert alone[0]["video_base64"] != alone[1]["video_base64"]
    assert alone[1]["timings"]["model_load"] > 10 * kept


class TestFreeHostMemory:
    @pytest.fixture
    def machine(self, tmp_path, monkeypatch):
        (tmp_path / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable: 5000 kB\nHugePages_Total: 0\n")
        monkeypatch.setattr(host_memory, "MEMINFO", tmp_path / "meminfo")
        monkeypatch.setattr(host_memory, "CGROUP", tmp_path)
        return tmp_path

    def limit(self, folder, limit, used, stat, names=("memory.max", "memory.current", "memory.stat")):
        for name, text in zip(names, (limit, used, stat), strict=True):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(f"{text}\n")

    def test_without_a_limit_it_is_what_the_machine_has(self, machine):
        assert host_memory.free_host_memory() == 5_120_000
        self.limit(machine, "max", 10, "")
        assert host_memory.free_host_memory() == 5_120_000

    def test_a_containers_limit_counts_its_cache_as_free(self, machine):
        self.limit(machine, 1_000_000, 900_000, "anon 1\ninactive_file 30000\nactive_file 4000")
        assert host_memory.free_host_memory() == 134_000
        self.limit(machine, 1_000_000, 2_000_000, "")
        assert host_memory.free_host_memory() == 0

    def test_a_limit_above_the_machine(self, machine):
        self.limit(machine, 10**12, 0, "")
        assert host_memory.free_host_memory() == 5_120_000

    def test_the_older_kind_of_limit(self, machine):
        names = [f"memory/memory.{name}" for name in ("limit_in_bytes", "usage_in_bytes", "stat")]
        self.limit(machine, 1_000_000, 900_000, "inactive_file 7\ntotal_inactive_file 50000", names)
        assert host_memory.free_host_memory() == 150_000

    def test_where_it_cannot_be_told_there_is_none(self, machine):
        (machine / "meminfo").unlink()
        assert host_memory.free_host_memory() == 0

    def test_this_machine_has_some(self):
        assert 0 < host_memory.free_host_memory() < 2**50
