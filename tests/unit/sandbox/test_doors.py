"""Keys to doors, and what they lead to."""

import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from sandbox import doors, sockets
from sandbox.doors import Key, connect, hidden


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Of one sandbox, with a path that no Unix address could hold."""
    directory = tmp_path / ("x" * 100)
    (directory / "guest" / "door").mkdir(parents=True)
    return directory


@pytest.fixture
def door(place: Path) -> Path:
    return place / "guest" / "door"


@pytest.fixture
def links(tmp_path: Path) -> Path:
    return tmp_path / "gateway" / "doors"


def listen(door: Path, name: str = "gateway") -> socket.socket:
    return sockets.listen(door, f"{name}.sock", peer_uid=os.geteuid())


def test_a_key_leads_to_each_socket_of_its_door(door: Path, links: Path) -> None:
    key = Key.to(door, links)
    for name in doors.NAMES:
        with listen(door, name) as listener, connect(links, hidden(key.secret), name) as peer:
            heard, _ = listener.accept()
            with heard:
                peer.sendall(name.encode())
                assert heard.recv(100) == name.encode()


def test_every_key_is_another_one_and_opens_the_same(door: Path, links: Path) -> None:
    one, two = (Key.to(door, links) for _ in range(2))
    assert one.secret != two.secret
    one.revoke()
    with listen(door):
        connect(links, hidden(two.secret), "gateway").close()


def test_nothing_that_is_kept_or_shown_tells_the_key(door: Path, links: Path) -> None:
    key = Key.to(door, links)
    assert key.secret not in repr(key)
    assert os.listdir(links) == [hidden(key.secret)]
    assert links.stat().st_mode & 0o777 == 0o700


def test_a_key_that_was_revoked_opens_nothing(door: Path, links: Path) -> None:
    key = Key.to(door, links)
    key.revoke()
    key.revoke()
    with listen(door), pytest.raises(FileNotFoundError):
        connect(links, hidden(key.secret), "gateway")


def test_a_door_may_be_made_after_its_key(place: Path, door: Path, links: Path) -> None:
    shutil.rmtree(place / "guest")
    key = Key.to(door, links)
    assert doors.sweep(links) == 0
    door.mkdir(parents=True)
    with listen(door):
        connect(links, hidden(key.secret), "gateway").close()


def a_file(door: Path) -> None:
    (door / "gateway.sock").touch()


def a_datagram_socket(door: Path) -> None:
    fd = os.open(door, os.O_PATH)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as left:
        left.bind(f"/proc/self/fd/{fd}/gateway.sock")
    os.close(fd)


def a_socket_of_a_dead_runner(door: Path) -> None:
    listen(door).close()


def nothing_at_all(door: Path) -> None:
    shutil.rmtree(door)


def a_loop(door: Path) -> None:
    door.rmdir()
    door.symlink_to(door)


def a_file_for_a_door(door: Path) -> None:
    door.rmdir()
    door.touch()


def a_fifo_for_a_door(door: Path) -> None:
    door.rmdir()
    os.mkfifo(door)


@pytest.mark.parametrize(
    "odd",
    [a_file, a_datagram_socket, a_socket_of_a_dead_runner, nothing_at_all, a_loop,
     a_file_for_a_door, a_fifo_for_a_door],
)  # fmt: skip
def test_whatever_is_there_instead_of_a_socket_leads_nowhere_and_leaves_nothing_open(
    odd: Callable[[Path], None], door: Path, links: Path
) -> None:
    key = Key.to(door, links)
    odd(door)
    before = os.listdir("/proc/self/fd")
    with pytest.raises(OSError):
        connect(links, hidden(key.secret), "gateway")
    assert os.listdir("/proc/self/fd") == before


def test_a_runner_that_stands_still_keeps_nobody_waiting(door: Path, links: Path) -> None:
    key = Key.to(door, links)
    with sockets.listen(door, "outlet.sock", peer_uid=os.geteuid(), backlog=0):
        waiting = connect(links, hidden(key.secret), "outlet")
        with waiting, pytest.raises(BlockingIOError):
            connect(links, hidden(key.secret), "outlet")


def test_links_go_with_the_place_of_their_door(place: Path, door: Path, links: Path) -> None:
    gone, stays = Key.to(door, links), Key.to(links, links)
    (links / "no-link").touch()
    assert doors.sweep(links) == 0
    shutil.rmtree(place)
    assert doors.sweep(links) == 1
    assert (gone.link.is_symlink(), stays.link.is_symlink()) == (False, True)
    assert doors.sweep(links) == 0


def test_where_no_key_was_ever_made_nothing_is_swept(links: Path) -> None:
    assert doors.sweep(links) == 0
