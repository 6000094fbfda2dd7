"""Limits by control groups, version 1 or 2, where this process may make them.

runsc is told to ignore cgroups: it puts no limits on one that exists before. So the group is
made and limited here, and the launcher enters it before it becomes runsc.
"""

import contextlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from policies.model import Limits
from sandbox.model import Ending
from sandbox.processes import Process, read

MOUNT = Path("/sys/fs/cgroup")
_V1_CONTROLLERS = ("memory", "cpu", "pids")
_PREFIX = "runner-"
_PERIOD_MICROSECONDS = 100_000


@dataclass(frozen=True, slots=True)
class Group:
    """One group per build: a directory under v2, one for each controller under v1."""

    version: int
    directories: tuple[Path, ...]

    @property
    def name(self) -> str:
        return f"cgroup v{self.version}"

    @property
    def procs(self) -> list[str]:
        """Files that a process writes its id into to enter."""
        return [str(directory / "cgroup.procs") for directory in self.directories]

    @classmethod
    def make(
        cls,
        name: str,
        limits: Limits,
        mount: Path = MOUNT,
        announce: Callable[[str], None] = lambda _: None,
    ) -> Self | None:
        """A new group with the limits set, or None where that is not allowed here.

        Args:
            name: Of the build.
            limits: Those that groups can keep.
            mount: Of the hierarchy, or of its controllers' directory.
            announce: Gets what ``recorded`` reads, before anything is made: a later process may be
                in other groups than this one and would not find ours.
        """
        version = 2 if (mount / "cgroup.controllers").exists() else 1
        parents = _v2_parent(mount) if version == 2 else _v1_parents(mount)  # noqa: PLR2004
        if not parents:
            return None
        group = cls(version, tuple(parent / f"{_PREFIX}{name}" for parent in parents))
        announce(json.dumps([version, *map(str, group.directories)]))
        try:
            for directory in group.directories:
                directory.mkdir(parents=True, exist_ok=True)
            group._limit(limits)
        except OSError:
            group.remove()
            return None
        return group

    @classmethod
    def recorded(cls, announced: str, mount: Path = MOUNT) -> Self:
        """The group that was announced, whatever is left of it. For ``gc``."""
        version, *directories = json.loads(announced)
        found = (Path(os.path.normpath(directory)) for directory in directories)
        ours = (p for p in found if p.name.startswith(_PREFIX) and p.is_relative_to(mount))
        return cls(int(version), tuple(ours))

    @classmethod
    def of(cls, pid: int, mount: Path = MOUNT) -> Self | None:
        """The group that somebody else made for a process, to be read only."""
        version = 2 if (mount / "cgroup.controllers").exists() else 1
        own = _groups_of(str(pid))
        if version == 2:  # noqa: PLR2004
            found = [mount / own[""]] if "" in own else []
        else:
            # Not cpu: what was used stands in the other one, and limits are not ours to set.
            names = [name for name in ("memory", "cpuacct", "pids") if name in own]
            found = [mount / name / own[name] for name in names]
        usable = len(found) == (1 if version == 2 else 3) and all(map(Path.is_dir, found))  # noqa: PLR2004
        return cls(version, tuple(found)) if usable else None

    def _limit(self, limits: Limits) -> None:
        quota = limits.cpu_millis * _PERIOD_MICROSECONDS // 1000
        if self.version == 2:  # noqa: PLR2004
            (directory,) = self.directories
            _write(directory / "memory.max", limits.memory_bytes)
            with contextlib.suppress(FileNotFoundError):
                _write(directory / "memory.swap.max", 0)
            with contextlib.suppress(FileNotFoundError):
                _write(directory / "memory.oom.group", 1)
            _write(directory / "cpu.max", f"{quota} {_PERIOD_MICROSECONDS}")
            _write(directory / "pids.max", limits.pids)
            return
        memory, cpu, pids = self.directories
        _write(memory / "memory.limit_in_bytes", limits.memory_bytes)
        with contextlib.suppress(FileNotFoundError):
            _write(memory / "memory.memsw.limit_in_bytes", limits.memory_bytes)
        _write(cpu / "cpu.cfs_period_us", _PERIOD_MICROSECONDS)
        _write(cpu / "cpu.cfs_quota_us", quota)
        _write(pids / "pids.max", limits.pids)

    def ending(self) -> Ending | None:
        """Which limit the kernel kept by ending something: a kill for memory, a refused task."""
        name = "memory.events" if self.version == 2 else "memory.oom_control"  # noqa: PLR2004
        if _counter(self.directories[0] / name, "oom_kill") > 0:
            return Ending.MEMORY
        if _counter(self.directories[-1] / "pids.events", "max") > 0:
            return Ending.PIDS
        return None

    def memory_peak_bytes(self) -> int:
        name = "memory.peak" if self.version == 2 else "memory.max_usage_in_bytes"  # noqa: PLR2004
        with contextlib.suppress(OSError, ValueError):
            return int((self.directories[0] / name).read_text())
        return 0

    def cpu_seconds(self) -> float | None:
        """Processor time of everything that was ever in here, or None where nobody counted."""
        cpu = self.directories[0 if self.version == 2 else 1]  # noqa: PLR2004
        if (microseconds := _counter(cpu / "cpu.stat", "usage_usec")) > 0:
            return microseconds / 1e6
        with contextlib.suppress(OSError, ValueError):  # where cpu and cpuacct are one hierarchy
            return int((cpu / "cpuacct.usage").read_text()) / 1e9
        return None

    def members(self) -> list[Process]:
        """Every process that is in here now."""
        found: set[int] = set()
        for path in self.procs:
            with contextlib.suppress(OSError, ValueError):
                found.update(int(line) for line in Path(path).read_text().split())
        return [process for pid in sorted(found) if (process := read(pid)) is not None]

    def remove(self, within_seconds: float = 5.0) -> None:
        """Removes the group; its processes must be gone or going."""
        deadline = time.monotonic() + within_seconds
        for directory in self.directories:
            while directory.exists():
                try:
                    directory.rmdir()
                except OSError:
                    if time.monotonic() > deadline:
                        break
                    time.sleep(0.02)


def _groups_of(process: str = "self") -> dict[str, str]:
    """Controller (or "" for version 2) to path."""
    try:
        lines = Path(f"/proc/{process}/cgroup").read_text().splitlines()
    except OSError:  # gone
        return {}
    groups = {}
    for line in lines:
        _, controllers, path = line.split(":", 2)
        for controller in controllers.split(","):
            groups[controller] = path.lstrip("/")
    return groups


def _v1_parents(mount: Path) -> list[Path]:
    own = _groups_of()
    parents = [mount / controller / own.get(controller, "") for controller in _V1_CONTROLLERS]
    return parents if all(os.access(parent, os.W_OK) for parent in parents) else []


def _v2_parent(mount: Path) -> list[Path]:
    """As root a group of ours below the root; else our own group, if it was delegated."""
    if os.access(mount, os.W_OK):
        parent = mount / "runner"
        with contextlib.suppress(OSError):
            _write(mount / "cgroup.subtree_control", "+memory +cpu +pids")
            parent.mkdir(exist_ok=True)
            _write(parent / "cgroup.subtree_control", "+memory +cpu +pids")
    else:
        parent = mount / _groups_of().get("", "")
        with contextlib.suppress(OSError):
            _write(parent / "cgroup.subtree_control", "+memory +cpu +pids")
    try:
        enabled = set((parent / "cgroup.subtree_control").read_text().split())
    except OSError:
        return []
    return [parent] if enabled >= set(_V1_CONTROLLERS) and os.access(parent, os.W_OK) else []


def _write(path: Path, value: int | str) -> None:
    # Not "w": where a file is missing, asking a control group to make it is not permitted.
    with path.open("r+") as file:
        file.write(str(value))


def _counter(path: Path, name: str) -> int:
    with contextlib.suppress(OSError, ValueError):
        for line in path.read_text().splitlines():
            key, _, value = line.partition(" ")
            if key == name:
                return int(value)
    return 0
