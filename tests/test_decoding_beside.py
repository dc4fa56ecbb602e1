"""A section is decoded beside the next one's steps, as a GPU does it; here the CPU is told that it may."""

import threading

import pytest
import torch

from core.deadline import Deadline
from core.errors import CancelledError, TimeLimitError
from core.pipeline import decoding, generate_video_sync
from core.request import VideoRequest
from core.timing import JobTimer

SECTIONS, STEPS = 3, 3


@pytest.fixture
def beside(monkeypatch):
    monkeypatch.setattr(decoding, "decodes_beside", lambda *_: True)


@pytest.fixture
def run(tiny_models, picture, tmp_path, quick_decode):
    def run(**options):
        request = VideoRequest(
            input_image="given below",
            prompt="a cat turns its head",
            total_second_length=0.4 * SECTIONS,
            latent_window_size=3,
            steps=STEPS,
            resolution=256,
            seed=0,
            cache="none",
            partial=options.pop("partial", False),
        )
        path = tmp_path / "video.mp4"
        path.unlink(missing_ok=True)
        return generate_video_sync(tiny_models, picture, request, path, **options)

    return run


@pytest.fixture
def before_decoding(monkeypatch, quick_decode):
    """`before_decoding(wait)` has `wait(n)` run before the n-th decode."""

    def before_decoding(wait):
        decode, count = decoding.decode_latents, iter(range(1, 100))

        def waiting(*args, **options):
            running.append(1)
            try:
                wait(next(count))
                return decode(*args, **options)
            finally:
                running.pop()

        monkeypatch.setattr(decoding, "decode_latents", waiting)

    running = []
    yield before_decoding
    assert not running  # when the job has ended, however it did


def test_the_same_video(run, beside, monkeypatch):
    latents = []
    video = run(on_section=lambda sampled: latents.append(sampled.latents)).path.read_bytes()
    monkeypatch.setattr(decoding, "decodes_beside", lambda *_: False)
    expected = []
    assert video == run(on_section=lambda sampled: expected.append(sampled.latents)).path.read_bytes()
    assert len(latents) == SECTIONS and torch.equal(torch.cat(latents), torch.cat(expected))


def test_steps_go_on_meanwhile(run, beside, before_decoding):
    """The first decode ends only when a step of the second section has."""
    stepped = threading.Event()

    def report(progress):
        if progress.stage == "sample" and progress.section == 2 and progress.step >= 1:
            stepped.set()

    before_decoding(lambda n: n > 1 or stepped.wait(60) or pytest.fail("no step beside the decode"))
    timer = JobTimer()
    video = run(report=report, timer=timer)
    assert stepped.is_set() and video.sections == SECTIONS
    assert all({"sample", "decode"} <= section.keys() for section in timer.sections)


def test_what_fails_there_stops_the_steps(run, beside, before_decoding):
    failed, steps = threading.Event(), []

    def fail(n):
        failed.set()
        raise RuntimeError("no decode today")

    def report(progress):
        if progress.stage == "sample" and progress.section == 2:
            assert failed.wait(60)
            steps.append(progress.step)

    before_decoding(fail)
    with pytest.raises(RuntimeError, match="no decode today"):
        run(report=report)
    assert len(steps) <= STEPS - 1


def test_a_cancelled_job_waits_for_it_and_no_longer(run, beside, before_decoding):
    begun, cancelled = threading.Event(), threading.Event()

    def wait(n):
        begun.set()
        assert cancelled.wait(60)
        raise CancelledError("there, too")  # as the decoder's own check would

    def check():
        if cancelled.is_set():
            raise CancelledError("here")

    def report(progress):
        if progress.stage == "sample" and progress.section == 2:
            assert begun.wait(60)
            cancelled.set()

    before_decoding(wait)
    with pytest.raises(CancelledError, match="here"):
        run(report=report, check_cancelled=check)


def test_what_was_decoded_beside_is_in_a_partial_video(run, beside):
    """The time is up in the second section; the first one's decode may still be under way."""
    now = [0.0]

    def report(progress):
        if progress.stage == "sample" and progress.section == 2 and progress.step == 2:
            now[0] = 100.0

    def deadline():
        return Deadline(50.0, clock=lambda: now[0])

    assert run(report=report, deadline=deadline(), partial=True).sections == 1
    now[0] = 0.0
    with pytest.raises(TimeLimitError, match="with 1 of 3 sections finished"):
        run(report=report, deadline=deadline())
