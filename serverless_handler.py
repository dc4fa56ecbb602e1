"""The same worker for platforms that call `lambda_handler(event, context)` with a JSON body (AWS Lambda)."""

import base64
import binascii
import json
import os
from typing import Any

from core.errors import RequestError, error_reply
from core.pipeline import generate_video_sync, initialize_models
from core.request import input_of
from core.worker import Worker

__all__ = ["generate_video_sync", "initialize_models", "lambda_handler"]

STATUS_OF_CODE = {
    "invalid_request": 400,
    "invalid_image": 400,
    "image_too_large": 413,
    "invalid_video": 400,
    "video_too_large": 413,
    "invalid_latents": 400,
    "latents_mismatch": 409,
    "latents_not_found": 404,
    "too_large_for_memory": 413,
    "invalid_lora": 400,
    "lora_not_applicable": 400,
    "url_refused": 400,
    "download_failed": 502,
    "download_too_large": 413,
    "model_unavailable": 503,
    "out_of_memory": 503,
    "gpu_failed": 503,
    "timed_out": 504,
    "upload_failed": 502,
}

worker = Worker(initialize_models)
if "AWS_LAMBDA_FUNCTION_NAME" in os.environ:
    worker.start()  # in the platform's init phase, before the first event


def lambda_handler(event: dict, context: Any) -> dict:
    """Answer an event whose `body` is JSON (text, base64 with `isBase64Encoded`, or an object already).

    The body is the input itself or `{"input": {…}}`, `s3Config` perhaps beside it. Returns statusCode,
    headers and a JSON text body.
    """
    try:
        data = _input_of(event)
    except RequestError as error:
        return _response(error_reply(error))
    job_id = getattr(context, "aws_request_id", None) or "event"
    return _response(worker.submit(job_id, data).result())


def _input_of(event: Any) -> Any:
    body = event.get("body") if isinstance(event, dict) else None
    if body is None:
        raise RequestError("The event has no body.")
    try:
        if isinstance(body, str):
            if event.get("isBase64Encoded"):
                body = base64.b64decode(body, validate=True).decode("utf-8")
            body = json.loads(body)
    except (binascii.Error, ValueError, RecursionError):
        raise RequestError("The event's body is not valid JSON.") from None
    if isinstance(body, dict) and "input" in body and body.keys() <= {"input", "s3Config"}:
        return input_of(body)
    return body


def _response(reply: dict) -> dict:
    status = STATUS_OF_CODE.get(reply["code"], 500) if "error" in reply else 200
    return {
        "statusCode": status,
        "headers": {"Content-Type": "application/json"},
        "body": json.dumps(reply, allow_nan=False),
    }
