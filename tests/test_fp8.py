"""Float8: which layers, how exactly, with LoRAs and without, and from a checkpoint of its own."""

import copy
import json
import re
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from benchmarks.fp8_error import forward_errors
from benchmarks.full_size_models import framepack_transformer
from builder import make_fp8
from core.errors import ModelError
from core.job import run_job
from core.pipeline import Models
from core.pipeline.loading import load_transformer
from core.pipeline.models import RESIDENT_HEADROOM_GB
from core.settings import Settings
from core.weights.profiles import load_profile
from diffusers_helper import fp8, memory
from diffusers_helper.lora import Merge, fit, parse_lora
from tests.lora_formats import added, in_diffusers_names, kohya, originals, peft
from tests.test_endurance import quick_input
from tests.test_models import in_shards
from tests.tiny import TINY, TINY_MODELS

CPU = torch.device("cpu")
PATTERNS = {  # beside these all linear layers of the model keep their dtype
    *(f"transformer_blocks.N.attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")),
    *(f"transformer_blocks.N.attn.{name}" for name in ("add_q_proj", "add_k_proj", "add_v_proj")),
    "transformer_blocks.N.attn.to_add_out",
    *(f"transformer_blocks.N.{ff}.net.{layer}" for ff in ("ff", "ff_context") for layer in ("0.proj", "2")),
    *(f"single_transformer_blocks.N.attn.to_{name}" for name in "qkv"),
    "single_transformer_blocks.N.proj_mlp",
    "single_transformer_blocks.N.proj_out",
}


def load(**settings) -> Models:
    settings = replace(TINY, **settings)
    return Models(load_profile(settings), CPU, settings=settings)


@pytest.fixture(scope="module")
def models() -> Models:
    return load(precision="fp8")


def made_layer(inputs=64, outputs=48, dtype=torch.bfloat16, multiplies=True) -> fp8.Fp8Linear:
    torch.manual_seed(0)
    linear = nn.Linear(inputs, outputs).requires_grad_(False).to(dtype)
    model = nn.ModuleDict({"transformer_blocks": nn.ModuleList([linear])})
    fp8.quantise_linears(model, CPU, CPU)
    fp8.multiply_in_fp8(model, multiplies)
    return model["transformer_blocks"][0]


def test_the_blocks_layers_and_no_others():
    with torch.device("meta"):
        model = framepack_transformer().bfloat16()
    before = memory.weight_bytes(model)
    expected = before - fp8.saved_bytes(model)
    least = memory.least_streamed_bytes(model)
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    fp8.quantise_linears(model, torch.device("meta"), torch.device("meta"))
    quantised = {name for name, module in model.named_modules() if isinstance(module, fp8.Fp8Linear)}
    assert quantised < linears and len(quantised) == 20 * 12 + 40 * 5
    assert {re.sub(r"\.\d+\.", ".N.", name, count=1) for name in quantised} == PATTERNS
    # and what is smaller is seen to be: by the choice of the memory mode, by streaming and its estimate
    assert memory.weight_bytes(model) == expected < 0.66 * before
    assert memory.least_streamed_bytes(model) < 0.77 * least
    assert not any(
        True for _ in next(iter(model.transformer_blocks)).buffers()
    )  # those would not be streamed


def test_rounding():
    torch.manual_seed(0)
    rows = torch.randn(4096, 32) * torch.logspace(-20, 20, 4096)[:, None]
    rows[7] = 0
    for dtype in (torch.float32, torch.bfloat16):
        given = rows.to(dtype)
        quantised, scale = fp8.quantise(given)
        back = quantised.double() * scale.double()
        assert quantised.dtype == torch.float8_e4m3fn and scale.dtype == torch.float32
        assert torch.equal(scale.bfloat16().float(), scale)
        assert back.isfinite().all() and not back[7].any()
        # half a step of 3 bits, and of the smallest numbers; bf16 divides with a rounding of its own
        bound = given.double().abs() / 16 + 2.0**-10 * scale.double()
        assert ((back - given.double()).abs() <= bound * (1.04 if dtype == torch.bfloat16 else 1.002)).all()


@pytest.mark.parametrize("shape", [(64,), (1, 1, 64), (1, fp8.FEWEST - 1, 64)])
def test_of_few_rows_only_the_weight_is_rounded(shape):
    layer = made_layer()
    x = torch.randn(shape).bfloat16()
    assert torch.equal(layer(x), F.linear(x, layer.dequantised(x.dtype), layer.bias))


@pytest.mark.parametrize("shape", [(fp8.FEWEST, 64), (2, 9, 64)])
def test_a_product_is_that_of_the_rounded_factors(shape):
    layer = made_layer()
    x = torch.randn(shape).bfloat16()
    rows, scale = fp8.quantise(x.reshape(-1, 64))
    weight = layer.weight.double() * layer.scale.double()
    expected = (rows.double() * scale.double()) @ weight.T + layer.bias.double()
    result = layer(x)
    assert result.dtype == torch.bfloat16 and result.shape == (*shape[:-1], 48)
    assert (result.double().reshape(-1, 48) - expected).norm() < 4e-3 * expected.norm()
    layer.multiplies = False
    expected = F.linear(x.double(), weight, layer.bias.double())
    assert (layer(x).double() - expected).norm() < 4e-3 * expected.norm()
    assert torch.equal(layer.dequantised(torch.bfloat16), weight.bfloat16())


@pytest.mark.parametrize("multiplies", [True, False])
def test_a_layer_compiles_whole(multiplies):
    layer = made_layer(multiplies=multiplies)
    x = torch.randn(2, 5, 64).bfloat16()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.inference_mode():
        assert torch.equal(compiled(x), layer(x))
        plain = layer(x)
        layer.add_low_rank(torch.ones(48, 2), torch.ones(2, 64))
        assert torch.equal(compiled(x), layer(x)) and not torch.equal(layer(x), plain)


def test_the_error_of_a_forward_beside_bf16s():
    with torch.inference_mode():
        errors = forward_errors(load_transformer(TINY_MODELS / "framepack", torch.float32), CPU, side=8)
    assert errors["bf16"] < errors["fp8 weights"] < errors["fp8"] < 0.04


@pytest.mark.parametrize("name", ["kohya", "diffusers"])
def test_loras_act_beside_the_layers_and_leave_no_trace(models, name):
    model = copy.deepcopy(models.transformer)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    matrices = originals(model)
    tensors = kohya(matrices) if name == "kohya" else peft("transformer.", in_diffusers_names(matrices))
    updates = {}
    for weight in (1.0, -0.5):
        for module, more in fit(parse_lora(tensors, [], {}), model).updates(weight).items():
            updates.setdefault(module, []).extend(more)
    merge = Merge(model, updates, lambda size: True)
    merge.apply(model, CPU, lambda: None)
    zero = copy.deepcopy(models.transformer)
    for parameter in zero.parameters():
        parameter.data = torch.zeros_like(parameter.float())
    seen = 0
    for module, delta in added(zero, matrices, 0.5).items():
        layer, old = model.get_submodule(module), models.transformer.get_submodule(module)
        if isinstance(layer, fp8.Fp8Linear):
            x = torch.randn(3, layer.in_features)
            assert torch.allclose(layer(x) - old(x), F.linear(x, delta), atol=1e-5)
            assert torch.equal(layer.weight.float(), old.weight.float())
            seen += 1
        else:
            assert torch.allclose(layer.weight, old.weight + delta, atol=1e-6)
    assert seen == 17
    assert merge.undo(model)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key].float(), tensor.float()) for key, tensor in before.items())


def test_a_lora_that_overflows_is_refused(models):
    model = copy.deepcopy(models.transformer)
    name = "single_transformer_blocks.0.attn.to_q"
    lora = parse_lora(peft("", {name: (torch.ones(1, 32), torch.full((32, 1), 3e38))}), [], {})
    merge = Merge(model, fit(lora, model).updates(2.0), lambda size: False)
    with pytest.raises(ValueError, match="not finite"):
        merge.apply(model, CPU, lambda: None)
    assert merge.undo(model)  # there was nothing to keep


@pytest.mark.usefixtures("quick_decode")
def test_jobs(models, tmp_path):
    """The reply says what it was; a LoRA is there for its job and gone after it."""
    (tmp_path / "loras").mkdir()
    save_file(kohya(originals(models.transformer)), tmp_path / "loras" / "a.safetensors")
    settings = Settings(volume_dir=tmp_path)

    def video(**fields):
        reply = run_job(quick_input(steps=1, embed_parameters=False, **fields), models, settings)
        assert reply["worker"]["precision"] == "fp8"
        (warning,) = reply["warnings"]
        assert "has none in fp8" in warning
        return reply["video_base64"]

    plain = video()
    assert video(loras=[{"name": "a.safetensors"}]) != plain
    assert video() == plain


def test_the_memory_mode_is_chosen_for_what_the_weights_will_be(models, tiny_models, monkeypatch):
    monkeypatch.setattr(tiny_models, "device", torch.device("cuda", 0))
    size = sum(map(memory.weight_bytes, models.modules()))
    assert size < sum(map(memory.weight_bytes, tiny_models.modules()))
    free = RESIDENT_HEADROOM_GB * memory.GB + size
    monkeypatch.setattr("core.pipeline.models.memory.free_gpu_memory", lambda device: free)
    assert tiny_models._fitting_mode() == "swap"
    monkeypatch.setattr(tiny_models, "_settings", replace(TINY, precision="fp8"))
    assert tiny_models._fitting_mode() == "resident"
    free -= 1
    assert tiny_models._fitting_mode() == "swap"


class TestCheckpoint:
    @pytest.fixture
    def original(self, tmp_path):
        shutil.copytree(TINY_MODELS / "framepack", tmp_path / "original")
        return tmp_path / "original"

    @pytest.mark.parametrize("sharded", [False, True])
    def test_has_the_bits_that_quantising_at_load_gives(
        self, original, tmp_path, models, monkeypatch, sharded
    ):
        if sharded:
            in_shards(original)
        (original / "magnitudes.json").write_text('{"i2v": {"sigmas": [1, 0.5], "ratios": [1, 1.1]}}')
        for name, value in {"MODEL_PROFILE": "demo", "FRAMEPACK_MODEL": str(original)}.items():
            monkeypatch.setenv(name, value)
        to = tmp_path / "deep" / "fp8"
        assert make_fp8.main(["--to", str(to)]) == 0
        assert [*to.parent.iterdir()] == [to]  # nothing half-made beside it
        found = load(framepack_model=str(to))
        ours, theirs = found.transformer.state_dict(), models.transformer.state_dict()
        assert ours.keys() == theirs.keys() and found.precision == "fp8" and len(found.magnitudes) == 1
        for key, tensor in theirs.items():
            assert ours[key].dtype == tensor.dtype and torch.equal(ours[key].float(), tensor.float()), key
        # what a GPU has: all in bf16 but these
        half = load_transformer(to, torch.bfloat16)
        float8 = {key for key, tensor in half.state_dict().items() if tensor.dtype == torch.float8_e4m3fn}
        scales = {key.replace(".weight", ".scale") for key in float8}
        rest = half.state_dict().keys() - float8 - scales
        assert len(float8) == 22 and {half.state_dict()[key].dtype for key in rest} == {torch.bfloat16}
        assert {half.state_dict()[key].dtype for key in scales} == {torch.float32}
        assert torch.get_default_dtype() == torch.float32

    @pytest.mark.filterwarnings("ignore")
    def test_what_is_wrong_with_one_is_named(self, original, tmp_path, capsys, monkeypatch):
        to = tmp_path / "fp8"
        make_fp8.make(original, to)
        with pytest.raises(ModelError, match="is there already"):
            make_fp8.make(original, to)
        with pytest.raises(ModelError, match="is in fp8 already"):
            make_fp8.make(to, tmp_path / "again")
        (original / "config.json").unlink()
        monkeypatch.setenv("FRAMEPACK_MODEL", str(original))
        assert make_fp8.main(["--to", str(tmp_path / "again")]) == 1
        assert capsys.readouterr().err == f"The model file {original / 'config.json'} is missing.\n"
        assert not (tmp_path / "again").exists()

        weights = to / "diffusion_pytorch_model.safetensors"
        state = load_file(weights)
        scale = "single_transformer_blocks.0.proj_out.scale"
        save_file({key: tensor for key, tensor in state.items() if key != scale}, weights, {"format": "pt"})
        with pytest.raises(ModelError, match=f"lacks 1 of its weights, such as {scale}"):
            load(framepack_model=str(to))
        config = json.loads((to / "config.json").read_text())
        (to / "config.json").write_text(json.dumps(config | {"_precision": "int4"}))
        with pytest.raises(ModelError, match="a precision that is not known: int4"):
            load(framepack_model=str(to))
