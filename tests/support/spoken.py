"""A server on a Unix socket that plays a Docker Engine: it says what a test has it say."""

import json
import socket
import socketserver
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from sandbox.docker.engine import Engine

STARTED_SECONDS = 10
VERSION = {"ApiVersion": "1.41"}
INFO: Mapping[str, Any] = {
    "ServerVersion": "20.10.24+dfsg1",
    "Runtimes": {
        "runc": {"path": "runc"},
        "runsc": {"path": "/usr/bin/runsc", "runtimeArgs": ["--host-uds=open"]},
    },
    "SecurityOptions": ["name=seccomp,profile=default"],
    "DockerRootDir": "/var/lib/docker",
    "MemoryLimit": True,
    "CpuCfsQuota": True,
    "PidsLimit": True,
    "SwapLimit": True,
}


@dataclass(frozen=True, slots=True)
class Answer:
    """Attributes:
    body: Sent as JSON, where it is not bytes.
    """

    status: int = 200
    body: Any = field(default_factory=dict)
    delay_seconds: float = 0

    @property
    def data(self) -> bytes:
        return self.body if isinstance(self.body, bytes) else json.dumps(self.body).encode()


@dataclass(frozen=True, slots=True)
class Asked:
    """One request that arrived. ``what`` is its method, and its path without the version."""

    what: str
    query: Mapping[str, list[str]]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def frame(data: bytes, stream: int = 1) -> bytes:
    """A piece of output as an attached connection has it."""
    return struct.pack(">BxxxI", stream, len(data)) + data


HANG_UP = Answer(status=0)
"""Ends the connection without a word."""


def _nothing_yet() -> dict[str, Answer]:
    lists = ("/containers/json", "/networks", "/images/json")
    return {
        "GET /version": Answer(200, VERSION),
        "GET /info": Answer(200, INFO),
        **{f"GET {path}": Answer(200, []) for path in lists},
        "GET /volumes": Answer(200, {"Volumes": None}),
        "POST /volumes/create": Answer(201, {"Name": "v"}),
    }


@dataclass
class SpokenEngine:
    """Attributes:
    socket: Where it listens.
    answers: By ``METHOD /path``; anything else is not found.
    asked: What arrived, in order.
    pieces: What an attached connection gets when a container was started, and then its end.
    written: What it was given, all of it when ``detached`` is set.
    """

    socket: Path
    answers: dict[str, Answer] = field(default_factory=_nothing_yet)
    asked: list[Asked] = field(default_factory=list)
    pieces: tuple[bytes, ...] = ()
    written: bytes = b""
    started: threading.Event = field(default_factory=threading.Event)
    detached: threading.Event = field(default_factory=threading.Event)

    def says(self, what: str, body: Any = None, *, status: int = 200) -> None:
        self.answers[what] = Answer(status, {} if body is None else body)

    def saw(self, what: str) -> list[Asked]:
        return [each for each in self.asked if each.what == what]

    @contextmanager
    def client(self) -> Iterator[Engine]:
        with Engine.connect(self.socket) as engine:
            yield engine


class _Server(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True
    block_on_close = False


@contextmanager
def speaking(path: Path) -> Iterator[SpokenEngine]:
    """An engine that says it is as old as can be, and knows nothing yet."""
    engine = SpokenEngine(path)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def __getattr__(self, name: str) -> Callable[[], None]:
            if name.startswith("do_"):  # GET, POST, DELETE
                return lambda: _answer(engine, self)
            raise AttributeError(name)

        def address_string(self) -> str:
            return "unix"

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - theirs
            pass

    with _Server(str(path), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield engine
        finally:
            server.shutdown()
            thread.join()


def _answer(engine: SpokenEngine, handler: BaseHTTPRequestHandler) -> None:
    address = urlsplit(handler.path)
    path = address.path
    if path.startswith("/v1."):
        path = "/" + path.split("/", 2)[2]
    what = f"{handler.command} {path}"
    engine.asked.append(Asked(what, parse_qs(address.query), _body(handler)))
    if path.endswith("/attach") and engine.pieces:
        _attach(engine, handler)
        return
    if path.endswith("/start"):
        engine.started.set()
    answer = engine.answers.get(what, Answer(404, {"message": f"no such thing: {what}"}))
    handler.close_connection = answer is HANG_UP
    if answer is HANG_UP:
        return
    time.sleep(answer.delay_seconds)
    handler.send_response(answer.status)
    if answer.status != 204:
        handler.send_header("Content-Length", str(len(answer.data)))
        handler.send_header("Content-Type", "application/json")
    handler.end_headers()
    if answer.status != 204:
        handler.wfile.write(answer.data)


def _body(handler: BaseHTTPRequestHandler) -> bytes:
    if handler.headers.get("Transfer-Encoding") != "chunked":
        return handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
    body = b""
    while size := int(handler.rfile.readline(), 16):
        body += handler.rfile.read(size)
        handler.rfile.readline()
    handler.rfile.readline()
    return body


def _attach(engine: SpokenEngine, handler: BaseHTTPRequestHandler) -> None:
    handler.close_connection = True
    handler.send_response(101, "UPGRADED")
    handler.send_header("Connection", "Upgrade")
    handler.send_header("Upgrade", "tcp")
    handler.end_headers()
    handler.wfile.flush()
    engine.started.wait(STARTED_SECONDS)
    for piece in engine.pieces:
        handler.connection.sendall(piece)
    handler.connection.shutdown(socket.SHUT_WR)
    while data := handler.connection.recv(1 << 16):
        engine.written += data
    engine.detached.set()
