"""The host's one TCP port as the first process of a pod sees it, played by a test."""

import contextlib
import hashlib
import os
import queue
import select
import socket
import ssl
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Self

import pytest

from sandbox.plan import Ways

KEY = "k-3Y_" + "x" * 40
AS_ROOT = [
    pytest.mark.root,
    pytest.mark.skipif(
        os.geteuid() != 0, reason="only root makes PID namespaces here: run as root too"
    ),
]
SECONDS = 20.0
"""That nothing in these tests takes."""
_GUEST = Path(str(resources.files("sandbox").joinpath("guest")))
INIT, INIT_POD = _GUEST / "init", _GUEST / "init-pod"


def make_certificate(directory: Path, name: str, *signed_by: Path) -> Path:
    """A file with a certificate and its key; ``signed_by`` is such a file too, else itself."""
    path = directory / f"{name}.pem"
    with_key = directory / f"{name}.key"
    signer = [f"-CA={signed_by[0]}", f"-CAkey={signed_by[0]}"] if signed_by else []
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1",
         "-nodes", "-days", "2", "-subj", f"/CN={name}", "-keyout", with_key, "-out", path,
         *(part for option in signer for part in option.split("=", 1))],
        check=True, capture_output=True,
    )  # fmt: skip
    path.write_bytes(path.read_bytes() + with_key.read_bytes())
    return path


class Spoken:
    """One connection of the first process."""

    def __init__(self, tls: ssl.SSLSocket) -> None:
        self._tls = tls
        self._read = b""

    def receive(self) -> bytes:
        """What comes next; empty at the end."""
        if self._read:
            data, self._read = self._read, b""
            return data
        return self._receive()

    def _receive(self) -> bytes:
        try:
            return self._tls.recv(1 << 20)
        except ssl.SSLZeroReturnError:  # the end, for who has ended before
            return b""

    def line(self) -> bytes:
        """Raises EOFError where there is no more."""
        while b"\n" not in self._read:
            self._more()
        line, _, self._read = self._read.partition(b"\n")
        return line

    def exactly(self, size: int) -> bytes:
        while len(self._read) < size:
            self._more()
        data, self._read = self._read[:size], self._read[size:]
        return data

    def _more(self) -> None:
        data = self._receive()
        if not data:
            raise EOFError
        self._read += data

    def frame(self) -> bytes:
        return self.exactly(struct.unpack(">I", self.exactly(4))[0])

    def frames(self) -> Iterator[bytes]:
        """Up to the empty one."""
        while frame := self.frame():
            yield frame

    def everything(self) -> bytes:
        return b"".join(iter(self.receive, b""))

    def send(self, data: bytes) -> None:
        self._tls.sendall(data)

    def end(self) -> None:
        """Sends no more, and goes on to receive."""
        self._tls.setblocking(False)
        with contextlib.suppress(ssl.SSLWantReadError):
            self._tls.unwrap()
        self._tls.settimeout(SECONDS)

    def exchange(self, data: bytes) -> bytes:
        """Sends and receives at the same time, until the other end ends."""
        self._tls.setblocking(False)
        view, received, ended = memoryview(data), bytearray(self._read), False
        while view or not ended:
            waits = select.select([self._tls], [self._tls] if view else [], [], SECONDS)
            assert waits[0] or waits[1], "stuck"
            with contextlib.suppress(ssl.SSLWantReadError, ssl.SSLWantWriteError):
                while view:
                    view = view[self._tls.send(view[: 256 << 10]) :]
            with contextlib.suppress(ssl.SSLWantReadError, ssl.SSLWantWriteError):
                while not ended:
                    piece = self._receive()
                    received += piece
                    ended = not piece
        self._tls.settimeout(SECONDS)
        return bytes(received)

    def await_gone(self) -> None:
        """Until the connection itself ended. Raises TimeoutError."""
        with socket.socket(fileno=os.dup(self._tls.fileno())) as plain:
            plain.settimeout(SECONDS)
            assert plain.recv(1) == b""

    def break_off(self) -> None:
        """As a front does that is killed, or a network that forgets: no end, a reset."""
        linger = struct.pack("ii", 1, 0)
        self._tls.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self._tls.close()

    def close(self) -> None:
        self._tls.close()


class Front:
    """Listens, and sorts who comes by the name they ask for."""

    def __init__(self, certificate: Path, versions: ssl.TLSVersion | None = None) -> None:
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(certificate)
        if versions is not None:
            self._context.maximum_version = versions
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._came: queue.Queue[tuple[str, Spoken]] = queue.Queue()
        self._waiting: list[tuple[str, Spoken]] = []
        self._all: list[Spoken] = []
        self.greetings: list[bytes] = []
        self.refused: list[str] = []
        self.place = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def way(self, name: str) -> str:
        return f"tls:{self.place}/{name}"

    @property
    def ways(self) -> Ways:
        return Ways(self.way("gateway"), self.way("outlet"), self.way("host"))

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # the test is over
            while True:
                plain, _ = self._listener.accept()
                threading.Thread(target=self._greet, args=(plain,), daemon=True).start()

    def _greet(self, plain: socket.socket) -> None:
        plain.settimeout(SECONDS)
        try:
            spoken = Spoken(self._context.wrap_socket(plain, server_side=True))
            self._all.append(spoken)
            greeting = spoken.line()
        except (OSError, EOFError) as error:
            self.refused.append(str(error) or "no word")
            plain.close()
            return
        self.greetings.append(greeting)
        self._came.put((greeting.rpartition(b" ")[2].decode(), spoken))

    def take(self, name: str, seconds: float = SECONDS) -> Spoken:
        """The next connection to ``name``. Raises queue.Empty."""
        end = time.monotonic() + seconds
        while True:
            for index, (wanted, spoken) in enumerate(self._waiting):
                if wanted == name:
                    del self._waiting[index]
                    return spoken
            self._waiting.append(self._came.get(timeout=max(0.001, end - time.monotonic())))

    def release(self, nonce: str = "n") -> Spoken:
        """Accepts the canary of the next one that comes."""
        host = self.take("host")
        assert host.line().startswith(b"runner-canary 1 nonce=")
        host.send(f"release {nonce}\n".encode())
        return host

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):  # twice is as good as once
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for spoken in self._all:
            spoken.close()


@dataclass
class Pod:
    """A directory that appears as /run/runner, and what runs the first process in it."""

    directory: Path
    environment: dict[str, str] = field(default_factory=lambda: {"PATH": "/usr/bin:/bin"})
    umask: int = 0o022

    @classmethod
    def make(cls, directory: Path, *pinned: Path, key: str = KEY) -> Self:
        directory.mkdir(parents=True)
        session = directory / "session"
        session.mkdir()
        certificates = [path.read_text().partition("-----BEGIN PRIVATE")[0] for path in pinned]
        (session / "certificate.pem").write_text("".join(certificates))
        (session / "key").write_text(f"{key}\n")
        return cls(directory)

    @property
    def shown(self) -> bytes:
        """On standard output, as ``kubectl logs`` has it."""
        return (self.directory.parent / "stdout").read_bytes()

    @property
    def complaint(self) -> str:
        """On standard error, likewise."""
        return (self.directory.parent / "stderr").read_text(errors="replace")

    @contextmanager
    def running(
        self,
        plan: bytes,
        init: Path = INIT_POD,
        *,
        stdout: int | None = None,
        speaks: bytes | None = None,
    ) -> Iterator[subprocess.Popen[bytes]]:
        """Never bare: the first process kills everything that it can before it ends.

        Args:
            plan: That it carries out.
            init: Which of the two.
            stdout: Where it writes, instead of to a file.
            speaks: What it reads on standard input, which stays open then.
        """
        (self.directory / "plan").write_bytes(plan)
        script = (
            "mount -t tmpfs run /run && mkdir /run/runner && "
            'mount --bind "$0" /run/runner && exec "$@"'
        )
        beside = self.directory.parent
        with (
            (beside / "stdout").open("wb") as out,
            (beside / "stderr").open("wb") as err,
            subprocess.Popen(
                ["unshare", "--pid", "--fork", "--kill-child", "--mount", "--mount-proc",
                 "sh", "-c", script, self.directory, init, "/run/runner/plan"],
                stdin=subprocess.DEVNULL if speaks is None else subprocess.PIPE,
                stdout=stdout or out, stderr=err, env=self.environment, umask=self.umask,
            ) as process,
        ):  # fmt: skip
            try:
                if speaks is not None and process.stdin is not None:
                    process.stdin.write(speaks)
                    process.stdin.flush()
                yield process
            finally:
                process.kill()


def changed(plan: bytes, **fields: int | str) -> bytes:
    """The plan with other ``port``, ``seconds``, ``patience`` or ``log_bytes``."""
    order = {"port": 3, "seconds": 7, "patience": 8, "log_bytes": 9}
    strings = plan.split(b"\0")
    for name, value in fields.items():
        strings[order[name]] = str(value).encode()
    return b"\0".join(strings)


def announced(path: str, data: bytes, digest: str | None = None) -> bytes:
    """A file as the host sends it."""
    return b"%s %d\n%s%s\n" % (
        path.encode(), len(data), data, (digest or hashlib.sha256(data).hexdigest()).encode(),
    )  # fmt: skip


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as chosen:
        port: int = chosen.getsockname()[1]
        return port
