"""The guard for strangers' URLs: what is refused, what is fetched, and that nothing is left behind."""

import base64
import gzip
import socket
import socketserver
import ssl
import sys
import threading
from contextlib import suppress
from pathlib import Path

import boto3
import numpy as np
import pytest
from boto3.s3.transfer import TransferConfig
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectionClosedError,
    SSLError,
)
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
from werkzeug.serving import make_server

from core import guard
from core.delivery import Delivery
from core.errors import (
    CancelledError,
    DownloadError,
    DownloadTooLargeError,
    ImageError,
    UrlRefusedError,
    WorkerError,
)
from core.fetch import MAX_REDIRECTS, fetch_url, guard_client
from core.guard import MAX_URL, is_public
from core.images import decode_image
from core.job import run_job
from core.request import parse_request
from core.settings import Settings
from core.worker import Worker
from tests.fake_site import PUBLIC, PUBLIC_IPV6, Internet, Site, answer, make_certificates, serving
from tests.test_endurance import quick_input
from tests.test_images import BOMBS, encoded, picture, to_base64

GOOD = "https://images.test/good.png"
SECRET = "X-Amz-Signature=5ec4e7"


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    return make_certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture
def site(certificates):
    """A TLS site with an image, which nobody has asked for anything yet."""
    site = Site(certificates[1])
    site.pages["/good.png"] = answer(encoded(picture(), "PNG"), Content_Type="text/html")
    with serving(site):
        yield site


class SilentServer(socketserver.ThreadingTCPServer):
    """Accepts, says `greeting` if anything, and then nothing more."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), self._serve)
        self.port = self.server_address[1]
        self.greeting = b""
        self.connections = 0

    def _serve(self, connection, *_):
        self.connections += 1
        with suppress(OSError):
            connection.sendall(self.greeting)
            while connection.recv(65536):
                pass


@pytest.fixture
def silent_server():
    server = SilentServer()
    with serving(server):
        yield server


@pytest.fixture
def internet(site, certificates, monkeypatch):
    """`images.test` and its like resolve to a public address, behind which is `site`."""
    internet = Internet(guard._resolve, guard._connect, site.port)
    monkeypatch.setattr("core.guard._resolve", internet.resolve)
    monkeypatch.setattr("core.guard._connect", internet.connect)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificates[0]))
    monkeypatch.setenv("AWS_CA_BUNDLE", str(certificates[0]))
    return internet


def fetch(url=GOOD, max_bytes=1_000_000, timeout_s=20, **options):
    return fetch_url(url, max_bytes=max_bytes, timeout_s=timeout_s, **options)


def failure(url=GOOD, **options) -> WorkerError:
    """What fetching raises; its sentence is fit to be shown."""
    with pytest.raises(WorkerError) as raised:
        fetch(url, **options)
    sentence = str(raised.value)
    assert sentence.endswith(".") and sentence.isprintable() and len(sentence) < 400
    assert SECRET not in sentence
    return raised.value


def refusal(url, **options) -> str:
    error = failure(url, **options)
    assert type(error) is UrlRefusedError
    assert error.code == "url_refused"
    return str(error)


def download_failure(page, site, **options) -> str:
    """What the site's page leads to."""
    site.pages["/page"] = page
    error = failure(f"https://images.test/page?{SECRET}", **options)
    assert type(error) is DownloadError
    assert error.code == "download_failed"
    return str(error)


# good ones


def test_a_good_image_is_fetched(internet, site):
    data = fetch(f"{GOOD}?{SECRET}#top")
    assert np.array_equal(decode_image(base64.b64encode(data).decode()), np.asarray(picture()))
    assert internet.connected == [PUBLIC]
    (request,) = site.requests
    head, *headers = request.strip().split("\r\n")
    assert head == f"GET /good.png?{SECRET} HTTP/1.1"
    assert sorted(headers) == [
        "Accept-Encoding: identity",
        "Accept: */*",
        "Connection: close",
        "Host: images.test",
        "User-Agent: framepack-worker",
    ]


@pytest.mark.parametrize(
    "url",
    [
        "HTTPS://IMAGES.TEST/good.png",
        "https://images.test:443/good.png",
        "https://images.test:8443/good.png",
        "https://images.test:9000/good.png",
        "https://images.test./good.png",
        "https://Bücher.test/good.png",
        f"https://{PUBLIC}/good.png",
        f"https://[{PUBLIC_IPV6}]/good.png",
    ],
)
def test_good_urls(internet, url):
    assert fetch(url).startswith(b"\x89PNG")
    assert internet.connected == [PUBLIC_IPV6 if "[" in url else PUBLIC]


def test_letters_beyond_ascii_are_encoded(internet, site):
    site.pages["/b%C3%A4r.png"] = answer(b"bear")
    assert fetch("https://images.test/bär.png?ö") == b"bear"
    assert "GET /b%C3%A4r.png?%C3%B6 " in site.requests[0]


def test_what_is_encoded_already_is_left_alone(internet, site):
    path = "/a%2Fb%20(c)+~;=@:!$&'*,"
    site.pages[path] = answer(b"as it is")
    assert fetch(f"https://images.test{path}?x=%2B/?y") == b"as it is"
    assert f"GET {path}?x=%2B/?y " in site.requests[0]


CHUNKED = {"Content_Length": None, "Transfer_Encoding": "chunked"}


@pytest.mark.parametrize(
    "page",
    [
        answer(b"0123456789"),
        answer(b"0123456789", Content_Length=None),
        answer(b"4\r\n0123\r\n6;x=y\r\n456789\r\n0\r\nA: b\r\n\r\n", **CHUNKED),
        b"HTTP/1.1 100 Continue\r\n\r\n" + answer(b"0123456789"),
        answer(b"0123456789", Content_Encoding="Identity"),
    ],
    ids=["length", "no length", "chunked", "after a 100", "identity"],
)
def test_the_limit_is_exact_however_the_bytes_are_sent(internet, site, page):
    site.pages["/page"] = page
    assert fetch("https://images.test/page", max_bytes=10) == b"0123456789"
    error = failure("https://images.test/page", max_bytes=9)
    assert type(error) is DownloadTooLargeError
    assert error.code == "download_too_large"


def test_another_address_is_tried_when_one_is_dead(internet):
    internet.names["images.test"] = ["1.2.3.4", "2606::1", PUBLIC]
    assert fetch().startswith(b"\x89PNG")
    assert internet.connected == ["1.2.3.4", "2606::1", PUBLIC]


def test_no_proxy_of_the_environment_is_used(internet, silent_server, monkeypatch):
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{silent_server.port}")
    assert fetch().startswith(b"\x89PNG")
    assert silent_server.connections == 0


# URLs that are refused as they stand


@pytest.mark.parametrize(
    ("url", "because"),
    [
        ("", "https://"),
        ("images.test/good.png", "https://"),
        ("//images.test/good.png", "https://"),
        ("http://images.test/good.png", "https://"),
        ("file:///etc/passwd", "https://"),
        ("ftp://images.test/good.png", "https://"),
        ("gopher://images.test:70/_x", "https://"),
        ("data:image/png;base64,AAAA", "https://"),
        ("s3://bucket/key", "https://"),
        ("httpsx://images.test/", "https://"),
        ("https:images.test", "host name"),
        ("https:///good.png", "host name"),
        ("https://", "host name"),
        ("https://?x", "host name"),
        ("https://#images.test", "host name"),
        ("https://.images.test/", "host name"),
        ("https://images..test/", "host name"),
        ("https://images.test../", "host name"),
        ("https://*.test/", "host name"),
        ("https://a,b/", "host name"),
        ("https://images.test%00.evil.test/", "host name"),
        ("https://%31%32%37.0.0.1/", "host name"),
        ("https://images.test%2f@evil.test/", "user name"),
        (f"https://{'a' * 64}.test/", "host name"),
        (f"https://{'a.' * 127}test/", "host name"),
        ("https://[fe80::1%25eth0]/", "host name"),
        ("https://[::1/", "not valid"),
        ("https://[1.2.3.4.5]/", "valid"),
        ("https://images.test:port/", "not valid"),
        ("https://images.test:-1/", "not valid"),
        ("https://images.test:65536/", "not valid"),
        ("https://xn--a\u0301.test/", "not valid"),
        ("https://\u2488.test/", "not valid"),
        ("https://images.test:0/", "port"),
        ("https://images.test:22/", "port"),
        ("https://images.test:80/", "port"),
        ("https://images.test:6379/", "port"),
        ("https://good.test@127.0.0.1/", "user name"),
        ("https://good.test:443@127.0.0.1/", "user name"),
        ("https://user:password@images.test/", "user name"),
        ("https://@images.test/", "user name"),
        ("https://images.test\\@127.0.0.1/", "backslashes"),
        ("https:\\\\127.0.0.1\\", "backslashes"),
        (" https://images.test/", "spaces"),
        ("https://images.test/a b", "spaces"),
        ("https://images.test/\r\nHost: evil.test", "control"),
        ("https://ima\tges.test/", "control"),
        ("https://images.test/\0", "control"),
        ("https://images.test/\x7f", "control"),
        ("https://images.test/\u202egnp.exe", "control"),
        ("https://images.test/\ud800", "control"),
        ("https://images.test/" + "a" * MAX_URL, "4096 characters"),
    ],
)
def test_a_url_is_refused_before_anything_is_looked_up(internet, url, because):
    assert because in refusal(url)
    assert internet.looked_up == []


@pytest.mark.parametrize(
    ("host", "allowed", "passes"),
    [
        ("images.test", ["images.test"], True),
        ("IMAGES.test.", ["other.test", "Images.TEST"], True),
        ("cdn.images.test", ["*.images.test"], True),
        ("cdn.images.test", ["images.test"], False),
        ("images.test", ["*.images.test"], False),
        ("evilimages.test", ["images.test", "*.images.test"], False),
        ("images.test.evil.test", ["images.test", "*.images.test"], False),
    ],
)
def test_the_list_of_allowed_hosts(internet, host, allowed, passes):
    url = f"https://{host}/good.png"
    if passes:
        assert fetch(url, allowed_hosts=allowed).startswith(b"\x89PNG")
    else:
        assert f"The host {host} is not among those" in refusal(url, allowed_hosts=allowed)
        assert internet.looked_up == []


# hosts that are refused for their addresses

INTERNAL = [
    "127.0.0.1",
    "127.255.255.254",
    "127.1",
    "127.0.1",
    "2130706433",
    "0177.0.0.1",
    "0x7f.0.0.1",
    "0x7f.1",
    "0x7f000001",
    "017700000001",
    "127.0.0.1.",
    "①②⑦.⓪.⓪.①",
    "127。0。0。1",
    "0.0.0.0",
    "0",
    "0.1.2.3",
    "10.0.0.1",
    "10.255.255.255",
    "172.16.0.1",
    "172.31.255.255",
    "192.168.0.1",
    "192.168.255.255",
    "169.254.169.254",
    "2852039166",
    "0xa9fea9fe",
    "169.254.170.2",
    "100.64.0.1",
    "100.100.100.200",
    "100.127.255.255",
    "168.63.129.16",
    "192.0.0.8",
    "192.0.0.192",
    "192.0.2.1",
    "192.88.99.1",
    "198.18.0.1",
    "198.51.100.7",
    "203.0.113.9",
    "224.0.0.1",
    "239.255.255.250",
    "240.0.0.1",
    "255.255.255.255",
    "[::]",
    "[::1]",
    "[0:0:0:0:0:0:0:1]",
    "[::127.0.0.1]",
    "[::ffff:127.0.0.1]",
    "[::ffff:7f00:1]",
    "[::ffff:0:127.0.0.1]",
    "[::ffff:169.254.169.254]",
    "[::ffff:93.184.216.34]",
    "[2002:7f00:1::]",
    "[2002:a9fe:a9fe::]",
    "[2001:0:7f00:1::]",
    "[64:ff9b::7f00:1]",
    "[64:ff9b::169.254.169.254]",
    "[64:ff9b:1::1]",
    "[fd00:ec2::254]",
    "[fd20:ce::254]",
    "[fc00::1]",
    "[fe80::1]",
    "[fe80::a9fe:a9fe]",
    "[fec0::1]",
    "[ff02::1]",
    "[100::1]",
    "[2001:2::1]",
    "[2001:10::1]",
    "[2001:20::1]",
    "[2001:db8::1]",
    "[3fff::1]",
    "[4000::1]",
    "[5f00::1]",
    "localhost",
    "LOCALHOST",
]


@pytest.mark.parametrize("host", INTERNAL)
def test_a_host_that_is_not_public_is_refused(internet, host):
    assert "has no public address" in refusal(f"https://{host}/good.png?{SECRET}")
    assert internet.connected == []


@pytest.mark.parametrize("host", INTERNAL)
def test_a_redirect_to_a_host_that_is_not_public_is_refused(internet, site, host):
    site.pages["/page"] = answer(status="302 Found", Location=f"https://{host}/".encode().decode("latin-1"))
    assert "has no public address" in refusal("https://images.test/page")
    assert internet.connected == [PUBLIC]


@pytest.mark.parametrize("addresses", [["10.0.0.7"], [PUBLIC, "127.0.0.1"], ["::1", PUBLIC], []], ids=str)
def test_a_name_is_refused_if_any_of_its_addresses_is_not_public(internet, addresses):
    internet.names["images.test"] = addresses
    assert refusal(GOOD) == "The host images.test has no public address."
    assert internet.connected == []


def test_names_inside_and_names_of_nobody_are_refused_in_the_same_words(internet):
    internet.names["vault.internal"] = ["10.0.0.7"]
    sentences = {refusal(f"https://{name}.internal/").replace(name, "*") for name in ("vault", "nobody")}
    assert sentences == {"The host *.internal has no public address."}


def test_the_address_that_was_checked_is_the_one_connected_to(internet):
    """DNS rebinding: the second answer, which would lead inside, is never asked for."""
    internet.names["images.test"] = iter([[PUBLIC], ["127.0.0.1"]]).__next__
    assert fetch().startswith(b"\x89PNG")
    assert internet.looked_up == ["images.test"]
    assert internet.connected == [PUBLIC]


def test_a_redirect_to_the_same_name_is_checked_again(internet, site):
    internet.names["images.test"] = iter([[PUBLIC], ["127.0.0.1"]]).__next__
    site.pages["/page"] = answer(status="302 Found", Location="/good.png")
    assert "no public address" in refusal("https://images.test/page")
    assert internet.connected == [PUBLIC]


@pytest.mark.parametrize(
    "address",
    [
        *(
            "1.1.1.1",
            "8.8.8.8",
            "172.15.0.1",
            "172.32.0.1",
            "100.63.0.1",
            "100.128.0.1",
            "192.0.1.1",
            "223.9.9.9",
        ),
        *("2606:4700::1111", "2a00:1450::1", "2400:cb00::1", "2001:4860:4860::8888", "2003::1", "3ffe::1"),
    ],
)
def test_public_addresses(address):
    assert is_public(address)


def test_an_address_with_a_zone_is_not_public():
    assert not is_public("2606:4700::1111%eth0")


# redirects


@pytest.mark.parametrize("status", ["301 Moved", "302 Found", "303 See", "307 Same", "308 Same"])
@pytest.mark.parametrize(
    "location", ["/good.png", "good.png", "//cdn.images.test/good.png", GOOD + "#x", "../../good.png"]
)
def test_redirects_are_followed(internet, site, status, location):
    site.pages["/page"] = answer(b"elsewhere", status=status, Location=location)
    assert fetch("https://images.test/page").startswith(b"\x89PNG")
    assert len(site.requests) == 2


@pytest.mark.parametrize(("hops", "arrives"), [(MAX_REDIRECTS, True), (MAX_REDIRECTS + 1, False)])
def test_five_redirects_are_followed(internet, site, hops, arrives):
    for hop in range(hops):
        site.pages[f"/{hop}"] = answer(status="302 Found", Location=f"/{hop + 1}")
    site.pages[f"/{hops}"] = answer(b"there")
    if arrives:
        assert fetch("https://images.test/0") == b"there"
    else:
        error = failure("https://images.test/0")
        assert str(error) == "The URL redirects more than 5 times."
        assert error.code == "download_failed"
    assert len(site.requests) == MAX_REDIRECTS + 1


def test_a_redirect_loop_ends(internet, site):
    assert "more than 5 times" in download_failure(answer(status="302 Found", Location="/page"), site)


@pytest.mark.parametrize(
    ("location", "because"),
    [
        ("http://images.test/good.png", "https://"),
        ("file:///etc/passwd", "https://"),
        ("gopher://images.test/", "https://"),
        ("data:,x", "https://"),
        ("https://images.test:22/", "port"),
        ("https://user:password@images.test/", "user name"),
        ("https://images.test\\@127.0.0.1/", "backslashes"),
        ("/a b", "spaces"),
        ("/\x01", "control"),
        ("https://[::1", "not valid"),
        ("https://[", "not valid"),
        ("/" + "a" * 5000, "4096 characters"),
    ],
)
def test_hostile_redirects(internet, site, location, because):
    site.pages["/page"] = answer(status="302 Found", Location=location)
    assert because in refusal("https://images.test/page")
    assert internet.connected == [PUBLIC]


def test_a_redirect_may_not_leave_the_allowed_hosts(internet, site):
    site.pages["/page"] = answer(status="302 Found", Location="https://cdn.images.test/good.png")
    url = "https://images.test/page"
    assert fetch(url).startswith(b"\x89PNG")
    assert "cdn.images.test is not among those" in refusal(url, allowed_hosts=["images.test"])


def test_a_redirect_with_letters_beyond_ascii(internet, site):
    site.pages["/b%C3%A4r.png"] = answer(b"bear")
    site.pages["/page"] = answer(status="302 Found", Location="/bär.png".encode().decode("latin-1"))
    assert fetch("https://images.test/page") == b"bear"


# servers that do not give the file


@pytest.mark.parametrize(
    "status", ["404 Not Found", "403 No", "500 Oops", "204 None", "206 Part", "304 Same"]
)
def test_a_status_other_than_200(internet, site, status):
    sentence = download_failure(answer(status=status), site)
    assert sentence == f"The host images.test answered with status {status[:3]}."


def test_a_redirect_to_nowhere(internet, site):
    assert "answered with status 302" in download_failure(answer(status="302 Found"), site)


@pytest.mark.parametrize(
    "page",
    [
        b"",
        b"nonsense\r\n\r\n",
        b"\0" * 100,
        b"HTTP/1.1 two hundred\r\n\r\n",
        b"HTTP/1.1 99999 OK\r\n\r\n",
        b"HTTP/9.9 200 OK\r\n\r\n",
        b"SSH-2.0-OpenSSH_9.6\r\n",
        b"HTTP/1.1 200 " + b"a" * 70_000 + b"\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nA: " + b"a" * 70_000 + b"\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 101 + b"\r\n",
        answer(b"x\r\n", **CHUNKED),
        answer(b"-5\r\n01234", **CHUNKED),
        answer(b"-1\r\n01234", **CHUNKED),
        answer(b"5\r\n012", **CHUNKED),
        answer(b"f" * 70_000, **CHUNKED),
        answer(b"5\r\n01234\r\n0\r\n" + b"A" * 70_000, **CHUNKED),
    ],
    ids=lambda page: repr(page[:30] + b"..." + page[-10:]),
)
def test_answers_that_are_not_http(internet, site, page):
    assert download_failure(page, site) == "The connection to images.test failed."


def test_a_body_that_breaks_off(internet, site):
    assert "broke off" in download_failure(answer(b"12345", Content_Length=10), site)


@pytest.mark.parametrize("encoding", ["gzip", "br", "GZIP", "identity, gzip", "aws-chunked", "x" * 1000])
def test_compressed_data_is_refused_unread(internet, site, encoding):
    bomb = gzip.compress(bytes(10_000_000))
    assert "compressed" in download_failure(answer(bomb, Content_Encoding=encoding), site)


def test_what_is_not_an_image_is_for_the_decoder_to_refuse(internet, site):
    site.pages["/page"] = answer(b"<html>Please log in.</html>", Content_Type="image/png")
    data = fetch("https://images.test/page")
    with pytest.raises(ImageError, match="not a PNG, JPEG or WebP"):
        decode_image(base64.b64encode(data).decode())


def test_a_certificate_of_another_name(internet, site):
    internet.names["other.test"] = [PUBLIC]
    sentence = str(failure("https://other.test/good.png"))
    assert sentence == "The certificate of other.test is not valid."
    assert site.requests == []


def test_a_certificate_of_an_unknown_authority(internet, site, monkeypatch):
    monkeypatch.delenv("SSL_CERT_FILE")
    assert str(failure()) == "The certificate of images.test is not valid."
    assert site.requests == []


def test_certifis_authorities_serve_where_the_system_has_none(internet, certificates, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", "/nowhere")
    monkeypatch.setattr("core.fetch.certifi.where", lambda: str(certificates[0]))
    assert fetch().startswith(b"\x89PNG")


def test_a_server_without_tls(internet, silent_server):
    silent_server.greeting = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"
    internet.port = silent_server.port
    assert str(failure()) == "The connection to images.test failed."


def test_a_port_that_nobody_listens_on(internet):
    internet.names["images.test"] = ["1.2.3.4", "1.2.3.5"]
    assert str(failure()) == "The connection to images.test failed."
    assert internet.connected == ["1.2.3.4", "1.2.3.5"]


def test_a_look_up_that_fails_for_now(internet):
    internet.names["images.test"] = socket.gaierror(socket.EAI_AGAIN, "Try again")
    error = failure()
    assert str(error) == "The connection to images.test failed."
    assert error.code == "download_failed"


def test_random_damage_gives_bytes_or_a_sentence(internet, site):
    good = b"HTTP/1.1 200 OK\r\nContent-Type: multipart/x; boundary=a\r\nTransfer-Encoding: chunked\r\n"
    good += b"X: y\r\n z\r\n\r\n" + b"4\r\n0123\r\n0\r\nA: b\r\n\r\n"
    random, outcomes = np.random.default_rng(0), set()
    for _ in range(60):
        bad = bytearray(good)
        for position in random.integers(0, len(bad), 4):
            bad[position] = random.choice(bytearray(b"\0\r\n:;-\xff90 "))
        site.pages["/page"] = bytes(bad)
        try:
            outcomes.add(type(fetch("https://images.test/page")))
        except DownloadError as error:
            outcomes.add(type(error))
    assert outcomes == {bytes, DownloadError}


# too much


def until_closed(connection: ssl.SSLSocket, data: bytes = b"") -> None:
    """Send `data` over and over, or nothing, until the other side hangs up."""
    while data:
        connection.sendall(data)
    connection.recv(1)


def endless(head: bytes, data: bytes):
    def page(connection):
        connection.sendall(head)
        until_closed(connection, data)

    return page


def test_a_length_over_the_limit_is_refused_unread(internet, site):
    site.pages["/page"] = endless(answer(Content_Length=10**12), b"")
    assert str(failure("https://images.test/page")) == "The file at images.test has over 1 MB."


BLOCK = bytes(100_000)


@pytest.mark.parametrize(
    "page",
    [
        endless(answer(Content_Length=None), BLOCK),
        endless(answer(**CHUNKED), b"186a0\r\n" + BLOCK + b"\r\n"),
        endless(answer(**CHUNKED), b"1\r\n0\r\n" * 1000),
        endless(answer(**CHUNKED) + b"-1\r\n", BLOCK),
        endless(answer(**CHUNKED) + b"0\r\n", b"A: b\r\n" * 1000),
        endless(b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 1000),
    ],
    ids=["no length", "chunks", "tiny chunks", "chunk of length -1", "trailers", "interim answers"],
)
def test_an_endless_answer_is_cut_off(internet, site, page):
    site.pages["/page"] = page
    assert type(failure("https://images.test/page", max_bytes=300_000)) is DownloadTooLargeError


def test_bytes_past_the_stated_length_are_not_read(internet, site):
    site.pages["/page"] = endless(answer(b"01234"), BLOCK)
    assert fetch("https://images.test/page", max_bytes=5) == b"01234"


# too slow


def pause(seconds: float) -> None:
    """As time.sleep, which some tests replace."""
    threading.Event().wait(seconds)


def dripping(data: bytes):
    """Sends `data`, complete in the end, a byte at a time: 20 times slower than the deadline below."""

    def page(connection):
        for byte in data:
            connection.sendall(bytes([byte]))
            pause(10 / len(data))

    return page


@pytest.mark.parametrize(
    "page",
    [
        until_closed,
        dripping(answer(bytes(200))),
        dripping(answer(A="b" * 200)),
        dripping(answer(b"5;" + b"x" * 200 + b"\r\n01234\r\n0\r\n\r\n", **CHUNKED)),
    ],
    ids=["no answer", "body", "headers", "chunk sizes"],
)
def test_the_deadline_is_for_the_whole_download(internet, site, page):
    assert download_failure(page, site, timeout_s=0.5) == "The download from images.test took too long."


def test_redirects_share_the_deadline(internet, site):
    for hop in range(5):
        page = answer(status="302 Found", Location=f"/{hop + 1}")
        site.pages[f"/{hop}"] = lambda connection, page=page: (pause(0.3), connection.sendall(page))
    site.pages["/5"] = answer(b"there")
    assert "took too long" in str(failure("https://images.test/0", timeout_s=0.8))
    assert len(site.requests) < 5


def test_a_server_that_accepts_and_says_nothing(internet, silent_server):
    internet.port = silent_server.port
    assert "took too long" in str(failure(timeout_s=0.3))


@pytest.fixture
def hanging_look_up(internet):
    """The look-up of images.test hangs until the test ends."""
    over = threading.Event()

    def hang():
        over.wait(20)
        return [PUBLIC]

    internet.names["images.test"] = hang
    yield
    over.set()
    for thread in threading.enumerate():
        if thread.name == "look-up":
            thread.join()


@pytest.mark.usefixtures("hanging_look_up")
def test_a_look_up_that_hangs():
    assert "took too long" in str(failure(timeout_s=0.3))


def test_a_connection_that_hangs(internet, monkeypatch):
    waits = []

    def hang(address, port, timeout, options):
        waits.append(timeout)
        raise TimeoutError("timed out")

    monkeypatch.setattr("core.guard._connect", hang)
    internet.names["images.test"] = ["1.2.3.4", "1.2.3.5"]
    assert "took too long" in str(failure(timeout_s=60))
    assert waits == [5, 5]
    waits.clear()
    failure(timeout_s=2)
    assert all(0 < wait <= 2 for wait in waits)


def test_a_server_may_think_for_longer_than_a_connection_may_take(internet, site, monkeypatch):
    def connect(address, port, timeout, options):
        connection = internet.connect(address, port, timeout, options)
        connection.settimeout(0.1)
        return connection

    monkeypatch.setattr("core.guard._connect", connect)
    site.pages["/page"] = lambda connection: (pause(0.6), connection.sendall(answer(b"at last")))
    assert fetch("https://images.test/page") == b"at last"


# cancelled


class Cancel:
    """A job that is cancelled after `calls` looks at it."""

    def __init__(self, calls):
        self.calls = calls

    def __call__(self):
        self.calls -= 1
        if self.calls < 0:
            raise CancelledError("The job was cancelled.")


@pytest.mark.parametrize("calls", range(8))
def test_a_cancel_ends_the_download_wherever_it_is(internet, site, calls):
    site.pages["/page"] = dripping(answer(bytes(200)))
    assert type(failure("https://images.test/page", check_cancelled=Cancel(calls))) is CancelledError


@pytest.mark.usefixtures("hanging_look_up")
def test_a_cancel_is_noticed_while_the_look_up_hangs():
    assert type(failure(check_cancelled=Cancel(2))) is CancelledError


@pytest.mark.parametrize("calls", [3, 4, 5])
def test_a_cancel_is_noticed_while_the_server_is_silent(internet, site, silent_server, calls):
    site.pages["/page"] = until_closed
    assert type(failure("https://images.test/page", check_cancelled=Cancel(calls))) is CancelledError
    internet.port = silent_server.port
    assert type(failure(check_cancelled=Cancel(calls))) is CancelledError


# nothing is left behind


def descriptors_and_threads() -> tuple[int, int]:
    return len(list(Path("/proc/self/fd").iterdir())), threading.active_count()


def are_back_at(before: tuple[int, int]) -> bool:
    """Whether no more are left, once the servers, which live in this process too, have noticed the end."""
    for _ in range(100):
        if all(now <= then for now, then in zip(descriptors_and_threads(), before, strict=True)):
            return True
        pause(0.05)
    return False


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_descriptor_and_no_thread_is_left(internet, site):
    site.pages |= {
        "/missing/a": answer(status="404 Not Found"),
        "/loop": answer(status="302 Found", Location="/loop"),
        "/inside": answer(status="302 Found", Location="https://127.0.0.1/"),
        "/missing": answer(status="404 Not Found"),
        "/endless": endless(answer(Content_Length=None), BLOCK),
        "/silent": until_closed,
        "/garbage": b"nonsense\r\n\r\n",
        "/short": answer(b"12345", Content_Length=10),
    }
    internet.names["other.test"] = [PUBLIC]
    internet.names["dead.test"] = ["1.2.3.4"]
    before = descriptors_and_threads()
    for _ in range(5):
        fetch()
        for path in site.pages.keys() - {"/good.png"}:
            failure(f"https://images.test{path}", timeout_s=0.3 if path == "/silent" else 20)
        failure("https://images.test/silent", check_cancelled=Cancel(4))
        for host in ("127.0.0.1", "other.test", "dead.test", "nobody.test"):
            failure(f"https://{host}/")
        for host in ("images.test", "127.0.0.1"):
            client = s3_client(f"https://{host}")
            with pytest.raises((ClientError, UrlRefusedError)):
                client.head_object(Bucket="missing", Key="a")
            client.close()
    assert are_back_at(before)


# an S3 client


@pytest.fixture(scope="module")
def s3(certificates):
    """The port of an S3 server with TLS, and the bucket `videos`."""
    server = make_server(
        "127.0.0.1",
        0,
        DomainDispatcherApplication(create_backend_app),
        threaded=True,
        request_handler=MotoRequestHandler,
        ssl_context=certificates[1],
    )
    with serving(server):
        yield server.server_port


def s3_client(
    endpoint="https://s3.test", timeout_s=20, guarded=True, retries="standard", style="path", patience=60
):
    client = boto3.client(
        "s3",
        endpoint_url=endpoint,
        aws_access_key_id="key",
        aws_secret_access_key="a-secret",
        region_name="us-east-1",
        config=Config(
            s3={"addressing_style": style},
            retries={"mode": retries, "total_max_attempts": 3},
            connect_timeout=patience,
            read_timeout=patience,
        ),
    )
    if guarded:
        guard_client(client, timeout_s)
    return client


@pytest.fixture
def no_backoff(monkeypatch):
    monkeypatch.setattr("botocore.endpoint.time.sleep", lambda _: None)


@pytest.mark.parametrize("size", [10, 12_000_000], ids=["one part", "several parts"])
def test_a_good_upload(internet, s3, tmp_path, size):
    internet.port = s3
    video = tmp_path / "video.mp4"
    video.write_bytes(np.random.default_rng(0).bytes(size))
    client = s3_client(style="virtual")
    client.create_bucket(Bucket="videos")
    parts = TransferConfig(multipart_threshold=5 << 20, multipart_chunksize=5 << 20, use_threads=False)
    client.upload_file(str(video), "videos", "a.mp4", Config=parts)
    assert client.head_object(Bucket="videos", Key="a.mp4")["ContentLength"] == size
    assert (
        client.get_object(Bucket="videos", Key="a.mp4", Range="bytes=-10")["Body"].read()
        == (video.read_bytes()[-10:])
    )
    assert set(internet.connected) == {PUBLIC}
    client.close()


def test_the_limit_of_bytes_is_for_each_answer(internet, site):
    def keep_answering(connection):
        connection.sendall(answer(BLOCK * 5))
        while connection.recv(65536):
            connection.sendall(answer(BLOCK * 5))

    site.pages["/videos/half"] = keep_answering
    client = s3_client()
    for _ in range(3):
        assert client.get_object(Bucket="videos", Key="half")["Body"].read() == BLOCK * 5
    assert site.connections == 1
    client.close()


def test_what_the_service_says_arrives_as_ever(internet, s3):
    internet.port = s3
    client = s3_client(style="virtual")
    with pytest.raises(ClientError, match="NoSuchBucket"):
        client.put_object(Bucket="nobodys", Key="a", Body=b"x")
    client.close()


@pytest.mark.parametrize(
    "endpoint",
    [
        "http://s3.test",
        "http://127.0.0.1:5000",
        "https://s3.test:22",
        "https://s3.test:5000",
        "https://user:password@s3.test",
    ],
)
def test_an_endpoint_is_refused_as_it_stands(internet, endpoint):
    client = s3_client(endpoint, guarded=False)
    with pytest.raises(UrlRefusedError) as error:
        guard_client(client)
    assert "password@" not in str(error.value)
    assert internet.looked_up == []


@pytest.mark.parametrize("retries", ["legacy", "standard", "adaptive"])
@pytest.mark.parametrize(
    "host", ["inside.test", "localhost", "127.0.0.1", "2130706433", "[::1]", "[::ffff:7f00:1]"]
)
def test_an_endpoint_that_leads_inside_is_refused_at_once(
    internet, site, tmp_path, host, retries, no_backoff
):
    internet.names["inside.test"] = ["127.0.0.1"]
    (tmp_path / "video.mp4").write_bytes(b"x" * 100)
    client = s3_client(f"https://{host}", retries=retries)
    with pytest.raises(UrlRefusedError, match="has no public address") as error:
        client.upload_file(str(tmp_path / "video.mp4"), "videos", "a.mp4")
    assert error.value.code == "url_refused"
    assert len(internet.looked_up) == 1
    assert internet.connected == []
    assert site.connections == 0


def test_an_endpoint_on_this_machine_sees_no_connection(silent_server, monkeypatch):
    """The one test with the real look-up and connection."""
    monkeypatch.setattr("core.guard.PORTS", (silent_server.port,))
    client = s3_client(f"https://127.0.0.1:{silent_server.port}")
    with pytest.raises(UrlRefusedError):
        client.put_object(Bucket="videos", Key="a", Body=b"x")
    with pytest.raises(UrlRefusedError):
        fetch(f"https://localhost:{silent_server.port}/")
    assert silent_server.connections == 0


@pytest.mark.parametrize("host", ["169.254.169.254", "[fd00:ec2::254]", "168.63.129.16", "100.100.100.200"])
def test_a_clouds_metadata_is_no_endpoint(internet, host):
    client = s3_client(f"https://{host}")
    with pytest.raises(UrlRefusedError):
        client.put_object(Bucket="videos", Key="a", Body=b"x")
    assert internet.connected == []


def test_every_connection_of_a_client_is_checked(internet, site, no_backoff):
    """Also the one that is made because the server closed the last: DNS rebinding again."""
    internet.names["s3.test"] = iter([[PUBLIC], ["127.0.0.1"]]).__next__
    site.pages["/videos/a"] = answer(Connection="close")
    client = s3_client()
    client.put_object(Bucket="videos", Key="a", Body=b"x")
    with pytest.raises(UrlRefusedError):
        client.put_object(Bucket="videos", Key="a", Body=b"x")
    assert internet.connected == [PUBLIC]


def test_a_client_uses_no_proxy_of_the_environment(internet, s3, silent_server, monkeypatch):
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{silent_server.port}")
    internet.port = s3
    client = s3_client(style="virtual")
    client.create_bucket(Bucket="videos")
    client.close()
    assert silent_server.connections == 0


@pytest.mark.usefixtures("no_backoff")
def test_a_client_still_checks_certificates(internet, site):
    internet.names["other.test"] = [PUBLIC]
    client = s3_client("https://other.test")
    with pytest.raises(BotoCoreError, match=r"CERTIFICATE_VERIFY_FAILED|doesn't match"):
        client.put_object(Bucket="videos", Key="a", Body=b"x")
    assert site.requests == []


def continue_and_close(connection):
    connection.sendall(b"HTTP/1.1 100 Continue\r\n")


@pytest.mark.usefixtures("no_backoff")
@pytest.mark.parametrize(
    "page",
    [
        endless(answer(Content_Length=None), BLOCK),
        endless(answer(**CHUNKED), BLOCK.replace(b"\0", b"1")),
        endless(b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 1000),
        continue_and_close,
        b"nonsense\r\n\r\n",
    ],
    ids=["endless", "endless chunk size", "endless 100", "100 and gone", "garbage"],
)
def test_a_hostile_service_ends_the_upload(internet, site, page):
    """Long before the deadline, after which no connection would be made."""
    site.pages["/videos/a"] = page
    client = s3_client(timeout_s=8)
    with pytest.raises((ConnectionClosedError, SSLError)):
        client.put_object(Bucket="videos", Key="a", Body=b"x")
    assert len(site.requests) == 3
    client.close()


@pytest.mark.usefixtures("no_backoff")
def test_a_service_that_redirects_everything_is_left(internet, site):
    """botocore by itself goes on until Python's stack is full."""
    site.pages |= dict.fromkeys(["/videos/a", "/videos"], answer(status="301 Moved"))
    client = s3_client()
    with pytest.raises(ClientError, match="301"):
        client.put_object(Bucket="videos", Key="a", Body=b"x")
    assert len(site.requests) == 2
    client.close()


@pytest.mark.usefixtures("no_backoff")
@pytest.mark.parametrize("page", [until_closed, dripping(answer(A="b" * 200))], ids=["silent", "dripping"])
def test_a_client_has_a_deadline(internet, site, page):
    site.pages["/videos/a"] = page
    client = s3_client(timeout_s=1)
    with pytest.raises(BotoCoreError):
        client.put_object(Bucket="videos", Key="a", Body=b"x")
    assert len(site.requests) == 1
    client.close()


@pytest.mark.usefixtures("no_backoff")
def test_a_clients_own_time_out_still_counts(internet, site):
    site.pages["/videos/a"] = until_closed
    client = s3_client(patience=0.5)
    with pytest.raises(BotoCoreError):
        client.put_object(Bucket="videos", Key="a", Body=b"x")
    assert site.connections == 3
    client.close()


# a whole job


@pytest.mark.usefixtures("internet", "quick_decode")
def test_a_job_takes_its_image_from_a_url(tiny_models):
    job = quick_input()
    by_url = run_job(job | {"input_image": GOOD}, tiny_models)
    inlined = run_job(job | {"input_image": to_base64(encoded(picture(), "PNG"))}, tiny_models)
    assert by_url["video_base64"] == inlined["video_base64"]
    assert by_url["timings"]["input"] > 0
    assert "input_image" not in by_url["parameters"]


@pytest.mark.usefixtures("internet")
@pytest.mark.parametrize(
    ("page", "code"),
    [
        (answer(b"<html>Not found</html>", Content_Type="image/png"), "invalid_image"),
        (answer(BOMBS["PNG"]), "image_too_large"),
        (answer(status="404 Not Found"), "download_failed"),
        (answer(Content_Length=20_000_001), "download_too_large"),
        (answer(status="302 Found", Location="https://127.0.0.1/"), "url_refused"),
    ],
    ids=["html", "bomb", "404", "too large", "redirect inside"],
)
def test_a_job_says_what_is_wrong_with_its_url(tiny_models, site, page, code):
    site.pages["/bad.png"] = page
    job = quick_input(input_image="https://images.test/bad.png")
    assert Worker(lambda: tiny_models).submit("a", job).result()["code"] == code


@pytest.mark.usefixtures("internet")
def test_only_certain_hosts(tiny_models, monkeypatch):
    monkeypatch.setenv("INPUT_HOSTS", "cdn.images.test, *.example.com")
    reply = Worker(lambda: tiny_models).submit("a", quick_input(input_image=GOOD)).result()
    assert reply["code"] == "url_refused" and "not among those" in reply["error"]


def test_a_video_goes_to_the_callers_own_bucket(internet, s3, tmp_path):
    internet.port = s3
    client = s3_client(f"https://{PUBLIC}")
    client.create_bucket(Bucket="videos")
    own = {"accessId": "key", "accessSecret": "a-secret", "bucketName": "videos", "region": "us-east-1"}
    request = parse_request(
        quick_input(output="url", s3Config=own | {"endpointUrl": f"https://{PUBLIC}", "prefix": "a/b"})
    )
    video = tmp_path / "video.mp4"
    video.write_bytes(b"a video" * 2_000_000)  # two parts
    reply = Delivery(Settings(volume_dir=tmp_path / "none"))(video, "job-1", request, lambda: None)
    assert "videos" in reply["video_url"] and "/a/b/job-1.mp4?" in reply["video_url"]
    stored = client.get_object(Bucket="videos", Key="a/b/job-1.mp4", Range="bytes=-10")
    assert stored["ContentRange"].endswith(f"/{video.stat().st_size}")
    assert stored["Body"].read() == video.read_bytes()[-10:]
    assert set(internet.connected) == {PUBLIC}
    client.close()
