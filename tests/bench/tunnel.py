"""A download through a CONNECT tunnel and without it, with TLS and without its arithmetic."""

import multiprocessing
import socket
import ssl
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.bench.blobs import Registry
from tests.support import egress

HOST = "localhost"
"""A real name: the gateway resolves it, and the client names it in its TLS."""
MIB = 1 << 20
WAYS = ("TLS", "no TLS after the ClientHello")

_FORK = multiprocessing.get_context("fork")


@dataclass(frozen=True, slots=True)
class Carried:
    """One download both ways."""

    bytes: int
    direct_seconds: float
    tunnel_seconds: float
    cpu_seconds: float
    """Of the gateway, for the one through the tunnel."""

    @property
    def ratio(self) -> float:
        return self.direct_seconds / self.tunnel_seconds


def _listener() -> socket.socket:
    """On the address that HOST leads to first, as a client would take it."""
    family, _, _, _, address = socket.getaddrinfo(HOST, 0, type=socket.SOCK_STREAM)[0]
    return socket.create_server((str(address[0]), 0), family=family)


@contextmanager
def origin(directory: Path, size: int) -> Iterator[tuple[int, Path]]:
    """A server in a process of its own; its port, and the certificate to trust."""
    cert, key = egress.certificate(directory, HOST)
    with _listener() as listener:
        process = _FORK.Process(target=_serve, args=(listener, cert, key, size), daemon=True)
        process.start()
        try:
            yield listener.getsockname()[1], cert
        finally:
            process.terminate()
            process.join()


def _serve(listener: socket.socket, cert: Path, key: Path, size: int) -> None:
    context = egress.server_side(cert, key)
    while True:
        peer, _ = listener.accept()
        threading.Thread(target=_answer, args=(peer, context, size), daemon=True).start()


def _answer(peer: socket.socket, context: ssl.SSLContext, size: int) -> None:
    data = memoryview(bytes(MIB))
    with peer:
        first = peer.recv(1 << 16, socket.MSG_PEEK)
        if _PLAIN.encode() in first:
            peer.recv(len(first))
            speak = peer
        else:
            speak = context.wrap_socket(peer, server_side=True)
        for _ in range(0, size, MIB):
            speak.sendall(data)
        speak.recv(1)


_PLAIN = "runner-bench-plain"
"""The protocol (ALPN) in the ClientHello of who means no TLS by it."""


def download(registry: Registry | None, port: int, cert: Path, way: str, size: int) -> float:
    """Seconds from the connection to the last byte; through the tunnel where there is one."""
    started = time.perf_counter()
    peer = socket.create_connection((HOST, port)) if registry is None else _tunnel(registry, port)
    with peer:
        if way == "TLS":
            context = ssl.create_default_context(cafile=str(cert))
            with context.wrap_socket(peer, server_hostname=HOST) as secured:
                _take(secured.recv_into, size)
                secured.sendall(b"x")
        else:
            peer.sendall(_hello())
            _take(peer.recv_into, size)
            peer.sendall(b"x")
        return time.perf_counter() - started


def _hello() -> bytes:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.set_alpn_protocols([_PLAIN])
    outgoing = ssl.MemoryBIO()
    client = context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname=HOST)
    try:
        client.do_handshake()
    except ssl.SSLWantReadError:
        return outgoing.read()
    raise AssertionError("a handshake with nobody")


def _tunnel(registry: Registry, port: int) -> socket.socket:
    peer = registry.connect()
    login = registry.headers.replace("Authorization", "Proxy-Authorization")
    peer.sendall(f"CONNECT {HOST}:{port} HTTP/1.1\r\nHost: {HOST}:{port}\r\n{login}\r\n".encode())
    answer = b""
    while not answer.endswith(b"\r\n\r\n"):
        answer += peer.recv(1)  # what comes after is not ours
    if b" 200 " not in answer:
        raise ConnectionError(answer.decode("latin-1"))
    return peer


def _take(receive: Callable[[memoryview], int], size: int) -> None:
    sink = memoryview(bytearray(MIB))
    while size:
        got = receive(sink[:size])
        if not got:
            raise ConnectionError("fewer bytes than announced")
        size -= got


def render(found: dict[str, list[Carried]]) -> str:
    lines = [
        "## A CONNECT tunnel beside a direct connection",
        "",
        "One download from a server on loopback, by one client. The tunnel's check wants a",
        "ClientHello; the second row sends one and then no TLS: nothing but carrying bytes.",
        "",
        "| what | direct MiB/s | tunnel MiB/s | ratio | gateway's CPU s/GiB |",
        "|---|---|---|---|---|",
    ]
    for way, runs in found.items():
        size = runs[0].bytes
        direct = statistics.median(size / MIB / one.direct_seconds for one in runs)
        tunnel = statistics.median(size / MIB / one.tunnel_seconds for one in runs)
        ratio = statistics.median(one.ratio for one in runs)
        cpu = statistics.median(one.cpu_seconds * (1 << 30) / size for one in runs)
        lines.append(f"| {way} | {direct:.0f} | {tunnel:.0f} | {ratio:.2f} | {cpu:.2f} |")
    return "\n".join(lines)
