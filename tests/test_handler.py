"""handler.py and its posts on their own: when progress is sent, and that none follows a result."""

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest

import runpod_posts
from core.progress import Pace, Progress
from runpod_posts import RunPodProgress

ROOT = Path(__file__).parents[1]


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture(autouse=True)
def on_runpod(monkeypatch):
    monkeypatch.setenv("RUNPOD_WEBHOOK_POST_OUTPUT", "http://127.0.0.1:9/done?")


def at(stage="sample", step=1, **values):
    return Progress(sections=2, steps=10).at(stage, section=1, step=step, **values)


async def let_it_send():
    for _ in range(5):
        await asyncio.sleep(0)


def test_updates_are_throttled():
    async def job():
        sent, clock = [], Clock()

        async def post(update):
            sent.append(update)

        progress = RunPodProgress("a", post, clock)
        for _ in range(10):
            progress.report(at())
            await let_it_send()
            clock.now += 0.5
        return sent

    sent = asyncio.run(job())
    assert sent == [at().as_dict()] * 3  # at 0, 2 and 4 s


def test_what_came_too_soon_is_sent_when_it_is_due(monkeypatch):
    """The last word of a stage that then takes long, in its newest state and once."""
    monkeypatch.setattr(runpod_posts, "PROGRESS_INTERVAL_S", 0.02)

    async def job():
        sent = []

        async def post(update):
            sent.append((update["stage"], update["step"]))

        progress = RunPodProgress("a", post)
        for step in (1, 2, 3):
            progress.report(at(step=step))
        progress.report(at("decode", step=4, preview=lambda: "never made"))
        await asyncio.sleep(0.1)
        return sent

    assert asyncio.run(job()) == [("sample", 1), ("decode", 4)]


def test_steps_quicker_than_the_interval_do_not_keep_previews_back(monkeypatch):
    """What waited is not sent in place of the next step's report, which has a preview."""
    monkeypatch.setattr(runpod_posts, "PROGRESS_INTERVAL_S", 0.5)

    async def job():
        sent = []

        async def post(update):
            sent.append(update.get("preview"))

        progress = RunPodProgress("a", post)
        for step in range(1, 8):
            progress.report(at(step=step, preview=lambda step=step: f"of step {step}"))
            await asyncio.sleep(0.2)
        return sent

    sent = asyncio.run(job())
    assert len(sent) > 1 and all(sent)


def test_previews_are_made_only_for_what_is_sent():
    made = []

    async def job():
        async def post(update):
            assert update["preview"] == "jpeg"

        progress = RunPodProgress("a", post, Clock())
        for _ in range(10):
            progress.report(at(preview=lambda: made.append(1) or "jpeg"))
        await let_it_send()

    asyncio.run(job())
    assert made == [1]


def test_the_result_waits_for_the_update_under_way():
    async def job():
        arrived, gate = [], asyncio.Event()

        async def post(update):
            await gate.wait()
            arrived.append(update)

        progress = RunPodProgress("a", post, Clock())
        progress.report(at())
        await let_it_send()
        settling = asyncio.create_task(progress.settle())
        await let_it_send()
        assert not settling.done() and not arrived
        gate.set()
        await settling
        return arrived

    assert len(asyncio.run(job())) == 1


def test_an_update_that_hangs_is_dropped_and_none_follows(monkeypatch):
    monkeypatch.setattr(runpod_posts, "PROGRESS_PATIENCE_S", 0.01)

    async def job():
        ends = []

        async def post(update):
            try:
                await asyncio.sleep(3600)
            except asyncio.CancelledError:
                ends.append("dropped")
                raise

        clock = Clock()
        progress = RunPodProgress("a", post, clock)
        progress.report(at())
        await let_it_send()
        await progress.settle()
        clock.now += 60
        progress.report(at())
        await let_it_send()
        return ends

    assert asyncio.run(job()) == ["dropped"]


def test_an_update_that_fails_is_no_fault_of_the_job():
    async def job():
        async def post(update):
            raise OSError("no route")

        progress = RunPodProgress("a", post, Clock())
        progress.report(at())
        await let_it_send()
        await progress.settle()

    asyncio.run(job())


def test_outside_runpod_nothing_is_sent(monkeypatch):
    monkeypatch.delenv("RUNPOD_WEBHOOK_POST_OUTPUT")
    sent = []

    async def job():
        async def post(update):
            sent.append(update)

        RunPodProgress("a", post).report(at())
        await let_it_send()

    asyncio.run(job())
    assert sent == []


def test_seconds_left_follow_the_pace():
    clock = Clock()
    pace = Pace(20, clock)
    assert pace.left(0) is None
    clock.now += 10
    assert pace.left(5) == 30.0
    clock.now += 10
    assert pace.left(20) == 0.0


def test_importing_loads_nothing():
    """No model, and not even torch: a platform may import the handler only to look at it."""
    code = "import sys, handler; sys.exit('torch' in sys.modules or handler.worker._models is not None)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_the_sdk_does_not_measure_the_processor_at_every_start():
    program = (
        "import handler, cpuinfo\n"
        "from runpod.serverless.utils import rp_debugger\n"
        "assert cpuinfo.get_cpu_info() == {}\n"
        "assert rp_debugger.PROCESSOR == 'Unable to get processor info.'"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)
