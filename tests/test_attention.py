"""ATTENTION: which kernel a step takes, which ones follow it, and that everything else stays as it was."""

from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend

from core.job import run_job
from core.pipeline import Models, generate_video_sync, initialize_models
from core.pipeline.compiling import run_blocks
from core.request import parse_request
from core.settings import ATTENTION, Settings
from diffusers_helper import attention
from diffusers_helper.attention import KERNELS, kernels_for
from diffusers_helper.float8_attention import FLOAT8
from tests.test_endurance import quick_input
from tests.tiny import TINY

pytestmark = pytest.mark.usefixtures("quick_decode")


def start(**settings) -> Models:
    return initialize_models(replace(TINY, encoding_cache_mb=0, **settings))


def preferred() -> list[SDPBackend]:
    """What attention may take here and now, in order."""
    return torch.nn.attention._cur_sdpa_kernel_backends(with_priority=True)


def test_the_setting_names_all_kernels():
    assert ("auto", *KERNELS, FLOAT8) == ATTENTION


@pytest.mark.parametrize(
    ("asked", "capability", "broken", "expected"),
    [
        ("auto", (8, 9), [], "flash efficient math"),
        ("auto", (9, 0), [], "cudnn flash efficient math"),
        ("auto", (12, 0), ["cudnn"], "flash efficient math"),
        ("cudnn", (8, 0), [], "cudnn flash efficient math"),
        ("efficient", (9, 0), [], "efficient cudnn flash math"),
        ("flash", (9, 0), ["flash", "cudnn"], "efficient math"),
        ("math", (9, 0), [], "math"),
        ("cudnn", (9, 0), ["cudnn", "flash", "efficient"], "math"),
    ],
)
def test_what_works_comes_first_and_what_can_do_everything_last(
    asked, capability, broken, expected, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(attention, "_works", lambda name, x: name not in broken)
    monkeypatch.setattr(attention.torch, "ones", lambda *shape, **_: torch.zeros(shape))
    assert kernels_for(asked, torch.device("cuda", 0), torch.bfloat16, 128) == (*expected.split(),)


def test_the_first_call_of_all_is_under_torchs_own_order(monkeypatch):
    """In it torch may settle another one, which is to stay."""
    found, before = [], preferred()
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *_: found.append(preferred()))
    assert kernels_for("cudnn", torch.device("cpu"), torch.float32, 16)[0] == "cudnn"
    assert found == [before, [SDPBackend.CUDNN_ATTENTION]]


def test_holds_in_the_transformers_steps_and_only_there(make_video, tiny_models, monkeypatch):
    before, order = preferred(), torch._C._get_sdp_priority_order()
    transformer = tiny_models.transformer
    monkeypatch.setattr(transformer, "kernels", ("efficient", "flash", "math"))
    blocks = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
    others = [tiny_models.text_encoder, tiny_models.image_encoder]
    inside, outside = [], []
    with ExitStack() as undo:
        for modules, found in (([transformer.context_embedder, *blocks], inside), (others, outside)):
            for module in modules:
                hook = module.register_forward_pre_hook(lambda *_, found=found: found.append(preferred()))
                undo.callback(hook.remove)
        make_video(steps=1)
    kernels = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
    assert inside == [kernels] * len(inside) and len(inside) > len(blocks)
    assert outside == [before] * len(others)
    assert preferred() == before and torch._C._get_sdp_priority_order() == order


def test_an_error_in_a_step_leaves_nothing_behind(tiny_models, monkeypatch):
    def fails(*_):
        raise ValueError("no")

    before = torch._C._get_sdp_priority_order()
    monkeypatch.setattr(tiny_models.transformer, "kernels", ("math",))
    hook = tiny_models.transformer.transformer_blocks[0].register_forward_pre_hook(fails)
    with pytest.raises(ValueError, match="no"):
        run_blocks(tiny_models)
    hook.remove()
    assert torch._C._get_sdp_priority_order() == before and SDPBackend.FLASH_ATTENTION in preferred()


def attended_by(models: Models) -> set[str]:
    """Names of the attention operators of one step."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run_blocks(models)
    return {e.key for e in profile.key_averages() if e.key.startswith("aten::_scaled_dot_product")}


def test_another_kernel_gives_the_same_video_but_for_rounding(tiny_models, picture, tmp_path):
    request = parse_request(quick_input(steps=3))

    def latents(models: Models) -> torch.Tensor:
        found = []
        generate_video_sync(models, picture, request, tmp_path / "video.mp4", on_section=found.append)
        (section,) = found
        return section.latents

    models = start(attention="math")
    assert attended_by(models) == {"aten::_scaled_dot_product_attention_math"}
    assert attended_by(tiny_models) == {"aten::_scaled_dot_product_flash_attention_for_cpu"}
    ours, expected = latents(models), latents(tiny_models)
    assert (ours - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("asked", ["cudnn", "efficient", FLOAT8])
def test_what_the_device_cannot_do_is_a_warning(asked):
    reply = run_job(quick_input(steps=1), start(attention=asked), Settings())
    (warning,) = reply["warnings"]
    assert f"its {asked} kernel does not work on the worker's device" in warning
    assert reply["worker"]["attention"] == "flash" and "video_base64" in reply


@pytest.mark.parametrize("asked", ["auto", "flash", "math"])
def test_what_it_can_do_is_none(asked):
    models = start(attention=asked)
    assert not models.warnings
    assert models.attention == ("math" if asked == "math" else "flash")
