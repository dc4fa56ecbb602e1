"""Loading: what is missing or broken is named; what is there runs as the library's class does."""

import json
import shutil

import pytest
import torch
from diffusers import AutoencoderKLHunyuanVideo, HunyuanVideoFramepackTransformer3DModel
from safetensors.torch import load_file, save_file

from core.errors import ModelError
from core.pipeline import Models, initialize_models
from core.pipeline.profiles import Source, load_profile
from core.pipeline.sampling import pack_history
from core.pipeline.sections import plan_sections
from core.settings import Settings
from tests.conftest import DEMO

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def demo_copy(tmp_path):
    """A copy of the demo models to break, and the settings that point at it."""
    folder = tmp_path / "models"
    shutil.copytree(DEMO, folder)
    settings = Settings(
        model_profile="demo",
        framepack_model=str(folder / "framepack"),
        hunyuan_model=str(folder / "hunyuan"),
        redux_model=str(folder / "redux"),
    )
    return folder, settings


def load(settings):
    return Models(load_profile(settings), torch.device("cpu"))


@pytest.mark.parametrize(
    "missing",
    ["framepack", "hunyuan/vae", "hunyuan/tokenizer", "hunyuan/text_encoder", "redux/image_encoder"],
)
def test_a_missing_folder_is_named(demo_copy, missing):
    folder, settings = demo_copy
    shutil.rmtree(folder / missing)
    with pytest.raises(ModelError, match=missing):
        load(settings)


@pytest.mark.parametrize("part", ["framepack", "hunyuan/vae", "redux/image_encoder"])
def test_a_truncated_weight_file_is_named(demo_copy, part):
    folder, settings = demo_copy
    (weights,) = (folder / part).glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match=part) as error:
        load(settings)
    assert "\n" not in str(error.value)


@pytest.mark.filterwarnings("ignore")  # the libraries warn as well
def test_a_missing_weight_is_an_error_not_a_random_one(demo_copy):
    folder, settings = demo_copy
    path = folder / "framepack" / WEIGHTS
    state = load_file(path)
    state.pop("proj_out.weight")
    save_file(state, path)
    with pytest.raises(ModelError, match="proj_out"):
        load(settings)


def test_a_broken_config_is_named(demo_copy):
    folder, settings = demo_copy
    (folder / "framepack" / "config.json").write_text("{not json")
    with pytest.raises(ModelError, match="framepack"):
        load(settings)


def test_the_library_class_gives_the_same_velocity(demo_models):
    """Ours is the library's forward, rearranged: no difference at all in float32."""
    ours = demo_models.transformer
    library = HunyuanVideoFramepackTransformer3DModel.from_pretrained(DEMO / "framepack").eval()
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    section = plan_sections(2.4, 9, "i2v").sections[0]
    history = pack_history(section, randn(1, 16, 1, 24, 16), randn(1, 16, 19, 24, 16), False, demo_models)
    mask = torch.zeros(1, 512, dtype=torch.bool)
    mask[:, :20] = True
    shared = {
        "hidden_states": randn(1, 16, 9, 24, 16),
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


def test_the_vae_attends_as_the_librarys_does(demo_models):
    """Frame by frame instead of under a mask: the same pixels and latents to float32 rounding."""
    library = AutoencoderKLHunyuanVideo.from_pretrained(DEMO / "hunyuan" / "vae").eval()
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 16, 5, 8, 6, generator=generator)
    pixels = torch.rand(1, 3, 9, 48, 64, generator=generator) * 2 - 1
    with torch.no_grad():
        expected = library.decode(latents).sample, library.encode(pixels).latent_dist.parameters
        ours = demo_models.vae.decode(latents).sample, demo_models.vae.encode(pixels).latent_dist.parameters
    for result, reference in zip(ours, expected, strict=True):
        assert (result - reference).norm() / reference.norm() < 1e-5


def test_switching_direction_loads_the_other_transformer():
    models = load(Settings(model_profile="demo"))
    first = models.transformer
    models.use_direction("f1")
    assert models.direction == "f1" and models.transformer is not first
    models.use_direction("i2v")
    assert models.direction == "i2v"


def test_a_failed_switch_leaves_the_worker_able_to_go_back(tmp_path):
    models = load(Settings(model_profile="demo", framepack_f1_model=str(tmp_path / "nothing")))
    with pytest.raises(ModelError, match="nothing"):
        models.use_direction("f1")
    models.use_direction("i2v")
    assert models.direction == "i2v" and models.transformer is not None


def test_on_a_cpu_there_is_only_resident():
    models = initialize_models(Settings(model_profile="demo", memory_mode="swap"))
    assert models.memory_mode == "resident"
    assert models.transformer_dtype == torch.float32


def test_profiles():
    assert load_profile(Settings()).direction == "i2v"
    assert load_profile(Settings(model_profile="framepack-f1")).direction == "f1"
    assert load_profile(Settings()).resolution == 640
    own = load_profile(Settings(framepack_model="someone/else"))
    assert own.transformers["i2v"] == Source("someone/else", None)
    pinned = load_profile(Settings(hunyuan_model="hunyuanvideo-community/HunyuanVideo"))
    assert pinned.hunyuan.revision is not None


def test_folders_and_hub_ids_are_told_apart(tmp_path):
    assert Source(str(tmp_path)).is_folder
    assert Source("/not/there").is_folder and Source("./not/there").is_folder
    assert not Source("owner/name").is_folder


def test_sizes_come_from_the_configs():
    """Nothing in the demo's sizes is the real models', yet the same code loads them."""
    config = json.loads((DEMO / "framepack" / "config.json").read_text())
    assert config["num_attention_heads"] != 24 and config["text_embed_dim"] != 4096
