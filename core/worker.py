"""A worker: models loaded once, jobs one at a time on one thread, every outcome a reply."""

import json
import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from core.delivery import Delivery
from core.errors import CancelledError, WorkerError, error_reply
from core.progress import Progress
from core.settings import Settings

log = logging.getLogger(__name__)


class Worker:
    """Owns the models and the only thread that touches the GPU.

    `load` returns the models; it runs once, on that thread, at `start()` or in front of the first job.
    `deliver` turns a finished MP4 into the reply's video fields; by default as the environment says.
    """

    def __init__(
        self, load: Callable[[], Any] | None = None, deliver: Callable[..., dict] | None = None
    ) -> None:
        self._load = load
        self.deliver = deliver
        self._models: Any = None
        self._cold_start_told = False
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

        Once `cancelled` is set the job ends within one step.
        """
        return self._gpu.submit(self._answer, job_id, data, report, cancelled or threading.Event())

    def _answer(
        self, job_id: str, data: Any, report: Callable[[Progress], None], cancelled: threading.Event
    ) -> dict:
        def check_cancelled() -> None:
            if cancelled.is_set():
                raise CancelledError("The job was cancelled.")

        try:
            from core.job import run_job  # torch and the models' libraries: only once there is a job

            check_cancelled()
            models = self._ready_models()
            reply = run_job(
                data,
                models,
                job_id=job_id,
                report=report,
                check_cancelled=check_cancelled,
                deliver=self.deliver or Delivery(Settings.from_env()),
            )
            json.dumps(reply, allow_nan=False)  # what is not JSON, RunPod would post broken or not at all
        except WorkerError as error:
            log.info("job %s: %s: %s", job_id, error.code, error)
            return error_reply(error)
        except Exception:
            log.exception("job %s failed", job_id)
            return error_reply(WorkerError(f"The worker failed on this job; its log names it {job_id}."))
        if not self._cold_start_told:  # the first job is the one that waited for the start
            reply["timings"]["model_load"] = round(reply["timings"]["model_load"] + models.load_seconds, 4)
            self._cold_start_told = True
        return reply

    def _ready_models(self) -> Any:
        if self._models is None:
            load = self._load
            if load is None:
                from core.pipeline import initialize_models as load
            self._models = load()
        return self._models
