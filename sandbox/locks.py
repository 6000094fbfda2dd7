"""Directories that a lock marks as in use: gone with the process that holds it, however it ends.

A directory gets its name only when it is locked, so nobody who looks for abandoned ones can take
one that is being made.
"""

import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

LOCK = "lock"
_NEW = ".new-"
_NEW_SECONDS = 60
"""A directory that is still being made after this long never will be."""


class Lock:
    """An exclusive lock on a file."""

    def __init__(self, path: Path, *, create: bool = True) -> None:
        """Raises BlockingIOError where another process holds it."""
        flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | (os.O_CREAT if create else 0)
        self._fd = os.open(path, flags, 0o600)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._fd)
            raise

    def release(self) -> None:
        """May be called twice."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def make_locked(directory: Path) -> Lock:
    """Makes ``directory``, mode 0700, locked from its first moment on."""
    new = directory.with_name(_NEW + directory.name)
    new.mkdir(mode=0o700)
    lock = Lock(new / LOCK)
    new.rename(directory)
    return lock


def abandoned(parent: Path) -> Iterator[Path]:
    """Directories below ``parent`` whose makers are gone; each is locked while looked at."""
    if not parent.is_dir():
        return
    for directory in sorted(parent.iterdir()):
        if directory.name.startswith(_NEW):
            if time.time() - directory.lstat().st_mtime > _NEW_SECONDS:
                yield directory
            continue
        try:
            lock = Lock(directory / LOCK, create=False)
        except BlockingIOError:
            continue
        except (FileNotFoundError, NotADirectoryError):
            yield directory  # half removed
            continue
        try:
            yield directory
        finally:
            lock.release()
