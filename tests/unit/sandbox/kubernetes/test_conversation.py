"""The conversation over a door, with real sockets and whoever wants to disturb it."""

import itertools
import os
import queue
import resource
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox.errors import SandboxFailed
from sandbox.kubernetes import conversation
from sandbox.kubernetes.conversation import FRAME_BYTES, Conversation
from tests.support.firstprocess import frame

NONCE = "0f" * 16
AGAIN = f"runner-again 1 nonce={NONCE}\n".encode()


@pytest.fixture
def talk(tmp_path: Path) -> Iterator[Conversation]:
    made = Conversation(tmp_path, peer_uid=os.geteuid(), nonce=NONCE)
    yield made
    made.dispose()


class Peer(socket.socket):
    """A sandbox that has come."""

    def __init__(self, door: Path) -> None:
        super().__init__(socket.AF_UNIX, socket.SOCK_STREAM)
        self.settimeout(5)
        self.connect(str(door / "host.sock"))

    def hears(self) -> bytes:
        with self.makefile("rb") as stream:
            return stream.readline()


def released(talk: Conversation, door: Path) -> Peer:
    peer = Peer(door)
    assert talk.begin(1)
    talk.write(b"release\n")
    assert peer.hears() == b"release\n"
    return peer


class Reader(threading.Thread):
    """Reads to the end, as a supervised sandbox does."""

    def __init__(self, talk: Conversation) -> None:
        super().__init__()
        self.talk = talk
        self.pieces: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self.error: Exception | None = None
        self.start()

    def run(self) -> None:
        try:
            while data := self.talk.read():
                self.pieces.put(data)
        except SandboxFailed as error:
            self.error = error

    def ended(self) -> bytes:
        """All of it."""
        self.join(10)
        assert not self.is_alive()
        return b"".join(self.pieces.get() for _ in range(self.pieces.qsize()))


# -- before the release ----------------------------------------------------------------------------


def test_nobody_came_yet(talk: Conversation) -> None:
    assert not talk.begin(0.05)


def test_what_comes_before_the_release_is_read_as_it_comes(
    talk: Conversation, tmp_path: Path
) -> None:
    with Peer(tmp_path) as peer:
        assert talk.begin(1)
        assert talk.begin(0)
        peer.sendall(b"runner-")
        assert talk.read() == b"runner-"
        peer.sendall(b"canary\n")
        assert talk.read() == b"canary\n"


def test_half_a_canary_is_ended_by_whoever_comes_again(talk: Conversation, tmp_path: Path) -> None:
    with Peer(tmp_path) as peer:
        assert talk.begin(1)
        peer.sendall(b"half")
        assert talk.read() == b"half"
    with Peer(tmp_path) as peer:
        peer.sendall(b"whole\n")
        assert talk.read() == b"\n"
        assert talk.read() == b"whole\n"


def test_who_is_gone_cannot_be_released(talk: Conversation, tmp_path: Path) -> None:
    Peer(tmp_path).close()
    assert talk.begin(1)
    with pytest.raises(BrokenPipeError):
        talk.write(b"release\n")


# -- frames ----------------------------------------------------------------------------------------


def test_an_end_is_answered(talk: Conversation, tmp_path: Path) -> None:
    with released(talk, tmp_path) as peer:
        reader = Reader(talk)
        peer.sendall(frame(b"one") + frame(b"two") + frame(b""))
        assert peer.hears() == b"done\n"
        assert reader.ended() == b"onetwo"


def test_a_frame_that_is_too_long_ends_it(talk: Conversation, tmp_path: Path) -> None:
    with released(talk, tmp_path) as peer:
        reader = Reader(talk)
        peer.sendall(frame(b"x" * FRAME_BYTES))
        peer.sendall(struct.pack(">I", FRAME_BYTES + 1))
        assert len(reader.ended()) == FRAME_BYTES
        assert isinstance(reader.error, SandboxFailed)


@given(
    pieces=st.lists(st.binary(min_size=1, max_size=40), max_size=6),
    cuts=st.lists(st.integers(0, 300), max_size=6),
)
def test_frames_are_put_together_wherever_they_are_cut(
    pieces: list[bytes], cuts: list[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    door = tmp_path_factory.mktemp("door")
    talk = Conversation(door, peer_uid=os.geteuid(), nonce=NONCE)
    try:
        with released(talk, door) as peer:
            reader = Reader(talk)
            stream = b"".join(map(frame, [*pieces, b""]))
            bounds = sorted({0, len(stream), *(cut % len(stream) for cut in cuts)})
            for start, end in itertools.pairwise(bounds):
                peer.sendall(stream[start:end])
            assert peer.hears() == b"done\n"
            assert reader.ended() == b"".join(pieces)
    finally:
        talk.dispose()


# -- breaks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", range(1, 12))
def test_what_broke_anywhere_is_gone_on_with_from_the_last_whole_frame(
    talk: Conversation, tmp_path: Path, cut: int
) -> None:
    stream = frame(b"abc") + frame(b"d")
    with released(talk, tmp_path) as peer:
        reader = Reader(talk)
        peer.sendall(stream[:cut])
    with Peer(tmp_path) as peer:
        peer.sendall(AGAIN)
        offset = int(peer.hears().removeprefix(b"from "))
        assert offset == (3 if cut >= 7 else 0)
        peer.sendall(frame(b"abcd"[offset:]) + frame(b""))
        assert peer.hears() == b"done\n"
    assert reader.ended() == b"abcd"


def test_a_break_before_done_is_asked_for_once_more(talk: Conversation, tmp_path: Path) -> None:
    with released(talk, tmp_path) as peer:
        reader = Reader(talk)
        peer.sendall(frame(b"abc"))
    for _ in range(3):
        with Peer(tmp_path) as peer:
            peer.sendall(AGAIN)
            assert peer.hears() == b"from 3\n"
    with Peer(tmp_path) as peer:
        peer.sendall(AGAIN)
        assert peer.hears() == b"from 3\n"
        peer.sendall(frame(b""))
        assert peer.hears() == b"done\n"
    assert reader.ended() == b"abc"


def test_a_second_sandbox_that_wants_in_waits_and_is_turned_away(
    talk: Conversation, tmp_path: Path
) -> None:
    with released(talk, tmp_path) as peer, Peer(tmp_path) as other:
        reader = Reader(talk)
        other.sendall(b"runner-again 1 nonce=00\n")
        peer.sendall(frame(b"ours"))
        assert reader.pieces.get(timeout=5) == b"ours"
        peer.shutdown(socket.SHUT_RDWR)
        assert other.hears() == b""
        with Peer(tmp_path) as again:
            again.sendall(AGAIN)
            assert again.hears() == b"from 4\n"
            again.sendall(frame(b""))
            assert again.hears() == b"done\n"
        reader.ended()


@pytest.mark.parametrize(
    "said",
    [
        b"runner-again 1 nonce=" + b"0" * 32 + b"\n",
        b"runner-again 2 nonce=" + NONCE.encode() + b"\n",
        b"x" * 1000,
        b"\n",
        b"",
        AGAIN[:-1],
        b"\0" * 300,
        frame(b"runner-again"),
    ],
)
def test_whoever_does_not_know_the_nonce_is_not_listened_to(
    talk: Conversation, tmp_path: Path, said: bytes
) -> None:
    released(talk, tmp_path).close()
    reader = Reader(talk)
    with Peer(tmp_path) as stranger:
        stranger.sendall(said)
        stranger.shutdown(socket.SHUT_WR)
        with suppress(ConnectionResetError):
            assert stranger.hears() == b""
    with Peer(tmp_path) as peer:
        peer.sendall(AGAIN + frame(b"")[:2])
        assert peer.hears() == b"from 0\n"
        peer.sendall(frame(b"")[2:])
        assert peer.hears() == b"done\n"
    assert reader.ended() == b""


def test_who_says_nothing_is_not_waited_for_long(
    talk: Conversation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversation, "_SPEAK_SECONDS", 0.1)
    released(talk, tmp_path).close()
    reader = Reader(talk)
    with Peer(tmp_path) as silent, Peer(tmp_path) as peer:
        peer.sendall(AGAIN)
        assert peer.hears() == b"from 0\n"
        assert silent.hears() == b""
        peer.sendall(frame(b""))
        assert peer.hears() == b"done\n"
    reader.ended()


def test_a_sandbox_that_does_not_come_again_is_given_up(
    talk: Conversation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversation, "PATIENCE_SECONDS", 0.1)
    released(talk, tmp_path).close()
    assert Reader(talk).ended() == b""


# -- the end ---------------------------------------------------------------------------------------


def test_of_a_sandbox_that_is_gone_what_it_said_may_still_come(
    talk: Conversation, tmp_path: Path
) -> None:
    with released(talk, tmp_path) as peer:
        talk.no_more()
        reader = Reader(talk)
        peer.sendall(frame(b"late"))
        assert reader.ended() == b"late"  # though it never says that this was all


def test_of_a_sandbox_that_is_gone_nobody_is_waited_for(talk: Conversation, tmp_path: Path) -> None:
    released(talk, tmp_path).close()
    talk.no_more()
    talk.no_more()
    began = time.monotonic()
    assert Reader(talk).ended() == b""
    assert time.monotonic() - began < 1.5


@pytest.mark.parametrize("is_connected", [True, False])
def test_it_may_be_closed_by_anybody_while_somebody_reads(
    talk: Conversation, tmp_path: Path, is_connected: bool
) -> None:
    peer = released(talk, tmp_path)
    if not is_connected:
        peer.close()
    reader = Reader(talk)
    time.sleep(0.05)
    talk.close()
    talk.close()
    assert reader.ended() == b""
    peer.close()


@pytest.fixture
def many_files() -> Iterator[None]:
    """Open already, when something else is opened."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 1200:
        pytest.skip("no more than 1200 files may be open")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 1200), hard))
    many = [os.open("/dev/null", os.O_RDONLY) for _ in range(1050)]
    yield
    for each in many:
        os.close(each)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.usefixtures("many_files")
def test_who_has_many_files_open_can_still_talk(tmp_path: Path) -> None:
    """select(2) takes no descriptor above 1023, and a server has more."""
    talk = Conversation(tmp_path, peer_uid=os.geteuid(), nonce=NONCE)
    try:
        with Peer(tmp_path) as peer:
            assert talk.begin(1)
            peer.sendall(b"x")
            assert talk.read() == b"x"
    finally:
        talk.dispose()
