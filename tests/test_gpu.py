"""What only a GPU can show: moving models changes nothing but the time. Run with `pytest -m gpu`."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLHunyuanVideo

from benchmarks import full_size
from benchmarks.fp8_error import relative_error
from core.pipeline import Models, decoding, generate_video_sync
from core.pipeline.compiling import warm_up
from core.pipeline.loading import load_transformer
from core.pipeline.loras import ChosenLora
from core.request import VideoRequest, parse_request
from core.weights.profiles import load_profile
from diffusers_helper import float8_attention, fp8, memory, upload, vae_fused
from diffusers_helper.attention import KERNELS, kernels_for
from diffusers_helper.lora import parse_lora
from tests.lora_formats import kohya, originals
from tests.test_fp8 import made_layer
from tests.tiny import TINY, TINY_MODELS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

REQUEST = VideoRequest(input_image="given below", prompt="a test", total_second_length=2.4, steps=6)


@pytest.fixture(scope="module")
def models():
    """Without a cache of encodings: what is compared is made anew."""
    return Models(load_profile(TINY), torch.device("cuda", 0), "resident", replace(TINY, encoding_cache_mb=0))


def generate(models, tmp_path, request=REQUEST, **options):
    """All section latents and the file's bytes."""
    image = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    latents = []
    path = tmp_path / "video.mp4"
    generate_video_sync(
        models, image, request, path, on_section=lambda s: latents.append(s.latents), **options
    )
    return torch.stack(latents), path.read_bytes()


def test_swapped_and_resident_give_the_same_video(models, tmp_path):
    models.set_memory_mode("resident")
    expected_latents, expected_video = generate(models, tmp_path)
    models.set_memory_mode("swap")
    latents, video = generate(models, tmp_path)
    models.set_memory_mode("resident")
    assert torch.equal(latents, expected_latents)
    assert video == expected_video


def test_swapped_and_resident_give_the_same_picture(models, tmp_path):
    """With less history than a video's sections have."""
    request = parse_request(
        {
            "input_image": "given below",
            "prompt": "a test",
            "steps": 4,
            "one_frame": {"no_2x": True, "no_4x": True},
        }
    )
    models.set_memory_mode("resident")
    _, expected = generate(models, tmp_path, request)
    models.set_memory_mode("swap")
    _, picture = generate(models, tmp_path, request)
    models.set_memory_mode("resident")
    assert picture == expected


def test_streaming_every_block_gives_the_same_latents(models, tmp_path):
    models.set_memory_mode("resident")
    expected, _ = generate(models, tmp_path)
    models.set_memory_mode("swap")
    latents, _ = generate(models, tmp_path, frugal=True)
    models.set_memory_mode("resident")
    assert torch.equal(latents, expected)


def test_a_tiled_job_leaves_no_trace_in_the_next(models, tmp_path):
    models.set_memory_mode("resident")
    expected, _ = generate(models, tmp_path)
    generate(models, tmp_path, frugal=True)
    latents, _ = generate(models, tmp_path)
    assert torch.equal(latents, expected)


def test_swap_leaves_the_gpu_empty(models, tmp_path):
    models.set_memory_mode("swap")
    generate(models, tmp_path)
    weights = [p for name in ("vae", "transformer") for p in getattr(models, name).parameters()]
    assert all(not p.is_cuda for p in weights)
    assert torch.cuda.memory_allocated() < 80 * 1024**2  # cuBLAS keeps a workspace for each of two streams
    models.set_memory_mode("resident")
    assert next(models.transformer.parameters()).is_cuda


def test_blocks_stay_resident_while_they_fit(models):
    models.set_memory_mode("swap")
    transformer = models.transformer
    blocks = len(transformer.transformer_blocks) + len(transformer.single_transformer_blocks)
    with models.on_device("transformer"):
        assert all(p.is_cuda for p in transformer.parameters())
    # the first block stays whatever happens: step caches look at it before they skip the others
    assert memory.DynamicSwapInstaller.install_model(transformer, models.device, math.inf) == 1
    memory.DynamicSwapInstaller.uninstall_model(transformer)
    assert memory.DynamicSwapInstaller.install_model(transformer, models.device, 0) == blocks
    memory.DynamicSwapInstaller.uninstall_model(transformer)
    models.set_memory_mode("resident")


@pytest.fixture(scope="module")
def fp8_models():
    settings = replace(TINY, encoding_cache_mb=0, precision="fp8")
    return Models(load_profile(TINY), torch.device("cuda", 0), "resident", settings)


def test_fp8_weights_are_the_bits_that_a_cpu_makes(fp8_models):
    expected = load_transformer(TINY_MODELS / "framepack", torch.bfloat16)
    expected.output_in_float32()
    fp8.quantise_linears(expected, torch.device("cpu"), torch.device("cpu"))
    found = fp8_models.transformer.state_dict()
    assert found.keys() == expected.state_dict().keys()
    for key, tensor in expected.state_dict().items():
        assert found[key].is_cuda and found[key].dtype == tensor.dtype
        assert torch.equal(found[key].cpu().float(), tensor.float()), key


def test_fp8_swapped_and_streamed_give_the_latents_of_resident(fp8_models, tmp_path):
    """With a LoRA and without; a LoRA's parameters come after the blocks were collected for streaming."""
    lora = parse_lora(kohya(originals(fp8_models.transformer)), [], {})
    chosen = [ChosenLora("a", 1.0, (1,), lora)]

    def latents(mode, loras, **options):
        fp8_models.set_memory_mode(mode)
        fp8_models.use_loras(loras)
        return generate(fp8_models, tmp_path, **options)[0]

    plain, with_lora = latents("resident", []), latents("resident", chosen)
    assert not torch.equal(plain, with_lora)
    for frugal in (False, True):
        assert torch.equal(latents("swap", [], frugal=frugal), plain)
        assert torch.equal(latents("swap", chosen, frugal=frugal), with_lora)
        assert torch.equal(latents("swap", [], frugal=frugal), plain)
    assert not any(p.is_cuda for p in fp8_models.transformer.parameters())
    assert torch.equal(latents("resident", []), plain)


@pytest.mark.parametrize("tokens", [fp8.FEWEST, 77, 809, 2048])
@pytest.mark.parametrize(("inputs", "outputs"), [(3072, 12288), (15360, 3072)])
def test_fp8_products(inputs, outputs, tokens):
    """Those of the rounded factors, with an error of their own far below that of the rounding."""
    device = torch.device("cuda", 0)
    if not fp8.can_multiply(device):
        pytest.skip("no fp8 products")
    layer = made_layer(inputs, outputs).to(device)
    few = torch.randn(1, fp8.FEWEST - 1, inputs, device=device).bfloat16()
    assert torch.equal(layer(few), F.linear(few, layer.dequantised(few.dtype), layer.bias))
    x = torch.randn(1, tokens, inputs, device=device).bfloat16()
    rows, scale = fp8.quantise(x[0])
    weight = layer.weight.double() * layer.scale.double()
    rounded = rows.double() * scale.double() @ weight.T + layer.bias.double()
    exact = x[0].double() @ weight.T + layer.bias.double()
    error = (layer(x)[0].double() - rounded).norm() / (exact - rounded).norm()
    assert error < 0.5


def test_moved_in_parallel_is_what_to_gives(monkeypatch):
    monkeypatch.setattr(upload, "PIECE", 10_000)
    device = torch.device("cuda", 0)
    model = load_transformer(TINY_MODELS / "framepack", torch.bfloat16)
    expected = copy.deepcopy(model).to(device)
    upload.move_to_gpu([model], device)
    for ours, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        assert ours.is_cuda and torch.equal(ours, theirs)


def test_compiled_blocks_give_nearly_the_same_latents(models, tmp_path):
    """Nearly: fused operations round less often."""
    settings = replace(TINY, encoding_cache_mb=0, compile="on")
    compiled = Models(load_profile(TINY), torch.device("cuda", 0), "resident", settings)
    warm_up(compiled, None)
    assert compiled.compiled and not compiled.warnings
    expected, _ = generate(models, tmp_path)
    found, _ = generate(compiled, tmp_path)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).norm() < 0.02 * theirs.norm()


OPERATORS = {
    "cudnn": "aten::_scaled_dot_product_cudnn_attention",
    "flash": "aten::_scaled_dot_product_flash_attention",
    "efficient": "aten::_scaled_dot_product_efficient_attention",
    "math": "aten::_scaled_dot_product_attention_math",
}


@pytest.mark.parametrize("name", KERNELS)
def test_every_kernel_of_attention_gives_the_same_velocity(name, models, monkeypatch):
    """But for what bfloat16 rounds away; and it is that kernel which runs."""
    models.set_memory_mode("resident")
    transformer = models.transformer
    head_dim = transformer.config.attention_head_dim
    kernels = kernels_for(name, models.device, models.transformer_dtype, head_dim)
    if kernels[0] != name:
        pytest.skip(f"no {name} kernel")
    for side in ("HEIGHT", "WIDTH"):
        monkeypatch.setattr(full_size, side, 128)
    velocity = full_size.one_evaluation(models, None, 3)["ours"]
    with torch.inference_mode():
        monkeypatch.setattr(transformer, "kernels", ("math",))
        expected = velocity()
        monkeypatch.setattr(transformer, "kernels", kernels)
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True
        ) as profile:
            found = velocity()
    assert OPERATORS[name] in {event.key for event in profile.key_averages()}
    assert (found - expected).norm() < 0.02 * expected.norm()


def test_the_vaes_kernels_compute_what_torch_does():
    kernels = vae_fused.vae_kernels
    device = torch.device("cuda", 0)
    for dtype, near in ((torch.float32, 2e-5), (torch.float16, 5e-3)):
        for channels, groups in ((24, 2), (3, 1), (128, 32)):
            norm = torch.nn.GroupNorm(groups, channels, eps=1e-6, device=device, dtype=dtype)
            torch.nn.init.normal_(norm.weight)
            x = torch.randn(2, channels, 3, 5, 7, device=device, dtype=dtype) + 3
            for factors in ((1, 1, 1), (1, 2, 2), (2, 2, 2)):
                for used in (None, norm):
                    scales = used and kernels.scales_and_shifts(x, norm)
                    ours = kernels.spread(x, scales, factors, (1, 1, 1, 1, 2, 0))
                    theirs = vae_fused.prepared_by_torch(x, used, factors, (1, 1, 1, 1, 2, 0))
                    assert ours.shape == theirs.shape
                    assert relative_error(ours, theirs) < near


def test_the_fused_vae_is_as_near_to_float32_as_the_librarys():
    device = torch.device("cuda", 0)
    torch.manual_seed(0)
    with device:
        library = AutoencoderKLHunyuanVideo(block_out_channels=(32, 64, 96, 96), norm_num_groups=8).eval()
    fused = copy.deepcopy(library).half()
    vae_fused.fuse_convolutions(fused)
    pixels = torch.rand(2, 3, 9, 48, 64, device=device) * 2 - 1
    latents = torch.randn(1, 16, 3, 9, 11, device=device)
    with torch.no_grad(), torch.backends.cudnn.flags(allow_tf32=False):
        for of, x in (("encoder", pixels), ("decoder", latents)):
            exact = getattr(library, of)(x)
            ours = getattr(fused, of)(x.half())
            theirs = getattr(copy.deepcopy(library).half(), of)(x.half())
            assert relative_error(ours, exact) < 1.2 * relative_error(theirs, exact)


def test_float8_attention_is_what_a_cpu_computes_step_by_step():
    device = torch.device("cuda", 0)
    if not float8_attention.works(device, 128):
        pytest.skip("no float8 attention by cuDNN")
    generator = torch.Generator().manual_seed(0)
    q, k, v = ((30 * torch.randn(1, 333, 4, 128, generator=generator)).to(fp8.FP8) for _ in range(3))
    scales = [torch.full((1, 1, 1, 1), value) for value in (1 / 30, 1 / 30, 1 / 30, 60.0)]
    expected = float8_attention.attend_in_float8(q, k, v, *scales).float()
    given = [x.to(device) for x in (q, k, v, *scales)]
    found = float8_attention.attend_in_float8(*given).float().cpu()
    assert relative_error(found, expected) < 0.03  # the sums' order, before the result is rounded to 3 bits


def test_decoded_beside_the_steps_it_is_the_same_video(models, tmp_path, monkeypatch):
    models.set_memory_mode("resident")
    request = REQUEST.model_copy(update={"total_second_length": 3.6})
    latents, video = generate(models, tmp_path, request)
    monkeypatch.setattr(decoding, "decodes_beside", lambda *_: False)
    expected_latents, expected_video = generate(models, tmp_path, request)
    assert torch.equal(latents, expected_latents)
    assert video == expected_video
