"""Processes as ``/proc`` shows them: which belong to a sandbox, and what they may do."""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from builder.model import RUNNER
from sandbox.model import HostProcess

PROC = Path("/proc")
FIRST_PROCESS = f"{RUNNER}/init"
APPLICATION = "application"
"""Role of a process that runs what is inside: our own first one where the host shows it, or a stub
that the Sentry traces."""
UNREADABLE = "unreadable"
"""Role of a process that the host does not let us look at."""


@dataclass(frozen=True, slots=True)
class Process:
    """One process at one moment."""

    pid: int
    parent: int
    uid: int
    status: dict[str, str]
    argv: tuple[str, ...]
    started: str = ""
    """In clock ticks since the host's start: tells a process from a later one of its number."""


def read(pid: int) -> Process | None:
    """The process, or None when it is gone or not ours to see."""
    try:
        lines = (PROC / str(pid) / "status").read_text(errors="replace").splitlines()
        argv = (PROC / str(pid) / "cmdline").read_bytes()
        started = _stat(pid)[19]
    except (OSError, IndexError):
        return None
    status = {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}
    words = tuple(os.fsdecode(word) for word in argv.rstrip(b"\0").split(b"\0")) if argv else ()
    uid = int(status["Uid"].split()[0])
    return Process(pid, int(status["PPid"]), uid, status, words, started)


def _stat(pid: int) -> list[str]:
    """The fields of ``/proc/PID/stat`` from the third on: the second may hold anything."""
    return (PROC / str(pid) / "stat").read_text(errors="replace").rpartition(")")[2].split()


def alive() -> Iterator[Process]:
    """Every process that is no zombie."""
    for entry in PROC.iterdir():
        process = read(int(entry.name)) if entry.name.isdigit() else None
        if process is not None and not process.status.get("State", "").startswith(("Z", "X")):
            yield process


def descendants(root: int) -> list[Process]:
    """``root`` and everything below it, without looking at the host's other processes."""
    found: dict[int, Process] = {}
    pending = [root]
    while pending:
        pid = pending.pop()
        process = read(pid)
        if process is None or pid in found or process.status.get("State", "")[:1] in {"Z", "X"}:
            continue
        found[pid] = process
        with contextlib.suppress(OSError):
            for task in (PROC / str(pid) / "task").iterdir():
                pending += map(int, (task / "children").read_text().split())
    return list(found.values())


def kill_all(belongs: Callable[[Process], bool], *, within_seconds: float = 10.0) -> bool:
    """Kills every process that ``belongs``, and what these start meanwhile.

    Returns:
        Whether none was left.
    """
    deadline = time.monotonic() + within_seconds
    while victims := [process for process in alive() if belongs(process)]:
        if time.monotonic() > deadline:
            return False
        for victim in victims:
            kill(victim)
        time.sleep(0.01)
    return True


def kill(process: Process) -> None:
    """Kills just this process, never another that got its number since."""
    try:
        handle = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return
    try:
        now = read(process.pid)
        if now is not None and now.started == process.started:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                signal.pidfd_send_signal(handle, signal.SIGKILL)
    finally:
        os.close(handle)


def host_view(root: int, executable: Path) -> list[HostProcess]:
    """The processes below ``root`` that run ``executable``, as evidence.

    Args:
        root: Process id of the launcher.
        executable: The runtime's file; a process of any other file is not listed.
    """
    wanted = executable.stat()
    view = []
    for process in descendants(root):
        try:
            file = (PROC / str(process.pid) / "exe").stat()
        except PermissionError:
            role = UNREADABLE
        except OSError:  # gone meanwhile
            continue
        else:
            if not os.path.samestat(file, wanted):
                continue
            role = role_of(process)
        view.append(as_evidence(process, role))
    return sorted(set(view), key=lambda process: process.role)


def as_evidence(process: Process, role: str) -> HostProcess:
    """What the host shows of ``process``."""
    namespace, own = (_link(pid, "ns/user") for pid in (process.pid, os.getpid()))
    return HostProcess(
        role=role,
        uid=process.uid,
        capabilities=int(process.status.get("CapEff", "0"), 16),
        # What cannot be read counts as the worst, but only one namespace maps everybody to itself.
        initial_user_namespace=namespace == own or (not namespace and _maps_everybody(process.pid)),
        seccomp=int(process.status.get("Seccomp", "0")),
        no_new_privileges=process.status.get("NoNewPrivs") == "1",
    )


def _maps_everybody(pid: int) -> bool:
    try:
        return (PROC / str(pid) / "uid_map").read_text().split() == ["0", "0", "4294967295"]
    except OSError:
        return True


def role_of(process: Process) -> str:
    """By what it calls itself."""
    name = process.argv[0] if process.argv else ""
    roles = {"runsc-sandbox": "sandbox", "runsc-gofer": "gofer"}
    return roles.get(name, APPLICATION if name in {"", FIRST_PROCESS} else "launcher")


def _link(pid: int, name: str) -> str:
    try:
        return str((PROC / str(pid) / name).readlink())
    except OSError:
        return ""


def memory_bytes(members: Iterable[Process]) -> int:
    """What a sandbox without a cgroup uses: its memory files, and what its processes own.

    gVisor keeps all memory of the applications, and every file written in memory, in one
    memfd of the Sentry; the anonymous memory of the host processes comes on top.
    """
    files: dict[tuple[int, int], int] = {}
    anonymous = 0
    for process in members:
        anonymous += int(process.status.get("RssAnon", "0 kB").split()[0]) << 10
        if role_of(process) == "sandbox":
            files.update(_memory_files(process.pid))
    return anonymous + sum(files.values())


def _memory_files(pid: int) -> dict[tuple[int, int], int]:
    found = {}
    with contextlib.suppress(OSError):
        for entry in (PROC / str(pid) / "fd").iterdir():
            with contextlib.suppress(OSError):
                if str(entry.readlink()).startswith("/memfd:"):
                    status = entry.stat()
                    found[status.st_dev, status.st_ino] = status.st_blocks * 512
    return found


def cpu_seconds(members: Iterable[Process]) -> float:
    """Processor time of the members, their children that ended included."""
    ticks = 0
    for process in members:
        with contextlib.suppress(OSError):
            ticks += sum(int(field) for field in _stat(process.pid)[11:15])
    return ticks / os.sysconf("SC_CLK_TCK")
