"""Jobs with LoRAs on the tiny models: the video is that of the changed weights, and the next job's is not."""

import copy
import hashlib

import pytest
import torch
from safetensors.torch import save_file

import core.job
from core.errors import CancelledError, LatentsMismatchError, LoraError, LoraNotApplicableError
from core.job import run_job
from core.pipeline import Models, generate_video_sync
from core.settings import Settings
from core.weights.profiles import load_profile
from core.worker import Worker
from tests.lora_formats import added, kohya, originals, peft
from tests.test_endurance import quick_input
from tests.tiny import TINY, TINY_MODELS

pytestmark = pytest.mark.usefixtures("quick_decode")

TO_Q = "single_transformer_blocks.0.attn.to_q"


@pytest.fixture
def models():
    return Models(load_profile(TINY), torch.device("cpu"))


@pytest.fixture
def settings(tmp_path, models) -> Settings:
    (tmp_path / "loras").mkdir()
    for seed in (1, 2):
        save_file(kohya(originals(models.transformer, seed)), tmp_path / "loras" / f"{seed}.safetensors")
    return Settings(volume_dir=tmp_path)


def job(models, settings, *loras, **options):
    fields = options.pop("fields", {})
    return run_job(
        quick_input(steps=2, embed_parameters=False, loras=[*loras], **fields), models, settings, **options
    )


FIRST, SECOND = {"name": "1.safetensors"}, {"name": "2.safetensors", "weight": 0.5}


def test_the_video_is_that_of_the_weights_with_the_delta(models, settings, tmp_path):
    down, up = torch.zeros(1, 32), torch.zeros(32, 1)
    down[0, 3], up[5, 0] = 0.5, 8.0  # a single weight, exactly
    save_file(peft("transformer.", {TO_Q: (down, up)}), tmp_path / "loras" / "one.safetensors")
    plain = job(models, settings)
    reply = job(models, settings, {"name": "one.safetensors", "weight": 2})
    by_hand = Models(load_profile(TINY), torch.device("cpu"))
    by_hand.transformer.get_submodule(TO_Q).weight.data[5, 3] += 8.0
    assert reply["video_base64"] == job(by_hand, settings)["video_base64"] != plain["video_base64"]
    unmatched = {"count": 0, "first": []}
    assert reply["loras"] == [
        {"name": "one.safetensors", "weight": 2.0, "matched": 1, "unmatched": unmatched, "ranks": [1]}
    ]
    assert reply["parameters"]["loras"] == [{"name": "one.safetensors", "weight": 2.0}]
    assert reply["timings"]["loras"] > 0 and reply["warnings"] == []
    assert job(models, settings)["video_base64"] == plain["video_base64"] and plain["loras"] == []


def test_the_same_set_stays_and_another_replaces_it(models, settings, monkeypatch):
    before = copy.deepcopy(models.transformer)
    job(models, settings, FIRST, SECOND)
    merges = []
    original = Models._merge_loras
    monkeypatch.setattr(Models, "_merge_loras", lambda *args: merges.append(1) or original(*args))
    job(models, settings, FIRST, SECOND)
    assert merges == []
    job(models, settings, FIRST)
    assert merges == [1]
    for module, weight in added(before, originals(before, 1)).items():
        assert torch.equal(models.transformer.get_submodule(module).weight, weight)
    job(models, settings)
    for (_, ours), (_, expected) in zip(
        models.transformer.named_parameters(), before.named_parameters(), strict=True
    ):
        assert torch.equal(ours, expected)


def test_after_errors_and_cancels_the_next_video_is_plain(models, settings, monkeypatch):
    plain = job(models, settings)["video_base64"]

    def fails(*_, **__):
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr(core.job, "generate_video_sync", fails)
        with pytest.raises(ZeroDivisionError):
            job(models, settings, FIRST)
    assert job(models, settings)["video_base64"] == plain
    calls = []

    def cancel():
        calls.append(1)
        if len(calls) == 8:  # amid the merge
            raise CancelledError("The job was cancelled.")

    with pytest.raises(CancelledError):
        job(models, settings, FIRST, check_cancelled=cancel)
    assert models._merges[models.transformer][1] is None
    assert job(models, settings)["video_base64"] == plain


def test_tried_again_for_lack_of_memory_the_lora_is_added_once(models, settings, monkeypatch):
    expected = job(models, settings, FIRST)["video_base64"]
    job(models, settings)
    calls = []

    def generate(*args, **options):
        calls.append(1)
        if len(calls) == 1:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return generate_video_sync(*args, **options)

    monkeypatch.setattr(core.job, "generate_video_sync", generate)
    assert job(models, settings, FIRST)["video_base64"] == expected and len(calls) == 2


def test_without_memory_for_the_originals_the_transformer_is_loaded_anew(models, settings, monkeypatch):
    plain = job(models, settings)["video_base64"]
    with_lora = job(models, settings, FIRST)["video_base64"]
    job(models, settings)
    monkeypatch.setattr("core.pipeline.models.free_host_memory", lambda: 0)
    transformer = models.transformer
    assert job(models, settings, FIRST)["video_base64"] == with_lora != plain
    assert models.transformer is transformer
    assert job(models, settings)["video_base64"] == plain
    assert models.transformer is not transformer


def test_each_transformer_has_its_own(models, settings):
    f1 = {"model": "f1"}
    plain, plain_f1 = job(models, settings)["video_base64"], job(models, settings, fields=f1)["video_base64"]
    with_lora = job(models, settings, FIRST)["video_base64"]
    assert job(models, settings, fields=f1)["video_base64"] == plain_f1
    assert job(models, settings, FIRST, fields=f1)["video_base64"] != plain_f1
    assert job(models, settings, FIRST)["video_base64"] == with_lora
    assert job(models, settings)["video_base64"] == plain


def test_the_checkpoint_on_the_disk_is_not_touched(models, settings):
    def digests():
        return {
            path: hashlib.sha256(path.read_bytes()).hexdigest() for path in TINY_MODELS.rglob("*.safetensors")
        }

    before = digests()
    job(models, settings, FIRST)
    assert digests() == before


def test_what_has_no_effect_is_said(models, settings, tmp_path):
    pair = torch.ones(1, 32), torch.ones(32, 1)
    tensors = peft("transformer.", {TO_Q: pair, "blocks.0.ffn": [part.clone() for part in pair]})
    save_file(tensors, tmp_path / "loras" / "half.safetensors")
    plain = job(models, settings)["video_base64"]
    reply = job(models, settings, {"name": "half.safetensors", "weight": 0})
    assert reply["loras"][0]["unmatched"] == {"count": 1, "first": ["transformer.blocks.0.ffn"]}
    assert [warning.split(" ")[0] for warning in reply["warnings"]] == ["The", "1"]
    assert reply["video_base64"] == plain


def test_what_does_not_fit_changes_nothing(models, settings, tmp_path):
    before = copy.deepcopy(models.transformer.state_dict())
    pair = torch.ones(1, 32), torch.ones(32, 1)
    save_file(peft("", {"blocks.0.ffn": pair}), tmp_path / "loras" / "foreign.safetensors")
    save_file(peft("", {TO_Q: (pair[0], torch.ones(33, 1))}), tmp_path / "loras" / "wide.safetensors")
    with pytest.raises(LoraNotApplicableError, match=r"foreign\.safetensors .*such as `blocks\.0\.ffn`"):
        job(models, settings, FIRST, {"name": "foreign.safetensors"})
    with pytest.raises(LoraError, match=rf"wide\.safetensors does not fit: `{TO_Q}` is for 32 inputs"):
        job(models, settings, FIRST, {"name": "wide.safetensors"})
    after = models.transformer.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_through_a_worker(models, settings, monkeypatch):
    monkeypatch.setenv("VOLUME_DIR", str(settings.volume_dir))
    worker = Worker(lambda: models)
    reply = worker.submit("a", quick_input(loras=[{"name": "nothing.safetensors"}])).result()
    assert reply == {"error": "This worker has no LoRA nothing.safetensors.", "code": "invalid_lora"}
    reply = worker.submit("b", quick_input(loras=[{"url": "https://images.test/a?token=5ec4e7"}])).result()
    assert reply["code"] == "url_refused" and "5ec4e7" not in str(reply)
    assert "video_base64" in worker.submit("c", quick_input(loras=[FIRST])).result()


def test_latents_are_gone_on_from_with_the_same_loras_only(models, settings, tmp_path):
    """Also where one of them changes the layer that weights are told apart by."""
    down, up = torch.randn(1, 32), torch.randn(64, 1)
    save_file(peft("transformer.", {"proj_out": (down, up)}), tmp_path / "loras" / "out.safetensors")
    last = {"name": "out.safetensors"}
    data = quick_input(steps=2, embed_parameters=False, loras=[FIRST, last], output="base64")
    made = run_job(data | {"return_latents": True}, models, settings)
    rest = data | {"resume_latents": made["latents_base64"]}
    job(models, settings)  # they are removed in between
    again = run_job(rest, models, settings)
    assert again["video_base64"] == made["video_base64"] and again["resumed_sections"] == again["sections"]
    with pytest.raises(LatentsMismatchError, match=r"^The latents were made with `loras` "):
        run_job(rest | {"loras": [FIRST]}, models, settings)


def test_one_that_overflows_is_refused_and_the_next_video_is_plain(models, settings, tmp_path):
    plain = job(models, settings)
    huge = {TO_Q: (torch.full((1, 32), 1e20), torch.full((32, 1), 1e20))}
    save_file(peft("transformer.", huge), tmp_path / "loras" / "huge.safetensors")
    with pytest.raises(LoraError, match=rf"`{TO_Q}` it gives weights that are not finite\.$"):
        job(models, settings, {"name": "huge.safetensors"})
    assert job(models, settings)["video_base64"] == plain["video_base64"]
