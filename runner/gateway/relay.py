"""Carries bytes between two connected sockets, both ways, until the end.

One thread for both directions. A side that stops sending is told to the other, which may go on
(half-closed connections); nothing is carried any more to a side that is gone. Between plain sockets
the kernel moves the bytes through a pipe, in a third of the processor time that reading and writing
them takes (measured). What has to look at them brings something else to put between.
"""

import contextlib
import fcntl
import os
import select
import socket
from collections.abc import Callable, Mapping
from typing import Protocol

BUFFER_BYTES = 256 << 10
"""System calls are dear: few and large."""
PIPE_BYTES = 1 << 20
"""Half the processor time of 256 KiB (measured). The kernel rations pipes by user, 64 MiB for all;
who has that much gets small ones."""
_GONE = select.POLLHUP | select.POLLERR | select.POLLNVAL
_SPLICE = os.SPLICE_F_MOVE | os.SPLICE_F_NONBLOCK

Count = Callable[[int], None]


class Between(Protocol):
    """Holds what was taken from the source and not yet given to the sink.

    Attributes:
        size: Of what is held, in bytes.
        ended: Whether the source has ended. What is held then is the last.
    """

    size: int
    ended: bool

    def take(self, source: socket.socket) -> None:
        """What there is, when nothing is held. Raises BlockingIOError where there is nothing."""

    def give(self, sink: socket.socket) -> None:
        """What the sink takes now. Raises BlockingIOError where that is nothing."""

    def close(self) -> None: ...


class Pipe:
    """Between plain sockets: the bytes stay in the kernel."""

    def __init__(self) -> None:
        self.size = 0
        self.ended = False
        self._end, self._begin = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        with contextlib.suppress(OSError):
            fcntl.fcntl(self._begin, fcntl.F_SETPIPE_SZ, PIPE_BYTES)

    def take(self, source: socket.socket) -> None:
        self.size = os.splice(source.fileno(), self._begin, PIPE_BYTES, flags=_SPLICE)
        self.ended = not self.size

    def give(self, sink: socket.socket) -> None:
        self.size -= os.splice(self._end, sink.fileno(), self.size, flags=_SPLICE)

    def close(self) -> None:
        os.close(self._end)
        os.close(self._begin)


def pipes() -> tuple[Between, Between]:
    """There and back. Raises OSError."""
    there = Pipe()
    try:
        return there, Pipe()
    except OSError:
        there.close()
        raise


def relay(
    inside: socket.socket,
    outside: socket.socket,
    *,
    sent: Count,
    received: Count,
    idle_seconds: float,
    between: Callable[[], tuple[Between, Between]] = pipes,
) -> None:
    """Returns when both directions have ended; the sockets stay open, and do not block.

    Args:
        inside: One of them.
        outside: The other.
        sent: Told of every piece from inside to outside, in bytes as outside gets them, before it
            is handed on. What it raises ends the relay.
        received: The same for the other way.
        idle_seconds: Without a byte in any direction.
        between: What carries the bytes out and in.

    Raises:
        OSError: A connection broke, or was idle for too long.
    """
    for one in (inside, outside):
        one.setblocking(False)
    outward, inward = between()
    ways = [_Way(inside, outside, outward, sent), _Way(outside, inside, inward, received)]
    with contextlib.closing(outward), contextlib.closing(inward):
        while ways:
            events = _ready(ways, idle_seconds)
            ways = [way for way in ways if not events[way.sink] & _GONE]
            for way in [way for way in ways if way.is_ready(events) and not way.step()]:
                ways.remove(way)


class _Way:
    """One direction. Nothing is read while the sink has not taken what was read before."""

    def __init__(
        self, source: socket.socket, sink: socket.socket, between: Between, count: Count
    ) -> None:
        self.source = source
        self.sink = sink
        self._between = between
        self._count = count

    @property
    def waits_for(self) -> tuple[socket.socket, int]:
        """The socket that has to be ready for the next step, and for what."""
        if self._between.size or self._between.ended:
            return self.sink, select.POLLOUT
        return self.source, select.POLLIN

    def is_ready(self, events: Mapping[socket.socket, int]) -> bool:
        one, mask = self.waits_for
        return bool(events[one] & (mask | _GONE))

    def step(self) -> bool:
        """Moves what can be moved without waiting; False when nothing more will come."""
        between = self._between
        with contextlib.suppress(BlockingIOError):
            if not between.size and not between.ended:
                between.take(self.source)
                self._count(between.size)
            if between.size and not self._give():
                return False
        if is_over := between.ended and not between.size:
            self.sink.shutdown(socket.SHUT_WR)
        return not is_over

    def _give(self) -> bool:
        """Whether the sink is still there."""
        try:
            self._between.give(self.sink)
        except (BrokenPipeError, ConnectionResetError):
            # Whoever closes a Unix socket may have said something before: a registry answers, and
            # does not wait for the rest of an upload. TCP would have lost that.
            if self.sink.family != socket.AF_UNIX:
                raise
            return False
        return True


def _ready(ways: list[_Way], idle_seconds: float) -> dict[socket.socket, int]:
    """What each socket is ready for, a sink for being gone at least. Raises TimeoutError."""
    wanted: dict[socket.socket, int] = {}
    for way in ways:
        for one, mask in (way.waits_for, (way.sink, 0)):
            wanted[one] = wanted.get(one, 0) | mask
    poll = select.poll()
    for one, mask in wanted.items():
        poll.register(one, mask)
    found = dict(poll.poll(idle_seconds * 1000))
    if not found:
        raise TimeoutError("idle for too long")
    return {one: found.get(one.fileno(), 0) for way in ways for one in (way.source, way.sink)}
