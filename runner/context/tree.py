"""Opens what lies in a hostile tree: relative to descriptors, never through a symbolic link."""

import errno
import os
import posixpath
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from runner.context.names import shown
from runner.errors import ContextInvalid

DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
"""O_NONBLOCK: a FIFO that took the file's place must not hold us."""

_GONE = {errno.ENOENT, errno.ELOOP, errno.ENOTDIR, errno.EINVAL, errno.ENXIO}
"""How the kernel says that an entry is no longer of the kind that was listed."""
_KINDS = {
    stat.S_IFSOCK: "a socket",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFREG: "a file",
    stat.S_IFDIR: "a directory",
    stat.S_IFLNK: "a symbolic link",
}


def kind(found: os.stat_result) -> str:
    """What an entry is, in words."""
    return _KINDS.get(stat.S_IFMT(found.st_mode), "of an unknown kind")


def changed(path: str) -> ContextInvalid:
    """The error of an entry that is not what it was a moment ago."""
    return ContextInvalid(
        f"{shown(path)} changed while it was read",
        advice="Try again when nothing writes to the context, or add it to .dockerignore.",
    )


@contextmanager
def reading(path: str) -> Iterator[None]:
    """Names ``path`` in what goes wrong with it."""
    try:
        yield
    except OSError as error:
        if error.errno in _GONE:
            raise changed(path) from None
        raise ContextInvalid(
            f"{shown(path)} in the context cannot be read: {os.strerror(error.errno or 0)}",
            advice="Mend its permissions, or add it to .dockerignore.",
        ) from None


@contextmanager
def opened(parent: int, path: str, found: os.stat_result, flags: int) -> Iterator[int]:
    """Opens the entry that was listed as ``found``, and nothing that has taken its place."""
    with reading(path):
        fd = os.open(posixpath.basename(path), flags, dir_fd=parent)
    try:
        now = os.fstat(fd)
        if (now.st_dev, now.st_ino, now.st_mode) != (found.st_dev, found.st_ino, found.st_mode):
            raise changed(path)
        yield fd
    finally:
        os.close(fd)


def open_root(directory: Path) -> int:
    """The context itself, links resolved. Raises ContextInvalid, saying what is wrong."""
    text = shown(str(directory))
    try:
        return os.open(directory, DIRECTORY & ~os.O_NOFOLLOW)
    except ValueError:
        raise ContextInvalid(f"not a path: {text}") from None
    except FileNotFoundError:
        raise ContextInvalid(f"the context {text} does not exist") from None
    except PermissionError:
        raise ContextInvalid(
            f"the context {text} cannot be read: permission denied",
            advice="Give this user read and search permission on it and its parents.",
        ) from None
    except OSError as error:
        raise ContextInvalid(f"the context {text} is {_what_is(directory, error)}") from None


def _what_is(directory: Path, error: OSError) -> str:
    try:
        return f"{kind(directory.stat())}, not a directory"
    except OSError:
        return f"unusable: {os.strerror(error.errno or 0)}"


def open_file(root: int, path: str) -> int | None:
    """The regular file at ``path`` below ``root``, or None where nothing lies there.

    Raises:
        ContextInvalid: Something else lies there or on the way, or it cannot be read.
    """
    parts = path.split("/")
    fd = os.dup(root)
    try:
        for index, part in enumerate(parts):
            here = "/".join(parts[: index + 1])
            with reading(here):
                try:
                    found = os.stat(part, dir_fd=fd, follow_symlinks=False)
                except FileNotFoundError:
                    return None
            last = index == len(parts) - 1
            if not (stat.S_ISREG if last else stat.S_ISDIR)(found.st_mode):
                raise ContextInvalid(
                    f"{shown(path)} must be a regular file, reached through directories; "
                    f"{shown(here)} is {kind(found)}",
                    advice="Put the file itself there; links in the context are not followed.",
                )
            with opened(fd, here, found, FILE if last else DIRECTORY) as child:
                os.dup2(child, fd, inheritable=False)
        return os.dup(fd)
    finally:
        os.close(fd)
