"""Bytes between two sockets, plain or with TLS on one side, and how either side ends."""

import contextlib
import errno
import os
import socket
import ssl
import struct
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import pytest

from runner.gateway.relay import Between, Pipe, pipes, relay
from runner.gateway.tlspeer import TlsPeer, context
from tests.support.egress import certificate
from tests.support.port import SECONDS, everything, exchange, say_no_more, trusting

MIB = 1 << 20
Pair = Callable[[], tuple[Between, Between]]


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return certificate(tmp_path_factory.mktemp("keys"), "a.example")


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as made:
        yield made


@dataclass
class Ends:
    """The far ends of a relay: of a Unix socket, and of TCP."""

    runner: socket.socket
    pod: socket.socket
    over: Future[None]
    sent: list[int] = field(default_factory=list)
    received: list[int] = field(default_factory=list)


class Relays:
    """Starts relays."""

    def __init__(self, pool: ThreadPoolExecutor, stack: contextlib.ExitStack) -> None:
        self._pool = pool
        self._stack = stack

    def _sockets(self) -> Iterator[socket.socket]:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            tcp = socket.create_connection(listener.getsockname()), listener.accept()[0]
        for each in (*socket.socketpair(), *tcp):
            each.settimeout(SECONDS)
            yield self._stack.enter_context(each)

    def plain(self, between: Pair = pipes, idle_seconds: float = SECONDS) -> Ends:
        runner, inside, pod, outside = self._sockets()
        ends = Ends(runner, pod, Future())

        def serve() -> None:
            with inside, outside:
                relay(
                    inside, outside, sent=ends.sent.append, received=ends.received.append,
                    idle_seconds=idle_seconds, between=between,
                )  # fmt: skip

        ends.over = self._pool.submit(serve)
        return ends

    def tls(self, keys: tuple[Path, Path]) -> Ends:
        runner, inside, pod, outside = self._sockets()
        ends = Ends(runner, pod, Future())

        def serve() -> None:
            with inside, outside:
                peer = TlsPeer(outside, context(*keys))
                peer.greet()
                relay(
                    inside, outside, sent=ends.sent.append, received=ends.received.append,
                    idle_seconds=SECONDS, between=peer.between,
                )  # fmt: skip

        ends.over = self._pool.submit(serve)
        wrapped = trusting(keys[0]).wrap_socket(pod, suppress_ragged_eofs=False)
        ends.pod = self._stack.enter_context(wrapped)
        return ends


@pytest.fixture
def relays(pool: ThreadPoolExecutor) -> Iterator[Relays]:
    with contextlib.ExitStack() as stack:
        yield Relays(pool, stack)


@pytest.fixture(params=["plain", "tls"])
def ends(request: pytest.FixtureRequest, relays: Relays, keys: tuple[Path, Path]) -> Ends:
    return relays.tls(keys) if request.param == "tls" else relays.plain()


def receive(peer: socket.socket, size: int) -> bytes:
    received = bytearray()
    while len(received) < size:
        received += peer.recv(65536)
    return bytes(received)


def stop_sending(peer: socket.socket) -> None:
    if isinstance(peer, ssl.SSLSocket):
        say_no_more(peer)
    else:
        peer.shutdown(socket.SHUT_WR)


def test_all_of_it_comes_both_ways_at_once_and_is_counted(
    ends: Ends, pool: ThreadPoolExecutor
) -> None:
    there, back = os.urandom(5 * MIB), os.urandom(7 * MIB)
    speaking = pool.submit(exchange, ends.pod, there)
    sending = pool.submit(ends.runner.sendall, back)
    assert receive(ends.runner, len(there)) == there
    sending.result(SECONDS)
    ends.runner.shutdown(socket.SHUT_WR)
    assert speaking.result(SECONDS) == back
    stop_sending(ends.pod)
    assert everything(ends.runner) == b""
    ends.over.result(SECONDS)
    assert sum(ends.received) == len(there)
    assert len(back) <= sum(ends.sent) < len(back) * 1.01, "TLS wraps its records"


def test_who_stopped_sending_still_receives(ends: Ends) -> None:
    ends.pod.sendall(b"a question")
    stop_sending(ends.pod)
    assert everything(ends.runner) == b"a question"
    ends.runner.sendall(b"x" * 99)
    ends.runner.close()
    assert everything(ends.pod) == b"x" * 99
    ends.over.result(SECONDS)


def test_whom_nothing_more_is_sent_goes_on_sending(ends: Ends, pool: ThreadPoolExecutor) -> None:
    ends.runner.sendall(b"all there is")
    ends.runner.shutdown(socket.SHUT_WR)
    assert everything(ends.pod) == b"all there is"
    sending = pool.submit(ends.pod.sendall, b"y" * 3 * MIB)
    assert len(receive(ends.runner, 3 * MIB)) == 3 * MIB
    sending.result(SECONDS)
    stop_sending(ends.pod)
    assert everything(ends.runner) == b""
    ends.over.result(SECONDS)


def test_a_farewell_in_the_middle_of_what_comes_loses_nothing_of_it(
    ends: Ends, pool: ThreadPoolExecutor
) -> None:
    sending = pool.submit(ends.pod.sendall, b"z" * 8 * MIB)
    begin = receive(ends.runner, 1)
    ends.runner.shutdown(socket.SHUT_WR)
    assert len(begin + receive(ends.runner, 8 * MIB - len(begin))) == 8 * MIB
    sending.result(SECONDS)
    assert everything(ends.pod) == b""


def test_a_side_without_a_word_ends_both_ways_and_not_as_if_it_had_said_one(
    relays: Relays, keys: tuple[Path, Path]
) -> None:
    ends = relays.tls(keys)
    ends.pod.sendall(b"half of")
    assert ends.runner.recv(100) == b"half of"
    ends.pod.shutdown(socket.SHUT_WR)  # of TCP alone
    with pytest.raises(ConnectionResetError, match="did not say"):
        ends.over.result(SECONDS)
    assert ends.runner.recv(100) == b""
    with pytest.raises(BrokenPipeError):
        ends.runner.sendall(b"an answer")


def test_a_connection_that_is_reset_is_an_error(ends: Ends) -> None:
    ends.pod.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    ends.pod.close()
    with pytest.raises(OSError):
        ends.over.result(SECONDS)


def test_a_runner_that_is_gone_takes_the_connection_with_it(ends: Ends) -> None:
    ends.runner.close()
    ends.over.result(SECONDS)
    assert everything(ends.pod) == b""


def test_where_nothing_moves_the_connection_ends(relays: Relays) -> None:
    with pytest.raises(TimeoutError):
        relays.plain(idle_seconds=0.1).over.result(SECONDS)


class Refusing(Pipe):
    """Finds that nobody is there when it gives, as when that happens between poll and send."""

    error: type[OSError] = BrokenPipeError

    def give(self, sink: socket.socket) -> NoReturn:
        raise self.error


class Resetting(Refusing):
    error = ConnectionResetError


@pytest.mark.parametrize("kind", [Refusing, Resetting])
def test_what_a_unix_socket_said_before_it_closed_is_carried(
    kind: type[Refusing], relays: Relays
) -> None:
    ends = relays.plain(between=lambda: (Pipe(), kind()))
    ends.pod.sendall(b"an upload")
    ends.runner.sendall(b"too large")
    ends.runner.shutdown(socket.SHUT_WR)
    assert everything(ends.pod) == b"too large"
    ends.over.result(SECONDS)


def test_a_tcp_side_that_is_gone_has_said_nothing_that_counts(relays: Relays) -> None:
    ends = relays.plain(between=lambda: (Refusing(), Pipe()))
    ends.runner.sendall(b"an answer")
    with pytest.raises(BrokenPipeError):
        ends.over.result(SECONDS)


def test_where_descriptors_are_for_one_pipe_only_none_stays_open(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = os.listdir("/proc/self/fd")
    make = os.pipe2
    made: list[tuple[int, int]] = []

    def one(flags: int) -> tuple[int, int]:
        if made:
            raise OSError(errno.EMFILE, "too many")
        made.append(make(flags))
        return made[0]

    monkeypatch.setattr(os, "pipe2", one)
    with pytest.raises(OSError, match="too many"):
        pipes()
    assert os.listdir("/proc/self/fd") == before


# -- what a peer says before it is carried -------------------------------------------------------


@pytest.fixture
def met(
    pool: ThreadPoolExecutor, keys: tuple[Path, Path]
) -> Iterator[tuple[TlsPeer, ssl.SSLSocket]]:
    """A peer, and who is behind it."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        peer = TlsPeer(ours, context(*keys))
        greeting = pool.submit(peer.greet)
        with trusting(keys[0]).wrap_socket(theirs, suppress_ragged_eofs=False) as far:
            greeting.result(SECONDS)
            yield peer, far


Met = tuple[TlsPeer, ssl.SSLSocket]


def test_a_line_may_come_in_pieces_and_what_is_behind_it_is_kept(met: Met) -> None:
    peer, far = met
    for piece in (b"one", b" lin", b"e\nand more\n"):
        far.sendall(piece)
    assert peer.line(9) == b"one line\n"
    _, opening = peer.between()
    assert opening.size == 9


@pytest.mark.parametrize("said", [b"one line\n", b"one line, and no end of it", b"\0" * 99_999])
def test_a_line_that_is_too_long_is_none(said: bytes, met: Met) -> None:
    peer, far = met
    far.sendall(said)
    with pytest.raises(ConnectionAbortedError):
        peer.line(8)


def test_who_ends_before_the_line_does_has_said_none(met: Met) -> None:
    peer, far = met
    far.sendall(b"one")
    say_no_more(far)
    with pytest.raises(ConnectionAbortedError):
        peer.line(9)


def test_who_ends_without_a_farewell_has_said_none(met: Met) -> None:
    peer, far = met
    far.sendall(b"one")
    far.shutdown(socket.SHUT_WR)
    with pytest.raises(ConnectionResetError):
        peer.line(9)


def test_who_wants_answers_and_takes_no_data_is_ended(met: Met) -> None:
    peer, far = met
    peer._outgoing.write(bytes(20_000))  # as requests for new keys come to
    far.sendall(b"x")
    with pytest.raises(ConnectionAbortedError, match="nothing but answers"):
        peer.line(9)


def test_bytes_that_are_no_records_are_an_error(met: Met) -> None:
    peer, _ = met
    with pytest.raises(ssl.SSLError):
        peer.open(bytes(100))


def test_who_cannot_agree_hears_why(pool: ThreadPoolExecutor, keys: tuple[Path, Path]) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        greeting = pool.submit(TlsPeer(ours, context(*keys)).greet)
        old = trusting(keys[0])
        old.maximum_version = ssl.TLSVersion.TLSv1_2
        with pytest.raises(ssl.SSLError, match=r"(?i)alert.*version"):
            old.wrap_socket(theirs)
        with pytest.raises(ssl.SSLError):
            greeting.result(SECONDS)
