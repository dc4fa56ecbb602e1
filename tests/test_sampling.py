"""What a step computes anew, and what it asks of the device."""

from collections import Counter
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from core.pipeline.sampling import _scaled
from diffusers_helper.samplers import SAMPLERS
from diffusers_helper.schedule import shifted_sigmas
from diffusers_helper.unipc import sample_unipc

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


def test_a_step_asks_nothing_of_the_device(monkeypatch, make_video):
    """A step is launched ahead; to read a value, or to send one by `torch.tensor`, makes the host wait."""
    seen = []
    no_copy = patch.object(torch, "tensor", side_effect=AssertionError("a copy to the device"))

    def watched(denoise, *args):
        def watched_denoise(x, sigma):
            with Calls() as calls, no_copy:
                x0 = denoise(x, sigma)
            seen.append(calls.operations)
            return x0

        return sample_unipc(watched_denoise, *args)

    monkeypatch.setitem(SAMPLERS, "unipc_bh1", watched)
    make_video(cfg=2.0)
    assert len(seen) == 2 * STEPS
    for operations in seen:
        assert operations["aten.linear"] > 0
        assert not any(operations[name] for name in WAITS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scaled_values_are_rounded_as_the_official_ones(dtype):
    """Through float32: straight from Python's float to bfloat16 some would come out otherwise."""
    models = SimpleNamespace(device=torch.device("cpu"), transformer_dtype=dtype)
    for value in [*shifted_sigmas(100, 1.5).tolist(), 10.0, 1.0, 32.0]:
        assert torch.equal(_scaled(value, models), torch.tensor([value * 1000.0]).to(dtype))
