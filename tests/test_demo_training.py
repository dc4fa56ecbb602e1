"""Training of the demo models, piece by piece: what is trained is what the sampler runs."""

import itertools
import json
import math
import random
import time

import pytest
import torch
from torch import nn

from builder.demo import autoencoder, bank, flow_matching, layouts, optimizers, train, transformer
from builder.demo.course import COMPILED_AFTER, Course
from builder.demo.devices import ahead
from builder.demo.encoders import Encoders, write_encoders
from builder.demo.layouts import Cut
from builder.demo.optimizers import Optimizers
from core.pipeline.sampling import pack_history
from core.pipeline.sections import HISTORY_FRAMES
from diffusers_helper.text import encode_prompt
from diffusers_helper.transformer import FramePackTransformer

CPU = torch.device("cpu")
CLIP_LATENTS = 1 + layouts.SECTIONS * layouts.WINDOW
PROMPTS = [
    "the red circle moves to the right",
    "the blue square grows slowly",
    "the camera zooms in",
    "a green triangle turns and a red circle moves up",
]


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoders")
    write_encoders(folder, PROMPTS, seed=0)
    return Encoders(folder, CPU)


class Sampler:
    """What the section loop looks at."""

    device, transformer_dtype = CPU, torch.float32


@pytest.mark.parametrize("direction", ["i2v", "f1"])
def test_a_section_is_cut_as_the_sampler_would_meet_it(direction):
    """Run the section loop with the clip's own latents for what it samples: every history is the same."""
    clip = torch.randn(2, 16, CLIP_LATENTS, 4, 6)
    start = clip[:, :, :1]
    history = torch.zeros(2, 16, HISTORY_FRAMES, 4, 6)
    history = torch.cat([history, start], dim=2) if direction == "f1" else history
    sampled = {}
    for section in layouts.training_plan(direction).sections:
        expected = pack_history(section, start, history, direction == "f1", Sampler)
        window = section.index if direction == "f1" else layouts.SECTIONS - 1 - section.index
        target, packed = layouts.cut_section(
            clip, Cut(direction, section, window, known=section.index), torch.float32
        )
        for name, value in vars(expected).items():
            assert torch.equal(getattr(packed, name), value), name
        sampled[window] = target
        both = [history, target] if direction == "f1" else [target, history]
        history = torch.cat(both, dim=2)
    assert torch.equal(torch.cat([start, *(sampled[at] for at in sorted(sampled))], dim=2), clip)


def padding_0(known: int) -> Cut:
    return Cut("i2v", layouts.training_plan("i2v").sections[-1], 0, known)


def test_a_shorter_video_has_less_behind_it():
    clip = torch.randn(1, 16, CLIP_LATENTS, 4, 4)
    _, nothing = layouts.cut_section(clip, padding_0(known=0), torch.float32)
    _, one = layouts.cut_section(clip, padding_0(known=1), torch.float32)
    assert not nothing.latents_history_4x.any() and not nothing.latents_clean[:, :, 1:].any()
    assert torch.equal(one.latents_history_4x[:, :, :6], clip[:, :, 13:19])
    assert not one.latents_history_4x[:, :, 6:].any()


def test_history_noise_spares_the_start_and_what_is_empty():
    clip = torch.randn(2, 16, CLIP_LATENTS, 4, 4)
    padding_1 = Cut("i2v", layouts.training_plan("i2v").sections[2], 1, known=1)
    target, packed = layouts.cut_section(clip, padding_1, torch.float32, torch.full((2, 1, 1, 1, 1), 0.3))
    assert torch.equal(packed.latents_clean[:, :, :1], clip[:, :, :1])
    assert torch.equal(target, clip[:, :, 10:19])
    noise = packed.latents_clean[:, :, 1:] - clip[:, :, 19:20]
    assert 0.2 < noise.std() < 0.4
    assert not packed.latents_history_4x[:, :, 6:].any()


def test_cuts_are_of_sections_that_videos_of_up_to_four_have():
    rng = random.Random(0)
    short = {Cut.draw(rng, "short") for _ in range(100)}
    whole = {Cut.draw(rng, "whole") for _ in range(2000)}
    forward = layouts.training_plan("f1").sections
    backward = layouts.training_plan("i2v").sections  # padding 3 to 0
    assert short == {Cut("f1", forward[0], 0, 0), Cut("i2v", backward[3], 0, 0)}
    assert {cut for cut in whole if cut.direction == "f1"} == {Cut("f1", forward[n], n, n) for n in range(4)}
    assert {cut for cut in whole if cut.direction == "i2v"} == {
        Cut("i2v", backward[3 - at], at, count - 1 - at) for count in range(2, 5) for at in range(count)
    }
    assert {cut for cut in short | whole if cut.is_far} == {
        Cut("i2v", backward[3 - at], at, 0) for at in (1, 2, 3)
    }


def test_late_cuts_have_a_full_history_in_the_midst_of_a_video():
    rng = random.Random(0)
    cuts = {Cut.draw(rng, "late") for _ in range(500)}
    assert {(cut.direction, cut.section.index, cut.window, cut.known) for cut in cuts} == {
        ("f1", 3, 3, 3),
        *(("i2v", 1, window, 3 - window) for window in range(3)),
    }
    clip = torch.randn(1, 16, CLIP_LATENTS, 4, 4)
    for cut in cuts:
        target, packed = layouts.cut_section(clip, cut, torch.float32)
        first = 1 + 9 * cut.window
        after = clip[:, :, first + 9 : first + 10]
        nearest = clip[:, :, first - 1 : first] if cut.direction == "f1" else after
        assert torch.equal(target, clip[:, :, first : first + 9])
        assert torch.equal(packed.latents_clean, torch.cat([clip[:, :, :1], nearest], dim=2))


def test_encoders_in_batches_give_what_the_worker_gets(encoders):
    for prompt, (hidden, pooled) in zip([*PROMPTS, ""], encoders.text([*PROMPTS, ""], batch=2), strict=True):
        expected = encode_prompt(
            prompt,
            tokenizer=encoders.tokenizer,
            text_encoder=encoders.text_encoder,
            tokenizer_2=encoders.tokenizer_2,
            text_encoder_2=encoders.text_encoder_2,
            device=CPU,
        )
        tokens = int(expected.encoder_attention_mask.sum())
        assert hidden.shape[0] == tokens
        torch.testing.assert_close(hidden, expected.encoder_hidden_states[0, :tokens], atol=2e-5, rtol=0)
        assert torch.equal(pooled, expected.pooled_projections[0])


def test_the_tokenizers_take_any_text(encoders):
    text = "Ein Kätzchen 🐈 tanzt."
    ids = encoders.tokenizer(text).input_ids
    assert encoders.tokenizer.decode(ids, skip_special_tokens=True) == text
    assert len(encoders.tokenizer_2(text).input_ids) > 8
    assert encoders.tokenizer_2.unk_token_id not in encoders.tokenizer_2(PROMPTS[0]).input_ids[1:-1]


def tiny_transformer() -> FramePackTransformer:
    torch.manual_seed(0)
    return FramePackTransformer(
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        text_embed_dim=64,
        pooled_projection_dim=48,
        rope_axes_dim=(4, 6, 6),
        has_image_proj=True,
        image_proj_dim=64,
        has_clean_x_embedder=True,
    ).eval()


def test_a_batch_is_its_samples_one_by_one():
    model = tiny_transformer()
    clip = torch.randn(3, 16, CLIP_LATENTS, 4, 4)
    cut = Cut("f1", layouts.training_plan("f1").sections[1], 1, 1)
    target, history = layouts.cut_section(clip, cut, torch.float32)
    values = {
        "hidden_states": target,
        "timestep": torch.tensor([900.0, 500.0, 20.0]),
        "guidance": torch.tensor([10_000.0, 1000.0, 5000.0]),
        "encoder_hidden_states": torch.randn(3, 7, 64),
        "pooled_projections": torch.randn(3, 48),
        "image_embeds": torch.randn(3, 16, 64),
    }
    with torch.no_grad():
        together = model(**values, encoder_attention_mask=None, history=history)
        for i in range(3):
            one = {name: value[i : i + 1] for name, value in values.items()}
            one["encoder_hidden_states"] = nn.functional.pad(one["encoder_hidden_states"], (0, 0, 0, 5))
            mask = torch.arange(12)[None] < 7
            _, alone = layouts.cut_section(clip[i : i + 1], cut, torch.float32)
            velocity = model(**one, encoder_attention_mask=mask, history=alone)
            torch.testing.assert_close(together[i : i + 1], velocity, atol=1e-5, rtol=1e-4)


def test_noise_levels_are_spread_as_a_schedule_with_more_noise_is():
    sigmas = flow_matching.draw_sigmas(20_000, 1296, 1.5, CPU, torch.Generator().manual_seed(0))
    shift = 1.5 * math.exp(0.5 + (1296 - 256) * 0.65 / 3840)
    assert sigmas.min() > 0 and sigmas.max() <= 1
    assert sigmas.median().item() == pytest.approx(shift / (shift + 1), abs=0.01)


def test_the_averages_follow_the_weights():
    module = nn.Linear(2, 2)
    averages = flow_matching.AveragedWeights(module, decay=0.9)
    with torch.no_grad():
        module.weight.fill_(1.0)
    for _ in range(200):
        averages.update(module)
    other = nn.Linear(2, 2)
    averages.copy_to(other)
    assert torch.allclose(other.weight, torch.ones(2, 2), atol=1e-3)


def moving_clips(count: int) -> torch.Tensor:
    """(count, 145, 64, 64, 3) uint8: a bright square on grey, each at its own speed."""
    clips = torch.full((count, layouts.CLIP_FRAMES, 64, 64, 3), 100, dtype=torch.uint8)
    for clip, frame in itertools.product(range(count), range(layouts.CLIP_FRAMES)):
        left = 4 + frame * (clip + 1) // 16
        clips[clip, frame, 24:40, left : left + 16] = torch.tensor([230, 40, 40], dtype=torch.uint8)
    return clips


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    return autoencoder.make_vae((4, 8, 8, 8))


def test_the_vae_learns(vae, monkeypatch):
    """At a rate for a tiny one: the real one has time."""
    monkeypatch.setattr(autoencoder, "RATE", 3e-3)
    monkeypatch.setattr(autoencoder, "MATRIX_RATE", 3e-3)
    pixels = moving_clips(1)[:, :1, 16:48, :32].permute(0, 4, 1, 2, 3).float() / 127.5 - 1
    rows = list(autoencoder.train_vae(vae, itertools.repeat(pixels), Course(steps=100), CPU, report_every=10))
    assert rows[-1]["psnr"] > rows[0]["psnr"] + 5
    assert not vae.training


def test_white_latents_show_the_same_pixels(vae):
    pixels = moving_clips(2)[:, :9]
    x = pixels.permute(0, 4, 1, 2, 3).float() / 127.5 - 1
    with torch.no_grad():
        before = vae.decode(vae.encode(x).latent_dist.mode()).sample
        autoencoder.whiten_latents(vae, *bank.latent_statistics(vae, lambda: pixels, 1))
        after = vae.decode(vae.encode(x).latent_dist.mode()).sample
    assert (after - before).abs().max() < 1e-4
    mean, spread = bank.latent_statistics(vae, lambda: pixels, 1)
    assert mean.abs().max() < 1e-3
    assert (spread - 1).abs().max() < 1e-3


@pytest.fixture(scope="module")
def clips(encoders, vae):
    """A bank of two clips of each part."""
    clips = bank.ClipBank(vae, encoders, seed=0)
    pixels = moving_clips(2)
    starts = pixels[:, 0]
    clips.add(pixels[:, : layouts.SHORT_FRAMES], [[PROMPTS[0], PROMPTS[3]], [PROMPTS[2]]], starts)
    clips.add(pixels, [[PROMPTS[0], PROMPTS[1]], [PROMPTS[2]]], starts)
    clips.add(pixels.flip(1), [[PROMPTS[0]], [PROMPTS[1]]], starts, late=True)
    clips.encode_prompts()
    return clips


def test_the_transformer_learns_from_a_bank(clips, monkeypatch):
    """At a rate for a tiny one, too."""
    monkeypatch.setattr(transformer, "RATE", 5e-3)
    assert len(clips) == 6
    model = tiny_transformer()
    nn.init.zeros_(model.proj_out.weight)
    rng = random.Random(1)
    drawn = [
        (clips.draw(2, part, no_text=0.0), Cut.draw(rng, part)) for part in layouts.PARTS for _ in range(6)
    ]

    @torch.no_grad()
    def loss() -> float:
        """Of the same samples with the same noise."""
        generator = torch.Generator().manual_seed(2)
        return sum(
            flow_matching.flow_loss(
                model,
                *layouts.cut_section(of.latents, cut, torch.float32),
                of.text,
                of.pooled,
                of.image_embeds,
                torch.full((2,), 10.0),
                flow_matching.MORE_NOISE,
                generator,
            ).item()
            for of, cut in drawn
        )

    before, kept = loss(), []
    rows = transformer.train_transformer(
        model, clips, Course(steps=30), 2, CPU, seed=0, report_every=10, keep=kept.append, keep_every=15
    )
    assert [row["step"] for row in rows] == [10, 20, 30]
    assert loss() < 0.8 * before
    assert not model.training
    midway, last = (so_far.proj_out.weight for so_far in kept)
    assert midway.any() and not torch.equal(midway, last)
    assert torch.equal(last, model.proj_out.weight)


def test_a_further_course_goes_on_from_the_last_one(vae, tmp_path, monkeypatch):
    write_encoders(tmp_path, PROMPTS, seed=0)
    vae.save_pretrained(tmp_path / "hunyuan" / "vae")
    drawn = []

    def bank_batch(rng, device):
        drawn[-1].add(rng.random())
        clips = moving_clips(2)[:, : layouts.SHORT_FRAMES]
        return clips, [[PROMPTS[0]], [PROMPTS[2]]], clips[:, 0], False

    def course(steps, **options):
        drawn.append(set())
        courses = train.Courses(Course(steps=0), Course(steps=1), Course(steps=steps))
        train.train(tmp_path, 0, courses, ("transformer",), batch=2, **options)
        weights = FramePackTransformer.from_pretrained(tmp_path / "framepack").state_dict()
        parts = json.loads((tmp_path / "training.json").read_text())["parts"]
        return weights, {name: part["steps"] for name, part in parts.items() if "transformer" in name}

    monkeypatch.setattr(train, "bank_batch", bank_batch)
    monkeypatch.setattr(train, "make_transformer", tiny_transformer)
    monkeypatch.setattr(transformer, "PARTS", ("short",))
    monkeypatch.setattr(transformer, "PART_SHARES", (1,))
    first, record = course(3)
    assert record == {"transformer": 3}
    same, record = course(0, further=True)
    assert record == {"transformer": 3, "transformer 2": 0}
    assert all(torch.equal(same[name], first[name]) for name in first)
    other, record = course(2, further=True)
    assert record == {"transformer": 3, "transformer 2": 0, "transformer 3": 2}
    assert not torch.equal(other["proj_out.weight"], first["proj_out.weight"])
    again, record = course(3)
    assert record == {"transformer": 3}
    assert all(torch.equal(again[name], first[name]) for name in first)
    assert drawn[0] & drawn[3]
    assert not drawn[0] & drawn[1] and not drawn[1] & drawn[2]


def test_a_batch_of_the_bank_belongs_together(encoders, clips):
    tokens = [len(hidden) for hidden, _ in encoders.text(PROMPTS)]
    seen = set()
    for _ in range(50):
        batch = clips.draw(3, "short", no_text=0.2)
        assert batch.latents.shape == (3, 16, 10, 8, 8)
        assert batch.text.shape[0] == batch.pooled.shape[0] == len(batch.image_embeds) == 3
        seen.add(batch.text.shape[1])
    empty = len(encoders.text([""])[0][0])
    assert seen == {tokens[0], tokens[2], tokens[3], empty}
    assert clips.draw(2, "whole").latents.shape == (2, 16, 37, 8, 8)


def test_a_late_clip_has_the_start_of_its_video_before_it(clips, vae):
    late = clips.draw(4, "late").latents
    begins = bank.encode_clips(vae, moving_clips(1)[:, :1])[0]
    assert (late[:, :, :1] - begins).abs().amax() < (late[:, :, 1:2] - begins).abs().amax()


def test_the_real_one_has_its_size_and_begins_with_nothing():
    model = transformer.make_transformer()
    assert sum(p.numel() for p in model.parameters()) == 13_752_128
    zero = [name for name, p in model.named_parameters() if not p.any() and name.endswith("linear.weight")]
    assert len(zero) == 12
    assert not model.proj_out.weight.any()


def test_what_is_drawn_ahead_keeps_its_order():
    def slow_at_times(rng: random.Random, device: torch.device) -> float:
        time.sleep(0.01 * rng.random())
        return rng.random()

    drawn = [list(itertools.islice(ahead(slow_at_times, "seed", CPU), 20)) for _ in range(2)]
    assert drawn[0] == drawn[1]
    assert len(set(drawn[0])) == 20


def test_every_weight_has_one_optimizer_and_moves():
    model = tiny_transformer()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    both = Optimizers(model, transformer.is_inside, matrix_rate=1e-2, rate=1e-2)
    sum(p.square().sum() + p.sum() for p in model.parameters()).backward()
    both.step(done=0.5)
    assert [name for name, p in model.named_parameters() if torch.equal(p, before[name])] == []
    assert all(p.grad is None for p in model.parameters())


def test_muon_makes_all_directions_equally_strong():
    for shape in ((3, 8, 20), (2, 20, 8)):
        singular = torch.linalg.svdvals(optimizers.orthogonalized(torch.randn(shape)))
        assert singular.min() > 0.5
        assert singular.max() < 1.3


def test_the_gradient_of_the_padding_is_torchs():
    for shape in ((1, 2, 3, 4, 5), (2, 1, 1, 2, 1)):
        x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        for padding in ((1, 1, 1, 1, 2, 0), (0, 0, 0, 0, 0, 0)):
            y = autoencoder._ReplicationPad.apply(x, padding)
            expected = nn.functional.pad(x, padding, mode="replicate")
            assert torch.equal(y, expected)
            weight = torch.randn_like(y)
            (mine,) = torch.autograd.grad((y * weight).sum(), x)
            (torchs,) = torch.autograd.grad((expected * weight).sum(), x)
            torch.testing.assert_close(mine, torchs)


class TestCourse:
    def test_of_steps(self):
        course = Course(steps=4)
        assert [(step, course.done) for step in course] == [(1, 0.25), (2, 0.5), (3, 0.75), (4, 1.0)]
        assert course.steps == 4

    def test_of_seconds_that_begin_with_compiling(self):
        """10 s; the first step takes 4, the others 0.125: the rates take the last 6 for their way."""
        now = [100.0]
        course = Course(seconds=10, clock=lambda: now[0])
        done = []
        for step in course:
            now[0] += 4 if step == 1 else 0.125
            done.append(course.done)
        assert course.steps == len(done) == 49
        assert max(done[:COMPILED_AFTER]) <= 1e-3 and done == sorted(done)
        assert done[COMPILED_AFTER] < 0.05 and done[-1] == pytest.approx(1)

    @pytest.mark.parametrize("lengths", [{}, {"steps": 1, "seconds": 1}])
    def test_of_one_or_the_other(self, lengths):
        with pytest.raises(ValueError, match="either"):
            Course(**lengths)


def test_the_rate_goes_up_then_down():
    rates = [optimizers.warm_cosine(done) for done in (0.001, 0.03, 0.5, 1.0)]
    assert rates == pytest.approx([0.033, 1.0, 0.505, 0.01], abs=0.005)
