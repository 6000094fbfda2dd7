"""The server's side of a TLS connection whose two directions end each for itself.

Python's SSLSocket can say that it sends no more only by reading on until the peer says so too, and
fails where the peer still sends. So TLS is spoken into memory here, and the bytes are moved by us;
which is also quicker, since a system call then moves more than one record.
"""

import contextlib
import socket
import ssl
from pathlib import Path

PIECE_BYTES = 64 << 10
_RECORD_BYTES = 16 << 10
_ANSWER_BYTES = 16 << 10
"""Of what we owe a peer that has us answer and takes no data: whoever asks for new keys all the
time would fill our memory."""


def context(certificate: Path, key: Path) -> ssl.SSLContext:
    """TLS 1.3: before it, whoever said that it sends no more was sent nothing more either.

    Raises OSError, which covers ssl.SSLError, for files that do not do.
    """
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    made.minimum_version = ssl.TLSVersion.TLSv1_3
    made.num_tickets = 0  # nobody comes back with one
    made.load_cert_chain(certificate, key, password="")  # an error rather than a question
    return made


class TlsPeer:
    """One connection. Whatever breaks it is an OSError, which covers ssl.SSLError."""

    def __init__(self, connection: socket.socket, server: ssl.SSLContext) -> None:
        """Says nothing yet."""
        self._connection = connection
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = server.wrap_bio(self._incoming, self._outgoing, server_side=True)
        self._early = b""
        self.ended = False
        """Whether the peer said that it sends no more."""

    def greet(self) -> None:
        """The handshake, on a connection that blocks. Raises OSError."""
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                pass
            else:
                return
            finally:  # what it says of a failure, too
                self._connection.sendall(self._outgoing.read())
            self._incoming.write(_received(self._connection))

    def line(self, most_bytes: int) -> bytes:
        """The first line, on a connection that blocks; what comes behind it is kept for later.

        Raises OSError, also where no line of ``most_bytes`` comes.
        """
        said = self.open(b"")
        while not (found := said.find(b"\n", 0, most_bytes) + 1):
            if self.ended or len(said) >= most_bytes:
                raise ConnectionAbortedError("the peer said something else")
            said += self.open(_received(self._connection))
        self._early = said[found:]
        return said[:found]

    def open(self, sealed: bytes) -> bytes:
        """What is whole by now, after ``sealed`` came. Raises OSError."""
        self._incoming.write(sealed)
        opened = []
        try:
            while data := self._tls.read(_RECORD_BYTES):
                opened.append(data)
            self.ended = True
        except ssl.SSLZeroReturnError:  # the same, where we said before that we send no more
            self.ended = True
        except ssl.SSLWantReadError:
            pass
        if self._outgoing.pending > _ANSWER_BYTES:
            raise ConnectionAbortedError("the peer wants nothing but answers")
        return b"".join(opened)

    def seal(self, data: bytes) -> bytes:
        """What to send for ``data``; for none, that we send no more. Raises OSError."""
        if data:
            self._tls.write(data)
            return self._outgoing.read()
        # It looks for the peer's word as well. All that came was read, so it finds no data, which
        # it could not take.
        with contextlib.suppress(ssl.SSLWantReadError):
            self._tls.unwrap()
        return self._outgoing.read()

    def between(self) -> tuple["Sealing", "Opening"]:
        """What ``relay`` puts between this connection and another one."""
        return Sealing(self), Opening(self, self._early)


class _Held:
    """Bytes, until they are given. See ``relay.Between``."""

    def __init__(self, data: bytes = b"") -> None:
        self.ended = False
        self.hold(data)

    def hold(self, data: bytes | memoryview) -> None:
        self.size = len(data)
        self._data = memoryview(data) if data else memoryview(b"")  # lets go of those before

    def give(self, sink: socket.socket) -> None:
        self.hold(self._data[sink.send(self._data) :])

    def close(self) -> None:
        """Nothing is held open."""


class Sealing(_Held):
    """On the way to the peer."""

    def __init__(self, peer: TlsPeer) -> None:
        super().__init__()
        self._peer = peer

    def take(self, source: socket.socket) -> None:
        data = source.recv(PIECE_BYTES)
        self.ended = not data
        self.hold(self._peer.seal(data))


class Opening(_Held):
    """On the way from the peer."""

    def __init__(self, peer: TlsPeer, early: bytes) -> None:
        super().__init__(early)
        self._peer = peer
        self.ended = peer.ended

    def take(self, source: socket.socket) -> None:
        """Raises OSError, also where the connection ends and the peer did not say so."""
        data = self._peer.open(_received(source))
        self.ended = self._peer.ended
        self.hold(data)


def _received(connection: socket.socket) -> bytes:
    data = connection.recv(PIECE_BYTES)
    if not data:
        raise ConnectionResetError("the connection ended, and the peer did not say that it would")
    return data
