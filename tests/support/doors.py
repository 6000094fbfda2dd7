"""Clients of a gateway that listens on TCP."""

import base64
import contextlib
import http.client
import socket
import ssl
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from tests.support.gateway import Answer


def basic(login: str) -> dict[str, str]:
    return {"Authorization": "Basic " + base64.b64encode(login.encode()).decode()}


@dataclass
class Client:
    """Asks one address, each time on a connection of its own."""

    address: tuple[str, int]
    headers: Mapping[str, str] = field(default_factory=dict)
    tls: ssl.SSLContext | None = None

    def ask(
        self,
        method: str,
        target: str,
        body: bytes | Iterator[bytes] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Answer:
        connection = (
            http.client.HTTPConnection(*self.address, timeout=10)
            if self.tls is None
            else http.client.HTTPSConnection(*self.address, timeout=10, context=self.tls)
        )
        with contextlib.closing(connection):
            chunked = body is not None and not isinstance(body, bytes)
            sent = {**self.headers, **(headers or {})}
            connection.request(method, target, body, sent, encode_chunked=chunked)
            response = connection.getresponse()
            return Answer(response.status, dict(response.headers), response.read())

    def connect(self) -> socket.socket:
        return socket.create_connection(self.address, timeout=10)

    def speak(self, data: bytes) -> bytes:
        """Sends raw bytes and returns everything until the server ends the connection."""
        received = b""
        with self.connect() as peer:
            with contextlib.suppress(OSError):  # the server may have ended it before
                peer.sendall(data)
                peer.shutdown(socket.SHUT_WR)
            with contextlib.suppress(ConnectionResetError):
                while piece := peer.recv(65536):
                    received += piece
        return received

    def head(self, method: str, target: str, *lines: str) -> bytes:
        """A raw head with the client's headers."""
        own = (f"{name}: {value}" for name, value in self.headers.items())
        return "\r\n".join(
            (f"{method} {target} HTTP/1.1", "Host: gateway", *own, *lines, "", "")
        ).encode("latin-1")
