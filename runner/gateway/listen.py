"""Doors: where sessions can be reached. A Unix socket for one session, one TCP port for many.

On the shared port a connection belongs to the session whose token came over it first. Until then
it is a stranger's, and strangers have little time and few places.
"""

import base64
import contextlib
import hashlib
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from runner.gateway.http import (
    BodyBroken,
    Bounds,
    Handler,
    Request,
    Response,
    Server,
    Welcome,
    login_of,
)
from sandbox import sockets

Failed = Callable[[Exception], None]
Secured = Callable[[socket.socket], AbstractContextManager[socket.socket]]
"""Around a new connection: what to speak HTTP over."""


class Opened(Protocol):
    """A session's place at a door."""

    def close(self) -> None:
        """Ends every connection, and waits for those who serve them, some seconds at most."""


class Door(Protocol):
    """Where sessions can be opened."""

    def open(self, token: str, handler: Handler, failed: Failed) -> Opened:
        """Lets in whoever comes with ``token``.

        Args:
            token: Of the session. The handler checks it as well.
            handler: Called from the thread of each connection.
            failed: Gets what the handler raised and no peer could have caused.
        """


@dataclass(frozen=True, slots=True)
class UnixDoor:
    """A Unix socket in a directory that the sandbox mounts, for one session."""

    directory: Path
    socket_name: str
    peer_uid: int

    def open(self, token: str, handler: Handler, failed: Failed) -> Server:
        """Whoever has the right uid is let in; the handler asks for the token."""
        del token
        return Server(self.listen(), handler, peer_uid=self.peer_uid, failed=failed)

    def listen(self) -> socket.socket:
        """A listening socket that only ``peer_uid`` can connect to."""
        return sockets.listen(self.directory, self.socket_name, peer_uid=self.peer_uid)


def tcp(host: str, port: int) -> socket.socket:
    """A listening TCP socket; port 0 chooses one. Raises OSError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.create_server((host, port), family=family, backlog=1024)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # connections inherit it
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Shares:
    """Of one port: what a session may take from the others."""

    connections: int = 4096
    """Of all sessions, beyond those that each can always have."""
    always: int = 8
    of_session: int = 64
    """The same as on a Unix socket, while there is room."""
    strangers: int = 256
    """One more takes the place of the oldest."""
    of_address: int = 32
    """Likewise, of the strangers from one address."""
    stranger_seconds: float = 20.0
    """To show a token."""
    refusals: int = 8
    """Before a stranger has to connect again: clients ask once without a token."""
    close_seconds: float = 10.0


class SharedDoor:
    """One TCP port for many sessions."""

    def __init__(
        self, listener: socket.socket, secured: Secured, shares: Shares = Shares()
    ) -> None:
        """Starts to listen; whoever comes is refused until a session is opened."""
        self._secured = secured
        self._shares = shares
        self._lock = threading.Lock()
        self._places: dict[bytes, _Place] = {}
        self._strangers: dict[_Visitor, float] = {}
        self._over = threading.Event()
        self._server = Server(
            listener,
            refuse,
            peer_uid=None,
            failed=lambda _: None,  # a session heard of its own
            bounds=replace(Bounds(), connections=_CONNECTIONS),
            welcome=self._welcome,
        )
        self._reaper = threading.Thread(target=self._reap, name="gateway-strangers", daemon=True)
        self._reaper.start()

    def open(self, token: str, handler: Handler, failed: Failed) -> "_Place":
        place = _Place(self, _hidden(token), handler, failed, self._shares)
        with self._lock:
            self._places[place.key] = place
        return place

    def forget(self, place: "_Place") -> None:
        with self._lock:
            self._places.pop(place.key, None)

    def close(self) -> None:
        """Ends every connection of every session."""
        self._over.set()
        self._server.close()
        self._reaper.join()

    def place_of(self, request: Request) -> "_Place | None":
        """Where the token of ``request`` leads."""
        is_proxied = request.method == "CONNECT" or not request.target.startswith("/")
        token = _token(request.headers.get(f"{'proxy-' * is_proxied}authorization", ""))
        with self._lock:
            return self._places.get(_hidden(token))

    def has_room(self) -> bool:
        """Whether a session may have one more than it can always have."""
        with self._lock:
            return sum(place.extra for place in self._places.values()) < self._shares.connections

    def known(self, visitor: "_Visitor") -> None:
        """No stranger any more, or gone."""
        with self._lock:
            self._strangers.pop(visitor, None)

    @contextlib.contextmanager
    def _welcome(self, connection: socket.socket) -> Iterator[tuple[socket.socket, Handler]]:
        visitor = _Visitor(self, connection, self._shares)
        try:
            self._enter(visitor)
            with self._secured(connection) as peer:
                yield peer, visitor.answer
        finally:
            visitor.leave()

    def _enter(self, visitor: "_Visitor") -> None:
        """A flood of strangers ends strangers, those from its own addresses first."""
        with self._lock:
            same = [other for other in self._strangers if other.address == visitor.address]
            crowded = same if len(same) >= self._shares.of_address else []
            if len(self._strangers) >= self._shares.strangers:
                crowded = crowded or list(self._strangers)
            for oldest in crowded[:1]:
                del self._strangers[oldest]
                oldest.end()
            self._strangers[visitor] = time.monotonic() + self._shares.stranger_seconds

    def _reap(self) -> None:
        while not self._over.wait(_REAP_SECONDS):
            now = time.monotonic()
            with self._lock:
                for visitor, end in self._strangers.items():
                    if end < now:
                        visitor.end()


_REAP_SECONDS = 1.0
_CONNECTIONS = 16_384
"""More than the shares of a thousand sessions and of the strangers come to."""


class _Visitor:
    """One connection to a shared door."""

    def __init__(self, door: SharedDoor, connection: socket.socket, shares: Shares) -> None:
        self._door = door
        self._connection = connection
        self._refusals = shares.refusals
        self._place: _Place | None = None
        self.address = connection.getpeername()[0]

    def answer(self, request: Request) -> Response:
        place = self._place or self._admitted(request)
        if place is None:
            self._refusals -= 1
            return _last(refuse(request)) if self._refusals <= 0 else refuse(request)
        if self._place is None:
            return _last(Response(503, {"Retry-After": "1"}))
        try:
            return place.handler(request)
        except BodyBroken:
            raise
        except Exception as error:
            place.failed(error)
            raise

    def _admitted(self, request: Request) -> "_Place | None":
        place = self._door.place_of(request)
        if place is not None:
            self._door.known(self)
            self._place = place if place.enter(self) else None
        return place

    def end(self) -> None:
        """Makes the thread that serves the connection come to its end."""
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)

    def leave(self) -> None:
        self._door.known(self)
        if self._place is not None:
            self._place.leave(self)


class _Place:
    """One session at a shared door."""

    def __init__(
        self, door: SharedDoor, key: bytes, handler: Handler, failed: Failed, shares: Shares
    ) -> None:
        self.key = key
        self.handler = handler
        self.failed = failed
        self._door = door
        self._shares = shares
        self._empty = threading.Condition()
        self._visitors: set[_Visitor] = set()
        self._closed = False

    def enter(self, visitor: _Visitor) -> bool:
        """Whether there is room."""
        has_room = self._door.has_room()
        with self._empty:
            most = self._shares.of_session if has_room else self._shares.always
            if self._closed or len(self._visitors) >= most:
                return False
            self._visitors.add(visitor)
            return True

    @property
    def extra(self) -> int:
        """Connections that it could not have if there were no room."""
        return max(0, len(self._visitors) - self._shares.always)

    def leave(self, visitor: _Visitor) -> None:
        with self._empty:
            self._visitors.discard(visitor)
            self._empty.notify_all()

    def close(self) -> None:
        self._door.forget(self)
        with self._empty:
            self._closed = True
            for visitor in self._visitors:
                visitor.end()
            self._empty.wait_for(lambda: not self._visitors, self._shares.close_seconds)


def _hidden(token: str) -> bytes:
    """What tokens are looked up by: how long that takes tells nothing of them."""
    return hashlib.sha256(token.encode()).digest()


def _token(header: str) -> str:
    scheme, _, shown = login_of(header).partition(b" ")
    if scheme == b"Bearer":
        return shown.decode("latin-1")
    if scheme != b"Basic":
        return ""
    try:
        return base64.b64decode(shown, validate=True).decode().partition(":")[2]
    except ValueError:
        return ""


def refuse(request: Request) -> Response:
    """What a stranger is told."""
    body = b'{"errors":[{"code":"UNAUTHORIZED","message":"authentication required"}]}'
    headers = {"Content-Type": "application/json"}
    if request.method == "CONNECT" or not request.target.startswith("/"):
        return Response(407, {"Proxy-Authenticate": 'Basic realm="runner"', **headers}, body)
    return Response(401, {"WWW-Authenticate": 'Basic realm="runner"', **headers}, body)


def _last(response: Response) -> Response:
    """After which the connection ends."""
    response.headers["Connection"] = "close"
    return response
