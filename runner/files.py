"""Files that are written whole or not at all, and the places where runner keeps them."""

import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from runner.errors import DiskExceeded, StateUnusable

SYSTEM = Path("/var/lib/runner")
"""Where root's state is: a sandbox has a uid of its own, and root's home is closed to it."""


@contextlib.contextmanager
def disk_full_is_a_limit(path: Path) -> Iterator[None]:
    """Raises DiskExceeded, naming ``path``, where the system says that there is no space."""
    try:
        yield
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            raise DiskExceeded(
                f"the file system of {path} is full",
                advice="Free space there; `runner gc` removes what killed builds left.",
            ) from None
        raise


def write_whole(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Writes ``path`` so that a reader never sees half of it."""
    temporary = path.with_name(f".{path.name}-{secrets.token_hex(8)}")
    try:
        with disk_full_is_a_limit(path):
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
            with os.fdopen(fd, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.rename(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@dataclass(frozen=True, slots=True)
class Home:
    """The directories of one user, or of the system when run as root.

    Attributes:
        data: Builders and base images, by digest; may be removed and fetched again.
        state: One directory per build, and the places of running sandboxes.
    """

    data: Path
    state: Path

    @classmethod
    def find(cls, environ: Mapping[str, str] = os.environ) -> Self:
        """By the XDG base directory specification; as root, /var/lib/runner stands in."""
        return cls(
            data=_xdg(environ, "XDG_DATA_HOME", ".local/share", SYSTEM / "data"),
            state=_xdg(environ, "XDG_STATE_HOME", ".local/state", SYSTEM / "state"),
        )

    @property
    def builders(self) -> Path:
        return self.data / "builders"

    @property
    def base_images(self) -> Path:
        return self.data / "base"

    @property
    def gateway(self) -> Path:
        return self.state / "gateway"

    @property
    def doors(self) -> Path:
        return self.gateway / "doors"

    @property
    def unpacked(self) -> Path:
        return self.data / "unpacked"

    @property
    def builds(self) -> Path:
        return self.state / "builds"

    @property
    def sandboxes(self) -> Path:
        return self.state / "sandboxes"

    def prepare(self) -> None:
        """Makes the directories.

        Raises:
            StateUnusable: They cannot be made or written, or a sandbox could not reach them.
        """
        try:
            with disk_full_is_a_limit(self.state):
                self._make()
        except OSError as error:
            raise StateUnusable(f"{error.filename}: {error.strerror}") from None
        if os.geteuid() == 0:
            self._require_safe()

    def _make(self) -> None:
        for directory in (self.data, self.state):
            directory.mkdir(parents=True, exist_ok=True)
            probe = directory / f".writable-{secrets.token_hex(8)}"
            probe.touch()
            probe.unlink()
        private_ones = (self.builds, self.gateway, self.doors, self.base_images, self.unpacked)
        for directory in (self.builders, self.sandboxes, *private_ones):
            directory.mkdir(exist_ok=True)
        for private in private_ones:
            private.chmod(0o700)

    def _require_safe(self) -> None:
        for directory in (self.data, self.state):
            for part in (directory, *directory.parents):
                status = part.stat()
                loose = status.st_mode & 0o022 and not status.st_mode & stat.S_ISVTX
                if status.st_uid != 0 or loose:
                    raise StateUnusable(
                        f"{part} can be changed by others, and root's runner removes and kills by "
                        f"what it finds in {directory}",
                        advice="Leave XDG_DATA_HOME and XDG_STATE_HOME unset for /var/lib/runner.",
                    )
                if not status.st_mode & 0o001:
                    raise StateUnusable(
                        f"{part} is closed to other users, and as root each sandbox has a "
                        f"uid of its own that must reach {directory}",
                        advice="Leave XDG_DATA_HOME and XDG_STATE_HOME unset for /var/lib/runner.",
                    )


def _xdg(environ: Mapping[str, str], name: str, below_home: str, as_root: Path) -> Path:
    """A relative path is ignored, as the specification asks."""
    named = Path(environ.get(name, ""))
    if named.is_absolute():
        return named / "runner"
    if os.geteuid() == 0:
        return as_root
    return Path(environ.get("HOME") or "/nonexistent") / below_home / "runner"
