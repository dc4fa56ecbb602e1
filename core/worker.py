"""A worker: models loaded once, jobs one at a time on one thread, every outcome a reply."""

import hashlib
import json
import logging
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from core.delivery import Deliver, Delivery
from core.errors import CancelledError, GpuError, ResultTooLargeError, WorkerError, error_reply
from core.logs import current_job
from core.progress import Progress
from core.settings import Settings

log = logging.getLogger(__name__)

MAX_REPLY_BYTES = 20_000_000  # what RunPod's `/runsync` takes
KEPT_REPLIES = 8
KEPT_BYTES = 64_000_000


class Worker:
    """Owns the models and the only thread that touches the GPU.

    `load` returns the models; it runs once, on that thread, at `start()` or in front of the first job.
    `deliver` turns a finished MP4 into the reply's video fields; by default as the environment says.
    """

    def __init__(self, load: Callable[[], Any] | None = None, deliver: Deliver | None = None) -> None:
        self._load = load
        self.deliver = deliver
        self._models: Any = None
        self._cold_start_told = False
        self._replies = RecentReplies()
        self._gpu = ThreadPoolExecutor(max_workers=1, thread_name_prefix="gpu")

    def start(self) -> None:
        """Load the models now. Raises WorkerError with one sentence when that cannot be done."""
        self._gpu.submit(self._ready_models).result()

    def submit(
        self,
        job_id: str,
        data: Any,
        report: Callable[[Progress], None] = lambda progress: None,
        cancelled: threading.Event | None = None,
    ) -> Future[dict]:
        """Queue one job. The future gives its reply, an error reply included; it never raises.

        Once `cancelled` is set the job ends within one step. A job that was answered a moment ago and comes
        again, with its id and its input, gets the same reply without being run.
        """
        return self._gpu.submit(self._answer, job_id, data, report, cancelled or threading.Event())

    def _answer(
        self, job_id: str, data: Any, report: Callable[[Progress], None], cancelled: threading.Event
    ) -> dict:
        current_job.set(job_id)
        try:
            if (reply := self._replies.get(job_id, data)) is not None:
                log.info("delivered again: answered with its first result")
                return reply
            return self._run(job_id, data, report, cancelled)
        except WorkerError as error:
            log.info("%s: %s", error.code, error)
            return error_reply(error)
        except Exception as error:
            log.exception("job %s failed", job_id)
            return error_reply(_told(error, job_id))
        finally:
            current_job.set(None)

    def _run(
        self, job_id: str, data: Any, report: Callable[[Progress], None], cancelled: threading.Event
    ) -> dict:
        from core.job import run_job  # torch and the models' libraries: only once there is a job

        def check_cancelled() -> None:
            if cancelled.is_set():
                raise CancelledError("The job was cancelled.")

        check_cancelled()
        settings = Settings.from_env()
        models = self._ready_models()
        reply = run_job(
            data,
            models,
            settings,
            job_id=job_id,
            report=report,
            check_cancelled=check_cancelled,
            deliver=self.deliver or Delivery(settings),
        )
        if not self._cold_start_told:  # the first job is the one that waited for the start
            reply["timings"]["model_load"] = round(reply["timings"]["model_load"] + models.load_seconds, 4)
            self._cold_start_told = True
        text = json.dumps(reply, allow_nan=False)  # what is not JSON, RunPod would post broken or not at all
        if self.deliver is None and len(text) > MAX_REPLY_BYTES:
            raise ResultTooLargeError(
                f"The reply has {len(text):,} bytes; at most {MAX_REPLY_BYTES:,} arrive."
            )
        self._replies.keep(job_id, data, text)
        log.info("done in %.1f s", reply["timings"]["total"])
        return reply

    def _ready_models(self) -> Any:
        if self._models is None:
            load = self._load
            if load is None:
                from core.pipeline import initialize_models as load
            self._models = load()
            from diffusers_helper.memory import keep_for_good  # torch, as in `_run`

            keep_for_good()
        return self._models


def _told(error: Exception, job_id: str) -> WorkerError:
    """What the caller hears of an exception that nobody foresaw."""
    if "torch" in sys.modules:
        from diffusers_helper.memory import is_gpu_failure

        if is_gpu_failure(error):
            return GpuError("The GPU failed during this job; the worker is being replaced.")
    return WorkerError(f"The worker failed on this job; its log names it {job_id}.")


class RecentReplies:
    """The last replies as JSON text: a platform that delivers a job twice pays for it once."""

    def __init__(self) -> None:
        self._texts: OrderedDict[str, tuple[bytes, str]] = OrderedDict()

    def get(self, job_id: str, data: Any) -> dict | None:
        """The reply to this job, if it is the same job."""
        if job_id not in self._texts:
            return None
        digest, text = self._texts[job_id]
        if digest != _digest(data):
            return None
        reply = json.loads(text)
        reply["warnings"].append("The job was delivered more than once; this is its first result.")
        return reply

    def keep(self, job_id: str, data: Any, text: str) -> None:
        """Remember `text`, at the cost of the oldest ones."""
        self._texts[job_id] = _digest(data), text
        while len(self._texts) > KEPT_REPLIES or sum(len(t) for _, t in self._texts.values()) > KEPT_BYTES:
            self._texts.popitem(last=False)


def _digest(data: Any) -> bytes:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode("utf-8", "surrogatepass")).digest()
