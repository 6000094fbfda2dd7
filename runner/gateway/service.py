"""One TLS port for the doors of many sandboxes: those that cannot have a Unix socket of this host.

Whoever connects says in one line whose door it wants, by the door's key, and which of its sockets::

    runner-door 1 KEY NAME

From then on bytes pass between the connection and that socket, on which the runner of the build
listens as it does for every sandbox. Nothing is looked at on the way: a door's owner checks what
comes, and whoever stole a key has got no further than the sandbox that it was made for.

A door is a link in one directory, named by the hash of its key. So the port is one process, the
runners that it serves are others, and either may be started again without the other::

    STATE/gateway/doors/SHA256-OF-KEY -> .../sandboxes/ID/guest/door
"""

import contextlib
import re
import resource
import socket
import ssl
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from runner.gateway.accept import Acceptor
from runner.gateway.relay import relay
from runner.gateway.tlspeer import TlsPeer
from sandbox import doors

_LINE = re.compile(
    rf"runner-door 1 ([A-Za-z0-9_-]{{16,128}}) ({'|'.join(sorted(doors.NAMES))})\n".encode()
)
_LINE_BYTES = 160
"""Of the longest such line."""
_REAP_SECONDS = 1.0
_DISCARD_BYTES = 256 << 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Shares:
    """Of the port: who may take how much of it from the others."""

    connections: int = 4096
    """Of all doors, beyond those that each can always have."""
    always: int = 8
    of_door: int = 96
    """While there is room. A sandbox forwards 64 connections, and has a few for itself."""
    strangers: int = 256
    """One more takes the place of the oldest."""
    of_address: int = 32
    """Likewise, of the strangers from one address."""
    stranger_seconds: float = 20.0
    """To say whose door it wants."""
    idle_seconds: float = 86_400.0
    """Without a byte in any direction: a build may be silent for long. Whoever is gone without a
    word is found out sooner, by TCP."""
    linger_seconds: float = 10.0
    """For a peer to take the last of what it is sent, while it still sends."""
    close_seconds: float = 10.0


class Service:
    """The port, from its making until it is closed."""

    def __init__(
        self,
        listener: socket.socket,
        server: ssl.SSLContext,
        directory: Path,
        shares: Shares = Shares(),
    ) -> None:
        """Starts to serve.

        Args:
            listener: Bound and listening.
            server: Who the port is.
            directory: Of the links to doors.
            shares: Of those who connect.
        """
        self._server = server
        self._directory = directory
        self._shares = shares
        self._lock = threading.Lock()
        self._strangers: dict[socket.socket, tuple[str, float]] = {}
        self._visitors: Counter[str] = Counter()
        self._over = threading.Event()
        self._acceptor = Acceptor(listener, self._serve, peer_uid=None, connections=_CONNECTIONS)
        self._reaper = threading.Thread(target=self._reap, name="gateway-strangers", daemon=True)
        self._reaper.start()

    def close(self) -> None:
        """Ends every connection."""
        self._over.set()
        self._acceptor.close(self._shares.close_seconds)
        self._reaper.join()

    def _serve(self, connection: socket.socket) -> None:
        # Whoever breaks off, or is broken off, hears nothing more: it was its connection.
        with contextlib.suppress(OSError):
            self._enter(connection)
            try:
                self._lead(connection)
            finally:
                self._known(connection)

    def _lead(self, connection: socket.socket) -> None:
        """From the first byte of a stranger to the end of the connection. Raises OSError."""
        peer = TlsPeer(connection, self._server)
        peer.greet()
        wanted = _LINE.fullmatch(peer.line(_LINE_BYTES))
        if wanted is None:
            return
        door, name = doors.hidden(wanted[1].decode()), wanted[2].decode()
        with self._place(door), doors.connect(self._directory, door, name) as inside:
            self._known(connection)
            try:
                relay(
                    inside,
                    connection,
                    sent=_nobody,
                    received=_nobody,
                    idle_seconds=self._shares.idle_seconds,
                    between=peer.between,
                )
            finally:
                inside.close()  # its runner has nothing to wait for
                _linger(connection, self._shares.linger_seconds)

    @contextlib.contextmanager
    def _place(self, door: str) -> Iterator[None]:
        """One of the connections of that door. Raises OSError where it has as many as it may."""
        with self._lock:
            extra = sum(max(0, count - self._shares.always) for count in self._visitors.values())
            has_room = extra < self._shares.connections
            if self._visitors[door] >= (self._shares.of_door if has_room else self._shares.always):
                raise ConnectionRefusedError("the door has its share of connections")
            self._visitors[door] += 1
        try:
            yield
        finally:
            with self._lock:
                self._visitors[door] -= 1
                self._visitors += Counter()  # forgets doors without any

    # -- strangers ---------------------------------------------------------------------------------

    def _enter(self, connection: socket.socket) -> None:
        """A flood of strangers ends strangers, those from its own addresses first."""
        address = connection.getpeername()[0]
        with self._lock:
            strangers = self._strangers
            crowded = [each for each, (other, _) in strangers.items() if other == address]
            if len(crowded) < self._shares.of_address:
                crowded = list(strangers) if len(strangers) >= self._shares.strangers else []
            for oldest in crowded[:1]:
                del strangers[oldest]
                _end(oldest)
            strangers[connection] = address, time.monotonic() + self._shares.stranger_seconds

    def _known(self, connection: socket.socket) -> None:
        """No stranger any more, or gone."""
        with self._lock:
            self._strangers.pop(connection, None)

    def _reap(self) -> None:
        while not self._over.wait(_REAP_SECONDS):
            now = time.monotonic()
            with self._lock:
                for connection, (_, end) in self._strangers.items():
                    if end < now:
                        _end(connection)


_CONNECTIONS = 16_384
"""More than the shares of a thousand doors and of the strangers come to."""


def _end(connection: socket.socket) -> None:
    """Makes the thread that serves the connection come to its end."""
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


def _linger(connection: socket.socket, seconds: float) -> None:
    """Sends no more, and waits until the peer does not either.

    Whoever closes while something comes in resets the connection, and takes back what is on its
    way out.
    """
    end = time.monotonic() + seconds
    connection.shutdown(socket.SHUT_WR)
    while (left := end - time.monotonic()) > 0:
        connection.settimeout(left)
        if not connection.recv(_DISCARD_BYTES):
            return


def _nobody(count: int) -> None:
    """Nobody is told of the bytes: the door's owner counts them."""
    del count


def take_descriptors() -> None:
    """Lets this process have as many as the system allows it."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):  # the system allows fewer by now
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
