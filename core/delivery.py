"""A finished MP4 → what the caller gets, so that no result is lost.

RunPod drops a result over 10 MB (`/run`) or 20 MB (`/runsync`) without a word, so a video that is too
large to inline goes to object storage, and where there is none, or it fails, to the network volume.
"""

import base64
import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from core.errors import ResultTooLargeError, UploadError
from core.settings import Settings

log = logging.getLogger(__name__)

CONTENT_TYPE = "video/mp4"
MB = 1_000_000
PART_BYTES = 8 * 1024 * 1024  # one part in memory at a time, whatever the video's size
MAX_ATTEMPTS = 4  # of each request, with exponential backoff

CheckCancelled = Callable[[], None]


@dataclass(frozen=True)
class Delivery:
    """How this worker hands out videos."""

    settings: Settings

    def __call__(self, path: Path, job_id: str, output: str, check_cancelled: CheckCancelled) -> dict:
        """The reply's video fields for the MP4 at `path`: `video_base64`, or `video_url` with `expires_at`.

        `output` is the request's: `auto` inlines what fits, `base64` never uploads, `url` always does. A
        failed upload is logged and falls back to base64 where the video fits. Raises ResultTooLargeError or
        UploadError, with `video_path` where the video was kept on the network volume, or CancelledError.
        """
        size = path.stat().st_size
        fits = size <= self.settings.inline_limit_mb * MB
        if fits and output != "url":
            return inlined(path)
        failure = None
        if output != "base64" and self.settings.bucket_name:
            try:
                return self._uploaded(path, job_id, check_cancelled)
            except UploadError as error:
                failure = error
                log.warning("job %s: %s", job_id, error)
                if fits:
                    return inlined(path) | {"delivery_warning": f"{error} It is inlined instead."}
        elif output == "url":
            failure = UploadError("`output` is url, but the worker has no object storage (BUCKET_NAME).")
        kept = self._kept(path, job_id)
        if failure is not None:
            raise failure.with_details(**kept)
        raise ResultTooLargeError(
            f"The video has {size / MB:.1f} MB and at most {self.settings.inline_limit_mb:g} MB can be "
            "returned inline; configure object storage (BUCKET_NAME) or raise `mp4_crf`."
        ).with_details(**kept)

    def _uploaded(self, path: Path, job_id: str, check_cancelled: CheckCancelled) -> dict:
        import boto3  # only where there is a bucket: it takes a tenth of a second and 20 MB
        from boto3.exceptions import S3UploadFailedError
        from boto3.s3.transfer import TransferConfig
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError, ClientError

        s = self.settings
        key = f"{s.bucket_prefix.strip('/')}/{_file_name(job_id)}".lstrip("/")
        try:
            client = boto3.client(
                "s3",
                endpoint_url=s.bucket_endpoint_url,
                aws_access_key_id=s.bucket_access_key_id,
                aws_secret_access_key=s.bucket_secret_access_key,
                aws_session_token=s.bucket_session_token,
                region_name=s.bucket_region,
                config=Config(
                    signature_version="s3v4",
                    connect_timeout=10,
                    read_timeout=60,
                    retries={"mode": "standard", "total_max_attempts": MAX_ATTEMPTS},
                ),
            )
            client.upload_file(
                str(path),
                s.bucket_name,
                key,
                ExtraArgs={"ContentType": CONTENT_TYPE},
                Config=TransferConfig(
                    multipart_threshold=PART_BYTES, multipart_chunksize=PART_BYTES, use_threads=False
                ),
                Callback=lambda _: check_cancelled(),
            )
            url = client.generate_presigned_url(
                "get_object", Params={"Bucket": s.bucket_name, "Key": key}, ExpiresIn=s.url_expires_s
            )
        except (BotoCoreError, ClientError, S3UploadFailedError, ValueError) as error:
            check_cancelled()  # what the callback raises is taken for a connection error
            log.debug("upload failed", exc_info=error)
            raise UploadError(
                f"The video could not be uploaded to the bucket {s.bucket_name} ({_reason(error)})."
            ) from error
        expires = datetime.now(UTC) + timedelta(seconds=s.url_expires_s)
        return {"video_url": url, "expires_at": expires.isoformat(timespec="seconds")}

    def _kept(self, path: Path, job_id: str) -> dict:
        """Where the video was saved on the network volume, if there is one with room."""
        volume = self.settings.volume_dir
        if not volume.is_dir():
            return {}
        kept = volume / "framepack-results" / _file_name(job_id)
        try:
            kept.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, kept)
        except OSError as error:
            log.warning("job %s: the video could not be kept at %s: %s", job_id, kept, error)
            kept.unlink(missing_ok=True)
            return {}
        return {"video_path": str(kept)}


def inlined(path: Path, *_: object) -> dict:
    """The video as base64, whatever its size: for callers with no payload limit."""
    return {"video_base64": base64.b64encode(path.read_bytes()).decode("ascii")}


def _file_name(job_id: str) -> str:
    """RunPod's ids are letters, digits and dashes; anything else must not become a path."""
    name = "".join(c if c.isascii() and (c.isalnum() or c in "-_.") else "_" for c in job_id)[:100]
    return f"{name.lstrip('.') or 'video'}.mp4"


def _reason(error: Exception) -> str:
    """The service's code where there is one, else the kind of failure; never addresses or credentials."""
    cause = error.__context__ if type(error).__name__ == "S3UploadFailedError" else error
    code = getattr(cause, "response", {}).get("Error", {}).get("Code")
    return str(code or type(cause).__name__)
