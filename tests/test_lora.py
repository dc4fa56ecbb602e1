"""LoRAs on the tiny transformer's weights: every format, alpha, sums, undoing, and files that are wrong."""

import copy

import pytest
import torch
from diffusers.loaders.lora_conversion_utils import _convert_hunyuan_video_lora_to_diffusers

from diffusers_helper.lora import Merge, fit, is_part, parse_lora
from diffusers_helper.lora_names import module_names
from diffusers_helper.transformer import FramePackTransformer
from tests.lora_formats import FORMATS, LAST, RANK, adapter, added, in_diffusers_names, kohya, originals, peft

CPU = torch.device("cpu")
TO_Q = "transformer_blocks.0.attn.to_q"


@pytest.fixture
def model(tiny_models):
    return copy.deepcopy(tiny_models.transformer)


def parse(tensors, metadata=None):
    return parse_lora(
        {key: tensor for key, tensor in tensors.items() if is_part(key)},
        [key for key in tensors if not is_part(key)],
        metadata or {},
    )


def merge(model, *loras, keep=True, check=lambda: None):
    """Add (tensors, weight[, metadata]) to the model's weights."""
    updates = {}
    for tensors, weight, *metadata in loras:
        for module, more in fit(parse(tensors, *metadata), model).updates(weight).items():
            updates.setdefault(module, []).extend(more)
    merged = Merge(model, updates, lambda size: keep)
    merged.apply(model, CPU, check)
    return merged


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def same(model, before):
    return all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


class TestFormats:
    @pytest.mark.parametrize("name", FORMATS)
    def test_all_give_the_same_weights(self, model, name):
        matrices = originals(model)
        expected, before = added(model, matrices), weights(model)
        lora = parse(FORMATS[name](matrices))
        fitted = fit(lora, model)
        assert fitted.unmatched == () and fitted.ranks == [RANK]
        merge(model, (FORMATS[name](matrices), 1.0))
        for module, weight in expected.items():
            assert torch.equal(model.get_submodule(module).weight, weight), module
            assert not torch.equal(weight, before[f"{module}.weight"])
        changed = {f"{module}.weight" for module in expected}
        assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n not in changed)

    def test_double_blocks_and_embedders_are_where_diffusers_converter_has_them(self, model):
        """Where it is right; the last modulation and the refiner's attention are not among these."""
        matrices = originals(model)
        theirs = {
            name: pair
            for name, pair in matrices.items()
            if name != LAST and "self_attn_qkv" not in name and "linear1" not in name
        }
        converted = _convert_hunyuan_video_lora_to_diffusers(peft("", theirs))
        ours = peft("transformer.", in_diffusers_names(theirs))
        assert converted.keys() == ours.keys()
        assert all(torch.equal(converted[key], ours[key]) for key in ours)

    def test_single_blocks_are_where_it_has_them(self):
        """It takes 3072 for every model's width, so here is one of that width, without its numbers."""
        with torch.device("meta"):
            model = FramePackTransformer(num_layers=1, num_single_layers=1, num_refiner_layers=1)
        rows = torch.arange(4 * 3072 + 3 * 3072).reshape(-1, 1)
        key = "single_blocks.0.linear1"
        converted = _convert_hunyuan_video_lora_to_diffusers(
            {f"{key}.lora_A.weight": torch.ones(1, 3072), f"{key}.lora_B.weight": rows}
        )
        row = 0
        for module, start, stop in module_names(model)[key]:
            assert start == 0
            expected = converted[f"transformer.{module}.lora_B.weight"]
            assert torch.equal(rows[row : row + stop], expected)
            row += stop
        assert row == len(rows)


class TestScale:
    def delta(self, model, tensors, weight=1.0, metadata=None):
        """What a LoRA of `TO_Q` adds, in units of up · down."""
        before = model.get_submodule(TO_Q).weight.detach().clone()
        merge(model, (tensors, weight, metadata))
        down, up = self.pair()
        return ((model.get_submodule(TO_Q).weight - before) / (up @ down)).mean().item()

    def pair(self):
        return torch.full((4, 32), 0.25), torch.full((32, 4), 0.5)

    def lora(self, alpha=None):
        return kohya({TO_Q: self.pair()}, alpha)

    @pytest.mark.parametrize(("alpha", "expected"), [(None, 1), (4, 1), (2, 0.5), (8, 2), (1, 0.25)])
    def test_alpha_over_rank(self, model, alpha, expected):
        assert self.delta(model, self.lora(alpha)) == pytest.approx(expected, rel=1e-5)

    @pytest.mark.parametrize("weight", [-4, -1, 0.5, 4])
    def test_weight(self, model, weight):
        assert self.delta(model, self.lora(), weight) == pytest.approx(weight, rel=1e-5)

    @pytest.mark.parametrize(
        ("config", "expected"),
        [
            ({"r": 4, "lora_alpha": 2}, 0.5),
            ({"lora_alpha": 2, "alpha_pattern": {"attn.to_q": 8}}, 2),
            ({"lora_alpha": 2, "alpha_pattern": {"to_k": 8}}, 0.5),
            ({"lora_alpha": 2, "use_rslora": True}, 1),
            ({}, 1),
        ],
    )
    def test_peft_configuration(self, model, config, expected):
        lora = peft("transformer.", {TO_Q: self.pair()})
        assert self.delta(model, lora, 1.0, adapter(**config)) == pytest.approx(expected, rel=1e-5)

    def test_the_files_alpha_goes_before_the_configuration(self, model):
        assert self.delta(model, self.lora(2), 1.0, adapter(lora_alpha=40)) == pytest.approx(0.5, rel=1e-5)


class TestMerge:
    def test_two_add(self, model):
        first, second = originals(model, 1), originals(model, 2)
        base = model.get_submodule(TO_Q).weight.detach().clone()
        expected = added(model, first)[TO_Q] + 0.5 * (added(model, second)[TO_Q] - base)
        merge(model, (peft("", first), 1.0), (kohya(second), 0.5))
        assert torch.allclose(model.get_submodule(TO_Q).weight, expected, atol=1e-6)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_undone_bit_for_bit(self, model, dtype):
        torch.nn.Module.to(model, dtype)
        before = weights(model)
        merged = merge(model, (kohya(originals(model)), 1.5))
        assert not same(model, before)
        assert merged.undo(model)
        assert same(model, before)

    def test_rounded_once(self, model):
        """In bfloat16 two small additions would each be lost."""
        torch.nn.Module.to(model, torch.bfloat16)
        weight = model.get_submodule(TO_Q).weight
        weight.data.fill_(1.0)
        half = {TO_Q: (torch.full((1, 32), 2.0**-9), torch.ones(32, 1))}
        merge(model, (peft("", half), 1.0), (peft("", half), 1.0), (peft("", half), 1.0))
        assert (weight > 1).all()

    def test_broken_off_it_is_undone_as_well(self, model):
        before, calls = weights(model), []

        def check():
            calls.append(1)
            if len(calls) == 5:
                raise InterruptedError

        updates = fit(parse(kohya(originals(model))), model).updates(1.0)
        merged = Merge(model, updates, lambda size: True)
        with pytest.raises(InterruptedError):
            merged.apply(model, CPU, check)
        assert not same(model, before)
        merged.undo(model)
        assert same(model, before)

    def test_without_originals_it_cannot_be_undone(self, model):
        sizes = []
        updates = fit(parse(peft("", {TO_Q: (torch.ones(1, 32), torch.ones(32, 1))})), model).updates(1.0)
        merged = Merge(model, updates, lambda size: bool(sizes.append(size)))
        merged.apply(model, CPU, lambda: None)
        assert sizes == [32 * 32 * 4]
        assert merged.undo(model) is False

    def test_the_weights_stay_where_they_lie(self, model):
        """Streamed weights are pinned in place: another tensor would not be what is streamed."""
        places = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
        merge(model, (kohya(originals(model)), 1.0)).undo(model)
        assert places == {name: parameter.data_ptr() for name, parameter in model.named_parameters()}

    def test_half_precision_files(self, model):
        matrices = originals(model)
        expected = added(model, matrices)
        halves = {key: t.to(torch.bfloat16) for key, t in peft("", matrices).items()}
        merge(model, (halves, 1.0))
        assert torch.equal(model.get_submodule(TO_Q).weight, expected[TO_Q])


def good():
    return kohya({TO_Q: (torch.ones(2, 32), torch.ones(32, 2))})


FLAT = "lora_unet_transformer_blocks_0_attn_to_q"
WRONG = {
    "no up matrix": (lambda t: t.pop(f"{FLAT}.lora_up.weight"), "is there without its up matrix"),
    "no down matrix": (lambda t: t.pop(f"{FLAT}.lora_down.weight"), "is there without its down matrix"),
    "another rank": (lambda t: t.update({f"{FLAT}.lora_up.weight": torch.ones(32, 3)}), "has rank 3"),
    "whole numbers": (
        lambda t: t.update({f"{FLAT}.lora_up.weight": torch.ones(32, 2, dtype=torch.int64)}),
        "is no matrix",
    ),
    "a vector": (lambda t: t.update({f"{FLAT}.lora_up.weight": torch.ones(32)}), "is no matrix"),
    "rank 0": (
        lambda t: t.update(
            {f"{FLAT}.lora_up.weight": torch.ones(32, 0), f"{FLAT}.lora_down.weight": torch.ones(0, 32)}
        ),
        "is no matrix",
    ),
    "NaN": (lambda t: t[f"{FLAT}.lora_up.weight"].fill_(torch.nan), "not finite"),
    "alpha infinite": (lambda t: t[f"{FLAT}.alpha"].fill_(torch.inf), "not finite"),
    "alpha a vector": (lambda t: t.update({f"{FLAT}.alpha": torch.ones(3)}), "is no number"),
    "the same layer twice": (
        lambda t: t.update({f"lora_transformer_{FLAT[10:]}.lora_up.weight": torch.ones(32, 2)}),
        "is there twice",
    ),
    "DoRA": (lambda t: t.update({f"{FLAT}.dora_scale": torch.ones(32, 1)}), "not supported"),
    "LoKr": (lambda t: t.update({f"{FLAT}.lokr_w1": torch.ones(2, 2)}), "not supported"),
}


@pytest.mark.parametrize("fault", WRONG)
def test_a_wrong_file_has_its_key_named(fault):
    spoil, told = WRONG[fault]
    tensors = good()
    spoil(tensors)
    with pytest.raises(ValueError, match=told) as error:
        parse(tensors)
    assert FLAT in str(error.value)


@pytest.mark.parametrize("text", ["{", "[" * 100_000, '{"lora_alpha": "x"}', '{"lora_alpha": NaN}'])
def test_wrong_metadata_is_named(text):
    with pytest.raises(ValueError, match="lora_adapter_metadata"):
        parse(good(), {"lora_adapter_metadata": text})


@pytest.mark.parametrize("text", ["[]", "3", "null", '{"lora_alpha": null, "alpha_pattern": null}'])
def test_metadata_that_says_nothing_changes_nothing(text):
    (layer,) = parse(good(), {"lora_adapter_metadata": text}).layers.values()
    assert layer.scale == 1.0


def test_a_dora_is_refused():
    with pytest.raises(ValueError, match="DoRA"):
        parse(good(), adapter(use_dora=True))


@pytest.mark.parametrize(
    ("down", "up"), [((2, 33), (32, 2)), ((2, 32), (64, 2)), ((2, 32), (96, 2)), ((2, 8, 4), (31, 2))]
)
def test_a_layer_of_another_shape_is_named_with_both(model, down, up):
    with pytest.raises(ValueError, match="has 32 and 32") as error:
        fit(parse(kohya({TO_Q: (torch.ones(down), torch.ones(up))})), model)
    assert FLAT in str(error.value)


def test_what_is_not_the_models_is_listed(model):
    pair = torch.ones(1, 32), torch.ones(32, 1)
    tensors = peft("transformer.", {TO_Q: pair, "blocks.7.attn": pair})
    tensors |= {
        "lora_te_text_model.alpha_of": torch.ones(1),
        "diffusion_model.img_in.proj.diff_b": torch.ones(3),
    }
    fitted = fit(parse(tensors), model)
    assert len(fitted.layers) == 1
    assert fitted.unmatched == (
        "transformer.blocks.7.attn",
        "lora_te_text_model.alpha_of",
        "diffusion_model.img_in.proj.diff_b",
    )
