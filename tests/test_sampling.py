"""What a step computes anew, and what it asks of the device."""

from collections import Counter

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from core.pipeline import generate_video_sync
from core.request import VideoRequest
from diffusers_helper.transformer import FramePackTransformer

STEPS = 4
ONCE_A_SECTION = ("clean_x_embedder", "rope", "image_projection")
EVERY_STEP = ("x_embedder", "context_embedder", "time_text_embed")
WAITS = ("aten._local_scalar_dense", "aten.nonzero", "aten.equal")  # the host waits for a value of the device


class Calls(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operations[str(func.overloadpacket)] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def make_video(tiny_models, picture, tmp_path, quick_decode):
    def make_video(**fields):
        request = VideoRequest(
            **{
                "input_image": "unused",
                "prompt": "A cat turns its head.",
                "total_second_length": 1.2,
                "latent_window_size": 4,
                "steps": STEPS,
                "resolution": 256,
                "seed": 0,
                "use_teacache": False,
            }
            | fields
        )
        return generate_video_sync(tiny_models, picture, request, tmp_path / "video.mp4")

    return make_video


@pytest.mark.parametrize(("cfg", "passes"), [(1.0, 1), (2.0, 2)])
def test_what_no_step_changes_is_computed_once_a_section(tiny_models, make_video, cfg, passes):
    calls: Counter[str] = Counter()
    hooks = [
        getattr(tiny_models.transformer, name).register_forward_hook(lambda *_, n=name: calls.update([n]))
        for name in ONCE_A_SECTION + EVERY_STEP
    ]
    try:
        sections = make_video(cfg=cfg).sections
    finally:
        for hook in hooks:
            hook.remove()
    assert sections == 2
    assert calls == {
        "clean_x_embedder": sections,
        "rope": 4 * sections,
        "image_projection": passes * sections,
        **dict.fromkeys(EVERY_STEP, passes * STEPS * sections),
    }


def test_a_model_call_asks_nothing_of_the_device(monkeypatch, make_video):
    """The host launches a whole step ahead; a value that it reads would stop it at the first block."""
    seen = []
    velocity = FramePackTransformer.velocity

    def watched(*args):
        with Calls() as calls:
            result = velocity(*args)
        seen.append(calls.operations)
        return result

    monkeypatch.setattr(FramePackTransformer, "velocity", watched)
    make_video()
    assert len(seen) == 2 * STEPS
    for operations in seen:
        assert operations["aten.linear"] > 0
        assert not any(operations[name] for name in WAITS)
