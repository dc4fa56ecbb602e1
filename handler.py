"""RunPod wiring: load once, one job at a time on the GPU thread, progress out, cancels in.

    python handler.py                                   run ./test_input.json and leave outputs/<job id>.mp4
    python handler.py --test_input '{"input": {...}}'   the same with this input
    python handler.py --rp_serve_api                    serve /run, /runsync and /status on port 8000

On RunPod the same file is the worker's entry point. Importing it loads nothing; whoever calls `handler`
gets the models loaded in front of the first job.
"""

import argparse
import asyncio
import base64
import json
import logging
import os
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("RUNPOD_DEBUG_LEVEL", "INFO")  # the SDK's default prints every input and output
# imported, the SDK asks py-cpuinfo for the processor's name, which takes a second to measure the clock too
sys.modules.setdefault("cpuinfo", SimpleNamespace(get_cpu_info=dict))

import runpod
from tqdm import tqdm

from core import logs
from core.delivery import inlined
from core.errors import WorkerError
from core.file_format import LATENTS, suffix_of
from core.fitness import run_checks
from core.progress import Progress
from core.request import input_of
from core.settings import Settings
from core.weights.read_ahead import read_ahead
from core.worker import Worker
from runpod_posts import RunPodProgress, post_results_here

worker = Worker()


async def handler(job: dict) -> dict:
    """Answer one RunPod job: `{"id": …, "input": {…}}` → the reply, or `{"error": …, "code": …}`."""
    return await _run(job, RunPodProgress(str(job.get("id", ""))))


async def local_handler(job: dict) -> dict:
    """`handler` for a person at a terminal: a progress bar, and the video in a file instead of base64."""
    with LocalProgress() as progress:
        reply = await _run(job, progress)
    name = Path(str(job["id"])).name
    if "error" in reply:
        return _in_files(reply, name, "")
    suffix = suffix_of(reply["content_type"])
    if "outputs" not in reply:
        return _in_files(reply, name, suffix)
    outputs = [
        _in_files(output, f"{name}-{number}", suffix) for number, output in enumerate(reply["outputs"], 1)
    ]
    return reply | {"outputs": outputs}


def _in_files(reply: dict, name: str, suffix: str) -> dict:
    """The reply, or one output of it, with files' paths in place of their base64."""
    paths = {}
    for what, ending in (("video", suffix), ("latents", LATENTS.suffix)):
        if f"{what}_base64" in reply:
            path = Settings.from_env().output_dir / f"{name}{ending}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(base64.b64decode(reply[f"{what}_base64"]))
            paths[f"{what}_path"] = str(path)
            print(f"{what.capitalize()}: {path}")
    return paths | {
        key: value for key, value in reply.items() if key not in ("video_base64", "latents_base64")
    }


async def _run(job: dict, progress: "RunPodProgress | LocalProgress") -> dict:
    cancelled = threading.Event()
    future = worker.submit(str(job.get("id", "")), input_of(job), progress.report, cancelled)
    done = asyncio.wrap_future(future)
    try:
        reply = await asyncio.shield(done)
        await progress.settle()
        return reply
    except asyncio.CancelledError:
        # the GPU thread must be free before RunPod starts the next job
        cancelled.set()
        while not (done.done() or future.cancel()):
            try:
                await asyncio.wait([done])
            except asyncio.CancelledError:
                continue
        await progress.settle()
        raise


class LocalProgress:
    """A tqdm bar over all steps of a job."""

    def __enter__(self) -> "LocalProgress":
        self._bar: tqdm | None = None
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def report(self, progress: Progress) -> None:
        if self._bar is None:
            self._bar = tqdm(unit="step", file=sys.stderr)
        self._bar.total = progress.steps_in_all  # known once the request is read
        self._bar.set_description(f"section {progress.section}/{progress.sections} {progress.stage}")
        self._bar.update(max(0, progress.steps_done - self._bar.n))

    async def settle(self) -> None:
        pass


def main() -> None:
    """Start the worker; exits with status 1 and one line when it cannot."""
    # the SDK parses these again, and more
    options = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    options.add_argument("--test_input")
    options.add_argument("--rp_serve_api", action="store_true")
    given, _ = options.parse_known_args()
    on_runpod = "RUNPOD_WEBHOOK_GET_JOB" in os.environ
    post_results_here()
    local = not given.rp_serve_api and (given.test_input is not None or not on_runpod)
    logs.configure(
        as_json="RUNPOD_ENDPOINT_ID" in os.environ,  # as the SDK decides it
        level=logging.WARNING if local else logging.INFO,  # a person has the bar
    )
    if local or given.rp_serve_api:
        worker.deliver = inlined  # RunPod's payload limits do not hold here
    try:
        if local:
            _check_test_input(given.test_input)
        read_ahead(Settings.from_env())
        if local or given.rp_serve_api:
            worker.start()
    except WorkerError as error:
        sys.exit(f"The worker cannot start: {error}")
    # run before any job is taken; RunPod is told the reason when one raises
    runpod.serverless.register_fitness_check(check_machine)
    runpod.serverless.register_fitness_check(load_models)
    runpod.serverless.start({"handler": local_handler if local else handler})


def check_machine() -> None:
    """Raises FitnessError when this machine's disk, ffmpeg or GPU will not do."""
    run_checks(Settings.from_env())


def load_models() -> None:
    """Raises WorkerError when a model is missing or broken."""
    worker.start()


def _check_test_input(text: str | None) -> None:
    """The SDK would answer a broken test input with a traceback, after the models have loaded."""
    source = "--test_input" if text else "test_input.json"
    try:
        job = json.loads(text or Path(source).read_text(encoding="utf-8"))
    except OSError:
        raise WorkerError("there is no test_input.json here, and no --test_input was given.") from None
    except ValueError as error:
        raise WorkerError(f"{source} is not valid JSON: {error}.") from None
    if not isinstance(job, dict) or job.get("input") is None:
        raise WorkerError(f'{source} must be an object of the form {{"input": {{...}}}}.')


if __name__ == "__main__":
    main()
