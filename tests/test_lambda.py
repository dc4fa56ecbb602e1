"""`lambda_handler`: the forms of a body, and the HTTP status of each outcome."""

import base64
import json
from types import SimpleNamespace

import pytest

import serverless_handler
from core.errors import ModelError, OutOfMemoryError
from core.worker import Worker
from tests.test_endurance import quick_input, quick_models
from tests.test_images import BOMBS, to_base64


@pytest.fixture(scope="module", autouse=True)
def worker():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(serverless_handler, "worker", Worker(quick_models))
        yield


def answered(event, context=None) -> tuple[int, dict]:
    """Status and body, from a response the platform can use."""
    response = json.loads(json.dumps(serverless_handler.lambda_handler(event, context), allow_nan=False))
    assert set(response) == {"statusCode", "headers", "body"}
    assert response["headers"] == {"Content-Type": "application/json"}
    body = json.loads(response["body"])
    if response["statusCode"] != 200:
        assert set(body) - {"refresh_worker"} == {"error", "code"}
        assert body["error"].endswith(".")
        assert "Traceback" not in body["error"]
    return response["statusCode"], body


def in_base64(text: str | bytes) -> dict:
    data = text.encode() if isinstance(text, str) else text
    return {"body": base64.b64encode(data).decode("ascii"), "isBase64Encoded": True}


@pytest.fixture(scope="module")
def video(worker):
    """What every form of the same body has to give."""
    status, reply = answered({"body": json.dumps(quick_input())})
    assert status == 200
    assert base64.b64decode(reply["video_base64"])[4:8] == b"ftyp"
    assert reply["frames"] == 25
    return reply["video_base64"]


@pytest.mark.parametrize(
    "event",
    [
        {"body": json.dumps(quick_input()), "isBase64Encoded": False},
        {"body": json.dumps({"input": quick_input()}), "requestContext": {}},
        {"body": quick_input()},
        {"body": {"input": quick_input()}, "isBase64Encoded": True},
        in_base64(json.dumps(quick_input())),
        in_base64(json.dumps({"input": quick_input()}, indent=1)),
    ],
    ids=["text", "text with input", "object", "object with input", "base64", "base64 with input"],
)
def test_forms_of_a_body(event, video):
    status, reply = answered(event)
    assert status == 200
    assert reply["video_base64"] == video


@pytest.mark.parametrize(
    "event", [None, [], "text", 5, {}, {"body": None}, {"input": quick_input()}], ids=lambda e: str(e)[:20]
)
def test_no_body(event):
    assert answered(event) == (400, {"error": "The event has no body.", "code": "invalid_request"})


@pytest.mark.parametrize(
    "event",
    [
        {"body": ""},
        {"body": '{"prompt": '},
        {"body": "prompt=cat"},
        {"body": "{'prompt': 'cat'}"},
        {"body": "[" * 100_000},
        {"body": '{"seed": ' + "1" * 5000 + "}"},
        {"body": "not base64!", "isBase64Encoded": True},
        {"body": "🐈", "isBase64Encoded": True},
        in_base64("prompt=cat"),
        in_base64(b"\xff\xfe"),
    ],
    ids=[
        "empty",
        "cut short",
        "a form",
        "Python",
        "nested 100,000 deep",
        "a number of 5,000 digits",
        "not base64",
        "not ASCII",
        "base64 of a form",
        "base64 of no text",
    ],
)
def test_body_that_is_not_json(event):
    status, reply = answered(event)
    assert (status, reply["code"]) == (400, "invalid_request")
    assert reply["error"] == "The event's body is not valid JSON."


@pytest.mark.parametrize(
    "body", ["[]", '"text"', "5", "null", "true", [], 5, '{"input": []}', '{"input": 5}']
)
def test_body_that_is_no_object(body):
    status, reply = answered({"body": body})
    assert (status, reply["code"]) == (400, "invalid_request")
    assert reply["error"].startswith("The input must be a JSON object, not ")


def test_not_a_number_in_the_body():
    status, reply = answered({"body": json.dumps(quick_input(cfg=float("nan")))})
    assert status == 400
    assert reply["error"] == "`cfg` must be a finite number (got NaN)."


def test_invalid_request():
    status, reply = answered({"body": {}})
    assert (status, reply["code"]) == (400, "invalid_request")
    assert "`prompt` is required" in reply["error"]


def test_invalid_image():
    status, reply = answered({"body": quick_input(input_image="aGVsbG8=")})
    assert (status, reply["code"]) == (400, "invalid_image")


def test_too_large_an_image():
    status, reply = answered({"body": json.dumps(quick_input(input_image=to_base64(BOMBS["PNG"])))})
    assert (status, reply["code"]) == (413, "image_too_large")


def failing(error):
    def load():
        raise error

    return Worker(load)


def test_models_that_cannot_be_loaded(monkeypatch):
    monkeypatch.setattr(serverless_handler, "worker", failing(ModelError("The model is not there.")))
    assert answered({"body": quick_input()}) == (
        503,
        {"error": "The model is not there.", "code": "model_unavailable"},
    )


def test_out_of_memory(monkeypatch):
    monkeypatch.setattr(serverless_handler, "worker", failing(OutOfMemoryError("The GPU is too small.")))
    status, reply = answered({"body": quick_input()})
    assert status == 503
    assert reply == {"error": "The GPU is too small.", "code": "out_of_memory", "refresh_worker": True}


@pytest.mark.parametrize(
    ("context", "named"), [(SimpleNamespace(aws_request_id="8c1f-22"), "8c1f-22"), (None, "event")]
)
def test_unknown_error(monkeypatch, context, named):
    monkeypatch.setattr(serverless_handler, "worker", failing(RuntimeError("a secret of the worker's")))
    status, reply = answered({"body": quick_input()}, context)
    assert (status, reply["code"]) == (500, "internal_error")
    assert named in reply["error"]
    assert "secret" not in reply["error"]
