"""Hosts that RUN steps may want to reach, on loopback, and names that lead to them."""

import contextlib
import os
import shutil
import socket
import socketserver
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from policies.model import EgressRule

LOOPBACK = ("127.0.0.0/8",)
HOST = "files.example.org"
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"

Answer = Callable[[bytes, socket.socket], None]
"""Gets a request's head and what came with it, and the connection."""


def rule(port: int, *hosts: str, **fields: Any) -> EgressRule:
    """A rule for a host on loopback."""
    return EgressRule(hosts=hosts or (HOST,), ports=(port,), private_ranges=LOOPBACK, **fields)


@dataclass
class Names:
    """A resolver that knows these names and addresses as they are, and was asked for others."""

    known: dict[str, tuple[str, ...]] = field(default_factory=lambda: {HOST: ("127.0.0.1",)})
    asked: list[str] = field(default_factory=list)

    def __call__(self, host: str, port: int, *_: object, **__: object) -> list[Any]:
        self.asked.append(host)
        addresses = self.known.get(host, (host,) if host.replace(".", "").isdigit() else ())
        if not addresses:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        family = socket.AF_INET, socket.SOCK_STREAM, 0, ""
        return [(*family, (address, port)) for address in addresses]


def only_names(monkeypatch: pytest.MonkeyPatch) -> Names:
    """The only names that there are, for this process, until the end of the test."""
    made = Names()
    monkeypatch.setattr(socket, "getaddrinfo", made)
    return made


@dataclass
class Origin:
    """A server; every connection is one request."""

    port: int
    seen: list[bytes] = field(default_factory=list)
    answer: Answer = lambda _, peer: peer.sendall(OK)

    def says(self, data: bytes) -> None:
        self.answer = lambda _, peer: peer.sendall(data)


@contextmanager
def origin(tls: ssl.SSLContext | None = None) -> Iterator[Origin]:
    """A server on a port of its own."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with contextlib.suppress(OSError):
                self.request.settimeout(10)
                if tls is None:
                    self.serve(self.request)
                else:
                    with tls.wrap_socket(self.request, server_side=True) as connection:
                        self.serve(connection)

        def serve(self, peer: socket.socket) -> None:
            received = peer.recv(65536)
            while b"\r\n\r\n" not in received and (piece := peer.recv(65536)):
                received += piece
            made.seen.append(received)
            made.answer(received, peer)

    class Server(socketserver.ThreadingTCPServer):
        allow_reuse_address = True
        daemon_threads = True
        block_on_close = False

        def handle_error(self, *_: object) -> None:
            """A client that went away is part of many tests."""

    with Server(("127.0.0.1", 0), Handler) as server:
        made = Origin(server.server_address[1])
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield made
        finally:
            server.shutdown()
            thread.join()


def certificate(directory: Path, *hosts: str) -> tuple[Path, Path]:
    """A certificate for ``hosts`` that vouches for itself, and its key."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("openssl is not installed: apt-get install openssl")
    key, cert = directory / "key.pem", directory / "cert.pem"
    subject = "subjectAltName=" + ",".join(f"DNS:{host}" for host in hosts)
    subprocess.run(
        [openssl, "req", "-x509", "-nodes", "-newkey", "ec", "-pkeyopt",
         "ec_paramgen_curve:prime256v1", "-days", "2", "-subj", "/CN=test", "-addext", subject,
         "-keyout", key, "-out", cert],
        check=True, capture_output=True, env={**os.environ, "OPENSSL_CONF": "/dev/null"},
    )  # fmt: skip
    return cert, key


def server_side(cert: Path, key: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    return context


def hello(server_name: str | None, **options: Any) -> bytes:
    """The first bytes of a real client."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    for name, value in options.items():
        setattr(context, name, value)
    outgoing = ssl.MemoryBIO()
    client = context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname=server_name)
    with contextlib.suppress(ssl.SSLWantReadError):
        client.do_handshake()
    return outgoing.read()


def headers_of(head: bytes) -> Mapping[str, str]:
    """Of a raw message, names in lower case."""
    lines = head.partition(b"\r\n\r\n")[0].decode("latin-1").split("\r\n")[1:]
    return {name.lower(): value.strip() for name, _, value in (x.partition(":") for x in lines)}
