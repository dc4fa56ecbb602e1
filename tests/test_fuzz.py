"""Fuzzing: what a stranger sends becomes a value or one of our own errors, and none of it stays in memory.

The suite tries some hundreds of everything, the same ones every time. This tries a hundred thousand, and says
what became of them and how much memory the process held:

    FUZZ_REQUESTS=100000 python -m pytest -n 0 -s tests/test_fuzz.py
"""

import asyncio
import base64
import ipaddress
import json
import logging
import os
import re
import socket
import ssl
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

import handler
import serverless_handler
from core.delivery import Delivery, _file_name, inlined
from core.errors import (
    DownloadError,
    DownloadTooLargeError,
    ImageError,
    RequestError,
    UploadError,
    UrlRefusedError,
)
from core.fetch import fetch_url
from core.guard import PORTS, check_url
from core.images import decode_image
from core.pipeline.loras import LoraCache
from core.request import ALIASES, S3Config, VideoRequest, echo_of, parse_request
from core.settings import Settings
from core.weights.profiles import load_profile
from core.worker import Worker
from diffusers_helper.magcache import PUBLISHED
from tests.damaged_images import check_image, damaged_images, samples
from tests.hostile_inputs import (
    SECRET,
    TEXTS,
    VALUES,
    answers,
    assert_sentence,
    good_objects,
    good_values,
    inputs,
    planted,
    urls,
)
from tests.test_endurance import quick_input, quick_models, resident_memory
from tests.test_images import to_base64
from tests.tiny import TINY

EXAMPLES = int(os.environ.get("FUZZ_REQUESTS", "300"))
ROUND = 1000  # hypothesis remembers what it has tried until a run of it is over
MOST_GROWTH = 16_000_000  # bytes; hypothesis itself comes to half of that, in the first test most of all


@pytest.fixture(scope="module", autouse=True)
def no_logs():
    """pytest keeps them until a test is over, which would count as memory."""
    logging.disable()
    yield
    logging.disable(logging.NOTSET)


def fuzz(check: Callable[[Any], str], examples: SearchStrategy, cost: float = 1) -> Counter[str]:
    """Run `check` on EXAMPLES / `cost` examples. Returns how often it returned what."""
    outcomes: Counter[str] = Counter()

    def attempt(example: Any) -> None:
        outcomes[check(example)] += 1

    count = max(6, int(EXAMPLES / cost))
    rounds = -(-count // ROUND)
    memory = []
    for number in range(rounds):
        run = given(examples)(attempt)
        run = settings(
            max_examples=count // rounds,
            deadline=None,
            database=None,
            phases=(Phase.generate, Phase.shrink),
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
        )(seed(number)(run))
        run()
        if number + 1 in (rounds // 10, rounds) and sys.platform == "linux":
            memory.append(resident_memory())
            sys.stdout.write(f"\n{outcomes.total()} examples: {memory[-1] / 1e6:.2f} MB")
    sys.stdout.write(f"\n{dict(outcomes.most_common())}\n")
    if len(memory) == 2:
        assert memory[1] - memory[0] < MOST_GROWTH
    return outcomes


# requests


def test_requests():
    taken: set[str] = set()

    def check(data: Any) -> str:
        before = repr(data)
        try:
            request = parse_request(data)
        except RequestError as error:
            assert type(error) is RequestError
            assert_sentence(str(error))
            return "refused"
        finally:
            assert repr(data) == before
        echo = json.dumps(echo_of(request), allow_nan=False)
        assert SECRET not in echo + repr(request)
        assert set(data) <= {*VideoRequest.model_fields, *ALIASES}
        assert parse_request(request.model_dump()) == request
        taken.update(request.model_fields_set)
        return "accepted"

    outcomes = fuzz(check, inputs(), cost=0.25)  # every field is to be taken once
    assert min(outcomes["accepted"], outcomes["refused"]) > outcomes.total() / 4
    assert taken == set(VideoRequest.model_fields)


# images


def test_the_samples_are_good_images():
    assert {check_image(data) for files in samples().values() for data in files} == {"decoded"}


def test_damaged_images():
    outcomes = fuzz(check_image, damaged_images())
    assert outcomes["decoded"] > outcomes.total() / 10
    assert outcomes["The input image is damaged or cut short."] > outcomes.total() / 20


def check_image_text(text: str) -> str:
    try:
        decode_image(text)
    except ImageError as error:
        assert_sentence(str(error))
        return error.code
    return "decoded"


def test_texts_for_an_image():
    start = st.sampled_from(
        ["", " ", "data:", "data:image/png;base64,", "DATA:;x=y;base64,", "data:,", "x://"]
    )
    whole = to_base64(samples()["PNG"][0])
    parts = st.lists(TEXTS | st.sampled_from([whole, whole[:99], "=", "\n"]), max_size=3).map("".join)
    assert fuzz(check_image_text, st.builds(str.__add__, start, parts)).keys() == {"decoded", "invalid_image"}


# URLs


class PlainContext(ssl.SSLContext):
    """In place of TLS nothing; only the host's name must do for it."""

    def wrap_socket(self, connection: socket.socket, server_hostname: str) -> socket.socket:
        self.wrap_bio(ssl.MemoryBIO(), ssl.MemoryBIO(), server_hostname=server_hostname)
        return connection


class Stranger:
    """Name servers and sites that say what they are told to."""

    def __init__(self) -> None:
        self._sockets: list[socket.socket] = []
        self.says([], b"")

    def says(self, addresses: list[str] | Exception, answer: bytes) -> None:
        self.addresses, self.answer = addresses, answer
        self.connected: list[str] = []
        while self._sockets:
            self._sockets.pop().close()

    def resolve(self, host: str, port: int) -> list[str]:
        try:  # a number needs no name server
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
        except socket.gaierror:
            if isinstance(self.addresses, Exception):
                raise self.addresses from None
            return self.addresses
        return [address[0] for *_, address in found]

    def connect(self, address: str, port: int, timeout: float, options: tuple) -> socket.socket:
        assert port in PORTS
        self.connected.append(address)
        ours, theirs = socket.socketpair()
        self._sockets.append(theirs)  # open until the next example
        theirs.setblocking(False)
        theirs.send(self.answer)
        theirs.shutdown(socket.SHUT_WR)
        return ours


@pytest.fixture
def stranger(monkeypatch) -> Iterator[Stranger]:
    stranger, context = Stranger(), PlainContext(ssl.PROTOCOL_TLS_CLIENT)
    monkeypatch.setattr("core.guard._resolve", stranger.resolve)
    monkeypatch.setattr("core.guard._connect", stranger.connect)
    monkeypatch.setattr("core.fetch.ssl.create_default_context", lambda: context)
    monkeypatch.setattr("botocore.httpsession.create_urllib3_context", lambda **_: context)
    monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", lambda *_: 0)
    yield stranger
    stranger.says([], b"")


def anybodys(address: str) -> bool:
    """Whether the whole internet knows it; by other means than `is_public`."""
    ip = ipaddress.ip_address(address)
    within = ip.version == 6 and (ip.ipv4_mapped or ip.sixtofour or ip.teredo or ip.packed[0] >> 5 != 1)
    return ip.is_global and not ip.is_multicast and not within


ADDRESSES = st.one_of(
    st.just(["93.184.216.34"]),
    st.lists(st.sampled_from(["93.184.216.34", "2606:2800:220:1::1"]), min_size=1, max_size=3),
    st.lists(
        st.sampled_from(["93.184.216.34", "10.0.0.1", "100.64.0.1", "::1", "fe80::1%2", "::ffff:8.8.8.8"])
        | st.ip_addresses().map(str),
        max_size=3,
    ),
    st.builds(socket.gaierror, st.sampled_from([socket.EAI_NONAME, socket.EAI_AGAIN]), st.just("x")),
    st.sampled_from([UnicodeError, OSError]).map(lambda error: error("x")),
)


def test_urls(stranger):
    def check(example: tuple[str, Any, bytes]) -> str:
        url, addresses, answer = example
        stranger.says(addresses, answer)
        try:
            data = fetch_url(url, max_bytes=1000, timeout_s=60)
        except (UrlRefusedError, DownloadError) as error:
            assert type(error) in (UrlRefusedError, DownloadError, DownloadTooLargeError)
            assert_sentence(str(error))
            return error.code
        finally:
            assert all(map(anybodys, stranger.connected)), stranger.connected
        assert len(data) <= 1000
        return "fetched"

    locations = st.just("https://images.test/") | urls()
    outcomes = fuzz(check, st.tuples(locations, ADDRESSES, answers()), cost=2)
    assert {"fetched", "url_refused", "download_failed"} <= outcomes.keys()


def check_target(url: str) -> str:
    try:
        host, port, path = check_url(url)
    except UrlRefusedError as error:
        assert_sentence(str(error))
        return "refused"
    assert re.fullmatch(r"[a-z0-9._:-]+", host)
    assert port in PORTS
    assert re.fullmatch(r"/[!-~]*", path)
    return "accepted"


def test_url_strings():
    assert fuzz(check_target, urls()).keys() == {"refused", "accepted"}


# whole jobs


@pytest.fixture
def models(monkeypatch) -> SimpleNamespace:
    """A pipeline with all of its arithmetic and none of its models."""

    def conditioning(models, image, *_):
        height, width, _ = image.shape
        start_latent = torch.randn(1, 16, 1, height // 8, width // 8)
        return SimpleNamespace(
            start_latent=start_latent, warnings=(), for_seed=lambda _: conditioning(0, image)
        )

    def save(clips, path, file):
        path.write_bytes(b"video")
        return 25

    frame = torch.zeros(1, 3, 1, 8, 8, dtype=torch.uint8)
    decoder = nullcontext()
    vars(decoder).update(sections=1, tiled=False, clips=lambda: [frame])
    monkeypatch.setattr("core.pipeline.encode_conditioning", conditioning)
    monkeypatch.setattr("core.pipeline.check_capacity", lambda *_: None)
    monkeypatch.setattr("core.pipeline.sample_sections", lambda *_, **__: [])
    monkeypatch.setattr("core.pipeline.VideoDecoder", lambda *_, **__: decoder)
    monkeypatch.setattr("core.pipeline.save_video", save)
    monkeypatch.setattr("core.job.memory.release_unused_memory", lambda device: None)  # collects garbage
    monkeypatch.delenv("RUNPOD_WEBHOOK_POST_OUTPUT", raising=False)
    return SimpleNamespace(
        device=torch.device("cpu"),
        profile=load_profile(TINY),
        direction="i2v",
        magnitudes=dict(PUBLISHED),
        transformer=SimpleNamespace(config=SimpleNamespace(patch_size=2)),
        use_direction=lambda direction: None,
        lora_cache=LoraCache(),
        use_loras=lambda loras, check: [],
        memory_mode="resident",
        transformer_dtype=torch.float32,
        precision="float32",
        compiled=False,
        attention="flash",
        warnings=[],
        load_seconds=0.0,
    )


REFUSALS = {
    "invalid_request",
    "invalid_image",
    "image_too_large",
    "invalid_video",
    "invalid_latents",
    "latents_not_found",
    "invalid_lora",
    "url_refused",
    "download_failed",
    "download_too_large",
}


def outcome_of(reply: dict) -> str:
    """`done` or the code, of a reply that any platform can post."""
    text = json.dumps(reply, allow_nan=False)
    assert json.loads(text) == reply
    assert SECRET not in text
    if "error" not in reply:
        return "done"
    assert_sentence(reply["error"])
    return reply["code"]


IMAGES = st.one_of(
    st.sampled_from([to_base64(file) for files in samples().values() for file in files]),
    st.sampled_from([to_base64(file) for file in samples()["PNG"]]),
    damaged_images().map(to_base64),
    urls(),
)


@st.composite
def job_inputs(draw: Any) -> Any:
    """As `inputs`, most of them with an image where it belongs."""
    data = draw(inputs() | good_objects())
    if isinstance(data, dict) and draw(st.integers(0, 3)):
        pictures = ("input_image", "input_video", "end_image", "start")
        data = {key: value for key, value in data.items() if ALIASES.get(key, key) not in pictures}
        data["input_image"] = draw(IMAGES)
        if draw(st.integers(0, 3)) == 0:
            data["end_image"] = draw(IMAGES)
        if isinstance(data.get("sections"), list) and draw(st.integers(0, 3)):
            data["sections"] = with_keyframes(data["sections"])
    return data


KEYFRAME = to_base64(samples()["PNG"][0])


def with_keyframes(sections: list) -> list:
    """A good image wherever one is given."""
    return [{**s, "image": KEYFRAME} if isinstance(s, dict) and s.get("image") else s for s in sections]


def test_jobs(models, stranger, monkeypatch):
    monkeypatch.setattr(handler, "worker", Worker(lambda: models, inlined))

    def check(example: tuple[dict, bytes]) -> str:
        job, answer = example
        stranger.says(["93.184.216.34"], answer)
        before = repr(job)
        reply = asyncio.run(handler.handler(job))
        assert repr(job) == before
        return outcome_of(reply)

    buckets = good_values(VideoRequest, "s3_config").map(planted) | VALUES
    jobs = st.fixed_dictionaries({"id": TEXTS, "input": job_inputs()}, optional={"s3Config": buckets})
    outcomes = fuzz(check, st.tuples(jobs, answers()), cost=2)
    assert {"done", "invalid_request", "invalid_image"} <= outcomes.keys() <= {"done"} | REFUSALS


@st.composite
def lambda_events(draw: Any) -> Any:
    data = draw(job_inputs())
    body = draw(st.sampled_from([data, {"input": data}]))
    event = {}
    match draw(st.integers(0, 5)):
        case 0:
            return draw(VALUES)
        case 1:
            event["isBase64Encoded"] = draw(VALUES)
        case 2:
            body = draw(TEXTS)
        case 3 | 4:
            body = json.dumps(body)
    if isinstance(body, str) and draw(st.booleans()):
        body = base64.b64encode(body.encode("utf-8", "replace")).decode("ascii")
        event["isBase64Encoded"] = True
    return event | {"body": body}


def test_lambda_events(models, stranger, monkeypatch):
    monkeypatch.setattr(serverless_handler, "worker", Worker(lambda: models, inlined))

    def check(event: Any) -> str:
        response = serverless_handler.lambda_handler(event, None)
        outcome = outcome_of(json.loads(response["body"]))
        assert response["statusCode"] in ([200] if outcome == "done" else [400, 404, 413, 502])
        return outcome

    outcomes = fuzz(check, lambda_events(), cost=2)
    assert {"done", "invalid_request"} <= outcomes.keys() <= {"done"} | REFUSALS


SHORT = (
    "input_image",
    "resume_latents",
    "total_second_length",
    "latent_window_size",
    "steps",
    "resolution",
    "s3_config",
    "end_image",
    "start",
    "width",
    "height",
    "aspect_ratio",
    "loras",
)
ANY = {name: good_values(VideoRequest, name) for name in VideoRequest.model_fields if name not in SHORT}
ANY["sections"] = ANY["sections"].map(with_keyframes)


def test_jobs_with_models(quick_decode, monkeypatch):
    """Short ones, all else as it may be."""
    monkeypatch.delenv("RUNPOD_WEBHOOK_POST_OUTPUT", raising=False)
    monkeypatch.setattr(handler, "worker", Worker(quick_models))

    def check(fields: dict) -> str:
        return outcome_of(asyncio.run(handler.handler({"id": "job", "input": quick_input(**fields)})))

    outcomes = fuzz(check, st.fixed_dictionaries({}, optional=ANY), cost=60)
    # two caches at once, or one that needs what nobody measured of these models
    assert "done" in outcomes.keys() <= {"done", "upload_failed", "timed_out", "invalid_request"}


# uploads


@st.composite
def storages(draw: Any) -> tuple[dict, list[str] | Exception, bytes]:
    """A bucket, where its endpoint leads, and what is said there."""
    bucket = draw(good_objects(S3Config))
    if draw(st.integers(0, 3)):
        bucket["endpointUrl"] = "https://s3.test"
    if draw(st.integers(0, 3)):
        fine = st.just(b"HTTP/1.1 200 OK\r\n\r\n")
        return planted(bucket), ["93.184.216.34"], draw(fine | storage_errors() | answers())
    return planted(bucket), draw(ADDRESSES), b""


@st.composite
def storage_errors(draw: Any) -> bytes:
    status, code = draw(st.sampled_from(["403 x", "500 x", "301 x"])), draw(TEXTS)
    xml = f"<Error><Code>{code}</Code></Error>"
    return f"HTTP/1.1 {status}\r\n\r\n{xml}".encode("utf-8", "replace")


def test_uploads(stranger, tmp_path):
    """To strangers' storage, which answers as it likes."""
    video = tmp_path / "video.mp4"
    video.write_bytes(b"video")
    deliver = Delivery(Settings(inline_limit_mb=0))

    def check(example: tuple[dict, list[str] | Exception, bytes]) -> str:
        bucket, addresses, answer = example
        stranger.says(addresses, answer)
        try:
            request = parse_request(quick_input(output="url", s3Config=bucket))
            reply = deliver(video, "job", request, lambda: None)
        except (RequestError, UploadError) as error:
            assert_sentence(str(error))
            return error.code
        finally:
            assert all(map(anybodys, stranger.connected)), stranger.connected
        assert reply.keys() == {"video_url", "expires_at"}
        return "uploaded"

    assert {"uploaded", "upload_failed"} <= fuzz(check, storages(), cost=10).keys()


# file names


def check_file_name(job_id: str) -> str:
    name = _file_name(job_id)
    assert re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*\.mp4", name)
    assert Path(name).name == name
    assert len(name) <= 104
    return "named"


def test_file_names():
    fuzz(check_file_name, TEXTS)


# memory


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_what_is_sent_again_and_again_leaves_nothing_in_memory():
    """Without hypothesis, which keeps things of its own."""
    requests, images = [], []

    def take(request: Any, image: bytes) -> None:
        requests.append(request)
        images.append(to_base64(image))

    settings(max_examples=200, database=None, deadline=None)(
        seed(0)(given(inputs(), damaged_images())(take))
    )()

    def memory_after(times: int) -> int:
        for _ in range(times):
            for request, image in zip(requests, images, strict=True):
                with suppress(RequestError):
                    parse_request(request)
                with suppress(RequestError):
                    decode_image(image)
        return resident_memory()

    tenth = max(2, EXAMPLES // len(requests) // 10)
    settled, end = memory_after(tenth), memory_after(9 * tenth)
    sys.stdout.write(f"\n{len(requests)} of each, {tenth} and {10 * tenth} times: ")
    sys.stdout.write(f"{settled / 1e6:.2f} and {end / 1e6:.2f} MB\n")
    assert end - settled < MOST_GROWTH / 4
