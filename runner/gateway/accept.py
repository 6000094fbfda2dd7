"""Connections to a listener, a thread each."""

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Callable

_AGAIN_SECONDS = 0.05


class Acceptor:
    """A thread for each connection to a listener, until it is closed."""

    def __init__(
        self,
        listener: socket.socket,
        serve: Callable[[socket.socket], None],
        *,
        peer_uid: int | None,
        connections: int,
    ) -> None:
        """Starts to accept.

        Args:
            listener: Bound and listening.
            serve: Called from the thread of each connection, which is closed afterwards.
            peer_uid: On a Unix socket, the only uid whose connections are taken.
            connections: At a time; one more is closed at once.
        """
        self._listener = listener
        self._serve = serve
        self._peer_uid = peer_uid
        self._most = connections
        self._lock = threading.Lock()
        self._connections: dict[socket.socket, threading.Thread] = {}
        self._closed = False
        self._thread = threading.Thread(target=self._accept, name="gateway", daemon=True)
        self._thread.start()

    def close(self, seconds: float) -> None:
        """Ends the listener and every connection. Waits for their threads, so long at most."""
        with self._lock:
            self._closed = True
            connections = dict(self._connections)
        for peer in (self._listener, *connections):
            with contextlib.suppress(OSError):
                peer.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        end = time.monotonic() + seconds
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
                full = len(self._connections) >= self._most
                if self._closed or full or not self._is_expected(connection):
                    connection.close()
                    continue
                thread = threading.Thread(
                    target=self._run, args=(connection,), name="gateway-connection", daemon=True
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

    def _run(self, connection: socket.socket) -> None:
        try:
            self._serve(connection)
        finally:
            with self._lock:
                self._connections.pop(connection, None)
            connection.close()
