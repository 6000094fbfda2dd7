"""What an allowed request of the egress proxy becomes: a tunnel, or an exchange with the host.

Both end with ``close``, which lets go of the connection and says what came of it.
"""

import contextlib
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import h11

from runner.errors import PolicyDenied, QuotaExceeded, RunnerError
from runner.gateway import clienthello
from runner.gateway.authority import Authority
from runner.gateway.clienthello import NotAHello
from runner.gateway.http import (
    CRUMB_BYTES,
    MOST_CRUMBS,
    BodyBroken,
    Request,
    Response,
    Stream,
    Tunnel,
)
from runner.gateway.ledger import Entry
from runner.gateway.relay import BUFFER_BYTES, relay
from runner.registry.dial import shown

_HOP_BY_HOP = frozenset(
    b"connection keep-alive te trailer transfer-encoding upgrade host content-length expect".split()
)
"""What is said between two neighbours only, or by us anew; all of ``proxy-*`` besides."""
_MOST_INTERIM = 10

Headers = list[tuple[bytes, bytes]]


class Refused(Exception):
    """The answer is ours: its status, why in one line, and what a failed build may be due to."""

    def __init__(self, status: int, why: str, error: RunnerError | None = None) -> None:
        super().__init__(why)
        self.status = status
        self.error = error


@dataclass(frozen=True, slots=True, kw_only=True)
class EgressBounds:
    """On every connection that leaves."""

    connect_seconds: float = 10.0
    """For each address that is tried."""
    hello_seconds: float = 10.0
    """From the start of a tunnel until its ClientHello is there."""
    idle_seconds: float = 300.0
    """Without a byte in any direction."""
    header_bytes: int = 64 << 10
    """Of an answer's head."""


@dataclass(slots=True, kw_only=True)
class Visit:
    """One request and what came of it so far; the fields are those of the ledger's entry."""

    kind: Literal["http", "connect"]
    method: str
    host: str
    port: int = 0
    path: str = ""
    rule: str = ""
    is_allowed: bool = False
    status: int = 0
    sent_bytes: int = 0
    received_bytes: int = 0

    @property
    def entry(self) -> Entry:
        return Entry(
            kind=self.kind,
            host=self.host,
            port=self.port,
            method=self.method,
            path=self.path,
            decision="allowed" if self.is_allowed else "denied",
            rule=self.rule,
            status=self.status,
            sent_bytes=self.sent_bytes,
            received_bytes=self.received_bytes,
        )

    def sent(self, size: int) -> None:
        self.sent_bytes += size

    def received(self, size: int) -> None:
        self.received_bytes += size


Over = Callable[[Visit, RunnerError | None], None]
"""Told once how a visit ended, and what the build was refused in it."""


class Wire:
    """One connection to the outside, whose bytes are counted before they go on."""

    def __init__(
        self,
        connected: socket.socket,
        spend: Callable[[int], None],
        forget: Callable[["Wire"], None],
    ) -> None:
        """Takes ``connected`` over.

        Args:
            connected: To an address that was checked.
            spend: Raises QuotaExceeded where the session may not move so many bytes more.
            forget: Told once that the wire is closed.
        """
        self.socket = connected
        self.spend = spend
        self._forget = forget

    def send(self, data: bytes) -> None:
        self.spend(len(data))
        self.socket.sendall(data)

    def receive(self) -> bytes:
        data = self.socket.recv(BUFFER_BYTES)
        self.spend(len(data))
        return data

    def abort(self) -> None:
        """Wakes whoever waits for it, who closes it then."""
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.socket.close()
        self._forget(self)


class TlsTunnel(Tunnel):
    """Carries TLS for one server name, and nothing else."""

    def __init__(self, wire: Wire, visit: Visit, over: Over, bounds: EgressBounds) -> None:
        self._wire = wire
        self._visit = visit
        self._over = over
        self._bounds = bounds
        self._error: RunnerError | None = None

    def run(self, peer: socket.socket, early: bytes) -> None:
        visit, wire = self._visit, self._wire
        try:
            first = self._first(peer, early)
            visit.sent(len(first))
            wire.send(first)
            relay(
                peer,
                wire.socket,
                sent=self._counting(visit.sent),
                received=self._counting(visit.received),
                idle_seconds=self._bounds.idle_seconds,
            )
        except NotAHello as error:
            visit.is_allowed, visit.rule = False, "server name"
            self._error = PolicyDenied(
                f"a tunnel to {visit.host}:{visit.port} was ended: {error}",
                advice="Tunnels carry TLS whose server name is the host that was asked for.",
            )
        except QuotaExceeded as error:
            self._error = error

    def close(self) -> None:
        self._wire.close()
        self._over(self._visit, self._error)

    def _counting(self, count: Callable[[int], None]) -> Callable[[int], None]:
        def both(size: int) -> None:
            self._wire.spend(size)
            count(size)

        return both

    def _first(self, peer: socket.socket, received: bytes) -> bytes:
        """What came up to the end of the ClientHello, at least, which was found to be right.

        Raises:
            NotAHello: It is none, is not in time, or is for another server.
            OSError: The peer has gone.
        """
        end = time.monotonic() + self._bounds.hello_seconds
        while (hello := clienthello.read(received)) is None:
            peer.settimeout(max(end - time.monotonic(), 0.001))
            try:
                piece = peer.recv(BUFFER_BYTES)
            except TimeoutError:
                raise NotAHello("no ClientHello came in time") from None
            if not piece:
                raise ConnectionResetError("nothing was asked")
            received += piece
        if hello.server_name is None:
            raise NotAHello("its ClientHello has no server name")
        if hello.server_name != self._visit.host:
            raise NotAHello(f"its ClientHello is for {shown(hello.server_name, 100)}")
        return received


class HttpExchange(Stream):
    """One request on a connection of its own, and the body of the answer as it comes."""

    def __init__(self, wire: Wire, visit: Visit, over: Over, bounds: EgressBounds) -> None:
        self._wire = wire
        self._visit = visit
        self._over = over
        self._http = h11.Connection(h11.CLIENT, max_incomplete_event_size=bounds.header_bytes)
        self._error: RunnerError | None = None

    def begin(self, request: Request, target: Authority, path: str) -> Response:
        """Sends the request and takes in the head of the answer.

        Raises:
            Refused: No sound answer came; the wire is closed.
            BodyBroken: The client stopped in its body; this is over.
        """
        try:
            with _refusing(target):
                self._ask(request, target, path)
                return self._answer()
        except BodyBroken:
            self._visit.status = 400
            self.close()
            raise
        except BaseException:
            self._wire.close()
            raise

    def _ask(self, request: Request, target: Authority, path: str) -> None:
        given = [(n.encode("ascii"), v.encode("latin-1")) for n, v in request.headers.items()]
        headers = [(b"Host", target.header.encode("ascii")), *_forwarded(given)]
        headers.append((b"Connection", b"close"))
        if "transfer-encoding" in request.headers:
            headers.append((b"Transfer-Encoding", b"chunked"))
        elif (length := request.headers.get("content-length")) is not None:
            headers.append((b"Content-Length", length.encode("ascii")))
        self._send(h11.Request(method=request.method, target=path, headers=headers))
        for piece in request.body:
            self._visit.sent(len(piece))
            self._send(h11.Data(data=piece))
        self._send(h11.EndOfMessage())

    def _send(self, event: h11.Event) -> None:
        data = self._http.send(event)
        # A server may answer, and close, before it has read the body.
        with contextlib.suppress(ConnectionError):
            self._wire.send(data or b"")

    def _answer(self) -> Response:
        for _ in range(_MOST_INTERIM):
            head = self._next()
            if not isinstance(head, h11.InformationalResponse):
                break
        if not isinstance(head, h11.Response):
            raise h11.RemoteProtocolError("no answer")
        named = dict(head.headers)
        length = named.get(b"content-length")
        if length is not None and b"transfer-encoding" in named:
            raise h11.RemoteProtocolError("a body with two lengths")
        self._visit.status = head.status_code
        return Response(
            head.status_code,
            content=self,
            length=int(length) if length is not None else None,
            reason=head.reason.decode("latin-1"),
            lines=tuple(_forwarded(head.headers)),
        )

    def _next(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        while (event := self._http.next_event()) is h11.NEED_DATA:
            self._http.receive_data(self._wire.receive())
        return event

    def __iter__(self) -> Iterator[bytes]:
        pieces = size = 0
        while isinstance(event := self._next_of_body(), h11.Data):
            pieces += 1
            size += len(event.data)
            if pieces > MOST_CRUMBS and size < pieces * CRUMB_BYTES:
                raise OSError("an answer in crumbs")
            self._visit.received(len(event.data))
            yield bytes(event.data)
        if not isinstance(event, h11.EndOfMessage):
            raise OSError("an answer without its end")

    def _next_of_body(self) -> object:
        try:
            return self._next()
        except h11.RemoteProtocolError as error:
            raise OSError(str(error)) from None
        except QuotaExceeded as error:
            self._error = error
            raise OSError(error.message) from None

    def close(self) -> None:
        self._wire.close()
        self._over(self._visit, self._error)


@contextlib.contextmanager
def _refusing(target: Authority) -> Iterator[None]:
    """Says what goes wrong outside as a Refused."""
    try:
        yield
    except QuotaExceeded as error:
        raise Refused(403, error.message, error) from None
    except TimeoutError:
        raise Refused(504, f"{target} does not answer in time") from None
    except (OSError, h11.RemoteProtocolError) as error:
        why = f"{target} gives no sound answer: {shown(str(error), 100)}"
        raise Refused(502, why) from None


def _forwarded(headers: Iterable[tuple[bytes, bytes]]) -> Headers:
    """Those of a message that are for its other end; names are in lower case."""
    headers = list(headers)
    named = b",".join(value for name, value in headers if name == b"connection")
    neighbours = {name.strip().lower() for name in named.split(b",")} | _HOP_BY_HOP
    return [
        (name, value)
        for name, value in headers
        if name not in neighbours and not name.startswith(b"proxy-")
    ]
