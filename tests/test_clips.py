"""Finished clips beyond a bound wait on the disk, and come back as they were."""

import gc
from pathlib import Path

import pytest
import torch

from core.pipeline.clips import ClipStore
from diffusers_helper.blending import SectionJoiner

FRAME = 3 * 16 * 24  # bytes


def clip_of(frames: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (1, 3, frames, 16, 24), generator=generator, dtype=torch.uint8)


def test_what_is_over_the_bound_is_on_the_disk(tmp_path):
    store = ClipStore(tmp_path, in_memory=10 * FRAME, left_free=0)
    clips = [clip_of(frames, frames) for frames in (4, 8, 6, 0, 5)]
    kept = [store.hold(clip) for clip in clips]
    assert (store.bytes_in_memory, store.bytes_on_disk) == (10 * FRAME, 13 * FRAME)
    for _ in range(2):  # encoding may be tried again
        for give_back, clip in zip(kept, clips, strict=True):
            assert torch.equal(give_back(), clip)
    assert list(tmp_path.iterdir()) == []  # it has no name


def test_the_file_goes_with_the_store(tmp_path):
    store = ClipStore(tmp_path, in_memory=0, left_free=0)
    give_back = store.hold(clip_of(4, 0))
    file = store._file
    del store
    gc.collect()
    assert file.closed
    with pytest.raises(ValueError, match="closed"):
        give_back()


@pytest.mark.parametrize("full", ["nearly", "really"])
def test_a_full_disk_costs_only_memory(tmp_path, monkeypatch, caplog, full):
    left_free = 10**18 if full == "nearly" else 0
    if full == "really":
        monkeypatch.setattr("tempfile.TemporaryFile", lambda **_: Path("/dev/full").open("r+b", buffering=0))  # noqa: SIM115
    store = ClipStore(tmp_path, in_memory=0, left_free=left_free)
    clips = [clip_of(3, seed) for seed in range(3)]
    kept = [store.hold(clip) for clip in clips]
    assert (store.bytes_in_memory, store.bytes_on_disk) == (9 * FRAME, 0)
    assert all(torch.equal(give_back(), clip) for give_back, clip in zip(kept, clips, strict=True))
    assert caplog.text.count("stays in memory") == 3


@pytest.mark.parametrize("prepended", [True, False])
def test_a_joiner_gives_the_same_video_from_the_disk(tmp_path, prepended):
    store = ClipStore(tmp_path, in_memory=0, left_free=0)
    joiners = [SectionJoiner(5), SectionJoiner(5, store.hold)]
    for seed in range(4):
        pixels = torch.randn(1, 3, 5 + 8 * (seed > 0), 16, 24, generator=torch.Generator().manual_seed(seed))
        for joiner in joiners:
            (joiner.prepend if prepended else joiner.append)(pixels)
    in_memory, on_disk = (torch.cat([*j.clips(prepended=prepended)], dim=2) for j in joiners)
    assert store.bytes_on_disk > 0
    assert torch.equal(in_memory, on_disk)


@pytest.mark.parametrize("model", ["i2v", "f1"])
def test_a_job_gives_the_same_video_from_the_disk(monkeypatch, tmp_path, tiny_models, make_video, model):
    stores = []

    def on_disk(folder, **options):
        stores.append(ClipStore(folder, in_memory=0, left_free=0))
        return stores[0]

    tiny_models.use_direction(model)
    expected = make_video(model=model).path.read_bytes()
    monkeypatch.setattr("core.pipeline.decoding.ClipStore", on_disk)
    assert make_video(model=model).path.read_bytes() == expected
    assert stores[0].bytes_on_disk > 0
