"""A finished file → what the caller gets, so that no result is lost.

RunPod drops a result over 10 MB (`/run`) or 20 MB (`/runsync`) without a word, so a video that is too
large to inline goes to object storage, and where there is none, or it fails, to the network volume.
"""

import base64
import logging
import re
import shutil
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from core.deadline import Deadline
from core.errors import ResultTooLargeError, TimeLimitError, UploadError, UrlRefusedError, WorkerError
from core.fetch import guard_client
from core.file_format import FORMATS, LATENTS, content_type_of
from core.guard import check_url
from core.latent_store import keep_latents
from core.request import VideoRequest
from core.settings import Settings

log = logging.getLogger(__name__)

MB = 1_000_000
PART_BYTES = 8 * 1024 * 1024  # one part in memory at a time, whatever the video's size
MAX_ATTEMPTS = 4  # of each request, with exponential backoff
READ_TIMEOUT_S = 30  # of one request
POLL_S = 0.05  # between looks at a running upload

_CODE = re.compile(r"[A-Za-z0-9._-]{1,64}")  # what a stranger's storage says goes into a sentence and a log

CheckCancelled = Callable[[], None]
Deliver = Callable[[Path, str, VideoRequest, CheckCancelled, int], dict]


@dataclass(frozen=True)
class Bucket:
    """Where in object storage, and with whose credentials; boto3's own chain where there are none."""

    name: str
    endpoint_url: str | None = None
    region: str | None = None
    prefix: str = ""
    access_key_id: str | None = field(default=None, repr=False)
    secret_access_key: str | None = field(default=None, repr=False)
    session_token: str | None = field(default=None, repr=False)
    guarded: bool = False  # a stranger named the endpoint: only public addresses

    @classmethod
    def of(cls, settings: Settings, request: VideoRequest) -> "Bucket | None":
        """The request's own, else the worker's, if it has one."""
        if s3 := request.s3_config:
            return cls(
                name=s3.bucketName,
                endpoint_url=s3.endpointUrl,
                region=s3.region,
                prefix=s3.prefix,
                access_key_id=s3.accessId,
                secret_access_key=s3.accessSecret,
                session_token=s3.sessionToken,
                guarded=True,
            )
        if settings.bucket_name is None:
            return None
        return cls(
            name=settings.bucket_name,
            endpoint_url=settings.bucket_endpoint_url,
            region=settings.bucket_region,
            prefix=settings.bucket_prefix,
            access_key_id=settings.bucket_access_key_id,
            secret_access_key=settings.bucket_secret_access_key,
            session_token=settings.bucket_session_token,
        )


@dataclass(frozen=True)
class Delivery:
    """How this worker hands out videos."""

    settings: Settings

    def __call__(
        self,
        path: Path,
        job_id: str,
        request: VideoRequest,
        check_cancelled: CheckCancelled,
        taken: int = 0,
    ) -> dict:
        """The reply's video fields for the file at `path`: `video_base64`, or `video_url` with `expires_at`.

        `request.output` decides: `auto` inlines what fits beside the `taken` bytes that the reply holds
        already, `base64` never uploads, `url` always does. A
        failed upload is logged and falls back to base64 where the video fits. Raises ResultTooLargeError or
        UploadError, with `video_path` where the video was kept on the network volume, or CancelledError.
        """
        size = path.stat().st_size
        fits = size + taken <= self.settings.inline_limit_mb * MB
        output, bucket = request.output, Bucket.of(self.settings, request)
        if fits and output != "url":
            return inlined(path) | _inert(request)
        failure = None
        if output != "base64" and bucket is not None:
            try:
                return self._uploaded(path, job_id, bucket, check_cancelled)
            except UploadError as error:
                failure = error
                log.warning("%s", error)
                if fits:
                    return inlined(path) | {"delivery_warning": f"{error} It is inlined instead."}
        elif output == "url":
            failure = UploadError(
                "`output` is url, but there is no object storage (`s3_config`, or the worker's BUCKET_NAME)."
            )
        kept = self.kept(path, job_id)
        if failure is not None:
            raise failure.with_details(**kept)
        beside = f" beside the {taken / MB:.1f} MB that are in the reply" if taken else ""
        smaller = "raise `mp4_crf`" if FORMATS[request.format].codecs else "take another `format`"
        if request.one_frame:
            smaller = "ask for a smaller frame"
        raise ResultTooLargeError(
            f"The video has {size / MB:.1f} MB and at most {self.settings.inline_limit_mb:g} MB can be "
            f"returned inline{beside}; give object storage (`s3_config`, or the worker's BUCKET_NAME) or "
            f"{smaller}."
        ).with_details(**kept)

    def latents(
        self, path: Path, job_id: str, request: VideoRequest, room: float, check_cancelled: CheckCancelled
    ) -> dict:
        """The reply's fields for the latents at `path`: `latents_url`, `latents_handle` or `latents_base64`.

        Object storage first, then the volume, and inline only where there is neither and at most `room`
        bytes; `output` base64 inlines first and never uploads. Where none of them takes it, a
        `latents_warning` says so: a finished video is not lost over them. Raises CancelledError.
        """
        fits = path.stat().st_size <= room
        bucket = Bucket.of(self.settings, request)
        if request.output == "base64":
            if fits:
                return _inlined_latents(path)
        elif bucket is not None:
            try:
                uploaded = self._uploaded(path, job_id, bucket, check_cancelled)
                return {"latents_url": uploaded["video_url"], "latents_expires_at": uploaded["expires_at"]}
            except UploadError as error:
                log.warning("%s", error)
        if handle := keep_latents(path, _file_name(job_id, ""), self.settings):
            return {"latents_handle": handle}
        if fits and request.output != "url":
            return _inlined_latents(path)
        return {
            "latents_warning": f"The latents ({path.stat().st_size / MB:.1f} MB) could not be returned: no "
            "object storage took them, no network volume has room, and they do not fit the reply."
        }

    def rescued(self, video: bytes, job_id: str, suffix: str = ".mp4") -> dict:
        """As above, for a video whose inline reply the platform refused: by URL, else on the volume.

        Raises WorkerError, with `video_path` where the video was kept on the volume after a failed upload.
        """
        with tempfile.TemporaryDirectory(prefix="framepack-") as folder:
            path = Path(folder) / f"video{suffix}"
            path.write_bytes(video)
            request = VideoRequest.model_construct(s3_config=None)
            if bucket := Bucket.of(self.settings, request):
                try:
                    return self._uploaded(path, job_id, bucket, lambda: None)
                except UploadError as error:
                    raise error.with_details(**self.kept(path, job_id)) from error
            raise WorkerError("The result was refused.").with_details(**self.kept(path, job_id))

    def _uploaded(self, path: Path, job_id: str, bucket: Bucket, check_cancelled: CheckCancelled) -> dict:
        """Upload in a thread of its own, so that a storage that stalls holds up neither cancel nor time-out.

        Raises UploadError, or what `check_cancelled` raises; the thread ends with its next read or time-out.
        """
        key = f"{bucket.prefix.strip('/')}/{_file_name(job_id, path.suffix)}".lstrip("/")
        deadline = Deadline(self.settings.upload_timeout_s)
        upload = _Upload(path, bucket, key, self.settings)
        upload.start()
        try:
            while upload.is_alive():
                upload.join(POLL_S)
                check_cancelled()
                deadline.check()
        except TimeLimitError:
            raise UploadError(
                f"The upload to the bucket {bucket.name} took longer than {deadline.seconds:g} seconds."
            ) from None
        finally:
            upload.stop()
        if upload.error is not None:
            log.debug("upload failed", exc_info=upload.error)
            what = "latents" if path.suffix == LATENTS.suffix else "video"
            raise UploadError(
                f"The {what} could not be uploaded to the bucket {bucket.name} ({_reason(upload.error)})."
            ) from upload.error
        expires = datetime.now(UTC) + timedelta(seconds=self.settings.url_expires_s)
        return {"video_url": upload.url, "expires_at": expires.isoformat(timespec="seconds")}

    def kept(self, path: Path, job_id: str) -> dict:
        """Where the video was saved on the network volume, if there is one with room."""
        volume = self.settings.volume
        if volume is None:
            return {}
        kept = volume / "framepack-results" / _file_name(job_id, path.suffix)
        try:
            kept.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, kept)
        except OSError as error:
            log.warning("the video could not be kept at %s: %s", kept, error)
            kept.unlink(missing_ok=True)
            return {}
        return {"video_path": str(kept)}


def inlined(path: Path, *_: object) -> dict:
    """The video as base64, whatever its size: for callers with no payload limit."""
    return {"video_base64": base64.b64encode(path.read_bytes()).decode("ascii")}


def inlined_bytes(fields: dict) -> int:
    """How many bytes a reply's fields hold, before base64."""
    texts = [value for name, value in fields.items() if name.endswith("_base64")]
    return sum(len(text) * 3 // 4 - text[-2:].count("=") for text in texts)


def _inlined_latents(path: Path) -> dict:
    return {"latents_base64": base64.b64encode(path.read_bytes()).decode("ascii")}


def _inert(request: VideoRequest) -> dict:
    if request.s3_config is None or (request.return_latents and request.output != "base64"):
        return {}
    return {"delivery_warning": "`s3_config` had no effect: the video is inlined (`output` url uploads it)."}


class _Stop(BaseException):
    """Ends an upload from within its callback: any Exception there is a connection error to botocore, and
    the request is tried again."""


class _Upload(threading.Thread):
    """One upload, in parts. At its end `url` is set, or `error`."""

    def __init__(self, path: Path, bucket: Bucket, key: str, settings: Settings) -> None:
        super().__init__(name="upload", daemon=True)
        self._path, self._bucket, self._key = path, bucket, key
        self._timeout_s, self._url_expires_s = settings.upload_timeout_s, settings.url_expires_s
        self._stopped = threading.Event()
        self.url: str | None = None
        self.error: Exception | None = None

    def stop(self) -> None:
        """Have it end as soon as it next reads from the file; its parts are taken back."""
        self._stopped.set()

    def run(self) -> None:
        try:
            self._run()
        except _Stop:
            pass
        except Exception as error:
            self.error = error

    def _run(self) -> None:
        import boto3  # only where there is a bucket: it takes a tenth of a second and 20 MB
        from boto3.s3.transfer import TransferConfig
        from botocore.config import Config

        bucket = self._bucket
        if bucket.guarded:
            check_url(bucket.endpoint_url)
        client = boto3.client(
            "s3",
            endpoint_url=bucket.endpoint_url,
            aws_access_key_id=bucket.access_key_id,
            aws_secret_access_key=bucket.secret_access_key,
            aws_session_token=bucket.session_token,
            region_name=bucket.region,
            config=Config(
                signature_version="s3v4",
                connect_timeout=10,
                read_timeout=READ_TIMEOUT_S,
                retries={"mode": "standard", "total_max_attempts": MAX_ATTEMPTS},
            ),
        )
        try:
            if bucket.guarded:
                guard_client(client, self._timeout_s)
            with self._path.open("rb") as file:
                client.upload_fileobj(
                    file,
                    bucket.name,
                    self._key,
                    ExtraArgs={"ContentType": content_type_of(self._path)},
                    Config=TransferConfig(
                        multipart_threshold=PART_BYTES, multipart_chunksize=PART_BYTES, use_threads=False
                    ),
                    Callback=self._check,
                )
            self.url = client.generate_presigned_url(
                "get_object", Params={"Bucket": bucket.name, "Key": self._key}, ExpiresIn=self._url_expires_s
            )
        finally:
            client.close()

    def _check(self, _: int) -> None:
        if self._stopped.is_set():
            raise _Stop


def _file_name(job_id: str, suffix: str = ".mp4") -> str:
    """RunPod's ids are letters, digits and dashes; anything else must not become a path."""
    name = "".join(c if c.isascii() and (c.isalnum() or c in "-_.") else "_" for c in job_id)[:100]
    return f"{name.lstrip('.') or 'video'}{suffix}"


def _reason(error: Exception) -> str:
    """The service's code where it sends a fit one, else the kind of failure; no addresses or credentials."""
    if isinstance(error, UrlRefusedError):
        return str(error).removesuffix(".")
    cause = error.__context__ if type(error).__name__ == "S3UploadFailedError" else error
    answer = getattr(cause, "response", None) or {}  # botocore's own errors have None there
    code = str(answer.get("Error", {}).get("Code") or "")
    return code if _CODE.fullmatch(code) else type(cause).__name__
