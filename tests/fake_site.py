"""A public internet on this machine: names and addresses of its own, TLS sites on 127.0.0.1 behind them."""

import ipaddress
import socket
import socketserver
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

PUBLIC = "93.184.216.34"
PUBLIC_IPV6 = "2606:2800:220:1:248:1893:25c8:1946"
NAMES = (
    "images.test",
    "cdn.images.test",
    "xn--bcher-kva.test",
    "s3.test",
    "videos.s3.test",
    "nobodys.s3.test",
)

Addresses = list[str] | Callable[[], list[str]] | Exception
Page = bytes | Callable[[ssl.SSLSocket], None]


class Internet:
    """What the guard's look-ups and connections meet instead of the real one.

    `names` maps a name to its addresses, to what gives them, or to an exception; numbers in all their
    spellings and `localhost` are left to the system. Connections to `PUBLIC` and `PUBLIC_IPV6` reach
    127.0.0.1 at `port`, others are refused; `connected` lists the addresses tried.
    """

    def __init__(self, resolve: Callable, connect: Callable, port: int) -> None:
        self.names: dict[str, Addresses] = {name: [PUBLIC] for name in NAMES}
        self.port = port
        self.looked_up: list[str] = []
        self.connected: list[str] = []
        self._resolve, self._connect = resolve, connect

    def resolve(self, host: str, port: int) -> list[str]:
        self.looked_up.append(host)
        addresses = self.names.get(host.rstrip("."))
        if callable(addresses):
            addresses = addresses()
        if isinstance(addresses, Exception):
            raise addresses
        if addresses is not None:
            return addresses
        if host.rstrip(".") == "localhost" or set(host) <= set("0123456789abcdefx.:"):
            return self._resolve(host, port)
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    def connect(self, address: str, port: int, timeout: float, options: tuple) -> socket.socket:
        self.connected.append(address)
        if address not in (PUBLIC, PUBLIC_IPV6):
            raise ConnectionRefusedError(111, f"{address} refused")
        return self._connect("127.0.0.1", self.port, timeout, options)


class Site(socketserver.ThreadingTCPServer):
    """A TLS server. `pages` maps a path to the raw answer, or to what is done with the connection.

    `requests` lists the heads of requests, `connections` counts what was accepted before TLS.
    """

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, context: ssl.SSLContext) -> None:
        super().__init__(("127.0.0.1", 0), self._serve)
        self.context = context
        self.pages: dict[str, Page] = {}
        self.requests: list[str] = []
        self.connections = 0

    @property
    def port(self) -> int:
        return self.server_address[1]

    def _serve(self, connection: socket.socket, address: tuple, server: socketserver.BaseServer) -> None:
        self.connections += 1
        with suppress(OSError), self.context.wrap_socket(connection, server_side=True) as secured:
            head = b""
            while b"\r\n\r\n" not in head:
                received = secured.recv(65536)
                if not received:
                    return
                head += received
            self.requests.append(head.decode("latin-1"))
            page = self.pages[head.split()[1].decode("ascii").split("?")[0]]
            if isinstance(page, bytes):
                secured.sendall(page)
            else:
                page(secured)

    def handle_error(self, request: object, client_address: object) -> None:
        """Quiet."""


@contextmanager
def serving(server: socketserver.BaseServer) -> Iterator[None]:
    """Run `server` while the block runs."""
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()


def answer(body: bytes = b"", status: str = "200 OK", **headers: object) -> bytes:
    """A whole HTTP answer; Content-Length is set unless given, None leaves it out."""
    lines = {"Content-Length": len(body)} | {name.replace("_", "-"): value for name, value in headers.items()}
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items() if value is not None)
    return f"HTTP/1.1 {status}\r\n{head}\r\n".encode("latin-1") + body


def make_certificates(folder: Path) -> tuple[Path, ssl.SSLContext]:
    """An authority's certificate as a PEM file, and a server context for its names, signed by it."""
    authority_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    authority_name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "Test authority")])
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, NAMES[0])])
    now = datetime.now(UTC)

    def builder(subject: x509.Name, public_key: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder(authority_name, subject, public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=1))
            .not_valid_after(now + timedelta(days=1))
        )

    may_sign = x509.KeyUsage(*[False] * 5, True, *[False] * 3)
    authority = (
        builder(authority_name, authority_key.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(may_sign, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(authority_key.public_key()), critical=False)
        .sign(authority_key, hashes.SHA256())
    )
    names = [x509.DNSName(name) for name in NAMES]
    names += [x509.IPAddress(ipaddress.ip_address(address)) for address in (PUBLIC, PUBLIC_IPV6)]
    signer = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key())
    certificate = (
        builder(name, key.public_key())
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(signer, critical=False)
        .sign(authority_key, hashes.SHA256())
    )

    pem = serialization.Encoding.PEM
    authority_file, chain_file, key_file = folder / "authority.pem", folder / "chain.pem", folder / "key.pem"
    authority_file.write_bytes(authority.public_bytes(pem))
    chain_file.write_bytes(certificate.public_bytes(pem))
    key_file.write_bytes(
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(chain_file, key_file)
    return authority_file, context
