"""Where connections come from: a session's own Unix socket, or a TCP port with or without TLS."""

import contextlib
import socket
import ssl
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from runner.gateway.http import Handler, Request, Response, Server, Welcome
from sandbox import sockets

Failed = Callable[[Exception], None]
Secured = Callable[[socket.socket], AbstractContextManager[socket.socket]]
"""Around a new connection: what to speak HTTP over."""


class Door(Protocol):
    """Where a session is reached."""

    def open(self, handler: Handler, failed: Failed) -> Server:
        """Lets in whoever comes.

        Args:
            handler: Called from the thread of each connection; checks the session's token.
            failed: Gets what the handler raised and no peer could have caused.
        """


@dataclass(frozen=True, slots=True)
class UnixDoor:
    """A Unix socket in a directory that the sandbox mounts, for one session."""

    directory: Path
    socket_name: str
    peer_uid: int

    def open(self, handler: Handler, failed: Failed) -> Server:
        """Whoever has the right uid is let in."""
        return Server(self.listen(), handler, peer_uid=self.peer_uid, failed=failed)

    def listen(self) -> socket.socket:
        """A listening socket that only ``peer_uid`` can connect to."""
        return sockets.listen(self.directory, self.socket_name, peer_uid=self.peer_uid)


def tcp(host: str, port: int) -> socket.socket:
    """A listening TCP socket; port 0 chooses one. Raises OSError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.create_server((host, port), family=family, backlog=1024)
    # Connections inherit all of it. Whose host died says nothing: it is asked, for two minutes.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 15)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def plain(connection: socket.socket) -> AbstractContextManager[socket.socket]:
    """No TLS, for loopback."""
    return contextlib.nullcontext(connection)


def tls(certificate: Path, key: Path) -> Secured:
    """TLS 1.2 or newer. Raises OSError, which covers ssl.SSLError, for files that do not do."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(certificate, key)

    @contextlib.contextmanager
    def secured(connection: socket.socket) -> Iterator[socket.socket]:
        # A copy, since wrapping takes the socket away from the server, which has to end it.
        with connection.dup() as own:
            own.settimeout(_HANDSHAKE_SECONDS)
            with context.wrap_socket(own, server_side=True) as peer:
                yield peer

    return secured


def over(secured: Secured, handler: Handler) -> Welcome:
    """The same handler for every connection."""

    @contextlib.contextmanager
    def welcome(connection: socket.socket) -> Iterator[tuple[socket.socket, Handler]]:
        with secured(connection) as peer:
            yield peer, handler

    return welcome


_HANDSHAKE_SECONDS = 10.0


def refuse(request: Request) -> Response:
    """What a stranger is told."""
    body = b'{"errors":[{"code":"UNAUTHORIZED","message":"authentication required"}]}'
    headers = {"Content-Type": "application/json"}
    if request.method == "CONNECT" or not request.target.startswith("/"):
        return Response(407, {"Proxy-Authenticate": 'Basic realm="runner"', **headers}, body)
    return Response(401, {"WWW-Authenticate": 'Basic realm="runner"', **headers}, body)
