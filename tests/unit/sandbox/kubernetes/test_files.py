"""Files that go to a sandbox over its door, with real sockets."""

import hashlib
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sandbox.kubernetes import files
from sandbox.kubernetes.files import Files
from tests.support.firstprocess import take_files

Serve = Callable[..., Files]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    made: list[Files] = []

    def start(**paths: Path) -> Files:
        made.append(
            Files(
                tmp_path,
                peer_uid=os.geteuid(),
                data={"config/a": b"A\n", "config/empty": b""},
                paths={f"door/{name}": path for name, path in paths.items()},
            )
        )
        return made[-1]

    yield start
    for each in made:
        each.close()


def peer(door: Path) -> socket.socket:
    connected = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connected.settimeout(5)
    connected.connect(str(door / "files.sock"))
    return connected


def everything(connected: socket.socket) -> bytes:
    said = b""
    while data := connected.recv(1 << 16):
        said += data
    return said


def test_every_file_comes_with_its_digest(serve: Serve, tmp_path: Path) -> None:
    big = tmp_path / "big"
    big.write_bytes(os.urandom(3 << 20))
    serve(big=big)
    with peer(tmp_path) as it:
        found = take_files(it)
    assert found == {"config/a": b"A\n", "config/empty": b"", "door/big": big.read_bytes()}


def test_what_is_said_is_said_so(serve: Serve, tmp_path: Path) -> None:
    """As sandbox/guest/files.c reads it."""
    serve()
    digests = [hashlib.sha256(data).hexdigest().encode() for data in (b"A\n", b"")]
    expected = b"config/a 2\nA\n%b\nconfig/empty 0\n%b\n.\n" % tuple(digests)
    with peer(tmp_path) as it:
        assert it.makefile("rb").read(len(expected)) == expected


def test_who_broke_off_may_ask_again(serve: Serve, tmp_path: Path) -> None:
    big = tmp_path / "big"
    big.write_bytes(b"x" * (8 << 20))
    serve(big=big)
    for taken in (0, 1, 100, 1 << 20):
        with peer(tmp_path) as it:
            left = taken
            while left > 0:
                left -= len(it.recv(left))
    with peer(tmp_path) as it:
        assert take_files(it)["door/big"] == big.read_bytes()


def test_a_file_that_became_shorter_is_not_made_up(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "short"
    path.write_bytes(b"x")
    each = Files._each

    def longer(self: Files) -> Iterator[tuple[str, int, object]]:
        for name, size, file in each(self):
            yield name, size + (name == "door/short"), file

    monkeypatch.setattr(Files, "_each", longer)
    serve(short=path)
    with peer(tmp_path) as it:
        assert everything(it).endswith(b"door/short 2\nx")


def test_a_file_that_grows_is_as_long_as_was_said(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "long"
    path.write_bytes(b"xy")
    each = Files._each

    def shorter(self: Files) -> Iterator[tuple[str, int, object]]:
        for name, size, file in each(self):
            yield name, size - (name == "door/long"), file

    monkeypatch.setattr(Files, "_each", shorter)
    serve(long=path)
    with peer(tmp_path) as it:
        assert take_files(it)["door/long"] == b"x"


def test_a_file_that_is_not_there_ends_the_connection(serve: Serve, tmp_path: Path) -> None:
    serve(gone=tmp_path / "gone")
    with peer(tmp_path) as it:
        assert b"gone" not in everything(it)


def test_who_takes_nothing_does_not_keep_it_open(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_STALL_SECONDS", 0.1)
    big = tmp_path / "big"
    big.write_bytes(b"x" * (8 << 20))
    serve(big=big)
    with peer(tmp_path), peer(tmp_path) as it:
        assert take_files(it)["config/a"] == b"A\n"


@pytest.mark.parametrize("count", [0, 1, 4])
def test_it_is_closed_by_anybody_whatever_is_under_way(
    serve: Serve, tmp_path: Path, count: int
) -> None:
    big = tmp_path / "big"
    big.write_bytes(b"x" * (8 << 20))
    made = serve(big=big)
    peers = [peer(tmp_path) for _ in range(count)]
    for it in peers[:1]:
        it.recv(1)
    closing = threading.Thread(target=made.close)
    closing.start()
    closing.join(5)
    assert not closing.is_alive()
    made.close()
    for it in peers:
        it.close()


def test_nobody_else_may_connect(serve: Serve, tmp_path: Path) -> None:
    serve()
    assert (tmp_path / "files.sock").stat().st_mode & 0o777 == 0o600
