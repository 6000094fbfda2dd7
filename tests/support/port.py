"""Who comes to the gateway's port: pods by TLS, and what forwards to it for a builder."""

import contextlib
import os
import select
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sandbox import sockets

SECONDS = 10


def trusting(certificate: Path) -> ssl.SSLContext:
    """Takes this certificate, whatever the peer's name, and no other."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.options &= ~ssl.OP_IGNORE_UNEXPECTED_EOF  # which would make a farewell of any end
    context.load_verify_locations(certificate)
    return context


@dataclass(frozen=True)
class Pods:
    """Come to ``address``, and know who that has to be."""

    address: tuple[str, int]
    certificate: Path

    def knock(self) -> socket.socket:
        """Connects, and says nothing."""
        peer = socket.create_connection(self.address, SECONDS)
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # as the first process does
        return peer

    def greet(self) -> ssl.SSLSocket:
        """Says nothing but TLS. What ends without a farewell is an error."""
        trust = trusting(self.certificate)
        return trust.wrap_socket(self.knock(), suppress_ragged_eofs=False)

    def come(self, secret: str, name: str = "gateway", more: bytes = b"") -> ssl.SSLSocket:
        """Says whose door it wants, and ``more`` in the same breath."""
        peer = self.greet()
        peer.sendall(line(secret, name) + more)
        return peer


def line(secret: str, name: str = "gateway") -> bytes:
    return f"runner-door 1 {secret} {name}\n".encode()


def say_no_more(peer: ssl.SSLSocket) -> None:
    """Its farewell. What the other side sends can still be read, unless it came by now."""
    peer.settimeout(0)
    with contextlib.suppress(ssl.SSLWantReadError):
        peer.unwrap()
    peer.settimeout(SECONDS)


def everything(peer: socket.socket) -> bytes:
    """What comes up to the orderly end."""
    received = b""
    with contextlib.suppress(ssl.SSLZeroReturnError):  # orderly, after we said ours
        while piece := peer.recv(65536):
            received += piece
    return received


def exchange(peer: socket.socket, data: bytes) -> bytes:
    """Sends ``data`` and receives at once, up to the end, an orderly one or not."""
    received, left = bytearray(), memoryview(data)
    later = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)
    peer.settimeout(0)
    with contextlib.suppress(ConnectionError, ssl.SSLError):
        while True:
            with contextlib.suppress(*later):
                while piece := peer.recv(65536):
                    received += piece
                break
            with contextlib.suppress(*later):
                while left:
                    left = left[peer.send(left[:65536]) :]
            select.select([peer], [peer] if left else [], [], SECONDS)
    peer.settimeout(SECONDS)
    return bytes(received)


def is_over(peer: socket.socket) -> bool:
    """Whether the other side ends the connection without another byte."""
    try:
        return peer.recv(1) == b""
    except (ConnectionError, ssl.SSLError):
        return True


@contextmanager
def listening(door: Path, name: str = "gateway") -> Iterator[Callable[[], socket.socket]]:
    """A socket of a door, as a runner has it; each call takes one who was led there."""
    with sockets.listen(door, f"{name}.sock", peer_uid=os.geteuid()) as listener:
        listener.settimeout(SECONDS)

        def accept() -> socket.socket:
            peer, _ = listener.accept()
            peer.settimeout(SECONDS)
            return peer

        yield accept


@contextmanager
def forwarding(pods: Pods, secret: str) -> Iterator[tuple[str, int]]:
    """A loopback port as it is inside a pod: builders find the gateway behind it."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    inside, _ = listener.accept()
                    threading.Thread(target=_forward, args=(inside, pods, secret)).start()

        thread = threading.Thread(target=serve)
        thread.start()
        yield listener.getsockname()
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


def _forward(inside: socket.socket, pods: Pods, secret: str) -> None:
    with inside, pods.come(secret) as outside, contextlib.suppress(OSError):
        while True:
            ready = [outside] if outside.pending() else select.select([inside, outside], [], [])[0]
            for source in ready:
                if not (data := source.recv(65536)):
                    return
                (outside if source is inside else inside).sendall(data)
