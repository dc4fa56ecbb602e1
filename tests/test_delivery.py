"""Where a finished video goes: inline, to an S3 server on this machine, to the volume, or nowhere."""

import base64
import os
import socket
import socketserver
import subprocess
import sys
import threading
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import boto3
import httpx
import pytest
from botocore.exceptions import ClientError, HTTPClientError
from moto.server import ThreadedMotoServer

from core.delivery import MAX_ATTEMPTS, PART_BYTES, Bucket, Delivery, inlined
from core.errors import CancelledError, ResultTooLargeError, UploadError, WorkerError, error_reply
from core.request import parse_request
from core.settings import Settings, SettingsError

ROOT = Path(__file__).parents[1]
MB = 1_000_000
KEYS = {"bucket_access_key_id": "key", "bucket_secret_access_key": "a-secret", "bucket_region": "us-east-1"}


def nothing():
    """A job that nobody cancels."""


def asking(output, **s3_config):
    """A request for this output, with a bucket of its own where its values are given."""
    values = {"input_image": "x", "prompt": "x", "output": output}
    return parse_request(values | ({"s3Config": s3_config} if s3_config else {}))


def video(tmp_path, size):
    path = tmp_path / "video.mp4"
    path.write_bytes(os.urandom(size))
    return path


@pytest.fixture(scope="module")
def s3():
    """The address of an S3 server with the bucket `videos`."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    address = f"http://127.0.0.1:{port}"
    client = boto3.client(
        "s3",
        endpoint_url=address,
        aws_access_key_id="key",
        aws_secret_access_key="a-secret",
        region_name="us-east-1",
    )
    client.create_bucket(Bucket="videos")
    yield address
    server.stop()


@pytest.fixture
def settings(tmp_path):
    """Settings with a volume that exists; `volume=False` for none."""

    def make(volume=True, **values):
        folder = tmp_path / "volume"
        if volume:
            folder.mkdir()
        return Settings(volume_dir=folder, **values)

    return make


@pytest.fixture
def broken_storage():
    """A server that answers every request with 503, and how many it got."""
    requests = []

    class Handler(BaseHTTPRequestHandler):
        def do_PUT(self):
            requests.append(self.path)
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response(503)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_):
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", requests
    server.shutdown()
    server.server_close()


@pytest.fixture
def no_backoff(monkeypatch):
    """botocore waits seconds between attempts; how long is its own affair."""
    monkeypatch.setattr("botocore.endpoint.time.sleep", lambda _: None)


def test_what_fits_is_inlined(tmp_path, settings):
    path = video(tmp_path, 1000)
    reply = Delivery(settings())(path, "job", asking("auto"), nothing)
    assert base64.b64decode(reply["video_base64"]) == path.read_bytes()
    assert reply.keys() == {"video_base64"}


@pytest.mark.parametrize(("size", "fits"), [(2 * MB, True), (2 * MB + 1, False)])
def test_the_limit_is_exact(tmp_path, settings, size, fits):
    delivery, path = Delivery(settings(inline_limit_mb=2)), video(tmp_path, size)
    if fits:
        assert "video_base64" in delivery(path, "job", asking("auto"), nothing)
    else:
        with pytest.raises(ResultTooLargeError, match=r"2\.0 MB and at most 2 MB"):
            delivery(path, "job", asking("auto"), nothing)


def test_a_large_video_goes_to_storage_and_comes_back_by_its_url(tmp_path, settings, s3):
    path = video(tmp_path, 40 * MB)  # five parts
    environment = settings(bucket_name="videos", bucket_endpoint_url=s3, bucket_prefix="/a/b/", **KEYS)
    reply = Delivery(environment)(path, "job-1", asking("auto"), nothing)
    assert reply.keys() == {"video_url", "expires_at"}
    assert "/videos/a/b/job-1.mp4?" in reply["video_url"]
    with httpx.Client(trust_env=False) as client:
        answer = client.get(reply["video_url"])
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "video/mp4"
    assert answer.content == path.read_bytes()


UPLOAD = """
import re, sys
from pathlib import Path
from core.delivery import Delivery
from core.request import parse_request
from core.settings import Settings

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

small, large, address = sys.argv[1:]
keys = {"bucket_access_key_id": "key", "bucket_secret_access_key": "a-secret", "bucket_region": "us-east-1"}
delivery = Delivery(Settings(bucket_name="videos", bucket_endpoint_url=address, **keys))
request = parse_request({"input_image": "x", "prompt": "x", "output": "url"})
for _ in range(5):  # until what boto3 leaves to the collector is level
    delivery(Path(small), "small", request, lambda: None)
before = peak()
delivery(Path(large), "large", request, lambda: None)
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_flat_whatever_the_size(tmp_path, s3):
    """One part of 8 MB, and one that waits for the collector; the 40 MB as a whole would show."""
    small, large = tmp_path / "small.mp4", tmp_path / "large.mp4"
    small.write_bytes(os.urandom(9 * MB))
    large.write_bytes(os.urandom(40 * MB))
    done = subprocess.run(
        [sys.executable, "-c", UPLOAD, str(small), str(large), s3],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) * 1024 < 2 * PART_BYTES


def test_url_uploads_even_what_fits(tmp_path, settings, s3):
    environment = settings(bucket_name="videos", bucket_endpoint_url=s3, **KEYS)
    reply = Delivery(environment)(video(tmp_path, 10), "job-2", asking("url"), nothing)
    assert "/videos/job-2.mp4?" in reply["video_url"]


def test_base64_never_uploads(tmp_path, settings, s3):
    environment = settings(bucket_name="videos", bucket_endpoint_url=s3, inline_limit_mb=1, **KEYS)
    with pytest.raises(ResultTooLargeError):
        Delivery(environment)(video(tmp_path, 2 * MB), "job", asking("base64"), nothing)


def test_nowhere_to_put_it_is_said_and_the_video_kept_on_the_volume(tmp_path, settings):
    path = video(tmp_path, 8 * MB)
    with pytest.raises(ResultTooLargeError) as error:
        Delivery(settings())(path, "job-3", asking("auto"), nothing)
    reply = error_reply(error.value)
    assert reply["code"] == "result_too_large"
    for part in ("8.0 MB", "7 MB", "BUCKET_NAME", "`mp4_crf`"):
        assert part in reply["error"]
    kept = tmp_path / "volume" / "framepack-results" / "job-3.mp4"
    assert reply["video_path"] == str(kept)
    assert kept.read_bytes() == path.read_bytes()


def test_without_a_volume_nothing_is_kept(tmp_path, settings):
    with pytest.raises(ResultTooLargeError) as error:
        Delivery(settings(volume=False))(video(tmp_path, 8 * MB), "job", asking("auto"), nothing)
    assert "video_path" not in error_reply(error.value)


def test_a_full_volume_is_not_a_second_fault(tmp_path, settings, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("core.delivery.shutil.copyfile", full)
    with pytest.raises(ResultTooLargeError) as error:
        Delivery(settings())(video(tmp_path, 8 * MB), "job", asking("auto"), nothing)
    assert "video_path" not in error_reply(error.value)


def test_url_without_storage_is_refused_but_the_video_kept(tmp_path, settings):
    with pytest.raises(UploadError, match="BUCKET_NAME") as error:
        Delivery(settings())(video(tmp_path, 10), "job", asking("url"), nothing)
    assert error_reply(error.value)["video_path"].endswith("job.mp4")


@pytest.mark.usefixtures("no_backoff")
def test_storage_that_refuses_is_tried_again_then_the_video_is_kept(tmp_path, settings, broken_storage):
    address, requests = broken_storage
    environment = settings(bucket_name="videos", bucket_endpoint_url=address, inline_limit_mb=1, **KEYS)
    with pytest.raises(UploadError) as error:
        Delivery(environment)(video(tmp_path, 2 * MB), "job", asking("auto"), nothing)
    assert len(requests) == MAX_ATTEMPTS
    reply = error_reply(error.value)
    assert reply["code"] == "upload_failed" and "videos" in reply["error"]
    assert "a-secret" not in str(reply) and "127.0.0.1" not in str(reply)
    assert reply["video_path"].endswith("job.mp4")


@contextmanager
def cutting_proxy(target: int, cut_after: int):
    """A port in front of `target` that cuts a connection once so many bytes passed, and all there were."""
    passed, connections = [0], []

    class Forward(socketserver.BaseRequestHandler):
        def handle(self):
            connections.append(self)
            with socket.create_connection(("127.0.0.1", target)) as server:
                threading.Thread(target=self.back, args=(server,), daemon=True).start()
                while data := self.request.recv(65536):
                    before, passed[0] = passed[0], passed[0] + len(data)
                    if before < cut_after <= passed[0]:
                        return
                    server.sendall(data)

        def back(self, server):
            with suppress(OSError):
                while data := server.recv(65536):
                    self.request.sendall(data)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Forward) as proxy:
        proxy.daemon_threads = True
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        yield proxy.server_address[1], connections
        proxy.shutdown()


@pytest.mark.usefixtures("no_backoff")
def test_a_connection_that_drops_in_the_middle_of_a_part(tmp_path, settings, s3):
    """Of the second part of five: that one is sent again, the others are not."""
    path = video(tmp_path, 40 * MB)
    port = int(s3.rsplit(":", 1)[1])
    with cutting_proxy(port, PART_BYTES * 3 // 2) as (proxy, connections):
        environment = settings(bucket_name="videos", bucket_endpoint_url=f"http://127.0.0.1:{proxy}", **KEYS)
        reply = Delivery(environment)(path, "cut", asking("auto"), nothing)
        assert len(connections) == 8  # begin, five parts, complete, and one again
    with httpx.Client(trust_env=False) as client:
        answer = client.get(reply["video_url"].replace(str(proxy), str(port)))
    assert answer.content == path.read_bytes()


@pytest.mark.usefixtures("no_backoff")
def test_what_fits_is_inlined_when_storage_refuses(tmp_path, settings, broken_storage):
    environment = settings(bucket_name="videos", bucket_endpoint_url=broken_storage[0], **KEYS)
    reply = Delivery(environment)(video(tmp_path, 10), "job", asking("url"), nothing)
    assert "video_base64" in reply
    assert "inlined instead" in reply["delivery_warning"]


def test_a_missing_bucket_is_named(tmp_path, settings, s3):
    environment = settings(bucket_name="nobodys", bucket_endpoint_url=s3, inline_limit_mb=1, **KEYS)
    with pytest.raises(UploadError, match=r"bucket nobodys \(NoSuchBucket\)"):
        Delivery(environment)(video(tmp_path, 2 * MB), "job", asking("auto"), nothing)


def service_error(code):
    return ClientError({"Error": {"Code": code}}, "PutObject")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (service_error("SlowDown"), "SlowDown"),
        (service_error("404"), "404"),
        (service_error("Access\nDenied"), "ClientError"),
        (service_error("x" * 65), "ClientError"),
        (service_error(None), "ClientError"),
        (HTTPClientError(error="the key is a-secret"), "HTTPClientError"),
    ],
)
def test_why_an_upload_failed_is_one_word(tmp_path, settings, monkeypatch, error, reason):
    """Whatever the storage says; the sentence goes to the caller and into the log."""

    def fail(upload):
        raise error

    monkeypatch.setattr("core.delivery._Upload._run", fail)
    with pytest.raises(UploadError, match=rf"bucket videos \({reason}\)\.$"):
        Delivery(settings(bucket_name="videos", inline_limit_mb=0))(
            video(tmp_path, 10), "job", asking("auto"), nothing
        )


@pytest.mark.usefixtures("no_backoff")
def test_a_cancel_stops_the_upload(tmp_path, settings, s3):
    calls = []

    def cancel():
        calls.append(1)
        if len(calls) >= 3:
            raise CancelledError("The job was cancelled.")

    environment = settings(bucket_name="videos", bucket_endpoint_url=s3, **KEYS)
    with pytest.raises(CancelledError):
        Delivery(environment)(video(tmp_path, 40 * MB), "cancelled", asking("auto"), cancel)
    with httpx.Client(trust_env=False) as client:
        assert "cancelled.mp4" not in client.get(f"{s3}/videos?list-type=2").text


@pytest.mark.parametrize("job_id", ["../../etc/passwd", "a/b", "\0", "", ".hidden", "x" * 5000, "Ü\n"])
def test_a_hostile_job_id_is_no_path(tmp_path, settings, job_id):
    with pytest.raises(ResultTooLargeError) as error:
        Delivery(settings())(video(tmp_path, 8 * MB), job_id, asking("auto"), nothing)
    (kept,) = (tmp_path / "volume" / "framepack-results").iterdir()
    assert error_reply(error.value)["video_path"] == str(kept)


def test_without_limits_everything_is_inlined(tmp_path):
    path = video(tmp_path, 8 * MB)
    assert len(inlined(path, "job", asking("url"), nothing)["video_base64"]) > 10 * MB


def test_settings_hide_secrets_and_check_numbers():
    settings = Settings.from_env({"BUCKET_SECRET_ACCESS_KEY": "a-secret", "INLINE_LIMIT_MB": "3.5"})
    assert settings.inline_limit_mb == 3.5
    assert "a-secret" not in repr(settings)
    for env in ({"INLINE_LIMIT_MB": "many"}, {"INLINE_LIMIT_MB": "nan"}, {"URL_EXPIRES_S": "1"}):
        (name,) = env
        with pytest.raises(SettingsError, match=name):
            Settings.from_env(env)


OWN = {"accessId": "an-id", "accessSecret": "hidden-secret", "bucketName": "own-bucket"}


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "169.254.169.254", "10.0.0.5:9000", "[::1]"])
def test_the_callers_bucket_may_not_be_inside(tmp_path, settings, s3, host):
    """Though the worker's own storage is there, and works; it is not the caller's to use instead."""
    environment = settings(bucket_name="videos", bucket_endpoint_url=s3, inline_limit_mb=1, **KEYS)
    request = asking("auto", **OWN, endpointUrl=f"https://{host}")
    with pytest.raises(UploadError, match=r"bucket own-bucket .*no public address") as error:
        Delivery(environment)(video(tmp_path, 2 * MB), "own", request, nothing)
    reply = error_reply(error.value)
    assert "hidden-secret" not in str(reply)
    assert reply["video_path"].endswith("own.mp4")


def test_the_callers_bucket_comes_before_the_workers(settings):
    request = asking("url", **OWN, endpointUrl="https://s3.example.com", region="eu-1", prefix="a")
    bucket = Bucket.of(settings(bucket_name="videos", **KEYS), request)
    assert (bucket.name, bucket.endpoint_url) == ("own-bucket", "https://s3.example.com")
    assert (bucket.access_key_id, bucket.region, bucket.prefix) == ("an-id", "eu-1", "a")
    assert bucket.guarded
    assert "hidden-secret" not in repr(bucket)


def test_the_workers_bucket_is_trusted(settings):
    bucket = Bucket.of(settings(bucket_name="videos", **KEYS), asking("url"))
    assert (bucket.name, bucket.guarded) == ("videos", False)
    assert Bucket.of(Settings(), asking("url")) is None


def test_a_bucket_that_is_not_used_is_said(tmp_path, settings):
    request = asking("auto", **OWN, endpointUrl="https://s3.example.com")
    reply = Delivery(settings())(video(tmp_path, 10), "job", request, nothing)
    assert "video_base64" in reply
    assert "`s3_config` had no effect" in reply["delivery_warning"]


def test_a_refused_reply_has_its_video_rescued(tmp_path, settings, s3):
    """First to storage, else to the volume."""
    stored = Delivery(settings(bucket_name="videos", bucket_endpoint_url=s3, **KEYS))
    assert "/videos/rescued.mp4?" in stored.rescued(b"a video", "rescued")["video_url"]
    with pytest.raises(WorkerError) as error:
        Delivery(Settings(volume_dir=tmp_path / "volume")).rescued(b"a video", "rescued")
    assert (tmp_path / "volume" / "framepack-results" / "rescued.mp4").read_bytes() == b"a video"
    assert error_reply(error.value)["video_path"].endswith("rescued.mp4")
