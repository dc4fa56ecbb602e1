"""Latents out and in: what goes on from a checkpoint is the uninterrupted job's, bit for bit."""

import base64
import json
import struct
import tempfile
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

import core.job
from core.delivery import Delivery
from core.embedding import NoParametersError, read_embedded
from core.errors import (
    CancelledError,
    LatentsError,
    LatentsMismatchError,
    LatentsNotFoundError,
    RequestError,
    ResultTooLargeError,
    TimeLimitError,
    UploadError,
    UrlRefusedError,
)
from core.job import run_job
from core.latents import FORMAT, FREE, MAX_HEADER_BYTES, TENSORS, parse_latents
from core.pipeline import generate_video_sync
from core.progress import Pace
from core.request import VideoRequest, parse_request
from core.settings import Settings
from tests.hostile_inputs import assert_sentence
from tests.test_images import encoded, to_base64


def job_on(picture):
    return {
        "input_image": to_base64(encoded(Image.fromarray(picture), "PNG")),
        "prompt": "The circle moves.",
        "total_second_length": 1,  # 4 sections of 2 latent frames
        "latent_window_size": 2,
        "steps": 10,  # enough for TeaCache to skip some
        "return_latents": True,
        "embed_parameters": False,  # so that files are compared, not what they were asked for
    }


@pytest.fixture
def data(picture):
    return job_on(picture)


@pytest.fixture(scope="module")
def latents(tiny_models):
    """A finished I2V job's reply, from one step a section."""
    noise = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    return run_job(job_on(noise) | {"steps": 1}, tiny_models)


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch):
    """Every test's own temporary folder, empty again at its end."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    assert list(folder.iterdir()) == []


@pytest.fixture
def volume(tmp_path):
    folder = tmp_path / "volume"
    folder.mkdir()
    return Settings(volume_dir=folder)


@contextmanager
def time_up_after(sections):
    """Ends a job's time once so many sections are decoded and one more is sampled."""

    def generate(*args, deadline, **options):
        seen = []

        def on_section(sampled):
            seen.append(sampled)
            if len(seen) > sections:
                deadline._ends = 0

        return generate_video_sync(*args, deadline=deadline, on_section=on_section, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(core.job, "generate_video_sync", generate)
        yield


def tensors_of(latents_base64):
    return safetensors.torch.load(base64.b64decode(latents_base64))


def again(data, reply, **fields):
    """The same request, going on from the reply's latents, without the image."""
    rest = {key: value for key, value in data.items() if key != "input_image"}
    return rest | {"resume_latents": reply["latents_base64"]} | fields


def metadata_of(reply):
    content = base64.b64decode(reply["latents_base64"])
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length])["__metadata__"]


def repacked(reply, tensors=None, job=None, metadata=None):
    """A reply whose latents have been tampered with."""
    metadata = metadata_of(reply) if metadata is None else metadata
    if job is not None:
        metadata["job"] = json.dumps(json.loads(metadata["job"]) | job)
    content = safetensors.torch.save(tensors or tensors_of(reply["latents_base64"]), metadata)
    return {"latents_base64": base64.b64encode(content).decode()}


def same_tensors(ours, theirs):
    ours, theirs = tensors_of(ours["latents_base64"]), tensors_of(theirs["latents_base64"])
    return {name for name in TENSORS if torch.equal(ours[name], theirs[name])} == set(TENSORS)


@pytest.mark.usefixtures("quick_decode")
@pytest.mark.parametrize("model", ["i2v", "f1"])
def test_what_a_time_out_cut_short_ends_as_if_there_had_been_none(data, model, tiny_models):
    data |= {"model": model, "cfg": 2.0}
    whole = run_job(data, tiny_models)
    with time_up_after(1):
        first = run_job(data | {"partial": True, "timeout_s": 999}, tiny_models)
    assert first["partial"] and first["sections"] == 1 and "resumed_sections" not in first

    second = run_job(again(data, first), tiny_models)
    assert second["resumed_sections"] == 2  # the last one was sampled, only not decoded in time
    assert not second["partial"] and second["sections"] == 4
    assert second["video_base64"] == whole["video_base64"] != first["video_base64"]
    assert same_tensors(second, whole) and not same_tensors(first, whole)

    computed = [section["steps_computed"] for section in second["timings"]["sections"]]
    uninterrupted = [section["steps_computed"] for section in whole["timings"]["sections"]]
    assert computed == [0, 0, *uninterrupted[2:]]
    assert all(steps < 10 for steps in uninterrupted)  # TeaCache was at work


def test_the_real_decoder_joins_what_was_and_what_is_new(data, tiny_models):
    data |= {"steps": 1, "latent_window_size": 4}
    whole = run_job(data, tiny_models)
    with time_up_after(0), pytest.raises(TimeLimitError) as caught:
        run_job(data, tiny_models)
    second = run_job(again(data, caught.value.details), tiny_models)
    assert second["resumed_sections"] == 1 and second["video_base64"] == whole["video_base64"]


@pytest.mark.usefixtures("quick_decode")
@pytest.mark.parametrize("model", ["i2v", "f1"])
def test_finished_latents_are_only_decoded_again(data, model, tiny_models):
    data |= {"model": model}
    first = run_job(data, tiny_models)
    other_crf = run_job(again(data, first, mp4_crf=40), tiny_models)
    assert other_crf["video_base64"] == run_job(data | {"mp4_crf": 40}, tiny_models)["video_base64"]
    assert other_crf["video_base64"] != first["video_base64"]
    assert other_crf["resumed_sections"] == other_crf["sections"] == 4
    assert {section["steps_computed"] for section in other_crf["timings"]["sections"]} == {0}
    assert other_crf["timings"]["step"] == {"median": 0.0, "p95": 0.0}
    assert same_tensors(first, other_crf)


@pytest.mark.usefixtures("quick_decode")
def test_f1_goes_on_forward(data, tiny_models):
    data |= {"model": "f1"}
    short = run_job(data, tiny_models)
    longer = run_job(again(data, short, total_second_length=1.5), tiny_models)
    at_once = run_job(data | {"total_second_length": 1.5}, tiny_models)
    assert longer["video_base64"] == at_once["video_base64"] and longer["sections"] == 6
    assert longer["resumed_sections"] == 4 and same_tensors(longer, at_once)


@pytest.mark.usefixtures("quick_decode")
def test_i2v_cannot_become_longer_and_f1_not_shorter(data, tiny_models):
    latents = run_job(data, tiny_models)
    with pytest.raises(LatentsMismatchError, match=r"I2V samples the end first, .* only F1 can"):
        run_job(again(data, latents, total_second_length=1.5), tiny_models)
    f1 = data | {"model": "f1", "steps": 1}
    longer = run_job(f1 | {"total_second_length": 1.5}, tiny_models)
    with pytest.raises(
        LatentsMismatchError, match="have 6 sections and `total_second_length` asks for 4 only"
    ):
        run_job(again(f1, longer), tiny_models)


@pytest.mark.usefixtures("quick_decode")
@pytest.mark.parametrize("model", ["i2v", "f1"])
def test_the_history_is_the_sections_in_the_videos_order(data, model, tiny_models):
    sections = []

    def generate(*args, **options):
        return generate_video_sync(*args, on_section=sections.append, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(core.job, "generate_video_sync", generate)
        reply = run_job(data | {"model": model, "steps": 1}, tiny_models)
    sections = [sampled.latents for sampled in sections]
    history = tensors_of(reply["latents_base64"])["history"]
    assert torch.equal(history, torch.cat(sections if model == "f1" else sections[::-1], dim=2))
    assert history.dtype == torch.float32


@pytest.mark.usefixtures("quick_decode")
def test_nothing_but_its_own_fields_changes(data, tiny_models):
    with_latents = run_job(data, tiny_models)
    without = run_job(data | {"return_latents": False}, tiny_models)
    assert without["video_base64"] == with_latents["video_base64"]
    assert with_latents.keys() - without.keys() == {"latents_base64"}
    assert "resume_latents" not in run_job(again(data, with_latents), tiny_models)["parameters"]


@pytest.mark.usefixtures("quick_decode")
@pytest.mark.parametrize("seed", [None, -1])
def test_a_drawn_seed_is_the_latents_own(data, seed, tiny_models):
    drawn = run_job(data | {"seed": seed, "steps": 1}, tiny_models)
    second = run_job(again(data, drawn, seed=seed, steps=1), tiny_models)
    assert second["seed"] == drawn["seed"] and second["video_base64"] == drawn["video_base64"]
    with pytest.raises(LatentsMismatchError, match="`seed`"):
        run_job(again(data, drawn, seed=drawn["seed"] ^ 1, steps=1), tiny_models)


@pytest.mark.usefixtures("quick_decode")
def test_the_image_may_come_again_and_must_be_the_same(data, picture, tiny_models):
    data |= {"steps": 1}
    first = run_job(data, tiny_models)
    second = run_job(again(data, first, input_image=data["input_image"], preview=True), tiny_models)
    assert second["video_base64"] == first["video_base64"] and second["warnings"] == []
    for other, reason in ((255 - picture, "another `input_image`"), (picture[:128], "of another shape")):
        image = to_base64(encoded(Image.fromarray(other), "PNG"))
        with pytest.raises(LatentsMismatchError, match=reason):
            run_job(again(data, first, input_image=image), tiny_models)


@pytest.mark.usefixtures("quick_decode")
@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"steps": 2}, "The latents were made with `steps` 1, not 2."),
        ({"prompt": "Another."}, 'The latents were made with `prompt` "The circle moves.", not "Another.".'),
        ({"n_prompt": "é" * 99}, 'The latents were made with `n_prompt` "", not "' + "\\u00e9" * 6 + "...."),
        ({"model": "f1"}, 'The latents were made with `model` "i2v", not "f1".'),
        ({"cfg": 1.5}, "The latents were made with `cfg` 1.0, not 1.5."),
        ({"use_teacache": False}, "The latents were made with `use_teacache` true, not false."),
        ({"latent_window_size": 3}, "The latents were made with `latent_window_size` 2, not 3."),
        ({"resolution": 256}, "The latents were made with `resolution` 192, not 256."),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_differs_is_named(data, fields, sentence, latents, tiny_models):
    with pytest.raises(LatentsMismatchError) as caught:
        run_job(again(data | {"steps": 1}, latents) | fields, tiny_models)
    assert str(caught.value) == sentence


@pytest.mark.usefixtures("quick_decode")
def test_every_field_is_compared_or_known_to_be_free(data, latents, tiny_models):
    compared = json.loads(metadata_of(latents)["job"]).keys()
    assert compared == set(VideoRequest.model_fields) - FREE | {"sections", "timed", "transformer"}


@pytest.mark.usefixtures("quick_decode")
def test_timed_sections_must_be_the_same(data, picture, tiny_models):
    """Their images too; with the same ones it goes on to the same video."""
    image = to_base64(encoded(Image.fromarray(255 - picture), "PNG"))
    sections = [{"start_s": 0, "end_s": 0.3, "prompt": "It stops."}, {"start_s": 0.3, "image": image}]
    data |= {"steps": 1, "sections": sections}
    whole = run_job(data, tiny_models)
    with time_up_after(sections=2):
        part = run_job(data | {"timeout_s": 1000, "partial": True}, tiny_models)
    done = run_job(again(data, part), tiny_models)
    assert 0 < done["resumed_sections"] < 4 and done["video_base64"] == whole["video_base64"]
    for others in ([], sections[:1], [sections[0], sections[1] | {"image": data["input_image"]}]):
        with pytest.raises(LatentsMismatchError, match=r"made with other `sections`\.$"):
            run_job(again(data, part, sections=others), tiny_models)


@pytest.mark.usefixtures("quick_decode")
def test_no_secret_is_in_the_file(data, tiny_models):
    bucket = {
        "accessId": "an-id-of-mine",
        "accessSecret": "a-secret-of-mine",
        "bucketName": "videos-of-mine",
        "endpointUrl": "https://mine.example",
    }
    reply = run_job(data | {"s3_config": bucket, "output": "base64", "steps": 1}, tiny_models)
    content = base64.b64decode(reply["latents_base64"])
    assert b"mine" not in content and str(tempfile.gettempdir()).encode() not in content


@pytest.mark.usefixtures("quick_decode")
def test_other_weights_are_refused(data, latents, tiny_models):
    made = repacked(latents, job={"transformer": "0" * 64})
    with pytest.raises(LatentsMismatchError, match="other weights"):
        run_job(again(data, made, steps=1), tiny_models)


class TestWhereTheyGo:
    """On the volume, and inline where there is none."""

    def test_on_the_volume(self, data, volume, tiny_models, quick_decode):
        data |= {"steps": 1}
        first = run_job(data, tiny_models, volume, job_id="job-9/../x")
        handle = first["latents_handle"]
        assert "latents_base64" not in first and handle.startswith("job-9_.._x-")
        (file,) = (volume.volume_dir / "framepack-latents").iterdir()
        assert file.name == f"{handle}.safetensors"
        other = run_job(data, tiny_models, volume, job_id="job-9/../x")["latents_handle"]
        assert other != handle  # a handle is nobody's to guess, and nothing is overwritten
        rest = {key: value for key, value in data.items() if key != "input_image"}
        second = run_job(rest | {"resume_latents": handle}, tiny_models, volume)
        assert second["video_base64"] == first["video_base64"]

    def test_in_the_bucket(self, data, volume, tiny_models, quick_decode, monkeypatch):
        uploads = []

        def upload(self, path, job_id, bucket, check_cancelled):
            uploads.append((path.suffix, job_id))
            return {"video_url": f"https://x.example/{path.name}", "expires_at": "then"}

        monkeypatch.setattr("core.delivery.Delivery._uploaded", upload)
        settings = replace(volume, bucket_name="videos")
        reply = run_job(data | {"steps": 1}, tiny_models, settings, job_id="a", deliver=Delivery(settings))
        assert uploads == [
            (".safetensors", "a")
        ]  # the video fits the reply, the latents are better off there
        assert reply["latents_url"] == "https://x.example/latents.safetensors"
        assert reply["latents_expires_at"] == "then" and "latents_handle" not in reply
        reply = run_job(data | {"steps": 1, "output": "base64"}, tiny_models, settings)
        assert "latents_base64" in reply and len(uploads) == 1

    def test_a_storage_that_refuses_is_not_the_end(
        self, data, volume, tiny_models, quick_decode, monkeypatch
    ):
        def upload(*_):
            raise UploadError("The latents could not be uploaded.")

        monkeypatch.setattr("core.delivery.Delivery._uploaded", upload)
        reply = run_job(data | {"steps": 1}, tiny_models, replace(volume, bucket_name="videos"))
        assert "latents_handle" in reply

    def test_video_and_latents_share_the_inline_limit(self, data, tiny_models, quick_decode):
        data |= {"steps": 1}
        reply = run_job(data, tiny_models)
        both = sum(len(base64.b64decode(reply[name])) for name in ("video_base64", "latents_base64"))
        fits = run_job(data, tiny_models, Settings(inline_limit_mb=both / 1e6))
        assert "latents_base64" in fits and fits["warnings"] == []
        short = run_job(data, tiny_models, Settings(inline_limit_mb=(both - 3) / 1e6))
        assert "latents_base64" not in short and "video_base64" in short
        assert len(short["warnings"]) == 1 and short["warnings"][0].startswith("The latents (0.")

    def test_an_error_brings_them_along(self, data, volume, tiny_models, quick_decode):
        """A video that is too large can be decoded again with another `mp4_crf`."""
        settings = replace(volume, inline_limit_mb=0.001)
        with pytest.raises(ResultTooLargeError) as caught:
            run_job(data | {"steps": 1}, tiny_models, settings, deliver=Delivery(settings))
        assert caught.value.details.keys() == {"video_path", "latents_handle"}
        handle = caught.value.details["latents_handle"]
        smaller = data | {"steps": 1, "resume_latents": handle, "mp4_crf": 51}
        assert run_job(smaller, tiny_models, volume)["resumed_sections"] == 4

    def test_a_cancelled_job_leaves_none(self, data, volume, tiny_models, quick_decode):
        reports = []

        def check():
            if len(reports) > 8:
                raise CancelledError("The job was cancelled.")

        with pytest.raises(CancelledError) as caught:
            run_job(data | {"steps": 1}, tiny_models, volume, report=reports.append, check_cancelled=check)
        assert caught.value.details == {} and list(volume.volume_dir.iterdir()) == []

    def test_a_full_disk_costs_the_latents_only(self, data, volume, tiny_models, quick_decode, monkeypatch):
        def full(*_, **__):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("core.latent_store.shutil.copyfile", full)
        assert "latents_base64" in run_job(data | {"steps": 1}, tiny_models, volume)
        monkeypatch.setattr("core.latents.safetensors.torch.save_file", full)
        reply = run_job(data | {"steps": 1}, tiny_models, volume)
        assert reply["warnings"] == ["The latents could not be written: the disk is full or broken."]
        assert "video_base64" in reply


class TestHostile:
    """Whatever comes in as latents is refused in one sentence, before anything is encoded or sampled."""

    @pytest.fixture(autouse=True)
    def nothing_is_generated(self, monkeypatch):
        monkeypatch.setattr(core.job, "generate_video_sync", None)

    @pytest.mark.parametrize(
        ("change", "sentence"),
        [
            (lambda t: t.pop("image"), "must have just the tensors"),
            (lambda t: t.update(more=torch.zeros(1)), "must have just the tensors"),
            (lambda t: t.update(history=t["history"].half()), "`history` is not float32"),
            (lambda t: t.update(start_latent=t["start_latent"].double()), "`start_latent` is not float32"),
            (lambda t: t.update(image=t["image"].float()), "`image` is not uint8"),
            (
                lambda t: t.update(generator_state=t["generator_state"].int()),
                "`generator_state` is not uint8",
            ),
            (lambda t: t.update(history=t["history"][:, :, :7].clone()), "not whole sections of 2"),
            (lambda t: t.update(history=t["history"][..., :-1].clone()), "not whole sections of 2"),
            (lambda t: t.update(history=t["history"][:, :, :0].clone()), "not whole sections of 2"),
            (lambda t: t.update(history=torch.zeros(3)), "`history` has the shape 3, not whole"),
            (lambda t: t.update(history=torch.cat([t["history"]] * 2, 2)), "have 8 sections of 4"),
            (lambda t: t.update(start_latent=torch.zeros(1, 16, 1, 0, 0)), "`start_latent` has the shape"),
            (lambda t: t.update(start_latent=torch.zeros([1] * 300)), "has the shape 1×1×1×1×1×1×1×1, not"),
            (lambda t: t.update(image=t["image"][:-8].clone()), "`image` has the shape"),
            (lambda t: t["history"].view(-1)[5:6].fill_(torch.nan), "`history` has values that no latents"),
            (lambda t: t["history"].view(-1)[5:6].fill_(-torch.inf), "`history` has values that no latents"),
            (lambda t: t["start_latent"].view(-1)[5:6].fill_(1e5), "`start_latent` has values that no"),
            (
                lambda t: t.update(generator_state=t["generator_state"][:9].clone()),
                "`generator_state` is damaged",
            ),
            (lambda t: t["generator_state"].fill_(255), "`generator_state` is damaged"),
        ],
    )
    def test_tensors(self, data, latents, tiny_models, change, sentence):
        tensors = tensors_of(latents["latents_base64"])
        change(tensors)
        made = repacked(latents, tensors)
        with pytest.raises(LatentsError, match=sentence) as caught:
            run_job(again(data, made, steps=1), tiny_models)
        assert_sentence(str(caught.value))
        assert caught.value.code == "invalid_latents"

    @pytest.mark.parametrize(
        "job",
        [
            *({"seed": value} for value in (None, -1, 2**32, 1.0, True, "1")),
            *({"sections": value} for value in (0, 10**9, [])),
            *({"latent_window_size": value} for value in (0, 34, 2.0)),
            *({"model": value} for value in ("x", None, [])),
            {"transformer": 5},
        ],
        ids=str,
    )
    def test_metadata(self, data, latents, tiny_models, job):
        with pytest.raises(LatentsError, match="metadata is damaged"):
            run_job(again(data, repacked(latents, job=job), steps=1), tiny_models)

    @pytest.mark.parametrize("text", ["", "[]", "null", "5", "{", "[" * 100_000, "1" * 5000])
    def test_metadata_that_is_no_object(self, data, latents, tiny_models, text):
        made = repacked(latents, metadata={"format": FORMAT, "job": text})
        with pytest.raises(LatentsError, match="metadata is damaged"):
            run_job(again(data, made, steps=1), tiny_models)

    def test_a_value_of_the_files_is_shown_short_and_on_one_line(self, data, latents, tiny_models):
        for value in ("a\n\u202eb" * 99, ["x" * 99] * 99, float("nan"), {"a": None}, 10**400):
            made = repacked(latents, job={"steps": value})
            with pytest.raises(LatentsMismatchError, match="made with `steps` ") as caught:
                run_job(again(data, made, steps=1), tiny_models)
            assert_sentence(str(caught.value))

    @pytest.mark.parametrize("metadata", [{}, {"format": "pt"}, {"format": "framepack-latents-2"}])
    def test_other_safetensors_files(self, data, latents, tiny_models, metadata):
        with pytest.raises(LatentsError, match=f"not of the format {FORMAT}"):
            run_job(again(data, repacked(latents, metadata=metadata), steps=1), tiny_models)

    @pytest.mark.parametrize(
        ("content", "sentence"),
        [
            (b"\x89PNG" * 99, "not a safetensors file"),
            (struct.pack("<Q", 2**63) + b"x" * 200, "not a safetensors file"),
            (struct.pack("<Q", 150) + b"{" * 150, "not a safetensors file"),
            (struct.pack("<Q", 90_000) + b"[" * 90_000, "not a safetensors file"),
            (struct.pack("<Q", 150) + b"[]".ljust(150), "not of the format"),
            (struct.pack("<Q", 150) + b'{"__metadata__": []}'.ljust(150), "not of the format"),
            (struct.pack("<Q", MAX_HEADER_BYTES + 1) + b" " * (MAX_HEADER_BYTES + 1), "header has 1,000,001"),
        ],
        ids=range(7),
    )
    def test_files_that_are_none(self, data, tiny_models, content, sentence):
        made = {"latents_base64": base64.b64encode(content).decode()}
        with pytest.raises(LatentsError, match=sentence) as caught:
            run_job(again(data, made), tiny_models)
        assert_sentence(str(caught.value))

    def test_cut_short_anywhere(self, data, latents, tiny_models):
        whole = base64.b64decode(latents["latents_base64"])
        for end in (*range(0, 9), 100, 500, len(whole) // 2, len(whole) - 1):
            made = {"latents_base64": base64.b64encode(whole[:end].ljust(120, b" ")).decode()}
            with pytest.raises(LatentsError) as caught:
                run_job(again(data, made, steps=1), tiny_models)
            assert_sentence(str(caught.value))

    def test_lying_offsets(self, latents):
        whole = base64.b64decode(latents["latents_base64"])
        (length,) = struct.unpack("<Q", whole[:8])
        header = json.loads(whole[8 : 8 + length])
        for offsets in ([0, 2**60], [-4, 0], [4, 0], [0, 0], ["a", 1], None):
            text = json.dumps(header | {"history": header["history"] | {"data_offsets": offsets}}).encode()
            with pytest.raises(LatentsError, match="damaged or cut short"):
                parse_latents(struct.pack("<Q", len(text)) + text + whole[8 + length :])

    def test_more_than_the_request_could_have(self, data, tiny_models):
        made = {"latents_base64": "A" * 20_000_000}
        with pytest.raises(LatentsError, match="more than this request's could have"):
            run_job(again(data, made), tiny_models)

    @pytest.mark.parametrize("text", ["n" * 129, "é" * 200, "data:;base64," + "A" * 200, "\0" * 200])
    def test_texts_that_are_not_base64(self, data, tiny_models, text):
        with pytest.raises(LatentsError, match="no https URL, no handle and not valid base64"):
            run_job(again(data, {"latents_base64": text}), tiny_models)

    @pytest.mark.parametrize(
        "handle",
        ["../secret", "..", ".", "a/b", "/etc/passwd", "a\\b", "a b", "~", "a\0", "é", ".hidden", " "],
    )
    def test_a_handle_is_no_path(self, data, volume, tiny_models, handle):
        (volume.volume_dir / "secret.safetensors").write_bytes(b"secret")
        with pytest.raises(LatentsError, match="no handle: letters") as caught:
            run_job(again(data, {"latents_base64": handle}), tiny_models, volume)
        assert caught.value.code == "invalid_latents"

    def test_an_unknown_handle(self, data, volume, tiny_models):
        with pytest.raises(LatentsNotFoundError, match="no latents under the handle"):
            run_job(again(data, {"latents_base64": "job-1-0"}), tiny_models, volume)
        with pytest.raises(LatentsNotFoundError, match="no network volume"):
            run_job(again(data, {"latents_base64": "job-1-0"}), tiny_models)

    def test_a_file_on_the_volume_is_believed_no_more(self, data, volume, tiny_models):
        folder = volume.volume_dir / "framepack-latents"
        folder.mkdir()
        (folder / "job-1.safetensors").write_bytes(b"x" * 300)
        with pytest.raises(LatentsError, match="not a safetensors file"):
            run_job(again(data, {"latents_base64": "job-1"}), tiny_models, volume)
        with (folder / "job-2.safetensors").open("wb") as file:
            file.truncate(10**12)
        with pytest.raises(LatentsError, match="more than this request's could have"):
            run_job(again(data, {"latents_base64": "job-2"}), tiny_models, volume)

    def test_urls_go_through_the_guard(self, data, tiny_models):
        for url in ("http://example.com/x", "https://127.0.0.1/x", "file:///etc/passwd", "s3://bucket/key"):
            with pytest.raises(UrlRefusedError):
                run_job(again(data, {"latents_base64": url}), tiny_models)


@pytest.mark.usefixtures("quick_decode")
def test_from_a_url(data, latents, tiny_models, monkeypatch):
    asked = []

    def fetch(url, *, max_bytes, **_):
        asked.append((url, max_bytes))
        return base64.b64decode(latents["latents_base64"])

    monkeypatch.setattr(core.job, "fetch_url", fetch)
    second = run_job(again(data, {"latents_base64": " https://a.example/x?sig=1"}, steps=1), tiny_models)
    assert second["resumed_sections"] == 4 and same_tensors(second, latents)
    ((url, most),) = asked
    assert url == "https://a.example/x?sig=1"
    assert len(base64.b64decode(latents["latents_base64"])) < most < 10_000_000


@pytest.mark.usefixtures("quick_decode")
def test_memory_that_runs_out_starts_the_latents_anew(data, tiny_models, monkeypatch):
    whole, calls = run_job(data, tiny_models), []

    def generate(*args, **options):
        def on_section(sampled):
            if len(calls) == 1 and sampled.section.index == 1:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory.")

        calls.append(1)
        return generate_video_sync(*args, on_section=on_section, **options)

    monkeypatch.setattr(core.job, "generate_video_sync", generate)
    reply = run_job(data, tiny_models)
    assert len(calls) == 2 and same_tensors(reply, whole)


def test_the_pace_counts_this_jobs_own_steps():
    times = iter([0.0, 5.0, 10.0])
    pace = Pace(steps=40, clock=lambda: next(times), given=20)
    assert [pace.left(done) for done in (0, 20, 30)] == [None, None, 10.0]


def test_one_of_image_start_and_latents_is_required():
    for fields in ({}, {"input_image": None}, {"resume_latents": None}):
        with pytest.raises(RequestError, match=r"^`input_image`, `start` or `input_video` is required\.$"):
            parse_request({"prompt": "x"} | fields)
    assert parse_request({"prompt": "x", "resume_latents": "y"}).input_image is None


@pytest.mark.usefixtures("quick_decode")
def test_each_of_several_outputs_has_its_latents(tiny_models, data):
    data |= {"steps": 2, "seed": 5, "num_outputs": 2}
    reply = run_job(data, tiny_models)
    for number, output in enumerate(reply["outputs"]):
        alone = again(data, output, num_outputs=1, seed=5 + number)
        assert run_job(alone, tiny_models)["video_base64"] == output["video_base64"]


def test_several_outputs_cannot_go_on_from_one_seed(tiny_models, data):
    with pytest.raises(RequestError, match=r"^`num_outputs` must be 1 with `resume_latents` \(got 2\)"):
        run_job(data | {"resume_latents": "a-handle", "num_outputs": 2}, tiny_models)


@pytest.mark.usefixtures("quick_decode")
@pytest.mark.parametrize("cache", [{"cache": "teacache"}, {"use_teacache": True}, {"cache_threshold": 0.15}])
def test_a_cache_may_be_asked_for_in_other_words(tiny_models, data, latents, cache):
    assert run_job(again(data, latents, steps=1) | cache, tiny_models)["resumed_sections"] == 4


@pytest.mark.usefixtures("quick_decode")
def test_a_file_without_the_image_has_no_parameters_in_it(tiny_models, data, latents, tmp_path):
    """They would name no image, and make nothing again."""
    reply = run_job(again(data, latents, steps=1, embed_parameters=True), tiny_models)
    path = tmp_path / "video.mp4"
    path.write_bytes(base64.b64decode(reply["video_base64"]))
    with pytest.raises(NoParametersError):
        read_embedded(path)
