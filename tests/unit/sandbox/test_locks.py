import os
from pathlib import Path

import pytest

from sandbox.locks import Lock, abandoned, make_locked


def test_a_lock_is_held_once_and_given_back(tmp_path: Path) -> None:
    lock = Lock(tmp_path / "lock")
    with pytest.raises(BlockingIOError):
        Lock(tmp_path / "lock")
    lock.release()
    lock.release()
    Lock(tmp_path / "lock").release()


def test_a_lock_never_follows_a_link(tmp_path: Path) -> None:
    (tmp_path / "lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic links"):
        Lock(tmp_path / "lock")
    assert not (tmp_path / "elsewhere").exists()


def test_a_directory_is_locked_from_its_first_moment(tmp_path: Path) -> None:
    lock = make_locked(tmp_path / "a")
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o700
    assert list(abandoned(tmp_path)) == []
    lock.release()
    assert list(abandoned(tmp_path)) == [tmp_path / "a"]


def test_what_is_being_made_is_left_alone_for_a_while(tmp_path: Path) -> None:
    new = tmp_path / ".new-a"
    new.mkdir()
    assert list(abandoned(tmp_path)) == []
    os.utime(new, (1, 1))
    assert list(abandoned(tmp_path)) == [new]


def test_an_abandoned_directory_is_locked_while_it_is_looked_at(tmp_path: Path) -> None:
    make_locked(tmp_path / "a").release()
    for directory in abandoned(tmp_path):
        with pytest.raises(BlockingIOError):
            Lock(directory / "lock")
    Lock(tmp_path / "a" / "lock").release()


def test_where_nothing_is_nothing_was_abandoned(tmp_path: Path) -> None:
    assert list(abandoned(tmp_path / "none")) == []
