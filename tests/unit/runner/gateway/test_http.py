"""The HTTP layer alone, with a handler that says what arrived."""

import contextlib
import io
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from runner.gateway.http import Bounds, Handler, Request, Response, Server, Stream, Tunnel
from tests.support.gateway import UnixConnection, connect, speak, statuses

BOUNDS = Bounds(
    connections=8,
    header_bytes=4096,
    idle_seconds=5,
    head_seconds=0.3,
    body_seconds=0.3,
    crumbs=100,
    drain_bytes=1000,
    drain_crumbs=50,
    close_seconds=1,
)
LARGE = 4 << 20
SOUND = b"GET /sound HTTP/1.1\r\nHost: g\r\n\r\n"


class Pieces(Stream):
    def __init__(self, closed: threading.Event, *, broken: bool) -> None:
        self._closed = closed
        self._broken = broken

    def __iter__(self) -> Iterator[bytes]:
        yield b"content"
        if self._broken:
            raise OSError("the other side has gone")

    def close(self) -> None:
        self._closed.set()


class Back(Tunnel):
    def __init__(self, closed: threading.Event) -> None:
        self._closed = closed

    def run(self, peer: socket.socket, early: bytes) -> None:
        peer.sendall(early)
        while piece := peer.recv(1000):
            peer.sendall(piece)

    def close(self) -> None:
        self._closed.set()


class Echo:
    """Answers with what it was asked, and does some odd things when asked for them."""

    def __init__(self, directory: Path) -> None:
        self.seen: list[Request] = []
        self.release = threading.Event()
        self.closed = threading.Event()
        self._directory = directory

    def __call__(self, request: Request) -> Response:
        self.seen.append(request)
        if request.target == "tunnel:1":
            return Response(200, content=Back(self.closed))
        if request.target in {"/stream", "/endless", "/broken"}:
            pieces = Pieces(self.closed, broken=request.target == "/broken")
            return Response(200, content=pieces, length={"/stream": 7}.get(request.target))
        return self._other(request)

    def _other(self, request: Request) -> Response:
        match request.target:
            case "/unread":
                return Response(401)
            case "/bug":
                raise OSError("a disk that fails")
            case "/stuck":
                self.release.wait(10)
                return Response(200)
            case "/large":
                return Response(200, {}, bytes(LARGE))
            case "/nothing":
                return Response(204)
            case "/file" | "/short" | "/empty":
                path = self._directory / "file"
                path.write_bytes(b"" if request.target == "/empty" else b"content")
                length = {"/file": 7, "/short": 9, "/empty": 0}[request.target]
                return Response(200, {}, path.open("rb"), length)
        return Response(200, {}, b"%d" % sum(map(len, request.body)))


class Running:
    def __init__(self, directory: Path, bounds: Bounds, peer_uid: int, handler: Handler) -> None:
        self.path = directory / "socket"
        self.failures: list[Exception] = []
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        here = os.open(directory, os.O_PATH)
        self.listener.bind(f"/proc/self/fd/{here}/socket")
        os.close(here)
        self.listener.listen(64)
        self.server = Server(
            self.listener, handler, peer_uid=peer_uid, failed=self.failures.append, bounds=bounds
        )

    def is_well(self) -> bool:
        return statuses(speak(self.path, SOUND)) == [200]


@pytest.fixture
def echo(tmp_path: Path) -> Iterator[Echo]:
    made = Echo(tmp_path)
    yield made
    made.release.set()


@pytest.fixture
def serve(tmp_path: Path, echo: Echo) -> Iterator[Callable[..., Running]]:
    with contextlib.ExitStack() as stack:

        def start(bounds: Bounds = BOUNDS, peer_uid: int = os.geteuid()) -> Running:
            running = Running(tmp_path, bounds, peer_uid, echo)
            stack.callback(running.server.close)
            return running

        yield start


@pytest.fixture
def running(serve: Callable[..., Running]) -> Running:
    return serve()


def post(*lines: str, body: bytes = b"", target: str = "/") -> bytes:
    return "\r\n".join((f"POST {target} HTTP/1.1", "Host: g", *lines, "", "")).encode() + body


@pytest.mark.parametrize(
    ("data", "status"),
    {
        "content length and chunks": (
            post("Content-Length: 3", "Transfer-Encoding: chunked", body=b"0\r\n\r\n"),
            400,
        ),
        "two lengths": (post("Content-Length: 1", "Content-Length: 2", body=b"ab"), 400),
        "two lengths in one line": (post("Content-Length: 1, 2", body=b"ab"), 400),
        "negative length": (post("Content-Length: -1"), 400),
        "signed length": (post("Content-Length: +1", body=b"a"), 400),
        "length of 30 digits": (post("Content-Length: " + "9" * 30), 400),
        "another coding": (post("Transfer-Encoding: gzip, chunked"), 501),
        "coding in disguise": (post("Transfer-Encoding: xchunked"), 501),
        "two codings": (post("Transfer-Encoding: chunked", "Transfer-Encoding: chunked"), 501),
        "space before the colon": (post("Content-Length : 1", body=b"a"), 400),
        "folded line": (post("X-A: b", " c"), 400),
        "folded coding": (post("Transfer-Encoding:", "\tchunked"), 400),
        "bare line feed": (b"GET / HTTP/1.1\nHost: g\n\n", 400),
        "one bare line feed": (b"GET / HTTP/1.1\r\nHost: g\nX: y\r\n\r\n", 400),
        "bare carriage return": (b"GET / HTTP/1.1\r\nHost: g\rX: y\r\n\r\n", 400),
        "no host": (b"GET / HTTP/1.1\r\n\r\n", 400),
        "two hosts": (b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400),
        "older version": (b"GET / HTTP/1.0\r\nHost: g\r\n\r\n", 505),
        "newer version": (b"GET / HTTP/2.0\r\nHost: g\r\n\r\n", 505),
        "no version": (b"GET /\r\n\r\n", 400),
        "NUL in the target": (b"GET /\0 HTTP/1.1\r\nHost: g\r\n\r\n", 400),
        "NUL in a header": (b"GET / HTTP/1.1\r\nHost: g\r\nA: \0\r\n\r\n", 400),
        "non-ASCII target": ("GET /\u00e9 HTTP/1.1\r\nHost: g\r\n\r\n".encode(), 400),
        "space in the target": (b"GET /a b HTTP/1.1\r\nHost: g\r\n\r\n", 400),
        "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
        "a tunnel that the handler has not": (b"CONNECT a:1 HTTP/1.1\r\nHost: a\r\n\r\n", 405),
        "empty line first": (b"\r\n" + SOUND, 400),
        "header bomb in one piece": (post("A: " + "b" * 5000), 431),
        "many headers": (post(*["A: b"] * 1000), 431),
        "101 short headers": (post(*["A: b"] * 100), 431),
        "chunk of no number": (post("Transfer-Encoding: chunked", body=b"x\r\n"), 400),
        "chunk of negative size": (post("Transfer-Encoding: chunked", body=b"-1\r\n"), 400),
        "chunk size of 21 digits": (
            post("Transfer-Encoding: chunked", body=b"1" * 21 + b"\r\n"),
            400,
        ),
        "chunk without its end": (
            post("Transfer-Encoding: chunked", body=b"1\r\nabc\r\n0\r\n\r\n"),
            400,
        ),
        "chunk that ends with a bare line feed": (
            post("Transfer-Encoding: chunked", body=b"1\na\n0\n\n"),
            400,
        ),
        "endless chunk extension": (
            post("Transfer-Encoding: chunked", body=b"1;" + b"a" * 9000),
            400,
        ),
    }.values(),
)
def test_what_two_readers_could_read_differently_is_refused_and_ends_the_connection(
    data: bytes, status: int, running: Running
) -> None:
    assert statuses(speak(running.path, data + SOUND)) == [status]
    assert running.is_well()
    assert running.failures == []


@pytest.mark.parametrize(
    ("head", "body", "size"),
    [
        (("Content-Length: 3", "Content-Length: 3"), b"abc", 3),
        (("Transfer-Encoding: Chunked",), b"3;ext=1\r\nabc\r\n0\r\n\r\n", 3),
        (("Transfer-Encoding: chunked",), b"3\r\nabc\r\n0\r\nTrailer: x\r\n\r\n", 3),
        (("Content-Length: 0",), b"", 0),
        (("Content-Length: 3", *["A: b"] * 98), b"abc", 3),
    ],
)
def test_a_sound_body_is_read_to_its_end_and_no_further(
    head: tuple[str, ...], body: bytes, size: int, running: Running
) -> None:
    answers = speak(running.path, post(*head, body=body) + SOUND)
    assert statuses(answers) == [200, 200]
    assert answers.split(b"\r\n\r\n")[1].startswith(b"%d" % size)


def test_requests_sent_together_are_answered_in_order(running: Running) -> None:
    both = post("Content-Length: 2", body=b"ab") + post("Content-Length: 4", body=b"abcd") + SOUND
    answers = speak(running.path, both)
    assert [part[:1] for part in answers.split(b"\r\n\r\n")[1:]] == [b"2", b"4", b"0"]


@pytest.mark.parametrize("target", ["http://elsewhere/", "elsewhere:443", "*", "//a/../b"])
def test_a_target_is_handed_on_as_it_came(target: str, running: Running, echo: Echo) -> None:
    speak(running.path, f"GET {target} HTTP/1.1\r\nHost: g\r\n\r\n".encode())
    assert [request.target for request in echo.seen] == [target]


def test_a_tunnel_takes_the_connection_over_and_is_closed(running: Running, echo: Echo) -> None:
    head = b"CONNECT tunnel:1 HTTP/1.1\r\nHost: tunnel\r\n\r\n"
    with connect(running.path) as peer:
        peer.sendall(head + b"early")
        answer = b""
        while not answer.endswith(b"\r\n\r\nearly"):
            answer += peer.recv(1000)
        assert statuses(answer) == [200]
        peer.sendall(SOUND)
        peer.shutdown(socket.SHUT_WR)
        assert peer.recv(1000) == SOUND
    assert echo.closed.wait(5)
    assert running.is_well()


@pytest.mark.parametrize(
    "head",
    [
        b"CONNECT tunnel:1 HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\n\r\n",
        b"CONNECT tunnel:1 HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"CONNECT /v2/ HTTP/1.1\r\nHost: a\r\n\r\n",
        b"CONNECT http://tunnel:1/ HTTP/1.1\r\nHost: a\r\n\r\n",
    ],
)
def test_a_tunnel_is_asked_for_by_its_authority_and_without_a_body(
    head: bytes, running: Running
) -> None:
    assert statuses(speak(running.path, head + SOUND)) == [400]


@pytest.mark.parametrize(
    ("target", "end"), [("/stream", b"Content-Length: 7\r\n\r\ncontent"),
                        ("/endless", b"\r\n\r\n7\r\ncontent\r\n0\r\n\r\n")]
)  # fmt: skip
def test_a_stream_is_sent_as_it_comes_and_closed(
    target: str, end: bytes, running: Running, echo: Echo
) -> None:
    request = f"GET {target} HTTP/1.1\r\nHost: g\r\n\r\n".encode()
    answers = speak(running.path, request * 2)
    assert statuses(answers) == [200, 200]
    assert answers.endswith(end)
    assert echo.closed.is_set()
    head = speak(running.path, request.replace(b"GET", b"HEAD"))
    assert head.endswith(b"\r\n\r\n")


def test_a_stream_that_breaks_off_ends_the_connection(running: Running, echo: Echo) -> None:
    request = b"GET /broken HTTP/1.1\r\nHost: g\r\n\r\n"
    answers = speak(running.path, request + SOUND)
    assert statuses(answers) == [200]
    assert not answers.endswith(b"0\r\n\r\n")
    assert echo.closed.is_set()
    assert running.failures == []


def test_bytes_behind_a_refused_upgrade_are_the_next_request(running: Running) -> None:
    upgrade = b"GET / HTTP/1.1\r\nHost: g\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n"
    assert statuses(speak(running.path, upgrade + SOUND)) == [200, 200]


def test_a_continue_is_sent_when_the_body_is_wanted(running: Running) -> None:
    with connect(running.path) as peer:
        peer.sendall(post("Content-Length: 2", "Expect: 100-continue"))
        assert statuses(peer.recv(1000)) == [100]
        peer.sendall(b"ab")
        assert statuses(peer.recv(1000)) == [200]


def test_no_continue_is_sent_for_a_body_that_nobody_wants(running: Running) -> None:
    head = post("Content-Length: 2", "Expect: 100-continue", target="/unread")
    assert statuses(speak(running.path, head, end=False)) == [401]


def test_a_small_body_that_was_not_read_is_skipped(running: Running) -> None:
    request = post("Content-Length: 900", target="/unread", body=bytes(900))
    assert statuses(speak(running.path, request + SOUND)) == [401, 200]


def test_a_large_body_that_was_not_read_ends_the_connection(running: Running) -> None:
    request = post("Content-Length: 900000", target="/unread", body=bytes(900_000))
    assert statuses(speak(running.path, request + SOUND)) == [401]


def test_an_unread_body_in_crumbs_ends_the_connection(running: Running) -> None:
    chunks = "Transfer-Encoding: chunked"
    few, many = (
        post(chunks, target="/unread", body=b"1\r\na\r\n" * number + b"0\r\n\r\n")
        for number in (40, 60)
    )
    assert statuses(speak(running.path, few + SOUND)) == [401, 200]
    assert statuses(speak(running.path, many + SOUND)) == [401]
    assert running.failures == []


def test_less_body_than_declared_is_refused(running: Running) -> None:
    assert statuses(speak(running.path, post("Content-Length: 5", body=b"ab"))) == [400]


def test_a_peer_that_only_stopped_sending_gets_its_answer(running: Running) -> None:
    assert running.is_well()


def test_a_head_that_drips_is_cut_off(running: Running) -> None:
    begun = time.monotonic()
    with connect(running.path) as peer, contextlib.suppress(BrokenPipeError):
        while time.monotonic() - begun < 5:
            peer.sendall(b"G")
            time.sleep(0.02)
    assert time.monotonic() - begun < 3


def test_a_connection_may_be_idle_for_longer_than_a_head_may_take(running: Running) -> None:
    connection = UnixConnection(running.path)
    for _ in range(2):
        connection.request("GET", "/sound")
        assert connection.getresponse().read() == b"0"
        time.sleep(0.5)
    assert len(running.server._acceptor._connections) == 1
    connection.close()


def test_an_idle_connection_ends(serve: Callable[..., Running]) -> None:
    running = serve(Bounds(idle_seconds=0.1))
    assert speak(running.path, b"", end=False, timeout=5) == b""


def test_a_body_that_stops_is_cut_off(running: Running) -> None:
    begun = time.monotonic()
    assert statuses(speak(running.path, post("Content-Length: 9", body=b"a"), end=False)) == [400]
    assert time.monotonic() - begun < 3


def test_a_body_in_crumbs_is_cut_off(running: Running) -> None:
    crumbs = post("Transfer-Encoding: chunked", body=b"1\r\na\r\n" * 200 + b"0\r\n\r\n")
    assert statuses(speak(running.path, crumbs)) == [400]
    pieces = post("Transfer-Encoding: chunked", body=(b"80\r\n" + b"a" * 128 + b"\r\n") * 200)
    assert statuses(speak(running.path, pieces + b"0\r\n\r\n")) == [200]


def test_a_peer_that_never_reads_loses_its_connection(running: Running) -> None:
    with connect(running.path) as peer:
        peer.sendall(b"GET /large HTTP/1.1\r\nHost: g\r\n\r\n")
        time.sleep(1)
        received = 0
        while piece := peer.recv(1 << 20):
            received += len(piece)
    assert received < LARGE
    assert running.failures == []


def test_more_connections_than_allowed_are_closed_at_once(running: Running) -> None:
    with contextlib.ExitStack() as stack:
        peers = [stack.enter_context(connect(running.path)) for _ in range(BOUNDS.connections)]
        for peer in peers:
            peer.sendall(SOUND)
            assert statuses(peer.recv(1000)) == [200]
        assert speak(running.path, b"", end=False) == b""
        peers[0].close()
        end = time.monotonic() + 5
        while not running.is_well():
            assert time.monotonic() < end


def test_a_peer_of_another_uid_is_not_served(serve: Callable[..., Running], echo: Echo) -> None:
    running = serve(peer_uid=os.geteuid() + 1)
    assert speak(running.path, SOUND) == b""
    assert echo.seen == []


def test_what_the_handler_raises_is_told_and_answered_with_500(running: Running) -> None:
    assert statuses(speak(running.path, SOUND.replace(b"/sound", b"/bug") + SOUND)) == [500]
    assert [str(failure) for failure in running.failures] == ["a disk that fails"]
    assert running.is_well()


@pytest.mark.parametrize(("target", "body"), [("/file", b"content"), ("/empty", b"")])
def test_a_file_is_sent_whole(target: str, body: bytes, running: Running) -> None:
    answers = speak(running.path, f"GET {target} HTTP/1.1\r\nHost: g\r\n\r\n".encode() + SOUND)
    assert statuses(answers) == [200, 200]
    assert answers.split(b"\r\n\r\n")[1].startswith(body)
    assert running.failures == []


def test_a_file_that_turns_out_short_ends_the_connection(running: Running) -> None:
    answers = speak(running.path, b"GET /short HTTP/1.1\r\nHost: g\r\n\r\n" + SOUND)
    assert statuses(answers) == [200]
    assert answers.endswith(b"content")


def test_no_content_has_no_length(running: Running) -> None:
    answers = speak(running.path, b"GET /nothing HTTP/1.1\r\nHost: g\r\n\r\n" + SOUND)
    assert statuses(answers) == [204, 200]
    assert b"content-length" not in answers.split(b"\r\n\r\n")[0].lower()


def test_close_ends_idle_half_read_and_stuck_connections_in_time(
    running: Running, echo: Echo
) -> None:
    before = threading.active_count()
    with contextlib.ExitStack() as stack:
        idle, half, body, deaf = (stack.enter_context(connect(running.path)) for _ in range(4))
        half.sendall(b"GET / HT")
        body.sendall(post("Content-Length: 5", body=b"a"))
        deaf.sendall(b"GET /large HTTP/1.1\r\nHost: g\r\n\r\n")
        time.sleep(0.1)
        begun = time.monotonic()
        running.server.close()
        assert time.monotonic() - begun < BOUNDS.close_seconds / 2
        assert threading.active_count() < before
        assert idle.recv(10) == b""
    running.server.close()


def test_close_does_not_wait_for_ever_for_a_handler(running: Running, echo: Echo) -> None:
    with connect(running.path) as peer:
        peer.sendall(b"GET /stuck HTTP/1.1\r\nHost: g\r\n\r\n")
        while not echo.seen:
            time.sleep(0.01)
        begun = time.monotonic()
        running.server.close()
        assert time.monotonic() - begun < BOUNDS.close_seconds + 1
        assert peer.recv(10) == b""


def test_accepting_goes_on_after_it_failed(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures = iter([OSError(24, "too many open files")] * 3)

    class Flaky:
        def __init__(self, listener: socket.socket) -> None:
            self._listener = listener

        def __getattr__(self, name: str) -> object:
            return getattr(self._listener, name)

        def accept(self) -> object:
            if (error := next(failures, None)) is not None:
                raise error
            return self._listener.accept()

    monkeypatch.setattr(running.server._acceptor, "_listener", Flaky(running.listener))
    assert running.is_well()
    assert running.is_well()
    assert next(failures, None) is None


def test_accepting_goes_on_when_a_thread_could_not_be_started(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", start)
        assert speak(running.path, b"", end=False) == b""
    assert running.is_well()


def test_a_response_lets_go_of_its_file() -> None:
    file = io.BytesIO(b"x")
    Response(200, {}, file).close()
    assert file.closed


PIECES = [
    b"GET", b"POST", b" ", b"/", b"/large", b" HTTP/1.1", b"\r\n", b"\n", b"\r", b"\0", b":",
    b"Host: g\r\n", b"Content-Length: 5\r\n", b"Content-Length: 0\r\n", b"Expect: 100-continue\r\n",
    b"Transfer-Encoding: chunked\r\n", b"Connection: close\r\n", b"Upgrade: x\r\n", b"\r\n\r\n",
    b"5\r\nabcde\r\n", b"0\r\n\r\n", b"abcde", b"\xff", b"CONNECT a:1 HTTP/1.1\r\nHost: g\r\n\r\n",
    SOUND, post("Content-Length: 5", body=b"abcde"),
]  # fmt: skip


@settings(
    max_examples=300,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    st.one_of(
        st.binary(max_size=400),
        st.lists(st.one_of(st.sampled_from(PIECES), st.binary(max_size=4)), max_size=12).map(
            b"".join
        ),
    )
)
def test_no_bytes_harm_the_server(running: Running, data: bytes) -> None:
    speak(running.path, data)
    assert running.is_well()
    assert running.failures == []
