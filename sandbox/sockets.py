"""Unix sockets that one user of the host can connect to, and nobody else."""

import os
import socket
from pathlib import Path


def listen(directory: Path, name: str, *, peer_uid: int, backlog: int = 128) -> socket.socket:
    """A listening socket ``directory/name`` that only ``peer_uid`` can connect to.

    Bound through a descriptor of the directory: a Unix address holds 108 bytes, and the path of
    a state directory may be longer.
    """
    fd = os.open(directory, os.O_PATH | os.O_DIRECTORY)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(f"/proc/self/fd/{fd}/{name}")
        path = directory / name
        if os.geteuid() != peer_uid:
            os.chown(path, peer_uid, peer_uid)
        path.chmod(0o600)
        listener.listen(backlog)
    except OSError:
        listener.close()
        raise
    finally:
        os.close(fd)
    return listener
