"""One file comes out of a sandbox, whole, or nothing does."""

import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from sandbox.errors import SandboxFailed
from sandbox.outlet import Outlet

MOST_BYTES = 3 << 20
NAME = "outlet.sock"
Open = Callable[..., Outlet]


@pytest.fixture
def taken() -> bytearray:
    return bytearray()


@pytest.fixture
def opened(tmp_path: Path, taken: bytearray) -> Iterator[Open]:
    made: list[Outlet] = []

    def make(
        take: Callable[[memoryview], None] = taken.extend, *, peer_uid: int = os.geteuid()
    ) -> Outlet:
        outlet = Outlet(tmp_path, NAME, take, peer_uid=peer_uid, most_bytes=MOST_BYTES)
        made.append(outlet)
        return outlet

    yield make
    for outlet in made:
        outlet.close()


def connected(directory: Path) -> socket.socket:
    client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    client.settimeout(10)
    try:
        client.connect(str(directory / NAME))
    except OSError:
        client.close()
        raise
    return client


def send(directory: Path, data: bytes) -> None:
    """As the sandbox's first process does: to its end, and until the other side has all."""
    with connected(directory) as client:
        client.sendall(data)
        client.shutdown(socket.SHUT_WR)
        assert client.recv(1) == b""


@pytest.mark.parametrize("size", [1, 1 << 20, MOST_BYTES])
def test_a_file_arrives_whole(size: int, opened: Open, taken: bytearray, tmp_path: Path) -> None:
    outlet = opened()
    data = os.urandom(size)
    send(tmp_path, data)
    outlet.close()
    outlet.require_untroubled()
    outlet.require_whole()
    assert bytes(taken) == data


def test_an_empty_file_is_none(opened: Open, tmp_path: Path) -> None:
    outlet = opened()
    send(tmp_path, b"")
    outlet.close()
    outlet.require_untroubled()
    with pytest.raises(SandboxFailed, match="did not hand out"):
        outlet.require_whole()


def test_nobody_came(opened: Open) -> None:
    outlet = opened()
    outlet.close()
    outlet.close()
    with pytest.raises(SandboxFailed, match="did not hand out"):
        outlet.require_whole()


def test_an_endless_stream_ends_at_the_bound(
    opened: Open, taken: bytearray, tmp_path: Path
) -> None:
    outlet = opened()
    with connected(tmp_path) as client, pytest.raises(OSError):
        client.sendall(bytes(10 * MOST_BYTES))
    outlet.close()
    assert len(taken) <= MOST_BYTES
    for require in (outlet.require_untroubled, outlet.require_whole):
        with pytest.raises(SandboxFailed, match=f"more than {MOST_BYTES} bytes"):
            require()


def test_what_the_taker_raises_is_the_error(opened: Open, tmp_path: Path) -> None:
    def full(_: memoryview) -> None:
        raise ZeroDivisionError("full")

    outlet = opened(full)
    with suppress(OSError, AssertionError):
        send(tmp_path, b"data")
    outlet.close()
    with pytest.raises(ZeroDivisionError, match="full"):
        outlet.require_untroubled()


def test_whoever_comes_second_is_refused_at_once(
    opened: Open, taken: bytearray, tmp_path: Path
) -> None:
    outlet = opened()
    with connected(tmp_path) as first:
        first.sendall(b"first ")
        while not taken:
            pass  # now it was accepted
        with pytest.raises(ConnectionRefusedError):
            connected(tmp_path)
        first.sendall(b"and only")
    outlet.close()
    outlet.require_whole()
    assert bytes(taken) == b"first and only"


def test_it_answers_nothing(opened: Open, tmp_path: Path) -> None:
    opened()
    with connected(tmp_path) as client:
        client.sendall(b"GET / HTTP/1.1\r\n\r\n")
        client.settimeout(0.1)
        with pytest.raises(TimeoutError):
            client.recv(1)


def test_a_connection_that_sends_nothing_does_not_outlast_the_outlet(
    opened: Open, tmp_path: Path
) -> None:
    outlet = opened()
    with connected(tmp_path):
        closing = threading.Thread(target=outlet.close)
        closing.start()
        closing.join(5)
        assert not closing.is_alive()


@pytest.mark.root
def test_another_user_is_not_listened_to(opened: Open, taken: bytearray, tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can listen for somebody else: run as root too")
    outlet = opened(peer_uid=12345)
    with connected(tmp_path) as client, suppress(OSError):
        client.sendall(b"from root")
        client.recv(1)
    outlet.close()
    assert bytes(taken) == b""
    with pytest.raises(SandboxFailed, match="did not hand out"):
        outlet.require_whole()
