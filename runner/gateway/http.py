"""HTTP/1.1 for hostile peers: h11's strict parser over any stream socket, a thread a connection.

The bounds stand in ``Bounds``. A peer that breaks one loses its connection, nothing else.
"""

import contextlib
import re
import socket
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import BinaryIO

import h11

from runner.gateway.accept import Acceptor

READ_BYTES = 256 << 10
"""System calls of a sandbox are dear: few and large. But 1 MiB costs two thirds more processor
time than this, in page faults of ever new buffers (measured), and four times the memory."""
MOST_CRUMBS = 10_000
CRUMB_BYTES = 64
_HEADERS = 100
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
    crumbs: int = MOST_CRUMBS
    """Pieces of a body that may be tiny. Each costs a thousand times what its bytes do."""
    drain_bytes: int = 5 << 20
    """Of a body that the handler left unread, before the connection is closed instead: whoever
    pushes a manifest without a token has to hear why."""
    drain_crumbs: int = 1_000
    """Of those pieces that may be tiny: strangers send them too."""
    close_seconds: float = 10.0
    """What a handler that hangs on something else may delay the end of the server."""


@dataclass(frozen=True, slots=True)
class Request:
    """One request whose head was parsed; the body is read piece by piece."""

    method: str
    target: str
    headers: dict[str, str]
    body: Iterator[bytes]


class Stream(ABC):
    """Content that arrives while it is sent. ``close`` is called once it is over."""

    @abstractmethod
    def __iter__(self) -> Iterator[bytes]:
        """The pieces. Raises OSError where they break off: the connection then ends too."""

    @abstractmethod
    def close(self) -> None: ...


class Tunnel(ABC):
    """What a successful CONNECT gives. ``close`` is called once it is over."""

    @abstractmethod
    def run(self, peer: socket.socket, early: bytes) -> None:
        """Carries bytes from and to ``peer`` until the end; ``early`` came with the head."""

    @abstractmethod
    def close(self) -> None: ...


@dataclass(slots=True)
class Response:
    """An answer. Whatever ``content`` is, it is closed when it was sent.

    Attributes:
        content: Bytes, a file that is sent whole, a stream, or a tunnel.
        length: Of a file, of a stream where it is known, or of what a HEAD would send.
        reason: Words beside the status: some clients of a proxy show nothing else.
        lines: Further headers; names may stand in several.
    """

    status: int
    headers: dict[str, str] = field(default_factory=dict)
    content: bytes | BinaryIO | Stream | Tunnel = b""
    length: int | None = None
    reason: str = ""
    lines: tuple[tuple[bytes, bytes], ...] = ()

    def close(self) -> None:
        """Lets go of ``content``."""
        if not isinstance(self.content, bytes):
            self.content.close()


Handler = Callable[[Request], Response]
Welcome = Callable[[socket.socket], AbstractContextManager[tuple[socket.socket, Handler]]]
"""Around a whole connection: what to speak over, and who answers."""


def login_of(header: str) -> bytes:
    """An ``Authorization`` header as it is compared: its scheme may come in any case."""
    scheme, _, shown = header.encode("latin-1").partition(b" ")
    return scheme.capitalize() + b" " + shown


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
        welcome: Welcome | None = None,
    ) -> None:
        """Starts to listen.

        Args:
            listener: Bound and listening.
            handler: Called from the thread of each connection.
            peer_uid: On a Unix socket, the only uid whose connections are taken.
            failed: Gets what the handler raised and no peer could have caused.
            bounds: On this listener.
            welcome: Entered in the thread of each connection; it may put TLS over it and another
                handler in the place of ``handler``.
        """
        self._failed = failed
        self._bounds = bounds
        self._welcome = welcome or (lambda peer: contextlib.nullcontext((peer, handler)))
        self._acceptor = Acceptor(
            listener, self._serve, peer_uid=peer_uid, connections=bounds.connections
        )

    def close(self) -> None:
        """Ends the listener and every connection, and waits until their threads are done.

        A handler that waits for something besides its peer is left alone after a while: it can
        answer nobody any more.
        """
        self._acceptor.close(self._bounds.close_seconds)

    def _serve(self, connection: socket.socket) -> None:
        try:
            with self._welcome(connection) as (peer, handler):
                _Exchange(peer, self._bounds).run(handler, self._failed)
        except (OSError, h11.RemoteProtocolError):
            pass  # the peer's own loss
        except Exception as error:  # noqa: BLE001 - a thread's last resort; the owner hears of it
            self._failed(error)


_NO_CONTENT = 204
_REDIRECTS = 300


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
            if isinstance(response.content, Tunnel):
                self._switch(response.content)
                return
            if event.method == b"CONNECT" and response.status < _REDIRECTS:
                response.close()  # no tunnel, and after a success the peer would take it for one
                self._refuse(405)
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
        framed = {name for name, _ in event.headers} & {b"transfer-encoding", b"content-length"}
        # Python's http.client asks for tunnels in the older version, up to 3.11.
        connects = event.method == b"CONNECT"
        versions = {b"1.0", b"1.1"} if connects else {b"1.1"}
        if len(head) > self._bounds.header_bytes or len(event.headers) > _HEADERS:
            return 431
        if event.http_version not in versions:
            return 505
        if (
            _LOOSE.search(head)
            or len(framed) > 1
            or (connects and (framed or b"/" in event.target))
        ):
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
            if pieces > self._bounds.crumbs and size < pieces * CRUMB_BYTES:
                raise BodyBroken("a body in crumbs")
            yield event.data

    def _drained(self) -> bool:
        """Reads what little the handler left of the body, so that the next request can come."""
        pieces = size = 0
        while self._http.their_state is h11.SEND_BODY and size <= self._bounds.drain_bytes:
            event = self._next()
            if not isinstance(event, (h11.Data, h11.EndOfMessage)):
                return False
            pieces += 1
            size += len(event.data) if isinstance(event, h11.Data) else 0
            if pieces > self._bounds.drain_crumbs and size < pieces * CRUMB_BYTES:
                return False
        return self._http.our_state is h11.DONE and self._http.their_state is h11.DONE

    def _answer(self, is_head: bool, response: Response) -> None:
        self._socket.settimeout(self._bounds.body_seconds)
        content = response.content
        assert not isinstance(content, Tunnel), "only CONNECT gets one"
        length = len(content) if isinstance(content, bytes) else response.length
        stated = response.length if is_head and response.length is not None else length
        headers = [(n.encode("ascii"), v.encode("latin-1")) for n, v in response.headers.items()]
        headers += response.lines
        if response.status != _NO_CONTENT and stated is not None:
            headers.append((b"Content-Length", b"%d" % stated))
        try:
            self._send(
                h11.Response(
                    status_code=response.status,
                    headers=headers,
                    reason=response.reason.encode("latin-1"),
                )
            )
            if not is_head:
                self._send_content(content, length or 0)
            self._send(h11.EndOfMessage())
        finally:
            response.close()

    def _send_content(self, content: bytes | BinaryIO | Stream, length: int) -> None:
        if isinstance(content, bytes):
            self._send(h11.Data(data=content))
        elif isinstance(content, Stream):
            for piece in content:
                self._send(h11.Data(data=piece))
        elif length:
            self._send_file(content, length)

    def _switch(self, tunnel: Tunnel) -> None:
        """Says that there is a tunnel, and lets it run to its end."""
        try:
            self._next()  # the end of the request: its head allowed no body
            self._send(h11.Response(status_code=200, headers=[]))
            tunnel.run(self._socket, self._http.trailing_data[0])
        finally:
            tunnel.close()

    def _send_file(self, file: BinaryIO, length: int) -> None:
        for piece in self._http.send_with_data_passthrough(h11.Data(data=_Length(length))) or ():  # type: ignore[arg-type] # h11 only takes its length
            if not isinstance(piece, _Length):
                self._socket.sendall(piece)
            elif self._socket.sendfile(file, file.tell(), length) != length:
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
