"""What a worker posts to RunPod: progress while a job runs, and the result, so that neither goes wrong.

The SDK posts each progress update on a thread of its own, in no order and perhaps after the result, which
leaves the job IN_PROGRESS for ever; and it gives a result up as soon as a connection drops or the answer is
a 429 or a 400. Both are done here instead, over the SDK's own session and URLs.
"""

import asyncio
import base64
import json
import logging
import os
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace

import aiohttp
from runpod.http_client import AsyncClientSession
from runpod.serverless.modules import rp_http, rp_job

from core.delivery import Delivery
from core.errors import WorkerError, error_reply
from core.file_format import suffix_of
from core.logs import current_job
from core.progress import Progress
from core.settings import Settings

log = logging.getLogger(__name__)

PROGRESS_INTERVAL_S = 2.0
PROGRESS_PATIENCE_S = 2.0  # for an update under way when the result is ready; then it is dropped
RESULT_WAITS_S = (1, 2, 4, 8, 15, 30)  # between attempts to post a result
RESULT_TIMEOUT_S = 120  # of one attempt
FOR_GOOD = range(400, 500)  # RunPod's answer will not change, except:
NOT_FOR_GOOD = (408, 425, 429)

Post = Callable[[dict], Awaitable[None]]


class RunPodProgress:
    """Sends a job's progress, at most every two seconds, one update at a time, none after `settle()`.

    What comes too soon waits its turn, unless something newer comes. Previews are made on the GPU thread, of
    what is sent at once and only then: what waits loses its own, so it waits one interval more for an update
    that brings another. Made on the event loop; `report` is called on the GPU thread.
    """

    def __init__(self, job_id: str, post: Post | None = None, clock: Callable[[], float] = time.monotonic):
        self._job_id = job_id
        self._post = post or self._post_to_runpod
        self._clock = clock
        self._last: float | None = None
        self._enabled = "RUNPOD_WEBHOOK_POST_OUTPUT" in os.environ
        self._loop = asyncio.get_running_loop()
        self._under_way: asyncio.Task | None = None
        self._waiting: Progress | None = None
        self._timer: asyncio.TimerHandle | None = None

    def report(self, progress: Progress) -> None:
        if not self._enabled:
            return
        now = self._clock()
        wait = 0.0 if self._last is None else self._last + PROGRESS_INTERVAL_S - now
        if wait <= 0:
            self._last = now
            self._loop.call_soon_threadsafe(self._start, progress.as_dict())
        else:
            patience = wait + PROGRESS_INTERVAL_S if progress.preview else wait
            self._loop.call_soon_threadsafe(self._wait, replace(progress, preview=None), patience)

    async def settle(self) -> None:
        """Send no more, and return once what is under way has arrived or was dropped."""
        self._enabled = False
        if self._timer is not None:
            self._timer.cancel()
        if self._under_way is not None:
            _, late = await asyncio.wait([self._under_way], timeout=PROGRESS_PATIENCE_S)
            for task in late:
                task.cancel()
                await asyncio.wait([task])

    def _wait(self, progress: Progress, seconds: float) -> None:
        self._waiting = progress
        if self._timer is None:
            self._timer = self._loop.call_later(seconds, self._send_waiting)

    def _send_waiting(self) -> None:
        self._last = self._clock()
        self._start(self._waiting.as_dict())

    def _start(self, update: dict) -> None:
        self._waiting = None  # it is older
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._enabled and (self._under_way is None or self._under_way.done()):
            self._under_way = self._loop.create_task(self._send(update))

    async def _send(self, update: dict) -> None:
        try:
            await self._post(update)
        except Exception as error:
            log.info("progress was not sent: %s", type(error).__name__)

    async def _post_to_runpod(self, update: dict) -> None:
        async with AsyncClientSession() as session:
            await _post(session, {"status": "IN_PROGRESS", "output": update}, self._job_id)


def post_results_here() -> None:
    """Have the SDK's loop post results through `send_result`."""
    rp_job.send_result = send_result


async def send_result(
    session: aiohttp.ClientSession, job_data: dict, job: dict, is_stream: bool = False
) -> None:
    """Post a job's final result; never raises.

    Dropped connections, 429 and 5xx are tried again for a minute. A result that is refused for good, or never
    gets through, has its video put where it can be fetched, and a small reply that says where is posted.
    """
    current_job.set(job["id"])
    try:
        if problem := await _posted(session, job_data, job["id"]):
            log.error("RunPod did not take the result: %s", problem)
            smaller = await asyncio.to_thread(_without_video, job_data, job["id"], problem)
            log.error("instead: %s", json.dumps({k: v for k, v in smaller.items() if k != "output"}))
            if problem := await _posted(session, smaller, job["id"]):
                log.error("RunPod did not take that either: %s", problem)
    finally:
        current_job.set(None)


async def _posted(session: aiohttp.ClientSession, body: dict, job_id: str) -> str | None:
    """None once `body` has arrived, else what is in the way."""
    problem = None
    for wait in (*RESULT_WAITS_S, None):
        try:
            await _post(session, body, job_id)
            return None
        except aiohttp.ClientResponseError as error:
            problem = f"HTTP {error.status}"
            if error.status in FOR_GOOD and error.status not in NOT_FOR_GOOD:
                return problem
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            problem = type(error).__name__
        if wait is not None:
            log.warning("posting the result failed (%s); again in %d s", problem, wait)
            await asyncio.sleep(wait)
    return problem


async def _post(session: aiohttp.ClientSession, body: dict, job_id: str) -> None:
    """One attempt, in the form that the SDK gives its own. An error status raises ClientResponseError."""
    async with session.post(
        rp_http.JOB_DONE_URL.replace("$ID", job_id) + "&isStream=false",
        data=json.dumps(body, ensure_ascii=False).encode("utf-8", "replace"),
        headers={
            "charset": "utf-8",
            "Content-Type": "application/x-www-form-urlencoded",
            "X-Request-ID": job_id,
        },
        timeout=aiohttp.ClientTimeout(total=RESULT_TIMEOUT_S),
        raise_for_status=True,
    ) as response:
        await response.read()


def _without_video(job_data: dict, job_id: str, problem: str) -> dict:
    """The same result with the inlined video elsewhere, or an error that says where it was kept."""
    output = dict(job_data.get("output") or {})
    several = [dict(entry) for entry in output.pop("outputs", [])]
    if any([entry.pop("latents_base64", None) is not None for entry in (output, *several)]):
        output["warnings"] = [*output.get("warnings", []), "The latents did not fit the reply."]
    details: dict = {}
    try:
        if "video_base64" in output:
            return job_data | {"output": _elsewhere(output, job_id, output.get("content_type"))}
        if any("video_base64" in entry for entry in several):
            stored = [
                _elsewhere(entry, f"{job_id}-{number}", output.get("content_type"))
                for number, entry in enumerate(several, 1)
            ]
            return job_data | {"output": output | {"outputs": stored}}
    except WorkerError as error:
        details = error.details
    except OSError as error:
        log.error("the video could not be kept: %s", error)
    refused = WorkerError(f"RunPod did not take the result ({problem}).").with_details(**details)
    reply = error_reply(refused)
    return {"error": reply.pop("error"), "output": reply}


def _elsewhere(reply: dict, job_id: str, content_type: str | None) -> dict:
    """A reply or one output, with a URL in place of an inlined video. Raises WorkerError or OSError."""
    if "video_base64" not in reply:
        return reply
    rest = {name: value for name, value in reply.items() if name != "video_base64"}
    video = base64.b64decode(reply["video_base64"])
    return rest | Delivery(Settings.from_env()).rescued(video, job_id, suffix_of(content_type))
