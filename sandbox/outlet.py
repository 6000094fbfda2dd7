"""The way out for one file: a socket in the door's directory that takes bytes and gives none.

What comes is hostile, as all that comes from a sandbox: counted against a bound while it arrives,
handed on in pieces, and never looked at here.
"""

import socket
import struct
import threading
from collections.abc import Callable
from pathlib import Path

from sandbox.errors import SandboxFailed
from sandbox.sockets import listen

_PIECE_BYTES = 1 << 20
_BUFFER_BYTES = 4 << 20


class Outlet:
    """Takes one file from whoever connects first; whoever comes later is refused."""

    def __init__(
        self,
        directory: Path,
        name: str,
        take: Callable[[memoryview], None],
        *,
        peer_uid: int,
        most_bytes: int,
    ) -> None:
        """Begins to listen.

        Args:
            directory: Where the socket is made.
            name: Of the socket.
            take: Gets the file in pieces, from another thread; what it raises ends the sending.
            peer_uid: Host uid of whoever may send.
            most_bytes: More are refused.
        """
        self._take = take
        self._peer_uid = peer_uid
        self._most_bytes = most_bytes
        self._closed = False
        self._whole = False
        self._error: Exception | None = None
        self._listener = listen(directory, name, peer_uid=peer_uid, backlog=1)
        self._connection: socket.socket | None = None
        self._thread = threading.Thread(target=self._serve, name="sandbox-outlet", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends it, whatever is under way. May be called twice."""
        self._closed = True
        for end in (self._listener, self._connection):
            if end is not None:
                _shut(end)
        self._thread.join()
        self._listener.close()

    def require_untroubled(self) -> None:
        """Returns where nothing on this side ended the sending.

        Raises:
            SandboxFailed: More came than was allowed.
            RunnerError: What the taker raised.
        """
        if self._error is not None:
            raise self._error

    def require_whole(self) -> None:
        """Returns where a file came, from its first byte to its last.

        Raises:
            SandboxFailed: None did.
            RunnerError: As ``require_untroubled``.
        """
        self.require_untroubled()
        if not self._whole:
            raise SandboxFailed("the sandbox did not hand out what it was started for")

    def _serve(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:  # closed
            return
        # Whoever connects later hears at once that nobody listens, instead of waiting for ever.
        self._listener.close()
        with connection:
            self._connection = connection
            if self._closed:  # before it could be told of this connection
                return
            credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
            if struct.unpack("3i", credentials)[1] == self._peer_uid:
                self._whole = self._receive(connection)

    def _receive(self, connection: socket.socket) -> bool:
        buffer = memoryview(bytearray(_PIECE_BYTES))
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER_BYTES)
        received = 0
        try:
            while count := connection.recv_into(buffer):
                received += count
                if received > self._most_bytes:
                    raise SandboxFailed(  # noqa: TRY301 - told like what the taker raises
                        f"the sandbox handed out more than {self._most_bytes} bytes"
                    )
                self._take(buffer[:count])
        except Exception as error:  # noqa: BLE001 - a thread's last resort; require_whole raises it
            self._error = error
            return False
        return received > 0


def _shut(end: socket.socket) -> None:
    try:
        end.shutdown(socket.SHUT_RDWR)
    except OSError:
        end.close()
