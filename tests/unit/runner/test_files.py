import errno
import os
from pathlib import Path
from typing import NoReturn

import pytest

from runner.errors import DiskExceeded, StateUnusable
from runner.files import Home, disk_full_is_a_limit, write_whole


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "f"
    write_whole(path, b"one")
    before = path.open("rb")
    write_whole(path, b"two", 0o600)
    with before:
        assert before.read() == b"one"  # a reader keeps what it opened
    assert path.read_bytes() == b"two"
    assert path.stat().st_mode & 0o777 == 0o600
    assert os.listdir(tmp_path) == ["f"]


@pytest.mark.parametrize(
    ("number", "raised"),
    [(errno.ENOSPC, DiskExceeded), (errno.EDQUOT, DiskExceeded), (errno.EIO, OSError)],
)
def test_what_could_not_be_written_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, raised: type[Exception]
) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"old")

    def full(fd: int) -> NoReturn:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(raised):
        write_whole(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["f"]


def test_an_interrupted_write_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(fd: int) -> NoReturn:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_whole(tmp_path / "f", b"x")
    assert os.listdir(tmp_path) == []


def test_a_full_disk_names_the_place() -> None:
    with (
        pytest.raises(DiskExceeded, match="/some/where"),
        disk_full_is_a_limit(Path("/some/where")),
    ):
        raise OSError(errno.ENOSPC, "full")


@pytest.mark.parametrize(
    ("uid", "environ", "data", "state"),
    [
        (7, {"HOME": "/h"}, "/h/.local/share/runner", "/h/.local/state/runner"),
        (7, {"XDG_DATA_HOME": "/d", "XDG_STATE_HOME": "/s"}, "/d/runner", "/s/runner"),
        (7, {}, "/nonexistent/.local/share/runner", "/nonexistent/.local/state/runner"),
        (7, {"HOME": ""}, "/nonexistent/.local/share/runner", "/nonexistent/.local/state/runner"),
        (0, {"HOME": "/root"}, "/var/lib/runner/data", "/var/lib/runner/state"),
        (0, {"XDG_DATA_HOME": "/d"}, "/d/runner", "/var/lib/runner/state"),
    ],
)  # fmt: skip
def test_places_follow_the_user(
    monkeypatch: pytest.MonkeyPatch, uid: int, environ: dict[str, str], data: str, state: str
) -> None:
    monkeypatch.setattr("os.geteuid", lambda: uid)
    assert Home.find(environ) == Home(Path(data), Path(state))


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    return Home(tmp_path / "data", tmp_path / "state")


def test_the_directories_are_made_and_builds_are_private(home: Home) -> None:
    home.prepare()
    home.prepare()
    for directory in (home.builders, home.base_images, home.builds, home.sandboxes):
        assert directory.is_dir()
    for private in (home.builds, home.gateway, home.doors):
        assert private.stat().st_mode & 0o777 == 0o700
    assert sorted(os.listdir(home.state)) == ["builds", "gateway", "sandboxes"]


def test_a_place_that_cannot_be_made_is_named(home: Home) -> None:
    home.data.touch()
    with pytest.raises(StateUnusable, match=str(home.data)):
        home.prepare()


def test_a_place_that_cannot_be_written_is_named(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(path: Path) -> NoReturn:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "touch", refused)
    with pytest.raises(StateUnusable, match="Permission denied"):
        home.prepare()


def test_a_full_disk_is_a_limit(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path) -> NoReturn:
        raise OSError(errno.ENOSPC, "full", str(path))

    monkeypatch.setattr(Path, "touch", full)
    with pytest.raises(DiskExceeded):
        home.prepare()


ONLY_ROOT = pytest.mark.skipif(
    os.geteuid() != 0, reason="only root has directories of root's: run as root"
)


@ONLY_ROOT
@pytest.mark.parametrize("closed", [True, False])
def test_as_root_a_sandbox_must_be_able_to_reach_the_places(tmp_path: Path, closed: bool) -> None:
    for part in (tmp_path, *tmp_path.parents):
        if not part.stat().st_mode & 0o001 and os.access(part, os.W_OK):
            part.chmod(0o711)
    (tmp_path / "x").mkdir(mode=0o700 if closed else 0o711)
    home = Home(tmp_path / "x/data", tmp_path / "x/state")
    if not closed:
        home.prepare()
        return
    with pytest.raises(StateUnusable, match="closed to other users"):
        home.prepare()


@ONLY_ROOT
def test_root_keeps_no_state_where_others_can_change_it(tmp_path: Path) -> None:
    for part in (tmp_path, *tmp_path.parents):
        if not part.stat().st_mode & 0o001:
            part.chmod(0o711)
    for name, uid, mode in (("theirs", 65534, 0o755), ("open", 0, 0o777)):
        (tmp_path / name).mkdir()
        (tmp_path / name).chmod(mode)
        os.chown(tmp_path / name, uid, uid)
        home = Home(tmp_path / name / "data", tmp_path / name / "state")
        with pytest.raises(StateUnusable, match="changed by others"):
            home.prepare()
