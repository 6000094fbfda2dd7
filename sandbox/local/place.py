"""Where a local sandbox is: as root with a host uid of its own.

::

    STATE/sandboxes/ID/
        ...         as every place
        cgroup      which group is its own
        images/     file-system images that it mounts
        bundle/     config.json
        runsc/      runsc's own state
"""

import os
from dataclasses import dataclass
from pathlib import Path

from sandbox import processes
from sandbox.cgroups import Group
from sandbox.errors import SandboxFailed
from sandbox.locks import Lock, make_locked
from sandbox.place import HostPlace, remove_files

_CGROUP = "cgroup"
UIDS = Path("/run/runner-uids")
"""Locks of the host uids in use; one place for the whole host, whatever the state directory."""


@dataclass(slots=True)
class LocalPlace(HostPlace):
    """See ``sandbox.model.Place``."""

    _uid_lock: Lock | None = None
    _released: bool = False

    @property
    def images(self) -> Path:
        return self.directory / "images"

    @property
    def bundle(self) -> Path:
        return self.directory / "bundle"

    def record_group(self, announced: str) -> None:
        """Notes which cgroup this sandbox gets, for a ``clean`` by another process."""
        (self.directory / _CGROUP).write_text(announced)

    @property
    def runsc_state(self) -> Path:
        return self.directory / "runsc"

    def release(self) -> None:
        if self._released:
            return
        clean(self.directory)
        self._released = True
        self._lock.release()
        if self._uid_lock is not None:
            self._uid_lock.release()


def reserve(sandboxes: Path, name: str, uids: range) -> LocalPlace:
    """Makes the place for one sandbox.

    Args:
        sandboxes: Directory of all places.
        name: Of this one; the build's id.
        uids: Host uids to choose from when this process is root.

    Raises:
        SandboxFailed: It exists already, or every uid is taken.
    """
    directory = sandboxes.resolve() / name
    as_root = os.geteuid() == 0
    uid_lock, uid = _reserve_uid(uids) if as_root else (None, os.geteuid())
    try:
        sandboxes.mkdir(parents=True, exist_ok=True)
        place = LocalPlace(name, directory, uid, make_locked(directory), uid_lock)
        place.make("local", {place.images: 0o750, place.bundle: 0o750, place.runsc_state: 0o700})
        if as_root:
            os.chown(place.runsc_state, uid, uid)
    except OSError as error:
        if uid_lock is not None:
            uid_lock.release()
        raise SandboxFailed(f"no place for the sandbox: {error}") from None
    return place


def _reserve_uid(uids: range) -> tuple[Lock, int]:
    UIDS.mkdir(mode=0o700, exist_ok=True)
    in_use = {process.uid for process in processes.alive()}
    for uid in uids:
        if uid in in_use:
            continue
        try:
            return Lock(UIDS / str(uid)), uid
        except BlockingIOError:
            continue
    raise SandboxFailed(f"every host uid from {uids.start} to {uids.stop - 1} is in use")


def clean(directory: Path) -> None:
    """Ends every process of the sandbox in ``directory`` and removes its files and groups.

    Raises:
        SandboxFailed: Something of it could not be removed.
    """
    group = _recorded_group(directory)
    root_option = f"--root={directory / 'runsc'}"
    owner = _owner(directory / "runsc")

    def belongs(process: processes.Process) -> bool:
        # Anybody can write this option on a command line, but only as who they are.
        return process.uid == owner and root_option in process.argv

    # Stubs of the Sentry have no command line: they are found below the process that traces them.
    roots = [process.pid for process in processes.alive() if belongs(process)]
    members = [child for root in roots for child in processes.descendants(root)]
    members += group.members() if group is not None else []
    known = {(member.pid, member.started) for member in members}
    if not processes.kill_all(lambda p: belongs(p) or (p.pid, p.started) in known):
        raise SandboxFailed(f"processes of {directory.name} do not end")
    if group is not None:
        group.remove()
    remove_files(directory)


def _owner(path: Path) -> int | None:
    try:
        return path.lstat().st_uid
    except (FileNotFoundError, NotADirectoryError):
        return None


def _recorded_group(directory: Path) -> Group | None:
    try:
        return Group.recorded((directory / _CGROUP).read_text())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
