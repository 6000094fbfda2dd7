"""A peer on loopback that answers exactly what a test tells it to, faults included."""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from runner.settings import HttpLimits, RegistrySettings, Settings

LIMITS = HttpLimits(connect_seconds=2.0, read_seconds=2.0, attempts=3, redirects=3)


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes


@dataclass(frozen=True)
class Answer:
    """``raw`` replaces the whole answer and ends the connection; ``length`` lies about the body."""

    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    length: int | None = None
    raw: bytes | None = None


class Peer:
    def __init__(self) -> None:
        self.seen: list[Request] = []
        self.answer: Callable[[Request], Answer] = lambda _: Answer(404)
        peer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            timeout = 3

            def log_message(self, *_: object) -> None:
                pass

            def handle_any(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                request = Request(self.command, self.path, dict(self.headers.items()), body)
                peer.seen.append(request)
                answer = peer.answer(request)
                if answer.raw is not None:
                    self.wfile.write(answer.raw)
                    self.close_connection = True
                    return
                self.send_response(answer.status)
                for name, value in answer.headers.items():
                    self.send_header(name, value)
                length = len(answer.body) if answer.length is None else answer.length
                self.send_header("Content-Length", str(length))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(answer.body)
                self.close_connection = length != len(answer.body)

            do_GET = do_HEAD = do_POST = do_PUT = handle_any  # noqa: N815 - http.server's names

        class Server(ThreadingHTTPServer):
            daemon_threads = False

            def handle_error(self, *_: object) -> None:
                """A client that went away is part of many tests."""

        self._server = Server(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    @staticmethod
    def reply(status: int = 200, body: bytes = b"", **headers: str) -> Answer:
        """An honest answer; header names are written with underscores."""
        return Answer(status, body, {n.replace("_", "-"): v for n, v in headers.items()})

    @staticmethod
    def raw(data: bytes) -> Answer:
        """``data`` and nothing else, then the end of the connection."""
        return Answer(raw=data)

    @staticmethod
    def cut(body: bytes, length: int, **headers: str) -> Answer:
        """Announces ``length`` bytes and ends the connection after ``body``."""
        named = {n.replace("_", "-"): v for n, v in headers.items()}
        return Answer(int(named.pop("status", "200")), body, named, length=length)

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        return f"http://{self.host}"

    @property
    def settings(self) -> Settings:
        """Those of a registry that may be asked here."""
        return self.settings_with()

    def settings_with(self, **fields: object) -> Settings:
        here = RegistrySettings.model_validate(
            {"plain_http": True, "private_address": True, **fields}
        )
        return Settings(registries={self.host: here}, http=LIMITS)

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture
def peers() -> Iterator[Callable[[], Peer]]:
    """Makes peers."""
    with ExitStack() as stack:

        def make() -> Peer:
            peer = Peer()
            stack.callback(peer.close)
            return peer

        yield make


@pytest.fixture
def peer(peers: Callable[[], Peer]) -> Peer:
    return peers()
