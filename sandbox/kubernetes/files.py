"""Hands a sandbox its files over the door, once it was accepted: nobody listens before.

Of each file there is a line with its path and its size, so many bytes, and a line with their
SHA-256 in hex. At the end comes a line with a dot, and the sandbox answers ``ok``.
"""

import hashlib
import io
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from sandbox import sockets

_PIECE_BYTES = 1 << 20
_STALL_SECONDS = 120.0


class Files:
    """Listens from its making until it is closed; whoever has the door's key may ask again."""

    def __init__(
        self, door: Path, *, peer_uid: int, data: Mapping[str, bytes], paths: Mapping[str, Path]
    ) -> None:
        """Begins to listen in ``door``. Raises OSError.

        Args:
            door: Directory of the socket.
            peer_uid: Host uid of whoever may connect.
            data: Files by where they are to be below RUNNER, in memory.
            paths: Likewise, of this host.
        """
        self._data = data
        self._paths = paths
        self._listener = sockets.listen(door, "files.sock", peer_uid=peer_uid, backlog=4)
        self._peer: socket.socket | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._serve, name="sandbox-files", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends it, whatever is under way. May be called twice."""
        self._closed = True
        for end in (self._listener, self._peer):
            if end is not None:
                with suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()

    def _serve(self) -> None:
        while True:
            try:
                peer, _ = self._listener.accept()
            except OSError:  # closed
                return
            self._peer = peer
            if self._closed:  # it had waited in line; a listener that is shut still hands those out
                peer.close()
                return
            # A sandbox that broke off comes again, or ends by itself and says so.
            with peer, suppress(OSError):
                peer.settimeout(_STALL_SECONDS)
                self._send(peer)

    def _send(self, peer: socket.socket) -> None:
        for name, size, file in self._each():
            with file:
                peer.sendall(f"{name} {size}\n".encode())
                digest = hashlib.sha256()
                for piece in _pieces(file, size):
                    digest.update(piece)
                    peer.sendall(piece)
                peer.sendall(f"{digest.hexdigest()}\n".encode())
        peer.sendall(b".\n")
        peer.recv(16)  # it has everything

    def _each(self) -> Iterator[tuple[str, int, BinaryIO]]:
        for name, data in self._data.items():
            yield name, len(data), io.BytesIO(data)
        for name, path in self._paths.items():
            yield name, path.stat().st_size, path.open("rb")


def _pieces(file: BinaryIO, size: int) -> Iterator[bytes]:
    """Exactly ``size`` bytes. Raises OSError where there are fewer."""
    while size > 0:
        piece = file.read(min(_PIECE_BYTES, size))
        if not piece:
            raise OSError("the file became shorter")
        size -= len(piece)
        yield piece
