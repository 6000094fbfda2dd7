"""Places of sandboxes, as root in CI and as an ordinary user elsewhere."""

import os
import stat
import subprocess
from pathlib import Path

import pytest

from sandbox import processes
from sandbox.errors import SandboxFailed
from sandbox.local import place as localplace
from sandbox.local.place import reserve
from sandbox.locks import abandoned

UIDS = range(1_999_000_000, 1_999_000_002)
AS_ROOT = os.geteuid() == 0


@pytest.fixture(autouse=True)
def _own_uids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(localplace, "UIDS", tmp_path / "uids")


@pytest.fixture
def sandboxes(tmp_path: Path) -> Path:
    return tmp_path / "sandboxes"


def test_a_place_is_there_until_it_is_released(sandboxes: Path) -> None:
    reserved = reserve(sandboxes, "b", UIDS)
    for directory in (reserved.guest, reserved.door, reserved.bundle, reserved.runsc_state):
        assert directory.is_dir()
    assert reserved.peer_uid == (UIDS[0] if AS_ROOT else os.geteuid())
    assert list(abandoned(sandboxes)) == []
    reserved.release()
    assert list(sandboxes.iterdir()) == []
    reserved.release()


def test_a_place_is_closed_to_other_users(sandboxes: Path) -> None:
    reserved = reserve(sandboxes, "b", UIDS)
    file = reserved.guest / "file"
    file.touch()
    reserved.give(file, 0o440)
    assert stat.S_IMODE(file.stat().st_mode) == (0o440 if AS_ROOT else 0o400)
    assert file.stat().st_gid == (reserved.peer_uid if AS_ROOT else os.getegid())
    for path in (reserved.guest, reserved.door, reserved.bundle, reserved.runsc_state):
        assert not path.stat().st_mode & 0o007
    reserved.release()


def test_a_name_is_reserved_once(sandboxes: Path) -> None:
    reserved = reserve(sandboxes, "b", UIDS)
    with pytest.raises(SandboxFailed):
        reserve(sandboxes, "b", UIDS)
    assert reserved.guest.is_dir()
    reserved.release()


@pytest.mark.skipif(not AS_ROOT, reason="only root has uids to give: run as root")
def test_every_sandbox_has_a_uid_of_its_own_while_there_are_any(sandboxes: Path) -> None:
    one, other = (reserve(sandboxes, name, UIDS) for name in "ab")
    assert {one.peer_uid, other.peer_uid} == set(UIDS)
    with pytest.raises(SandboxFailed, match="in use"):
        reserve(sandboxes, "c", UIDS)
    one.release()
    assert reserve(sandboxes, "c", UIDS).peer_uid == UIDS[0]


@pytest.mark.skipif(not AS_ROOT, reason="only root has uids to give: run as root")
def test_a_uid_that_a_process_still_has_is_not_given_again(
    sandboxes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = processes.Process(99999, 1, UIDS[0], {}, ())
    monkeypatch.setattr(processes, "alive", lambda: iter([left]))
    reserved = reserve(sandboxes, "b", UIDS)
    assert reserved.peer_uid == UIDS[1]
    reserved.release()


def test_what_a_killed_runner_left_is_abandoned(sandboxes: Path) -> None:
    assert list(abandoned(sandboxes)) == []
    held = reserve(sandboxes, "held", UIDS)
    killed = reserve(sandboxes, "killed", UIDS)
    killed._lock.release()  # as the kernel does when its holder dies
    (sandboxes / "half-made").mkdir()
    (sandboxes / "stray").touch()
    assert [path.name for path in abandoned(sandboxes)] == ["half-made", "killed", "stray"]
    held.release()
    killed.release()


@pytest.mark.skipif(not AS_ROOT, reason="only root can start what another user would: run as root")
def test_a_stranger_who_writes_our_option_is_neither_waited_for_nor_killed(
    sandboxes: Path,
) -> None:
    reserved = reserve(sandboxes, "b", UIDS)
    command = ["perl", "-e", "sleep 300", "--", f"--root={reserved.runsc_state}"]
    with subprocess.Popen(command, user=UIDS[1]) as stranger:
        try:
            reserved.release()
            assert stranger.poll() is None
            assert not reserved.directory.exists()
        finally:
            stranger.kill()


def test_what_runs_for_the_place_ends_with_it(sandboxes: Path) -> None:
    reserved = reserve(sandboxes, "b", UIDS)
    command = ["perl", "-e", "sleep 300", "--", f"--root={reserved.runsc_state}"]
    with subprocess.Popen(command, user=reserved.peer_uid if AS_ROOT else None) as own:
        reserved.release()
        assert own.wait(5) == -9


@pytest.mark.skipif(AS_ROOT, reason="as root the group is the sandbox's own: run as a user too")
def test_an_ordinary_users_group_sees_nothing(sandboxes: Path) -> None:
    reserved = reserve(sandboxes, "b", UIDS)
    file = reserved.guest / "token"
    file.touch()
    reserved.give(file, 0o440)
    assert not file.stat().st_mode & 0o077
    assert not reserved.directory.stat().st_mode & 0o077
    reserved.release()
