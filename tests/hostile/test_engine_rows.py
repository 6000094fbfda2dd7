"""An engine that lies, or does not answer: row 21, on the other side of the socket."""

import gc
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from runner.errors import EngineLost, EngineUnavailable, RunnerError, SandboxFailed
from runner.terminal import clean
from sandbox.docker import engine as engines
from sandbox.docker.engine import Engine

# The SDK forgets the connection by which it got no sound answer.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

VERSION = json.dumps({"ApiVersion": "1.41"}).encode()


class Liar:
    """Listens as an engine would. ``answers`` is what it says, by how a path ends."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.answers: dict[str, bytes | None] = {"/version": VERSION}
        self.status = 200
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._open: list[socket.socket] = []
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                peer, _ = self._listener.accept()
            except OSError:
                return
            self._open.append(peer)
            threading.Thread(target=self._converse, args=(peer,), daemon=True).start()

    def _converse(self, peer: socket.socket) -> None:
        with peer, peer.makefile("rb") as asked:
            while line := asked.readline():
                length = 0
                while (header := asked.readline()) not in {b"\r\n", b""}:
                    name, _, value = header.partition(b":")
                    length = int(value) if name.lower() == b"content-length" else length
                asked.read(length)
                target = line.split()[1].decode().partition("?")[0]
                body = next(
                    (each for end, each in self.answers.items() if target.endswith(end)), b"{}"
                )
                if body is None:  # for ever
                    asked.readline()
                    return
                status = 200 if target.endswith("/version") else self.status
                peer.sendall(b"HTTP/1.1 %d x\r\nContent-Type: application/json\r\n" % status)
                peer.sendall(b"Content-Length: %d\r\n\r\n" % len(body) + body)

    def close(self) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        for each in self._open:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        for each in (self._listener, *self._open):
            each.close()


@pytest.fixture
def liar(tmp_path: Path) -> Iterator[Liar]:
    liar = Liar(tmp_path / "docker.sock")
    yield liar
    liar.close()
    gc.collect()  # what the SDK forgot is collected, and warned about, here


LIES = (
    b"",
    b"null",
    b"[]",
    b"{}",
    b"7",
    b'"x"',
    b"[null]",
    b"[[]]",
    b"{",
    b"\xff\xfe",
    b'{"Id": {}}',
)
CALLS: tuple[Callable[[Engine], object], ...] = (
    Engine.info,
    lambda engine: engine.image("a:1"),
    lambda engine: engine.images({"a": "b"}),
    lambda engine: engine.create("a", {}),
    lambda engine: engine.wait("a"),
    lambda engine: engine.state("a"),
    lambda engine: engine.address("a", "b"),
    lambda engine: engine.labelled({"a": "b"}),
    lambda engine: engine.networks({"a": "b"}),
    lambda engine: engine.volumes({"a": "b"}),
    lambda engine: engine.create_network("a", {}),
)


# Defence: the last ``except`` of ``_told`` in sandbox.engine.
@pytest.mark.parametrize("lie", LIES)
def test_row_21_what_no_engine_says_is_an_error_of_ours(liar: Liar, lie: bytes) -> None:
    liar.answers[""] = lie
    with Engine.connect(liar.path) as engine:
        for call in CALLS:
            try:
                call(engine)
            except (SandboxFailed, EngineUnavailable):
                continue


# Defence: ``re.fullmatch`` in Engine.connect.
@pytest.mark.parametrize(
    "version",
    ["", "x", "1", "1.x", "1.41.7", "-1.50", "1." + "9" * 9999, None, 1.41, [], {}, "1.40"],
)
def test_row_21_a_version_that_is_none_is_no_engine(liar: Liar, version: Any) -> None:
    liar.answers["/version"] = json.dumps({"ApiVersion": version}).encode()
    with pytest.raises(EngineUnavailable) as raised:
        Engine.connect(liar.path).close()
    assert len(str(raised.value)) < 1000


# Defence: ``_shown`` in sandbox.docker.engine, and ``clean`` where it is printed.
@pytest.mark.parametrize("status", [400, 404, 409, 500])
def test_row_16_what_a_runtime_says_is_short_and_moves_no_cursor(liar: Liar, status: int) -> None:
    said = "\x1b]52;c;ZXZpbA==\x07\x1b[2J\n\x00" + "runtime" * 1_000_000
    liar.answers[""] = json.dumps({"message": said}).encode()
    liar.status = status
    with Engine.connect(liar.path) as engine, pytest.raises(RunnerError) as raised:
        engine.create("a", {})
    shown = str(raised.value)
    assert len(shown) < 1000
    assert "\n" not in shown
    assert clean(shown).isprintable()


# Defence: ``timeout`` in Engine.connect.
def test_row_15_an_engine_that_never_answers_is_not_waited_for(
    liar: Liar, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "CALL_SECONDS", 1)
    with Engine.connect(liar.path) as engine:
        liar.answers = {"": None}
        begun = time.monotonic()
        for call in CALLS[1:4]:
            with pytest.raises(SandboxFailed):
                call(engine)
        assert time.monotonic() - begun < 6
    liar.answers = {"": None}
    with pytest.raises(EngineUnavailable):
        Engine.connect(liar.path).close()


def test_row_22_an_engine_that_goes_away_is_said_to_be_gone(liar: Liar) -> None:
    with Engine.connect(liar.path) as engine:
        liar.close()
        with pytest.raises(EngineLost):
            engine.state("a")
