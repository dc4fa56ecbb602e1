"""Connections to where a stranger's URL points: a file fetched whole, an S3 client kept in bounds.

Whether it may be connected to is `core/guard.py`'s decision. What the bytes are is the caller's: nothing
here believes a Content-Type.
"""

import http.client
import ssl
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any
from urllib.parse import urljoin

import certifi

from core.errors import DownloadError, DownloadTooLargeError, UrlRefusedError
from core.guard import AnswerTooLongError, Limits, Target, check_url, connect_public, limit_tls

MAX_REDIRECTS = 5
REDIRECTS = (301, 302, 303, 307, 308)
CHUNK_BYTES = 64 * 1024
S3_ANSWER_BYTES = 1_000_000  # to an upload S3 answers in a few hundred
HEADERS = {
    "Accept": "*/*",
    "Accept-Encoding": "identity",  # what is not compressed cannot be a decompression bomb
    "Connection": "close",
    "User-Agent": "framepack-worker",
}


def fetch_url(
    url: str,
    *,
    max_bytes: int,
    timeout_s: float,
    allowed_hosts: Sequence[str] = (),
    check_cancelled: Callable[[], None] = lambda: None,
) -> bytes:
    """The file at an https URL. As `fetch_into`."""
    body = bytearray()
    fetch_into(
        body.extend,
        url,
        max_bytes=max_bytes,
        timeout_s=timeout_s,
        allowed_hosts=allowed_hosts,
        check_cancelled=check_cancelled,
    )
    return bytes(body)


def fetch_into(
    write: Callable[[bytes], object],
    url: str,
    *,
    max_bytes: int,
    timeout_s: float,
    allowed_hosts: Sequence[str] = (),
    check_cancelled: Callable[[], None] = lambda: None,
) -> None:
    """`write` the file at an https URL, `timeout_s` covering everything from the look-up to the last byte.

    Redirects are followed, each checked like the first URL. Raises UrlRefusedError for what the worker
    will not connect to, DownloadTooLargeError over `max_bytes`, DownloadError for any other failure, and
    what `check_cancelled` raises, which is called several times a second. `allowed_hosts` as in `check_url`.
    """
    with_framing = 2 * max_bytes + 1_000_000  # headers, and chunks however small within reason
    limits = Limits(time.monotonic() + timeout_s, with_framing, check_cancelled)
    for _ in range(1 + MAX_REDIRECTS):
        target = check_url(url, allowed_hosts)
        with _answer(target, limits) as answer:
            location = answer.status in REDIRECTS and answer.getheader("Location")
            if not location:
                return _copy_body(answer, write, target.host, max_bytes)
        url = _joined(url, location)
    raise DownloadError(f"The URL redirects more than {MAX_REDIRECTS} times.")


def guard_client(client: Any, timeout_s: float = 600) -> None:
    """Let a botocore client, whose endpoint a stranger chose, connect only as `core/guard.py` allows.

    All it does must be done `timeout_s` from now; no proxy of the environment is used. Its methods then
    raise UrlRefusedError, unwrapped and at once, where an address is refused; a time-out or an endless
    answer is botocore's usual error. Raises UrlRefusedError itself when the endpoint's URL is refused.
    """
    from botocore.awsrequest import AWSHTTPSConnection, AWSHTTPSConnectionPool
    from botocore.httpsession import ProxyConfiguration
    from urllib3.exceptions import NewConnectionError

    check_url(client.meta.endpoint_url)
    limits = Limits(time.monotonic() + timeout_s, S3_ANSWER_BYTES)

    class Connection(AWSHTTPSConnection):
        def _new_conn(self):
            try:
                return connect_public(self._dns_host, self.port, limits, self.timeout, self.socket_options)
            except OSError as error:
                raise NewConnectionError(self, "no connection") from error

        def _consume_headers(self, fp):
            """As botocore's, which loops for ever if the server closes the connection."""
            while fp.readline() not in (b"\r\n", b""):
                pass

    class Pool(AWSHTTPSConnectionPool):
        ConnectionCls = Connection

    session = client._endpoint.http_session
    session._proxy_config = ProxyConfiguration()
    session._manager.pool_classes_by_scheme = {"https": Pool}
    limit_tls(session._manager.connection_pool_kw["ssl_context"], limits)
    service = client.meta.service_model.service_id.hyphenize()
    client.meta.events.register_first(f"needs-retry.{service}", _raise_refusal)
    client.meta.events.register_first(f"needs-retry.{service}.HeadBucket", _end_redirects)


def _raise_refusal(caught_exception: BaseException | None, **_: Any) -> None:
    """botocore would wrap it, and try again."""
    while caught_exception is not None:
        if isinstance(caught_exception, UrlRefusedError):
            raise caught_exception
        caught_exception = caught_exception.__context__


def _end_redirects(response: tuple | None, **_: Any) -> None:
    """botocore asks for a bucket that has moved where it is; sent on then as well, it would ask for ever."""
    from botocore.exceptions import ClientError

    if response is not None and response[0].status_code in REDIRECTS:
        raise ClientError(response[1], "HeadBucket")


class _Connection(http.client.HTTPSConnection):
    def __init__(self, target: Target, limits: Limits) -> None:
        self._tls = ssl.create_default_context()
        self._tls.load_verify_locations(certifi.where())  # the system may have none
        limit_tls(self._tls, limits)
        self._limits = limits
        super().__init__(target.host, target.port, context=self._tls)

    def connect(self) -> None:
        connection = connect_public(self.host, self.port, self._limits)
        connection.settimeout(None)  # from here the limits alone count
        self.sock = self._tls.wrap_socket(connection, server_hostname=self.host.rstrip("."))


@contextmanager
def _answer(target: Target, limits: Limits) -> Iterator[http.client.HTTPResponse]:
    """The server's answer, its body unread. What goes wrong inside becomes a DownloadError."""
    host = target.host
    try:
        with closing(_Connection(target, limits)) as connection:
            connection.request("GET", target.path, headers=HEADERS)
            with closing(connection.getresponse()) as answer:
                yield answer
    except AnswerTooLongError as error:
        raise DownloadTooLargeError(f"The answer of {host} is too long.") from error
    except TimeoutError as error:
        raise DownloadError(f"The download from {host} took too long.") from error
    except ssl.SSLCertVerificationError as error:
        raise DownloadError(f"The certificate of {host} is not valid.") from error
    except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: of http.client's parser
        raise DownloadError(f"The connection to {host} failed.") from error


def _copy_body(
    answer: http.client.HTTPResponse, write: Callable[[bytes], object], host: str, max_bytes: int
) -> None:
    if answer.status != 200:
        raise DownloadError(f"The host {host} answered with status {answer.status}.")
    if (answer.getheader("Content-Encoding") or "identity").strip().lower() != "identity":
        raise DownloadError(f"The host {host} sent compressed data unasked.")
    declared, received = answer.length or 0, 0
    too_large = DownloadTooLargeError(f"The file at {host} has over {max_bytes / 1e6:g} MB.")
    if declared > max_bytes:
        raise too_large
    while chunk := answer.read(CHUNK_BYTES):
        received += len(chunk)
        if received > max_bytes:
            raise too_large
        write(chunk)
    if received < declared:
        raise DownloadError(f"The download from {host} broke off.")


def _joined(url: str, location: str) -> str:
    """Where a redirect leads; http.client reads headers as Latin-1, but servers write UTF-8."""
    try:
        return urljoin(url, location.encode("latin-1").decode("utf-8", "replace"))
    except ValueError:
        raise UrlRefusedError("The URL redirects to one that is not valid.") from None
