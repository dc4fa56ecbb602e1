"""A section's overlap with the one before it is not decoded again, and no pixel tells."""

import pytest
import torch

from core.pipeline.decoding import VideoDecoder
from core.pipeline.sections import plan_sections
from core.timing import JobTimer
from diffusers_helper.blending import SectionJoiner
from diffusers_helper.vae import DecodedTiles, decode_latents

CPU = torch.device("cpu")


@pytest.fixture
def decoded(tiny_models):
    """Latent frames of each of the decoder's calls."""
    calls = []
    hook = tiny_models.vae.decoder.register_forward_hook(
        lambda _, inputs, __: calls.append(inputs[0].shape[2])
    )
    yield calls
    hook.remove()


def latents(frames: int) -> torch.Tensor:
    return torch.randn(1, 16, frames, 2, 2, generator=torch.Generator().manual_seed(0))


def windows(direction: str, window: int) -> list[torch.Tensor]:
    """What the five sections of a video decode, in sampling order, as the section loop cuts it."""
    sections = plan_sections(5 * window * 4 / 30, window, direction).sections
    assert len(sections) == 5
    video = latents(5 * window + 1)  # with the start latent
    parts = []
    for i, section in enumerate(sections):
        if direction == "f1":
            known = video[:, :, : (i + 1) * window + 1]
            parts.append(known if section.decode_frames is None else known[:, :, -section.decode_frames :])
        else:
            known = video[:, :, (4 - i) * window + (not section.adds_start) :]
            parts.append(known[:, :, : section.decode_frames])
    return parts


@pytest.mark.parametrize(
    ("direction", "window", "saved"),
    [
        ("f1", 9, [0, 0, 10, 10, 10]),
        ("i2v", 9, [0, 13, 10, 10, 0]),
        ("f1", 6, [0, 0, 5, 5, 5]),
        ("i2v", 4, [0, 0, 0, 0, 0]),  # overlaps of 4: no tile begins where another did
    ],
)
def test_the_video_is_the_same_from_fewer_frames(tiny_models, tmp_path, decoded, direction, window, saved):
    plan = plan_sections(5 * window * 4 / 30, window, direction)
    timer = JobTimer()
    decoder = VideoDecoder(tiny_models, plan, timer, tmp_path)
    joiner = SectionJoiner(plan.overlap)
    fewer = []
    for part in windows(direction, window):
        plain = decode_latents(part, tiny_models.vae, CPU)
        (joiner.prepend if direction == "i2v" else joiner.append)(plain)
        in_full = sum(decoded)
        decoded.clear()
        timer.start_section()
        decoder.add(part)
        fewer.append(in_full - sum(decoded))
        decoded.clear()
    assert fewer == saved
    expected = torch.cat([*joiner.clips(prepended=direction == "i2v")], dim=2)
    assert torch.equal(torch.cat([*decoder.clips()], dim=2), expected)
    assert expected.shape[2] == plan.frames


def test_spatial_tiles_are_recalled_too(tiny_models, monkeypatch, decoded):
    vae = tiny_models.vae
    for name in ("tile_sample_min_height", "tile_sample_min_width"):
        monkeypatch.setattr(vae, name, 8)
    for name in ("tile_sample_stride_height", "tile_sample_stride_width"):
        monkeypatch.setattr(vae, name, 8)
    tiles, (_, first, second, *_) = DecodedTiles(), windows("f1", 9)
    expected = decode_latents(second, vae, CPU, tiled=True)
    assert sum(decoded) == 4 * 28
    with tiles.used_by(vae):
        decode_latents(first, vae, CPU, tiled=True)
    decoded.clear()
    with tiles.used_by(vae):
        assert torch.equal(decode_latents(second, vae, CPU, tiled=True), expected)
    assert sum(decoded) == 4 * 18


def test_other_latents_are_other_tiles(tiny_models):
    """One value of one frame, which two of the three tiles have."""
    tiles, vae = DecodedTiles(), tiny_models.vae
    first = latents(9)
    other = first.clone()
    other[0, 0, 4, 0, 0] += 1
    expected = decode_latents(other, vae, CPU)
    with tiles.used_by(vae):
        assert not torch.equal(decode_latents(first, vae, CPU), expected)
    with tiles.used_by(vae):
        assert torch.equal(decode_latents(other, vae, CPU), expected)


def test_the_decoder_is_the_vaes_own_after_a_stop(tiny_models):
    vae = tiny_models.vae
    decoder, names = vae.decoder, [name for name, _ in vae.named_parameters()]

    def stop():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), DecodedTiles().used_by(vae):
        decode_latents(latents(3), vae, CPU, check=stop)
    assert vae.decoder is decoder and not decoder._forward_pre_hooks
    assert [name for name, _ in vae.named_parameters()] == names
