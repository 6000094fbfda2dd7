"""Doors that are found by a key: how a sandbox elsewhere gets to the Unix sockets of its place.

``runner gateway serve`` leads whoever shows the key of a door to one of its sockets, and to nothing
else. The key is the sandbox's own, and opens what the sandbox may reach anyway.
"""

import hashlib
import os
import secrets
import socket
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

NAMES = frozenset({"host", "files", "gateway", "outlet"})
"""Of the sockets that a door may have, each in a file ``NAME.sock``."""


@dataclass(frozen=True, slots=True)
class Key:
    """Opens one door.

    Attributes:
        secret: What the sandbox shows.
        link: Names the door where the service looks for it.
    """

    secret: str = field(repr=False)
    link: Path

    @classmethod
    def to(cls, door: Path, directory: Path) -> Self:
        """A new key to ``door``, which may be made later. Raises OSError."""
        secret = secrets.token_urlsafe(32)
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        link = directory / hidden(secret)
        link.symlink_to(door.resolve())
        return cls(secret, link)

    def revoke(self) -> None:
        """From now on it opens nothing; what is connected stays so. May be called twice."""
        self.link.unlink(missing_ok=True)


def hidden(secret: str) -> str:
    """What a key is looked up by: neither a listing nor the time that it takes tells the key."""
    return hashlib.sha256(secret.encode()).hexdigest()


def connect(directory: Path, link: str, name: str) -> socket.socket:
    """Connects to a socket of the door, one that does not block.

    Args:
        directory: Of the links.
        link: As ``hidden`` gives it.
        name: One of NAMES.

    Raises:
        OSError: There is no such door or socket, nobody listens, or too many wait to be heard.
    """
    # A Unix address holds 108 bytes, and the path of a state directory may be longer.
    fd = os.open(directory / link, os.O_PATH | os.O_DIRECTORY)
    peer = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # A runner that is stopped would keep us waiting for as long as it is.
        peer.setblocking(False)
        peer.connect(f"/proc/self/fd/{fd}/{name}.sock")
    except BaseException:
        peer.close()
        raise
    finally:
        os.close(fd)
    return peer


def sweep(directory: Path) -> int:
    """Removes links whose door is gone with its place, and counts them."""
    count = 0
    for link in directory.iterdir() if directory.is_dir() else ():
        with suppress(FileNotFoundError):  # revoked at this moment
            # ID/guest/door: a key may be made as soon as there is ID.
            if link.is_symlink() and not link.readlink().parent.parent.exists():
                link.unlink()
                count += 1
    return count
