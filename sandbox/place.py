"""Where a local sandbox lives on the host: a directory, a lock, and as root a uid of its own.

::

    STATE/sandboxes/ID/
        lock        held by the living runner
        cgroup      which group is its own
        guest/      appears read-only as /run/runner inside
            init  plan  config/  door/
        images/     file-system images that it mounts
        bundle/     config.json
        runsc/      runsc's own state
"""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from sandbox import processes
from sandbox.cgroups import Group
from sandbox.errors import SandboxFailed
from sandbox.locks import Lock, make_locked

_CGROUP = "cgroup"
UIDS = Path("/run/runner-uids")
"""Locks of the host uids in use; one place for the whole host, whatever the state directory."""


@dataclass(slots=True)
class LocalPlace:
    """See ``sandbox.model.Place``."""

    name: str
    directory: Path
    peer_uid: int
    _lock: Lock
    _uid_lock: Lock | None
    _released: bool = False

    @property
    def guest(self) -> Path:
        return self.directory / "guest"

    @property
    def door(self) -> Path:
        return self.guest / "door"

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

    def give(self, path: Path, mode: int) -> None:
        """Lets the sandbox's uid read ``path``, and nobody else but its owner."""
        if self._uid_lock is not None:
            os.chown(path, -1, self.peer_uid, follow_symlinks=False)
            path.chmod(mode)
        else:
            path.chmod(mode & 0o700)  # the group is the user's, with others in it

    def hand_in(self, path: Path, inside: Path) -> None:
        """Gives the sandbox ``path`` as ``inside``, without copying it where that is possible."""
        for directory in reversed(inside.relative_to(self.directory).parents):
            if not (made := self.directory / directory).exists():
                made.mkdir()
                self.give(made, 0o750)
        try:
            os.link(path, inside)
        except OSError:  # another file system
            shutil.copyfile(path, inside)
        # What everybody can read may be shared with other sandboxes: it stays as it is.
        if not inside.stat().st_mode & 0o004:
            self.give(inside, 0o440)

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
        for made, mode in (
            (place.guest, 0o750),
            (place.guest / "config", 0o750),
            (place.door, 0o750),
            (place.images, 0o750),
            (place.bundle, 0o750),
            (place.runsc_state, 0o700),
        ):
            made.mkdir()
            place.give(made, mode)
        if as_root:
            os.chown(place.runsc_state, uid, uid)
        place.give(directory, 0o750)
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
    shutil.rmtree(directory, ignore_errors=False, onerror=_ignore_missing)


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


def _ignore_missing(function: object, path: str, info: object) -> None:
    del function, info
    if os.path.lexists(path):
        raise SandboxFailed(f"{path} cannot be removed")
