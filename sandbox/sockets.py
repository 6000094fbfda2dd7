"""Unix sockets that one user of the host can connect to, and nobody else."""

import os
import socket
from pathlib import Path


def listen(directory: Path, name: str, *, peer_uid: int, backlog: int = 128) -> socket.socket:
    """A listening socket ``directory/name`` for ``peer_uid``, whom the caller has to check.

    Bound through a descriptor of the directory: a Unix address holds 108 bytes, and the path of
    a state directory may be longer.
    """
    fd = os.open(directory, os.O_PATH | os.O_DIRECTORY)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(f"/proc/self/fd/{fd}/{name}")
        path = directory / name
        if os.geteuid() == 0:
            os.chown(path, peer_uid, peer_uid)
        # Only root can give it away; whoever else connects is refused by who they are.
        path.chmod(0o600 if os.geteuid() in {0, peer_uid} else 0o666)
        listener.listen(backlog)
    except OSError:
        listener.close()
        raise
    finally:
        os.close(fd)
    return listener
