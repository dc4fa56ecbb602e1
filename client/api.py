"""RunPod's endpoint API and the SDK's local server: jobs in, their states out. Knows no file and no terminal.

A request is sent again, after growing pauses, when the answer is 429, 5xx or unreadable or the connection
drops; all but a submission that may have arrived: a job queued twice is paid for twice.
"""

import math
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx

from client.errors import AuthorizationError, TimedOutError, UnreachableError, UsageError, WaitOverError

RUNPOD_URL = "https://api.runpod.ai/v2"
MAX_REQUEST_BYTES = 10_000_000  # what /run takes
FINAL = ("COMPLETED", "FAILED", "CANCELLED", "TIMED_OUT")

CONNECT_S = 10.0
ANSWER_S = 30.0  # from one byte to the next
MAX_PAUSE_S = 3.0  # between two polls of a job that shows no change
MAX_BACKOFF_S = 30.0
SUBMIT_ATTEMPTS = 6
UNKNOWN_ATTEMPTS = 3  # in a row: a job just queued may not be known everywhere yet
SILENCE_S = 600.0  # without any answer about a job, before it is left to itself
CANCEL_S = 20.0  # for a cancellation to be confirmed

JOB_ID = re.compile(r"[\w-]{1,200}", re.ASCII)
LOOPBACK = ("localhost", "127.0.0.1", "::1")

Note = Callable[[str], None]
Sleep = Callable[[float], None]


@dataclass(frozen=True)
class Job:
    """A job as the server last told of it."""

    id: str
    status: str
    reply: dict = field(repr=False)

    @property
    def output(self) -> Any:
        """The worker's progress, or its reply once the job is COMPLETED."""
        return self.reply.get("output")

    @property
    def is_final(self) -> bool:
        return self.status in FINAL


class TransientError(Exception):
    """Worth another attempt; `lost` where the request may have been carried out."""

    def __init__(self, sentence: str, lost: bool = False, retry_after: float = 0.0) -> None:
        super().__init__(sentence)
        self.lost = lost
        self.retry_after = retry_after


class NotFoundError(TransientError):
    """HTTP 404."""


class Endpoint:
    """One RunPod endpoint. `pause` is the first wait between two polls; `note` hears of every trouble."""

    def __init__(self, url: str, endpoint_id: str, key: str, pause: float, note: Note) -> None:
        self._server = _Server(f"{url}/{endpoint_id}", key)
        self._id = endpoint_id
        self._pause = pause
        self._note = note

    def submit(self, content: bytes, sleep: Sleep) -> str:
        """Queue a job; its id. Raises UsageError, AuthorizationError or UnreachableError."""
        failures = 0
        while True:
            try:
                return self._server.job("POST", "run", content).id
            except NotFoundError:
                raise UnreachableError(f"RunPod knows no endpoint {self._id} (HTTP 404).") from None
            except TransientError as error:
                if error.lost:
                    raise UnreachableError(
                        f"{error} The job may be queued all the same: before submitting it again, see the "
                        "endpoint's requests in RunPod's console."
                    ) from None
                failures += 1
                if failures == SUBMIT_ATTEMPTS:
                    raise UnreachableError(f"{error} Nothing was submitted in {failures} attempts.") from None
                self._note(f"{error} Trying again.")
                sleep(_backoff(self._pause, failures, error))

    def follow(self, job_id: str, wait: float | None = None) -> Iterator[Job]:
        """The job's state at every poll, the last one final.

        A failed poll says nothing about the job: polling goes on until RunPod was silent for ten minutes.
        Raises UsageError, AuthorizationError, UnreachableError, or WaitOverError after `wait` seconds.
        """
        heard = time.monotonic()
        give_up = heard + (math.inf if wait is None else wait)
        last, pause, failures, unknown = None, self._pause, 0, 0
        while True:
            try:
                job = self._status(job_id)
            except TransientError as error:
                failures += 1
                unknown = unknown + 1 if isinstance(error, NotFoundError) else 0
                if unknown == UNKNOWN_ATTEMPTS:
                    raise UnreachableError(
                        f"Endpoint {self._id} knows no job {job_id}; results are kept for 30 minutes."
                    ) from None
                if time.monotonic() - heard > SILENCE_S:
                    raise UnreachableError(f"{error} That for {SILENCE_S / 60:g} minutes.") from None
                if failures == 1:
                    self._note(f"{error} The job goes on; asking again.")
                pause = _backoff(self._pause, failures, error)
            else:
                yield job
                if job.is_final:
                    return
                moved = last is None or (job.status, job.output) != (last.status, last.output)
                pause = self._pause if moved else max(self._pause, min(1.5 * pause, MAX_PAUSE_S))
                last, heard, failures, unknown = job, time.monotonic(), 0, 0
            left = give_up - time.monotonic()
            if left <= 0:
                raise WaitOverError(f"The job is not finished after {wait:g} s.")
            time.sleep(min(pause, left))

    def cancel(self, job_id: str) -> Job | None:
        """Cancel the job and see it end: its final state, or None where that was not seen in time.

        Raises AuthorizationError.
        """
        give_up = time.monotonic() + CANCEL_S
        ask: Callable[[str], Job] = self._cancel
        failures = 0
        while True:
            pause = self._pause
            try:
                job = ask(job_id)
                if job.is_final:
                    return job
                ask = self._status
            except UsageError:  # what has ended cannot be cancelled
                ask = self._status
            except TransientError as error:
                failures += 1
                pause = _backoff(self._pause, failures, error)
            if time.monotonic() + pause > give_up:
                return None
            time.sleep(pause)

    def _status(self, job_id: str) -> Job:
        return self._server.job("GET", f"status/{job_id}")

    def _cancel(self, job_id: str) -> Job:
        return self._server.job("POST", f"cancel/{job_id}")


class LocalServer:
    """`python handler.py --rp_serve_api`: one answer at a job's end, no progress and no cancelling."""

    def __init__(self, url: str) -> None:
        self._server = _Server(url, key=None)
        self._url = url

    def run(self, content: bytes, wait: float | None) -> Job:
        """Run a job to its end. Raises UsageError, UnreachableError, or TimedOutError after `wait` s."""
        try:
            return self._server.job("POST", "runsync", content, wait)
        except _SilentError:
            raise TimedOutError(f"The job is not finished after {wait:g} s.") from None
        except TransientError as error:
            raise UnreachableError(
                f"{error} `python handler.py --rp_serve_api` should be running at {self._url}."
            ) from None


class _SilentError(TransientError):
    """No byte came for as long as one may take."""


class _Server:
    """One attempt at one request: a JSON object comes back, or an exception that says what to make of it."""

    def __init__(self, url: str, key: str | None) -> None:
        self._key = key
        self._http = httpx.Client(
            base_url=url,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            trust_env=not is_loopback(url),  # a proxy cannot reach this machine
        )
        self._host = httpx.URL(url).host

    def job(
        self, method: str, path: str, content: bytes | None = None, answer_s: float | None = ANSWER_S
    ) -> Job:
        """Raises UsageError, AuthorizationError, NotFoundError or TransientError."""
        response = self._send(method, path, content, answer_s)
        status = response.status_code
        if status in (401, 403):
            raise AuthorizationError(f"{self._host} refused the API key (HTTP {status}).")
        if status == 404:
            raise NotFoundError(f"{self._host} answered HTTP 404.")
        if status in (408, 429) or status >= 500:
            raise TransientError(
                f"{self._host} answered HTTP {status}.",
                lost=status == 504,  # a gateway's: what did not answer it may have heard it
                retry_after=_seconds(response.headers.get("Retry-After", "")),
            )
        if status >= 300:
            raise UsageError(f"{self._host} refused the request (HTTP {status}){self._reason(response)}")
        try:
            return _job(response.json())
        except (ValueError, RecursionError):
            raise TransientError(f"{self._host} answered something that is not a job.", lost=True) from None

    def _send(self, method: str, path: str, content: bytes | None, answer_s: float | None) -> httpx.Response:
        timeout = httpx.Timeout(answer_s, connect=CONNECT_S)
        headers = {"Content-Type": "application/json"} if content else {}
        try:
            return self._http.request(method, path, content=content, headers=headers, timeout=timeout)
        except httpx.ConnectTimeout:
            raise TransientError(f"{self._host} does not answer.") from None
        except (httpx.ConnectError, httpx.ProxyError) as error:
            raise TransientError(f"{self._host} cannot be reached ({error}).") from None
        except httpx.ReadTimeout:
            raise _SilentError(f"{self._host} did not answer in time.", lost=True) from None
        except httpx.RequestError:
            raise TransientError(f"The connection to {self._host} dropped.", lost=True) from None

    def _reason(self, response: httpx.Response) -> str:
        """What a refusal says of itself; the key is kept out, should the answer repeat it."""
        text = response.text.replace(self._key, "…") if self._key else response.text
        return f": {' '.join(text.split())[:300]}" if text else "."


def _job(reply: Any) -> Job:
    """Raises ValueError."""
    match reply:
        case {"id": str(job_id), "status": str(status)} if JOB_ID.fullmatch(job_id):
            return Job(job_id, status, reply)
    raise ValueError


def is_loopback(url: str) -> bool:
    return httpx.URL(url).host in LOOPBACK


def _backoff(pause: float, failures: int, error: TransientError) -> float:
    return min(max(pause * 2 ** (failures - 1), error.retry_after), MAX_BACKOFF_S)


def _seconds(text: str) -> float:
    return float(text) if text.isdecimal() else 0.0
