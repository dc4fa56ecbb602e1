"""Log lines that carry the job's id: plain for a person, JSON in the SDK's own form on RunPod."""

import json
import logging
from contextvars import ContextVar

current_job: ContextVar[str | None] = ContextVar("current_job", default=None)

# urllib3 and botocore would name addresses and, at DEBUG, credentials; httpx names every request
QUIET = ("httpx", "urllib3", "botocore", "boto3", "s3transfer", "PIL")


class PlainFormatter(logging.Formatter):
    """`INFO   | job-id | message`, as the SDK prints its own lines."""

    def format(self, record: logging.LogRecord) -> str:
        job = current_job.get()
        text = super().format(record)
        return f"{record.levelname:7}| {job} | {text}" if job else f"{record.levelname:7}| {text}"


class JsonFormatter(logging.Formatter):
    """One JSON object a line with the SDK's keys: requestId, message, level."""

    def format(self, record: logging.LogRecord) -> str:
        level = "WARN" if record.levelno == logging.WARNING else record.levelname
        return json.dumps({"requestId": current_job.get(), "message": super().format(record), "level": level})


def configure(*, as_json: bool, level: int = logging.INFO) -> None:
    """Log `level` and above to stderr, one line a record."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if as_json else PlainFormatter())
    logging.basicConfig(level=level, handlers=[handler], force=True)
    for name in QUIET:
        logging.getLogger(name).setLevel(logging.WARNING)
