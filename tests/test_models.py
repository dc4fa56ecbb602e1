"""Loading: what is missing or broken is named; what is there runs as the library's class does."""

import gc
import json
import shutil
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLHunyuanVideo, HunyuanVideoFramepackTransformer3DModel
from safetensors.torch import load_file, save_file
from transformers import LlamaModel

from core.errors import ModelError
from core.pipeline import Models, initialize_models
from core.pipeline.sampling import pack_history
from core.pipeline.sections import plan_sections
from core.settings import Settings
from core.weights.profiles import TRANSFORMER, Source, load_profile
from core.worker import Worker
from diffusers_helper import memory
from diffusers_helper.text import PromptEncoder
from tests.tiny import TINY, TINY_MODELS, models_at

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def tiny_copy(tmp_path):
    """A copy of the tiny models to break, and the settings that point at it."""
    folder = tmp_path / "models"
    shutil.copytree(TINY_MODELS, folder)
    return folder, Settings.from_env(models_at(folder))


def load(settings):
    return Models(load_profile(settings), torch.device("cpu"))


@pytest.mark.parametrize(
    "missing",
    ["framepack", "hunyuan/vae", "hunyuan/tokenizer", "hunyuan/text_encoder", "redux/image_encoder"],
)
def test_a_missing_folder_is_named(tiny_copy, missing):
    folder, settings = tiny_copy
    shutil.rmtree(folder / missing)
    with pytest.raises(ModelError, match=missing):
        load(settings)


@pytest.mark.parametrize("part", ["framepack", "hunyuan/vae", "redux/image_encoder"])
def test_a_truncated_weight_file_is_named(tiny_copy, part):
    folder, settings = tiny_copy
    (weights,) = (folder / part).glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match=part) as error:
        load(settings)
    assert "\n" not in str(error.value)


@pytest.mark.filterwarnings("ignore")  # the libraries warn as well
def test_a_missing_weight_is_an_error_not_a_random_one(tiny_copy):
    folder, settings = tiny_copy
    path = folder / "framepack" / WEIGHTS
    state = load_file(path)
    state.pop("proj_out.weight")
    save_file(state, path)
    with pytest.raises(ModelError, match="proj_out"):
        load(settings)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("part", "name"),
    [
        ("framepack", "proj_out.weight"),
        ("hunyuan/vae", "decoder.conv_in.conv.bias"),
        ("hunyuan/text_encoder", "layers.0.mlp.up_proj.weight"),
        ("hunyuan/text_encoder_2", "final_layer_norm.weight"),
        ("redux/image_encoder", "post_layernorm.weight"),
    ],
)
def test_a_weight_of_the_wrong_shape_is_named_with_both_shapes(tiny_copy, part, name):
    folder, settings = tiny_copy
    (path,) = (folder / part).glob("*.safetensors")
    state = load_file(path)
    shape = tuple(state[name].shape)
    wrong = (shape[0] + 1, *shape[1:])
    state[name] = torch.zeros(wrong)
    save_file(state, path, {"format": "pt"})
    with pytest.raises(ModelError) as error:
        load(settings)
    sentence = str(error.value)
    assert str(folder / part) in sentence
    assert f"1 of its weights in the wrong shape, such as {name}: {wrong} instead of {shape}" in sentence
    assert "\n" not in sentence


def in_shards(part: Path) -> tuple[Path, Path]:
    """Split the part's weights in two files with an index; returns these."""
    (whole,) = part.glob("*.safetensors")
    state = load_file(whole)
    names = sorted(state)
    halves = {"00001-of-00002": names[::2], "00002-of-00002": names[1::2]}
    shards = {key: whole.with_name(f"{whole.stem}-{key}.safetensors") for key in halves}
    for key, half in halves.items():
        save_file({name: state[name] for name in half}, shards[key], {"format": "pt"})
    mapping = {name: shards[key].name for key, half in halves.items() for name in half}
    index = {"metadata": {"total_size": whole.stat().st_size}, "weight_map": mapping}
    whole.with_name(f"{whole.name}.index.json").write_text(json.dumps(index))
    whole.unlink()
    return tuple(shards.values())


@pytest.mark.parametrize("part", ["framepack", "hunyuan/text_encoder"])
def test_weights_in_shards_are_whole_or_refused(tiny_copy, part):
    folder, settings = tiny_copy
    _, second = in_shards(folder / part)
    models = load(settings)
    assert models.transformer is not None
    content = second.read_bytes()
    second.write_bytes(content[:-100])
    with pytest.raises(ModelError, match=f"{second} is damaged or half-written"):
        load(settings)
    second.unlink()
    with pytest.raises(ModelError, match=f"{second} is missing"):
        load(settings)


def test_a_broken_config_is_named(tiny_copy):
    folder, settings = tiny_copy
    (folder / "framepack" / "config.json").write_text("{not json")
    with pytest.raises(ModelError, match="framepack"):
        load(settings)


@pytest.mark.parametrize("size", [(24, 16), (10, 14), (26, 18), (8, 38)])
def test_the_library_class_gives_the_same_velocity(tiny_models, size):
    """Ours is the library's forward, rearranged: no difference at all in float32.

    Also at frames of a multiple of 16 pixels that is none of 32 or 64, where history is padded.
    """
    ours = tiny_models.transformer
    library = HunyuanVideoFramepackTransformer3DModel.from_pretrained(TINY_MODELS / "framepack").eval()
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    section = plan_sections(2.4, 9, "i2v").sections[0]
    history = pack_history(section, randn(1, 16, 1, *size), randn(1, 16, 19, *size), False, tiny_models)
    mask = torch.zeros(1, 512, dtype=torch.bool)
    mask[:, :20] = True
    shared = {
        "hidden_states": randn(1, 16, 9, *size),
        "timestep": torch.tensor([600.0]),
        "guidance": torch.tensor([10_000.0]),
        "encoder_hidden_states": randn(1, 512, ours.config.text_embed_dim),
        "encoder_attention_mask": mask,
        "pooled_projections": randn(1, ours.config.pooled_projection_dim),
        "image_embeds": randn(1, 16, ours.config.image_proj_dim),
    }
    with torch.inference_mode():
        expected = library(**shared, **vars(history), return_dict=False)[0]
        velocity = ours(**shared, history=history)
    assert expected.abs().max() > 0
    assert torch.equal(velocity, expected)

    # and so is every step from what the first one prepared
    with torch.inference_mode():
        prepared = ours.prepare_history(history)
        condition = ours.prepare_condition(
            shared["encoder_hidden_states"],
            shared["encoder_attention_mask"],
            shared["pooled_projections"],
            shared["image_embeds"],
            shared["guidance"],
        )
        for timestep in (1000.0, 600.0, 20.0):
            shared |= {"hidden_states": randn(1, 16, 9, *size), "timestep": torch.tensor([timestep])}
            expected = library(**shared, **vars(history), return_dict=False)[0]
            velocity = ours.velocity(shared["hidden_states"], shared["timestep"], prepared, condition)
            assert torch.equal(velocity, expected)


@torch.inference_mode()
def test_the_prompt_encoder_gives_what_the_whole_model_has_two_layers_before_its_end(tiny_models):
    whole = LlamaModel.from_pretrained(TINY_MODELS / "hunyuan" / "text_encoder").eval()
    ours = tiny_models.text_encoder
    assert len(ours.layers) == len(whole.layers) - 2
    tokens = torch.randint(whole.config.vocab_size, (1, 351), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(351) < 200).long()[None]
    expected = whole(tokens, mask, output_hidden_states=True).hidden_states[-3]
    assert torch.equal(ours(tokens, mask).last_hidden_state, expected)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("dropped", "missing"),
    [("layers.2.", None), ("layers.3.", None), ("norm.", None), ("layers.1.", 9), ("embed_tokens.", 1)],
)
def test_only_weights_that_contribute_are_missed(tiny_copy, dropped, missing):
    folder, settings = tiny_copy
    path = folder / "hunyuan" / "text_encoder" / "model.safetensors"
    state = load_file(path)
    left = {name: tensor for name, tensor in state.items() if not name.startswith(dropped)}
    assert len(left) < len(state)
    save_file(left, path, {"format": "pt"})
    if missing is None:
        load(settings)
        return
    with pytest.raises(ModelError, match=f"text_encoder lacks {missing} of its weights, such as {dropped}"):
        load(settings)


def test_only_weights_of_no_layer_are_unexpected(tiny_copy):
    """The library warns of those, and should not of two layers that are left out."""
    folder, _ = tiny_copy
    path = folder / "hunyuan" / "text_encoder" / "model.safetensors"
    state = load_file(path)
    state["layers.4.mlp.up_proj.weight"] = state["layers.3.mlp.up_proj.weight"].clone()
    save_file(state, path, {"format": "pt"})
    _, info = PromptEncoder.from_pretrained(path.parent, output_loading_info=True)
    assert info["unexpected_keys"] == {"layers.4.mlp.up_proj.weight"}


def test_a_prompt_encoder_of_too_few_layers_is_named(tiny_copy):
    folder, settings = tiny_copy
    path = folder / "hunyuan" / "text_encoder" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": 1}))
    with pytest.raises(ModelError, match="its config says 1 layers, and 2 are left out"):
        load(settings)


def test_the_vae_attends_as_the_librarys_does(tiny_models):
    """Frame by frame instead of under a mask: the same pixels and latents to float32 rounding."""
    library = AutoencoderKLHunyuanVideo.from_pretrained(TINY_MODELS / "hunyuan" / "vae").eval()
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 16, 5, 8, 6, generator=generator)
    pixels = torch.rand(1, 3, 9, 48, 64, generator=generator) * 2 - 1
    with torch.no_grad():
        expected = library.decode(latents).sample, library.encode(pixels).latent_dist.parameters
        ours = tiny_models.vae.decode(latents).sample, tiny_models.vae.encode(pixels).latent_dist.parameters
    for result, reference in zip(ours, expected, strict=True):
        assert (result - reference).norm() / reference.norm() < 1e-5


def test_switching_direction_loads_the_other_transformer():
    models = load(TINY)
    first = models.transformer
    models.use_direction("f1")
    assert models.direction == "f1" and models.transformer is not first
    models.use_direction("i2v")
    assert models.direction == "i2v"


def test_one_transformer_may_serve_both_directions():
    models = load(replace(TINY, framepack_f1_model=TINY.framepack_model))
    transformer = models.transformer
    models.use_direction("f1")
    assert models.direction == "f1" and models.transformer is transformer


def test_a_switch_to_nothing_leaves_the_transformer_where_it_is(tmp_path):
    models = load(replace(TINY, framepack_f1_model=str(tmp_path / "nothing")))
    transformer = models.transformer
    with pytest.raises(ModelError, match="nothing"):
        models.use_direction("f1")
    assert models.direction == "i2v" and models.transformer is transformer


@pytest.mark.filterwarnings("ignore")
def test_a_failed_switch_leaves_the_worker_able_to_go_back(tiny_copy):
    """Its files are whole, but no F1 transformer can be made of them."""
    folder, settings = tiny_copy
    state = load_file(folder / "framepack_f1" / WEIGHTS)
    state.pop("proj_out.weight")
    save_file(state, folder / "framepack_f1" / WEIGHTS)
    models = load(settings)
    with pytest.raises(ModelError, match="proj_out"):
        models.use_direction("f1")
    models.use_direction("i2v")
    assert models.direction == "i2v" and models.transformer is not None


def test_on_a_cpu_there_is_only_resident():
    models = initialize_models(replace(TINY, memory_mode="swap"))
    assert models.memory_mode == "resident"
    assert models.transformer_dtype == torch.float32


def test_profiles():
    assert load_profile(Settings()).direction == "i2v"
    assert load_profile(Settings(model_profile="framepack-f1")).direction == "f1"
    assert load_profile(Settings()).resolution == 640
    demo = load_profile(Settings(model_profile="demo"))
    assert demo.resolution == 192
    assert demo.transformers["i2v"] == demo.transformers["f1"]
    own = load_profile(Settings(framepack_model="someone/else"))
    assert own.transformers["i2v"] == Source("someone/else", TRANSFORMER, None)
    assert len(own.sources("i2v", "f1")) == 4
    pinned = load_profile(Settings(hunyuan_model="hunyuanvideo-community/HunyuanVideo"))
    assert pinned.hunyuan.revision is not None


def test_folders_and_hub_ids_are_told_apart(tmp_path):
    for location in (str(tmp_path), "/not/there", "./not/there", "~/not/there"):
        assert Source(location, TRANSFORMER).is_folder
    assert not Source("owner/name", TRANSFORMER).is_folder


def test_sizes_come_from_the_configs():
    """None of these sizes is the real models', yet the same code loads them."""
    config = json.loads((TINY_MODELS / "framepack" / "config.json").read_text())
    assert config["num_attention_heads"] != 24 and config["text_embed_dim"] != 4096


def test_what_a_start_made_is_looked_at_no_more():
    models = initialize_models(TINY)
    gc.unfreeze()
    Worker(lambda: models).start()
    assert gc.get_freeze_count() > 100_000


def test_a_transformer_that_was_kept_for_good_goes_when_it_is_dropped():
    models = initialize_models(TINY)
    models.transformer.itself = [models.transformer]
    dropped = weakref.ref(models.transformer)
    memory.keep_for_good()
    models.drop_transformers()
    assert dropped() is None
