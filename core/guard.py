"""The guard for URLs that strangers send: https, to public addresses only, within limits.

The address is checked where the connection is made and the connection goes to exactly that address, so
that a name which resolves to something else the second time gains nothing. A host is refused when any of
its addresses is not public: no honest service publishes such a mixture, a rebinding attack does.

What the worker sees in its own network stays there: a name that does not exist and one that leads inside
are refused in the same words, before anything is connected to, and no sentence names an address that was
looked up or a URL's path and query, which may hold secrets.

(The SDK's `rp_ssrf` allows http and cannot guard boto3.)
"""

import ipaddress
import math
import re
import socket
import ssl
import string
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, NamedTuple
from urllib.parse import quote, urlsplit

import idna

from core.errors import UrlRefusedError

MAX_URL = 4096  # presigned URLs have two thousand characters
PORTS = (443, 8443, 9000)  # HTTPS, its usual alternative, MinIO; the worker is nobody's port scanner
CONNECT_S = 5.0  # for one address, so that a dead one leaves time for the next
TICK_S = 0.25  # how soon a cancel is noticed while waiting

CheckCancelled = Callable[[], None]

_HOST = re.compile(r"(?=.{1,253}$)[a-z0-9_-]{1,63}(\.[a-z0-9_-]{1,63})*\.?")

_PUBLIC_IPV6 = ipaddress.ip_network("2000::/3")  # leaves out all that maps IPv4 but 6to4 and Teredo
_NOT_PUBLIC = [  # beyond what every Python's `is_global` knows
    ipaddress.ip_network(network)
    for network in (
        "100.64.0.0/10",  # carriers' NAT, and a cloud's metadata
        "168.63.129.16/32",  # Azure's metadata: a public number answered inside
        "192.0.0.0/24",  # protocol assignments, and a cloud's metadata
        "192.88.99.0/24",  # 6to4 relays
        "198.18.0.0/15",  # benchmarks
        "224.0.0.0/3",  # multicast and reserved
        "2001::/23",  # protocol assignments: Teredo, ORCHID, benchmarks
        "2001:db8::/32",  # documentation
        "2002::/16",  # 6to4
        "3fff::/20",  # documentation
    )
]
_NO_SUCH_NAME = (socket.EAI_NONAME, socket.EAI_NODATA, socket.EAI_ADDRFAMILY)


class Target(NamedTuple):
    """What to ask of whom."""

    host: str  # lower-case ASCII, or an IPv6 address without brackets
    port: int
    path: str  # with the query


class AnswerTooLongError(OSError):
    """The server sends more than `Limits.answer_bytes`."""


@dataclass(frozen=True)
class Limits:
    """How long, and with how much, a stranger's server may keep the worker busy."""

    deadline: float  # by time.monotonic()
    answer_bytes: int  # of one answer, headers and framing included
    check_cancelled: CheckCancelled = lambda: None

    def seconds_left(self) -> float:
        """Raises TimeoutError when there are none, and what `check_cancelled` raises."""
        self.check_cancelled()
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("past the deadline")
        return left

    def tick(self) -> float:
        """Seconds to wait before looking again. Raises as `seconds_left`."""
        return min(TICK_S, self.seconds_left())


def check_url(url: str, allowed_hosts: Sequence[str] = ()) -> Target:
    """Take a URL apart. Raises UrlRefusedError for what will not be asked; nothing is looked up yet.

    `allowed_hosts`, if any: `example.com` is that host, `*.example.com` every host below it.
    """
    if len(url) > MAX_URL:
        raise UrlRefusedError(f"The URL must have at most {MAX_URL} characters (got {len(url)}).")
    if not url.isprintable() or " " in url or "\\" in url:
        raise UrlRefusedError("The URL must not contain spaces, backslashes or control characters.")
    try:
        parts = urlsplit(url)
        host = _ascii(parts.hostname or "")
        port = 443 if parts.port is None else parts.port
    except ValueError:
        raise UrlRefusedError("The URL is not valid.") from None
    if parts.scheme != "https":
        raise UrlRefusedError("The URL must start with https://.")
    if "@" in parts.netloc:
        raise UrlRefusedError("The URL must not contain a user name or password.")
    if not _HOST.fullmatch(host) and not _is_ipv6(host):
        raise UrlRefusedError("The URL's host name is not valid.")
    if port not in PORTS:
        raise UrlRefusedError(f"The URL's port must be one of {', '.join(map(str, PORTS))} (got {port}).")
    if allowed_hosts and not any(_matches(host.rstrip("."), allowed.lower()) for allowed in allowed_hosts):
        raise UrlRefusedError(f"The host {host} is not among those that this worker may connect to.")
    query = f"?{parts.query}" if parts.query else ""
    return Target(host, port, quote((parts.path or "/") + query, safe=string.punctuation))


def is_public(address: str) -> bool:
    """Whether a numeric address is on the public internet."""
    ip = ipaddress.ip_address(address)
    if ip.version == 6 and (ip.scope_id or ip not in _PUBLIC_IPV6):
        return False
    return ip.is_global and not any(ip in network for network in _NOT_PUBLIC)


def connect_public(
    host: str, port: int, limits: Limits, timeout: float = CONNECT_S, options: Sequence[tuple] = ()
) -> socket.socket:
    """A TCP connection to one of `host`'s addresses, each tried for `timeout` seconds.

    Raises UrlRefusedError unless all are public, OSError when none can be reached, TimeoutError past the
    deadline.
    """
    addresses = _lookup(host, port, limits)
    if not addresses or not all(map(is_public, addresses)):
        raise UrlRefusedError(f"The host {host} has no public address.")
    failure = OSError("no address")
    for address in addresses:
        wait = min(timeout, limits.seconds_left())
        try:
            return _connect(address, port, wait, options)
        except OSError as error:
            failure = error
    raise failure


def limit_tls(context: ssl.SSLContext, limits: Limits) -> None:
    """Keep every connection of `context` within `limits`, from the handshake to the last byte."""
    context.sslsocket_class = type("LimitedSocket", (_LimitedSocket,), {"limits": limits})


class _LimitedSocket(ssl.SSLSocket):
    """Waits in short ticks, and counts what it receives.

    Time-outs of single reads would let a server drip a byte just before each, for hours.
    """

    limits: Limits
    received = 0  # since something was last sent

    def do_handshake(self, *args: Any) -> None:
        try:
            self._patiently(super().do_handshake, *args)
        except BaseException:
            self.close()  # nobody has this socket yet
            raise

    def read(self, *args: Any) -> Any:
        data = self._patiently(super().read, *args)
        self.received += data if isinstance(data, int) else len(data)
        if self.received > self.limits.answer_bytes:
            raise AnswerTooLongError("the answer is too long")
        return data

    def send(self, *args: Any) -> int:
        self.received = 0
        return self._patiently(super().send, *args)

    def _patiently(self, operation: Callable[..., Any], *args: Any) -> Any:
        """Try until done, the socket's own time-out for one operation, or the limits."""
        timeout = self.gettimeout()
        end = math.inf if timeout is None else time.monotonic() + timeout
        try:
            while True:
                self.settimeout(self.limits.tick())
                try:
                    return operation(*args)
                except TimeoutError:
                    if time.monotonic() >= end:
                        raise
        finally:
            self.settimeout(timeout)


def _lookup(host: str, port: int, limits: Limits) -> list[str]:
    """The addresses of `host`; none if there is no such name. Raises OSError, TimeoutError.

    A look-up cannot be interrupted, hence the thread: one that hangs is left to the resolver's own
    time-outs.
    """
    answer: Future[list[str]] = Future()

    def look_up() -> None:
        try:
            answer.set_result(_resolve(host, port))
        except Exception as error:
            answer.set_exception(error)

    thread = threading.Thread(target=look_up, name="look-up", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(limits.tick())
    try:
        return answer.result()
    except socket.gaierror as error:
        if error.errno in _NO_SUCH_NAME:
            return []
        raise


def _resolve(host: str, port: int) -> list[str]:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(address[0] for *_, address in found))


def _connect(address: str, port: int, timeout: float, options: Sequence[tuple]) -> socket.socket:
    connection = socket.create_connection((address, port), timeout)  # numeric: nothing is looked up again
    for option in options:
        connection.setsockopt(*option)
    return connection


def _ascii(host: str) -> str:
    return host if host.isascii() else idna.encode(host, uts46=True).decode("ascii")


def _is_ipv6(host: str) -> bool:
    try:
        return ipaddress.IPv6Address(host).scope_id is None
    except ValueError:
        return False


def _matches(host: str, allowed: str) -> bool:
    return host == allowed or (allowed.startswith("*.") and host.endswith(allowed[1:]))
