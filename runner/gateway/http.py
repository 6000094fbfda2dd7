"""HTTP/1.1 for hostile peers: h11's strict parser over any stream socket, a thread a connection.

The bounds stand in ``Bounds``. A peer that breaks one loses its connection, nothing else.
"""

import contextlib
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

import h11

READ_BYTES = 1 << 20
"""System calls of a sandbox are dear: few and large."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """On one listener."""

    connections: int = 128
    header_bytes: int = 32 << 10
    idle_seconds: float = 900.0
    """A builder keeps its connections while RUN steps go on."""
    body_seconds: float = 60.0
    """Between two pieces of a body."""
    drain_bytes: int = 1 << 20
    """Of a body that the handler left unread, before the connection is closed instead."""


@dataclass(frozen=True, slots=True)
class Request:
    """One request whose head was parsed; the body is read piece by piece."""

    method: str
    target: str
    headers: dict[str, str]
    body: Iterator[bytes]


@dataclass(slots=True)
class Response:
    """An answer. ``content`` is bytes, or a file that is sent whole and closed."""

    status: int
    headers: dict[str, str] = field(default_factory=dict)
    content: bytes | BinaryIO = b""
    length: int | None = None
    """Of ``content`` where it is a file, or of what a HEAD would send."""


Handler = Callable[[Request], Response]


class BodyBroken(Exception):
    """The peer stopped in the middle of a body, or it is no sound body."""


class Server:
    """Accepts connections until it is closed; then every connection ends."""

    def __init__(
        self,
        listener: socket.socket,
        handler: Handler,
        *,
        peer_uid: int | None,
        failed: Callable[[Exception], None],
        bounds: Bounds = Bounds(),
    ) -> None:
        """Starts to listen.

        Args:
            listener: Bound and listening.
            handler: Called from the thread of each connection.
            peer_uid: On a Unix socket, the only uid whose connections are taken.
            failed: Gets what the handler raised and no peer could have caused.
            bounds: On this listener.
        """
        self._failed = failed
        self._listener = listener
        self._handler = handler
        self._peer_uid = peer_uid
        self._bounds = bounds
        self._lock = threading.Lock()
        self._connections: dict[socket.socket, threading.Thread] = {}
        self._closed = False
        self._thread = threading.Thread(target=self._accept, name="gateway", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends the listener and every connection, and waits until their threads are done."""
        with self._lock:
            self._closed = True
            connections = dict(self._connections)
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        for connection in connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        for thread in connections.values():
            thread.join()
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with self._lock:
                full = len(self._connections) >= self._bounds.connections
                if self._closed or full or not self._is_expected(connection):
                    connection.close()
                    continue
                thread = threading.Thread(
                    target=self._serve, args=(connection,), name="gateway-connection", daemon=True
                )
                self._connections[connection] = thread
            thread.start()

    def _is_expected(self, connection: socket.socket) -> bool:
        if self._peer_uid is None:
            return True
        size = struct.calcsize("3i")
        peer = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
        _, uid, _ = struct.unpack("3i", peer)
        return bool(uid == self._peer_uid)

    def _serve(self, connection: socket.socket) -> None:
        try:
            _Exchange(connection, self._bounds).run(self._handler)
        except (OSError, h11.ProtocolError, BodyBroken):
            pass  # the peer's own loss
        except Exception as error:  # noqa: BLE001 - a thread's last resort; the owner hears of it
            self._failed(error)
        finally:
            with self._lock:
                self._connections.pop(connection, None)
            connection.close()


class _Exchange:
    """Requests and answers on one connection, one after the other."""

    def __init__(self, connection: socket.socket, bounds: Bounds) -> None:
        self._socket = connection
        self._bounds = bounds
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=bounds.header_bytes)

    def run(self, handler: Handler) -> None:
        while True:
            self._socket.settimeout(self._bounds.idle_seconds)
            try:
                event = self._next()
            except h11.RemoteProtocolError as error:
                self._refuse(error.error_status_hint)
                return
            if not isinstance(event, h11.Request):
                return
            response = handler(self._request(event))
            self._answer(event.method == b"HEAD", response)
            if not self._drained():
                return
            self._http.start_next_cycle()

    def _request(self, event: h11.Request) -> Request:
        headers: dict[str, str] = {}
        for name, value in event.headers:
            text = value.decode("latin-1")
            key = name.decode("ascii")
            headers[key] = f"{headers[key]}, {text}" if key in headers else text
        return Request(
            event.method.decode("ascii"), event.target.decode("latin-1"), headers, self._body()
        )

    def _next(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        while True:
            event = self._http.next_event()
            if event is not h11.NEED_DATA:
                return event
            if self._http.they_are_waiting_for_100_continue:
                self._send(h11.InformationalResponse(status_code=100, headers=[]))
            self._http.receive_data(self._socket.recv(READ_BYTES))

    def _body(self) -> Iterator[bytes]:
        self._socket.settimeout(self._bounds.body_seconds)
        while True:
            try:
                event = self._next()
            except (OSError, h11.RemoteProtocolError) as error:
                raise BodyBroken(str(error)) from None
            if isinstance(event, h11.EndOfMessage):
                return
            if not isinstance(event, h11.Data):
                raise BodyBroken("the connection ended")
            yield bytes(event.data)

    def _drained(self) -> bool:
        """Reads what little the handler left of the body, so that the next request can come."""
        left = 0
        while self._http.their_state is h11.SEND_BODY and left <= self._bounds.drain_bytes:
            event = self._next()
            left += len(event.data) if isinstance(event, h11.Data) else 0
            if not isinstance(event, (h11.Data, h11.EndOfMessage)):
                return False
        return self._http.our_state is h11.DONE and self._http.their_state is h11.DONE

    def _answer(self, is_head: bool, response: Response) -> None:
        self._socket.settimeout(self._bounds.body_seconds)
        content = response.content
        length = len(content) if isinstance(content, bytes) else response.length
        if is_head and response.length is not None:
            length = response.length
        headers = [*response.headers.items(), ("Content-Length", str(length))]
        try:
            self._send(h11.Response(status_code=response.status, headers=headers))
            if is_head:
                pass
            elif isinstance(content, bytes):
                self._send(h11.Data(data=content))
            else:
                self._send_file(content, length or 0)
            self._send(h11.EndOfMessage())
        finally:
            if not isinstance(content, bytes):
                content.close()

    def _send_file(self, file: BinaryIO, length: int) -> None:
        for piece in self._http.send_with_data_passthrough(h11.Data(data=_Length(length))) or ():  # type: ignore[arg-type] # h11 only takes its length
            if isinstance(piece, _Length):
                self._socket.sendfile(file, count=length)
            else:
                self._socket.sendall(piece)

    def _send(self, event: h11.Event) -> None:
        data = self._http.send(event)
        if data:
            self._socket.sendall(data)

    def _refuse(self, status: int) -> None:
        if self._http.our_state in {h11.IDLE, h11.SEND_RESPONSE}:
            headers = [("Content-Length", "0"), ("Connection", "close")]
            self._send(h11.Response(status_code=status, headers=headers))
            self._send(h11.EndOfMessage())


class _Length:
    """Stands for a file of this many bytes, which h11 counts and does not touch."""

    def __init__(self, length: int) -> None:
        self._length = length

    def __len__(self) -> int:
        return self._length
