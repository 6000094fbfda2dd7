"""A first process of a pod that is played: it comes to the doors of its place, as the key says."""

import base64
import contextlib
import hashlib
import socket
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from sandbox import doors
from tests.support.cluster import RELEASED, SAID, PlayedCluster, has_ended, is_running

_SECONDS = 10
GVISOR = {
    "release": "4.19.0-gvisor",
    "version": "#1 SMP Sun Jan 10 15:06:54 PST 2016",
    "machine": "x86_64",
    "ids": "0:0",
    "log": "<6>[    0.000000] Starting gVisor...\n",
    "gvisor": "",
    "boot_id": "11111111-0000-4000-8000-000000000001\n",
    "mounts": "",
    "net_dev": "Inter-|   Receive\n face |bytes\n    lo: 0\n  eth0: 0\n",
    "reached": "",
}
"""What gVisor shows."""


def canary(nonce: str, shown: dict[str, str] = GVISOR) -> bytes:
    words = (f"{name}={value.encode().hex()}" for name, value in shown.items())
    return f"runner-canary 1 nonce={nonce} {' '.join(words)}\n".encode()


def report(nonce: str, status: int = 0, claim: str = "") -> bytes:
    line = f"runner-exit 1 nonce={nonce} command=0 status={status} claim={claim.encode().hex()}"
    return f"\n{line}\n".encode()


def frame(data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + data


def take_files(peer: socket.socket) -> dict[str, bytes]:
    """What comes by files.sock; checked as it is checked inside."""
    files: dict[str, bytes] = {}
    with peer.makefile("rwb") as stream:
        while (line := stream.readline()) != b".\n":
            name, size = line.decode().split()
            files[name] = stream.read(int(size))
            said = stream.readline().decode().strip()
            assert said == hashlib.sha256(files[name]).hexdigest()
        stream.write(b"ok\n")
        stream.flush()
    return files


@dataclass(frozen=True, slots=True)
class Secret:
    """What a pod finds in its Secret."""

    key: str
    plan: tuple[str, ...]
    certificate: bytes

    @classmethod
    def of(cls, body: dict[str, Any]) -> "Secret":
        data = {name: base64.b64decode(value) for name, value in body["data"].items()}
        plan = data["plan"].decode("utf-8", "surrogateescape").split("\0")[:-1]
        return cls(data["key"].decode(), tuple(plan), data["certificate.pem"])

    @property
    def nonce(self) -> str:
        return self.plan[1]


@dataclass
class FirstProcess:
    """Attributes:
    output: That it writes, piece by piece, before its report.
    shown: In its canary.
    breaks: After how many pieces its connection breaks, once each.
    between: Called before each piece with its number.
    files: That it got.
    offsets: That it was told to go on from.
    """

    cluster: PlayedCluster
    doors: Path
    output: Sequence[bytes] = (b"hello\n", b"done\n")
    shown: dict[str, str] = field(default_factory=lambda: dict(GVISOR))
    breaks: tuple[int, ...] = ()
    between: Callable[[int], None] = lambda _: None
    files: dict[str, bytes] = field(default_factory=dict)
    offsets: list[int] = field(default_factory=list)
    trouble: BaseException | None = None
    is_over: bool = False

    @contextmanager
    def living(self) -> Iterator["FirstProcess"]:
        """From the moment when the cluster shows its container running."""
        thread = threading.Thread(target=self._live, name="first-process")
        thread.start()
        try:
            yield self
        finally:
            self.is_over = True
            self.cluster.happens(SAID)  # and so it is looked at
            thread.join()
        if self.trouble is not None:
            raise self.trouble

    def connect(self, name: str) -> socket.socket:
        peer = doors.connect(self.doors, doors.hidden(self.secret().key), name)
        peer.settimeout(_SECONDS)
        return peer

    def secret(self) -> Secret:
        asked = next(each for each in self.cluster.asked if each.what.endswith("/secrets"))
        return Secret.of(asked.body)

    def _live(self) -> None:
        self.cluster.wait(lambda pods: self.is_over or any(map(is_running, pods)))
        if self.is_over:
            return
        try:
            self._talk()
        except (OSError, EOFError):
            pass  # the host has ended it
        except BaseException as error:  # noqa: BLE001 - a thread's last resort; the test raises it
            self.trouble = error
        finally:
            self.cluster.happens(SAID)

    def _talk(self) -> None:
        nonce = self.secret().nonce
        with contextlib.ExitStack() as stack:
            host = stack.enter_context(self.connect("host"))
            host.sendall(canary(nonce, self.shown))
            stream = stack.enter_context(host.makefile("rb"))
            if stream.readline() != f"release {nonce}\n".encode():
                raise EOFError
            with self.connect("files") as peer:
                self.files = take_files(peer)
            self.cluster.happens(RELEASED)
            if not self.cluster.recording.is_orderly:
                self._stay(host)
                return
            ended = self.cluster.recording.ended
            pieces = [*self.output, report(nonce, ended["exitCode"] if ended else 0)]
            self._say(host, stream, pieces, stack)

    def _say(
        self,
        host: socket.socket,
        stream: BinaryIO,
        pieces: list[bytes],
        stack: contextlib.ExitStack,
    ) -> None:
        for number, piece in enumerate(pieces):
            self.between(number)
            if number in self.breaks:
                host.sendall(frame(piece)[:-1])  # all of it but a byte, in vain
                host, stream = self._come_again(host, stack)
                whole = b"".join(pieces[: number + 1])
                host.sendall(frame(whole[self.offsets[-1] :]))
            else:
                host.sendall(frame(piece))
        host.sendall(frame(b""))
        if stream.readline() != b"done\n":
            raise EOFError

    def _come_again(
        self, host: socket.socket, stack: contextlib.ExitStack
    ) -> tuple[socket.socket, BinaryIO]:
        host.shutdown(socket.SHUT_RDWR)
        host = stack.enter_context(self.connect("host"))
        host.sendall(f"runner-again 1 nonce={self.secret().nonce}\n".encode())
        stream = stack.enter_context(host.makefile("rb"))
        word, offset = stream.readline().split()
        assert word == b"from"
        self.offsets.append(int(offset))
        return host, stream

    def _stay(self, host: socket.socket) -> None:
        """Writes a line, and is ended by somebody."""
        host.sendall(frame(b"hello\n"))
        self.cluster.wait(lambda pods: self.is_over or any(map(has_ended, pods)))
