import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from sandbox import processes
from sandbox.processes import (
    Process,
    descendants,
    host_view,
    kill,
    kill_all,
    memory_bytes,
    read,
    role_of,
)

NESTED = "sh -c 'sleep 300 & echo $!; wait' & wait"


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "300"]) as process:
        yield process
        process.kill()


def found(pid: int) -> processes.Process:
    process = read(pid)
    assert process is not None
    return process


def test_a_process_is_read_as_it_is() -> None:
    me = found(os.getpid())
    assert (me.parent, me.uid) == (os.getppid(), os.getuid())
    assert me.argv
    assert read(2**22 + 1) is None


def test_only_what_belongs_is_killed(sleeper: subprocess.Popen[bytes]) -> None:
    with subprocess.Popen(["sleep", "301"]) as other:
        assert kill_all(lambda process: process.pid == other.pid)
        assert other.wait() == -9
    assert sleeper.poll() is None


def test_what_a_victim_started_is_below_it() -> None:
    with subprocess.Popen(["sh", "-c", NESTED], stdout=subprocess.PIPE) as top:
        assert top.stdout is not None
        grandchild = int(top.stdout.readline())
        below = {process.pid for process in descendants(top.pid)}
        assert {top.pid, grandchild} <= below
        assert os.getpid() not in below
        assert kill_all(lambda process: process.pid in below)
    assert descendants(top.pid) == []


def test_a_number_that_another_process_got_is_left_alone(
    sleeper: subprocess.Popen[bytes],
) -> None:
    while found(sleeper.pid).argv[:1] != ("sleep",):
        pass
    kill(replace(found(sleeper.pid), started="1"))
    with pytest.raises(subprocess.TimeoutExpired):
        sleeper.wait(0.1)
    kill(found(sleeper.pid))
    assert sleeper.wait(5) == -9


def test_a_process_that_is_gone_is_no_error(sleeper: subprocess.Popen[bytes]) -> None:
    before = found(sleeper.pid)
    sleeper.kill()
    sleeper.wait()
    kill(before)


def test_who_does_not_end_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "kill", lambda process: None)
    me = os.getpid()
    assert not kill_all(lambda process: process.pid == me, within_seconds=0.02)


def test_the_hosts_view_lists_processes_of_the_executable_alone(
    sleeper: subprocess.Popen[bytes],
) -> None:
    while found(sleeper.pid).argv[:1] != ("sleep",):
        pass
    sleep = Path(f"/proc/{sleeper.pid}/exe").resolve()
    (seen,) = host_view(os.getpid(), sleep)
    assert (seen.role, seen.uid) == ("launcher", os.getuid())
    assert seen.initial_user_namespace
    assert host_view(sleeper.pid, Path(sys.executable)) == []


def test_usage_of_a_tree_is_measured() -> None:
    me = descendants(os.getpid())
    assert memory_bytes(me) > 1 << 20
    assert processes.cpu_seconds(me) > 0
    assert memory_bytes([]) == 0


@pytest.mark.parametrize(
    ("argv", "role"),
    [
        (("runsc-sandbox", "--root=/x"), "sandbox"),
        (("runsc-gofer",), "gofer"),
        ((), "application"),
        (("/run/runner/init", "/run/runner/plan"), "application"),
        (("containerd-shim-kata-v2", "-id", "c"), "launcher"),
        (("qemu-system-x86_64",), "launcher"),
    ],
)
def test_a_role_is_by_what_a_process_calls_itself(argv: tuple[str, ...], role: str) -> None:
    assert role_of(Process(1, 0, 0, {}, argv)) == role
