"""HTTP/1.1 for hostile peers: h11's strict parser over any stream socket, a thread a connection.

The bounds stand in ``Bounds``. A peer that breaks one loses its connection, nothing else.
"""

import contextlib
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

import h11

READ_BYTES = 1 << 20
"""System calls of a sandbox are dear: few and large."""
_LOOSE = re.compile(rb"(?<!\r)\n|\r(?!\n)|\n[ \t]")
"""Line ends and folded lines that h11 takes and another reader may take otherwise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """On one listener."""

    connections: int = 64
    """The forwarder inside opens no more."""
    header_bytes: int = 32 << 10
    idle_seconds: float = 900.0
    """A builder keeps its connections while RUN steps go on."""
    head_seconds: float = 30.0
    """From the first byte of a head to its last."""
    body_seconds: float = 60.0
    """Between two pieces of a body, or until the peer takes more of an answer."""
    crumbs: int = 10_000
    """Pieces of a body that may be tiny. Each costs a thousand times what its bytes do."""
    drain_bytes: int = 1 << 20
    """Of a body that the handler left unread, before the connection is closed instead."""
    close_seconds: float = 10.0
    """What a handler that hangs on something else may delay the end of the server."""


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

    def close(self) -> None:
        """Lets go of ``content``."""
        if not isinstance(self.content, bytes):
            self.content.close()


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
        """Ends the listener and every connection, and waits until their threads are done.

        A handler that waits for something besides its peer is left alone after a while: it can
        answer nobody any more.
        """
        with self._lock:
            self._closed = True
            connections = dict(self._connections)
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        for connection in connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        end = time.monotonic() + self._bounds.close_seconds
        for thread in connections.values():
            thread.join(max(0.0, end - time.monotonic()))
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                if self._closed:
                    return
                time.sleep(_AGAIN_SECONDS)  # no descriptors, for now
                continue
            with self._lock:
                full = len(self._connections) >= self._bounds.connections
                if self._closed or full or not self._is_expected(connection):
                    connection.close()
                    continue
                thread = threading.Thread(
                    target=self._serve, args=(connection,), name="gateway-connection", daemon=True
                )
                self._connections[connection] = thread
                try:
                    thread.start()
                except RuntimeError:  # no threads, for now
                    del self._connections[connection]
                    connection.close()

    def _is_expected(self, connection: socket.socket) -> bool:
        if self._peer_uid is None:
            return True
        size = struct.calcsize("3i")
        peer = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
        _, uid, _ = struct.unpack("3i", peer)
        return bool(uid == self._peer_uid)

    def _serve(self, connection: socket.socket) -> None:
        try:
            _Exchange(connection, self._bounds).run(self._handler, self._failed)
        except (OSError, h11.RemoteProtocolError):
            pass  # the peer's own loss
        except Exception as error:  # noqa: BLE001 - a thread's last resort; the owner hears of it
            self._failed(error)
        finally:
            with self._lock:
                self._connections.pop(connection, None)
            connection.close()


_AGAIN_SECONDS = 0.05
_CRUMB_BYTES = 64
_NO_CONTENT = 204


class _Exchange:
    """Requests and answers on one connection, one after the other."""

    def __init__(self, connection: socket.socket, bounds: Bounds) -> None:
        self._socket = connection
        self._bounds = bounds
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=bounds.header_bytes)

    def run(self, handler: Handler, failed: Callable[[Exception], None]) -> None:
        while (event := self._head()) is not None:
            try:
                response = handler(self._request(event))
            except BodyBroken:
                self._refuse(400)
                return
            except Exception as error:  # noqa: BLE001 - whatever it is, no peer may cause it
                failed(error)
                self._refuse(500)
                return
            # A peer that waits for a 100 that never came is not going to send the body.
            waits = self._http.they_are_waiting_for_100_continue
            self._answer(event.method == b"HEAD", response)
            if waits or not self._drained():
                return
            self._http.start_next_cycle()

    def _head(self) -> h11.Request | None:
        """The next request without its body; None where none comes, or no sound one."""
        self._socket.settimeout(self._bounds.idle_seconds)
        end = 0.0
        while True:
            unread = self._http.trailing_data[0]
            try:
                event = self._http.next_event()
            except h11.RemoteProtocolError as error:
                self._refuse(error.error_status_hint)
                return None
            if event is not h11.NEED_DATA:
                break
            if unread:
                end = end or time.monotonic() + self._bounds.head_seconds
                self._until(end)
            self._http.receive_data(self._socket.recv(READ_BYTES))
        if not isinstance(event, h11.Request):
            return None
        head = unread[: len(unread) - len(self._http.trailing_data[0])]
        if (status := self._fault(event, head)) is not None:
            self._refuse(status)
            return None
        return event

    def _until(self, end: float) -> None:
        left = end - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._socket.settimeout(left)

    def _fault(self, event: h11.Request, head: bytes) -> int | None:
        """The status for what h11 lets pass. It bounds only heads that come in pieces."""
        names = {name for name, _ in event.headers}
        if len(head) > self._bounds.header_bytes:
            return 431
        if event.http_version != b"1.1":
            return 505
        if event.method == b"CONNECT":
            return 405
        if _LOOSE.search(head) or {b"transfer-encoding", b"content-length"} <= names:
            return 400
        return None

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
        pieces = size = 0
        while True:
            try:
                event = self._next()
            except (OSError, h11.RemoteProtocolError) as error:
                raise BodyBroken(str(error)) from None
            if isinstance(event, h11.EndOfMessage):
                return
            if not isinstance(event, h11.Data):
                raise BodyBroken("the connection ended")
            pieces += 1
            size += len(event.data)
            if pieces > self._bounds.crumbs and size < pieces * _CRUMB_BYTES:
                raise BodyBroken("a body in crumbs")
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
        length = len(content) if isinstance(content, bytes) else response.length or 0
        stated = response.length if is_head and response.length is not None else length
        headers = [*response.headers.items()]
        if response.status != _NO_CONTENT:
            headers.append(("Content-Length", str(stated)))
        try:
            self._send(h11.Response(status_code=response.status, headers=headers))
            if not is_head and length:
                if isinstance(content, bytes):
                    self._send(h11.Data(data=content))
                else:
                    self._send_file(content, length)
            self._send(h11.EndOfMessage())
        finally:
            response.close()

    def _send_file(self, file: BinaryIO, length: int) -> None:
        for piece in self._http.send_with_data_passthrough(h11.Data(data=_Length(length))) or ():  # type: ignore[arg-type] # h11 only takes its length
            if not isinstance(piece, _Length):
                self._socket.sendall(piece)
            elif self._socket.sendfile(file, count=length) != length:
                raise OSError("a file shorter than announced; the next answer would seem its rest")

    def _send(self, event: h11.Event) -> None:
        data = self._http.send(event)
        if data:
            self._socket.sendall(data)

    def _refuse(self, status: int) -> None:
        self._socket.settimeout(self._bounds.body_seconds)
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
