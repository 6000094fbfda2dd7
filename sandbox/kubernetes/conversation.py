"""What is said with a first process that has no standard input: over the door, and over again.

The sandbox connects to ``host.sock``. Until it is released the stream is as that of every sandbox:
a canary's line, and ours that releases it. From then on its output comes in frames, four bytes of
length and so many bytes, up to one of length 0, which we answer with ``done``. A connection that
breaks ends nothing: the sandbox comes again, and hears from which byte on we lack its output. So
the gateway's port may be started anew in the middle of a build.
"""

import re
import select
import socket
import struct
import time
from contextlib import suppress
from pathlib import Path

from sandbox import sockets
from sandbox.errors import SandboxFailed
from sandbox.plan import PATIENCE_SECONDS

FRAME_BYTES = 256 << 10
_AGAIN = re.compile(rb"runner-again 1 nonce=([0-9a-f]{1,64})\n")
_LINE_BYTES = 256
_READ_BYTES = 64 << 10
_LOOK_SECONDS = 0.2
_LATE_SECONDS = 2.0
_SPEAK_SECONDS = 10.0


class Conversation:
    """One sandbox's. ``read`` is for one thread, the rest may be called from any."""

    def __init__(self, door: Path, *, peer_uid: int, nonce: str) -> None:
        """Begins to listen in ``door``. Raises OSError."""
        self._listener = sockets.listen(door, "host.sock", peer_uid=peer_uid, backlog=4)
        self._nonce = nonce.encode()
        self._peer: socket.socket | None = None
        self._closed = False
        self._released = False
        self._received = 0
        self._held = b""
        self._end = float("inf")

    def no_more(self) -> None:
        """The sandbox is gone: what it said may still arrive, for a moment."""
        self._end = min(self._end, time.monotonic() + _LATE_SECONDS)

    def close(self) -> None:
        """Ends it. May be called twice."""
        self._closed = True
        for end in (self._listener, self._peer):
            if end is not None:
                with suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)

    def dispose(self) -> None:
        """Closes what ``close`` left to whoever reads, who must not read any more."""
        self.close()
        for end in (self._listener, self._peer):
            if end is not None:
                end.close()

    def begin(self, seconds: float) -> bool:
        """Whether the sandbox has come within so many seconds."""
        self._peer = self._peer or self._accepted(seconds)
        return self._peer is not None

    def write(self, data: bytes) -> None:
        """Releases the sandbox. Raises BrokenPipeError where it is gone."""
        try:
            self._speak(data)
        except OSError as error:
            raise BrokenPipeError(str(error)) from None
        self._released = True

    def read(self) -> bytes:
        """Of its output; empty at the end, or where the sandbox does not come again."""
        while not self._closed:
            try:
                data = self._frame() if self._released else self._raw()
            except OSError:
                data = None
            if data is not None:
                return data
            if not self._come_again():
                return b""
            if not self._released:
                return b"\n"  # what came before was half a line
        return b""

    def _raw(self) -> bytes | None:
        return self._some() or None

    def _some(self) -> bytes:
        """What has come; empty where the connection has ended. Raises OSError where it broke."""
        assert self._peer is not None, "begun"
        while not self._closed and time.monotonic() < self._end:
            if _is_ready(self._peer, _LOOK_SECONDS):
                return self._peer.recv(_READ_BYTES)
        return b""

    def _frame(self) -> bytes | None:
        head = self._exactly(4)
        if head is None:
            return None
        (length,) = struct.unpack(">I", head)
        if length > FRAME_BYTES:
            raise SandboxFailed("the sandbox's first process does not keep to its protocol")
        if length == 0:
            self._speak(b"done\n")
            return b""
        data = self._exactly(length)
        if data is not None:
            self._received += length
        return data

    def _exactly(self, length: int) -> bytes | None:
        """So many bytes; None where the stream ends before."""
        while len(self._held) < length:
            data = self._some()
            if not data:
                return None
            self._held += data
        data, self._held = self._held[:length], self._held[length:]
        return data

    def _come_again(self) -> bool:
        """Whether the same first process came back, and knows where to go on."""
        if self._peer is not None:
            self._peer.close()
        self._held = b""
        end = time.monotonic() + PATIENCE_SECONDS
        while not self._closed and (left := min(end, self._end) - time.monotonic()) > 0:
            self._peer = self._accepted(left)
            if self._peer is None:
                return False
            if not self._released:
                return True
            with suppress(OSError):
                if self._is_known():
                    self._speak(b"from %d\n" % self._received)
                    return True
            self._peer.close()
        return False

    def _is_known(self) -> bool:
        assert self._peer is not None, "accepted"
        self._peer.settimeout(_SPEAK_SECONDS)
        said = b""
        while not said.endswith(b"\n") and len(said) < _LINE_BYTES:
            data = self._peer.recv(1)  # nothing of what comes behind the line
            if not data:
                return False
            said += data
        self._peer.settimeout(None)
        found = _AGAIN.fullmatch(said)
        return found is not None and found[1] == self._nonce

    def _accepted(self, seconds: float) -> socket.socket | None:
        """A connection of our own user, which the gateway's port is; None where none comes."""
        end = time.monotonic() + seconds
        while not self._closed and (left := min(end, self._end) - time.monotonic()) > 0:
            if _is_ready(self._listener, min(_LOOK_SECONDS, left)):
                with suppress(OSError):
                    return self._listener.accept()[0]
        return None

    def _speak(self, data: bytes) -> None:
        assert self._peer is not None, "begun"
        self._peer.sendall(data)


def _is_ready(end: socket.socket, seconds: float) -> bool:
    """Whether something comes in time. By poll(2): select(2) takes no descriptor above 1023."""
    poller = select.poll()
    poller.register(end, select.POLLIN)
    return bool(poller.poll(seconds * 1000))
