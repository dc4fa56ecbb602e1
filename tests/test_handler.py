"""handler.py on its own: when progress is sent, and when it must have arrived."""

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest

import handler
from core.progress import Progress

ROOT = Path(__file__).parents[1]


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def progress(monkeypatch):
    """A RunPodProgress on a clock the test moves, and what it sent."""
    monkeypatch.setenv("RUNPOD_WEBHOOK_POST_OUTPUT", "http://127.0.0.1:9/done?")
    sent, clock = [], Clock()
    reporter = handler.RunPodProgress(
        {"id": "a", "input": {"input_image": "secret"}},
        send=lambda job, update: sent.append((job, update)),
        clock=clock,
    )
    return reporter, sent, clock


def at(stage="sample", step=1):
    return Progress(sections=2, steps=10).at(stage, section=1, step=step)


def test_updates_are_throttled(progress):
    reporter, sent, clock = progress
    for _ in range(10):
        reporter.report(at())
        clock.now += 0.5
    assert len(sent) == 3  # at 0, 2 and 4 s
    assert sent[0] == ({"id": "a"}, at().as_dict())


def test_the_last_stage_sends_nothing(progress):
    reporter, sent, _ = progress
    reporter.report(at("mp4_encode"))
    assert sent == []


def test_a_fresh_update_delays_the_result_an_old_one_does_not(progress, monkeypatch):
    reporter, _, clock = progress
    waits = []

    async def sleep(seconds):
        waits.append(seconds)

    monkeypatch.setattr(asyncio, "sleep", sleep)
    asyncio.run(reporter.settle())
    assert waits == []
    reporter.report(at())
    clock.now += 0.25
    asyncio.run(reporter.settle())
    clock.now += 60
    asyncio.run(reporter.settle())
    assert waits == [0.75, 0.0]


def test_outside_runpod_nothing_is_sent(monkeypatch):
    monkeypatch.delenv("RUNPOD_WEBHOOK_POST_OUTPUT", raising=False)
    sent = []
    handler.RunPodProgress({"id": "a"}, send=lambda *update: sent.append(update)).report(at())
    assert sent == []


def test_importing_loads_nothing():
    """No model, and not even torch: a platform may import the handler only to look at it."""
    code = "import sys, handler; sys.exit('torch' in sys.modules or handler.worker._models is not None)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
