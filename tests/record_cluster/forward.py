"""Stands between a backend and the API of a real cluster: passes on, and notes what passes."""

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import urllib3

from sandbox.kubernetes.cluster import Cluster

READ_SECONDS = 300.0
HEADERS = ("Content-Type", "Retry-After")
"""Of an answer, what anybody may go by."""


@dataclass
class Forward:
    """Attributes:
    cluster: The real one, as whoever records.
    first: Called with method and path before a request is passed on.
    noted: What passed, in the order in which it was asked for.
    """

    cluster: Cluster
    first: Callable[[str, str], None] = lambda *_: None
    noted: list[dict[str, Any]] = field(default_factory=list)
    _began: float = field(default_factory=time.monotonic)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, **what: Any) -> dict[str, Any]:
        """Adds an exchange, or a mark; watches add their lines to it later."""
        with self._lock:
            noted = {"at": self.seconds(), **what}
            self.noted.append(noted)
            return noted

    def seconds(self) -> float:
        return round(time.monotonic() - self._began, 3)

    @contextmanager
    def listening(self) -> Iterator[str]:
        """Its URL on loopback."""

        class Handler(_Handler):
            forward = self

        with _Server(("127.0.0.1", 0), Handler) as server:
            thread = threading.Thread(target=server.serve_forever, args=(0.05,))
            thread.start()
            try:
                yield f"http://127.0.0.1:{server.server_port}"
            finally:
                server.shutdown()
                thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    forward: Forward

    def do_GET(self) -> None:
        self._pass_on()

    def do_POST(self) -> None:
        self._pass_on()

    def do_DELETE(self) -> None:
        self._pass_on()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - theirs
        pass

    def _pass_on(self) -> None:
        address = urlsplit(self.path)
        query = dict(parse_qsl(address.query, keep_blank_values=True))
        data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = json.loads(data) if data else None
        self.forward.first(self.command, address.path)
        asked = {"method": self.command, "path": address.path, "query": query, "request": body}
        try:
            response = self.forward.cluster._open(
                self.command, address.path, query, body, READ_SECONDS
            )
        except (urllib3.exceptions.HTTPError, OSError):
            self.close_connection = True
            return
        with closing(response), contextlib.suppress(OSError):  # the backend has hung up
            headers = {name: response.headers[name] for name in HEADERS if name in response.headers}
            asked |= {"status": response.status, "headers": headers}
            if query.get("watch") == "true" and response.status == 200:
                self._pass_lines(response, asked)
            else:
                self._pass_answer(response, asked)

    def _pass_answer(self, response: urllib3.HTTPResponse, asked: Mapping[str, Any]) -> None:
        data = response.read(decode_content=True)
        self.forward.note(**asked, body=json.loads(data))
        self.send_response(response.status)
        for name, value in asked["headers"].items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _pass_lines(self, response: urllib3.HTTPResponse, asked: Mapping[str, Any]) -> None:
        noted = self.forward.note(**asked, lines=[])
        self.send_response(response.status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        held = b""
        for data in response.stream(65536, decode_content=True):
            *lines, held = (held + data).split(b"\n")
            for line in filter(None, lines):
                noted["lines"].append({"at": self.forward.seconds(), "line": json.loads(line)})
            self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))
        self.wfile.write(b"0\r\n\r\n")
