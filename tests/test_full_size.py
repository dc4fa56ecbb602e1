"""The benchmark beside the official code, on the tiny models and a stand-in for its checkout."""

import os
import re
import sys
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLHunyuanVideo
from torch import nn

from benchmarks import (
    cold_start,
    evaluations,
    features,
    full_size,
    full_size_models,
    memory_limits,
    official,
    steadiness,
    step_profile,
)
from benchmarks.floors import Rates, disk_rate, evict, flop_of
from benchmarks.full_size import Row, decoded_frames, main, table
from benchmarks.official import OfficialDemo, twins
from core.pipeline.loading import load_transformer
from core.progress import Progress
from diffusers_helper.vae_fused import FusedDecoder
from tests.fake_official import write_fake_official
from tests.tiny import TINY_MODELS

FIELDS = {
    "prompt": "A cat.",
    "seed": 1,
    "total_second_length": 1,
    "latent_window_size": 4,
    "steps": 2,
    "use_teacache": False,
    "mp4_crf": 40,
}


@pytest.fixture
def checkout(tmp_path):
    return write_fake_official(tmp_path / "official")


@pytest.fixture
def demo(checkout, tiny_models, tmp_path):
    return OfficialDemo(checkout, twins(tiny_models), tmp_path)


@pytest.fixture
def small_frames(monkeypatch, quick_decode):
    """224×256 in place of 608×640, and no VAE decode."""
    from core.pipeline import decoding

    for module in (full_size, full_size_models):
        monkeypatch.setattr(module, "HEIGHT", 256)
        monkeypatch.setattr(module, "WIDTH", 224)
    small = replace(full_size_models.profile_of(TINY_MODELS), resolution=256)
    monkeypatch.setattr(full_size, "profile_of", lambda folder: small)
    monkeypatch.setattr(full_size, "decode_latents", decoding.decode_latents)


class TestOfficial:
    def test_a_job_is_timed_by_stage(self, demo, picture):
        job = demo.run(picture, FIELDS)
        assert len(job.sample) == len(job.decode) == 2
        assert job.computed == 4
        stages = [job.encode, *job.sample, *job.decode, job.mp4]
        assert min(stages) > 0
        assert sum(stages) < job.total
        assert job.peak_gb is None

    def test_a_failed_job_says_what_it_printed(self, demo, picture):
        with pytest.raises(RuntimeError, match="This seed is refused"):
            demo.run(picture, FIELDS | {"seed": 666})

    def test_a_second_job_counts_for_itself(self, demo, picture):
        demo.run(picture, FIELDS)
        assert demo.run(picture, FIELDS | {"steps": 1}).computed == 2

    def test_nothing_of_it_stays_in_the_way(self, demo):
        import transformers

        import diffusers_helper.memory

        assert "gradio" not in sys.modules
        assert "official" not in diffusers_helper.memory.__file__
        assert transformers.LlamaModel.__module__.startswith("transformers")
        assert os.environ.get("HF_HOME") != "elsewhere"
        assert torch.float16 is not torch.float32

    def test_the_norms_that_it_changes_are_changed_for_it_alone(self, demo, picture):
        theirs = type(demo.transformer).forward.__globals__["norm"]
        assert nn.LayerNorm.forward is not theirs
        demo.run(picture, FIELDS)
        assert theirs.calls
        assert nn.LayerNorm.forward is not theirs

    def test_it_says_how_it_attends(self, demo, monkeypatch):
        assert demo.attention == "torch's SDPA"
        found = type(demo.transformer).forward.__globals__
        monkeypatch.setitem(found, "flash_attn_func", print)
        assert official._attention_of(demo.transformer) == "flash-attn"

    def test_told_of_little_memory_it_swaps(self, checkout, tiny_models, tmp_path):
        free = [10.0, 61.0]
        demo = OfficialDemo(checkout, twins(tiny_models), tmp_path, lambda: free[0])
        assert demo._demo.high_vram is False
        seen = demo._demo.get_cuda_free_memory_gb
        free.pop(0)
        assert seen("cuda") == 61.0

    def test_the_weights_are_shared_and_the_vae_is_the_librarys(self, demo, tiny_models):
        theirs, ours = demo._demo.vae, tiny_models.vae
        assert theirs.decoder.conv_in.conv.weight.data_ptr() == ours.decoder.conv_in.conv.weight.data_ptr()
        assert isinstance(ours.decoder, FusedDecoder)
        assert not any(type(m).__module__.startswith("diffusers_helper") for m in theirs.modules())
        library = AutoencoderKLHunyuanVideo.from_config(ours.config)
        assert [type(m) for m in theirs.modules()] == [type(m) for m in library.modules()]


def test_every_way_to_evaluate_beside_the_official_model(checkout, small_frames, capsys, monkeypatch):
    marked = []  # tests/test_compile.py compiles
    monkeypatch.setattr(evaluations, "compile_blocks", marked.append)
    monkeypatch.setattr(
        evaluations, "load_transformer", lambda path, _: load_transformer(path, torch.bfloat16)
    )
    model = TINY_MODELS / "framepack"
    arguments = "--window 3 --rounds 1 --attention math"
    evaluations.main(["--model", str(model), "--official", str(checkout), *arguments.split()])
    printed = capsys.readouterr().out
    assert ", ours by math," in printed
    lines = re.findall(r"^\|.*", printed, re.M)
    rows = {
        name: cells
        for name, *cells in ([c.strip() for c in line.strip("|").split("|")] for line in lines[2:])
    }
    assert [*rows] == ["official"] + [
        name + compiled for name in ("ours", "fp8", "fp8, attention too") for compiled in ("", ", compiled")
    ]
    errors = {name: float(cells[2]) for name, cells in rows.items()}
    assert 1e-4 < errors["ours"] < 0.01  # what bfloat16 rounds away
    assert errors["ours, compiled"] < 2 * errors["ours"] < errors["fp8"] < 0.05
    assert abs(errors["fp8, compiled"] - errors["fp8"]) < 0.01
    assert rows["official"][1] == "1.000"
    assert abs(errors["fp8, attention too"] - errors["fp8"]) > 1e-5
    assert len(marked) == 3


def test_an_evaluation_is_told_by_kinds_of_kernels(small_frames, capsys):
    arguments = "--window 3 --attention math --precision fp8 --top 3"
    step_profile.main(["--model", str(TINY_MODELS / "framepack"), *arguments.split()])
    printed = capsys.readouterr().out
    whole = float(re.search(r"fp8, math, compile off: (\S+) ms", printed)[1])
    times = {kind: float(time) for kind, time in re.findall(r"^\| ([a-z ]+) \| (\S+) ms \|", printed, re.M)}
    assert times["matrix products"] > 0 and times["copies"] > 0
    assert sum(times.values()) < 3 * whole
    assert len(re.findall(r"^\| `", printed, re.M)) == 3
    assert step_profile.kind_of("cudnn_generated_fort_native_sdpa_sm90_flash_fprop") == "attention"
    assert step_profile.kind_of("nvjet_sm90_tst_128x256_64x4_2x1_v_bz_TNT") == "matrix products"


def test_a_table_of_both_with_floors(checkout, small_frames, capsys):
    arguments = "--rows step job teacache forecast --seconds 1 --window 4 --steps 2 --rounds 1"
    main([str(TINY_MODELS), "--official", str(checkout), *arguments.split()])
    printed = capsys.readouterr().out
    difference = re.search(r"relative difference of the model's outputs: (\S+)", printed)
    assert float(difference[1]) < 1e-5  # the stand-in's model is the library's, on our weights
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in re.findall(r"^\|.*", printed, re.M)]
    rows = {re.sub(r"\d+ and 4 evaluations", "", row[0]): row[1:] for row in cells[2:]}
    assert [*rows] == [
        "the model, one evaluation",
        "encode: text, VAE, CLIP vision",
        "step",
        "section of 2 steps, window 4",
        "decode, 4 latent frames",
        "decode, 9 latent frames",
        "MP4, the whole video",
        "job of 1 s ()",
        "job of 1 s, TeaCache ()",
        "job of 1 s, ours forecasting ()",
    ]
    for floor, ours, theirs, ratio, above in rows.values():
        ours, theirs = float(ours.split()[0]), float(theirs.split()[0])
        assert float(floor.split()[0]) >= 0
        assert float(above) > 0
        if min(ours, theirs) > 0.1:  # shown to the millisecond
            assert float(ratio) == pytest.approx(ours / theirs, rel=0.02)


def test_in_float8_the_official_model_keeps_its_weights(checkout, small_frames, capsys):
    arguments = "--rows step job --seconds 1 --window 4 --steps 1 --rounds 1 --precision fp8 --attention fp8"
    main([str(TINY_MODELS), "--official", str(checkout), *arguments.split()])
    printed = capsys.readouterr().out
    assert "ours is fp8, compiled: False, and attends by flash\n" in printed  # no fp8 on a CPU
    difference = re.search(r"relative difference of the model's outputs: (\S+)", printed)
    assert 1e-3 < float(difference[1]) < 0.1


def test_what_is_compiled_is_measured_beside_the_official_code_alone(capsys):
    with pytest.raises(SystemExit):
        main([str(TINY_MODELS), "--compile", "on"])
    assert "--official is missing" in capsys.readouterr().err


def test_without_a_checkout_there_is_only_ours(small_frames, capsys):
    arguments = "--rows step --window 2 --rounds 1 --attention math"
    main([str(TINY_MODELS), *arguments.split()])
    printed = capsys.readouterr().out
    assert "and attends by math\n" in printed
    (row,) = re.findall(r"^\| the model.*", printed, re.MULTILINE)
    assert [cell.strip() for cell in row.strip("|").split("|")][3:5] == ["—", "—"]


def test_a_cold_start_up_to_the_second_job(checkout, monkeypatch, capfd):
    monkeypatch.setenv("MODEL_PROFILE", "demo")  # small frames
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    cold_start.main([str(TINY_MODELS), "--official", str(checkout), "--steps", "1"])
    printed = capfd.readouterr().out
    (ours,) = re.findall(r"^\| ours \|(.*)\|$", printed, re.M)
    loaded, first_step, first, second = (float(cell.split()[0]) for cell in ours.split("|"))
    assert 0 < loaded < first_step
    assert first > 0 and second > 0
    ratio = re.search(r"official code's loaded, (\S+) s: (\S+)", printed)
    assert float(ratio[2]) == pytest.approx(first_step / float(ratio[1]), rel=0.02)
    assert "official code's loading alone" in printed


def test_the_official_code_is_limited_as_ours_is(checkout, small_frames, monkeypatch, capsys):
    limits = []

    @contextmanager
    def limited(device, gigabytes):
        limits.append(gigabytes)
        yield

    monkeypatch.setattr(memory_limits, "limited", limited)
    rows = memory_limits.official_jobs(checkout, TINY_MODELS, [24.0, 6.0], FIELDS)
    assert limits == [24.0, 6.0] == [*rows]
    cells = [cell.strip() for cell in rows[6.0].strip("|").split("|")]
    assert len(cells) == 12 and cells[0] == "official, 6 GB" and cells[8].endswith(" s")
    refused = memory_limits.official_jobs(checkout, TINY_MODELS, [6.0], FIELDS | {"seed": 666})
    assert "This seed is refused" in refused[6.0]


def test_decodes_are_the_plans():
    assert decoded_frames({"total_second_length": 5, "latent_window_size": 9}) == [9, 18, 18, 19]
    assert decoded_frames({"total_second_length": 1, "latent_window_size": 9}) == [10]


class TestFloors:
    def test_the_slower_of_computing_and_moving(self):
        rates = Rates(flops=1e12, bandwidth=1e9)
        assert rates.floor(2e12, 1e9) == 2
        assert rates.floor(1e12, 3e9) == 3

    def test_flop_are_counted(self):
        a, b = torch.zeros(8, 16), torch.zeros(16, 32)
        assert flop_of(lambda: a @ b) == 2 * 8 * 16 * 32

    def test_files_are_read_as_they_are(self, tmp_path):
        path = tmp_path / "weights"
        path.write_bytes(np.random.default_rng(0).bytes(10**6))
        assert evict([path]) == 10**6
        assert disk_rate(path) > 0

    def test_a_row_without_the_official_code_has_no_ratio(self):
        shown = table([Row("a", 2.0, None, 1.0), Row("b", 2.0, 4.0, None, "GB")])
        assert "| a | 1.000 s | 2.000 s | — | — | 2.00 |" in shown
        assert "| b | — | 2.000 GB | 4.000 GB | 0.500 | — |" in shown


def test_what_features_add_to_a_job(small_frames, capsys, monkeypatch):
    monkeypatch.setattr(features, "profile_of", full_size.profile_of)
    features.main(["models", "--steps", "1", "--rounds", "1", "--only", "LoRA,MagCache,poster"])
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    names, _, with_it, adds = zip(*rows, strict=True)
    assert names == ("| feature", "| LoRA", "| MagCache", "| poster")
    assert with_it[1].endswith(" s") and with_it[3].endswith(" s")
    assert "has no measured magnitudes" in adds[2]


def test_whether_the_pace_holds(small_frames, capsys, monkeypatch):
    monkeypatch.setattr(steadiness, "profile_of", full_size.profile_of)
    monkeypatch.setattr(
        steadiness, "VARIED", {"a window of 3": {"latent_window_size": 3, "total_second_length": 1}}
    )
    steadiness.main(["models", "--steps", "2", "--long", "2.4", "--long-steps", "1"])
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line[:1] == "|"]
    varied, long = ([row for row in rows if row[0] == name] for name in ("a window of 3", "2.4 s"))
    assert float(varied[0][3]) >= 1 and varied[0][4].isdigit()
    assert long[0][1] == "2" and long[0][5].endswith("%") and long[0][6].endswith("GB")


def test_a_step_is_what_lies_between_two_reports(monkeypatch):
    clock = iter([0.0, 1.0, 3.0, 10.0, 11.0])
    monkeypatch.setattr(steadiness.time, "perf_counter", lambda: next(clock))
    pace, progress = steadiness.Pace(), Progress(sections=2, steps=2)
    for section, step in ((1, 0), (1, 1), (1, 2), (2, 1), (2, 2)):
        pace(progress.at("sample", section, step))
    assert pace.steps == [1, 2, 7, 1]  # the decode between the sections is the next one's
    assert pace.sections == [3, 8]
