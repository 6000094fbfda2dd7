"""Where one sandbox is on the host: a directory that a lock marks as in use.

::

    STATE/sandboxes/ID/
        lock        held by the living runner
        backend     its name; written before anything is started
        guest/      appears read-only as /run/runner inside
            init  plan  config/  door/

Each backend adds what it needs; ``sandbox.cleaning`` takes what nobody holds any more.
"""

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from policies.model import Limits
from sandbox import plan
from sandbox.errors import SandboxFailed
from sandbox.locks import Lock
from sandbox.model import OUTLET_SOCKET, SandboxSpec
from sandbox.outlet import Outlet
from sandbox.plan import SOCKETS, Ways

_BACKEND = "backend"


@dataclass(slots=True)
class HostPlace:
    """What every backend's place has. See ``sandbox.model.Place``.

    Attributes:
        name: Of the sandbox; the build's id, or made of it.
        peer_uid: Host uid that the sandbox reads its files and connects as.
    """

    name: str
    directory: Path
    peer_uid: int
    _lock: Lock

    @property
    def guest(self) -> Path:
        return self.directory / "guest"

    @property
    def door(self) -> Path:
        return self.guest / "door"

    def make(self, backend: str, directories: Mapping[Path, int]) -> None:
        """Notes whose place it is, and makes directories with their modes. Raises OSError."""
        (self.directory / _BACKEND).write_text(backend)
        guest = dict.fromkeys((self.guest, self.guest / "config", self.door), 0o750)
        for path, mode in {**guest, **directories}.items():
            path.mkdir()
            self.give(path, mode)
        # Host uid 0 gets in by being root, and nobody else does.
        self.give(self.directory, 0o700 if self.peer_uid == 0 else 0o750)

    def give(self, path: Path, mode: int) -> None:
        """Lets the sandbox's uid read ``path``, and as few others as can be."""
        if os.geteuid() == 0:
            os.chown(path, -1, self.peer_uid, follow_symlinks=False)
            path.chmod(mode)
        elif self.peer_uid == os.geteuid():
            path.chmod(mode & 0o700)  # the group is the user's, with others in it
        else:  # only root can give it away: it is for everybody who gets as far
            path.chmod(mode & 0o700 | mode >> 3 & 0o007)

    def write(self, path: Path, data: bytes, mode: int = 0o440) -> None:
        """A file that the sandbox can read."""
        path.write_bytes(data)
        self.give(path, mode)

    def furnish(self, spec: SandboxSpec) -> None:
        """Writes the guest's files but for the plan: the first process, and the plan's files.

        Raises:
            SandboxFailed: This installation has no first process.
        """
        init = resources.files("sandbox").joinpath("guest", "init")
        if not init.is_file():
            raise SandboxFailed(
                "the sandbox's first process is not part of this installation",
                advice="Install the wheel (pip install .): building it compiles "
                "the C sources in sandbox/guest.",
            )
        self.write(self.guest / "init", init.read_bytes(), 0o550)
        for name, data in spec.plan.files.items():
            self.write(self.guest / "config" / name, data)

    def write_plan(self, spec: SandboxSpec, nonce: str, ways: Ways = SOCKETS) -> None:
        """What the first process does; ``nonce`` makes the lines known that it writes."""
        self.write(self.guest / "plan", plan.render(spec, nonce, ways))

    def hand_in_all(self, inputs: Mapping[str, Path]) -> None:
        """Gives the sandbox its inputs, by their names below the door."""
        for name, path in inputs.items():
            self.hand_in(path, self.door / name)

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

    def outlet(self, collect: Callable[[memoryview], None], limits: Limits) -> Outlet:
        """The way out for the one file that the sandbox makes."""
        return Outlet(
            self.door,
            OUTLET_SOCKET,
            collect,
            peer_uid=self.peer_uid,
            most_bytes=limits.disk_bytes,
        )


def backend_of(directory: Path) -> str:
    """Name of the backend whose place ``directory`` is; the local one's where nobody got as far."""
    try:
        return (directory / _BACKEND).read_text(errors="replace")
    except (FileNotFoundError, NotADirectoryError):
        return "local"


def remove_files(directory: Path) -> None:
    """Removes the place itself. Raises SandboxFailed where something stays."""
    shutil.rmtree(directory, ignore_errors=False, onerror=_ignore_missing)


def _ignore_missing(function: object, path: str, info: object) -> None:
    del function, info
    if os.path.lexists(path):
        raise SandboxFailed(f"{path} cannot be removed")
