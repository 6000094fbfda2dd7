"""Clients that push and pull blobs as builders do, in processes of their own, cheaply.

HTTP is written by hand here: files go out by sendfile, what comes in is dropped unlooked at. So a
client costs little beside the server that it measures; how much is in ``Work.client_cpu_seconds``.
"""

import multiprocessing
import re
import resource
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import BinaryIO

_FORK = multiprocessing.get_context("fork")
_HEAD_BYTES = 64 << 10
_SINK_BYTES = 1 << 20
_ORIGIN = re.compile(r"^https?://[^/]*")


@dataclass(frozen=True, slots=True)
class Blob:
    """Some bytes of a file, and their digest."""

    path: Path
    offset: int
    size: int
    digest: str


@dataclass(frozen=True, slots=True)
class Registry:
    """Where to push to, and how to say who we are."""

    address: tuple[str, int] | str
    """Host and port, or the path of a Unix socket."""
    repository: str
    headers: str = ""

    def connect(self) -> socket.socket:
        if isinstance(self.address, tuple):
            peer = socket.create_connection(self.address)
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return peer
        peer = socket.socket(socket.AF_UNIX)
        peer.connect(self.address)
        return peer


@dataclass(slots=True)
class Work:
    """What clients did."""

    seconds: float = 0.0
    """Wall time from the start of the first to the end of the last."""
    latencies: list[float] = field(default_factory=list)
    """Of each request, in seconds."""
    client_cpu_seconds: float = 0.0


class Client:
    """One connection, kept for all requests."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._socket = registry.connect()
        self._sink = memoryview(bytearray(_SINK_BYTES))
        self.latencies: list[float] = []
        self._ask("GET", "/v2/", 200)  # strangers have little time
        self.latencies.clear()

    def close(self) -> None:
        self._socket.close()

    def push(self, blob: Blob) -> None:
        """In three requests, as containers/image does it."""
        base = f"/v2/{self._registry.repository}/blobs/uploads/"
        place = self._ask("POST", base, 202)
        with blob.path.open("rb") as file:
            place = self._ask("PATCH", place, 202, (file, blob.offset, blob.size))
        joint = "&" if "?" in place else "?"
        self._ask("PUT", f"{place}{joint}digest={blob.digest}", 201)

    def pull(self, blob: Blob) -> None:
        self._ask("GET", f"/v2/{self._registry.repository}/blobs/{blob.digest}", 200)

    def _ask(
        self, method: str, target: str, status: int, body: tuple[BinaryIO, int, int] | None = None
    ) -> str:
        """One request; the answer's Location."""
        started = time.perf_counter()
        length = body[2] if body else 0
        head = (
            f"{method} {target} HTTP/1.1\r\nHost: bench\r\n{self._registry.headers}"
            f"Content-Type: application/octet-stream\r\nContent-Length: {length}\r\n\r\n"
        )
        self._socket.sendall(head.encode())
        if body:
            file, offset, count = body
            self._socket.sendfile(file, offset, count)
        location = self._answer(method, target, status)
        self.latencies.append(time.perf_counter() - started)
        return location

    def _answer(self, method: str, target: str, status: int) -> str:
        received = b""
        while b"\r\n\r\n" not in received:
            piece = self._socket.recv(_HEAD_BYTES)
            if not piece:
                raise ConnectionError(f"{method} {target}: no answer")
            received += piece
        head, _, rest = received.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        fields = (line.partition(":") for line in lines)
        headers = {name.lower(): value.strip() for name, _, value in fields}
        self._drop(int(headers.get("content-length", "0")) - len(rest))
        if first.split()[1] != str(status):
            raise ConnectionError(f"{method} {target}: {first}")
        return _ORIGIN.sub("", headers.get("location", ""))

    def _drop(self, left: int) -> None:
        while left:
            size = self._socket.recv_into(self._sink[:left])
            if not size:
                raise ConnectionError("an answer shorter than announced")
            left -= size


def work(
    registries: Sequence[Registry],
    shares: Sequence[Sequence[Blob]],
    do: Callable[[Client, Blob], None],
) -> Work:
    """A process for each registry and list of blobs, all at once."""
    barrier = _FORK.Barrier(len(registries) + 1)
    pipes = []
    for registry, share in zip(registries, shares, strict=True):
        ours, theirs = _FORK.Pipe(duplex=False)
        process = _FORK.Process(target=_child, args=(registry, share, do, barrier, theirs))
        process.start()
        theirs.close()
        pipes.append((process, ours))
    barrier.wait(60)
    started = time.perf_counter()
    done = Work()
    for process, pipe in pipes:
        try:
            latencies, cpu_seconds = pipe.recv()
        except EOFError:
            raise RuntimeError("a client failed; it said why") from None
        finally:
            process.join()
        done.latencies += latencies
        done.client_cpu_seconds += cpu_seconds
    done.seconds = time.perf_counter() - started
    return done


def _child(
    registry: Registry,
    share: Sequence[Blob],
    do: Callable[[Client, Blob], None],
    barrier: "multiprocessing.synchronize.Barrier",
    result: Connection,
) -> None:
    client = Client(registry)
    barrier.wait(60)
    before = resource.getrusage(resource.RUSAGE_SELF)
    for blob in share:
        do(client, blob)
    after = resource.getrusage(resource.RUSAGE_SELF)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    result.send((client.latencies, spent))
    client.close()
